"""What becomes of a damaged row, here and in other trainers, and how fast rows are checked.

    python tests/benchmarks/rows.py peers --llamafactory PYTHON    each kind of damage: ours, TRL, LLaMA-Factory
    python tests/benchmarks/rows.py peers --peer trl               one of them, with its messages
    python tests/benchmarks/rows.py speed --rows 1000000           rows per second and peak memory of our check

`peers` writes for each kind of damage one file of 20 right rows, real ones from shared/data, and the damaged one. Each
peer prepares it as its own examples do: TRL with `load_dataset` and SFTTrainer, DPOTrainer or KTOTrainer, one step of a
tiny model on all rows; LLaMA-Factory with a `dataset_info.json` and `get_dataset`. What became of the row is judged by
code: was there an error, does a message hold the number of the row or of its line, are there 21 rows in the prepared
data set or 20, does one of them say the marker that the damaged row says. PYTHON is the interpreter of an environment
with `llamafactory==0.9.5`. Each peer is a process of its own; where one dies it begins again after the row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

MARKER = "zqxmarker"
RIGHT_ROWS = 20
FAR = 40_000
SECONDS_EACH = 180
NAMED, STOPS, DROPS, TRAINS = "names the row", "stops, names no row", "drops it", "trains on it"
NOT_READ = "reads no such format"

# --- the files --------------------------------------------------------------------------------------------------------

Case = dict[str, Any]

OURS_ALONE = ("margin", "finish", "token id", "NaN in metadata", "cell")
"""Damage to fields that the others do not read."""
BASES = ("chats", "examples", "pairs", "conversations", "thumbs")
"""Where several kinds of rows can have a damage, the first of these has it."""


def write_cases(folder: Path) -> list[Case]:
    """Write a file for each kind of damage, and for each base one without; return what is in them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from corrupt import DAMAGES, Damage, single

    cases = []
    for base in BASES:
        whole = Damage("nothing", "", (base,), (".jsonl",), lambda record, base, draw: record)
        cases.append(_case(single(folder, whole, base, ".jsonl", MARKER), ".jsonl"))
    seen = set()
    for damage in DAMAGES:
        suffix = next((suffix for suffix in (".jsonl", ".csv") if suffix in damage.suffixes), None)
        bases = BASES if suffix == ".jsonl" else ("examples", "thumbs")  # of several columns each
        base = next((base for base in bases if base in damage.bases), None)
        if base is None or suffix is None or damage.kind.startswith(OURS_ALONE) or (damage.kind, suffix) in seen:
            continue
        seen.add((damage.kind, suffix))
        cases.append(_case(single(folder, damage, base, suffix, MARKER), suffix))
        if damage.kind in ("answer is a number", "cut line", "too many cells"):
            cases.append(_far(cases[-1]))
    return cases


def _far(case: Case) -> Case:
    """Write the file of a case again with so many right rows before the others that it is read in several parts."""
    path = Path(case["path"])
    lines = path.read_bytes().splitlines(keepends=True)
    header, right, rest = [], lines[:1], lines
    if path.suffix == ".csv":  # whose rows may go over several lines
        header, right, rest = lines[:1], [b"What is 2 + 2?,It is 4.\n"], lines[1:]
    far = path.with_name(f"far-{path.name}")
    far.write_bytes(b"".join([*header, *right * FAR, *rest]))
    changes = {"kind": f"{case['kind']}, after {FAR:,} rows", "path": str(far), "rows": case["rows"] + FAR}
    return {**case, **changes, "line": case["line"] + FAR, "index": case["index"] + FAR}


def _case(file: Any, suffix: str) -> Case:
    finding = file.findings[0]
    index = RIGHT_ROWS if file.ends else RIGHT_ROWS // 2
    kind = finding.kind if suffix == ".jsonl" else f"{finding.kind} (CSV)"
    return {
        "kind": kind,
        "base": file.base,
        "task": file.task,
        "path": str(file.path),
        "line": finding.line,
        "index": index,
        "rows": RIGHT_ROWS,
    }


def names_row(text: str, case: Case) -> str:
    """Return what in a message is the line of the damaged row, or its number counted from 0, 1 or a table's header."""
    right = {case["line"], *range(case["index"], case["index"] + (3 if case["path"].endswith(".csv") else 2))}
    for found in re.finditer(r"(?:\b(?:row|line|example|index)s?\W{0,3}|\.(?:jsonl|csv):)(\d+)", text, re.IGNORECASE):
        if int(found[1]) in right:
            return text[max(0, found.start() - 70) : found.end()]
    return ""


# --- the peers --------------------------------------------------------------------------------------------------------


def ours(job: dict[str, Any]) -> Callable[[Case], list[str]]:
    """Return what reads a file with our check: it yields what each row says or raises what is wrong."""
    from align_pipeline.data.gate import Gate
    from align_pipeline.data.load import scan
    from align_pipeline.data.rows import record

    def prepare(case: Case) -> list[str]:
        gate = Gate()
        rows = [json.dumps(record(row)) for row in gate.take(scan(Path(case["path"]), case["task"]))]
        gate.judge()
        return rows

    return prepare


def trl(job: dict[str, Any]) -> Callable[[Case], list[str]]:
    """Return what prepares a file with TRL's trainers and takes one step on all of its rows."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    trainers = {
        "sft": (SFTTrainer, SFTConfig),
        "preference": (DPOTrainer, DPOConfig),
        "unpaired": (KTOTrainer, KTOConfig),
    }

    def prepare(case: Case) -> list[str]:
        path = Path(case["path"])
        kind = "json" if path.suffix == ".jsonl" else "csv"
        rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=job["folder"])
        if case["base"] == "thumbs":  # KTOTrainer takes the answer apart from the conversation
            rows = rows.map(
                lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
                remove_columns="messages",
            )
        trainer_class, config_class = trainers[case["task"]]
        config = config_class(
            output_dir=job["folder"],
            use_cpu=True,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=32,
            max_length=4096,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(job["model"]),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )
        prepared = _texts(trainer.train_dataset, trainer.processing_class)
        trainer.train()
        return prepared

    return prepare


INFO = {
    "examples": {"columns": {"prompt": "prompt", "response": "completion"}},
    "chats": {"formatting": "sharegpt", "columns": {"messages": "messages"}},
    "pairs": {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    "thumbs": {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}},
}
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def llamafactory(job: dict[str, Any]) -> Callable[[Case], list[str]]:
    """Return what prepares a file with LLaMA-Factory's data pipeline."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    stages = {"sft": "sft", "preference": "rm", "unpaired": "kto"}

    def prepare(case: Case) -> list[str]:
        path = Path(case["path"])
        info = {**INFO[case["base"]], "file_name": path.name, "tags": TAGS}
        (path.parent / "dataset_info.json").write_text(json.dumps({"rows": info}))
        model, data, training, finetuning, _ = get_train_args(
            {
                "model_name_or_path": job["model"],
                "stage": stages[case["task"]],
                "do_train": True,
                "dataset": "rows",
                "dataset_dir": str(path.parent),
                "template": "chatml",
                "cutoff_len": 4096,
                "overwrite_cache": True,
                "output_dir": job["folder"],
                "cache_dir": job["folder"],
                "use_cpu": True,
                "report_to": "none",
                "finetuning_type": "full",
            }
        )
        module = load_tokenizer(model)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data)
        made = get_dataset(template, model, data, training, stage=finetuning.stage, **module)
        return _texts(made["train_dataset"], module["tokenizer"])

    return prepare


PEERS = {"align": ours, "trl": trl, "llamafactory": llamafactory}
PACKAGES = {"align": "align-pipeline", "trl": "trl", "llamafactory": "llamafactory"}
TITLES = {"align": "align", "trl": "TRL", "llamafactory": "LLaMA-Factory"}


def _texts(rows: Any, tokenizer: Any) -> list[str]:
    """Return all that the columns of token ids of each prepared row say."""
    texts = []
    for row in rows:
        columns = [ids for key, ids in row.items() if "ids" in key and ids]
        texts.append(" ".join(tokenizer.decode(ids) for ids in columns))
    return texts


# --- what became of the row -------------------------------------------------------------------------------------------


def judge(case: Case, prepared: list[str] | None, error: BaseException | None, said: str) -> tuple[str, str]:
    """Return what became of the damaged row and, in a few words, how that shows."""
    if error is not None:
        chain = []
        while error is not None:
            chain.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        named = names_row("\n".join([*chain, said]), case)
        return (NAMED, _short(named)) if named else (STOPS, _short(chain[-1]))
    assert prepared is not None
    if named := names_row(said, case):
        return NAMED, _short(named)
    marked = sum(MARKER in text for text in prepared)
    if marked or len(prepared) > case["rows"]:
        return TRAINS, f"{len(prepared)} rows, {marked} with the marker"
    lost = f", {case['rows'] - len(prepared)} right rows too" if len(prepared) < case["rows"] else ""
    warned = re.search(r"(?i)warn|skip|invalid|dropp", said)
    return DROPS + lost, "with a warning" if warned else "in silence"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else line[:107] + "..."


def work(job: dict[str, Any]) -> None:
    """Prepare each file and write what became of its damaged row, one JSON object a line."""
    from importlib.metadata import version

    signal.signal(signal.SIGALRM, _late)
    with Path(job["results"]).open("a", encoding="utf-8") as results:
        prepare = PEERS[job["peer"]](job)
        for case in job["cases"]:
            if job["peer"] == "llamafactory" and case["base"] not in INFO:
                outcome, detail = NOT_READ, ""
            else:
                prepared, error = None, None
                with _capture(Path(job["folder"]) / "said.txt") as said:
                    signal.alarm(SECONDS_EACH)
                    try:
                        prepared = prepare(case)
                    except Exception as raised:
                        error = raised
                    signal.alarm(0)
                outcome, detail = judge(case, prepared, error, said.read_text("utf-8", "replace"))
            line = {
                "kind": case["kind"],
                "outcome": outcome,
                "detail": detail,
                "version": version(PACKAGES[job["peer"]]),
            }
            results.write(json.dumps(line) + "\n")
            results.flush()


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS_EACH} seconds")


@contextlib.contextmanager
def _capture(path: Path) -> Iterator[Path]:
    """Send all that the process writes into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield path
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, stream)
                os.close(saved)


def run_peer(peer: str, python: str, cases: Sequence[Case], folder: Path) -> dict[str, dict[str, str]]:
    """Run a peer over all files, again after each that it dies of, and return the outcome of each kind."""
    results = folder / f"{peer}.jsonl"
    results.touch()
    found: dict[str, dict[str, str]] = {}
    while len(found) < len(cases):
        scratch = Path(tempfile.mkdtemp(dir=folder))
        left = [case for case in cases if case["kind"] not in found]
        job = {
            "peer": peer,
            "cases": left,
            "folder": str(scratch),
            "model": str(folder / "model"),
            "results": str(results),
        }
        (scratch / "job.json").write_text(json.dumps(job))
        ended = subprocess.run([python, __file__, "job", str(scratch / "job.json")], check=False)
        lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
        if len(lines) == len(found) and ended.returncode > 0:
            raise SystemExit(f"{peer}: cannot start, see above")
        found = {line["kind"]: line for line in lines}
        if len(found) < len(cases):  # it died
            case = next(case for case in cases if case["kind"] not in found)
            line = {"kind": case["kind"], "outcome": STOPS, "detail": f"the process ends with {ended.returncode}"}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found[case["kind"]] = line
    return found


def peers(names: Sequence[str], pythons: dict[str, str], only: str | None) -> None:
    """Print what becomes of each kind of damaged row as a Markdown table."""
    folder = Path(tempfile.mkdtemp(prefix="rows-"))
    (folder / "files").mkdir()
    cases = [
        case
        for case in write_cases(folder / "files")
        if only is None or only in case["kind"] or case["kind"] == "nothing"
    ]
    for number, case in enumerate(cases):
        if case["kind"] == "nothing":
            case["kind"] = f"nothing ({case['base']})"
        case["number"] = number
    _write_model(folder / "model", cases)
    found = {name: run_peer(name, pythons.get(name, sys.executable), cases, folder) for name in names}
    for name in names:
        wrong = {kind: line for kind, line in found[name].items() if kind.startswith("nothing")}
        for kind, line in wrong.items():
            if line["outcome"] not in (TRAINS, NOT_READ):
                print(f"{name}: a whole file is not prepared ({kind}: {line})", file=sys.stderr)
    titles = [f"{TITLES[name]} {_version(found[name])}" for name in names]
    print("| damage | " + " | ".join(titles) + " |\n|---|" + "---|" * len(names))
    shown = [case["kind"] for case in cases if not case["kind"].startswith("nothing")]
    for kind in shown:
        cells = [_cell(found[name][kind]) for name in names]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    totals = [Counter(found[name][kind]["outcome"].partition(",")[0] for kind in shown) for name in names]
    cells = [", ".join(f"{outcome} {count}" for outcome, count in sorted(total.items())) for total in totals]
    print(f"| of {len(shown)} | " + " | ".join(cells) + " |")


def _cell(line: dict[str, str]) -> str:
    if line["outcome"] == TRAINS:
        return f"**{TRAINS}**"
    detail = line["detail"].replace("|", "\\|")
    return f"{line['outcome']}: {detail}" if detail and line["outcome"] != NAMED else line["outcome"]


def _version(found: dict[str, dict[str, str]]) -> str:
    return next((line["version"] for line in found.values() if "version" in line), "")


def _write_model(folder: Path, cases: Sequence[Case]) -> None:
    from tiny import write_tiny_model

    texts = [Path(case["path"]).read_text("utf-8", "replace") for case in cases if case["kind"].startswith("nothing")]
    write_tiny_model(folder, texts or ["2 + 2 = 4"], positions=4096)


# --- how fast ---------------------------------------------------------------------------------------------------------


def speed(counts: Sequence[int]) -> None:
    """Print rows per second and peak memory of the check on files of 1 kB rows, each in a process of its own."""
    print("| rows of 1 kB | what | wall s | CPU s | rows per wall s | rows per CPU s | peak MB |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        for count in counts:
            path = Path(folder) / f"rows-{count}.jsonl"
            write_rows(path, count)
            for what, command in _commands(path).items():
                seconds, usage = _measure(command)
                spent = usage.ru_utime + usage.ru_stime
                rates = f"{count / seconds:,.0f} | {count / spent:,.0f} | {usage.ru_maxrss / 1024:,.0f}"
                print(f"| {count:,} | {what} | {seconds:.1f} | {spent:.1f} | {rates} |", flush=True)
            path.unlink()


def write_rows(path: Path, count: int) -> None:
    """Write rows of messages of 1 kB, no two alike."""
    question = "A shop sells bread at 3 € and milk at 2 €. How much are both together, and why? " * 3
    answer = "Bread is 3 € and milk is 2 €.\nBoth together are 3 + 2 = 5 €.\n" * 9
    with path.open("wb") as file:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"{number}: {question}"},
                {"role": "assistant", "content": answer},
            ]
            line = json.dumps({"messages": messages, "id": f"row {number}"}, ensure_ascii=False).encode()
            file.write(line[:-2].ljust(1021) + line[-2:] + b"\n")  # blanks fill the row up to 1,024 bytes


def _commands(path: Path) -> dict[str, list[str]]:
    commands = {"Gate over scan": [sys.executable, __file__, "gate", str(path)]}
    align = Path(sys.executable).with_name("align")
    if subprocess.run([align, "data", "check", "--help"], capture_output=True, check=False).returncode == 0:
        commands["align data check"] = [str(align), "data", "check", str(path)]
    return commands


def _measure(command: Sequence[str]) -> tuple[float, resource.struct_rusage]:
    """Return the wall seconds of a command and what it used."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage


def gate(path: Path) -> None:
    from align_pipeline.data.gate import Gate
    from align_pipeline.data.load import scan

    gate = Gate()
    for _ in gate.take(scan(path, "sft")):
        pass
    print(f"{gate.rows:,} rows, {gate.bad:,} bad")


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        work(json.loads(Path(sys.argv[2]).read_text("utf-8")))
        return
    if sys.argv[1:2] == ["gate"]:
        gate(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("peers", "speed"))
    parser.add_argument("--peer", choices=tuple(PEERS), help="this one alone")
    parser.add_argument("--llamafactory", help="interpreter of an environment with llamafactory")
    parser.add_argument("--only", help="the kinds of damage whose name contains this")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of the files")
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.rows)
        return
    names = [given.peer] if given.peer else ["align", "trl", *(["llamafactory"] if given.llamafactory else [])]
    peers(names, {"llamafactory": given.llamafactory} if given.llamafactory else {}, given.only)


if __name__ == "__main__":
    main()
