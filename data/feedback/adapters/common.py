"""What several adapters need: how a log names, nests and writes down what was said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from align_pipeline.data.feedback.adapter import Rows, not_object
from align_pipeline.data.feedback.scale import Scale, label
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

Turn = dict[str, Any]
"""A message as the event reader takes it: {role, content}."""


def objects(rows: Rows) -> Iterator[tuple[str, Record]]:
    """Yield the records that are objects, for the passes of a join that only look."""
    for where, record in rows:
        if type(record) is dict:
            yield where, record


def broken(rows: Rows) -> Iterator[tuple[str, Bad]]:
    """Yield what is wrong with the records that are no objects."""
    for where, record in rows:
        if type(record) is not dict:
            yield where, not_object(record)


def inner(record: Mapping[str, Any], key: str, *, at: str = "") -> Record:
    """Return the object in a field; raise Bad when there is something else."""
    value = record.get(key)
    if type(value) is dict:
        return value
    if value is None:
        raise Bad(f"{at}{key}: missing, must be an object; export it too, or drop the record", "missing_field")
    raise Bad(f"{at}{key}: {kind(value)} ({show(value)}), must be an object; fix the export", "wrong_type")


def first(record: Mapping[str, Any], *keys: str) -> Any:
    """Return the first of some fields that says something: products write one name or the other."""
    return next((value for key in keys if (value := record.get(key)) not in (None, "")), None)


def ident(value: Any) -> str | None:
    """Return what names a thing, as text; numbers do too."""
    if type(value) is int or (type(value) is float and value.is_integer() and abs(value) < 2**53):
        return str(int(value))
    return value if type(value) is str and value else None


def when(value: Any) -> Any:
    """Return a time as the event reader takes it: a table's own kind of time is written out."""
    if type(value) is dict:  # as MongoDB exports it
        value = value.get("$date", value)
        value = value.get("$numberLong", value) if type(value) is dict else value
    return value.isoformat() if hasattr(value, "isoformat") else value


def orphan(key: str, name: Any, what: str, remedy: str = "add the file that holds it, or drop the record") -> Bad:
    """Say that what an event points to is not in the files."""
    return Bad(f"{key}: {show(name)}, names {what} that is not in these files; {remedy}", "orphan_ref")


def rated(value: Any, key: str, scale: Scale | None = None) -> int:
    """Return 1, 0 or -1 for the rating in a field of a product whose scale is known."""
    try:
        return label(value, scale)
    except Bad as bad:
        what = f"{key}: {kind(value)} ({show(value)}), which this product does not rate with"
        raise Bad(f"{what}; fix or drop it", bad.cause) from None


def branch(last: str | None, parent: Callable[[str], str | None], key: str) -> list[str]:
    """Return the names from the first message to `last` along the parents; `parent` raises Bad for unknown names."""
    names: list[str] = []
    seen: set[str] = set()
    while last is not None:
        if last in seen:
            raise Bad(f"{key}: {show(last)}, is its own ancestor; fix the export", "orphan_ref")
        seen.add(last)
        names.append(last)
        last = parent(last)
    return names[::-1]


def system(text: Any) -> list[Turn]:
    """Return the system turn that a setting makes, or none."""
    return [{"role": "system", "content": text}] if type(text) is str and text.strip() else []


def parsed(value: Any) -> Any:
    """Return what a text holds that is written in JSON; other values, and texts that are not, as they are."""
    if type(value) is not str or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if type(found) in (dict, list) else value


def whole_number(name: Any) -> Any:
    """Return an id of a table; 1.0 is what pandas writes of a 1 in a column with gaps."""
    return name.removesuffix(".0") if type(name) is str and name.removesuffix(".0").isdecimal() else name


def compact(value: Any) -> str:
    """Return a value as JSON text without blanks."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise Bad(f"{kind(value)} that is nested too deeply, cannot be written as text; drop it", "too_long") from None


_SPEAKERS = {"human": "user", "ai": "assistant", "system": "system"}
"""What LangChain calls them in `type`."""


def turns(value: Any) -> list[Turn] | None:
    """Return the messages in a list of them; None when it is not one."""
    if type(value) is not list or not value:
        return None
    found = []
    for message in value:
        if type(message) is not dict or "content" not in message:
            return None
        role = first(message, "role") or _SPEAKERS.get(str(message.get("type")))
        if role is None:
            return None
        calls = {key: message[key] for key in ("tool_calls", "function_call") if message.get(key)}
        found.append({"role": role, "content": message["content"], **calls})
    return found


def preferred(best: Record, worst: Record) -> Record:
    """Return what a pair says whose answers stand in the order of the verdict, not in the one they were shown in."""
    return {"alternatives": [{**one, "position": None} for one in (best, worst)], "winner": 0}


def same(left: list[Turn], right: list[Turn]) -> bool:
    """Tell whether two histories say the same."""
    return [(one.get("role"), one.get("content")) for one in left] == [
        (one.get("role"), one.get("content")) for one in right
    ]


def diverged(key: str, other: str) -> Bad:
    """Say that two answers were given to two conversations."""
    what = f"{key}: goes another way than {other} before its last answer"
    return Bad(f"{what}, answers compare only where all before them is the same; drop the row", "diverged_context")
