"""Real rows with known damage: every damaged row is named by line and cause, no other is refused, nothing crashes."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from corrupt import (
    ALL,
    ARROW,
    DAMAGES,
    FIELDS,
    SHARED,
    Corrupt,
    any_bytes,
    anything,
    make,
    whole,
    write_array,
    write_bytes,
    write_lines,
)
from datasets import Dataset

from align_pipeline.data.formats import FORMATS
from align_pipeline.data.gate import Gate, Reject
from align_pipeline.data.load import scan
from align_pipeline.data.report import Part, summary
from align_pipeline.data.rows import Row, Task, content_hash, record
from align_pipeline.pipeline.errors import AlignError, DataError, InputError

REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data beside the checkout")
SEEDS = (0, 1, 2)


# The corpus is what it says, by other means than those that are tested.


def plain_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if path.suffix == ".zst":
        return pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd").read()
    return content


def right_lines(path: Path, base: str) -> set[int]:
    """Return the lines where a row with all its fields stands, judged as simply as can be."""
    if path.is_dir() or path.suffix == ".parquet":
        if path.is_dir():
            with pyarrow.memory_map(str(next(path.glob("*.arrow")))) as file:
                table = pyarrow.ipc.open_stream(file).read_all()
        else:
            table = pyarrow.parquet.read_table(path)
        columns = [column.combine_chunks() for column in table.columns]
        plain = [column.view("binary") if column.type == "string" else column for column in columns]
        records = dict(enumerate(pyarrow.table(plain, table.column_names).to_pylist(), 1))
    elif any(suffix in (".csv", ".tsv") for suffix in path.suffixes):
        text = plain_bytes(path).decode("utf-8-sig", "replace")
        table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        header, records, line = next(table), {}, 2
        for cells in table:
            values = [cell or None for cell in cells]
            records[line] = dict(zip(header, values, strict=True)) if len(cells) == len(header) else {}
            line = table.line_num + 1
    elif path.suffix == ".json":
        return set(range(1, plain_bytes(path).count(b"\n") + 1))  # no simple way to tell where a row begins
    else:
        records = {}
        for number, line in enumerate(plain_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            try:
                records[number] = json.loads(line)
            except (ValueError, RecursionError):
                records[number] = None
    return {
        number
        for number, record in records.items()
        if isinstance(record, dict) and all(record.get(field) is not None for field in FIELDS[base])
    }


@REAL
def test_the_corpus_is_what_it_says(tmp_path: Path) -> None:
    files = make(tmp_path, 7, 60)
    kinds = {finding.kind for file in files for finding in file.findings}
    assert kinds == {damage.kind for damage in DAMAGES} | {"repeated row"}
    assert len(kinds) >= 25
    for file in files:
        right = right_lines(file.path, file.base)
        spoilt = {finding.line for finding in file.findings if finding.cause != "duplicate"}
        assert file.path.suffix == ".json" or len(right - spoilt) == file.rows, file.path.name
        absent = {finding.line for finding in file.findings if finding.cause in ("missing field", "broken JSON")}
        if file.path.suffix != ".json":
            assert not [line for line in absent & right if file.base in ("examples", "pairs", "ids")], file.path.name
        if file.ends:
            assert len(file.findings) == 1
    array = next(file for file in files if file.path.name == "examples-7.json")
    lines = array.path.read_text("utf-8", "replace").split("\n")
    for finding in array.findings:
        if finding.kind == "answer is a boolean":
            start = "\n".join(lines[finding.line - 1 :]).lstrip("[, \n")
            assert json.JSONDecoder().raw_decode(start)[0]["completion"] is True


# The check names what is wrong, and nothing else.


def read_all(file: Corrupt) -> tuple[list[Row], list[Reject]]:
    rows, rejects = [], []
    for item in scan(file.path, file.task):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            rows.append(item)
    return rows, rejects


def line_of(where: str, file: Corrupt) -> int:
    name, _, line = where.rpartition(":")
    assert name == file.path.name
    return int(line.partition("[")[0])  # several rows of an array may begin on one line


def differences(file: Corrupt) -> list[str]:
    """Return how what was found differs from what is wrong with the file."""
    try:
        rows, rejects = read_all(file)
    except Exception as error:  # what went wrong belongs beside the other files' differences
        return [f"{file.path.name}: {type(error).__name__}: {error}"]
    wrong = [finding for finding in file.findings if finding.cause != "duplicate"]
    expected = Counter((finding.line, finding.cause) for finding in wrong)
    named = Counter((line_of(reject.where, file), reject.cause) for reject in rejects)
    kinds = {(finding.line, finding.cause): finding.kind for finding in wrong}
    found = [f"{file.path.name}:{line}: not named: {kinds[line, cause]}, {cause}" for line, cause in expected - named]
    unexpected = named - expected
    found += [
        f"named: {reject.cause}: {reject}"
        for reject in rejects
        if (line_of(reject.where, file), reject.cause) in unexpected
    ]
    if len(rows) > file.rows or (len(rows) < file.rows and not file.ends):
        found.append(f"{file.path.name}: {len(rows)} rows, there are {file.rows}")
    lines = [line_of(row.where, file) for row in rows]
    # Only in an array may rows stand in one line.
    if lines != sorted(lines) or (file.path.suffix != ".json" and {line for line, _ in expected} & {*lines}):
        found.append(f"{file.path.name}: rows with the addresses of others")
    part = Part(file.path.name)
    for row in rows:
        part.add(row)
    repeated = summary(file.task, [part], "characters")["duplicates"]
    again = [f"{file.path.name}:{finding.line}" for finding in file.findings if finding.cause == "duplicate"]
    if [first.partition(": ")[0].partition("[")[0] for first in repeated["first"]] != again or repeated["rows"] != len(
        again
    ):
        found.append(f"{file.path.name}: {repeated} are the duplicates, but {again} are")
    return found[:20]


@REAL
@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_damaged_row_is_named_and_no_other(seed: int, suffix: str, tmp_path: Path) -> None:
    files = make(tmp_path, seed, suffixes=[suffix])
    assert sum(len(file.findings) for file in files) >= 70, "the corpus has shrunk"
    assert sum(file.rows for file in files) >= 700
    found = [difference for file in files for difference in differences(file)]
    assert not found, "\n".join(found)


@REAL
@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst", ".csv.gz"))
def test_a_file_that_was_cut_off_gives_what_stands_before(suffix: str, tmp_path: Path) -> None:
    draw = random.Random(suffix)
    file = whole(tmp_path, "ids", suffix, 5)
    rows, rejects = read_all(file)
    assert len(rows) == file.rows == 200
    assert not rejects
    content = file.path.read_bytes()
    for at in draw.sample(range(1, len(content)), 20):
        file.path.write_bytes(content[:at])
        try:
            some, bad = read_all(file)
        except AlignError:
            assert at < 30, "only what holds no row at all is refused as a whole"
            continue
        begun = sum(line_of(row.where, file) <= content[:at].count(b"\n") + 1 for row in rows)
        if suffix.endswith((".gz", ".zst")):
            assert [reject.cause for reject in bad] == ["broken file"]
        else:
            assert begun - 1 <= len(some) + len(bad) <= begun + 1
            assert len(bad) <= 1
        assert some == rows[: len(some)]
        if bad and some:
            assert line_of(bad[0].where, file) > line_of(some[-1].where, file)


# Nothing else happens, whatever a file holds.


SENSIBLE: dict[str, Any] = {
    "prompt": "2 + 2?",
    "completion": "4",
    "chosen": "4",
    "rejected": "5",
    "text": "2 + 2 = 4",
    "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
    "chosen_messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    "rejected_messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],
    "instruction": "Add.",
    "input": "2 + 2",
    "output": "4",
    "label": True,
    "margin": 1.5,
    "finish": "stop",
    "prompt_ids": [1, 2],
    "completion_ids": [3],
    "chosen_ids": [3],
    "rejected_ids": [4],
}


def odd_records(task: Task, draw: random.Random, each: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield for each format of a task records with anything in one of their fields, or in a few."""
    for form in FORMATS[task]:
        records = []
        for field in form.fields:
            for _ in range(each):
                record = {key: SENSIBLE.get(key) for key in form.required} | {field: anything(draw)}
                if draw.random() < 0.2:
                    record[draw.choice(form.fields)] = anything(draw)
                if draw.random() < 0.1:
                    record = anything(draw)
                records.append(record)
        draw.shuffle(records)
        yield form.name, records


def outcome(path: Path, task: Task, form: str | None, rejects: Path | None = None) -> tuple[int, int]:
    """Read a file, hold the contract, and return how many rows passed and how many were rejected."""
    gate = Gate(rejects)
    if rejects:
        rejects.unlink(missing_ok=True)
    passed = []
    try:
        for row in gate.take(scan(path, task, format=form)):
            assert isinstance(row, get_args(Row)), row
            passed.append(row)
    except AlignError as error:
        assert isinstance(error, InputError | DataError), error
        assert path.name in str(error)
    gate.close()
    str(gate.problems())
    for row in passed:
        content_hash(row)
    again = path.with_name("again.jsonl")
    if passed and len({type(row) for row in passed}) == 1:
        again.write_text("".join(json.dumps(record(what(row))) + "\n" for row in passed), "utf-8")
        number = 0
        for number, (row, read_again) in enumerate(zip(passed, scan(again, task), strict=True), 1):
            assert what(row) == what(read_again), f"line {number}: {row} became {read_again}"
        assert number == len(passed)
    if rejects and rejects.is_file():
        lines = rejects.read_text("utf-8").splitlines()
        assert len(lines) == gate.bad
        assert all(isinstance(json.loads(line)["cause"], str) for line in lines)
    return gate.rows, gate.bad


def what(row: Row) -> Row:
    """Return a row without its address and the columns that stood beside a prompt."""
    return replace(row, where="", **({"extra": {}} if hasattr(row, "extra") else {}))


def any_value(folder: Path, task: Task, draw: random.Random, each: int) -> None:
    total = [0, 0]
    for form, records in odd_records(task, draw, each):
        for named in (None, form):
            for path in (folder / "odd.jsonl", folder / "odd.json", folder / "odd.csv"):
                if path.suffix == ".jsonl":
                    write_lines(path, records, draw)
                elif path.suffix == ".json":
                    write_array(path, records, draw)
                else:
                    write_odd_table(path, records)
                rows, bad = outcome(path, task, named, folder / "rejects.jsonl")
                total[0] += rows
                total[1] += bad
    assert min(total) > 2 * each, f"{total}: rows that pass and rows that do not"


def write_odd_table(path: Path, records: list[Any]) -> None:
    columns = sorted({key for one in records if isinstance(one, dict) for key in one if key.isidentifier()})
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for one in records:
            if isinstance(one, dict):
                cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in one.items()}
                writer.writerow(cells)


@pytest.mark.parametrize("task", get_args(Task))
def test_any_value_in_any_field_is_a_row_or_a_reject(task: Task, tmp_path: Path) -> None:
    any_value(tmp_path, task, random.Random(f"values {task}"), 12)


@pytest.mark.slow
@pytest.mark.parametrize("task", get_args(Task))
@pytest.mark.parametrize("seed", range(3))
def test_many_values_in_any_field_are_rows_or_rejects(seed: int, task: Task, tmp_path: Path) -> None:
    any_value(tmp_path, task, random.Random(f"{seed} {task}"), 120)


SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.zst"),
    *(".jsonl.zst", ".txt.gz", ".parquet.gz", ".gz", ".zst", ".zip", "", ".JSONL", ".jsonl.GZ"),
)


def any_file(folder: Path, draw: random.Random) -> tuple[int, int]:
    """Write a file of any bytes under any name and read it for any task."""
    path = folder / f"any{draw.choice(SUFFIXES)}"
    content = any_bytes(draw)
    if draw.random() < 0.5 and path.suffix in (".gz", ".zst"):
        write_bytes(path, content)
        content = path.read_bytes()
    path.write_bytes(content)
    task = draw.choice(get_args(Task))
    try:
        return outcome(path, task, draw.choice((None, draw.choice(FORMATS[task]).name)))
    except Exception as error:
        error.add_note(f"{path.name} of {content!r}, task {task}")
        raise
    finally:
        path.unlink()


def any_files(folder: Path, draw: random.Random, count: int) -> None:
    counts = [any_file(folder, draw) for _ in range(count)]
    assert sum(rows > 0 for rows, _ in counts) > count // 100
    assert sum(bad > 0 for _, bad in counts) > count // 10


def test_any_bytes_under_any_name_are_rows_or_rejects(tmp_path: Path) -> None:
    any_files(tmp_path, random.Random("bytes"), 1500)


@pytest.mark.slow
def test_many_bytes_under_any_name_are_rows_or_rejects(tmp_path: Path) -> None:
    any_files(tmp_path, random.Random("more bytes"), 60_000)


def damaged_files(folder: Path, draw: random.Random, suffix: str, each: int) -> None:
    """Cut right files off at any place, or change some of their bytes, and read them."""
    for base in ("chats", "pairs"):
        file = whole(folder, base, suffix, 11, 60)
        content = file.path.read_bytes()
        for _ in range(each):
            changed = bytearray(content)
            if draw.random() < 0.5:
                del changed[draw.randrange(len(changed)) :]
            for _ in range(draw.randrange(4)):
                if changed:
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
            file.path.write_bytes(changed)
            outcome(file.path, file.task, None)


@REAL
@pytest.mark.parametrize("suffix", (*(suffix for suffix in ALL if suffix not in ARROW), ".parquet"))
def test_damaged_files_are_rows_or_rejects(suffix: str, tmp_path: Path) -> None:
    damaged_files(tmp_path, random.Random(suffix), suffix, 15)


UNREADABLE = ("text that is not UTF-8", "years beyond 9999", "durations")
"""What Python cannot hold at all."""


@REAL
def test_a_damaged_folder_is_rows_or_rejects(tmp_path: Path) -> None:
    draw = random.Random("folder")
    file = whole(tmp_path, "chats", "", 11, 60)
    for part in sorted(file.path.iterdir()):
        content = part.read_bytes()
        for at in (0, *draw.sample(range(1, len(content)), 8), None):
            if at is None:
                part.unlink()
            else:
                part.write_bytes(content[:at])
            outcome(file.path, "sft", None)
        part.write_bytes(content)
    assert outcome(file.path, "sft", None) == (60, 0)


def odd_columns() -> dict[str, pyarrow.Array]:
    """Return columns of two values that no JSON has, or that hold what they should not."""
    moment = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    not_utf8 = pyarrow.array([b"caf\xe9", b"\xed\xa0\xbd"], pyarrow.binary())
    return {
        "bytes": pyarrow.array([b"4", b"\xff"]),
        "text that is not UTF-8": pyarrow.StringArray.from_buffers(2, *not_utf8.buffers()[1:]),
        "times": pyarrow.array([moment, None]),
        "dates": pyarrow.array([moment.date(), None]),
        "nanoseconds": pyarrow.array([1, 10**18], pyarrow.timestamp("ns")),
        "years beyond 9999": pyarrow.array([2**60, 1], pyarrow.timestamp("ms")),
        "durations": pyarrow.array([1, 2**60], pyarrow.duration("ms")),
        "decimals": pyarrow.array([decimal.Decimal("1.5"), None]),
        "halves": pyarrow.array([1.5, float("nan")], pyarrow.float32()),
        "dictionary": pyarrow.array(["4", "5"]).dictionary_encode(),
        "large text": pyarrow.array(["4", None], pyarrow.large_string()),
        "map": pyarrow.array([[("role", "user")], None], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        "empty objects": pyarrow.array([{"a": None}, None], pyarrow.struct({"a": pyarrow.null()})),
        "nothing": pyarrow.nulls(2),
        "fixed lists": pyarrow.array([[1, 2], None], pyarrow.list_(pyarrow.int8(), 2)),
        "lists of nothing": pyarrow.array([[None], []]),
        "unsigned": pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
        "booleans": pyarrow.array([True, None]),
    }


@pytest.mark.parametrize("suffix", ARROW)
@pytest.mark.parametrize("kind", odd_columns())
def test_any_column_of_an_arrow_file_is_rows_or_rejects(kind: str, suffix: str, tmp_path: Path) -> None:
    if kind == "map" and not suffix:
        pytest.skip("datasets has no maps")
    odd = odd_columns()[kind]
    right = {
        "prompt": ["2 + 2?", "3 + 3?"],
        "completion": ["4", "6"],
        "label": [True, False],
        "messages": [SENSIBLE["messages"]] * 2,
        "id": [1, 2],
    }
    formats: dict[Task, tuple[str, ...]] = {
        "sft": ("prompt", "completion"),
        "unpaired": ("messages", "label"),
        "prompt": ("prompt",),
    }
    for task, fields in formats.items():
        for field in (*fields, "id"):
            columns = {key: odd if key == field else pyarrow.array(right[key]) for key in (*fields, "id")}
            path = tmp_path / f"{task}-{field}{suffix}"
            if suffix:
                pyarrow.parquet.write_table(pyarrow.table(columns), path)
            else:
                Dataset(pyarrow.table(columns)).save_to_disk(path)
            rows, bad = outcome(path, task, None, tmp_path / "rejects.jsonl")
            if field == "id" and kind not in UNREADABLE:
                assert (rows, bad) == (2, 0), "a column that changes nothing cannot be wrong"
            assert rows + bad in (0, 2)
