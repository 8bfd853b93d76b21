"""Read files of rows and check every one of them; all bad rows of a file are reported together, each with its address.

A file holds one format, which its first row decides:

task        fields of a row (optional ones in brackets)
sft         messages | prompt, completion, [finish] | prompt_ids, completion_ids | text, [finish]
preference  prompt, chosen, rejected, [margin] | chosen, rejected, [margin] |
            prompt_ids, chosen_ids, rejected_ids, [margin]
unpaired    prompt, completion, label | messages, label | prompt_ids, completion_ids, label
prompt      prompt | messages | prompt_ids; every other column is kept as `extra`
text        text, [finish]

`messages` are `{role, content}` objects; prompts and answers are strings or such lists. A preference row without
`prompt` has two whole conversations, and what they share is the prompt. Columns in METADATA are ignored; any other is
an error, unless `columns` names the wanted ones. An address holds the line of the source file (of Parquet, datasets on
disk and hub datasets: the number of the row, from 1).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from align_pipeline.data.rows import (
    ROLES,
    Chat,
    Content,
    Example,
    ExampleIds,
    Ids,
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
)
from align_pipeline.data.sources import Bad, Record, Source, dataset_rows, open_source, parse_cells
from align_pipeline.pipeline.errors import DataError, InputError, did_you_mean

# fmt: off
METADATA = frozenset({
    "id", "_id", "idx", "index", "uuid", "row_id", "prompt_id", "conversation_id", "message_id", "source",
    "dataset", "origin", "url", "subset", "split", "category", "task", "topic", "tags", "lang", "language",
    "license", "created_at", "updated_at", "timestamp", "date", "model", "chosen_model", "rejected_model",
    "score_chosen", "score_rejected", "metadata", "meta", "note",
})
# fmt: on
"""Columns that describe a row and change nothing: ignored in every task but `prompt`, which keeps them as `extra`."""


RowT = TypeVar("RowT", bound=Row)


def read(path: Path, task: Task, name: str | None = None, *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read and check all rows of a file, or of a folder made by `Dataset.save_to_disk` or holding `rows.jsonl`.

    `name` stands for the file in addresses (its own name by default); `columns` maps our field names to the file's.
    .txt is one document (task `text`) or one prompt (task `prompt`) per line that is not blank.
    Raises InputError for a path that cannot be read and DataError, holding every bad row, for its content.
    """
    path = Path(path)
    name = name or path.name
    try:
        if path.is_dir() and (path / "rows.jsonl").is_file():
            path = path / "rows.jsonl"
        source = open_source(path, name, task)
        return _check(source, task, name, columns, cells=path.suffix.lower() in (".csv", ".tsv"))
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{name}: {reason}; give the path of a file of rows ({path})") from error


def read_hub(
    repo: str, revision: str | None, task: Task, *, split: str = "train", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Read and check one split of a dataset on the hub, or of a folder that `load_dataset` understands."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(repo, revision=revision, split=split)
    except (OSError, ValueError) as error:
        at = f"@{revision}" if revision else ""
        raise InputError(f"hub:{repo}{at}: split {split} cannot be loaded ({error}); check name and network") from error
    return _check(dataset_rows(dataset), task, repo, columns)


def split(rows: Sequence[RowT], fraction: float) -> tuple[list[RowT], list[RowT]]:
    """Return (training rows, held-out rows); the hash of a row's prompt decides, so equal prompts stay together.

    A row's side depends on no other row: adding rows moves none. The one exception keeps both sides usable: with two
    or more distinct prompts and a fraction above 0, a side that would be empty gets the prompt nearest to its border.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction}, must be at least 0 and below 1")
    places = [_place(row) for row in rows]
    border = fraction
    distinct = sorted(set(places))
    if fraction > 0 and len(distinct) > 1:
        border = min(max(border, math.nextafter(distinct[0], 1)), distinct[-1])
    train = [row for row, place in zip(rows, places, strict=True) if place >= border]
    return train, [row for row, place in zip(rows, places, strict=True) if place < border]


def _place(row: Row) -> float:
    """Return a number in [0, 1) that depends on the prompt's content only."""
    key = prompt_key(row)
    turns = [(part.role, part.content) if isinstance(part, Message) else part for part in key]
    content = json.dumps(key if isinstance(key, str) else turns)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class _Format:
    required: tuple[str, ...]
    build: Callable[[str, Record], Row]
    optional: tuple[str, ...] = ()


def _check(
    source: Source, task: Task, name: str, columns: Mapping[str, str] | None, *, cells: bool = False
) -> list[Row]:
    """Build every row, or raise one DataError that holds the address of every bad one."""
    formats = _FORMATS[task]
    known = {key for each in formats for key in (*each.required, *each.optional)}
    for key in columns or ():
        if key not in known:
            raise InputError(
                f"columns.{key}: unknown field for {task}{did_you_mean(key, known)}; known: {_list(known)}"
            )
    rows: list[Row] = []
    problems: list[str] = []
    chosen: _Format | None = None
    for number, record in source:
        where = f"{name}:{number}"
        try:
            if isinstance(record, Bad):
                raise record
            if not isinstance(record, dict):
                raise Bad(f"{_kind(record)} ({_show(record)}), a row must be an object of fields; fix or drop it")
            if chosen is None:
                found = _recognise(record, formats, task, known, columns)
                if isinstance(found, str):
                    raise DataError([*problems, f"{where}: {found}"])
                chosen = found
            rest: Record = {}
            if columns:
                named = {**_own_names(record, {*chosen.required, *chosen.optional}, columns), **columns}
                taken = set(named.values())
                rest = {key: value for key, value in record.items() if key not in taken}
                record = {ours: record[theirs] for ours, theirs in named.items() if theirs in record}
            elif task == "prompt" and (key := chosen.required[0]) in record:
                rest = {other: value for other, value in record.items() if other != key}
                record = {key: record[key]}
            if cells:
                record = parse_cells(record)
            _check_fields(record, chosen, known)
            if task == "prompt" and rest:
                record["extra"] = rest
            rows.append(chosen.build(where, record))
        except Bad as bad:
            problems.append(f"{where}: {bad}")
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{name}: no rows, at least one is needed; check how the file was written"])
    return rows


def _own_names(record: Record, known: set[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the fields that carry our names already, so that only the others need to be mapped."""
    return {key: key for key in record if key in known and key not in columns and key not in columns.values()}


def _recognise(
    record: Record, formats: tuple[_Format, ...], task: Task, known: set[str], columns: Mapping[str, str] | None
) -> _Format | str:
    """Return the format of the first row: the one it has all fields of, or else the nearest; or what is wrong."""
    for ours, theirs in (columns or {}).items():
        if theirs not in record:
            near = did_you_mean(theirs, record)
            return f"columns.{ours}: no column {theirs} in the file{near}; it has {_list(record)}"
    names = {*columns, *_own_names(record, known, columns)} if columns else set(record)
    for each in formats:
        if names.issuperset(each.required):
            return each

    def score(each: _Format) -> int:
        return sum(2 if key in names else len(get_close_matches(key, names, 1, 0.8)) for key in each.required)

    best = max(formats, key=score)
    if score(best):
        return best
    wanted = " or ".join("{" + ", ".join(each.required) + "}" for each in formats)
    example = f"columns: {{{formats[0].required[0]}: NAME}}"
    return (
        f"{_list(names) or 'no fields'}: no format of task {task}, which reads {wanted}; rename or map them ({example})"
    )


def _check_fields(record: Record, format: _Format, known: set[str]) -> None:
    """Refuse fields that are missing or unknown; a null field counts as absent."""
    required = format.required
    missing = next((key for key in required if record.get(key) is None), None)
    if missing is None and len(record) == len(required):
        return
    for key, value in record.items():
        if key in required or key in format.optional or key in METADATA or value is None:
            continue
        if key in known:
            rule = f"the first row set this file's format to {', '.join(required)}"
            raise Bad(f"{key}: belongs to another format, {rule}; use one format per file, or map with columns")
        near = did_you_mean(key, known)
        if near or missing is None:
            raise Bad(f"{key}: unknown field{near or '; remove it, or name the wanted ones with columns'}")
    if missing is not None:
        state = "null" if missing in record else "missing"
        needs = f"rows of this file need {', '.join(required)} (this one has {_list(record) or 'nothing'})"
        raise Bad(f"{missing}: {state}, {needs}; add or map it")


def _build_chat(where: str, record: Record) -> Chat:
    return Chat(where, _conversation(record["messages"], "messages", ends="assistant"))


def _build_text(where: str, record: Record) -> Text:
    return Text(where, _text(record["text"], "text"), _finish(record))


def _build_example(where: str, record: Record) -> Example:
    prompt = _prompt(record["prompt"], "prompt")
    return Example(where, prompt, _answer(record["completion"], "completion", prompt), _finish(record))


def _build_example_ids(where: str, record: Record) -> ExampleIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids", empty=True)
    return ExampleIds(where, prompt, _ids(record["completion_ids"], "completion_ids"))


def _build_preference(where: str, record: Record) -> Preference:
    if _whole_conversation(record["chosen"]) and _whole_conversation(record["rejected"]):
        row = _build_implicit(where, record)
        _same_prompt(record["prompt"], row.prompt)
        return row
    prompt = _prompt(record["prompt"], "prompt")
    chosen = _answer(record["chosen"], "chosen", prompt)
    rejected = _answer(record["rejected"], "rejected", prompt)
    _differ(chosen, rejected, "chosen")
    return Preference(where, prompt, chosen, rejected, _margin(record))


def _build_implicit(where: str, record: Record) -> Preference:
    """Take the turns that both conversations begin with as the prompt."""
    if isinstance(record["chosen"], str) and isinstance(record["rejected"], str):
        raise Bad("prompt: missing, two plain strings do not say where the prompt ends; add a prompt field")
    chosen = _conversation(record["chosen"], "chosen", ends="assistant")
    rejected = _conversation(record["rejected"], "rejected", ends="assistant")
    _differ(chosen, rejected, "chosen")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or len(chosen) != shared + 1 or len(rejected) != shared + 1:
        what = f"conversations part at turn {shared + 1} of {len(chosen)} and {len(rejected)}"
        raise Bad(f"chosen: {what}, a pair may differ in its last answer only; cut both after the first that differs")
    return Preference(where, chosen[:shared], chosen[shared:], rejected[shared:], _margin(record))


def _build_preference_ids(where: str, record: Record) -> PreferenceIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids")
    chosen, rejected = _ids(record["chosen_ids"], "chosen_ids"), _ids(record["rejected_ids"], "rejected_ids")
    _differ(chosen, rejected, "chosen_ids")
    return PreferenceIds(where, prompt, chosen, rejected, _margin(record))


def _build_unpaired(where: str, record: Record) -> Unpaired:
    prompt = _prompt(record["prompt"], "prompt")
    return Unpaired(where, prompt, _answer(record["completion"], "completion", prompt), _label(record))


def _build_unpaired_chat(where: str, record: Record) -> Unpaired:
    """Take the last turn as the answer that was judged."""
    messages = _conversation(record["messages"], "messages", ends="assistant")
    return Unpaired(where, messages[:-1], messages[-1:], _label(record))


def _build_unpaired_ids(where: str, record: Record) -> UnpairedIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids")
    return UnpairedIds(where, prompt, _ids(record["completion_ids"], "completion_ids"), _label(record))


def _build_prompt(where: str, record: Record) -> Prompt:
    return Prompt(where, _prompt(record["prompt"], "prompt"), record.get("extra", {}))


def _build_prompt_chat(where: str, record: Record) -> Prompt:
    return Prompt(where, _conversation(record["messages"], "messages", ends="user"), record.get("extra", {}))


def _build_prompt_ids(where: str, record: Record) -> PromptIds:
    return PromptIds(where, _ids(record["prompt_ids"], "prompt_ids"), record.get("extra", {}))


_FORMATS: dict[Task, tuple[_Format, ...]] = {
    "sft": (
        _Format(("prompt", "completion"), _build_example, ("finish",)),
        _Format(("messages",), _build_chat),
        _Format(("prompt_ids", "completion_ids"), _build_example_ids),
        _Format(("text",), _build_text, ("finish",)),
    ),
    "preference": (
        _Format(("prompt", "chosen", "rejected"), _build_preference, ("margin",)),
        _Format(("chosen", "rejected"), _build_implicit, ("margin",)),
        _Format(("prompt_ids", "chosen_ids", "rejected_ids"), _build_preference_ids, ("margin",)),
    ),
    "unpaired": (
        _Format(("prompt", "completion", "label"), _build_unpaired),
        _Format(("messages", "label"), _build_unpaired_chat),
        _Format(("prompt_ids", "completion_ids", "label"), _build_unpaired_ids),
    ),
    "prompt": (
        _Format(("prompt_ids",), _build_prompt_ids),
        _Format(("prompt",), _build_prompt),
        _Format(("messages",), _build_prompt_chat),
    ),
    "text": (_Format(("text",), _build_text, ("finish",)),),
}


# Fields.


def _text(value: Any, key: str) -> str:
    if type(value) is not str:
        raise Bad(f"{key}: {_kind(value)} ({_show(value)}), must be text; write it as a string")
    if not value or value.isspace():
        raise Bad(f"{key}: {'blank' if value else 'empty'}, must hold text; fill it in or drop the row")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise Bad(f"{key}: half a character ({half} at {error.start}), must be Unicode; fix the export") from error
    return value


def _prompt(value: Any, key: str) -> Content:
    return _conversation(value, key, ends="user") if type(value) is list else _text(value, key)


def _answer(value: Any, key: str, prompt: Content) -> Content:
    """Check an answer: text to a text, and to a conversation its one next turn."""
    if isinstance(prompt, str):
        if type(value) is list:
            raise Bad(f"{key}: a list but the prompt is text, both must be text or both messages; make them alike")
        return _text(value, key)
    if type(value) is str:
        raise Bad(f"{key}: text but the prompt is messages, both must be text or both messages; make them alike")
    messages = _messages(value, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        turns = ", ".join(message.role for message in messages)
        raise Bad(f"{key}: has the turns {turns}, must be one assistant turn; move earlier turns into the prompt")
    return messages


def _conversation(value: Any, key: str, *, ends: str) -> tuple[Message, ...]:
    """Check the order of turns: an optional system turn, then user and assistant in turn, `ends` last."""
    messages = _messages(value, key)
    start = messages[0].role == "system"
    for index, message in enumerate(messages):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if message.role != expected and not (index == 0 and start):
            rule = "after an optional first system turn, user and assistant take turns"
            raise Bad(
                f"{key}[{index}].role: {message.role} where {expected} was due, {rule}; reorder or join the turns"
            )
    if messages[-1].role != ends:
        rule = "what is learnt is an answer" if ends == "assistant" else "a prompt waits for its answer"
        remedy = "drop the last turn" if len(messages) > 1 else f"add the {ends} turn"
        raise Bad(f"{key}: ends with {messages[-1].role}, must end with {ends} ({rule}); {remedy}")
    return messages


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if type(value) is not list:
        raise Bad(f"{key}: {_kind(value)} ({_show(value)}), must be a list of {{role, content}}; write it so")
    if not value:
        raise Bad(f"{key}: empty, must hold at least one message; fill it in or drop the row")
    messages = []
    for index, message in enumerate(value):
        if type(message) is not dict:
            at = f"{key}[{index}]: {_kind(message)} ({_show(message)})"
            raise Bad(f"{at}, a message must be an object {{role, content}}; write it so")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or content is None or len(message) > 2:
            _explain_message(message, f"{key}[{index}]")
        if type(content) is not str or not content or not content.isascii() or content.isspace():
            _text(content, f"{key}[{index}].content")
        messages.append(Message(role, content))  # type: ignore[arg-type]
    return tuple(messages)


def _explain_message(message: Mapping[str, Any], at: str) -> None:
    for field, value in message.items():
        if field not in ("role", "content") and value is not None:
            near = did_you_mean(field, ("role", "content"))
            raise Bad(f"{at}.{field}: unknown field, only role and content are read{near or '; remove it'}")
    for field in ("role", "content"):
        if message.get(field) is None:
            raise Bad(f"{at}.{field}: missing, a message is {{role, content}}; add it")
    if message["role"] not in ROLES:
        role = message["role"]
        near = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        near = near or (_ROLE_ALIASES.get(role, "") if isinstance(role, str) else "")
        raise Bad(f"{at}.role: unknown role ({_show(role)}){near or ', must be one of ' + ', '.join(ROLES)}")


_ROLE_ALIASES = {"human": "; did you mean user?", "prompter": "; did you mean user?"} | dict.fromkeys(
    ("gpt", "bot", "model", "ai"), "; did you mean assistant?"
)


def _same_prompt(given: Any, shared: Content) -> None:
    """Hold a prompt column against the turns that two whole conversations share; it may repeat the last user turn."""
    turns = [{"role": part.role, "content": part.content} for part in shared if isinstance(part, Message)]
    if given != turns and given != turns[-1]["content"]:
        raise Bad(f"prompt: is not what chosen and rejected begin with ({_show(turns[-1]['content'])}), must agree; "
                   "fix it or drop the prompt column")  # fmt: skip


def _whole_conversation(value: Any) -> bool:
    return type(value) is list and bool(value) and type(value[0]) is dict and value[0].get("role") != "assistant"


def _ids(value: Any, key: str, *, empty: bool = False) -> Ids:
    if type(value) is not list:
        raise Bad(f"{key}: {_kind(value)} ({_show(value)}), must be a list of token ids; write it so")
    if not value and not empty:
        raise Bad(f"{key}: empty, must hold at least one token id; drop the row")
    if value and (set(map(type, value)) != {int} or min(value) < 0):
        index = next(i for i, item in enumerate(value) if type(item) is not int or item < 0)
        what = f"{key}[{index}]: {_kind(value[index])} ({_show(value[index])})"
        raise Bad(f"{what}, a token id is a whole number of at least 0; fix or drop the row")
    return tuple(value)


def _label(record: Record) -> bool:
    value = record["label"]
    if type(value) not in (bool, int) or value not in (0, 1):
        raise Bad(f"label: {_kind(value)} ({_show(value)}), must be true or false; map what was good to true")
    return bool(value)


def _margin(record: Record) -> float | None:
    value = record.get("margin")
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Bad(f"margin: {_kind(value)} ({_show(value)}), must be a finite number; fix it or leave it out")
    return float(value)


def _finish(record: Record) -> str | None:
    value = record.get("finish")
    if value not in (None, "stop", "length"):
        raise Bad(f"finish: {_show(value)}, must be stop (the answer ended) or length (it was cut off); fix or drop it")
    return value


def _differ(chosen: object, rejected: object, key: str) -> None:
    if chosen == rejected:
        other = key.replace("chosen", "rejected")
        raise Bad(f"{key}: equals {other}, a pair must differ; drop the row or fix the log")


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _show(value: Any) -> str:
    """Return the value on one short line."""
    line = repr(value)
    return line if len(line) <= 40 else line[:37] + "..."


def _list(names: Any) -> str:
    """Return the names, sorted, at most eight of them."""
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:8]) + (", ..." if len(ordered) > 8 else "")
