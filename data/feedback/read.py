"""Read the events of a piece of a file into the index, and say what cannot be read."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback.adapter import cause, whole
from align_pipeline.data.feedback.events import DAY, Dropped, Reading, read_event
from align_pipeline.data.feedback.index import INDEX, Marker
from align_pipeline.data.feedback.lines import Piece, lines_of, origin, parse
from align_pipeline.data.feedback.plain import plain_row
from align_pipeline.data.feedback.tables import write_rows
from align_pipeline.data.gate import Reject
from align_pipeline.data.json_text import Strict
from align_pipeline.data.sources import Bad


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


def read_piece(piece: Piece, folder: Path, reading: Reading, marker: Marker, spooled: bool) -> Found:
    """Read the events of a piece and write its part of the index."""
    found = Found(piece)
    rows: list[tuple[Any, ...]] = []
    strict = Strict()
    latest = int(time.time() * 1e6) + DAY
    for offset, raw, colons in lines_of(piece):
        found.lines += 1
        if isinstance(raw, bytes) and (not raw or raw.isspace()):
            continue
        found.read += 1
        try:
            record = parse(raw, strict, colons)
            if type(record) is dict and spooled:
                record.pop("origin", None)
            size = len(raw) if isinstance(raw, bytes) else 0
            place = (piece.number << 32 | found.read, piece.file, offset, size, found.lines)
            plain = plain_row(record, reading, marker, place, latest)
            if plain is not None:
                rows.append(plain)
                continue
            event = read_event(record, reading)
            if event.unfinished and event.praises:
                raise Dropped("error_or_unfinished")
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
