"""How one product's log is read: the shape that every adapter has.

An adapter brings the records of its files into canonical events (`events.py`). What it cannot bring is a `Bad` with its
address; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

Rows: TypeAlias = Iterable[tuple[str, Any]]
"""The records of all files of one adapter with their addresses (`file:line`); it can be read again from the start."""
Events: TypeAlias = Iterator[tuple[str, Record | Bad]]
"""Canonical events with the address of the record that they come from, unchecked; or what is wrong with that record."""


SAYS_NOTHING = frozenset(("comment", "deleted", "diverged_context", "no_direction", "not_reviewed", "unranked"))
"""Causes of records that are in order and say nothing of which answer is good: left out and counted, not invalid."""


_CAUSES = {
    "broken JSON": "bad_json",
    "duplicate key": "bad_json",
    "not a number": "bad_json",
    "encoding": "bad_encoding",
    "too large": "too_long",
    "not an object": "not_object",
    "broken table": "bad_table",
    "broken file": "bad_file",
    "wrong type": "wrong_type",
    "empty": "missing_response",
}
"""The readers' words for what is wrong -> the counters' names."""


def cause(bad: Bad) -> str:
    """Return the name that a bad record is counted under."""
    return _CAUSES.get(bad.cause, bad.cause.replace(" ", "_"))


def whole(text: str) -> str:
    """Return a text that can be written and printed: half a character, in a field's name say, becomes `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Adapter:
    """How one product's log is read."""

    name: str
    recognise: Callable[[Record], bool]
    """Whether a record is of this product, by the fields that no other product has together."""
    keys: str
    """Those fields, for people."""
    convert: Callable[[Rows], Events]


def not_object(record: Any) -> Bad:
    """Return what is wrong with a record that is no object: what could not be read says so itself."""
    if isinstance(record, Bad):
        return record
    return Bad(f"{kind(record)} ({show(record)}), a record must be an object; fix or drop it", "not_object")


def each(events: Callable[[Record], Iterator[Record | Bad]]) -> Callable[[Rows], Events]:
    """Return the `convert` of an adapter that needs one record at a time."""

    def convert(rows: Rows) -> Events:
        for where, record in rows:
            if type(record) is not dict:
                yield where, not_object(record)
                continue
            try:
                yield from ((where, event) for event in events(record))
            except Bad as bad:
                yield where, bad

    return convert
