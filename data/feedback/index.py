"""Read events in pieces of files and keep what decides about them: names, times and places, no texts.

A piece is a range of bytes; a line belongs to the piece in which it begins. Each event leaves one row of the index or
several (a comparison of three answers says two things), with the place of its line, where the texts are found again.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback.adapter import cause, whole
from align_pipeline.data.feedback.events import BOTH_BAD, TIE, Dropped, Event, Reading, read_event
from align_pipeline.data.feedback.keys import key_of, name_key, prompt_key, user_hash
from align_pipeline.data.feedback.logs import Lines
from align_pipeline.data.feedback.tables import write_rows
from align_pipeline.data.gate import Reject
from align_pipeline.data.json_text import MAX_ROW_BYTES, MIB, Strict
from align_pipeline.data.sources import Bad

PIECE = 8 * 2**20
"""Bytes that one process reads at a time."""

SAYS = {"VOTE": 0, "BETTER": 1, "EDIT": 2, "DEMONSTRATION": 3, "REGENERATE": 4, "TIED": 5}
VOTE, BETTER, EDIT, DEMONSTRATION, REGENERATE, TIED = SAYS.values()
"""What a row of the index says: a vote on answer 1, that answer 1 beats answer 2 (and how that is known), a tie."""
RETRACTED = 2
"""The label of a vote that was taken back."""


@dataclass(frozen=True)
class Piece:
    """A range of bytes of a file of canonical lines."""

    number: int
    file: int
    path: Path
    begin: int
    end: int


@dataclass
class Found:
    """What one piece held."""

    piece: Piece
    read: int = 0
    """Events, whatever became of them."""
    lines: int = 0
    """Line feeds, so that the lines of the next piece can be counted."""
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    """Line in the piece, from 1, and what is wrong there."""
    dropped: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    """naive_ts, reasoning_stripped."""
    cut_at_end: bool = False
    """The last line of the file is broken and has no line feed: somebody was still writing."""


def pieces(files: Sequence[Lines], size: int = PIECE) -> Iterator[Piece]:
    """Yield the pieces of all files, numbered in order."""
    number = 0
    for file, lines in enumerate(files):
        length = lines.path.stat().st_size
        for begin in range(0, length, size):
            yield Piece(number, file, lines.path, begin, min(begin + size, length))
            number += 1


def read_piece(piece: Piece, folder: Path, reading: Reading, marker: Marker, spooled: bool) -> Found:
    """Read the events of a piece and write its part of the index."""
    found = Found(piece)
    rows: list[tuple[Any, ...]] = []
    strict = Strict()
    for offset, raw in _lines(piece):
        found.lines += 1
        if isinstance(raw, bytes) and (not raw or raw.isspace()):
            continue
        found.read += 1
        try:
            record = parse(raw, strict)
            if type(record) is dict and spooled:
                record.pop("origin", None)
            event = read_event(record, reading)
            if event.unfinished and event.praises:
                raise Dropped("error_or_unfinished")
            size = len(raw) if isinstance(raw, bytes) else 0
            place = (piece.number << 32 | found.read, piece.file, offset, size, found.lines)
            rows += marker.rows(event, place)
        except Dropped as dropped:
            found.dropped[dropped.reason] += 1
            continue
        except Bad as bad:
            where = origin(raw) if spooled else ""
            shown = raw[:200].decode(errors="replace") if isinstance(raw, bytes) else None
            found.rejects.append((found.lines, Reject(where, cause(bad), whole(bad.problem), shown)))
            at_end = isinstance(raw, bytes) and offset + len(raw) == piece.path.stat().st_size
            found.cut_at_end = at_end and cause(bad) == "bad_json"
            continue
        if event.naive:
            found.noticed["naive_ts"] += 1
        if event.stripped:
            found.noticed["reasoning_stripped"] += 1
    write_rows(rows, folder / f"{piece.number:06}.parquet", INDEX)
    return found


def parse(raw: bytes | Bad, strict: Strict) -> Any:
    """Return the value that a line holds; raise Bad where it holds none."""
    if isinstance(raw, Bad):
        raise raw
    try:
        value = strict.line(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        raise Bad(f"not UTF-8 ({what}), logs are read as UTF-8; save the file as UTF-8", "encoding") from error
    if isinstance(value, Bad):
        raise value
    return value


def origin(raw: bytes | Bad) -> str:
    """Return the address that an event of a spool carries."""
    try:
        origin = json.loads(raw)["origin"] if isinstance(raw, bytes) else {}
        return f"{origin['file']}:{origin['line']}"
    except (ValueError, LookupError, TypeError):
        return ""


def _lines(piece: Piece) -> Iterator[tuple[int, bytes | Bad]]:
    """Yield the lines that begin in a piece, without their line feeds, and where each begins."""
    with piece.path.open("rb") as file:
        at = piece.begin
        if at:
            # A line that begins exactly here is this piece's: the byte before it says whether one does.
            file.seek(at - 1)
            at += _skip_line(file) - 1
        while at < piece.end:
            raw = file.readline(MAX_ROW_BYTES + 1)
            if not raw:
                return
            length = len(raw)
            if length > MAX_ROW_BYTES and not raw.endswith(b"\n"):
                length += _skip_line(file)
                yield at, Bad(f"a line of more than {MIB}, an event must be smaller; split it or drop it", "too_long")
            else:
                yield at, raw.removesuffix(b"\n")
            at += length


def _skip_line(file: Any) -> int:
    """Read on to the end of a line; return the number of bytes."""
    length = 0
    while part := file.readline(2**20):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


# Rows of the index.


@dataclass(frozen=True)
class Marker:
    """Makes rows of the index of an event."""

    secret: bytes
    forgotten: frozenset[str]
    """Hashes of users whose events are left out."""
    ignore_system: bool = False
    admin_weight: int = 1
    source: str = ""
    """Apart from it, equal event ids are one event."""

    def rows(self, event: Event, place: tuple[int, int, int, int, int]) -> Iterator[tuple[Any, ...]]:
        """Yield what an event says, a row for each thing."""
        user, who = (None, None) if event.user is None else _hashed(event.user, self.secret)
        if user in self.forgotten:
            raise Dropped("tombstoned")
        prompt = prompt_key(event.prompt, ignore_system=self.ignore_system) if event.prompt else None
        names = [key_of(prompt, answer.text) for answer in event.answers]
        # Which of two events counts may hang on what they say, so the body holds no salted name.
        whole = prompt_key(event.prompt) if event.prompt and self.ignore_system else prompt
        body = key_of(
            event.type, whole, names, event.label, event.winner, event.at, event.user, event.response_id,
            [answer.model for answer in event.answers], event.actor, event.conversation, event.unfinished,
        )  # fmt: skip
        head = (
            *place,
            name_key(self.source, event.id) if event.id is not None else body,
            body,
            event.at,
            who,
            self.admin_weight if event.actor == "admin" else 1,
            None if event.conversation is None else name_key(self.source, event.conversation),
            None if event.response_id is None else name_key(self.source, event.response_id),
            prompt,
            sum(len(turn.content) for turn in event.prompt),
        )
        for part, (says, label, one, other) in enumerate(_statements(event)):
            first = event.answers[one] if event.answers else None
            second = event.answers[other] if other is not None else None
            yield (
                *head, part, says, label,
                names[one] if first else None, one, first.model if first else None, len(first.text) if first else 0,
                names[other] if second and other is not None else None, other, second.model if second else None,
                len(second.text) if second else 0,
                first.position < second.position
                if first and second and first.position is not None and second.position is not None else None,
                similarity(first.text, second.text) if says == EDIT and first and second else None,
            )  # fmt: skip


@functools.lru_cache(100_000)
def _hashed(user: str, secret: bytes) -> tuple[str, int]:
    """Return the name that stands for a user, also as the number that the index holds."""
    name = user_hash(user, secret)
    return name, int.from_bytes(bytes.fromhex(name), "big", signed=True)


def _statements(event: Event) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield (what is said, label, place of answer 1, place of answer 2)."""
    if event.type == "rating":
        yield VOTE, event.label, 0, None
    elif event.type == "retract":
        yield VOTE, RETRACTED, 0, None
    elif event.type == "comparison" and event.winner == TIE:
        yield TIED, 0, 0, 1
    elif event.type == "comparison" and event.winner == BOTH_BAD:
        yield from ((VOTE, -1, place, None) for place in range(len(event.answers)))
    elif event.type == "comparison":
        yield from ((BETTER, 0, event.winner, other) for other in range(len(event.answers)) if other != event.winner)
    elif len(event.answers) == 1:  # a demonstration of which no earlier answer is known
        yield VOTE, 1, 0, None
    else:
        says = {"edit": EDIT, "demonstration": DEMONSTRATION, "regenerate": REGENERATE}[event.type]
        yield says, 0, 0, 1


def similarity(one: str, other: str) -> float:
    """Return how much of two texts is alike, from 0 to 1: 1 - insertions and deletions / characters (Indel ratio)."""
    from rapidfuzz.distance import Indel

    if max(len(one), len(other)) > 50_000:  # by words: the time grows with the product of the lengths
        return float(Indel.normalized_similarity(one.split(), other.split()))
    return float(Indel.normalized_similarity(one, other))


INDEX = {
    "event": "int64", "file": "int32", "start": "int64", "size": "int32", "line": "int32", "id": "int64",
    "body": "int64", "ts": "int64", "who": "int64", "weight": "int32", "conversation": "int64",
    "response_id": "int64", "prompt": "int64", "prompt_chars": "int32", "part": "int32", "says": "int32",
    "label": "int32", "one": "int64", "one_at": "int32", "one_model": "string", "one_chars": "int32", "two": "int64",
    "two_at": "int32", "two_model": "string", "two_chars": "int32", "left_won": "bool_", "similarity": "float64",
}  # fmt: skip
"""The columns of the index: where an event lies, who said it when, what it says and about which answers."""
