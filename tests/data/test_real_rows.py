"""Every real file in the shared folder: which rows it gives, which it does not and why, counted here by hand too."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.gate import Gate
from align_pipeline.data.load import read, scan
from align_pipeline.data.rows import Message, Row, Task
from align_pipeline.pipeline.errors import AlignError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real files, ../shared/data, is not here")

# Read by hand: the records of a file with their lines, what each says, and what is wrong with it.


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line and record, as simply as Python can; an array's rows begin where its indentation says."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            assert table.fieldnames
            line = table.line_num + 1
            for row in table:
                yield line, row
                line = table.line_num + 1
    elif path.suffix == ".json":
        text = path.read_text("utf-8")
        starts = [number for number, line in enumerate(text.split("\n"), 1) if line.rstrip() in (" {", "  {")]
        yield from zip(starts, json.loads(text), strict=True)
    else:
        text = gzip.open(path, "rt", encoding="utf-8").read() if path.suffix == ".gz" else path.read_text("utf-8")  # noqa: SIM115
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, {"text": line} if path.suffix == ".txt" else json.loads(line)


def alpaca(row: Any) -> list[str]:
    return [row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")]


def values(turns: Any) -> list[str]:
    return [turn["value"] for turn in turns]


def contents(turns: Any) -> list[str]:
    return [
        turn["content"] if isinstance(turn["content"], str) else "".join(part["value"] for part in turn["content"])
        for turn in turns
    ]


def dialogue(text: str) -> list[tuple[str, str]]:
    """Return speaker and words of each turn of HH-RLHF."""
    turns: list[list[str]] = []
    for paragraph in text.split("\n\n")[1:]:
        speaker, colon, words = paragraph.lstrip("\n").partition(":")
        if colon and speaker in ("Human", "Assistant"):
            turns.append([speaker, words])
        else:
            turns[-1][1] += f"\n\n{paragraph}"
    return [(speaker, words.strip()) for speaker, words in turns]


def whose(record: Any) -> list[str]:
    chosen, rejected = (dialogue(record[side]) for side in ("chosen", "rejected"))
    return [*(words for _, words in chosen), rejected[-1][1]]


def wrong_dialogue(record: Any) -> str | None:
    chosen, rejected = (dialogue(record[side]) for side in ("chosen", "rejected"))
    for turns in (chosen, rejected):
        if not all(words for _, words in turns):
            return "empty"
        if any(left == right for (left, _), (right, _) in itertools.pairwise(turns)) or turns[-1][0] == "Human":
            return "order of turns"
    if chosen == rejected:
        return "equal sides"
    return "prompts differ" if chosen[:-1] != rejected[:-1] else None


def wrong_answers(record: Any) -> str | None:
    first, second = (record[name] for name in ("response1", "response2"))
    for answer in (first, second):
        if not isinstance(answer, str):
            return "wrong type"
        if not answer.strip():
            return "empty"
    return "equal sides" if first == second else None


@dataclass(frozen=True)
class Real:
    """A file, how it is read, what comes of it, and how to see that by hand."""

    file: str
    task: Task
    format: str
    rows: int
    said: Callable[[Any], list[str]]
    causes: dict[str, int] = field(default_factory=dict)
    wrong: Callable[[Any], str | None] = lambda record: None
    columns: dict[str, str] = field(default_factory=dict)
    named: bool = False
    """Whether `format` must be given."""


READ = [
    Real("sft/gsm8k_train.jsonl", "sft", "prompt-completion", 7467, lambda row: [row["question"], row["answer"]],
         columns={"prompt": "question", "completion": "answer"}),
    *(Real(f"sft/lf_alpaca_{language}_demo.json", "sft", "alpaca", rows, lambda row: [*alpaca(row), row["output"]])
      for language, rows in (("en", 855), ("zh", 1000))),
    Real("sft/lf_glaive_toolcall_en_demo.json", "sft", "sharegpt", 104, lambda row: values(row["conversations"]),
         {"tools": 186}, lambda row: "tools" if row["tools"] not in ("", "[]") else None),
    Real("sft/lf_v1_sft_demo.jsonl", "sft", "messages", 423, lambda row: contents(row["messages"])),
    Real("sft/self_instruct_seed_tasks.jsonl", "prompt", "alpaca", 172, alpaca),
    Real("sft/self_instruct_user_oriented_252.jsonl", "prompt", "alpaca", 123, alpaca),
    Real("pref/hh_harmless_base_test.jsonl.gz", "preference", "hh-rlhf", 1183, whose,
         {"empty": 2, "order of turns": 5}, wrong_dialogue),
    Real("pref/lf_dpo_en_demo.json", "preference", "sharegpt", 294,
         lambda row: values([*row["conversations"], row["chosen"], row["rejected"]])),
    Real("pref/lf_v1_dpo_demo.jsonl", "preference", "message-pairs", 10,
         lambda row: contents([*row["chosen_messages"], row["rejected_messages"][-1]])),
    Real("pref/tulu3_preference_sample_100.jsonl", "preference", "preference", 97,
         lambda row: [row["prompt"], row["chosen"][1]["content"], row["rejected"][1]["content"]]),
    Real("pref/pandalm_testset_v1.json", "preference", "alpaca", 434,
         lambda row: [*alpaca(row), row["response1"], row["response2"]], {"empty": 29, "wrong type": 6}, wrong_answers,
         columns={"chosen": "response1", "rejected": "response2"}),
    Real("pref/lf_kto_en_demo.json", "unpaired", "messages", 295, lambda row: contents(row["messages"])),
    Real("text/lf_c4_demo.jsonl", "text", "text", 300, lambda row: [row["text"]]),
    Real("text/lf_wiki_demo.txt", "text", "text", 30, lambda row: [row["text"]]),
    *(Real(f"feedback/xstest/xstest_v2_completions_{model}.csv", "sft", "prompt-completion", 229,
           lambda row: [row["prompt"], row["completion"]], named=True)
      for model in ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")),
]  # fmt: skip

SFT = (
    "no format of task sft, which reads {prompt, completion} or {messages} or {instruction, output} or {conversations} "
    "or {prompt_ids, completion_ids} or {text}; rename or map them (columns: "
)
NEED = "rows of this file need"
REFUSED: dict[tuple[str, Task], str] = {
    ("sft/gsm8k_train.jsonl", "sft"): f":1: answer, question: {SFT}{{prompt: question, completion: answer}})",
    ("sft/self_instruct_seed_tasks.jsonl", "sft"):
        f":1: output: missing, {NEED} instruction, output (this one has id, instances, instruction, is_classification, "
        "name); add or map it (so it is in all of the first 100 rows)",
    ("pref/oasst_en_100_tree.jsonl", "preference"):
        f":1: chosen: missing, {NEED} prompt, chosen, rejected (this one has message_tree_id, prompt, tree_state); add "
        "or map it (so it is in all of the first 59 rows)",
    ("feedback/oasst_realistic_seed_data.json", "text"):
        ":2: task_message_id: unknown field; remove it, or name the wanted ones with columns (so it is in all of the "
        "first 100 rows)",
    ("feedback/openwebui_feedback_export_anonymised.json", "sft"):
        f":2: created_at, data, id, meta, snapshot, type, updated_at, user_id, ...: {SFT}{{prompt: user_id, "
        "completion: type})",
    **{(f"feedback/tensorzero/{name}_metric_feedback_examples.jsonl", "sft"):
        f":1: id, metric_name, tags, target_id, value: {SFT}{{prompt: target_id, completion: metric_name}})"
        for name in ("boolean", "float")},
    ("feedback/tensorzero/demonstration_feedback_examples.jsonl", "sft"):
        f":1: id, inference_id, tags, value: {SFT}{{prompt: inference_id, completion: value}})",
    ("feedback/tensorzero/chat_inference_examples.jsonl", "sft"):
        ":1: instruction: missing, rows of this file need instruction, output (this one has episode_id, function_name, "
        "id, inference_params, input, output, processing_time_ms, tags, ...); add or map it (so it is in all of the "
        "first 100 rows)",
    ("feedback/tensorzero/tensorzero.toml", "text"):
        ": suffix .toml is not readable; use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt or a folder; text "
        "files may end in .gz or .zst too",
    ("feedback/xstest/xstest_v2_completions_gpt4.csv", "sft"):
        ":2: type: unknown field; remove it, or name the wanted ones with columns (so it is in all of the first "
        "100 rows)",
    ("text/lf_wiki_demo.txt", "sft"):
        ": .txt holds plain text, task sft needs fields; use .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
}  # fmt: skip


def test_no_file_is_forgotten() -> None:
    found = {path for kind in ("sft", "pref", "text", "feedback") for path in (SHARED / kind).rglob("*")}
    told = {one.file for one in READ} | {file for file, _ in REFUSED}
    assert {str(path.relative_to(SHARED)) for path in found if path.is_file()} == told


def texts(row: Row) -> list[str]:
    """Return all that a row says, in order."""
    found: list[str] = []
    for item in fields(row):
        value = getattr(row, item.name)
        if item.name not in ("where", "extra", "finish", "margin", "weight", "label"):
            found += [
                part.content if isinstance(part, Message) else part
                for part in ([value] if isinstance(value, str) else value)
            ]
    return found


@pytest.mark.parametrize("real", READ, ids=[real.file for real in READ])
def test_a_file_gives_its_rows_and_says_what_is_wrong_with_the_others(real: Real) -> None:
    path = SHARED / real.file
    rows = scan(path, real.task, format=real.format if real.named else None, columns=real.columns)
    gate = Gate()
    passed = list(gate.take(rows))
    assert (rows.format and rows.format.name, gate.rows, gate.causes) == (real.format, real.rows, real.causes)
    by_hand = list(records(path))
    assert Counter(cause for _, record in by_hand if (cause := real.wrong(record))) == real.causes
    assert [(row.where, texts(row)) for row in passed] == [
        (f"{path.name}:{line}", real.said(record)) for line, record in by_hand if not real.wrong(record)
    ]


@pytest.mark.parametrize(("file", "task"), REFUSED, ids=[f"{file} as {task}" for file, task in REFUSED])
def test_a_file_that_cannot_be_read_so_is_refused_in_one_line(file: str, task: Task) -> None:
    path = SHARED / file
    with pytest.raises(AlignError) as caught:
        read(path, task)
    assert str(caught.value) == path.name + REFUSED[file, task] and caught.value.exit_code == 3


def test_bad_rows_of_a_real_file_are_shown_by_cause() -> None:
    with pytest.raises(DataError) as caught:
        read(SHARED / "sft/lf_glaive_toolcall_en_demo.json", "sft")
    head, cause, *first, more = caught.value.problems
    assert (head, cause) == ("186 of 290 rows cannot be used", "tools: 186 rows")
    lines = [line for line, row in records(SHARED / "sft/lf_glaive_toolcall_en_demo.json") if row["tools"] != "[]"]
    rule = "tools: tool definitions are not read, must be absent; drop the rows that have any"
    assert first == [f"  lf_glaive_toolcall_en_demo.json:{line}: {rule}" for line in lines[:5]]
    assert more == "  ... and 181 more"


def test_labels_and_other_columns_of_real_rows_are_kept() -> None:
    path = SHARED / "pref/lf_kto_en_demo.json"
    assert [row.label for row in read(path, "unpaired")] == [record["label"] for _, record in records(path)]  # type: ignore[union-attr]
    path = SHARED / "sft/self_instruct_seed_tasks.jsonl"
    kept = [{key: value for key, value in row.items() if key != "instruction"} for _, row in records(path)]
    assert [row.extra for row in read(path, "prompt")] == kept  # type: ignore[union-attr]
