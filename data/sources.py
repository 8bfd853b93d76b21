"""Where rows come from: every kind of file yields the line of each record and what stands there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import InputError

READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


class Bad(ValueError):
    """One row cannot be used; the message begins with the field."""


Record = dict[str, Any]
Source = Iterator[tuple[int, Any]]
"""Line number and what stands there: an object, or the `Bad` that says why it could not be read."""


def open_source(path: Path, name: str, task: Task) -> Source:
    if path.is_dir():
        return _folder(path, name)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix == ".json":
        return _json_array(path)
    if suffix in (".csv", ".tsv"):
        return _table(path, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet":
        return _parquet(path, name)
    if suffix == ".txt":
        if task not in ("text", "prompt"):
            raise InputError(f"{name}: .txt holds plain text, task {task} needs fields; use {', '.join(READABLE[:-1])}")
        return _text_lines(path, task)
    path.stat()  # a file that is missing is the better message
    raise InputError(f"{name}: suffix {suffix or 'missing'} is not readable; use {', '.join(READABLE)} or a folder")


def _decoded_lines(path: Path) -> Iterator[tuple[int, str | Bad]]:
    with path.open("rb") as file:  # bytes: only a line feed ends a line, and one bad byte spoils one line only
        for number, raw in enumerate(file, 1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    yield number, Bad("not UTF-8 (UTF-16), rows are read as UTF-8; save the file as UTF-8")
                    return
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.isspace():
                continue
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(raw, error)


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> Bad:
    column = error.start - raw.rfind(b"\n", 0, error.start)
    byte = f"byte 0x{raw[error.start]:02x} at column {column}"
    return Bad(f"not UTF-8 ({byte}), rows are read as UTF-8; save the file as UTF-8")


def _json_lines(path: Path) -> Source:
    for number, line in _decoded_lines(path):
        if isinstance(line, Bad):
            yield number, line
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            what = f"broken JSON ({error.msg} at column {error.colno})"
            yield number, Bad(f"{what}, each line must be one JSON object; fix the line or drop it")
        except (ValueError, RecursionError) as error:
            yield number, Bad(f"unusable JSON ({error}), each line must be one JSON object; fix the line or drop it")


def _json_array(path: Path) -> Source:
    text = _whole(path)
    if isinstance(text, tuple):
        yield text
        return
    decoder = json.JSONDecoder()
    at, line = _skip(text, 0), 1
    if at < len(text) and text[at] != "[":
        yield 1, Bad("not a JSON array, a .json file holds [row, row, ...]; name it .jsonl when each line is a row")
        return
    seen, expected = 0, "["
    while at < len(text) and text[at] == expected:
        start = _skip(text, at + 1)
        if expected == "[" and text[start : start + 1] == "]":
            return
        line, seen = line + text.count("\n", seen, start), start
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            yield error.lineno, Bad(f"broken JSON ({error.msg} at column {error.colno}); fix the file from here on")
            return
        except (ValueError, RecursionError) as error:
            yield line, Bad(f"unusable JSON ({error}); fix the file from here on")
            return
        yield line, value
        at, expected = _skip(text, end), ","
    if expected == "," and text[at : at + 1] != "]":
        line += text.count("\n", seen, at)
        yield line, Bad("broken JSON (the array does not go on with , or ]); fix the file from here on")
    elif expected == "," and _skip(text, at + 1) < len(text):
        line += text.count("\n", seen, _skip(text, at + 1))
        yield line, Bad("something stands after the array's ], a .json file holds one array; join them or use .jsonl")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _whole(path: Path) -> str | tuple[int, Bad]:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return raw.count(b"\n", 0, error.start) + 1, _not_utf8(raw, error)


def _table(path: Path, delimiter: str) -> Source:
    text = _whole(path)
    if isinstance(text, tuple):
        yield text
        return
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB, which long answers reach
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif len(cells) > len(header):
                what = f"{len(cells)} cells in a row, the header has {len(header)}; quote the cell that holds a"
                yield line, Bad(f"{what} {'tab' if delimiter == chr(9) else 'comma'}")
            elif cells:
                yield line, {key: cell or None for key, cell in zip(header, cells, strict=False)}
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, Bad(f"broken row ({error}), a quoted cell must be closed; fix the file from here on")


_CELLS = ("label", "margin", "messages", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")


def parse_cells(record: Record) -> Record:
    """Read those cells of a CSV row that are not text as JSON; what does not parse stays text and is refused later."""
    for key in _CELLS:
        cell = record.get(key)
        if cell is not None:
            try:
                record[key] = json.loads(cell.lower() if key == "label" else cell)
            except ValueError:
                record[key] = cell
    return record


def _parquet(path: Path, name: str) -> Source:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowException as error:
        raise InputError(f"{name}: not a readable Parquet file ({error}); write it again") from error


def _folder(path: Path, name: str) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise InputError(f"{name}: holds the splits {', '.join(splits)}; name one of them: {path / splits[0]}")
    if not (path / "dataset_info.json").is_file():
        raise InputError(f"{name}: a folder without rows; give a file, or a folder made by Dataset.save_to_disk")
    from datasets import load_from_disk

    return dataset_rows(load_from_disk(str(path)))


def dataset_rows(dataset: Any) -> Source:
    number = 0
    for batch in dataset.iter(1024):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(batch, values, strict=True))


def _text_lines(path: Path, task: Task) -> Source:
    key = "text" if task == "text" else "prompt"
    for number, line in _decoded_lines(path):
        yield number, line if isinstance(line, Bad) else {key: line}


# Checks: records become rows of one format.
