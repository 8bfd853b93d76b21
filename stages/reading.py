"""Rows of a stage: read through the gate, encoded once, split, mixed, and reported.

What is read is content-addressed: the same rows with the same tokenizer, by this stage again or by another one, come
from `work.cache`. An entry holds the encoded rows as an Arrow file, which is mapped into memory and not loaded, and
what the gate found. Its key holds the digests of the rows, of the tokenizer and of the code that reads and encodes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align_pipeline.data import address
from align_pipeline.data.gate import Gate, OnBadRow, Reject
from align_pipeline.data.report import Part, dialect, markdown, sign, summary, system
from align_pipeline.pipeline.errors import DataError, InputError
from align_pipeline.pipeline.files import canonical_digest, file_sha256, write_json
from align_pipeline.pipeline.stage import Inputs, Resolved, Work

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from align_pipeline.data.chat import Encoder
    from align_pipeline.data.load import Scan
    from align_pipeline.data.rows import Row, Task

CHUNK = 500
"""Rows that are encoded at once."""
ENTRY_FILES = ("rows.arrow", "rejects.jsonl")
"""Files of an entry beside `gate.json`, which holds their digests: a cache may be cut off by a full disk or a crash."""
ALONE = 2000
"""Up to so many rows are encoded in this process: starting others would take longer."""
MARKS = {
    "_line": "lines", "_content": "contents", "_sign": "signs", "_dialect": "dialects", "_system": "systems",
    "_longest": "lengths",
    "_tokens": "totals", "_cut": "cut", "_place": "",
}  # fmt: skip
"""Columns of an entry beside what a trainer takes -> their place in a `Part`; `_place`: see `load.place`."""


@dataclass(frozen=True)
class Source:
    """Rows to read: an input, and how its file is to be understood."""

    resolved: Resolved
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    """How often a row is seen in a pass: 2 takes each twice, 0.3 takes each with that chance."""
    weight_column: str | None = None
    """The file's column that says how much each pair counts."""
    side: Literal["train", "test"] = "train"
    """Of rows made of feedback, which part."""

    @property
    def name(self) -> str:
        """What addresses begin with: the file as the pipeline names it, or the folder that a stage made."""
        return self._name if self.side == "train" else f"{self._name} (test)"

    @property
    def _name(self) -> str:
        ref = self.resolved.ref
        if ref.startswith("file:"):
            return ref.removeprefix("file:")
        return self.resolved.hub or Path(self.resolved.path or ref).name

    def scan(self, task: Task) -> Scan:
        from align_pipeline.data.load import scan, scan_hub
        from align_pipeline.stages.models import local_path

        how: dict[str, Any] = {"format": self.format, "columns": self.columns, "weight": self.weight_column}
        if self.resolved.path is None and self.resolved.hub is not None:
            return scan_hub(self.resolved.hub, self.resolved.revision, task, **how)
        return scan(local_path(self.resolved), task, self.name, side=self.side, **how)

    def tests(self, task: Task) -> Source | None:
        """Return the rows that feedback kept for testing, where this is feedback and kept some."""
        from align_pipeline.data.load import feedback_rows, made_of_feedback

        path = Path(self.resolved.path or "")
        if self.resolved.path is None or not made_of_feedback(path) or not feedback_rows(path, task, "test"):
            return None
        return replace(self, side="test", weight=1.0)


def sources(
    inputs: Inputs,
    field: str,
    *,
    format: str | Mapping[str, str] | None = None,
    columns: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    weight_column: str | None = None,
) -> list[Source]:
    """Return what a field names, one source or several under names (`data.shop`); settings may be one per name."""
    columns = columns or {}
    own_columns = any(isinstance(value, Mapping) for value in columns.values())
    found = []
    for key, resolved in inputs.items():
        whole, _, name = key.partition(".")
        if whole == field:
            wanted = format if isinstance(format, str) else (format or {}).get(name)
            mapped = columns.get(name, {}) if own_columns else columns
            found.append(Source(resolved, wanted, mapped, (weights or {}).get(name, 1.0), weight_column))
    return found


def look(
    inputs: Inputs,
    tasks: Mapping[str, Task],
    *,
    format: str | Mapping[str, str] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> dict[str, list[str]]:
    """Return what is wrong with format and columns of the first rows, by input; `tasks` says what a field is read for.

    What is wrong with single rows is left to the gate.
    """
    found: dict[str, list[str]] = {}
    for key, resolved in inputs.items():
        field = key.partition(".")[0]
        if field not in tasks:
            continue
        (source,) = sources({key: resolved}, field, format=format, columns=columns)
        try:
            source.scan(tasks[field]).look()
        except DataError as error:
            found[key] = list(error.problems)
        except InputError as error:
            found[key] = [str(error)]
    return found


# --- rows as they are -------------------------------------------------------------------------------------------------


def read_rows(
    inputs: Inputs,
    field: str,
    task: Task,
    work: Work,
    *,
    format: str | Mapping[str, str] | None = None,
    columns: Mapping[str, Any] | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.0,
    report_as: str | None = None,
) -> list[Any]:
    """Return the typed rows that a field names, for a stage that encodes them itself, and report them.

    `report_as` names the report where one field is read in several calls.
    Raises DataError for bad rows, or with `skip` for too many of them, and when there are no rows.
    """
    from align_pipeline.data.load import no_rows

    rows: list[Any] = []
    parts: list[Part] = []
    found: list[Gate] = []
    given = sources(inputs, field, format=format, columns=columns)
    for number, source in enumerate(given):
        rejects = work.scratch / f"rejects-{field}-{number}.jsonl"
        keeps = on_bad_row == "skip" and os.environ.get("RANK", "0") == "0"  # all ranks read, one of them writes
        if keeps:
            rejects.unlink(missing_ok=True)
        gate = Gate(rejects if keeps else None)
        scan = source.scan(task)
        part = Part(source.name)
        for row in gate.take(scan):
            part.add(row)
            rows.append(row)
        part.format = scan.format.name if scan.format else ""
        part.rejected(gate)
        parts.append(part)
        found.append(gate)
    judge([(source.name, gate) for source, gate in zip(given, found, strict=True)], on_bad_row, max_bad_share)
    if not rows:
        raise DataError([no_rows(given[0].name)])
    report(
        report_as or field, summary(task, parts, "characters"), [gate.rejects for gate in found if gate.rejects], work
    )
    return rows


def judge(found: Sequence[tuple[str, Gate]], on_bad_row: OnBadRow, max_bad_share: float) -> None:
    """Raise DataError with what the gates of all sources found, if it stops the work.

    The share of bad rows is each source's own: in the sum, a large source would hide a small one that is all bad.
    """
    if on_bad_row == "error":
        whole = Gate()
        for _, gate in found:
            whole.add(gate)
        whole.judge()
    problems: list[str] = []
    for name, gate in found:
        try:
            gate.judge(on_bad_row, max_bad_share, name)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def report(field: str, found: dict[str, Any], rejects: Sequence[Path], work: Work) -> None:
    """Say what a field's rows were, and leave the report and the rejected rows for the artifact."""
    if os.environ.get("RANK", "0") != "0":
        return
    for source in found["sources"]:
        bad = f", {source['bad']:,} left out (rejects.jsonl)" if source["bad"] else ""
        rows = f"{source['rows']:,} row{'s' * (source['rows'] != 1)}"
        work.log(step=0, total=0, note=f"{source['name']} read as {source['format']}: {rows}{bad}")
    for note in found["notes"]:
        work.log(step=0, total=0, warning=note)
    reports = work.report_rows(field, found)
    (work.out / "report.md").write_text("\n".join(map(markdown, reports.values())), encoding="utf-8")
    lines = [path.read_text(encoding="utf-8") for path in rejects if path.is_file()]
    if any(lines):
        name = "rejects.jsonl" if field in ("data", "prompts") else f"rejects-{field}.jsonl"
        (work.out / name).write_text("".join(lines), encoding="utf-8")


# --- rows as token ids ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The encoded rows of one source, and what the gate found in it."""

    source: Source
    table: datasets.Dataset
    gate: Gate
    format: str
    rejects: Path

    def column(self, name: str) -> Any:
        import numpy

        return numpy.asarray(self.table.data.column(name).to_numpy())

    @property
    def counts(self) -> Any:
        """Which rows count at all: a pair that weighs 0 is neither learnt nor held out."""
        import numpy

        weighed = "weight" in self.table.column_names
        return self.column("weight") > 0 if weighed else numpy.ones(len(self.table), bool)

    def part(self, trained_on: int | None) -> Part:
        columns = {ours: self.column(mark) for mark, ours in MARKS.items() if ours}
        part = Part(self.source.name, self.format, weight=self.source.weight, trained_on=trained_on, **columns)
        part.rejected(self.gate)
        return part


def encode(
    given: Sequence[Source],
    task: Task,
    tokenizer: Any,
    work: Work,
    *,
    max_length: int | None,
    loss_on: Literal["assistant", "all"] = "assistant",
    vocabulary: int | None = None,
) -> list[Entry]:
    """Return each source encoded, from the cache where it is there."""
    from align_pipeline.data.chat import Encoder

    encoder = Encoder(task, tokenizer, max_length=max_length, loss_on=loss_on, vocabulary=vocabulary)
    by = tokenizer_digest(tokenizer)
    # A tokenizer that cannot be told from another is at least the same one whenever this work goes on.
    folder = (work.cache if by else work.scratch) / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for source in given:
        key = {
            "rows": source.resolved.digest,
            "side": source.side,
            "name": source.name,
            "task": task,
            "format": source.format,
            "columns": dict(source.columns),
            "weight_column": source.weight_column,
            "tokenizer": by,
            "max_length": max_length,
            "loss_on": loss_on,
            "vocabulary": encoder.vocabulary,
            "code": code_digest(),
        }
        path = folder / canonical_digest(key).removeprefix("sha256:")[:24]
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks, or runs, want the same rows: one encodes, all read
            entry = _load(path, source)
            if entry:
                work.log(step=0, total=0, note=f"{source.name}: rows from the cache")
            else:
                if path.exists():
                    what = f"its entry in the cache is damaged ({path.name}), it is discarded and made again"
                    work.log(step=0, total=0, note=f"{source.name}: {what}")
                    shutil.rmtree(path)
                _make(path, source, task, encoder)
                entry = _load(path, source)
                assert entry, f"{path} was just made"
        entries.append(entry)
    return entries


def _make(path: Path, source: Source, task: Task, encoder: Encoder) -> None:
    """Encode a source into a folder that is there whole or not at all."""
    import pyarrow

    making = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    gate = Gate(making / "rejects.jsonl")
    scan = source.scan(task)
    schema = _schema(task)
    try:
        with pyarrow.OSFile(str(making / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for batch, rejects in encoded(gate.take(scan), encoder, task):
                writer.write_batch(batch)
                gate.take_back(rejects)
        gate.close()
        files = {name: file_sha256(making / name) for name in ENTRY_FILES if (making / name).is_file()}
        found = {**gate.found(), "format": scan.format.name if scan.format else "", "files": files}
        write_json(making / "gate.json", {**found, "digest": canonical_digest(found)})
        making.rename(path)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _load(path: Path, source: Source) -> Entry | None:
    """Return an entry of the cache; None when it is not there, or not as it was made."""
    import datasets

    try:
        found = json.loads((path / "gate.json").read_text(encoding="utf-8"))
        digest = found.pop("digest")
        if digest != canonical_digest(found) or any(
            file_sha256(path / name) != of for name, of in found["files"].items()
        ):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    table = datasets.Dataset.from_file(str(path / "rows.arrow"))
    for name in ("margin", "weight"):
        if name in table.column_names and table.data.column(name).null_count == len(table):
            table = table.remove_columns(name)
    gate = Gate(**{name: found[name] for name in Gate().found()})
    return Entry(source, table, gate, found["format"], path / "rejects.jsonl")


Batch = tuple["pyarrow.RecordBatch", list[Reject]]


def encoded(rows: Iterator[Row], encoder: Encoder, task: Task) -> Iterator[Batch]:
    """Yield encoded chunks in the order of the rows: by this process, or by as many as there are cores."""
    from align_pipeline.data.processes import in_order

    def chunk(some: list[Row]) -> Batch:  # forked, a child has the tokenizer already
        return encode_chunk(some, encoder, task)

    first = list(islice(rows, ALONE))
    for start in range(0, len(first), CHUNK):
        yield chunk(first[start : start + CHUNK])
    yield from in_order(chunk, iter(lambda: list(islice(rows, CHUNK)), []))


def encode_chunk(rows: Iterable[Row], encoder: Encoder, task: Task) -> Batch:
    """Return the rows that can be encoded as a table, and the others."""
    import pyarrow

    from align_pipeline.data.chat import lengths
    from align_pipeline.data.load import place
    from align_pipeline.data.rows import content_hash, record
    from align_pipeline.data.sources import Bad

    schema = _schema(task)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    rejects = []
    for row in rows:
        try:
            encoded, cut = encoder(row)
        except Bad as bad:
            rejects.append(Reject(row.where, bad.cause, bad.problem, record(row)))
            continue
        marks = {
            "_line": address.read(row.where),
            "_content": content_hash(row),
            "_sign": sign(row),
            "_dialect": dialect(row),
            "_system": system(row),
            "_place": place(row),
            "_longest": max(read := lengths(encoded)),
            "_tokens": sum(read),
            "_cut": cut,
        }
        for name, values in columns.items():
            values.append(marks[name] if name in marks else encoded.get(name))
    return pyarrow.RecordBatch.from_pydict(columns, schema=schema), rejects


def _schema(task: Task) -> pyarrow.Schema:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    pair = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}
    names = {
        "preference": {**pair, "margin": pyarrow.float64(), "weight": pyarrow.float64()},
        "prompt": {"prompt_ids": ids},
        "unpaired": {"prompt_ids": ids, "completion_ids": ids, "label": pyarrow.bool_()},
    }.get(task, {"input_ids": ids, "labels": ids})
    whole = pyarrow.int64()
    small = pyarrow.int8()
    kinds = {"_sign": small, "_dialect": small, "_system": small, "_place": pyarrow.float64()}
    marks = {mark: kinds.get(mark, whole) for mark in MARKS}
    return pyarrow.schema([pyarrow.field(name, kind) for name, kind in {**names, **marks}.items()])


# --- keys -------------------------------------------------------------------------------------------------------------


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return the digest of all that decides the ids of a text; None for a tokenizer that does not show it."""
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    shape = [type(tokenizer).__name__, transformers.__version__, backend.to_str(), settings, special]
    return "sha256:" + hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """Return the digest of the code that reads and encodes rows: another version of it makes other entries."""
    from align_pipeline import data

    folder = Path(data.__path__[0])
    files = [*sorted(folder.glob("*.py")), folder.parent / "stages" / "reading.py"]
    return canonical_digest({path.name: file_sha256(path) for path in files})


# --- split and mixture ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What a stage trains on and what it is judged by, as token ids."""

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    tokens: int
    """Of the training rows."""
    truncated: int
    """Rows whose end was cut off at `max_length`."""

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "rows": float(len(self.train)),
            "held_out_rows": float(len(self.held_out)),
            "tokens": float(self.tokens),
            "truncated": float(self.truncated),
        }


def first(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return the first rows, of a list or of a table."""
    return [rows[index] for index in range(min(count, len(rows)))]


def split(entries: Sequence[Entry], held_out: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return for each source the numbers of its rows to train on, and of those held out.

    A row's side, and whether a weight below 1 takes it, depend on its content alone: adding rows moves none. The whole
    part of a weight repeats the rows; held-out rows are never repeated. Pairs that weigh 0 are in neither.
    """
    import numpy

    from align_pipeline.data.load import border

    counting = [numpy.flatnonzero(entry.counts) for entry in entries]
    places = [entry.column("_place")[numbers] for entry, numbers in zip(entries, counting, strict=True)]
    line = border([float(value) for value in numpy.unique(numpy.concatenate(places))] if places else [], held_out)
    train, held = [], []
    for entry, numbers, at in zip(entries, counting, places, strict=True):
        whole, part = divmod(entry.source.weight, 1)
        taken = _share(entry.column("_content")[numbers], seed) < part
        mine = at >= line
        train.append(numpy.sort(numpy.concatenate([*[numbers[mine]] * int(whole), numbers[mine & taken]])))
        held.append(numbers[~mine & (taken | (whole >= 1))])
    return train, held


def _share(contents: Any, seed: int) -> Any:
    """Return for each row a number in [0, 1) that depends on its content and the seed (splitmix64's mixing)."""
    import numpy

    mixed = contents.astype(numpy.uint64) + numpy.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> numpy.uint64(31))) >> numpy.uint64(11)).astype(numpy.float64) / 2.0**53


def pick(entries: Sequence[Entry], numbers: Sequence[Any]) -> Any:
    """Return rows of several sources as one table without its marks."""
    import datasets

    tables = []
    for entry, wanted in zip(entries, numbers, strict=True):
        table = entry.table.remove_columns(list(MARKS))
        tables.append(table if len(wanted) == len(table) == len(set(wanted)) else table.select(wanted))
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _unused(entry: Entry, trained_on: int) -> str | None:
    """Say why a source has no rows to train on; None when it has some, or all of them are held out."""
    from align_pipeline.data.load import no_rows

    rows, weight = len(entry.table), entry.source.weight
    if not rows:
        return no_rows(entry.source.name)
    if not entry.counts.any():
        rule = "a pair that weighs 0 is not learnt; give one a weight above 0, or remove weight_column"
        return f"{entry.source.name}: {entry.source.weight_column} is 0 in every row, {rule}"
    if trained_on or weight >= 1:
        return None
    what = (
        f"data_weights: {weight:g} leaves none of {rows:,} row{'s' * (rows != 1)} to train on, each is drawn by chance"
    )
    return f"{entry.source.name}: {what}; raise it, or leave the source out"


def check_margins(entries: Sequence[Entry]) -> None:
    """Refuse pairs of which some say by how much they differ and others do not."""
    import numpy

    from align_pipeline.data.chat import NO_MARGIN

    known = [
        entry.table.data.column("margin").is_valid().to_numpy()
        if "margin" in entry.table.column_names
        else numpy.zeros(len(entry.table), bool)
        for entry in entries
    ]
    if not any(one.any() for one in known):
        return
    for entry, one in zip(entries, known, strict=True):
        if not one.all():
            where = f"{entry.source.name}:{address.shown(int(entry.column('_line')[int(numpy.argmin(one))]))}"
            raise DataError([f"{where}: {NO_MARGIN}"])


def prepared(
    data: Sequence[Entry],
    evaluation: Sequence[Entry],
    work: Work,
    *,
    task: Task,
    held_out: float,
    seed: int,
    on_bad_row: OnBadRow,
    max_bad_share: float,
) -> Rows:
    """Judge, split, mix and report encoded rows."""
    import numpy

    every = [*data, *evaluation]
    judge([(entry.source.name, entry.gate) for entry in every], on_bad_row, max_bad_share)
    check_margins(every)
    train, held = split(data, 0.0 if evaluation else held_out, seed)
    if problems := [said for entry, numbers in zip(data, train, strict=True) if (said := _unused(entry, len(numbers)))]:
        raise DataError(problems)
    trained = pick(data, train)
    judged = pick(evaluation, [numpy.flatnonzero(one.counts) for one in evaluation]) if evaluation else pick(data, held)
    parts = [entry.part(len(numbers)) for entry, numbers in zip(data, train, strict=True)]
    parts += [entry.part(0) for entry in evaluation]
    found = summary(task, parts, "tokens")
    if idle := sum(int((~entry.counts).sum()) for entry in every):
        found["notes"].append(f"{idle:,} {'pair weighs 0 and is' if idle == 1 else 'pairs weigh 0 and are'} not learnt")
    report("data", found, [entry.rejects for entry in every if on_bad_row == "skip"], work)
    tokens = sum(int(entry.column("_tokens")[numbers].sum()) for entry, numbers in zip(data, train, strict=True))
    cut = sum(int((entry.column("_cut")[numbers] > 0).sum()) for entry, numbers in zip(data, train, strict=True))
    return Rows(trained, judged, tokens, cut)
