"""Lines of canonical events, read in pieces of files: a process reads one piece, whatever the file's size.

A piece is a range of bytes; a line belongs to the piece in which it begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from align_pipeline.data.feedback.logs import Lines
from align_pipeline.data.json_text import MAX_ROW_BYTES, MIB, Strict
from align_pipeline.data.sources import Bad

PIECE = 8 * 2**20
"""Bytes that one process reads at a time."""


@dataclass(frozen=True)
class Piece:
    """A range of bytes of a file of canonical lines."""

    number: int
    file: int
    path: Path
    begin: int
    end: int


def pieces(files: Sequence[Lines], size: int = PIECE) -> Iterator[Piece]:
    """Yield the pieces of all files, numbered in order."""
    number = 0
    for file, lines in enumerate(files):
        length = lines.path.stat().st_size
        for begin in range(0, length, size):
            yield Piece(number, file, lines.path, begin, min(begin + size, length))
            number += 1


UNKNOWN = -1
"""How many colons may end a key, where nobody counted them."""


def lines_of(piece: Piece) -> Iterator[tuple[int, bytes | Bad, int]]:
    """Yield the lines that begin in a piece, without their line feeds: where each begins, what it holds, and how many
    of its colons may stand after a key."""
    with piece.path.open("rb") as file:
        # A line that begins exactly where the piece does is the piece's: the byte before it says whether one does.
        at = max(0, piece.begin - 1)
        file.seek(at)
        data = file.read(piece.end - at)
        begin = data.find(b"\n") + 1 if piece.begin else 0
        if piece.begin and not begin:
            return
        for end, colons in _ends(data):
            if end >= begin:
                yield at + begin, data[begin:end], colons
                begin = end + 1
        if begin < len(data):
            yield at + begin, _rest(data[begin:], file), UNKNOWN


def _ends(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each line ends that has a line feed, with the number of its colons that a quote or a blank precedes.

    Every colon after a key is among them.
    """
    import numpy as np

    codes = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    colons = np.flatnonzero(codes == ord(":"))
    before = codes[colons - 1]
    colons = colons[(before == ord('"')) | (before == ord(" ")) | (before == ord("\t")) | (before == ord("\r"))]
    counts = np.diff(np.searchsorted(colons, ends), prepend=0)
    yield from zip(ends.tolist(), counts.tolist(), strict=True)


def _rest(begun: bytes, file: BinaryIO) -> bytes | Bad:
    """Return a line that goes on after what was read."""
    whole = begun + file.readline(max(0, MAX_ROW_BYTES + 1 - len(begun)))
    if len(whole) <= MAX_ROW_BYTES or whole.endswith(b"\n"):
        return whole.removesuffix(b"\n")
    return Bad(f"a line of more than {MIB}, an event must be smaller; split it or drop it", "too_long")


_decode = msgspec.json.Decoder().decode


def parse(raw: bytes | Bad, strict: Strict, colons: int = UNKNOWN) -> Any:
    """Return the value that a line holds; raise Bad where it holds none.

    `colons` is a bound on its colons after keys: an object with so many different keys has no key twice, which a
    faster reader than the strict one does not see. Of all else the two think alike, or the faster one refuses.
    """
    if isinstance(raw, Bad):
        raise raw
    if colons != UNKNOWN:
        try:
            value = _decode(raw)
        except (ValueError, RecursionError):
            pass  # the strict one says why
        else:
            if type(value) is dict and _keys(value) == colons:
                return value
    try:
        value = strict.line(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        raise Bad(f"not UTF-8 ({what}), logs are read as UTF-8; save the file as UTF-8", "encoding") from error
    if isinstance(value, Bad):
        raise value
    return value


def _keys(record: dict[str, Any]) -> int:
    """Return how many keys an object has, with those of the objects in it and in its lists."""
    count = len(record)
    for value in record.values():
        if type(value) is list:
            for one in value:
                if type(one) is dict:
                    count += _keys(one)
        elif type(value) is dict:
            count += _keys(value)
    return count


def origin(raw: bytes | Bad) -> str:
    """Return the address that an event of a spool carries."""
    try:
        origin = json.loads(raw)["origin"] if isinstance(raw, bytes) else {}
        return f"{origin['file']}:{origin['line']}"
    except (ValueError, LookupError, TypeError):
        return ""
