"""Every format of every task: the smallest file, the exact rows, and the exact line for every row that is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data import formats
from align_pipeline.data.formats import FORMATS
from align_pipeline.data.gate import Reject
from align_pipeline.data.load import read, scan
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
)
from align_pipeline.pipeline.errors import DataError, InputError


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def tell(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def say(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


U, A, S = (lambda content, role=role: Message(role, content) for role in ("user", "assistant", "system"))
AT = "a.jsonl:1"
Q, YES, NO = U("q"), A("yes"), A("no")
CHAT = [user("q"), tell("yes")]
WRONG = [user("q"), tell("no")]
TALK = [say("human", "q"), say("gpt", "yes")]
GIVEN = hh("Human: q", "Assistant: yes")
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
PICKED, JUDGED = Preference(AT, (Q,), (YES,), (NO,)), Unpaired(AT, (Q,), (YES,), True)
OLD = {"instruction": "q", "input": "of", "system": "s", "history": [["a", "b"]]}
OLD_TURNS = (S("s"), U("a"), A("b"), U("q\n\nof"))


def write(folder: Path, *records: Any) -> Path:
    path = folder / "a.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def table(folder: Path, header: list[str], *rows: list[str]) -> Path:
    path = folder / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def parquet(folder: Path, *records: dict[str, Any]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(list(records)), folder / "a.parquet")
    return folder / "a.parquet"


# What is read.

READ: list[tuple[Task, str, dict[str, Any], Row]] = [
    ("sft", "prompt-completion", {"prompt": "q", "completion": "yes"}, Example(AT, "q", "yes")),
    ("sft", "prompt-completion", {"prompt": [user("q")], "completion": [tell("yes")], "finish": "length"},
     Example(AT, (Q,), (YES,), "length")),
    ("sft", "messages", {"messages": CHAT, "prompt": "q", "prompt_id": "7"}, Chat(AT, (Q, YES))),  # as ultrachat
    ("sft", "alpaca", {"instruction": "q", "output": "yes"}, Example(AT, (Q,), (YES,))),
    ("sft", "alpaca", {**OLD, "output": "yes"}, Example(AT, OLD_TURNS, (YES,))),
    ("sft", "alpaca", {"instruction": "q", "input": " ", "output": "yes", "system": "", "history": []},
     Example(AT, (Q,), (YES,))),
    ("sft", "sharegpt", {"conversations": TALK}, Chat(AT, (Q, YES))),
    ("sft", "sharegpt", {"conversations": CHAT, "system": "s", "tools": "[]"}, Chat(AT, (S("s"), Q, YES))),
    ("sft", "sharegpt", {"conversations": [say("system", "s"), *TALK], "system": None, "tools": ""},
     Chat(AT, (S("s"), Q, YES))),
    ("sft", "token-ids", {"prompt_ids": [], "completion_ids": [3, 2], "prompt": "q"}, ExampleIds(AT, (), (3, 2))),
    ("sft", "text", {"text": "q", "finish": "stop"}, Text(AT, "q", "stop")),
    ("preference", "preference", PAIR | {"margin": 2}, Preference(AT, "q", "yes", "no", 2.0)),
    ("preference", "preference", {"prompt": [user("q")], "chosen": tell("yes"), "rejected": [tell("no")]}, PICKED),
    ("preference", "preference", {"prompt": "q", "chosen": CHAT, "rejected": WRONG}, PICKED),
    ("preference", "preference", {"prompt": [user("q", name=None)], "chosen": CHAT, "rejected": WRONG}, PICKED),
    ("preference", "preference", {"prompt": [user("q")], "chosen": TALK[1:], "rejected": [say("gpt", "no")]}, PICKED),
    ("preference", "preference", {"prompt": " q", "chosen": CHAT, "rejected": WRONG, "messages": CHAT,
                                  "score_chosen": 9.5, "score_rejected": 3}, PICKED),  # as ultrafeedback_binarized
    ("preference", "preference", {"prompt": "q", "chosen": GIVEN, "rejected": hh("Human: q", "Assistant: no")}, PICKED),
    ("preference", "implicit", {"chosen": [*CHAT, user("r"), tell("yes")], "rejected": [*CHAT, user("r"), tell("no")]},
     Preference(AT, (Q, YES, U("r")), (YES,), (NO,))),
    ("preference", "hh-rlhf", {"chosen": GIVEN, "rejected": hh("Human: q", "Assistant: no")}, PICKED),
    ("preference", "hh-rlhf", {"chosen": hh("Human: q", "Assistant: a\n\nb", "Human: r", "Assistant: yes "),
                               "rejected": hh("Human: q", "Assistant: a\n\nb", "Human: r", "Assistant: no")},
     Preference(AT, (Q, A("a\n\nb"), U("r")), (YES,), (NO,))),
    ("preference", "alpaca", {**OLD, "chosen": "yes", "rejected": "no", "margin": None},
     Preference(AT, OLD_TURNS, (YES,), (NO,))),
    ("preference", "sharegpt", {"conversations": TALK[:1], "chosen": TALK[1], "rejected": say("gpt", "no")}, PICKED),
    ("preference", "message-pairs", {"chosen_messages": CHAT, "rejected_messages": WRONG, "margin": 1.5},
     Preference(AT, (Q,), (YES,), (NO,), 1.5)),
    ("preference", "token-ids", {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
     PreferenceIds(AT, (1,), (2,), (3,))),
    ("unpaired", "prompt-completion", {"prompt": "q", "completion": "yes", "label": 0},
     Unpaired(AT, "q", "yes", False)),
    ("unpaired", "messages", {"messages": CHAT, "label": True}, JUDGED),
    ("unpaired", "alpaca", {"instruction": "q", "output": "yes", "label": True}, JUDGED),
    ("unpaired", "sharegpt", {"conversations": TALK, "label": True}, JUDGED),
    ("unpaired", "token-ids", {"prompt_ids": [1], "completion_ids": [2], "label": False},
     UnpairedIds(AT, (1,), (2,), False)),
    ("prompt", "prompt", {"prompt": "q", "extra": 1, "id": 2}, Prompt(AT, "q", {"extra": 1, "id": 2})),
    ("prompt", "messages", {"messages": CHAT[:1], "answer": "yes"}, Prompt(AT, (Q,), {"answer": "yes"})),
    ("prompt", "alpaca", {**OLD, "output": "yes"}, Prompt(AT, OLD_TURNS, {"output": "yes"})),
    ("prompt", "sharegpt", {"conversations": TALK[:1]}, Prompt(AT, (Q,))),
    ("prompt", "token-ids", {"prompt_ids": [1], "prompt": "q"}, PromptIds(AT, (1,), {"prompt": "q"})),
    ("text", "text", {"text": "q", "url": "u"}, Text(AT, "q")),
    # Content in parts, and weights that say what is learnt anyway.
    ("sft", "messages", {"messages": [user([{"type": "text", "text": "q"}], loss_weight=0.0),
                                      tell([{"type": "text", "text": None, "value": part} for part in ("ye", "s")],
                                           loss_weight=1)]},
     Chat(AT, (Q, YES))),
]  # fmt: skip


@pytest.mark.parametrize(("task", "format", "record", "row"), READ, ids=[f"{task} {name}" for task, name, *_ in READ])
def test_the_smallest_file_of_each_format(task: Task, format: str, record: Any, row: Row, tmp_path: Path) -> None:
    rows = scan(write(tmp_path, record), task)
    assert list(rows) == [row]
    assert rows.format and rows.format.name == format
    assert read(tmp_path / "a.jsonl", task, format=format) == [row]


def test_the_table_in_the_docstring_is_the_code_and_none_of_it_is_untested() -> None:
    told, task = {}, ""
    for line in (formats.__doc__ or "").partition("fields (optional")[2].partition("\n\n")[0].splitlines()[1:]:
        task = line[:12].strip() or task
        required = line[34:].partition(":")[0].partition("[")[0].partition(";")[0]
        told[task, line[12:34].strip()] = tuple(required.strip(" ,").split(", "))
    assert told == {(task, one.name): one.required for task in FORMATS for one in FORMATS[task]}
    assert told.keys() == {(task, name) for task, name, *_ in READ}


def test_columns_map_every_kind_of_field(tmp_path: Path) -> None:
    cases: list[tuple[Task, dict[str, Any], dict[str, str], Row]] = [
        ("sft", {"conversation": TALK, "turns": 1}, {"conversations": "conversation"}, Chat(AT, (Q, YES))),
        ("sft", {"dialogue": CHAT, "prompt": "q"}, {"messages": "dialogue"}, Chat(AT, (Q, YES))),
        ("sft", {"instruction": "q", "context": "of", "response": "yes"}, {"input": "context", "output": "response"},
         Example(AT, (U("q\n\nof"),), (YES,))),
        ("preference", {"question": "q", "system": "s", "chosen": "yes", "rejected": "no"}, {"instruction": "question"},
         Preference(AT, (S("s"), Q), (YES,), (NO,))),
        ("preference", {"good": CHAT, "bad": WRONG, "gap": 2}, {"chosen": "good", "rejected": "bad", "margin": "gap"},
         Preference(AT, (Q,), (YES,), (NO,), 2.0)),
        ("unpaired", {"prompt": "q", "completion": "yes", "label": "best", "liked": 1}, {"label": "liked"},
         Unpaired(AT, "q", "yes", True)),
        ("prompt", {"ids": [1], "prompt": "q"}, {"prompt_ids": "ids"}, PromptIds(AT, (1,), {"prompt": "q"})),
        ("sft", {"text": "q", "completion": "yes"}, {"prompt": "text"}, Example(AT, "q", "yes")),
        ("prompt", {"question": "q", "input": "of"}, {"prompt": "question"}, Prompt(AT, "q", {"input": "of"})),
    ]  # fmt: skip
    for task, record, columns, row in cases:
        assert read(write(tmp_path, record), task, columns=columns) == [row], columns


# Recognition.


def test_most_of_the_first_rows_say_what_the_file_is(tmp_path: Path) -> None:
    chat, plain = {"messages": CHAT}, {"prompt": "q", "completion": "yes"}
    rejected, *rows = scan(write(tmp_path, chat, plain, plain), "sft")
    assert rows == [Example(f"a.jsonl:{line}", "q", "yes") for line in (2, 3)]
    assert str(rejected) == (
        "a.jsonl:1: messages: belongs to another format, the rows of this file are read as prompt-completion (prompt, "
        "completion); use one format per file, name it with format:, or map with columns"
    )
    for damaged in ('{"prompt": ', ["q"], {"promt": "q", "completion": "yes"}, {"prompt": None, "completion": "yes"}):
        rejected, row = scan(write(tmp_path, damaged, plain), "sft")
        assert isinstance(rejected, Reject) and rejected.where == AT and row == Example("a.jsonl:2", "q", "yes")
    *rows, rejected = scan(write(tmp_path, plain, plain, plain | chat), "sft")
    assert len(rows) == 2 and str(rejected).startswith("a.jsonl:3: messages: belongs to another format")


def test_two_readings_are_a_question_that_format_answers(tmp_path: Path) -> None:
    cases: list[tuple[Task, dict[str, Any], str, dict[str, Row]]] = [
        ("sft", {"instruction": "q", "output": "yes", "text": "all"},
         "alpaca (instruction, output) and text (text); say which: format: alpaca",
         {"alpaca": Example(AT, (Q,), (YES,)), "text": Text(AT, "all")}),
        ("prompt", {"prompt": "p", "messages": CHAT[:1]},
         "prompt (prompt) and messages (messages); say which: format: prompt",
         {"prompt": Prompt(AT, "p", {"messages": CHAT[:1]}), "messages": Prompt(AT, (Q,), {"prompt": "p"})}),
        ("preference", {"chosen": "a", "rejected": "b", "chosen_messages": CHAT, "rejected_messages": WRONG},
         "implicit (chosen, rejected) and message-pairs (chosen_messages, rejected_messages); say which: "
         "format: implicit", {"message-pairs": PICKED}),
    ]  # fmt: skip
    for task, record, question, readings in cases:
        path = write(tmp_path, record)
        with pytest.raises(DataError) as caught:
            read(path, task)
        assert str(caught.value) == f"{AT}: {', '.join(sorted(record))}: can be read as {question}"
        for format, row in readings.items():
            assert read(path, task, format=format) == [row]
    with pytest.raises(InputError) as refused:
        read(path, "sft", format="hh-rlhf")
    names = "alpaca, messages, prompt-completion, sharegpt, text, token-ids"
    assert str(refused.value) == f"format: hh-rlhf is no format of task sft; choose one of {names}"


def test_what_is_wrong_in_every_row_is_one_line(tmp_path: Path) -> None:
    cases = {
        "completion: missing, rows of this file need prompt, completion (this one has answer, prompt); add or map it":
            {"prompt": "q", "answer": "yes"},
        "grade: unknown field; remove it, or name the wanted ones with columns":
            {"prompt": "q", "completion": "yes", "grade": 3},
        "output: missing, rows of this file need instruction, output (this one has instruction); add or map it":
            {"instruction": "q"},
    }  # fmt: skip
    for problem, record in cases.items():
        with pytest.raises(DataError) as caught:
            read(write(tmp_path, *[record] * 300), "sft")
        assert caught.value.problems == (f"{AT}: {problem} (so it is in all of the first 100 rows)",)
    assert len(read(write(tmp_path, *[{"prompt": "q", "completion": "yes", "grade": 3}] * 3), "sft",
                    format="prompt-completion")) == 3  # fmt: skip


# Tables and Parquet.


def test_cells_hold_json_where_a_field_is_no_text(tmp_path: Path) -> None:
    cases: list[tuple[Task, dict[str, str], Row]] = [
        ("sft", {"messages": json.dumps(CHAT)}, Chat("a.csv:2", (Q, YES))),
        ("sft", {"conversations": json.dumps(TALK), "tools": "[]", "system": ""}, Chat("a.csv:2", (Q, YES))),
        ("sft", {"instruction": "q", "input": "of", "output": "3", "system": "s", "history": '[["a", "b"]]'},
         Example("a.csv:2", OLD_TURNS, (A("3"),))),
        ("preference", PAIR | {"margin": "0.5"}, Preference("a.csv:2", "q", "yes", "no", 0.5)),
        ("preference", PAIR | {"margin": ""}, Preference("a.csv:2", "q", "yes", "no")),
        ("preference", {"prompt": "q", "chosen": json.dumps(CHAT), "rejected": json.dumps(WRONG)},
         Preference("a.csv:2", (Q,), (YES,), (NO,))),
        ("sft", {"prompt": '[{"q": 1}]', "completion": "[{"}, Example("a.csv:2", '[{"q": 1}]', "[{")),
        ("unpaired", {"prompt": "[1]", "completion": "true", "label": "TRUE"},
         Unpaired("a.csv:2", "[1]", "true", True)),
    ]  # fmt: skip
    for task, cells, row in cases:
        assert read(table(tmp_path, list(cells), list(cells.values())), task) == [row], cells
    (bad,) = scan(table(tmp_path, ["messages"], [str(CHAT)]), "sft")
    assert str(bad).startswith("a.csv:2: messages: text (\"[{'role': 'user', ")


def test_null_fields_of_parquet_count_as_absent(tmp_path: Path) -> None:
    path = parquet(
        tmp_path,
        {"messages": [user("q", name=None), tell("yes")], "prompt": None, "grade": None},
        {"messages": [user("q", name="Ann"), tell("yes")], "prompt": "q", "grade": 3},
        {"messages": TALK, "prompt": None, "grade": None},
    )
    first, named, third = scan(path, "sft")
    assert (first, third) == (Chat("a.parquet:1", (Q, YES)), Chat("a.parquet:3", (Q, YES)))
    assert str(named) == "a.parquet:2: grade: unknown field; remove it, or name the wanted ones with columns"
    (_, named, _) = scan(path, "sft", columns={"messages": "messages"})
    assert str(named) == "a.parquet:2: messages[0].name: unknown field, only role and content are read; remove it"
    pair = {"prompt": [user("q")], "chosen": [user("q", x=None), tell("yes")], "rejected": WRONG, "margin": None}
    assert read(parquet(tmp_path, pair), "preference") == [Preference("a.parquet:1", (Q,), (YES,), (NO,))]


# What is refused.

BOTH = "both must be text or both messages; make them alike"
TURNS = "after an optional first system turn, user and assistant take turns; reorder or join the turns"
WEIGHTS = "turns have no weights here: the assistant's are learnt, the others not; remove it or split the row"
LAST = "a pair may differ in its last answer only; cut both after the first that differs"
TOOLS = "tools: tool definitions are not read, must be absent; drop the rows that have any"
REFUSED: list[tuple[Task, dict[str, Any], str, str]] = [
    # task, the row, its cause, and what stands after `a.jsonl:1: `
    ("sft", {"messages": CHAT, "prompt": "other"}, "prompts differ",
     "prompt: is not what messages begin with ('q'), must agree; fix it or drop the prompt column"),
    ("preference", {"prompt": "q", "chosen": CHAT, "rejected": WRONG, "messages": WRONG}, "prompts differ",
     "messages: is not what the pair says, must be the prompt and its chosen answer; fix it or drop the messages "
     "column"),
    ("sft", {"instruction": "q", "context": "of", "response": "yes"}, "missing field",
     "output: missing, rows of this file need instruction, output (this one has context, instruction, response); add "
     "or map it"),
    ("sft", {"prompt": "q", "completion": [tell("yes")]}, "wrong type",
     f"completion: a list but the prompt is text, {BOTH}"),
    ("sft", OLD | {"output": ""}, "empty", "output: empty, must hold text; fill it in or drop the row"),
    ("sft", OLD | {"output": "yes", "input": 3}, "wrong type",
     "input: a number (3), must be text; write it as a string"),
    ("sft", OLD | {"output": "yes", "history": [["a"]]}, "wrong type",
     "history: [['a']], must be a list of [question, answer]; write it so"),
    ("sft", OLD | {"output": "yes", "history": [["a", ""]]}, "empty",
     "history[0][1]: empty, must hold text; fill it in or drop the row"),
    ("sft", {"conversations": TALK, "tools": '[{"name": "buy"}]'}, "tools", TOOLS),
    ("sft", {"conversations": [TALK[0], say("function_call", "{}")]}, "unknown role",
     "conversations[1].from: unknown role ('function_call'), tool calls are not read; drop the row"),
    ("sft", {"conversations": [TALK[0], say("chatgpt", "yes")]}, "unknown role",
     "conversations[1].from: unknown role ('chatgpt'); did you mean gpt?"),
    ("sft", {"conversations": [TALK[0], {"from": "gpt"}]}, "missing field",
     "conversations[1].value: missing, a message is {from, value}; add it"),
    ("sft", {"conversations": [*TALK, TALK[0]]}, "order of turns",
     "conversations: ends with user, must end with assistant (what is learnt is an answer); drop the last turn"),
    ("sft", {"conversations": TALK[1:], "system": "s"}, "order of turns",
     f"conversations[0].from: assistant where user was due, {TURNS}"),
    ("prompt", {"conversations": TALK}, "order of turns",
     "conversations: ends with assistant, must end with user (a prompt waits for its answer); drop the last turn"),
    ("sft", {"messages": [user([{"type": "image", "url": "u"}]), tell("yes")]}, "wrong type",
     "messages[0].content[0]: 'image', only parts of type text are read; drop the row"),
    ("sft", {"messages": [user([{"type": "text", "text": 3}]), tell("yes")]}, "wrong type",
     "messages[0].content[0]: a number (3), must be text; write it as a string"),
    ("sft", {"messages": [user([]), tell("yes")]}, "empty",
     "messages[0].content: empty, must hold text; fill it in or drop the row"),
    ("sft", {"messages": [user("q", loss_weight=1.0), tell("yes")]}, "bad value",
     f"messages[0].loss_weight: 1.0 on a turn of user, {WEIGHTS}"),
    ("sft", {"messages": [user("q"), tell("yes", loss_weight=0.5)]}, "bad value",
     f"messages[1].loss_weight: 0.5 on a turn of assistant, {WEIGHTS}"),
    ("preference", PAIR | {"margin": "2"}, "wrong type",
     "margin: text ('2'), must be a finite number; fix it or leave it out"),
    ("preference", {"prompt": [user("q")], "chosen": [tell("yes")], "rejected": "no"}, "wrong type",
     f"rejected: text but the prompt is messages, {BOTH}"),
    ("preference", {"chosen": CHAT, "rejected": "no"}, "wrong type",
     "rejected: text ('no'), must be a list of {role, content}; write it so"),
    ("preference", {"chosen_messages": CHAT, "rejected_messages": CHAT}, "equal sides",
     "chosen: equals rejected, a pair must differ; drop the row or fix the log"),
    ("preference", {"chosen": GIVEN, "rejected": hh("Human: q", "Assistant:")}, "empty",
     "rejected: turn 2 of 2 (assistant) is empty; drop the row"),
    ("preference", {"chosen": GIVEN, "rejected": f"Note{GIVEN}"}, "order of turns",
     "rejected: begins with 'Note', must begin with a blank line and Human:; fix or drop the row"),
    ("preference", {"chosen": GIVEN, "rejected": hh("Human: q", "Human: r", "Assistant: no")}, "order of turns",
     f"rejected[1].role: user where assistant was due, {TURNS}"),
    ("preference", {"chosen": GIVEN, "rejected": hh("Human: q", "Assistant: no", "Human: r")}, "order of turns",
     "rejected: ends with user, must end with assistant (what is learnt is an answer); drop the last turn"),
    ("preference", {"chosen": GIVEN + GIVEN, "rejected": hh("Human: q", "Assistant: no")}, "prompts differ",
     f"chosen: conversations part at turn 2 of 4 and 2, {LAST}"),
    ("unpaired", {"instruction": "q", "output": "yes", "label": "good"}, "wrong type",
     "label: text ('good'), must be true or false; map what was good to true"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "record", "cause", "problem"), REFUSED, ids=[row[-1][:40] for row in REFUSED])
def test_a_row_is_refused_in_one_line(task: Task, record: Any, cause: str, problem: str, tmp_path: Path) -> None:
    assert list(scan(write(tmp_path, record), task)) == [Reject(AT, cause, problem, record)]


def test_the_question_has_the_address_of_its_row(tmp_path: Path) -> None:
    both = {"prompt": "q", "completion": "yes", "messages": CHAT}
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, {"text": "q"}, both, both), "sft")
    assert str(caught.value).startswith("a.jsonl:2: completion, messages, prompt: can be read as ")
