"""Files to rows: every source, every format, and the exact line that a user reads for every kind of bad row."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.fields import check_weight
from align_pipeline.data.formats import METADATA
from align_pipeline.data.gate import Gate
from align_pipeline.data.load import all_rows, read, scan, scan_hub, split
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
)
from align_pipeline.data.sources import Bad
from align_pipeline.pipeline.errors import DataError, InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, *rows: Any) -> Path:
    """Write one line per row: text as it is, anything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, TELL, WRONG = turn("user", "2 + 2?"), turn("assistant", "4"), turn("assistant", "5")
USER, RIGHT, FALSE = Message("user", "2 + 2?"), Message("assistant", "4"), Message("assistant", "5")
PAIR = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}


# What is read.


def test_addresses_are_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\u2028still one"}\r\n\r\n  \n{"text": "two\xe2\x80\xa8two"}')
    assert read(path, "text") == [Text("a.jsonl:1", "one\u2028still one"), Text("a.jsonl:4", "two\u2028two")]
    assert read(path, "text", name="file:a")[1].where == "file:a:4"


def test_one_column_is_one_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "x": "yes"}\n')
    with pytest.raises(
        InputError, match=r"columns: x is mapped to chosen and to rejected, a column is one field; name"
    ):
        scan(tmp_path / "a.jsonl", "preference", columns={"chosen": "x", "rejected": "x"})


UNREADABLE: dict[str, tuple[str, bytes, str | None]] = {  # what is in the file, and what is kept of its bad row
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', '{"text": "b'),
    "a long one": ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"b" * 1000, '{"text": "' + "b" * 190),
    "a double key": ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', '{"text": "b", "text": "c"}'),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', '{"text": "caf\ufffd"}'),
    "a double key in an array": (
        "a.json",
        b'[{"text": "a"}, {"text": "b", "text": "c"}]',
        '{"text": "b", "text": "c"}',
    ),
    "not UTF-8 in an array": ("a.json", b'[{"text": "a"}, {"text": "caf\xe9"}]', '{"text": "caf\ufffd"}]'),
    "a broken array": ("a.json", b'[{"text": "a"},\n{"text": b}]', '{"text": b}]'),
    "an object": ("a.json", b'{"text": {"0": "a"}}', '{"text": {"0": "a"}}'),
    "a table with a cell too many": ("a.csv", b"text\na\nb,c\n", "b,c\n"),
    "a quote that is not closed": ("a.csv", b'text\na\n"b\nc\n', '"b\nc\n'),
    "a byte in a table": ("a.csv", b"text\na\ncaf\xe9\n", "caf\ufffd\n"),
    "plain text": ("a.txt", b"a\ncaf\xe9", "caf\ufffd"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_beginning_of_what_is_no_row_is_kept(name: str, tmp_path: Path) -> None:
    file, content, kept = UNREADABLE[name]
    (tmp_path / file).write_bytes(content)
    gate = Gate(tmp_path / "rejects.jsonl")
    list(gate.take(scan(tmp_path / file, "text")))
    assert [json.loads(line)["row"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [kept]


def test_a_json_array_gives_the_line_where_a_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {\n  "text": "one"\n },\n\n {"text": "two"}, {"text": "three"}\n]\n')
    assert [row.where for row in read(path, "text")] == ["a.json:2", "a.json:6", "a.json:6[2]"]


def test_preference_formats(tmp_path: Path) -> None:
    expected = Preference("a.jsonl:1", (USER,), (RIGHT,), (FALSE,))
    records: list[tuple[dict[str, Any], Row]] = [
        (PAIR | {"margin": 2}, Preference("a.jsonl:1", "2 + 2 =", "4", "5", 2.0)),
        ({"prompt": [ASK], "chosen": [TELL], "rejected": [WRONG]}, expected),
        ({"chosen": [ASK, TELL], "rejected": [ASK, WRONG]}, expected),
        ({"prompt": "2 + 2?", "chosen": [ASK, TELL], "rejected": [ASK, WRONG], "id": 7}, expected),
        ({"prompt": [ASK], "chosen": [ASK, TELL], "rejected": [ASK, WRONG], "margin": None}, expected),
        (
            {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5, 2]},
            PreferenceIds("a.jsonl:1", (1,), (4,), (5, 2)),
        ),
    ]
    for record, row in records:
        assert read(write(tmp_path / "a.jsonl", record), "preference") == [row]


def test_unpaired_formats(tmp_path: Path) -> None:
    for label in (True, 1):
        path = write(tmp_path / "a.jsonl", {"messages": [ASK, TELL], "label": label})
        assert read(path, "unpaired") == [Unpaired("a.jsonl:1", (USER,), (RIGHT,), True)]
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": "5", "label": 0})
    assert read(path, "unpaired") == [Unpaired("a.jsonl:1", "2 + 2 =", "5", False)]


def test_prompts_keep_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "answer": 4, "id": 9})
    assert read(path, "prompt") == [Prompt("a.jsonl:1", "2 + 2 =", {"answer": 4, "id": 9})]
    path = write(tmp_path / "a.jsonl", {"messages": [ASK], "answer": 4})
    assert read(path, "prompt") == [Prompt("a.jsonl:1", (USER,), {"answer": 4})]
    path = write(tmp_path / "a.jsonl", {"prompt_ids": [3], "prompt": "x"})
    assert read(path, "prompt") == [PromptIds("a.jsonl:1", (3,), {"prompt": "x"})]


def test_columns_rename_and_the_rest_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": "4", "steps": 1})
    columns = {"prompt": "question", "completion": "answer"}
    assert read(path, "sft", columns=columns) == [Example("a.jsonl:1", "2 + 2?", "4")]
    prompts = read(path, "prompt", columns={"prompt": "question"})
    assert prompts == [Prompt("a.jsonl:1", "2 + 2?", {"answer": "4", "steps": 1})]
    with pytest.raises(
        DataError, match=r"a.jsonl:1: columns.prompt: no column qestion in the file; did you mean question"
    ):
        read(path, "sft", columns={"prompt": "qestion", "completion": "answer"})
    with pytest.raises(InputError, match=r"columns.promt: unknown field for sft; did you mean prompt\?"):
        read(path, "sft", columns={"promt": "question"})


def test_metadata_columns_are_ignored(tmp_path: Path) -> None:
    assert METADATA
    path = write(tmp_path / "a.jsonl", PAIR | dict.fromkeys(METADATA, "x"))
    assert read(path, "preference") == [Preference("a.jsonl:1", "2 + 2 =", "4", "5")]


def test_columns_of_feedback_are_metadata_in_every_format(tmp_path: Path) -> None:
    feedback = {"fb_weight": 0.5, "fb_votes": {"up": 3}, "fb_prompt": "another"}
    path = write(tmp_path / "a.jsonl", PAIR | feedback)
    assert read(path, "preference") == [Preference("a.jsonl:1", "2 + 2 =", "4", "5")]
    path = write(tmp_path / "b.jsonl", {"text": "a"} | feedback)
    assert read(path, "text") == [Text("b.jsonl:1", "a")]
    path = write(tmp_path / "c.jsonl", {"prompt": "a"} | feedback)
    assert read(path, "prompt") == [Prompt("c.jsonl:1", "a", feedback)]
    with pytest.raises(DataError, match="a.jsonl:1: feedback: unknown field"):
        read(write(tmp_path / "a.jsonl", PAIR | {"feedback": 1}), "preference")


def test_a_named_column_weighs_pairs(tmp_path: Path) -> None:
    """Of any name, also one that would be unknown, that is renamed, or that is a field of its own."""
    for column, fields in (("fb_weight", {}), ("votes", {}), ("score", {"id": 1}), ("margin", {})):
        path = write(tmp_path / "a.jsonl", *(PAIR | fields | {column: weight} for weight in (2, 0.5, 0)))
        rows = read(path, "preference", weight=column)
        assert [row.weight for row in rows] == [2.0, 0.5, 0.0]
        assert [row.margin for row in rows] == ([2.0, 0.5, 0.0] if column == "margin" else [None] * 3)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "w": 3}
    assert read(write(tmp_path / "b.jsonl", ids), "preference", weight="w")[0].weight == 3.0
    renamed = {"q": "2 + 2 =", "chosen": "4", "rejected": "5", "w": 3}
    (row,) = read(write(tmp_path / "c.jsonl", renamed), "preference", weight="w", columns={"prompt": "q"})
    assert row == Preference("c.jsonl:1", "2 + 2 =", "4", "5", weight=3.0)
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected,fb_weight\na,b,c,1.5\na,c,b,2\n")
    assert [row.weight for row in read(tmp_path / "d.csv", "preference", weight="fb_weight")] == [1.5, 2.0]


def test_a_weight_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "missing": ({}, "w: missing or null, a weight is a number from 0 to 1e30; fix it or drop the row"),
        "null": ({"w": None}, "w: missing or null"),
        "negative": ({"w": -1}, "w: a number (-1), a weight is a number from 0"),
        "NaN": ({"w": math.nan}, "w: NaN, a number must be finite"),
        "infinite": ({"w": math.inf}, "w: Infinity, a number must be finite"),
        "text": ({"w": "1"}, "w: text ('1'), a weight"),
        "a boolean": ({"w": True}, "w: a boolean (True), a weight"),
        "huge": ({"w": 10**400}, "w: a number"),
    }
    rows = [PAIR | {"w": 1}, *(PAIR | given for given, _ in wrong.values())]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "a.jsonl", *rows), "preference", weight="w")
    for number, (problem, (_, message)) in enumerate(zip(caught.value.problems, wrong.values(), strict=True), 2):
        assert problem.startswith(f"a.jsonl:{number}: {message}"), problem
    for value in (math.nan, math.inf):  # other files than JSON hold them
        with pytest.raises(Bad, match=rf"w: a number \({value}\), a weight is a number from 0 to 1e30"):
            check_weight(value, "w")
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected,w\na,b,c,1.5\na,c,b,\na,d,b,NaN\na,e,b,two\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "d.csv", "preference", weight="w")
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["3", "4", "5"]
    with pytest.raises(DataError, match="weight_column: no column fb_weigth in the file; did you mean fb_weight?"):
        read(write(tmp_path / "a.jsonl", PAIR | {"fb_weight": 1}), "preference", weight="fb_weigth")


def test_csv_and_tsv(tmp_path: Path) -> None:
    header = ["prompt", "completion", "label", "id"]
    rows = [["a, b?", 'two\nlines "quoted"', "True", "1"], ["c?", "d", "0", ""], ["e?", "f", "false", "3"]]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"a{suffix}"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *rows])
        name = path.name
        assert read(path, "unpaired") == [
            Unpaired(f"{name}:2", "a, b?", 'two\nlines "quoted"', True),
            Unpaired(f"{name}:4", "c?", "d", False),  # the row before it takes two lines
            Unpaired(f"{name}:5", "e?", "f", False),
        ]


def test_csv_cells_hold_ids_and_long_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt_ids,completion_ids\n"[1, 2]","[3]"\n')
    assert read(path, "sft") == [ExampleIds("a.csv:2", (1, 2), (3,))]
    path.write_text(f"prompt,completion\na,{'b' * 200_000}\n")
    assert read(path, "sft") == [Example("a.csv:2", "a", "b" * 200_000)]


def test_parquet_and_datasets_on_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    records = [{"messages": [ASK, TELL], "id": 1}, {"messages": [ASK, WRONG], "id": 2}]
    dataset = Dataset.from_list(records)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    for name in ("a.parquet", "saved"):
        expected = [Chat(f"{name}:1", (USER, RIGHT)), Chat(f"{name}:2", (USER, FALSE))]
        assert read(tmp_path / name, "sft") == expected
    with pytest.raises(InputError, match=r"both: holds the splits train, test; name one of them: .*both/train"):
        read(tmp_path / "both", "sft")
    assert len(read(tmp_path / "both" / "train", "sft")) == 2


def test_a_hub_dataset(tmp_path: Path) -> None:
    """A folder stands for the repository: `load_dataset` reads both alike."""
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "train.jsonl", {"q": "2 + 2?", "a": "4"})
    repo = str(tmp_path / "repo")
    rows = all_rows(scan_hub(repo, None, "sft", columns={"prompt": "q", "completion": "a"}))
    assert rows == [Example(f"{repo}:1", "2 + 2?", "4")]
    with pytest.raises(InputError, match="split dev cannot be loaded"):
        all_rows(scan_hub(repo, None, "sft", split="dev"))


def test_plain_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("  one \n\n\ntwo\n")
    assert read(path, "text") == [Text("a.txt:1", "  one "), Text("a.txt:4", "two")]
    assert read(path, "prompt")[1] == Prompt("a.txt:4", "two")
    with pytest.raises(InputError, match=r"a.txt: .txt holds plain text, task sft needs fields"):
        read(path, "sft")


def test_the_folder_of_a_stage(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"text": "one"})
    assert read(tmp_path, "text", name="stage:sample") == [Text("stage:sample:1", "one")]


# What is refused: the whole line that the user reads.

GOOD: dict[Task, Any] = {
    "sft": {"prompt": "a", "completion": "b"},
    "preference": PAIR,
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "prompt": {"prompt": "a"},
    "text": {"text": "a"},
}
MESSAGES = {"messages": [ASK, TELL]}
IDS = {"prompt_ids": [1], "completion_ids": [2]}
BAD: list[tuple[Task, Any, Any, str]] = [
    # task, a good first row (0: the usual one), the bad row, and what stands after `a.jsonl:2: `
    ("text", 0, '{"text": "a", }',
     "broken JSON (Illegal trailing comma before end of object at column 13), each line must be one JSON "
     "object; fix the line or drop it"),
    ("text", 0, '{"text": "a"',
     "broken JSON (the line ends inside a row at column 13), each line must be one JSON object; write the row again, "
     "it was cut off"),
    ("text", 0, "[" * 100_000,
     "unusable JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string), each"
     " line must be one JSON object; fix the line or drop it"),
    ("text", 0, ["a"],
     "a list (['a']), a row must be an object of fields; fix or drop it"),
    ("sft", 0, {"prompt": "a"},
     "completion: missing, rows of this file need prompt, completion (this one has prompt); add or map it"),
    ("sft", 0, {"prompt": "a", "completion": None},
     "completion: null, rows of this file need prompt, completion (this one has prompt); add or "
     "map it"),
    ("sft", 0, {"prompt": "a", "completio": "b"},
     "completio: unknown field; did you mean completion?"),
    ("sft", 0, {"prompt": "a", "completion": "b", "zzz": 1},
     "zzz: unknown field; remove it, or name the wanted ones with columns"),
    ("sft", 0, MESSAGES,
     "messages: belongs to another format, the rows of this file are read as prompt-completion (prompt, completion); "
     "use one format per file, name it with format:, or map with columns"),
    ("sft", 0, {"prompt": 3, "completion": "b"},
     "prompt: a number (3), must be text; write it as a string"),
    ("sft", 0, {"prompt": "", "completion": "b"},
     "prompt: empty, must hold text; fill it in or drop the row"),
    ("sft", 0, {"prompt": "a", "completion": " \n"},
     "completion: blank, must hold text; fill it in or drop the row"),
    ("sft", 0, '{"prompt": "a", "completion": "b\\ud83d"}',
     "completion: half a character (\\ud83d at 1), must be Unicode; fix the export"),
    ("sft", 0, {"prompt": [ASK], "completion": "4"},
     "completion: text but the prompt is messages, both must be text or both messages; make them alike"),
    ("sft", 0, {"prompt": [ASK], "completion": [ASK, TELL]},
     "completion: has the turns user, assistant, must be one assistant turn; move earlier turns into the "
     "prompt"),
    ("sft", 0, {"prompt": "a", "completion": "b", "finish": 1},
     "finish: 1, must be stop (the answer ended) or length (it was cut off); fix or drop it"),
    ("sft", 0, {"prompt": "a", "completion": "b", "finish": "lenght"},
     "finish: 'lenght', must be stop (the answer ended) or length (it was cut off); fix or drop it"),
    ("sft", MESSAGES, {"messages": [ASK, turn("asistant", "4")]},
     "messages[1].role: unknown role ('asistant'); did you mean assistant?"),
    ("sft", MESSAGES, {"messages": [turn("human", "a"), TELL]},
     "messages[0].role: unknown role ('human'); did you mean user?"),
    ("sft", MESSAGES, {"messages": [ASK, turn("tool", "4")]},
     "messages[1].role: unknown role ('tool'), tool calls are not read; drop the row"),
    ("sft", MESSAGES, {"messages": [{"role": ["user"], "content": "a"}, TELL]},
     "messages[0].role: unknown role (['user']), must be one of system, user, assistant"),
    ("sft", MESSAGES, {"messages": [ASK, ASK, TELL]},
     "messages[1].role: user where assistant was due, after an optional first system turn, user and assistant "
     "take turns; reorder or join the turns"),
    ("sft", MESSAGES, {"messages": [turn("system", "a"), TELL]},
     "messages[1].role: assistant where user was due, after an optional first system turn, user and assistant "
     "take turns; reorder or join the turns"),
    ("sft", MESSAGES, {"messages": [ASK, TELL, ASK]},
     "messages: ends with user, must end with assistant (what is learnt is an answer); drop the last turn"),
    ("sft", MESSAGES, {"messages": [ASK, {"role": "assistant"}]},
     "messages[1].content: missing, a message is {role, content}; add it"),
    ("sft", MESSAGES, {"messages": [ASK, TELL | {"weight": 1}]},
     "messages[1].weight: unknown field, only role and content are read; remove it"),
    ("sft", MESSAGES, {"messages": [ASK, turn("assistant", " ")]},
     "messages[1].content: blank, must hold text; fill it in or drop the row"),
    ("sft", MESSAGES, {"messages": "a"},
     "messages: text ('a'), must be a list of {role, content}; write it so"),
    ("sft", MESSAGES, {"messages": []},
     "messages: empty, must hold at least one message; fill it in or drop the row"),
    ("sft", MESSAGES, {"messages": ["hello"]},
     "messages[0]: text ('hello'), a message must be an object {role, content}; write it so"),
    ("sft", IDS, {"prompt_ids": [1], "completion_ids": []},
     "completion_ids: empty, must hold at least one token id; drop the row"),
    ("sft", IDS, {"prompt_ids": [1, -2], "completion_ids": [1]},
     "prompt_ids[1]: a number (-2), a token id is a whole number of at least 0; fix or drop the row"),
    ("sft", IDS, {"prompt_ids": [1], "completion_ids": [1, True]},
     "completion_ids[1]: a boolean (True), a token id is a whole number of at least 0; fix or drop the row"),
    ("sft", IDS, {"prompt_ids": [1.5], "completion_ids": [1]},
     "prompt_ids[0]: a number (1.5), a token id is a whole number of at least 0; fix or drop the row"),
    ("preference", 0, PAIR | {"chosen": "It is 4.", "rejected": "It is 4."},
     "chosen: equals rejected, a pair must differ; drop the row or fix the log"),
    ("preference", {"chosen": [ASK, TELL], "rejected": [ASK, WRONG]}, {"chosen": [ASK, TELL], "rejected": [ASK, TELL]},
     "chosen: equals rejected, a pair must differ; drop the row or fix the log"),
    ("preference", {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
     {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]},
     "chosen_ids: equals rejected_ids, a pair must differ; drop the row or fix the log"),
    ("preference", 0, PAIR | {"margin": float("nan")},
     "margin: NaN, a number must be finite; write null or leave it out"),
    ("preference", 0, {"prompt": "other", "chosen": [ASK, TELL], "rejected": [ASK, WRONG]},
     "prompt: is not what chosen and rejected begin with ('2 + 2?'), must agree; fix it or drop the prompt "
     "column"),
    ("preference", {"chosen": [ASK, TELL], "rejected": [ASK, WRONG]}, {"chosen": "a 4", "rejected": "a 5"},
     "prompt: missing, two plain strings do not say where the prompt ends; add a prompt field"),
    ("preference", {"chosen": [ASK, TELL], "rejected": [ASK, WRONG]},
     {"chosen": [turn("user", "x"), TELL], "rejected": [ASK, WRONG]},
     "chosen: conversations part at turn 1 of 2 and 2, a pair may differ in its last answer only; drop it"),
    ("unpaired", 0, GOOD["unpaired"] | {"label": "yes"},
     "label: text ('yes'), must be true or false; map what was good to true"),
    ("unpaired", 0, GOOD["unpaired"] | {"label": 2},
     "label: a number (2), must be true or false; map what was good to true"),
    ("prompt", {"messages": [ASK]}, {"messages": [ASK, TELL]},
     "messages: ends with assistant, must end with user (a prompt waits for its answer); drop the last turn"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "first", "bad", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_a_bad_row_is_told_in_one_line(task: Task, first: Any, bad: Any, message: str, tmp_path: Path) -> None:
    good = first or GOOD[task]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "a.jsonl", good, bad, good), task)
    (problem,) = caught.value.problems
    if "Illegal trailing comma" in message:  # Python 3.11 and 3.12 call it by another name
        assert problem.startswith("a.jsonl:2: broken JSON (")
    elif "recursion" in message:
        assert problem.startswith("a.jsonl:2: unusable JSON (")
    else:
        assert problem == f"a.jsonl:2: {message}"


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = [PAIR if line % 3 else PAIR | {"chosen": "5"} for line in range(1, 100)]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "prefs.jsonl", *rows), "preference")
    head, cause, *first, more = caught.value.problems
    assert (head, cause) == ("33 of 99 rows cannot be used", "equal sides: 33 rows")
    assert [problem.split(":")[1] for problem in first] == ["3", "6", "9", "12", "15"]
    assert caught.value.exit_code == 3 and more == "  ... and 28 more"
    few = [PAIR if line % 5 else PAIR | {"chosen": "5"} for line in range(1, 100)]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "prefs.jsonl", *few), "preference")
    assert [problem.split(":")[1] for problem in caught.value.problems] == [str(line) for line in range(5, 100, 5)]


def test_a_file_of_another_task_says_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{broken", {"question": "a", "answer": "b"})
    with pytest.raises(DataError) as caught:
        read(path, "preference")
    first, second = caught.value.problems
    assert first.startswith("a.jsonl:1: broken JSON")
    assert second == (
        "a.jsonl:2: answer, question: no format of task preference, which reads {prompt, chosen, rejected} or {chosen, "
        "rejected} or {instruction, chosen, rejected} or {conversations, chosen, rejected} or {chosen_messages, "
        "rejected_messages} or {prompt_ids, chosen_ids, rejected_ids}; rename or map them (columns: {prompt: question, "
        "chosen: answer, rejected: NAME})"
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: promt: unknown field; did you mean prompt\?"):
        read(write(tmp_path / "a.jsonl", {"promt": "a", "completion": "b"}), "sft")
    with pytest.raises(DataError, match=r"a.jsonl:1: promt: unknown field; did you mean prompt\?"):
        read(write(tmp_path / "a.jsonl", {"promt": "a"}), "prompt")


def test_bytes_that_are_not_utf8_spoil_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": ""}\n')
    with pytest.raises(DataError) as caught:
        read(path, "text")
    bad, empty = caught.value.problems
    assert bad == "a.jsonl:2: not UTF-8 (byte 0xe9 at column 14), rows are read as UTF-8; save the file as UTF-8"
    assert empty.startswith("a.jsonl:3: text: empty")
    path.write_bytes('{"text": "one"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"a.jsonl:1: not UTF-8 \(UTF-16\)"):
        read(path, "text")
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\none\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"a.csv:3: not UTF-8 \(byte 0xe9 at column 4\)"):
        read(path, "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b" "c"}]', "a.json:2: broken JSON (Expecting ',' delimiter at column 15)"),
        ('[{"text": "a"}\n {"text": "b"}]', "a.json:2: broken JSON (the array does not go on with , or ])"),
        ('[{"text": "a"}\n', "a.json:2: broken JSON (the array does not go on with , or ])"),
        ('{"text": "a"}\n', "a.json:1: not a JSON array, a .json file holds [row, row, ...]; name it .jsonl"),
        ("[]", "a.json: no rows"),
        ("", "a.json: no rows"),
    ],
)
def test_broken_arrays(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", "text")
    (problem,) = caught.value.problems
    assert problem.startswith(message)


def test_broken_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\na,b,c\na\n")
    with pytest.raises(DataError) as caught:
        read(path, "sft")
    assert caught.value.problems == (
        "a.csv:3: 3 cells in a row, the header has 2; quote the cell that holds a comma",
        "a.csv:4: 1 cell in a row, the header has 2; write empty cells too, and quote the cell that holds a line break",
    )
    path.write_text('prompt,completion\na,b\na,"b\n\n')
    with pytest.raises(DataError, match=r"a.csv:3: broken row \(the quote opened here is never closed\)"):
        read(path, "sft")


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {
        "missing.jsonl": "missing.jsonl: does not exist",
        "missing.xlsx": "missing.xlsx: does not exist",
        "a.xlsx": "a.xlsx: suffix .xlsx is not readable; use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt or",
        "folder": "folder: a folder without rows",
        "a.parquet": "a.parquet: not a readable Parquet file",
    }
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "a.parquet").write_bytes(b"not Parquet at all")
    (tmp_path / "folder").mkdir()
    for name, message in cases.items():
        with pytest.raises(InputError) as caught:
            read(tmp_path / name, "sft")
        assert str(caught.value).startswith(message)
    if os.geteuid():
        locked = write(tmp_path / "locked.jsonl", GOOD["sft"])
        locked.chmod(0)
        with pytest.raises(InputError, match=r"locked.jsonl: cannot be read \(Permission denied\)"):
            read(locked, "sft")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_empty_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"no rows, at least one is needed"):
        read(path, "text")


# Splitting.


def pairs(prompts: list[str]) -> list[Preference]:
    return [Preference(f"a:{i}", prompt, "4", f"5{i}") for i, prompt in enumerate(prompts)]


def test_split_keeps_equal_prompts_together_and_moves_nobody() -> None:
    prompts = [f"prompt {i % 700}" for i in range(1000)]
    rows = pairs(prompts)
    train, held_out = split(rows, 0.1)
    assert len(train) + len(held_out) == 1000 and 50 <= len(held_out) <= 150
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}

    more = [*pairs([f"new {i}" for i in range(500)]), *rows]
    random.Random(0).shuffle(more)
    more_train, more_held_out = split(more, 0.1)
    assert {row.prompt for row in held_out} <= {row.prompt for row in more_held_out}
    assert {row.prompt for row in train} <= {row.prompt for row in more_train}
    assert [row.where for row in split(rows, 0.2)[1] if row in held_out] == [row.where for row in held_out]


def test_split_leaves_no_side_empty() -> None:
    for count in range(2, 30):
        for fraction in (0.001, 0.999):
            train, held_out = split(pairs([f"p{count}-{i}" for i in range(count)]), fraction)
            assert train and held_out
    assert split(pairs(["same"] * 5), 0.0) == (pairs(["same"] * 5), [])
    assert [len(side) for side in split(pairs(["a", "b", "c"]), 0.0)] == [3, 0]
    assert sorted(len(side) for side in split(pairs(["same"] * 5), 0.5)) == [0, 5]
    with pytest.raises(ValueError, match="fraction"):
        split(pairs(["a"]), 1.0)


# Speed and real files.


def test_short_rows_are_read_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[MESSAGES] * 20_000)
    start = time.process_time()
    rows = read(path, "sft")
    rate = len(rows) / (time.process_time() - start)
    assert rate > 30_000, f"{rate:,.0f} rows per CPU second"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real files is not here")
def test_real_files() -> None:
    gsm8k = read(SHARED / "sft/gsm8k_train.jsonl", "sft", columns={"prompt": "question", "completion": "answer"})
    assert len(gsm8k) > 7_000 and all(isinstance(row, Example) and "####" in str(row.completion) for row in gsm8k)
    tulu = read(SHARED / "pref/tulu3_preference_sample_100.jsonl", "preference")
    assert len(tulu) > 90 and all(isinstance(row, Preference) and len(row.chosen) == 1 for row in tulu)
    thumbs = read(SHARED / "pref/lf_kto_en_demo.json", "unpaired")
    assert {row.label for row in thumbs if isinstance(row, Unpaired)} == {True, False}
    assert len(read(SHARED / "text/lf_wiki_demo.txt", "text")) == 30
    xstest = read(SHARED / "eval/xstest_prompts.csv", "prompt")
    assert all(isinstance(row, Prompt) and row.extra["label"] in ("safe", "unsafe") for row in xstest)
    with pytest.raises(DataError, match=r"gsm8k_train.jsonl:1: answer, question: no format of task sft"):
        read(SHARED / "sft/gsm8k_train.jsonl", "sft")


def test_columns_rename_what_needs_it_and_keep_what_has_our_names(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "a", "completion": "b", "grade": 3}\n')
    (row,) = read(tmp_path / "q.jsonl", "sft", columns={"prompt": "question"})
    assert (row.prompt, row.completion) == ("a", "b")


def test_what_stands_after_an_array_is_no_row_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text('[{"prompt": "a", "completion": "b"}]\n[{"prompt": "c", "completion": "d"}]')
    with pytest.raises(DataError, match="two.json:2: something stands after the array"):
        read(tmp_path / "two.json", "sft")


def test_rows_under_a_key_of_an_object_are_named_by_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"canary": ["no", {"row": 1}],\n "examples": [\n  {"in": "1+1"}, {"in": "2"},\n  7], "n": {}}\n')
    found = list(scan(path, "prompt", columns={"prompt": "examples[].in"}))
    assert [row.prompt for row in found[:2]] == ["1+1", "2"]
    assert [row.where for row in found] == ["a.json:3", "a.json:3[1]", "a.json:4"]
    assert "must be an object" in found[2].problem
    with pytest.raises(DataError, match=r"columns.prompt: no column out in the file"):
        list(scan(path, "prompt", columns={"prompt": "examples[].out"}))
    with pytest.raises(InputError, match=r"begin all with the same LIST\[\]"):
        scan(path, "sft", columns={"prompt": "examples[].in", "completion": "out"})
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"in": "1+1"}\n')
    with pytest.raises(InputError, match="only .json holds one"):
        scan(lines, "prompt", columns={"prompt": "examples[].in"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"canary": 1, "rows": [{"in": "a"}]}',
            "a.json:1: no list under examples, columns name it; its other keys: ca",
        ),
        ('[{"in": "a"}]', "a.json:1: not an object with the key examples"),
        ('{"examples": [{"in": "a"}]} {}', "something stands after the object's }"),
        ('{"examples": [{"in": "a"}', "a.json:1: broken JSON .the array does not go on with , or ].; fix"),
        ('{"examples": [{"in": "a"}], "examples": []}', "a second examples, a key stands once"),
        ('{"examples": [{"in": "a"}] "b": 1}', "not an object that goes on with , or }"),
        ('{"examples" [{"in": "a"}]}', "does not go on with a key and :"),
        ("", "not an object with the key examples"),
    ],
)
def test_objects_without_the_list_that_columns_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path, "prompt", columns={"prompt": "examples[].in"})
