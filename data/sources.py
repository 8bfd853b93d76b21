"""Where rows come from: every kind of file yields the line of each record and what stands there.

Files are read as streams: memory does not grow with them. Lines are those of the decompressed text. Where a row is
broken and the next one can be found, reading goes on there; where it cannot, the last item is the `Bad` that says so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from align_pipeline.data.json_text import KEPT, MIB, Strict, array_rows, not_utf8
from align_pipeline.data.json_text import MAX_ROW_BYTES as MAX_ROW_BYTES
from align_pipeline.data.json_text import Bad as Bad
from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import InputError

READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")

Record = dict[str, Any]
Source = Iterator[tuple[int, Any]]
"""Place (`address.py`) and what stands there: an object, or the `Bad` that says why it could not be read."""


def open_source(path: Path, name: str, task: Task, under: str | None = None) -> Source:
    """Return the records of a file or folder; nothing is read before the first one is asked for.

    `under` is the key of a JSON object that holds the rows.
    Raises InputError for what is no source of rows; OSError passes.
    """
    if path.is_dir() and under is None:
        return _folder(path, name)
    suffix = rows_suffix(path)
    if under is not None and suffix != ".json":
        raise InputError(f"{name}: columns name a list under {under}, only .json holds one; name the columns alone")
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, name)
    if suffix == ".json":
        return array_rows(_text_bytes(path, name), under)
    if suffix in (".csv", ".tsv"):
        return _table(path, name, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet" and path.suffix.lower() == ".parquet":
        return _parquet(path, name)
    if suffix == ".txt":
        if task not in ("text", "prompt"):
            raise InputError(f"{name}: .txt holds plain text, task {task} needs fields; use {', '.join(READABLE[:-1])}")
        return _text_lines(path, name, task)
    path.stat()  # a file that is missing is the better message
    if suffix == ".parquet":
        what = "a Parquet file inside another compression, Parquet compresses by itself"
        raise InputError(f"{name}: {what}; decompress it ({_UNPACK[path.suffix.lower()]} {path.name})")
    shown = f"suffix {''.join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSED else path.suffix or 'missing'}"
    choice = f"use {', '.join(READABLE)} or a folder; text files may end in .gz or .zst too"
    raise InputError(f"{name}: {shown} is not readable; {choice}")


def rows_suffix(path: Path) -> str:
    """Return the suffix that says how rows are written, `.csv` of `rows.csv.gz`, in lower case."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


# Bytes: decompressed, piece by piece.

_PIECE = 2**18
_SMALL_PIECE = 2**12
"""What is decompressed at a time: so much of what stands before a damaged place may be lost with it."""
_BOM = b"\xef\xbb\xbf"
_UNPACK = {".gz": "gzip -d", ".zst": "zstd -d"}
_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60))),  # or skippable
}


def _bytes(path: Path, name: str) -> Iterator[bytes]:
    """Yield what a file holds, decompressed; raise Bad at the place where a compressed file is damaged."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        _check_head(file.peek(64), suffix, name)
        if suffix == ".gz":
            yield from _gunzipped(file)
        elif suffix == ".zst":
            yield from _unzstded(file)
        else:
            while piece := file.read1(_PIECE):
                yield piece


def _check_head(head: bytes, suffix: str, name: str) -> None:
    """Refuse a file whose first bytes are of another kind than its name says."""
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{name}: a pointer of Git LFS, not the file itself; run git lfs pull")
    for ending, magic in _MAGIC.items():
        if suffix == ending and not head.startswith(magic):
            what = f"begins with {head[:4]!r}" if head else "is empty"
            raise InputError(f"{name}: named {ending} but not compressed so (it {what}); rename or compress it")
        if suffix != ending and head.startswith(magic):
            raise InputError(f"{name}: compressed but not named so; add {ending} to its name")


def _gunzipped(file: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as text:
            while piece := text.read1(_SMALL_PIECE):
                yield piece
    except EOFError as error:
        raise _damaged("the gzip file is cut short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(f"the gzip file is corrupt: {error}") from error


def _unzstded(file: IO[bytes]) -> Iterator[bytes]:
    import pyarrow

    try:
        with pyarrow.input_stream(file, compression="zstd") as text:
            while piece := text.read(_SMALL_PIECE):
                yield piece
    except OSError as error:
        if error.errno is not None:  # of the disk, not of zstd
            raise
        cut = "Truncated" in str(error)
        raise _damaged(f"the zstd file is {'cut short' if cut else f'corrupt: {error}'}") from error


def _damaged(what: str) -> Bad:
    return Bad(f"{what}, nothing can be read from here on; write or copy it again", "broken file")


def _text_bytes(path: Path, name: str) -> Iterator[bytes]:
    """Yield the bytes of a text file without a byte order mark; raise Bad when they are UTF-16."""
    pieces = _bytes(path, name)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 4:
            break
    zeros = [index for index, byte in enumerate(head[:4]) if not byte]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros in ([1, 3], [0, 2]):
        raise Bad("not UTF-8 (UTF-16), rows are read as UTF-8; save the file as UTF-8", "encoding")
    yield head.removeprefix(_BOM)
    yield from pieces


# Lines: only a line feed ends one.


class _Begun:
    """A line whose end was not read yet; of one that is too large only its size and its beginning are kept."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self._parts.append(part)
        if self.size > MAX_ROW_BYTES:
            self._parts = [self._parts[0][: 4 * KEPT]]

    def take(self) -> bytes | Bad:
        """Return the line and begin the next one."""
        line: bytes | Bad = b"".join(self._parts)
        if self.size > MAX_ROW_BYTES:
            line = Bad(f"a line of more than {MIB}, a row must be smaller; split it or drop it", "too large")
            line.at(_shown(self._parts[0]))
        self._parts.clear()
        self.size = 0
        return line


def _raw_lines(path: Path, name: str) -> Iterator[tuple[int, bytes | Bad]]:
    """Yield each line with its number, without its line feed; a damaged file ends with a Bad."""
    number, begun = 1, _Begun()
    try:
        for piece in _text_bytes(path, name):
            first, *lines = piece.split(b"\n")
            begun.add(first)
            if not lines:
                continue
            yield number, begun.take()
            begun.add(lines.pop())
            for line in lines:
                number += 1
                yield number, line
            number += 1
    except Bad as bad:
        yield number, bad
        return
    if begun.size:
        yield number, begun.take()


def _lines(path: Path, name: str) -> Iterator[tuple[int, str | Bad]]:
    """Yield each line that is not blank as text, without the characters that end it."""
    for number, raw in _raw_lines(path, name):
        if isinstance(raw, Bad):
            yield number, raw
        elif raw and not raw.isspace():
            try:
                yield number, raw.decode().removeprefix("\ufeff").removesuffix("\r")  # files may have been joined
            except UnicodeDecodeError as error:
                yield number, _not_utf8(raw, error).at(_shown(raw))


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> Bad:
    return not_utf8(raw[error.start], len(raw[: error.start].decode()) + 1)


def _shown(raw: bytes) -> str:
    """Return the beginning of what is not text, as far as it is."""
    return raw[: 4 * KEPT].decode(errors="replace")


def _json_lines(path: Path, name: str) -> Source:
    strict = Strict()
    for number, line in _lines(path, name):
        yield number, line if isinstance(line, Bad) else strict.line(line)


def _text_lines(path: Path, name: str, task: Task) -> Source:
    key = "text" if task == "text" else "prompt"
    for number, line in _lines(path, name):
        yield number, line if isinstance(line, Bad) else {key: line}


# Tables.


class _RowLines:
    """The lines of a table, for csv; it remembers those of the row that is being read."""

    def __init__(self, path: Path, name: str) -> None:
        self._lines = _raw_lines(path, name)
        self.begin()

    def begin(self) -> None:
        """Forget the row that was read."""
        self.first = 0
        """The line where the row begins."""
        self.spoiled: tuple[int, Bad] | None = None
        """The first byte of the row that no text may hold, and its line."""
        self.text = io.StringIO()
        self._size = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        number, raw = next(self._lines)
        self.first = self.first or number
        if isinstance(raw, Bad):
            raise _row_too_large() if raw.cause == "too large" else raw
        try:
            line = raw.decode() + "\n"
        except UnicodeDecodeError as error:
            line = raw.decode(errors="replace") + "\n"
            self.spoiled = self.spoiled or (number, _not_utf8(raw, error))
        if "\0" in line:
            what = f"a NUL byte at column {line.index(chr(0)) + 1}, cells hold text; write the row again or drop it"
            self.spoiled = self.spoiled or (number, Bad(what, "broken table"))
        self._size += len(raw) + 1
        if self._size > MAX_ROW_BYTES:
            raise _row_too_large()
        self.text.write(line)
        return line


def _table(path: Path, name: str, delimiter: str) -> Source:
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses cells over 128 KiB, which long answers reach
    lines = _RowLines(path, name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells or (len(cells) == 1 != len(header) and not cells[0].strip()):
                pass  # a blank line
            elif lines.spoiled:
                yield lines.spoiled[0], lines.spoiled[1].at(lines.text.getvalue())
                if not header:
                    return
            elif not header:
                if problem := _header_problem(cells, delimiter):
                    yield lines.first, Bad(problem, "broken table").at(lines.text.getvalue())
                    return
                header = cells
            elif len(cells) != len(header):
                yield lines.first, _not_as_wide(len(cells), len(header), delimiter).at(lines.text.getvalue())
            else:
                yield lines.first, {key: cell or None for key, cell in zip(header, cells, strict=True)}
            lines.begin()
    except Bad as bad:
        yield lines.first, bad.at(lines.text.getvalue())
    except csv.Error as error:
        line, broken = _broken_row(lines.first, lines.text.getvalue(), delimiter, error)
        yield line, broken.at(lines.text.getvalue())


def _row_too_large() -> Bad:
    rule = "a row must be smaller (is a quoted cell not closed?)"
    return Bad(f"a row of more than {MIB}, {rule}; split it, and fix the file from here on", "too large")


def _header_problem(names: list[str], delimiter: str) -> str:
    """Return what is wrong with the names of the columns, or nothing."""
    rule = "the first line must name the columns"
    for place, key in enumerate(names, 1):
        if not key.strip():
            return f"column {place} has no name, {rule}; name it, or drop it (an index of pandas: to_csv(index=False))"
        if "\n" in key or len(key) > 200 or key.lstrip().startswith(("{", "[")):
            return f"column {place} is named by a whole text ({key[:20]!r}...), {rule}; write such a line"
        if key in names[: place - 1]:
            return f"{key}: names columns {names.index(key) + 1} and {place}, names must differ; rename one"
    for other in {",", ";", "\t"} - {delimiter}:
        if len(names) == 1 and other in names[0]:
            called = _called(delimiter)
            return f"one column named {names[0][:60]!r}, a {called} must stand between cells; save it with {called}s"
    return ""


def _not_as_wide(cells: int, columns: int, delimiter: str) -> Bad:
    what = f"{cells} cell{'s' * (cells != 1)} in a row, the header has {columns}"
    remedy = f"quote the cell that holds a {_called(delimiter)}"
    if cells < columns:
        remedy = "write empty cells too, and quote the cell that holds a line break"
    return Bad(f"{what}; {remedy}", "broken table")


def _called(delimiter: str) -> str:
    return {",": "comma", "\t": "tab"}[delimiter]


def _broken_row(line: int, text: str, delimiter: str, error: csv.Error) -> tuple[int, Bad]:
    """Say what csv could not read, at the line where the quote was opened that is to blame."""
    if str(error).startswith("new-line"):
        what = "a carriage return without a line feed"
        remedy = r"save the file with line feeds (\n), and fix the file from here on"
    else:
        line += text.count("\n", 0, _last_cell(text, delimiter))
        closed = str(error) != "unexpected end of data"
        what = "text after a closing quote" if closed else "the quote opened here is never closed"
        remedy = 'write quotes inside a quoted cell twice (""), and fix the file from here on'
    return line, Bad(f"broken row ({what}); {remedy}", "broken table")


def _last_cell(text: str, delimiter: str) -> int:
    """Return where the last cell of a broken row begins: the first that does not end with a delimiter."""
    cell = re.compile(rf'(?:"[^"]*+(?:""[^"]*+)*+"|[^"{delimiter}][^{delimiter}]*+|){delimiter}')
    at = 0
    while found := cell.match(text, at):
        at = found.end()
    return at


# What pyarrow and datasets read.

_BATCH = 256


def _parquet(path: Path, name: str) -> Source:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as head:
        _check_head(head.peek(64), "", name)
    try:  # without a buffer, or with pages read ahead, a column of a row group would be held whole
        table = ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({_said(error)}); write or copy it again") from error
    number = 0
    with table:
        _no_double_columns(table.schema_arrow.names, name)
        try:
            for batch in table.iter_batches(_BATCH):
                for record in _records(batch):
                    number += 1
                    yield number, record
            if number != table.metadata.num_rows:
                raise pyarrow.ArrowInvalid(f"{number} rows where {table.metadata.num_rows} should be")
        except (pyarrow.ArrowException, OSError) as error:
            yield number + 1, _damaged(f"the Parquet file is corrupt: {_said(error)}")


def _no_double_columns(names: list[str], name: str) -> None:
    for key in names:
        if names.count(key) > 1:
            raise InputError(f"{name}: {key} names two columns, names must differ; rename one")


def _records(batch: Any) -> Iterator[Any]:
    """Yield the rows of a batch as Python values; what Python cannot hold spoils one row only."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = [_record(batch.slice(index, 1)) for index in range(len(batch))]
    yield from rows


def _record(one: Any) -> Any:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return not_utf8(error.object[error.start], len(error.object[: error.start].decode()) + 1)
    except (ValueError, OverflowError) as error:  # a date beyond the year 9999, a duration of a million years
        return Bad(f"a value that cannot be read ({_said(error)}), rows hold text and numbers; drop it", "wrong type")


def _said(error: Exception) -> str:
    """Return what a library says, on one short line."""
    return " ".join(str(error).split())[:200].rstrip(". ")


def _folder(path: Path, name: str) -> Source:
    if (path / "dataset_dict.json").is_file():
        raise InputError(f"{name}: {_splits(path)}")
    if not (path / "dataset_info.json").is_file():
        raise InputError(f"{name}: a folder without rows; give a file, or a folder made by Dataset.save_to_disk")
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:  # files of it are missing or cut short
        what = f"not a whole folder of Dataset.save_to_disk ({_said(error)})"
        raise InputError(f"{name}: {what}; save or copy it again") from error
    return dataset_rows(dataset)


def _splits(path: Path) -> str:
    try:
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        return f"holds the splits {', '.join(splits)}; name one of them: {path / splits[0]}"
    except (ValueError, LookupError, TypeError):
        return "dataset_dict.json in it names no splits; name the folder of one, or save it again"


def dataset_rows(dataset: Any) -> Source:
    """Return the rows of a dataset of the `datasets` library as Python values, numbered from 1."""
    number = 0
    for table in dataset.with_format("arrow").iter(_BATCH):
        for record in _records(table):
            number += 1
            yield number, record
