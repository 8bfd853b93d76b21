"""Read files of rows and check every one of them: each is a row, or a reject with its address.

The formats are in `formats.py`, the kinds of files in `sources.py`. A file holds one format, which its first rows tell,
or `format` does. Columns of metadata are ignored; any other that the format does not have is an error, unless `columns`
or `format` name the wanted ones. An address holds the line of the source file, after decompression too (of Parquet,
datasets on disk and hub datasets: the number of the row, from 1); where several rows of a JSON array begin on one line,
all but the first have their place in the array too, from 0: `file:1[17]`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

from align_pipeline.data.address import shown
from align_pipeline.data.fields import check_weight, kind, list_of, show
from align_pipeline.data.formats import FORMATS, Format, check_fields, likeness, recognise
from align_pipeline.data.gate import Gate, Reject
from align_pipeline.data.rows import Message, Preference, PreferenceIds, Row, Task, prompt_key
from align_pipeline.data.sources import Bad, Record, Source, dataset_rows, open_source, rows_suffix
from align_pipeline.pipeline.errors import DataError, InputError, did_you_mean

RowT = TypeVar("RowT", bound=Row)

FIRST_ROWS = 100
"""Rows that are looked at before a file's format is settled."""


class Scan:
    """The rows of one source, one at a time: rows that can be used, and rejects. It can be read once."""

    def __init__(
        self,
        source: Source,
        task: Task,
        name: str,
        *,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        weight: str | None = None,
        cells: bool = False,
    ) -> None:
        """Take the records of `source`; with `cells` all values are text, as in CSV.

        `weight` names the file's column that says how much each pair counts.
        """
        formats = [one for one in FORMATS[task] if format in (None, one.name)]
        if not formats:
            names = list_of(one.name for one in FORMATS[task])
            raise InputError(f"format: {format} is no format of task {task}; choose one of {names}")
        self.name, self.task = name, task
        self.format: Format | None = None
        """What the rows are read as; known once the first one was yielded."""
        self._source, self._formats, self._columns, self._cells = source, formats, dict(columns or {}), cells
        self._named, self._weight = format is not None, weight
        self._known = {key for each in FORMATS[task] for key in each.fields}
        for key in self._columns:
            if key not in self._known:
                near = did_you_mean(key, self._known)
                raise InputError(f"columns.{key}: unknown field for {task}{near}; known: {list_of(self._known)}")
        if problem := twice_mapped(self._columns):
            raise InputError(f"columns: {problem}")

    def __iter__(self) -> Iterator[Row | Reject]:
        try:
            yield from self._rows()
        except OSError as error:
            raise InputError(_unreadable(self.name, error)) from error

    def look(self) -> None:
        """Settle the format from the first rows; reads from the source, so the scan is spent."""
        try:
            first = list(islice(self._source, FIRST_ROWS))
        except OSError as error:
            raise InputError(_unreadable(self.name, error)) from error
        self._settle(first)

    def likeness(self) -> float:
        """Return how many fields of the task the first rows have; reads from the source, so the scan is spent."""
        first = [record for _, record in islice(self._source, FIRST_ROWS) if isinstance(record, dict)]
        return likeness([self._renamed(record) for record in first], self._formats) + self._waits_for_answer(first)

    def _waits_for_answer(self, records: Sequence[Record]) -> float:
        """Tell conversations that end with a question, which are prompts, from those that are learnt: by a hair."""
        if self.task != "prompt":
            return 0.0
        for record in records:
            turns = record.get("messages") or record.get("conversations")
            if type(turns) is list and type(turns[-1]) is dict:
                return 0.01 if (turns[-1].get("role") or turns[-1].get("from")) in ("user", "human") else 0.0
        return 0.0

    def _rows(self) -> Iterator[Row | Reject]:
        first: list[tuple[int, Any]] = []
        for item in self._source:
            first.append(item)
            if len(first) >= FIRST_ROWS:
                if any(isinstance(record, dict) for _, record in first):
                    break
                yield from (self._row(*one) for one in first)  # rejects all: no format is needed to say so
                first.clear()
        self._settle(first)
        yield from (self._row(*item) for item in first)
        yield from (self._row(*item) for item in self._source)

    def _settle(self, first: Sequence[tuple[int, Any]]) -> None:
        """Find the format that the first rows have."""
        records = [(number, record) for number, record in first if isinstance(record, dict)]
        if not records:
            return
        where = f"{self.name}:{shown(records[0][0])}"
        for ours, theirs in self._columns.items():
            if not any(theirs in record for _, record in records):
                near, has = did_you_mean(theirs, records[0][1]), list_of(records[0][1])
                raise DataError([f"{where}: columns.{ours}: no column {theirs} in the file{near}; it has {has}"])
        if self._weight and not any(self._weight in record for _, record in records):
            near, has = did_you_mean(self._weight, records[0][1]), list_of(records[0][1])
            raise DataError([f"{where}: weight_column: no column {self._weight} in the file{near}; it has {has}"])
        found = recognise([self._renamed(record) for _, record in records], self._formats, self.task)
        if isinstance(found, tuple):
            number, problem = found
            before = [self._row(*item) for item in takewhile(lambda item: not isinstance(item[1], dict), first)]
            raise DataError([*map(str, before), f"{self.name}:{shown(records[number][0])}: {problem}"])
        self.format = found
        same = {self._field_problem(record) for _, record in records}
        if len(records) > 1 and len(same) == 1 and (common := same.pop()):
            # Not these rows are wrong but what the file is taken for: one line says so better than one a row.
            raise DataError([f"{where}: {common} (so it is in all of the first {len(records)} rows)"])

    def _field_problem(self, record: Record) -> str | None:
        assert self.format is not None
        try:
            self._fields(record, self.format)
        except Bad as bad:
            return bad.problem
        return None

    def _row(self, number: int, record: Any) -> Row | Reject:
        where = f"{self.name}:{shown(number)}"
        try:
            if isinstance(record, Bad):
                raise record
            if not isinstance(record, dict):
                rule = "a row must be an object of fields; fix or drop it"
                raise Bad(f"{kind(record)} ({show(record)}), {rule}", "not an object")
            assert self.format is not None
            row = self.format.build(where, self._fields(record, self.format))
            return self._weighed(row, record) if self._weight else row
        except Bad as bad:
            return Reject(where, bad.cause, bad.problem, record.text if isinstance(record, Bad) else record)

    def _fields(self, record: Record, format: Format) -> Record:
        """Return the fields of a format from a record, checked; of a prompt the rest too, as `extra`."""
        rest: Record = {}
        if self._weight in record and self._weight not in self._known:
            record = {key: value for key, value in record.items() if key != self._weight}
        if self._columns:
            named = self._renamed(record)
            if self.task == "prompt":
                taken = {self._columns.get(key, key) for key in named}
                rest = {key: value for key, value in record.items() if key not in taken}
            record = named
        if self.task == "prompt" and record.keys() >= set(format.required):
            rest |= {key: value for key, value in record.items() if key not in format.fields}
            record = {key: value for key, value in record.items() if key in format.fields}
        if self._cells:
            record = _parse_cells(record)
        check_fields(record, format, self._known, named=self._named)
        return {**record, "extra": rest} if rest else record

    def _weighed(self, row: Row, record: Record) -> Row:
        """Return a pair with its weight."""
        assert self._weight and isinstance(row, Preference | PreferenceIds)
        value = record.get(self._weight)
        return replace(row, weight=check_weight(_parsed(value) if self._cells else value, self._weight))

    def _renamed(self, record: Record) -> Record:
        """Return the record under our names: mapped columns, and those that carry our names already."""
        if not self._columns:
            return record
        taken = set(self._columns.values())
        own = {
            key: value
            for key, value in record.items()
            if key in self._known and key not in self._columns and key not in taken
        }
        return own | {ours: record[theirs] for ours, theirs in self._columns.items() if theirs in record}


def twice_mapped(columns: Mapping[str, str]) -> str | None:
    """Say which column of a file is mapped to two fields; None when none is."""
    fields: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs in fields:
            return f"{theirs} is mapped to {fields[theirs]} and to {ours}, a column is one field; name another column"
        fields[theirs] = ours
    return None


def list_named(columns: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Return the key of the list that columns written `LIST[].NAME` name, and the columns of its rows.

    Raises InputError where only some name it, or two do.
    """
    parts = {ours: theirs.rpartition("[].") for ours, theirs in columns.items()}
    keys = {before if found else None for before, found, _ in parts.values()}
    if len(keys) > 1:
        said = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        raise InputError(f"columns: {said}: rows lie in one list of a file; begin all with the same LIST[].")
    return next(iter(keys), None), {ours: name for ours, (_, _, name) in parts.items()}


def scan(
    path: Path,
    task: Task,
    name: str | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    weight: str | None = None,
    side: Side = "train",
) -> Scan:
    """Return the rows of a file, or of a folder: made by `Dataset.save_to_disk`, by feedback, or holding `rows.jsonl`.

    `name` stands for the file in addresses (its own name by default); `columns` maps our field names to the file's,
    `LIST[].NAME` where a JSON object holds the rows under the key LIST; `weight` names the file's column that says how
    much each pair counts; `side` chooses the rows of a feedback folder.
    .txt is one document (task `text`) or one prompt (task `prompt`) per line that is not blank.
    Raises InputError for a path that cannot be read, and DataError for rows of no format that the task reads.
    """
    path = Path(path)
    name = name or path.name
    if path.is_dir() and (path / "rows.jsonl").is_file():
        path = path / "rows.jsonl"
    elif made_of_feedback(path):
        inside = feedback_rows(path, task, side)
        if inside is None:
            what = f"no {' and no '.join(_OF_FEEDBACK[task])}" if task in _OF_FEEDBACK else f"nothing for task {task}"
            raise InputError(f"{name}: rows made of feedback, which hold {what}; report.md in it says what they hold")
        path = inside
    under, columns = list_named(columns or {})
    try:
        source = open_source(path, name, task, under)
    except OSError as error:
        raise InputError(f"{_unreadable(name, error)} ({path})") from error
    cells = rows_suffix(path) in (".csv", ".tsv")
    return Scan(source, task, name, format=format, columns=columns, weight=weight, cells=cells)


Side = Literal["train", "test"]
_OF_FEEDBACK: dict[Task, tuple[str, ...]] = {
    "preference": ("pairs",),
    "unpaired": ("unpaired",),
    "prompt": ("unpaired", "pairs"),
}
"""Task -> the files of a feedback folder that it reads, the first that is there."""


def made_of_feedback(path: Path) -> bool:
    """Tell whether a folder holds rows that were made of feedback."""
    return any((path / f"{name}.train.jsonl").is_file() for name in ("pairs", "unpaired"))


def feedback_rows(path: Path, task: Task, side: Side) -> Path | None:
    """Return the file of a feedback folder that a task reads; None where there is none."""
    files = (path / f"{name}.{side}.jsonl" for name in _OF_FEEDBACK.get(task, ()))
    return next((file for file in files if file.is_file()), None)


def _unreadable(name: str, error: OSError) -> str:
    reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return f"{name}: {reason}; give the path of a file of rows"


def scan_hub(
    repo: str,
    revision: str | None,
    task: Task,
    *,
    split: str = "train",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    weight: str | None = None,
) -> Scan:
    """Return the rows of one split of a dataset on the hub, or of a folder that `load_dataset` understands."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(repo, revision=revision, split=split)
    except (OSError, ValueError) as error:
        at = f"@{revision}" if revision else ""
        raise InputError(f"hub:{repo}{at}: split {split} cannot be loaded ({error}); check name and network") from error
    return Scan(dataset_rows(dataset), task, repo, format=format, columns=columns, weight=weight)


def find_task(scan_as: Callable[[Task], Scan]) -> Scan:
    """Return the scan of the task that a source's first rows are for: the one that finds most of its fields in them.

    Raises InputError for a source that no task can read, and DataError for rows of no task.
    """
    found: dict[Task, float] = {}
    refused: dict[Task, InputError] = {}
    for task in FORMATS:
        try:
            found[task] = scan_as(task).likeness()
        except InputError as error:  # the columns are another task's, or plain text has no fields
            refused[task] = error
    if not found:
        raise next(iter(refused.values()))
    best = max(found, key=lambda task: found[task])
    if best == "sft" and 0 < found[best] == found.get("text") and not found.get("prompt"):
        best = "text"  # rows of text alone are documents, of which nothing is cut
    if found[best] or len(found) < len(FORMATS):
        return scan_as(best)
    scan = scan_as(best)
    try:
        scan.look()
    except DataError as error:
        others = ", ".join(task for task in FORMATS if task != best)
        raise DataError(
            [*error.problems, f"nor are they rows for {others}; --task TASK says what these read"]
        ) from None
    return scan_as(best)


def read(
    path: Path,
    task: Task,
    name: str | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    weight: str | None = None,
) -> list[Row]:
    """Read and check all rows, see `scan`; raise one DataError with every bad row, or when there are no rows."""
    return all_rows(scan(path, task, name, format=format, columns=columns, weight=weight))


def all_rows(scan: Scan) -> list[Row]:
    """Return the rows of a scan; raise one DataError with every bad row, or when there are no rows."""
    gate = Gate()
    rows = list(gate.take(scan))
    gate.judge()
    if not rows:
        raise DataError([no_rows(scan.name)])
    return rows


def no_rows(name: str) -> str:
    return f"{name}: no rows, at least one is needed; check how the file was written"


# fmt: off
_JSON_CELLS = frozenset({
    "label", "margin", "messages", "conversations", "history", "tools", "chosen_messages", "rejected_messages",
    "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids",
})
# fmt: on


_SPOKEN = frozenset(("prompt", "completion", "chosen", "rejected"))
"""Fields that hold text or messages; in a cell, a JSON list of messages is messages."""


def _parse_cells(record: Record) -> Record:
    """Read those cells of a CSV row that are not text as JSON; what does not parse stays text and is refused later."""
    read = dict(record)
    for key in _JSON_CELLS & record.keys():
        cell = record[key]
        if isinstance(cell, str):
            try:
                read[key] = json.loads(cell.lower() if key == "label" else cell)
            except (ValueError, RecursionError):
                read[key] = cell
    for key in _SPOKEN & record.keys():
        cell = record[key]
        if isinstance(cell, str) and cell.lstrip().startswith("[{"):
            try:
                turns = json.loads(cell)
            except (ValueError, RecursionError):
                continue
            if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns):
                read[key] = turns
    return read


def _parsed(cell: Any) -> Any:
    """Return what a cell says as JSON; what does not parse stays text."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        return cell


# Splitting.


def split(rows: Sequence[RowT], fraction: float) -> tuple[list[RowT], list[RowT]]:
    """Return (training rows, held-out rows); the hash of a row's prompt decides, so equal prompts stay together."""
    places = [place(row) for row in rows]
    line = border(places, fraction)
    train = [row for row, at in zip(rows, places, strict=True) if at >= line]
    return train, [row for row, at in zip(rows, places, strict=True) if at < line]


def border(places: Sequence[float], fraction: float) -> float:
    """Return the place below which rows are held out.

    A row's side depends on no other row: adding rows moves none. The one exception keeps both sides usable: with two
    or more distinct prompts and a fraction above 0, a side that would be empty gets the prompt nearest to its border;
    rows that all have one prompt are all trained on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction}, must be at least 0 and below 1")
    distinct = sorted(set(places))
    if fraction == 0 or len(distinct) < 2:
        return 0.0
    return min(max(fraction, math.nextafter(distinct[0], 1)), distinct[-1])


def place(row: Row) -> float:
    """Return a number in [0, 1) that depends on the prompt's content only."""
    key = prompt_key(row)
    turns = [(part.role, part.content) if isinstance(part, Message) else part for part in key]
    content = json.dumps(key if isinstance(key, str) else turns)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48
