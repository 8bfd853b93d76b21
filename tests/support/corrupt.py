"""A seeded corpus of real rows of which known lines are damaged: what a check of rows must name, no more and no less.

`make(folder, seed)` writes one file for each base below and each kind of file that can hold it, with every kind of
damage that the file can express, and says which line has which. A damage after which a file cannot be read on stands
last in a file of its own. What is odd but right is there too: a byte order mark, blank lines, CRLF, U+2028, rows that
take several lines, metadata, null for an optional field.

base           task        rows from real data
examples       sft         prompt and completion: GSM8K
chats          sft         messages: GSM8K
pairs          preference  prompt, chosen and rejected as text: LLaMA-Factory's DPO demo and Tulu 3
conversations  preference  chosen and rejected as whole conversations: the same
thumbs         unpaired    messages and label: LLaMA-Factory's KTO demo
ids            sft         prompt_ids and completion_ids: the bytes of GSM8K
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[3] / "shared" / "data"

Record = dict[str, Any]

JSON = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst")
TABLE = (".csv", ".tsv", ".csv.gz")
ARROW = (".parquet", "")
"""An empty suffix is a folder made by `Dataset.save_to_disk`."""
ALL = (*JSON, *TABLE, *ARROW)

TASKS = {
    "examples": "sft",
    "chats": "sft",
    "pairs": "preference",
    "conversations": "preference",
    "thumbs": "unpaired",
    "ids": "sft",
}
FIELDS = {
    "examples": ("prompt", "completion"),
    "chats": ("messages",),
    "pairs": ("prompt", "chosen", "rejected"),
    "conversations": ("chosen", "rejected"),
    "thumbs": ("messages", "label"),
    "ids": ("prompt_ids", "completion_ids"),
}
TALK = ("chats", "conversations", "thumbs")
PLAIN = ("examples", "pairs")


# Real rows.


@functools.cache
def real_rows(base: str) -> tuple[Record, ...]:
    """Return the rows of a base, each once."""
    rows = {json.dumps(row, sort_keys=True): row for row in _REAL[base]()}
    return tuple(rows.values())


def _examples() -> list[Record]:
    return [{"prompt": row["question"], "completion": row["answer"]} for row in _gsm8k()]


def _chats() -> list[Record]:
    return [{"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]} for row in _gsm8k()]


def _ids() -> list[Record]:
    rows = [row for row in _gsm8k() if len(row["question"]) + len(row["answer"]) < 400]
    return [{"prompt_ids": [*row["question"].encode()], "completion_ids": [*row["answer"].encode()]} for row in rows]


def _pairs() -> list[Record]:
    single = [row for row in _conversations() if len(row["chosen"]) == 2]
    return [
        {
            "prompt": row["chosen"][0]["content"],
            "chosen": row["chosen"][1]["content"],
            "rejected": row["rejected"][1]["content"],
        }
        for row in single
    ]


def _conversations() -> list[Record]:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    rows = []
    for row in json.loads((SHARED / "pref" / "lf_dpo_en_demo.json").read_text("utf-8")):
        turns = [turn(roles[part["from"]], part["value"]) for part in row["conversations"]]
        rows.append({side: [*turns, turn("assistant", row[side]["value"])] for side in ("chosen", "rejected")})
    for line in (SHARED / "pref" / "tulu3_preference_sample_100.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        rows.append(
            {side: [turn(part["role"], part["content"]) for part in row[side]] for side in ("chosen", "rejected")}
        )
    return rows


def _thumbs() -> list[Record]:
    rows = json.loads((SHARED / "pref" / "lf_kto_en_demo.json").read_text("utf-8"))
    return [
        {"messages": [turn(part["role"], part["content"]) for part in row["messages"]], "label": row["label"]}
        for row in rows
    ]


@functools.cache
def _gsm8k() -> list[Record]:
    lines = (SHARED / "sft" / "gsm8k_train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:2000]]


def turn(role: str, content: str) -> Record:
    return {"role": role, "content": content}


_REAL: dict[str, Callable[[], list[Record]]] = {
    "examples": _examples,
    "chats": _chats,
    "pairs": _pairs,
    "conversations": _conversations,
    "thumbs": _thumbs,
    "ids": _ids,
}


# Damage.


@dataclass(frozen=True)
class Raw:
    """The bytes that stand in the file instead of a JSON row."""

    text: bytes


@dataclass(frozen=True)
class RawCells:
    """What stands in a table instead of a row: short cells, one for each column, changed and then not quoted."""

    change: Callable[[list[bytes]], list[bytes]]


@dataclass(frozen=True)
class Damage:
    """One way to spoil a row, the cause that a check must name, and where it can happen."""

    kind: str
    cause: str
    bases: tuple[str, ...]
    suffixes: tuple[str, ...]
    spoil: Callable[[Record, str, random.Random], Any]
    ends: tuple[str, ...] = ()
    """Kinds of files that need not be read beyond this damage."""


def _put(key: str, value: Any) -> Callable[[Record, str, random.Random], Record]:
    return lambda record, base, draw: {**record, key: value}


def _answer(value: Any) -> Callable[[Record, str, random.Random], Record]:
    """Replace the answer, of a pair one of the two."""

    def spoil(record: Record, base: str, draw: random.Random) -> Record:
        key = "completion" if base == "examples" else draw.choice(("chosen", "rejected"))
        return {**record, key: value}

    return spoil


def _turns(change: Callable[[list[Record]], Any]) -> Callable[[Record, str, random.Random], Record]:
    """Change a conversation, of a pair one of the two."""

    def spoil(record: Record, base: str, draw: random.Random) -> Record:
        key = "messages" if "messages" in record else draw.choice(("chosen", "rejected"))
        return {**record, key: change([dict(message) for message in record[key]])}

    return spoil


def _first_user(messages: list[Record]) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] == "user")


def _say(index: int | None, **changes: Any) -> Callable[[list[Record]], list[Record]]:
    """Change one message; an index of None is the first that a user says, a value of None drops the field."""

    def change(messages: list[Record]) -> list[Record]:
        at = _first_user(messages) if index is None else index
        message = {**messages[at], **changes}
        messages[at] = {key: value for key, value in message.items() if value is not None}
        return messages

    return change


def _insert(after_first_user: Record) -> Callable[[list[Record]], list[Record]]:
    def change(messages: list[Record]) -> list[Record]:
        at = _first_user(messages) + 1
        return [*messages[:at], dict(after_first_user), *messages[at:]]

    return change


def _without_user(messages: list[Record]) -> list[Record]:
    del messages[_first_user(messages)]
    return messages


def _missing(record: Record, base: str, draw: random.Random) -> Record:
    drop = draw.choice(FIELDS[base])
    return {key: value for key, value in record.items() if key != drop}


MISSPELT = {
    "examples": ("completion", "completoin"),
    "chats": ("messages", "mesages"),
    "pairs": ("rejected", "rejcted"),
    "conversations": ("chosen", "choosen"),
    "thumbs": ("messages", "mesages"),
    "ids": ("completion_ids", "completion_id"),
}


def _misspelt(record: Record, base: str, draw: random.Random) -> Record:
    right, wrong = MISSPELT[base]
    return {wrong if key == right else key: value for key, value in record.items()}


def _other_format(record: Record, base: str, draw: random.Random) -> Record:
    if base in ("pairs", "conversations"):
        return {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
    if base == "thumbs":
        return {"prompt": "2 + 2 =", "completion": "4", "label": record["label"]}
    return {"text": "A document without a question."}


def _equal_sides(record: Record, base: str, draw: random.Random) -> Record:
    return {**record, "rejected": record["chosen"]}


def _other_prompt(record: Record, base: str, draw: random.Random) -> Record:
    rejected = [dict(message) for message in record["rejected"]]
    rejected[_first_user(rejected)]["content"] += " Please answer in one word."
    return {**record, "rejected": rejected}


def _ids_with(item: Any) -> Callable[[Record, str, random.Random], Record]:
    def spoil(record: Record, base: str, draw: random.Random) -> Record:
        key = draw.choice(FIELDS["ids"])
        ids = list(record[key])
        ids[draw.randrange(len(ids))] = item
        return {**record, key: ids}

    return spoil


def _encoded(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def _raw(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Record, str, random.Random], Raw]:
    return lambda record, base, draw: Raw(change(_encoded(record), draw))


def _value(literal: bytes) -> Callable[[Record, str, random.Random], Raw]:
    """Write a literal where a text or a list was."""
    return lambda record, base, draw: Raw(_encoded({**record, FIELDS[base][-1]: "\x00"}).replace(b'"\\u0000"', literal))


def _cut(text: bytes, draw: random.Random) -> bytes:
    """End in the middle of a row, at the latest before its last two characters and never inside of one."""
    return text[: draw.randrange(20, len(text) - 2)].decode(errors="ignore").encode()


def _not_utf8(text: bytes, draw: random.Random) -> bytes:
    """Put a Latin-1 byte into the last string."""
    at = text.rindex(b'"')
    return text[:at] + b" caf\xe9" + text[at:]


def _half_character(text: bytes, draw: random.Random) -> bytes:
    """Put the first half of a surrogate pair into the last string."""
    at = text.rindex(b'"')
    return text[:at] + b" \\ud83d" + text[at:]


def _twice(text: bytes, draw: random.Random) -> bytes:
    """Repeat the first key."""
    return b'{"' + text.split(b'"', 2)[1] + b'": null, ' + text[1:]


def _row(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Record, str, random.Random], RawCells]:
    return lambda record, base, draw: RawCells(change)


NOT_READ_ON = (".json", *TABLE)

DAMAGES: tuple[Damage, ...] = (
    # Conversations.
    Damage("role typo", "unknown role", TALK, ALL, _turns(_say(-1, role="asistant"))),
    Damage("role human", "unknown role", TALK, ALL, _turns(_say(None, role="human"))),
    Damage("role in capitals", "unknown role", TALK, ALL, _turns(_say(-1, role="ASSISTANT"))),
    Damage("message without role", "missing field", TALK, ALL, _turns(_say(-1, role=None))),
    Damage("message without content", "missing field", TALK, ALL, _turns(_say(-1, content=None))),
    Damage("empty content", "empty", TALK, ALL, _turns(_say(-1, content=""))),
    Damage("blank content", "empty", TALK, ALL, _turns(_say(None, content=" \n\t"))),
    Damage("content is a number", "wrong type", TALK, (*JSON, *TABLE), _turns(_say(-1, content=72))),
    Damage("content is a list", "wrong type", TALK, (*JSON, *TABLE), _turns(_say(-1, content=["72"]))),
    Damage("content is an object", "wrong type", TALK, (*JSON, *TABLE), _turns(_say(-1, content={"answer": "72"}))),
    Damage("role is a number", "unknown role", TALK, (*JSON, *TABLE), _turns(_say(-1, role=1))),
    Damage("message is text", "wrong type", TALK, (*JSON, *TABLE), _turns(lambda turns: ["2 + 2?", turns[-1]])),
    Damage("conversation is text", "wrong type", TALK, (*JSON, *TABLE), _turns(lambda turns: "User: 2 + 2?")),
    Damage("conversation is an object", "wrong type", TALK, (*JSON, *TABLE), _turns(lambda turns: turns[-1])),
    Damage(
        "unknown field in a message", "unknown field", TALK, (*JSON, *TABLE), _turns(_say(-1, commentary="from a form"))
    ),
    Damage(
        "misspelt field in a message",
        "unknown field",
        TALK,
        (*JSON, *TABLE),
        _turns(lambda turns: [*turns[:-1], {"role": "assistant", "contnet": "72"}]),
    ),
    Damage("no messages", "empty", TALK, ALL, _turns(lambda turns: [])),
    Damage("two user turns", "order of turns", TALK, ALL, _turns(_insert(turn("user", "And quickly, please.")))),
    Damage(
        "two assistant turns",
        "order of turns",
        TALK,
        ALL,
        _turns(lambda turns: [*turns, turn("assistant", "And that is that.")]),
    ),
    Damage("ends with the user", "order of turns", TALK, ALL, _turns(lambda turns: [*turns, turn("user", "Thanks!")])),
    Damage("begins with the assistant", "order of turns", TALK, ALL, _turns(_without_user)),
    Damage("system turn in the middle", "order of turns", TALK, ALL, _turns(_insert(turn("system", "Be brief.")))),
    Damage("only a system turn", "order of turns", TALK, ALL, _turns(lambda turns: [turn("system", "Be brief.")])),
    # Prompts and answers that are text.
    Damage("empty answer", "empty", PLAIN, (*JSON, *ARROW), _answer("")),
    Damage("empty answer", "missing field", PLAIN, TABLE, _answer("")),
    Damage("blank answer", "empty", PLAIN, ALL, _answer("  \t ")),
    Damage("null answer", "missing field", PLAIN, ALL, _answer(None)),
    Damage("answer is a number", "wrong type", PLAIN, JSON, _answer(72)),
    Damage("answer is a boolean", "wrong type", PLAIN, JSON, _answer(True)),
    Damage("answer is a list", "wrong type", PLAIN, JSON, _answer(["72"])),
    Damage("answer is an object", "wrong type", PLAIN, JSON, _answer({"content": "72"})),
    Damage("prompt is a number", "wrong type", PLAIN, JSON, _put("prompt", 2)),
    Damage("blank prompt", "empty", PLAIN, ALL, _put("prompt", "\n")),
    Damage("finish unknown", "bad value", ("examples",), ALL, _put("finish", "done")),
    Damage("finish is a number", "bad value", ("examples",), JSON, _put("finish", 1)),
    # Pairs.
    Damage("equal sides", "equal sides", ("pairs", "conversations"), ALL, _equal_sides),
    Damage("sides ask different things", "prompts differ", ("conversations",), ALL, _other_prompt),
    Damage("margin is text", "wrong type", ("pairs", "conversations"), (*JSON, *TABLE), _put("margin", "high")),
    Damage("margin is a list", "wrong type", ("pairs", "conversations"), (*JSON, *TABLE), _put("margin", [1])),
    Damage("margin is not a number", "not a number", ("pairs", "conversations"), JSON, _put("margin", float("nan"))),
    Damage("margin is not a number", "bad value", ("pairs", "conversations"), ARROW, _put("margin", float("nan"))),
    Damage("margin is infinite", "not a number", ("pairs", "conversations"), JSON, _put("margin", float("-inf"))),
    Damage("margin is infinite", "bad value", ("pairs", "conversations"), ARROW, _put("margin", float("inf"))),
    Damage(
        "margin is beyond any number",
        "not a number",
        ("pairs", "conversations"),
        JSON,
        lambda record, base, draw: Raw(_encoded({**record, "margin": 7}).removesuffix(b"7}") + b"1e999}"),
    ),
    # Labels.
    Damage("label is text", "wrong type", ("thumbs",), JSON, _put("label", "true")),
    Damage("label is text", "wrong type", ("thumbs",), TABLE, _put("label", "yes")),
    Damage("label is a list", "wrong type", ("thumbs",), (*JSON, *TABLE), _put("label", [True])),
    Damage("label is 2", "bad value", ("thumbs",), ALL, _put("label", 2)),
    Damage("label is -1", "bad value", ("thumbs",), ALL, _put("label", -1)),
    Damage("label is null", "missing field", ("thumbs",), ALL, _put("label", None)),
    # Token ids.
    Damage("negative token id", "bad value", ("ids",), ALL, _ids_with(-100)),
    Damage("token id is a fraction", "wrong type", ("ids",), (*JSON, *TABLE), _ids_with(3.0)),
    Damage("token id is text", "wrong type", ("ids",), (*JSON, *TABLE), _ids_with("3")),
    Damage("token id is a boolean", "wrong type", ("ids",), (*JSON, *TABLE), _ids_with(True)),
    Damage("token id is null", "wrong type", ("ids",), ALL, _ids_with(None)),
    Damage("no token ids", "empty", ("ids",), ALL, _put("completion_ids", [])),
    Damage("token ids are text", "wrong type", ("ids",), (*JSON, *TABLE), _put("completion_ids", "3 4 5")),
    # Fields.
    Damage("missing field", "missing field", tuple(FIELDS), ALL, _missing),
    Damage("misspelt field", "unknown field", tuple(FIELDS), ALL, _misspelt),
    Damage("unknown field", "unknown field", tuple(FIELDS), ALL, _put("commentary", "from a form")),
    Damage("another format", "another format", tuple(FIELDS), ALL, _other_format),
    # What is no row.
    Damage("a list", "not an object", tuple(FIELDS), JSON, lambda record, base, draw: [record]),
    Damage("a text", "not an object", tuple(FIELDS), JSON, lambda record, base, draw: json.dumps(record)),
    Damage("a number", "not an object", tuple(FIELDS), JSON, lambda record, base, draw: 72),
    Damage("null", "not an object", tuple(FIELDS), JSON, lambda record, base, draw: None),
    # What is no JSON.
    Damage("cut line", "broken JSON", ("examples", "chats"), JSON, _raw(_cut), NOT_READ_ON),
    Damage("trailing comma", "broken JSON", PLAIN, JSON, _raw(lambda text, draw: text[:-1] + b",}"), NOT_READ_ON),
    Damage(
        "single quotes",
        "broken JSON",
        ("examples", "thumbs"),
        JSON,
        lambda record, base, draw: Raw(repr({**record, "note": "it"}).encode()),
        NOT_READ_ON,
    ),
    Damage("a comment", "broken JSON", ("examples",), JSON, lambda record, base, draw: Raw(b"// more"), NOT_READ_ON),
    Damage(
        "two rows in a line",
        "broken JSON",
        ("examples", "pairs"),
        (".jsonl", ".jsonl.gz", ".jsonl.zst"),
        _raw(lambda text, draw: text + text),
    ),
    Damage("NUL bytes", "broken JSON", ("examples",), JSON, _raw(lambda text, draw: b"\x00" * len(text)), NOT_READ_ON),
    Damage(
        "a raw control character",
        "broken JSON",
        ("examples",),
        JSON,
        _raw(lambda text, draw: text[:20] + b"\x00" + text[20:]),
        NOT_READ_ON,
    ),
    Damage("not UTF-8", "encoding", ("examples", "chats"), JSON, _raw(_not_utf8)),
    Damage("not UTF-8", "encoding", PLAIN, ARROW, _answer(b"caf\xe9")),
    Damage("half a character", "encoding", ("examples", "pairs", "chats"), JSON, _raw(_half_character)),
    Damage("duplicate key", "duplicate key", tuple(FIELDS), JSON, _raw(_twice)),
    Damage(
        "duplicate key in a message",
        "duplicate key",
        ("chats",),
        JSON,
        _raw(lambda text, draw: text.replace(b'"role": "user"', b'"role": "user", "role": "user"', 1)),
    ),
    Damage("NaN for an answer", "not a number", PLAIN, JSON, _value(b"NaN")),
    Damage("Infinity for an answer", "not a number", PLAIN, JSON, _value(b"-Infinity")),
    Damage(
        "NaN in metadata",
        "not a number",
        ("examples",),
        JSON,
        lambda record, base, draw: {**record, "score_chosen": float("nan")},
    ),
    Damage("5,000 digits", "broken JSON", ("examples",), JSON, _value(b"7" * 5000), NOT_READ_ON),
    Damage("100,000 lists deep", "broken JSON", PLAIN, JSON, _value(b"[" * 100_000 + b"]" * 100_000), NOT_READ_ON),
    Damage(
        "100,000 objects deep",
        "broken JSON",
        ("examples",),
        JSON,
        _value(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        NOT_READ_ON,
    ),
    # What is no table.
    Damage("too many cells", "broken table", tuple(FIELDS), TABLE, _row(lambda cells: [*cells, b"one more"])),
    Damage("too few cells", "broken table", tuple(FIELDS), TABLE, _row(lambda cells: cells[:-1])),
    Damage("one cell", "broken table", PLAIN, TABLE, _row(lambda cells: cells[:1])),
    Damage(
        "unclosed quote", "broken table", PLAIN, TABLE, _row(lambda cells: [*cells[:-1], b'"' + cells[-1]]), NOT_READ_ON
    ),
    Damage(
        "text after a quote",
        "broken table",
        PLAIN,
        TABLE,
        _row(lambda cells: [b'"one" two', *cells[1:]]),
        NOT_READ_ON,
    ),
    Damage("not UTF-8", "encoding", PLAIN, TABLE, _row(lambda cells: [*cells[:-1], b"caf\xe9"])),
    Damage("a NUL byte", "broken table", PLAIN, TABLE, _row(lambda cells: [b"\x00", *cells[1:]])),
)
"""The same kind may have another cause in another kind of file: an empty cell of a table is no value."""


# Files.


@dataclass(frozen=True)
class Finding:
    """What a check must name: the line of the source file (of Arrow files the number of the row), and why."""

    line: int
    cause: str
    kind: str


@dataclass(frozen=True)
class Corrupt:
    """A file, what it is read for, how many of its rows are right (a repeated one too), and all that is not."""

    path: Path
    task: str
    base: str
    rows: int
    findings: tuple[Finding, ...]
    """`duplicate` is the cause of a right row that repeats an earlier one; every other is a row that is not right."""
    ends: bool = False
    """Whether the file need not be read as a whole, so that right rows may be absent."""


def make(folder: Path, seed: int, rows: int = 200, suffixes: Sequence[str] = ALL) -> list[Corrupt]:
    """Write the corpus of a seed, `rows` right rows a file (half as many with token ids), and say what is in it."""
    made = []
    for base in FIELDS:
        for suffix in suffixes:
            if base == "conversations" and suffix in TABLE:
                continue  # a table has no cells for two conversations
            here = [damage for damage in DAMAGES if base in damage.bases and suffix in damage.suffixes]
            draw = random.Random(f"{seed} {base}")  # the same rows in every kind of file
            name = f"{base}-{seed}"
            inside = [damage for damage in here if suffix not in damage.ends]
            elements = _elements(base, inside, draw, rows // 2 if base == "ids" else rows, repeated=True)
            made.append(_write_file(folder, name, base, suffix, elements, random.Random(f"{seed} {name}")))
            for damage in here:
                if suffix not in damage.ends:
                    continue
                draw = random.Random(f"{seed} {base} {damage.kind}")
                name = f"{base}-{seed}-{damage.kind.replace(' ', '-')}"
                elements = _elements(base, [], draw, 20, repeated=False)
                pool = real_rows(base)
                elements.append((damage.spoil(dict(draw.choice(pool)), base, draw), damage))
                made.append(_write_file(folder, name, base, suffix, elements, draw, ends=True))
    return made


def whole(folder: Path, base: str, suffix: str, seed: int, rows: int = 200) -> Corrupt:
    """Write a file of right rows only."""
    draw = random.Random(f"{seed} {base} whole")
    elements = _elements(base, [], draw, rows, repeated=False)
    return _write_file(folder, f"{base}-{seed}-whole", base, suffix, elements, draw)


REPEATED = Damage("repeated row", "duplicate", tuple(FIELDS), ALL, lambda record, base, draw: record)

Element = tuple[Any, Damage | None]
"""What stands in a file, and what is wrong with it."""


def _elements(base: str, damages: Sequence[Damage], draw: random.Random, rows: int, *, repeated: bool) -> list[Element]:
    """Return right rows with each damage once among them, and one or two of the right rows a second time."""
    pool = draw.sample(real_rows(base), min(rows + len(damages), len(real_rows(base))))
    clean: list[Element] = [(_dressed(record, base, draw), None) for record in pool[len(damages) :]]
    spoilt: list[Element] = [
        (damage.spoil(dict(record), base, draw), damage) for damage, record in zip(damages, pool, strict=False)
    ]
    draw.shuffle(spoilt)
    elements = list(clean)
    for index, element in enumerate(spoilt):
        # One is the first row of the file, which would settle a format by itself; one is the last.
        at = 0 if index == 0 else len(elements) if index == 1 else draw.randrange(1, len(elements))
        elements.insert(at, element)
    for _ in range(2 * repeated):
        at = draw.randrange(len(elements) // 2)
        at = next(index for index in range(at, len(elements)) if elements[index][1] is None)
        record = elements[at][0]
        again = dict(reversed(record.items()))  # the order of fields says nothing
        elements.insert(draw.randrange(at + 1, len(elements)), (again, REPEATED))
    return elements


def _dressed(record: Record, base: str, draw: random.Random) -> Record:
    """Return a right row, now and then with what is odd but right."""
    record = dict(record)
    if draw.random() < 0.1:
        record["id"] = draw.randrange(10**6)
    if base == "examples" and draw.random() < 0.2:
        record["finish"] = draw.choice(("stop", "length", None))
    if base in ("pairs", "conversations") and draw.random() < 0.3:
        record["margin"] = draw.choice((2, -0.5, 0, None))
    if base == "thumbs" and draw.random() < 0.3:
        record["label"] = int(record["label"])
    if base in PLAIN and draw.random() < 0.1:
        record["prompt"] += draw.choice((" \U0001f600", "\u2028next", "\x85", " \u00e9e\u0301", "\ufeff", " \x7f", '"'))
    return record


COLUMNS = {
    "examples": ("prompt", "completion", "finish", "id", "completoin", "commentary", "text"),
    "chats": ("messages", "id", "mesages", "commentary", "text"),
    "pairs": (
        *("prompt", "chosen", "rejected", "margin", "id", "rejcted", "commentary"),
        *("prompt_ids", "chosen_ids", "rejected_ids"),
    ),
    "conversations": (
        *("chosen", "rejected", "margin", "id", "choosen", "commentary"),
        *("prompt_ids", "chosen_ids", "rejected_ids"),
    ),
    "thumbs": ("messages", "label", "id", "mesages", "commentary", "prompt", "completion"),
    "ids": ("prompt_ids", "completion_ids", "id", "completion_id", "commentary", "text"),
}
"""The columns of tables and Arrow files: those of the format and those that one spoilt row or another brings."""


def _write_file(
    folder: Path,
    name: str,
    base: str,
    suffix: str,
    elements: Sequence[Element],
    draw: random.Random,
    *,
    ends: bool = False,
    columns: Sequence[str] = (),
) -> Corrupt:
    path = folder / f"{name}{suffix or '-folder'}"
    records = [record for record, _ in elements]
    if suffix in ARROW:
        lines = write_arrow(path, base, records)
    elif suffix in TABLE:
        lines = write_table(path, columns or COLUMNS[base], records, draw)
    elif suffix == ".json":
        lines = write_array(path, records, draw)
    else:
        lines = write_lines(path, records, draw)
    findings = [
        Finding(line, damage.cause, damage.kind)
        for line, (_, damage) in zip(lines, elements, strict=True)
        if damage is not None
    ]
    right = sum(damage in (None, REPEATED) for _, damage in elements)
    return Corrupt(path, TASKS[base], base, right, tuple(findings), ends)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, compressed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, 1, mtime=0)
    elif path.suffix == ".zst":
        import pyarrow

        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)


def write_lines(path: Path, records: Sequence[Any], draw: random.Random) -> list[int]:
    """Write JSON Lines with a byte order mark, blank lines, CRLF or no end of the last line, and return the lines."""
    end = draw.choice((b"\n", b"\r\n"))
    out, lines, line = [draw.choice((b"", BYTE_ORDER_MARK))], [], 1
    for record in records:
        if draw.random() < 0.05:
            out.append(draw.choice((b"", b"  ", b"\t")) + end)
            line += 1
        text = record.text if isinstance(record, Raw) else _dumped(record, draw)
        out.append(text + end)
        lines.append(line)
        line += 1
    content = b"".join(out)
    write_bytes(path, content.removesuffix(end) if draw.random() < 0.5 else content)
    return lines


def write_array(path: Path, records: Sequence[Any], draw: random.Random) -> list[int]:
    """Write a JSON array whose rows take several lines, one, or less than one, and return where each begins."""
    out, lines, line = [draw.choice((b"[\n", b"[", b"\n\n[\n "))], [], 1
    line += out[0].count(b"\n")
    for index, record in enumerate(records):
        text = record.text if isinstance(record, Raw) else _dumped(record, draw, draw.choice((None, 1, 2, "\t")))
        if isinstance(record, Raw) and index:
            out.append(b"\n")
            line += 1
        out.append(text)
        lines.append(line)
        between = (
            b"\n" if index == len(records) - 1 else draw.choice((b",\n", b",\n  ", b", ", b"\n,\n", b" ,\r\n\r\n"))
        )
        out.append(between)
        line += text.count(b"\n") + between.count(b"\n")
    write_bytes(path, draw.choice((b"", BYTE_ORDER_MARK)) + b"".join([*out, b"]\n"]))
    return lines


def _dumped(record: Any, draw: random.Random, indent: int | str | None = None) -> bytes:
    text = json.dumps(record, ensure_ascii=draw.random() < 0.5, indent=indent)
    return text.encode(errors="surrogatepass")


def write_table(path: Path, names: Sequence[str], records: Sequence[Any], draw: random.Random) -> list[int]:
    """Write a table with cells of several lines and blank lines between rows, and return where each row begins."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    end = draw.choice(("\n", "\r\n"))
    columns = list(names)
    draw.shuffle(columns)
    out, lines = [_cells(columns, delimiter, end)], []
    line = 2
    for record in records:
        if draw.random() < 0.05:
            out.append(end.encode())
            line += 1
        if isinstance(record, RawCells):
            cells = record.change([b"cell %d" % index for index in range(len(columns))])
            text = delimiter.encode().join(cells) + end.encode()
        else:
            text = _cells([_cell(record.get(column)) for column in columns], delimiter, end)
        out.append(text)
        lines.append(line)
        line += text.count(b"\n")
    write_bytes(path, draw.choice((b"", BYTE_ORDER_MARK)) + b"".join(out))
    return lines


def _cells(cells: Sequence[str], delimiter: str, end: str) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, delimiter=delimiter, lineterminator=end).writerow(cells)
    return line.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_arrow(path: Path, base: str, records: Sequence[Record]) -> list[int]:
    """Write a Parquet file of small row groups, or for a name without suffix a dataset on disk; return row numbers."""
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for column in COLUMNS[base]:
        values = [_typed(record.get(column), column) for record in records]
        kind = _arrow_type(column, base)
        if kind == pyarrow.string():  # by way of bytes, which need not be UTF-8
            encoded = [value.encode() if isinstance(value, str) else value for value in values]
            columns[column] = pyarrow.array(encoded, pyarrow.binary()).view(kind)
        else:
            columns[column] = pyarrow.array(values, kind)
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=64)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(str(path))
    return list(range(1, len(records) + 1))


def _typed(value: Any, column: str) -> Any:
    return int(value) if column == "label" and value is not None else value


def _arrow_type(column: str, base: str) -> Any:
    import pyarrow

    if column == "margin":
        return pyarrow.float64()
    if column in ("id", "label"):
        return pyarrow.int64()
    if column.startswith(("prompt_id", "completion_id", "chosen_id", "rejected_id")):
        return pyarrow.list_(pyarrow.int64())
    if column in ("messages", "mesages") or (base == "conversations" and column in ("chosen", "choosen", "rejected")):
        return pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    return pyarrow.string()


# One damage at a time.


def single(folder: Path, damage: Damage, base: str, suffix: str, marker: str, seed: int = 0) -> Corrupt:
    """Write 20 right rows and one that is spoilt, after the tenth (or last, where a file cannot be read on).

    The spoilt row says `marker` in all its texts before it is spoilt.
    """
    draw = random.Random(f"{seed} {base} {damage.kind}")
    *clean, record = draw.sample(real_rows(base), 21)
    elements: list[Element] = [(row, None) for row in clean]
    at = 20 if suffix in damage.ends else 10
    elements.insert(at, (damage.spoil(marked(record, marker), base, draw), damage))
    name = f"{base}-{damage.kind.replace(' ', '-')}"
    return _write_file(
        folder, name, base, suffix, elements, _Plain(seed), ends=suffix in damage.ends, columns=FIELDS[base]
    )


class _Plain(random.Random):
    """Chooses what is least odd."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def shuffle(self, x: Any) -> None:
        """Leave the order as it is."""

    def random(self) -> float:
        return 0.9


def marked(value: Any, marker: str) -> Any:
    """Return a row with the marker at the end of each of its texts but roles."""
    if isinstance(value, str):
        return f"{value} {marker}"
    if isinstance(value, list):
        return [marked(item, marker) for item in value]
    if isinstance(value, dict):
        return {key: item if key == "role" else marked(item, marker) for key, item in value.items()}
    return value


# Anything at all.

ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\n", "\x00", "\x1f", "\x7f", "\x85", "\u2028", "\ufeff"),
    *("\ud83d", "\udc00x", "\U0001f600", "e\u0301", "user", "assistant", "system", "true", "NaN", "null", "[]", "{}"),
    *("\n\nHuman: 2 + 2?\n\nAssistant: 4", "\n\nHuman:", "\n\nAssistant:", "[" * 2000, "[" * 2000 + "]" * 2000),
    *("{{", "%s", "<|im_end|>", "a" * 5000, "=1+1", "\ufffe", "'", '"'),
)
NAMES = (
    *(
        "role",
        "content",
        "from",
        "value",
        "type",
        "text",
        "weight",
        "name",
        "tool_calls",
        "image",
        "",
        "\x00",
        "\ud800",
    ),
    *("prompt", "completion", "chosen", "rejected", "messages", "label", "margin", "finish", "conversations", "system"),
    *(
        "instruction",
        "input",
        "output",
        "history",
        "tools",
        "prompt_ids",
        "completion_ids",
        "chosen_ids",
        "id",
        "extra",
    ),
    *("rejected_ids", "chosen_messages", "rejected_messages", "where", "self", "loss_weight"),
)


def anything(draw: random.Random, depth: int = 4) -> Any:
    """Return a random JSON value, often one that has broken a reader before."""
    kind = draw.random()
    if depth == 0 or kind < 0.45:
        return draw.choice(ODD)
    if kind < 0.5:
        return "".join(
            chr(draw.choice((draw.randrange(128), draw.randrange(0x110000)))) for _ in range(draw.randrange(9))
        )
    if kind < 0.55:
        return draw.choice((draw.randrange(-300, 300), draw.uniform(-3, 3), draw.getrandbits(200)))
    if kind < 0.75:
        return [anything(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind < 0.9:
        message = {
            draw.choice(("role", "role", "from")): draw.choice(("user", "assistant", "system", "gpt", "human", "tool")),
            draw.choice(("content", "content", "value")): anything(draw, depth - 1),
        }
        return draw.choice((message, [message], [message, message]))
    return {draw.choice(NAMES): anything(draw, depth - 1) for _ in range(draw.randrange(4))}


def any_bytes(draw: random.Random) -> bytes:
    """Return random bytes, often some that look like the beginning of rows."""
    kind = draw.random()
    if kind < 0.2:
        return draw.randbytes(draw.randrange(300))
    if kind < 0.4:
        letters = "[]{},:\"\\ \n\r\t'0eE-+.nulltrfase" + string.ascii_letters
        return "".join(draw.choice(letters) for _ in range(draw.randrange(300))).encode()
    start = draw.choice(
        (
            *(
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"\xfe\xff",
                b"\x1f\x8b\x08",
                b"\x1f\x8b",
                b"\x28\xb5\x2f\xfd",
                b"PAR1",
                b"PK",
            ),
            *(b"[", b"[{", b'{"text": ', b'{"prompt": "a", "completion": "', b"prompt,completion\n", b'"', b"\x00" * 9),
            *(b"ARROW1\x00\x00", b"BZh9", b"\xfd7zXZ\x00", b"prompt\tcompletion\n", b"[\n\n", b'{"a":' * 9, b"", b"\n"),
        )
    )
    return start + any_bytes(draw)[: draw.randrange(1, 200)]
