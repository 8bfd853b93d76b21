"""Columns of numbers and names on disk, as the processes hand them to the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def quoted(path: Path) -> str:
    """Return a path as SQL writes a text."""
    return "'" + str(path).replace("'", "''") + "'"


def every(folder: Path, pattern: str) -> str:
    """Return the files of a folder that match a pattern, as SQL reads them; the folder's own name is no pattern."""
    plain = "".join(f"[{one}]" if one in "[*?" else one for one in str(folder))
    return quoted(Path(plain) / pattern)


def write_rows(rows: Sequence[tuple[Any, ...]], path: Path, schema: Mapping[str, str]) -> None:
    """Write rows as Parquet; `schema` maps each column, in order, to the name of its Arrow type."""
    write_columns(list(zip(*rows, strict=True)) if rows else [()] * len(schema), path, schema)


def write_columns(columns: Sequence[Sequence[Any]], path: Path, schema: Mapping[str, str]) -> None:
    """Write the same, given in columns."""
    import pyarrow
    from pyarrow.parquet import write_table

    kinds = [getattr(pyarrow, kind)() for kind in schema.values()]
    arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, kinds, strict=True)]
    write_table(pyarrow.table(arrays, names=list(schema)), path, compression="none", use_dictionary=False)
