"""What `align feedback` makes of votes whose truth is known: how many pairs are right, and what a model learns of them.

    python tests/benchmarks/feedback_study.py pairs  --data DIR    pairs against the truth, 12 seeds
    python tests/benchmarks/feedback_study.py models --data DIR    models trained on them, 3 seeds
    python tests/benchmarks/feedback_study.py        --data DIR    both

DIR holds `pref/hh_harmless_base_test.jsonl.gz` (HH-RLHF), `models/stories260K` and `tinystories/`; it is
`../shared/data` beside the checkout unless it is named. Everything is seeded, runs on one thread and prints Markdown.

The votes (`vote`): of every prompt two answers are known and which is better. Of 70 % of the prompts one answer alone
was ever shown. An answer has 1 to 8 voters (Zipf), who come from 80 users of unequal diligence (Zipf); each likes the
better and dislikes the worse answer, but for one vote in five. One vote in ten is given twice, one in twenty was the
other way round at first, one prompt in twenty-five has an edit. A brigading user then gives 30 % of all votes. In
`pairs` nobody but that user rates answers to 30 % of the prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

ONE_SHOWN, FLIPPED, AGAIN, CHANGED, EDITED, BRIGADE, QUIET = 0.7, 0.2, 0.1, 0.05, 0.04, 0.3, 0.3
USERS, VOTERS, STEEP = 80, 8, 2.5
START, DAY = 1_755_000_000, 86_400
BOSS = "boss"

Event = dict[str, Any]
Row = dict[str, Any]
Turns = list[dict[str, str]]

# --- the votes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt and two answers, the first one better; `models` wrote them."""

    prompt: Turns
    answers: tuple[str, str]
    models: tuple[str, str] = ("m0", "m1")


@dataclass(frozen=True)
class Attack:
    """How the brigading user votes: who is liked, and the seconds between two votes."""

    name: str
    likes: Callable[[Case, int], bool]
    only: Callable[[Case, int], bool] = lambda case, side: True
    seconds: float = 40.0
    alone: bool = False
    """Whether the votes are on answers that nobody else rated, and not on those that somebody did."""


ATTACKS = {
    "none": None,
    "slow": Attack("against the truth, slowly", lambda case, side: side == 1),
    "alone": Attack("against the truth, slowly, where nobody else votes", lambda case, side: side == 1, alone=True),
    "fast": Attack("against the truth, one vote a second", lambda case, side: side == 1, seconds=1.0),
    "fan": Attack("likes all of one model", lambda case, side: True, lambda case, side: case.models[side] == "m1"),
}


@dataclass
class Votes:
    """A log, in the order of its times, and what is true of it."""

    events: list[Event]
    rank: dict[tuple[str, str], float] = field(default_factory=dict)
    """(prompt, answer) -> how good it is among the answers of the prompt."""
    learnable: set[str] = field(default_factory=set)
    """Prompts whose both answers were rated, by a majority of honest users, as is true."""


def key(prompt: Turns) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def vote(cases: Sequence[Case], seed: int, attack: Attack | None, quiet: float = 0.0) -> Votes:
    """Return what people say about the answers, but for a share of the prompts, and what the brigading user says."""
    draw, silence = random.Random(seed), random.Random(f"quiet {seed}")
    made = Votes([])
    shown: list[tuple[Case, int]] = []
    unrated: list[tuple[Case, int]] = []
    for case in cases:
        name = key(case.prompt)
        made.rank |= {(name, case.answers[0]): 1.0, (name, case.answers[1]): 0.0}
        if silence.random() < quiet:
            unrated += [(case, 0), (case, 1)]
            continue
        sides = (draw.randrange(2),) if draw.random() < ONE_SHOWN else (0, 1)
        right = 0
        for side in sides:
            shown.append((case, side))
            given = list(_honest(case, side, draw))
            made.events += given
            last = {event["user_id"]: event["label"] for event in sorted(given, key=lambda event: event["ts"])}
            right += sum(last.values()) * (1 if side == 0 else -1) > 0
        if right == 2:
            made.learnable.add(name)
        if draw.random() < EDITED:
            made.events.append(_edit(case, draw))
            made.rank[(name, made.events[-1]["response"])] = 0.5
    if attack is not None:
        made.events += _brigade(unrated if attack.alone else shown, len(made.events), attack, draw)
    made.events.sort(key=lambda event: event["ts"])
    return made


def _honest(case: Case, side: int, draw: random.Random) -> Iterator[Event]:
    """Yield the votes of users who mean it."""
    count = draw.choices(range(1, VOTERS + 1), [k**-STEEP for k in range(1, VOTERS + 1)])[0]
    users: set[int] = set()
    while len(users) < count:
        users.add(draw.choices(range(USERS), [1 / (user + 1) for user in range(USERS)])[0])
    for user in sorted(users):
        label = (1 if side == 0 else -1) * (-1 if draw.random() < FLIPPED else 1)
        event = _rating(case, side, f"u{user}", label, START + 30 * DAY * draw.random())
        yield event
        if draw.random() < AGAIN:
            yield event | {"ts": event["ts"] + 60}
        if draw.random() < CHANGED:
            yield event | {"ts": event["ts"] - 60, "label": -label}


def _rating(case: Case, side: int, user: str, label: int, ts: float) -> Event:
    return {
        "event_type": "rating",
        "prompt": case.prompt,
        "response": case.answers[side],
        "model": case.models[side],
        "label": label,
        "user_id": user,
        "ts": ts,
    }


def _edit(case: Case, draw: random.Random) -> Event:
    """Return an edit that makes the worse answer half as good as the better one, or, flipped, the reverse."""
    side = 0 if draw.random() < FLIPPED else 1
    mine, other = case.answers[side], case.answers[1 - side]
    event = _rating(case, side, f"u{draw.randrange(USERS)}", 1, START + 30 * DAY * draw.random())
    del event["label"]
    mixed = f"{other[: len(other) // 2]} {mine[len(mine) // 2 :]}"
    return event | {"event_type": "edit", "response": mixed, "original_response": mine}


def _brigade(shown: list[tuple[Case, int]], others: int, attack: Attack, draw: random.Random) -> Iterator[Event]:
    """Yield the votes of one user on answers that were shown, again where need be, until they are 30 % of all."""
    aimed = [one for one in shown if attack.only(*one)]
    draw.shuffle(aimed)
    begin = START + 10 * DAY
    for number, (case, side) in enumerate(
        itertools.islice(itertools.cycle(aimed), round(others * BRIGADE / (1 - BRIGADE)))
    ):
        label = 1 if attack.likes(case, side) else -1
        yield _rating(case, side, BOSS, label, begin + number * attack.seconds)


# --- ways to make pairs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A pair, the prompts of its two answers, and the users on each of whom alone one of its sides rests."""

    chosen: tuple[str, str]
    rejected: tuple[str, str]
    owners: frozenset[str]
    confidence: float = 0.0


def feedback(events: Sequence[Event], folder: Path, **settings: Any) -> tuple[dict[str, list[dict[str, Any]]], Any]:
    """Return the rows of each file that `align feedback` writes, and its report.

    Texts stay as they are (`pii: off`), so that they are found again.
    """
    from align_pipeline.data.feedback.convert import convert
    from align_pipeline.data.feedback.settings import Settings

    with tempfile.TemporaryDirectory(dir=folder) as place:
        log, out = Path(place) / "log.jsonl", Path(place) / "out"
        out.mkdir()
        log.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        report = convert(
            [(log, log.name)],
            Settings(pii="off", **settings),
            out,
            scratch=Path(place) / "scratch",
            private=Path(place) / "private",
            place=str(out),
        )
        rows = {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in out.glob("*.jsonl")}
    return rows, report


def ours(votes: Votes, folder: Path, **settings: Any) -> list[Pair]:
    """Return the pairs of `align feedback`, for training and for testing."""
    rows, _ = feedback(votes.events, folder, **settings)
    words: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    editors: dict[tuple[str, str], str] = {}
    for event in votes.events:
        name = (key(event["prompt"]), event["response"])
        if event["event_type"] == "edit":
            editors[name] = event["user_id"]
        else:
            words[name][event["user_id"]] = event["label"]
    found = []
    for row in rows.get("pairs.train", []) + rows.get("pairs.test", []):
        name = key(row["prompt"])
        chosen, rejected = ((name, row[side][0]["content"]) for side in ("chosen", "rejected"))
        if row["fb_source"] == "edit":
            owners = [[editors[chosen]]]
        else:
            owners = [
                [u for u, said in words[one].items() if said == like] for one, like in ((chosen, 1), (rejected, -1))
            ]
        alone = frozenset(users[0] for users in owners if len(users) == 1)
        found.append(Pair(chosen, rejected, alone, row["fb_confidence"]))
    return found


def naive(votes: Votes, *, one_a_prompt: bool) -> list[Pair]:
    """Return what a short script makes: of each last user message every like x every dislike, or the first of each."""
    likes: dict[str, list[Event]] = defaultdict(list)
    dislikes: dict[str, list[Event]] = defaultdict(list)
    for event in votes.events:
        if event["event_type"] == "rating":
            (likes if event["label"] > 0 else dislikes)[event["prompt"][-1]["content"]].append(event)
    found = []
    for last, up in likes.items():
        down = dislikes.get(last, [])
        for one, other in itertools.product(up[:1] if one_a_prompt else up, down[:1] if one_a_prompt else down):
            if one["response"] != other["response"]:
                sides = ((key(event["prompt"]), event["response"]) for event in (one, other))
                found.append(Pair(*sides, frozenset((one["user_id"], other["user_id"]))))
    return found


WAYS: dict[str, Callable[[Votes, Path], list[Pair]]] = {
    "align feedback": ours,
    "align feedback, user_share: 1": lambda votes, folder: ours(votes, folder, user_share=1.0),
    "align feedback, drop_suspects": lambda votes, folder: ours(votes, folder, drop_suspects=True),
    "every like x every dislike": lambda votes, folder: naive(votes, one_a_prompt=False),
    "first like, first dislike": lambda votes, folder: naive(votes, one_a_prompt=True),
}

# --- pairs against the truth ------------------------------------------------------------------------------------------


def judge(pairs: Sequence[Pair], votes: Votes) -> dict[str, float]:
    """Return how many pairs there are, how many are right, what prompts they miss, and the share of one user."""
    together = [pair for pair in pairs if pair.chosen[0] == pair.rejected[0]]
    right = [pair for pair in together if votes.rank[pair.chosen] > votes.rank[pair.rejected]]
    owners = Counter(owner for pair in pairs for owner in pair.owners)
    reached = {pair.chosen[0] for pair in right} & votes.learnable
    return {
        "pairs": len(pairs),
        "right": len(right) / len(pairs),
        "another conversation": 1 - len(together) / len(pairs),
        "right of the others": len(right) / len(together),
        "recall": len(reached) / len(votes.learnable),
        "one user": max(owners.values()) / len(pairs),
    }


def hh_cases(data: Path) -> list[Case]:
    """Return HH-RLHF's test pairs; one conversation in three ends with the last question of one before it."""
    from align_pipeline.data.feedback.clean import normal
    from align_pipeline.data.load import scan
    from align_pipeline.data.rows import Preference, record

    cases: dict[str, Case] = {}
    asked: list[str] = []
    for row in scan(data / "pref" / "hh_harmless_base_test.jsonl.gz", "preference"):
        if not isinstance(row, Preference):
            continue
        plain = record(row)
        prompt = [turn | {"content": normal(turn["content"])} for turn in plain["prompt"]]
        answers = tuple(normal(plain[side][0]["content"]) for side in ("chosen", "rejected"))
        if len(prompt) > 1:
            asked.append(prompt[-1]["content"])
            if len(asked) % 6 in (2, 3):  # the same last question in three conversations
                prompt[-1] = {"role": "user", "content": asked[-2 if len(asked) % 6 == 2 else -3]}
        if all(answers) and answers[0] != answers[1] and all(turn["content"] for turn in prompt):
            cases.setdefault(key(prompt), Case(prompt, answers))
    return list(cases.values())


def with_models(cases: Sequence[Case], seed: int) -> list[Case]:
    """Return the cases with answers of two models, either of which is the better one as often."""
    draw = random.Random(f"models {seed}")
    return [replace(case, models=draw.choice((("m0", "m1"), ("m1", "m0")))) for case in cases]


def pairs_study(data: Path, seeds: int) -> None:
    """Print for each attack and each way to make pairs what they are like."""
    cases = hh_cases(data)
    shared = Counter(case.prompt[-1]["content"] for case in cases)
    print(f"{len(cases)} prompts, {sum(n for n in shared.values() if n > 1)} of them with a last question of several")
    head = ("brigade", "", "pairs", "right", "of two conversations", "right of the others", "recall", "one user")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for attack in ATTACKS.values():
            found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
            for seed in range(seeds):
                votes = vote(with_models(cases, seed), seed, attack, QUIET)
                for name, way in WAYS.items():
                    found[name].append(judge(way(votes, Path(place)), votes))
            for name, rows in found.items():
                columns = [interval([row[column] for row in rows]) for column in rows[0]]
                print(f"| {attack.name if attack else 'none'} | {name} | {' | '.join(columns)} |", flush=True)


def confidence_study(data: Path, seeds: int) -> None:
    """Print how many pairs of thumbs are right at each confidence, all seeds together."""
    cases = hh_cases(data)
    bins = (0.75, 0.82, 0.85, 0.92, 1.0)
    print(f"| brigade | {' | '.join(f'{a} to {b}' for a, b in itertools.pairwise(bins))} |\n|{'---|' * len(bins)}")
    with tempfile.TemporaryDirectory() as place:
        for attack in (None, ATTACKS["slow"]):
            right: dict[float, list[bool]] = {top: [] for top in bins[1:]}
            for seed in range(seeds):
                votes = vote(with_models(cases, seed), seed, attack, QUIET)
                for pair in ours(votes, Path(place)):
                    if pair.confidence >= bins[0]:
                        top = next(top for top in bins[1:] if pair.confidence <= top)
                        right[top].append(votes.rank[pair.chosen] > votes.rank[pair.rejected])
            shown = (f"{statistics.fmean(one):.3f} of {len(one)}" for one in right.values())
            print(f"| {attack.name if attack else 'none'} | {' | '.join(shown)} |", flush=True)


def interval(values: Sequence[float]) -> str:
    """Return the mean of values, one a seed, with the 95 % interval of its bootstrap."""
    low, high = bootstrap(values)
    if low == high:
        return f"{low:g}"
    form = ".0f" if low > 1 else ".3f"
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of values drawn again."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


# --- what a model learns ----------------------------------------------------------------------------------------------

PROMPTS, STEPS, BATCH, CLEAR = 4000, 60, 16, 0.1
TRAINED = {
    "tuning": "full",
    "learning_rate": 3e-4,
    "warmup": 0.1,
    "batch_size": BATCH,
    "max_steps": STEPS,
    "held_out": 0,
}
Ids = dict[tuple[str, str], tuple[list[int], list[int]]]


def story_prompts(data: Path) -> list[list[int]]:
    """Return `<s>` and twelve tokens of sentences of stories, none of them held out."""
    from transformers import AutoTokenizer

    from stories import PROMPT_TOKENS, openings, text_of

    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    held_out = {tuple(ids) for ids in openings(data)[1]}
    found: dict[str, list[int]] = {}
    for line in (data / "tinystories" / "tinystories.jsonl").read_text(encoding="utf-8").splitlines():
        for sentence in re.split(r"(?<=[.!?])\s+", json.loads(line)["text"].strip()):
            ids = tokenizer(sentence)["input_ids"][:PROMPT_TOKENS]
            if len(ids) == PROMPT_TOKENS and 0 not in ids and tuple(ids) not in held_out:
                found.setdefault(text_of(data, ids[1:]).strip(), ids)
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    return [found[text] for text in texts[:PROMPTS]]


def story_cases(data: Path) -> tuple[list[Case], Ids]:
    """Return prompts with two continuations of the model, the happier one first, and the ids of prompts and answers."""
    import torch
    from transformers import AutoModelForCausalLM

    from align_pipeline.data.feedback.clean import normal
    from stories import golds_of, sample, text_of

    model = AutoModelForCausalLM.from_pretrained(data / "models" / "stories260K", dtype=torch.float32).eval()
    prompts = story_prompts(data)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [
            [ids for at in range(0, len(prompts), 250) for ids in sample(model, prompts[at : at + 250])] for _ in "ab"
        ]
    cases, known = [], {}
    for prompt, *answers in zip(prompts, *drawn, strict=True):
        golds = golds_of(data, answers)
        if abs(golds[0] - golds[1]) < CLEAR:
            continue
        turns = [{"role": "user", "content": normal(text_of(data, prompt[1:]))}]
        best_first = sorted(answers, key=lambda ids: -golds[answers.index(ids)])
        texts = [normal(text_of(data, ids)) for ids in best_first]
        cases.append(Case(turns, (texts[0], texts[1])))
        known |= {(key(turns), text): (prompt, ids) for text, ids in zip(texts, best_first, strict=True)}
    return cases, known


def as_ids(row: Row, known: Ids) -> Row:
    """Return a row of `align feedback` as the ids that were sampled: the model has no chat template."""
    made = {name: value for name, value in row.items() if name.startswith("fb_") or name == "label"}
    for side in ("chosen", "rejected", "completion"):
        if side in row:
            made["prompt_ids"], made[f"{side}_ids"] = known[key(row["prompt"]), row[side][0]["content"]]
    return made


def bare(pairs: Sequence[Pair], known: Ids) -> list[Row]:
    """Return pairs as rows of ids."""
    return [
        {"prompt_ids": known[one.chosen][0], "chosen_ids": known[one.chosen][1], "rejected_ids": known[one.rejected][1]}
        for one in pairs
    ]


def lessons(cases: Sequence[Case], known: Ids, seed: int, folder: Path) -> dict[str, tuple[str, list[Row], Row]]:
    """Return by name what is trained: the stage, its rows and its settings; all see as many rows at as many steps."""
    votes = vote(with_models(cases, seed), seed, ATTACKS["slow"])
    rows, report = feedback([event for event in votes.events if event["event_type"] == "rating"], folder, test=0)
    pairs = [as_ids(row, known) for row in rows["pairs.train"]]
    thumbs = [as_ids(row, known) for row in rows["unpaired.train"]]
    count = len(pairs)
    draw = random.Random(f"pairs {seed}")
    true = [Pair(*((key(case.prompt), text) for text in case.answers), frozenset()) for case in cases]
    first = naive(votes, one_a_prompt=True)
    kto = report["kto"]
    advised = {kto["set"]: kto["weight"]} if kto["set"] else {}
    return {
        "dpo": ("dpo", pairs, {}),
        "dpo, weight_column: fb_weight": ("dpo", pairs, {"weight_column": "fb_weight"}),
        "dpo, beta: 0.5": ("dpo", pairs, {"beta": 0.5}),
        "dpo, label_smoothing: epsilon": ("dpo", pairs, {"label_smoothing": report["confidence"]["epsilon"]}),
        "kto, as many rows": ("kto", thumbs[:count], advised),
        "kto, all rows": ("kto", thumbs, advised),
        "dpo, first like and first dislike": ("dpo", bare(draw.sample(first, count), known), {}),
        "dpo, pairs without noise": ("dpo", bare(draw.sample(true, count), known), {}),
    }


def train(kind: str, rows: Sequence[Row], base: Path, folder: Path, settings: Row) -> Path:
    """Train a stage on rows and return the folder of its model."""
    from align_pipeline.pipeline.files import file_sha256
    from align_pipeline.pipeline.stage import Resolved, Work
    from align_pipeline.stages.dpo import DPO
    from align_pipeline.stages.kto import KTO

    work = Work(Path(tempfile.mkdtemp(dir=folder)) / "work" / kind)
    work.out.mkdir(parents=True)
    work.scratch.mkdir()
    data = work.folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stage = {"dpo": DPO, "kto": KTO}[kind](policy="file:base", data="file:rows.jsonl", **TRAINED, **settings)
    inputs = {
        "policy": Resolved(ref="file:base", digest="sha256:" + "b" * 64, path=str(base)),
        "data": Resolved(ref="file:rows.jsonl", digest=f"sha256:{file_sha256(data)}", path=str(data)),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        stage.run(inputs, work)
    return work.out / "model"


def wrong(rows: Sequence[Row], cases: Sequence[Case], known: Ids) -> float:
    """Return the share of pairs that are the wrong way round, or of thumbs that are the wrong one."""
    better = {tuple(map(tuple, known[key(case.prompt), case.answers[0]])) for case in cases}
    likes = [
        (row["prompt_ids"], row.get("chosen_ids") or row["completion_ids"], row.get("label", True)) for row in rows
    ]
    return statistics.fmean(((tuple(prompt), tuple(ids)) in better) != liked for prompt, ids, liked in likes)


def judged(data: Path, policy: Path) -> tuple[list[float], float]:
    """Return the gold of each held-out opening, the mean of two samples, and the KL to the base, of one."""
    import torch
    from transformers import AutoModelForCausalLM

    from stories import golds_of, kl_of, openings, sample

    held_out = openings(data)[1]
    model, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (policy, data / "models" / "stories260K")
    )
    torch.manual_seed(1000)
    with torch.no_grad():
        drawn = [sample(model, held_out) for _ in "ab"]
        kl = kl_of(model, base, held_out, drawn[0])
    golds = [golds_of(data, answers) for answers in drawn]
    return [statistics.fmean(both) for both in zip(*golds, strict=True)], kl


def models_study(data: Path, seeds: int) -> None:
    """Print what models make of held-out openings that learnt from pairs and unpaired rows of the same votes."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    base = data / "models" / "stories260K"
    cases, known = story_cases(data)
    print(f"{len(cases)} prompts, {STEPS} steps of {BATCH} rows")
    alone = judged(data, base)
    golds = {"base": [alone[0]] * seeds}
    facts: dict[str, list[tuple[int, float, float]]] = {"base": [(0, 0.0, alone[1])]}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(seeds):
            for name, (kind, rows, settings) in lessons(cases, known, seed, Path(place)).items():
                model = train(kind, rows, base, Path(place), settings | {"seed": seed})
                found, kl = judged(data, model)
                golds.setdefault(name, []).append(found)
                facts.setdefault(name, []).append((len(rows), wrong(rows, cases, known), kl))
                print(
                    f"seed {seed}, {name} {settings}: gold {statistics.fmean(found):.3f}", file=sys.stderr, flush=True
                )
    show_models(golds, facts)


def show_models(golds: dict[str, list[list[float]]], facts: dict[str, list[tuple[int, float, float]]]) -> None:
    """Print a line for each way to train."""
    import numpy

    head = ("", "rows", "wrong rows", "gold", "by seed", "against dpo", "KL")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    plain = numpy.array(golds["dpo"])
    for name, per_seed in golds.items():
        table = numpy.array(per_seed)
        low, high = resampled(table)
        more, most = resampled(table - plain)
        by_seed = " / ".join(f"{value:.3f}" for value in table.mean(axis=1)) if name != "base" else ""
        counts, shares, kls = zip(*facts[name], strict=True)
        against = f"{(table - plain).mean():+.3f} ({more:+.3f} to {most:+.3f})" if name != "dpo" else ""
        rows = f"{min(counts)} to {max(counts)}" if max(counts) else ""
        share = f"{statistics.fmean(shares):.2f}" if max(counts) else ""
        gold = f"{table.mean():.3f} ({low:.3f} to {high:.3f})"
        print(
            f"| {name} | {rows} | {share} | {gold} | {by_seed} | {against} | {statistics.fmean(kls):.1f} |", flush=True
        )


def resampled(table: Any, draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of a table whose rows, seeds, and columns are drawn again."""
    import numpy

    draw = numpy.random.default_rng(0)
    seeds, openings = table.shape
    means = [
        table[draw.integers(seeds, size=seeds)][:, draw.integers(openings, size=openings)].mean() for _ in range(draws)
    ]
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("pairs", "models", "both"), default="both")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--pair-seeds", type=int, default=12)
    parser.add_argument("--model-seeds", type=int, default=3)
    given = parser.parse_args()
    if given.what in ("pairs", "both"):
        pairs_study(given.data, given.pair_seeds)
        confidence_study(given.data, given.pair_seeds)
    if given.what in ("models", "both"):
        models_study(given.data, given.model_seeds)
    print(f"{sum(os.times()[:4]):.0f} CPU seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
