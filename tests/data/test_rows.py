"""Rows are frozen, and what is written as a record reads back as the same row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from align_pipeline.data.load import read
from align_pipeline.data.rows import (
    Chat,
    Example,
    ExampleIds,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Row,
    Task,
    Text,
    Unpaired,
    UnpairedIds,
    prompt_key,
    record,
)

WHERE = "rows.jsonl:1"
ASK = (Message("system", "Be brief."), Message("user", "Where is Ölüdeniz?"))
ANSWER, WRONG = (Message("assistant", "In Turkey."),), (Message("assistant", "No idea."),)

EVERY_KIND: list[tuple[Task, Row]] = [
    ("text", Text(WHERE, "Once upon a time")),
    ("sft", Text(WHERE, "Once upon a", "length")),
    ("sft", Chat(WHERE, ASK + ANSWER)),
    ("sft", Example(WHERE, ASK, ANSWER)),
    ("sft", Example(WHERE, "2 + 2 =", " 4", "stop")),
    ("sft", ExampleIds(WHERE, (), (4, 2))),
    ("preference", Preference(WHERE, ASK, ANSWER, WRONG, 0.25)),
    ("preference", Preference(WHERE, "2 + 2 =", " 4", " 5")),
    ("preference", PreferenceIds(WHERE, (1,), (4,), (5,))),
    ("unpaired", Unpaired(WHERE, ASK, WRONG, False)),
    ("unpaired", UnpairedIds(WHERE, (1,), (4,), True)),
    ("prompt", Prompt(WHERE, "2 + 2 =", {"answer": 4})),
    ("prompt", PromptIds(WHERE, (1, 2), {"prompt": "2 + 2 ="})),
]


@pytest.mark.parametrize(("task", "row"), EVERY_KIND, ids=lambda value: type(value).__name__)
def test_a_record_reads_back_as_the_same_row(task: Task, row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record(row)) + "\n", "utf-8")
    assert read(path, task) == [row]


def test_rows_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Text(WHERE, "a").text = "b"  # type: ignore[misc]


def test_what_a_row_asks() -> None:
    later = (Message("user", "And Ankara?"), Message("assistant", "There too."))
    assert prompt_key(Chat(WHERE, ASK + ANSWER)) == prompt_key(Chat(WHERE, ASK + ANSWER + later)) == ASK
    assert prompt_key(Preference(WHERE, "a", "b", "c")) == prompt_key(Unpaired("other:2", "a", "z", True)) == "a"
    assert prompt_key(PreferenceIds(WHERE, (1,), (2,), (3,))) == (1,)
