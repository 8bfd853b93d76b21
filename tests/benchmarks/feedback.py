"""How fast votes become training rows, in how much memory, and how many of the pairs are right.

    python tests/benchmarks/feedback.py table 200000 --soup PYTHON    all of them on one log, as a Markdown table
    python tests/benchmarks/feedback.py array 1000000000              a JSON array of Open WebUI's shape, read by align
    python tests/benchmarks/feedback.py make 200000 LOG               write such a log and say what is in it
    python tests/benchmarks/feedback.py align|pandas|pandas-trl|soup LOG OUT    one of them

The log is of canonical events of 1.5 kB: half of the prompts stand alone, the others are popular as words are (Zipf);
30 % of the contexts have earlier turns and many of these end with the same short question; 5,000 users, 75 % thumbs up,
5 % comparisons, 2 % edits, 3 % votes that a user gives a second time, otherwise. Of these about 59 % end in rows. With
--few the prompts are few and popular, so that most votes are on answers that have others: about 20 % end in rows.

- align: `align feedback LOG -o OUT`, without and with its replacement of personal data.
- pandas: the script that is written for this by hand. It keeps the latest vote of a user on an answer, and one row of
  each answer that is up or down, before ups meet downs on the whole context; else these grow with the votes' square.
  It knows thumbs only and writes plain texts. "As TRL loads it" is this script with comparisons and edits, and with
  rows as ours are: messages, shuffled, split by prompt.
- soup: soup-cli of PyPI, which keeps thumbs in SQLite: `soup local-rl harvest`. The thumbs stand there already when it
  starts, in the order of their times, with the whole context as the prompt. It has no users, so each vote counts anew,
  no comparisons, no edits, and no rows without a partner. PYTHON is the interpreter of an environment that has it.

Each runs in a process of its own. Seconds of CPU are those of the process and its children, peak memory is that of the
whole tree, looked at every 50 ms. A pair is right if its texts stand in the log under the same whole context and, by
the latest vote of each user, more say up than down of what is chosen, and fewer of what is rejected; or if a comparison
or an edit says just this more often than its opposite.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Pair = tuple[str, str, str]
"""The context in one text, what is chosen, what is rejected."""

START = 1_760_000_000
USERS = 5_000
VARIANTS = 8
"""How many answers a popular prompt has."""
SHORT_TURNS = ("And why?", "Can you make it shorter?", "Are you sure?", "Please write it as a list.")

# --- the log ----------------------------------------------------------------------------------------------------------


def events(count: int, *, few: bool = False, seed: int = 0) -> Iterator[Event]:
    """Yield canonical events in no order of time; `few` are of few prompts, so that most are votes on known answers."""
    draw = random.Random(seed)
    sentences = _sentences(draw)
    stand_alone, popular = (0.07, max(1, count // 36)) if few else (0.4, max(1, count // 10))
    weights = list(accumulate(1 / (rank + 1) ** 0.8 for rank in range(popular)))
    recent: list[Event] = []
    for number in range(count):
        if recent and draw.random() < 0.03:
            yield _again(draw.choice(recent), number, draw)
            continue
        alone = draw.random() < stand_alone
        name = popular + number if alone else bisect(weights, draw.random() * weights[-1])
        event = _event(name, number, draw, sentences)
        yield event
        if event["event_type"] == "rating":
            recent = [*recent[-99:], event]


def _sentences(draw: random.Random) -> list[str]:
    words = [
        "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))
        for _ in range(2_000)
    ]
    return [" ".join(draw.choice(words) for _ in range(draw.randint(8, 16))).capitalize() + "." for _ in range(4_000)]


def _text(name: str, count: int, sentences: Sequence[str]) -> str:
    """Return the text of a name, always the same; one in fifty holds a person's address."""
    draw = random.Random(name)
    chosen = [f"[{name}]", *(sentences[draw.randrange(len(sentences))] for _ in range(count))]
    if draw.random() < 0.02:
        chosen.append(f"Write to name{draw.randrange(1000)}@example.org or call +49 30 {draw.randrange(10**6, 10**7)}.")
    return " ".join(chosen)


def _context(name: int, sentences: Sequence[str]) -> str | list[dict[str, str]]:
    """Return the prompt of a number: in three of ten a conversation."""
    draw = random.Random(name)
    first = _text(f"question {name}", 4, sentences)
    if draw.random() >= 0.3:
        return first
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": _text(f"first answer {name}", 3, sentences)},
        {"role": "user", "content": draw.choice(SHORT_TURNS)},
    ]


def _event(name: int, number: int, draw: random.Random, sentences: Sequence[str]) -> Event:
    event: Event = {
        "event_id": f"e{number}",
        "ts": START + draw.randrange(10_000_000),
        "user_id": f"user-{draw.randrange(USERS)}",
        "conversation_id": f"c{name}-{draw.randrange(1000)}",
        "prompt": _context(name, sentences),
    }
    variants = draw.sample(range(VARIANTS), 2)
    answers = [_text(f"answer {name} {variant}", 14, sentences) for variant in variants]
    models = [f"model-{variant % 2}" for variant in variants]
    kind = draw.random()
    if kind < 0.05:
        alternatives = [{"response": text, "model": model} for text, model in zip(answers, models, strict=True)]
        return {**event, "event_type": "comparison", "alternatives": alternatives, "winner": draw.choice([0, 1, "tie"])}
    if kind < 0.07:
        edited = f"{_text(f'edit {number}', 4, sentences)} {answers[0][-300:]}"
        edit = {"event_type": "edit", "response": edited, "original_response": answers[0]}
        return {**event, **edit, "model": models[0]}
    label = 1 if draw.random() < 0.75 else -1
    return {**event, "event_type": "rating", "response": answers[0], "label": label, "model": models[0]}


def _again(event: Event, number: int, draw: random.Random) -> Event:
    """Return a later vote of the same user on the same answer, the other way."""
    later = event["ts"] + draw.randrange(1, 100_000)
    return {**event, "event_id": f"e{number}", "ts": later, "label": -event["label"]}


def make(count: int, path: Path, *, few: bool = False) -> None:
    """Write a log and print what is in it."""
    kinds: Counter[str] = Counter()
    prompts, up = set(), 0
    with path.open("w", encoding="utf-8") as file:
        for event in events(count, few=few):
            file.write(json.dumps(event) + "\n")
            kinds[event["event_type"]] += 1
            prompts.add(hash(flat(event["prompt"])))
            up += event.get("label") == 1
    said = ", ".join(f"{kind} {number:,}" for kind, number in kinds.most_common())
    size = path.stat().st_size
    print(f"{count:,} events of {size / count:,.0f} bytes: {said}; {up / kinds['rating']:.0%} of the ratings up; "
          f"{len(prompts):,} prompts")  # fmt: skip


def flat(prompt: str | list[dict[str, str]]) -> str:
    """Return a whole context in one text."""
    if isinstance(prompt, str):
        return f"user: {prompt}"
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


# --- what is right ----------------------------------------------------------------------------------------------------


class Oracle:
    """What the log says about each answer and each two answers."""

    def __init__(self, log: Path) -> None:
        votes: dict[tuple[str, str, str], tuple[float, int]] = {}
        self._said: Counter[Pair] = Counter()
        for event in _read(log):
            context = flat(event["prompt"])
            if event["event_type"] == "rating":
                vote = (event["user_id"], context, event["response"])
                votes[vote] = max(votes.get(vote, (0, 0)), (event["ts"], event["label"]))
            elif event["event_type"] == "edit":
                self._said[context, event["response"], event["original_response"]] += 1
            elif event["winner"] in (0, 1):
                texts = [one["response"] for one in event["alternatives"]]
                self._said[context, texts[event["winner"]], texts[1 - event["winner"]]] += 1
        self._net: Counter[tuple[str, str]] = Counter()
        for (_, context, response), (_, label) in votes.items():
            self._net[context, response] += label

    def right(self, pair: Pair) -> bool:
        context, chosen, rejected = pair
        voted = self._net.get((context, chosen), 0) > 0 > self._net.get((context, rejected), 0)
        return voted or self._said[pair] > self._said[context, rejected, chosen]


def _read(path: Path) -> Iterator[Any]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def pairs(what: str, out: Path) -> Iterator[Pair]:
    """Yield the pairs that one of them wrote."""
    if what in ("align", "pandas-trl"):
        for split in ("train", "test"):
            for row in _read(out / f"pairs.{split}.jsonl"):
                yield flat(row["prompt"]), row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    else:
        for row in _read(out / "pairs.jsonl"):
            yield row["prompt"], row["chosen"], row["rejected"]


# --- the ways ---------------------------------------------------------------------------------------------------------


def with_pandas(log: Path, out: Path) -> None:
    """Write pairs and the rows left over as a script of twenty lines does."""
    import pandas as pd

    votes = pd.read_json(log, lines=True)
    votes = votes[votes.event_type == "rating"].sort_values("ts")
    votes["prompt"] = votes.prompt.map(flat)
    votes = votes.drop_duplicates(["user_id", "prompt", "response"], keep="last")
    rows = votes[["prompt", "response", "label"]].drop_duplicates()
    ups, downs = rows[rows.label == 1], rows[rows.label == -1]
    both = ups.merge(downs, on="prompt", suffixes=("_up", "_down"))
    both = both[both.response_up != both.response_down]
    both = both.rename(columns={"response_up": "chosen", "response_down": "rejected"})
    left = rows[~rows.prompt.isin(both.prompt)]
    out.mkdir(parents=True, exist_ok=True)
    both[["prompt", "chosen", "rejected"]].to_json(out / "pairs.jsonl", orient="records", lines=True)
    left.to_json(out / "unpaired.jsonl", orient="records", lines=True)


def with_pandas_as_trl(log: Path, out: Path) -> None:
    """Write what `with_pandas` does as TRL loads it, in messages, shuffled and split by prompt; comparisons and edits
    are pairs too."""
    import pandas as pd

    said = pd.read_json(log, lines=True)
    said["prompt"] = said.prompt.map(_messages)
    said["key"] = said.prompt.map(json.dumps)
    votes = said[said.event_type == "rating"].sort_values("ts")
    votes = votes.drop_duplicates(["user_id", "key", "response"], keep="last")
    rows = votes[["key", "prompt", "response", "label"]].drop_duplicates(["key", "response", "label"])
    ups, downs = rows[rows.label == 1], rows[rows.label == -1][["key", "response"]]
    thumbs = ups.merge(downs, on="key", suffixes=("_up", "_down"))
    thumbs = thumbs.rename(columns={"response_up": "chosen", "response_down": "rejected"})
    compared = said[(said.event_type == "comparison") & said.winner.isin([0, 1])].copy()
    for side, lost in (("chosen", 0), ("rejected", 1)):
        texts = zip(compared.alternatives, compared.winner, strict=True)
        compared[side] = [both[abs(int(winner) - lost)]["response"] for both, winner in texts]
    edits = said[said.event_type == "edit"].rename(columns={"response": "chosen", "original_response": "rejected"})
    both = pd.concat([one[["key", "prompt", "chosen", "rejected"]] for one in (compared, edits, thumbs)])
    both = both[both.chosen != both.rejected].drop_duplicates(["key", "chosen", "rejected"])
    left = rows[~rows.key.isin(both.key)].rename(columns={"response": "completion"})
    out.mkdir(parents=True, exist_ok=True)
    for name, table, answers in (("pairs", both, ["chosen", "rejected"]), ("unpaired", left, ["completion"])):
        table = table.sample(frac=1, random_state=0)
        table[answers] = table[answers].map(lambda text: [{"role": "assistant", "content": text}])
        if "label" in table:
            table["label"] = table.label == 1
        test = pd.util.hash_pandas_object(table.key, index=False) % 20 == 0
        for side, part in (("train", table[~test]), ("test", table[test])):
            part.drop(columns="key").to_json(out / f"{name}.{side}.jsonl", orient="records", lines=True)


def _messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def fill_soup(log: Path, out: Path) -> None:
    """Write the thumbs of a log where soup-cli keeps them, in its own table."""
    thumbs = sorted(
        (event["ts"], flat(event["prompt"]), event["response"], "up" if event["label"] == 1 else "down")
        for event in _read(log)
        if event["event_type"] == "rating"
    )
    with sqlite3.connect(out / "local_rl.db") as base:
        base.executemany("INSERT INTO thumbs (ts, prompt, response, thumb) VALUES (?, ?, ?, ?)", thumbs)


def soup_command(log: Path, out: Path, python: str) -> list[str]:
    """Prepare soup-cli's data base and return the command that makes pairs of it."""
    out.mkdir(parents=True, exist_ok=True)
    soup = [python, "-m", "soup_cli.cli", "local-rl"]
    subprocess.run([*soup, "init", "--db", "local_rl.db"], cwd=out, check=True, stdout=subprocess.DEVNULL)
    fill_soup(log, out)
    return [*soup, "harvest", "--db", "local_rl.db", "-o", "pairs.jsonl"]


def align_command(log: Path, out: Path, pii: str) -> list[str]:
    command = [sys.executable, "-m", "align_pipeline.pipeline.cli", "feedback", str(log), "-o", str(out)]
    return [*command, "--store", str(out.with_name(f"{out.name}-store")), "--set", f"pii={pii}"]


# --- what it takes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    wall: float
    cpu: float
    peak: int
    """Bytes of the whole tree of processes."""


def measure(command: Sequence[str], cwd: Path | None = None) -> Cost:
    """Run a command and return what it took; stop where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watch = _Watch(process.pid)
    said: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda pipe: said.append(pipe.read()), args=(process.stdout,))
    reader.start()
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.done.set()
    watch.join()
    reader.join()
    if process.returncode:
        text = b"".join(said).decode("utf-8", "replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}\n{text}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, watch.peak)


class _Watch(threading.Thread):
    """Looks at the memory of a process and its children every 50 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peak = 0
        self._pid = pid

    def run(self) -> None:
        import psutil

        while not self.done.wait(0.05):
            try:
                root = psutil.Process(self._pid)
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(_memory, tree)))


def _memory(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def table(count: int, soup: str | None, *, few: bool = False) -> None:
    """Print what each takes of one log and what its pairs are worth."""
    with tempfile.TemporaryDirectory(prefix="feedback-") as folder:
        log = Path(folder) / "log.jsonl"
        make(count, log, few=few)
        oracle = Oracle(log)
        columns = "| | events per s | wall s | CPU s | peak MB | pairs | right pairs |"
        print(f"\n{columns}\n" + "|---" * (columns.count("|") - 1) + "|", flush=True)
        for title, what, command, cwd in _ways(log, Path(folder), soup):
            try:
                cost = measure(command, cwd)
            except RuntimeError as error:
                print(f"| {title} | fails |", flush=True)
                print(error, file=sys.stderr)
                continue
            found = list(pairs(what, cwd))
            right = "" if "replaced" in title else f"{sum(map(oracle.right, found)):,}"
            took = f"{count / cost.wall:,.0f} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.peak / 1e6:,.0f}"
            print(f"| {title} | {took} | {len(found):,} | {right} |", flush=True)


def _ways(log: Path, folder: Path, soup: str | None) -> Iterator[tuple[str, str, list[str], Path]]:
    """Yield a title, whose output it is, the command and the folder that it writes to."""
    for pii, title in (("off", "align"), ("fast", "align, personal data replaced")):
        out = folder / f"align-{pii}"
        out.mkdir()
        yield title, "align", align_command(log, out, pii), out
    for what, title in (("pandas", "pandas script"), ("pandas-trl", "pandas script, as TRL loads it")):
        out = folder / what
        out.mkdir()
        yield title, what, [sys.executable, str(Path(__file__).resolve()), what, str(log), str(out)], out
    if soup:
        out = folder / "soup"
        yield "soup-cli", "soup", soup_command(log, out, soup), out


# --- an array of Open WebUI -------------------------------------------------------------------------------------------


def write_array(path: Path, size: int) -> int:
    """Write a JSON array of at least so many bytes as Open WebUI exports it; return how many events it has."""
    sentences = _sentences(random.Random(0))
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        while file.tell() < size:
            for _ in range(100):
                file.write((",\n" if count else "") + json.dumps(_exported(count, sentences)))
                count += 1
        file.write("]\n")
    return count


def _exported(number: int, sentences: Sequence[str]) -> Event:
    """Return one feedback of Open WebUI: a question with two answers, one of which is rated."""
    draw = random.Random(number)
    name, chat, at = number // 2, f"chat-{number}", START + number
    models = ["llama3", "qwen3"]
    question = {"id": "m0", "parentId": None, "childrenIds": ["m1", "m2"], "role": "user", "models": models}
    messages: dict[str, Any] = {"m0": {**question, "content": _text(f"question {name}", 4, sentences), "timestamp": at}}
    for place, model in enumerate(models, 1):
        text = _text(f"answer {name} {place if number % 2 else 3 - place}", 9, sentences)
        answer = {"id": f"m{place}", "parentId": "m0", "childrenIds": [], "role": "assistant", "content": text}
        messages[f"m{place}"] = {**answer, "model": model, "modelIdx": place - 1, "timestamp": at + 4, "done": True}
    user, model = f"user-{draw.randrange(USERS)}", models[0]
    return {
        "id": f"f{number}",
        "user_id": user,
        "version": 0,
        "type": "rating",
        "data": {"rating": draw.choice([1, 1, 1, -1]), "model_id": model, "sibling_model_ids": [models[1]],
                 "reason": "", "comment": "", "tags": [], "details": {"rating": 5}},
        "meta": {"arena": False, "model_id": model, "message_id": "m1", "message_index": 1, "chat_id": chat,
                 "base_models": {}},
        "snapshot": {"chat": {"id": chat, "user_id": user, "title": "t", "created_at": at, "updated_at": at + 9,
                              "chat": {"models": models, "params": {}, "messages": [],
                                       "history": {"currentId": "m1", "messages": messages}}}},
        "created_at": at + 5,
        "updated_at": at + 9,
    }  # fmt: skip


def array(size: int) -> None:
    """Print what an array of so many bytes takes."""
    with tempfile.TemporaryDirectory(prefix="feedback-") as folder:
        path, out = Path(folder) / "feedback.json", Path(folder) / "out"
        count = write_array(path, size)
        print(f"{path.stat().st_size / 1e6:,.0f} MB, {count:,} events", flush=True)
        cost = measure(align_command(path, out, "off"))
        rate = path.stat().st_size / 1e6 / cost.wall
        print(f"{cost.wall:.1f} s, {cost.cpu:.1f} s of CPU, {rate:,.0f} MB/s, peak {cost.peak / 1e6:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("align", "pandas", "pandas-trl", "soup"):
        command = commands.add_parser(name)
        command.add_argument("log", type=Path)
        command.add_argument("out", type=Path)
    for name, counted in (("make", "events"), ("table", "events"), ("array", "bytes")):
        command = commands.add_parser(name)
        command.add_argument("count", type=int, metavar=counted)
        if name == "make":
            command.add_argument("log", type=Path)
    for name in ("make", "table"):
        commands.choices[name].add_argument("--few", action="store_true", help="a log of few prompts")
    for name in ("soup", "table"):
        commands.choices[name].add_argument("--soup", metavar="PYTHON", help="of an environment with soup-cli")
    given = parser.parse_args()
    if given.what == "make":
        make(given.count, given.log, few=given.few)
    elif given.what == "table":
        table(given.count, given.soup, few=given.few)
    elif given.what == "array":
        array(given.count)
    elif given.what == "pandas":
        with_pandas(given.log, given.out)
    elif given.what == "pandas-trl":
        with_pandas_as_trl(given.log, given.out)
    elif given.what == "soup":
        command = soup_command(given.log.resolve(), given.out, given.soup or sys.executable)
        subprocess.run(command, cwd=given.out, check=True)
    else:
        subprocess.run(align_command(given.log, given.out, "fast"), check=True)


if __name__ == "__main__":
    main()
