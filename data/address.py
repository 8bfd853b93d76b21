"""Where a record stands in its file, in one number: its line, and its place in an array of several on that line."""

from __future__ import annotations

_LINES = 2**32


def number_of(line: int, index: int | None = None) -> int:
    """Return the number of a line (of a table: of a row), and of the place in the array of a row that shares its line.

    Places count from 0, as everywhere in JSON.
    """
    return line if index is None else line + (index + 1) * _LINES


def shown(number: int) -> str:
    """Return what stands for a place in an address: `41`, or `1[17]`."""
    places, line = divmod(number, _LINES)
    return f"{line}[{places - 1}]" if places else str(line)


def read(where: str) -> int:
    """Return the number of the place that an address `file:41` or `file:1[17]` ends with."""
    line, bracket, index = where.rpartition(":")[2].partition("[")
    return number_of(int(line), int(index.removesuffix("]")) if bracket else None)
