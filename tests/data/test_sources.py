"""Sources: every kind of file gives the same rows at the right lines, and each damage is told where it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data import address, json_text, sources
from align_pipeline.data.rows import Task
from align_pipeline.data.sources import MAX_ROW_BYTES, Bad, dataset_rows, open_source
from align_pipeline.pipeline.errors import InputError

BOM = b"\xef\xbb\xbf"


def packed(content: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(content)
    if compression == ".zst":
        import pyarrow

        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return content


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, compressed as its name says."""
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(packed(raw, path.suffix))
    return path


def told(path: Path, task: Task = "text") -> list[tuple[int | str, Any]]:
    """Return the line and the record of each row; of a Bad `cause: problem`."""
    return [
        (line if line < 2**32 else address.shown(line), f"{one.cause}: {one.problem}" if isinstance(one, Bad) else one)
        for line, one in open_source(path, path.name, task)
    ]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(open_source(path, path.name, "text"))
    return str(caught.value)


# Every kind of file, however compressed.

RECORDS = [{"prompt": "2 + 2?", "completion": "4 日本"}, {"prompt": 'two\nlines, "quoted"\u2028', "completion": "😀"}]
COMPACT = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
WRITTEN = {  # what stands in the file, and the lines of its rows
    ".jsonl": ("\n\r\n" + COMPACT[0] + "\r\n  \n" + COMPACT[1], [3, 5]),
    ".ndjson": ("\n".join(COMPACT) + "\n\n", [1, 2]),
    ".json": (json.dumps(RECORDS, indent=2, ensure_ascii=False), [2, 6]),
    ".csv": ('\nprompt,completion\n2 + 2?,4 日本\n\n"two\nlines, ""quoted""\u2028",😀\n\n', [3, 5]),
    ".tsv": ('prompt\tcompletion\r\n2 + 2?\t4 日本\r\n"two\nlines, ""quoted""\u2028"\t😀', [2, 3]),
}


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "BOM"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_kind_of_file_gives_the_same_rows(suffix: str, compression: str, mark: bytes, tmp_path: Path) -> None:
    content, lines = WRITTEN[suffix]
    path = write(tmp_path / f"a{suffix.upper()}{compression}", mark + content.encode())
    assert told(path) == list(zip(lines, RECORDS, strict=True))


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_text_has_a_row_on_each_line_that_is_not_blank(compression: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.txt{compression}", BOM + b"  one \r\n\n \t\ntwo\xe2\x80\xa8half")
    assert told(path) == [(1, {"text": "  one "}), (4, {"text": "two\u2028half"})]
    assert told(path, "prompt")[1] == (4, {"prompt": "two\u2028half"})
    with pytest.raises(InputError, match=rf"a.txt{compression}: .txt holds plain text, task sft needs fields; use"):
        open_source(path, path.name, "sft")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files_may_be_joined(compression: str, tmp_path: Path) -> None:
    """As by `cat a.gz b.gz`, each with its byte order mark, a line running over the border."""
    parts = [BOM + b'{"a": 1}\n' + BOM + b'{"a', b'": 2}\n', BOM + b'{"a": 3}\n']
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b"".join(packed(part, compression) for part in parts))
    assert told(path) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]


def test_parquet_datasets_on_disk_and_on_the_hub(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, load_dataset

    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    records = [{"messages": turns, "ids": [n, 2], "meta": {"rank": n, "note": None}} for n in range(600)]
    expected = list(enumerate(records, 1))
    dataset = Dataset.from_list(records)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.with_format("numpy").save_to_disk(tmp_path / "saved")  # the format of who saved it is not ours
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "train.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    hub = load_dataset(str(tmp_path / "repo"), split="train", cache_dir=str(tmp_path / "cache"))
    streamed = load_dataset(str(tmp_path / "repo"), split="train", streaming=True)
    assert told(tmp_path / "a.parquet") == told(tmp_path / "saved") == expected
    assert list(dataset_rows(hub)) == list(dataset_rows(streamed)) == expected

    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    assert refusal(tmp_path / "both") == (
        f"both: holds the splits train, test; name one of them: {tmp_path / 'both' / 'train'}"
    )


# Bad rows: the line, the cause and the whole message; the rows around them are there.

ONE_LINE = "each line must be one JSON object"
UTF8 = "rows are read as UTF-8; save the file as UTF-8"
DROP = f"{ONE_LINE}; fix the line or drop it"
PYTHON = "was it written by str() of Python? write it with json.dumps"
CUT = r"write the row again if it was cut off, a line break in a text as \n"
BAD_LINES: list[tuple[str | bytes, str]] = [
    ('{"a": 1}{"a": 2}', f"broken JSON (a second object at column 9), {ONE_LINE}; put each object on a line of its "
     "own, without commas"),
    ('{"a": 1},', f"broken JSON (a comma after the object at column 9), {ONE_LINE}; remove the comma"),
    ('{"a": 1} x', f"broken JSON (Extra data at column 10), {DROP}"),
    ('{"a": 1', f"broken JSON (the line ends inside a row at column 8), {ONE_LINE}; write the row again, it was cut "
     "off"),
    ('{"a": "one', f"broken JSON (the line ends inside a text at column 7), {ONE_LINE}; {CUT}"),
    ("[", f"broken JSON (the line ends inside a row at column 2), {ONE_LINE}; write each row on one line, or name the "
     "file .json if it is an array"),
    ("{'a': 1}", f"broken JSON (a single quote at column 2), {ONE_LINE}; {PYTHON}"),
    ('{"a": None}', f"broken JSON (a word of Python at column 7), {ONE_LINE}; {PYTHON}"),
    ('{"a": [True]}', f"broken JSON (a word of Python at column 8), {ONE_LINE}; {PYTHON}"),
    ('{"a": nan}', f"broken JSON (a word of Python at column 7), {ONE_LINE}; {PYTHON}"),
    ('{"a": 1} // note', f"broken JSON (a comment at column 10), {ONE_LINE}; JSON has no comments, remove it"),
    ("# note", f"broken JSON (a comment at column 1), {ONE_LINE}; JSON has no comments, remove it"),
    ('{"a": "say "hi" now"}', f"broken JSON (text after a closing quote at column 13), {ONE_LINE}; write quotes inside "
     'a text as \\"'),
    ("{“a”: 1}", f'broken JSON (a typographic quote at column 2), {ONE_LINE}; write straight double quotes (")'),
    ('{"a": "one\ttwo"}', "broken JSON (a line break, tab or other control character in a text at column 11), "
     rf"{ONE_LINE}; write it as \n, \t or \u0000"),
    (r'{"a": "\alpha"}', rf"broken JSON (Invalid \escape at column 8), {ONE_LINE}; write a backslash as \\"),
    ("\0" * 9, f"broken JSON (a NUL byte at column 1), {ONE_LINE}; the copy or the disk lost what stood there, write "
     "it again or drop it"),
    ("hello", f"broken JSON (Expecting value at column 1), {DROP}"),
    ('{"a":' * 5_000, f"unusable JSON (nested too deeply), {DROP}"),
    ("[" * 100_000, f"unusable JSON (nested too deeply), {DROP}"),
    ('{"a": ' + "9" * 5_000 + "}", f"unusable JSON (a number of thousands of digits), {DROP}"),
]  # fmt: skip
BAD_VALUES: list[tuple[str | bytes, str]] = [  # of an array they spoil one element too
    ('{"prompt": "a", "completion": "b", "prompt": "c"}',
     "duplicate key: prompt: stands twice in one object, a key may stand once; rename or remove one"),
    ('{"m": [{"role": "user"}, {"role": "user", "role": "user"}]}',
     "duplicate key: m[1].role: stands twice in one object, a key may stand once; rename or remove one"),
    ('{"": {"a\\n": 1, "a\\n": 1}}',
     "duplicate key: ''.'a\\n': stands twice in one object, a key may stand once; rename or remove one"),
    ('{"margin": NaN}', "not a number: margin: NaN, a number must be finite; write null or leave it out"),
    ('{"a": [0, {"b": -Infinity}]}',
     "not a number: a[1].b: -Infinity, a number must be finite; write null or leave it out"),
    ('{"a": [], "b": [NaN, Infinity], "c": NaN}',
     "not a number: b[0]: NaN, a number must be finite; write null or leave it out"),
    ('{"a": 1e999}', "not a number: a: 1e999, a number must be finite; write null or leave it out"),
    (b'{"caf\xc3\xa9": "caf\xe9"}', f"encoding: not UTF-8 (byte 0xe9 at column 14), {UTF8}"),
    (b'{"a": "\xed\xa0\xbd"}', f"encoding: not UTF-8 (byte 0xed at column 8), {UTF8}"),
]  # fmt: skip


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize(
    ("bad", "message"), [*((bad, f"broken JSON: {message}") for bad, message in BAD_LINES), *BAD_VALUES],
    ids=lambda value: repr(value[:30])
)  # fmt: skip
def test_a_bad_line_spoils_no_other(bad: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n' + as_bytes(bad) + b'\n{"a": 4}\n')
    assert told(path) == [(1, {"a": 1}), (3, message), (4, {"a": 4})]


def test_trailing_commas_have_one_name(tmp_path: Path) -> None:
    """The column is that of the comma or of what follows it, as the version of Python has it."""
    path = write(tmp_path / "a.jsonl", '{"a": 1, }\n{"a": [1,]}\n')
    for (_, message), closing in zip(told(path), "}]", strict=True):
        assert message.startswith(f"broken JSON: broken JSON (a comma before {closing} at column ")
        assert message.endswith(f"), {ONE_LINE}; remove the comma")


@pytest.mark.parametrize(("bad", "message"), BAD_VALUES, ids=lambda value: repr(value[:30]))
@pytest.mark.parametrize("small", [False, True])
def test_a_bad_value_spoils_one_element_of_an_array(
    bad: str | bytes, message: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(sources, "_PIECE", 3)
        monkeypatch.setattr(json_text, "_WINDOW_BYTES", 3)
    path = write(tmp_path / "a.json", b'[\n{"a": 1},\n' + as_bytes(bad) + b', {"a": 3},\n{"a": 4}]\n')
    assert told(path) == [(2, {"a": 1}), (3, message), ("3[2]", {"a": 3}), (4, {"a": 4})]


def test_the_end_of_a_number_may_not_have_been_read_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE", 1)
    monkeypatch.setattr(json_text, "_WINDOW_BYTES", 1)
    assert told(write(tmp_path / "a.json", "[12, 3.5e2 ,\nnull,-6]")) == [
        (1, 12),
        ("1[1]", 350.0),
        (2, None),
        ("2[3]", -6),
    ]


HERE_ON = "fix the file from here on"
NO_ARRAY = "broken JSON: not a JSON array, a .json file holds [row, row, ...]"
LINES = "name it .jsonl when each line is a row"
BROKEN_ARRAYS: list[tuple[str | bytes, int, str]] = [  # what stands after `[{"a": 1},\n`
    ('{"b": 1 "c": 2}, {}]', 2, f"broken JSON: broken JSON (Expecting ',' delimiter at column 9); {HERE_ON}"),
    ("{'b': 1}]", 2, f"broken JSON: broken JSON (a single quote at column 2), nothing is read after it; {PYTHON}"),
    ("]", 2, "broken JSON: broken JSON (a comma before ] at column 1), nothing is read after it; remove the comma"),
    ('\n{"b":', 3, "broken JSON: broken JSON (the file ends inside a row at column 6), nothing is read after it; write "
     "the row again, it was cut off"),
    ('{\n"b": "cut', 3, "broken JSON: broken JSON (the file ends inside a text at column 6), nothing is read after it; "
     + CUT),
    ('{"b": "a\nb"}]', 2, "broken JSON: broken JSON (a line break, tab or other control character in a text at column "
     r"9), nothing is read after it; write it as \n, \t or \u0000"),
    (b'"\xc3\xa9", \xff {"b": 1}]', 2, f"encoding: not UTF-8 (byte 0xff at column 6), {UTF8}"),
    ('{}\n{"b": 1}]', 3, f"broken JSON: broken JSON (the array does not go on with , or ]); {HERE_ON}"),
    ("{}\n", 3, f"broken JSON: broken JSON (the array does not go on with , or ]); {HERE_ON}"),
    ("{}]\n[{}]", 3, "broken JSON: something stands after the array's ], a .json file holds one array; join them or "
     "use .jsonl"),
    ("[" * 5_000, 2, f"broken JSON: unusable JSON (nested too deeply); {HERE_ON}"),
    ("[" + "9" * 5_000 + "], {}]", 2, f"broken JSON: unusable JSON (a number of thousands of digits); {HERE_ON}"),
]  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("rest", "line", "message"), BROKEN_ARRAYS, ids=lambda value: repr(value)[:30])
def test_a_broken_array_ends_where_it_is_broken(
    rest: str | bytes, line: int, message: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(sources, "_PIECE", 1)
        monkeypatch.setattr(json_text, "_WINDOW_BYTES", 1)
    rows = told(write(tmp_path / "a.json", b'[{"a": 1},\n' + as_bytes(rest)))
    assert rows[0] == (1, {"a": 1})
    assert rows[-1] == (line, message)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ('{"a": 1}', f"{LINES}, or put [ ] around it"),
        ('{"a": 1}\n{"a": 2}\n', LINES),
        ('{"a": 1}\n{"a": 2\n', LINES),
        ('{"data": [{"a": 1}], "version": 2}', f"write the list under data alone if it holds the rows, or {LINES}"),
        ('{"train": [{}], "test": [{}]}', f"write one of its lists alone if it holds the rows, or {LINES}"),
        ('{"a": {"0": "x", "1": "y"}}', 'it holds columns: write rows, as with to_json(orient="records") of pandas'),
        ('{"a": 1', f"write the list of rows alone, or {LINES}"),
        ("<html>", LINES),
        ('"text"', LINES),
    ],
)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "BOM"])
def test_a_json_file_that_is_no_array_is_not_guessed_at(content: str, remedy: str, mark: bytes, tmp_path: Path) -> None:
    assert told(write(tmp_path / "a.json", mark + content.encode())) == [(1, f"{NO_ARRAY}; {remedy}")]


def test_an_object_around_many_rows_is_not_held_in_memory(tmp_path: Path) -> None:
    row = json.dumps({"text": "a" * 1000})
    path = write(tmp_path / "a.json", '{"data": [' + ",".join([row] * 20_000) + "]}")
    tracemalloc.start()
    try:
        assert told(path) == [(1, f"{NO_ARRAY}; write the list of rows alone, or {LINES}")]
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size * 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", WRITTEN)
def test_files_without_rows(suffix: str, tmp_path: Path) -> None:
    for content in ("", "\n", " \n\n"):
        assert told(write(tmp_path / f"a{suffix}", content)) == []
    assert told(write(tmp_path / "a.json", " [ ] ")) == []
    assert told(write(tmp_path / "a.csv", "prompt,completion\n")) == []


@pytest.mark.parametrize("suffix", [*WRITTEN, ".txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}.gz", '{"a": 1}\n'.encode(encoding))
    assert told(path) == [(1, f"encoding: not UTF-8 (UTF-16), {UTF8}")]


# Tables.

BROKEN = "broken table: "
DOUBLED = f'write quotes inside a quoted cell twice (""), and {HERE_ON}'
BROKEN_TABLES: list[tuple[bytes, list[tuple[int, Any]]]] = [  # what stands after `a,b`, and what is told
    (b"1,2,3\n4,5", [(2, BROKEN + "3 cells in a row, the header has 2; quote the cell that holds a comma"),
                     (3, {"a": "4", "b": "5"})]),
    (b"1\n4,5", [(2, BROKEN + "1 cell in a row, the header has 2; write empty cells too, and quote the cell that holds "
                  "a line break"), (3, {"a": "4", "b": "5"})]),
    (b"\n  \n,\n4,5", [(4, {"a": None, "b": None}), (5, {"a": "4", "b": "5"})]),
    (b'"x\ny",z\n1,"never\nclosed,\n4,5\n', [(2, {"a": "x\ny", "b": "z"}),
     (4, f"{BROKEN}broken row (the quote opened here is never closed); {DOUBLED}")]),
    (b'"x\ny",z\n"p\nq","r ""s"" t\n" u,v\n4,5\n', [(2, {"a": "x\ny", "b": "z"}),
     (5, f"{BROKEN}broken row (text after a closing quote); {DOUBLED}")]),
    (b"1,2\r3,4\r", [(2, BROKEN + "broken row (a carriage return without a line feed); save the file with line feeds "
                      rf"(\n), and {HERE_ON}")]),
    (b'1,\xc3\xa9\xe9\n"x\n",\xff\n4,5', [(2, f"encoding: not UTF-8 (byte 0xe9 at column 4), {UTF8}"),
     (4, f"encoding: not UTF-8 (byte 0xff at column 3), {UTF8}"), (5, {"a": "4", "b": "5"})]),
    (b"1,\0\n4,5", [(2, BROKEN + "a NUL byte at column 3, cells hold text; write the row again or drop it"),
                    (3, {"a": "4", "b": "5"})]),
]  # fmt: skip


@pytest.mark.parametrize(("rest", "rows"), BROKEN_TABLES, ids=lambda value: repr(value)[:30])
def test_broken_tables(rest: bytes, rows: list[tuple[int, Any]], tmp_path: Path) -> None:
    assert told(write(tmp_path / "a.csv", b"a,b\n" + rest)) == rows
    tabbed = [(line, row.replace("a comma", "a tab") if isinstance(row, str) else row) for line, row in rows]
    assert told(write(tmp_path / "a.tsv", b"a\tb\n" + rest.replace(b",", b"\t"))) == tabbed


NAMES = "the first line must name the columns"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a,b,a", "a: names columns 1 and 3, names must differ; rename one"),
        (",a", f"column 1 has no name, {NAMES}; name it, or drop it (an index of pandas: to_csv(index=False))"),
        ("a, ", f"column 2 has no name, {NAMES}; name it, or drop it (an index of pandas: to_csv(index=False))"),
        ('{"a": 1}', f"column 1 is named by a whole text ('{{\"a\": 1}}'...), {NAMES}; write such a line"),
        ("a," + "b" * 201, f"column 2 is named by a whole text ('{'b' * 20}'...), {NAMES}; write such a line"),
        ("a;b", "one column named 'a;b', a comma must stand between cells; save it with commas"),
        ("a\tb", "one column named 'a\\tb', a comma must stand between cells; save it with commas"),
    ],
)  # fmt: skip
def test_a_header_that_names_no_columns(header: str, message: str, tmp_path: Path) -> None:
    assert told(write(tmp_path / "a.csv", f"\n{header}\n1,2\n")) == [(2, BROKEN + message)]


# Damage.

MANY = [{"text": f"row {number}", "é": "日" * (number % 50)} for number in range(3_000)]


def many(suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(MANY, indent=0, ensure_ascii=False).encode()
    if suffix == ".csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([list(MANY[0]), *(list(row.values()) for row in MANY)])
        return file.getvalue().encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in MANY).encode()


@pytest.mark.parametrize(("compression", "name"), [(".gz", "gzip"), (".zst", "zstd")])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_cut_short_gives_the_rows_before_the_cut(
    suffix: str, compression: str, name: str, tmp_path: Path
) -> None:
    whole = told(write(tmp_path / f"whole{suffix}", many(suffix)))
    assert len(whole) == len(MANY)
    content = packed(many(suffix), compression)
    path = tmp_path / f"a{suffix}{compression}"
    seen = set()
    for tenth in range(1, 10):
        path.write_bytes(content[: len(content) * tenth // 10])
        *rows, (line, message) = told(path)
        assert rows == whole[: len(rows)]
        assert line == whole[len(rows)][0] or (line == 1 and not rows), "the line of the row that is lost"
        what = f"the {name} file is cut short, nothing can be read from here on; write or copy it again"
        assert message == f"broken file: {what}"
        seen.add(len(rows))
    assert len(seen) > 1 and max(seen) > 1_000


def test_a_cut_gzip_file_gives_every_whole_line(tmp_path: Path) -> None:
    content = gzip.compress(many(".jsonl"))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    out = subprocess.run(["gzip", "-dc", str(path)], capture_output=True).stdout
    assert len(told(path)) - 1 == out.count(b"\n") > 100


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_corrupt_is_no_traceback(suffix: str, compression: str, tmp_path: Path) -> None:
    content = packed(many(suffix), compression)
    path = tmp_path / f"a{suffix}{compression}"
    generator, broken = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(10, len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        last = told(path)[-1][1]
        assert compression == ".zst" or isinstance(last, str), "gzip has a checksum: no damage stays unseen"
        broken += str(last).startswith("broken file: ")
    assert broken


def test_a_character_that_is_cut_is_no_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"a": 1},\n\xc3')[:-8])
    what = "the gzip file is cut short, nothing can be read from here on; write or copy it again"
    assert told(tmp_path / "a.json.gz") == [(1, {"a": 1}), (2, f"broken file: {what}")]


def test_a_wrong_checksum_is_told_after_the_last_row(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    content[-5] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    *rows, (line, message) = told(tmp_path / "a.jsonl.gz")
    assert rows == [(1, {"a": 1}), (2, {"a": 2})] and line == 3
    assert message.startswith("broken file: the gzip file is corrupt: ")


def test_something_behind_a_zstd_file_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(packed(b"one\n" * 50_000, ".zst") + b"garbage")
    *rows, (line, message) = told(tmp_path / "a.txt.zst")
    assert len(rows) > 48_000 and line == len(rows) + 1
    assert message.startswith("broken file: the zstd file is corrupt: ZSTD decompress failed")


def test_names_that_do_not_fit_the_file(tmp_path: Path) -> None:
    choice = "use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt or a folder; text files may end in .gz or .zst too"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    cases = {
        "a.jsonl.gz": (b"rows", "named .gz but not compressed so (it begins with b'rows'); rename or compress it"),
        "a.csv.zst": (b"", "named .zst but not compressed so (it is empty); rename or compress it"),
        "b.jsonl": (gzip.compress(b"{}"), "compressed but not named so; add .gz to its name"),
        "b.json": (packed(b"[]", ".zst"), "compressed but not named so; add .zst to its name"),
        "c.jsonl": (lfs, "a pointer of Git LFS, not the file itself; run git lfs pull"),
        "c.parquet": (lfs, "a pointer of Git LFS, not the file itself; run git lfs pull"),
        "a.parquet.gz": (b"", "a Parquet file inside another compression, Parquet compresses by itself; decompress it "
                         "(gzip -d a.parquet.gz)"),
        "a.tar.gz": (b"", f"suffix .tar.gz is not readable; {choice}"),
        "a.gz": (b"", f"suffix .gz is not readable; {choice}"),
        "a.jsonl.bz2": (b"", f"suffix .bz2 is not readable; {choice}"),
        "rows": (b"", f"suffix missing is not readable; {choice}"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name) == f"{name}: {message}"
    for name in ("no.jsonl", "no.csv.gz", "no.parquet", "no.xlsx"):
        with pytest.raises(FileNotFoundError):
            list(open_source(tmp_path / name, name, "text"))


def test_damaged_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"text": os.urandom(40).hex()} for _ in range(4_000)])
    parquet.write_table(table, path, row_group_size=1_000, use_dictionary=False)
    whole = path.read_bytes()
    assert len(told(path)) == 4_000

    for content in (b"", b"not Parquet at all", b"PAR1" + bytes(100), whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(content)
        message = refusal(path)
        assert message.startswith("a.parquet: not a readable Parquet file (")
        assert message.endswith("); write or copy it again") and "\n" not in message

    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(len(whole) // 4) + whole[middle + len(whole) // 4 :])
    *rows, (line, problem) = told(path)
    assert 0 < len(rows) < 3_000 and line == len(rows) + 1
    assert problem.startswith("broken file: the Parquet file is corrupt: ")


def test_parquet_columns_that_cannot_be_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"text": text}), path)
    bad = f"encoding: not UTF-8 (byte 0xe9 at column 4), {UTF8}"
    assert told(path) == [(1, {"text": "one"}), (2, bad), (3, {"text": "three"})]
    parquet.write_table(pyarrow.Table.from_arrays([raw, raw], names=["a", "a"]), path)
    assert refusal(path) == "a.parquet: a names two columns, names must differ; rename one"


def test_damaged_folders(tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_list([{"text": "one"}] * 500).save_to_disk(folder)
    for part in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        whole = (folder / part).read_bytes()
        (folder / part).write_bytes(whole[: len(whole) // 2])
        message = refusal(folder)
        assert message.startswith("saved: not a whole folder of Dataset.save_to_disk (")
        assert message.endswith("); save or copy it again")
        (folder / part).write_bytes(whole)
    assert len(told(folder)) == 500
    (folder / "dataset_dict.json").write_text("{")
    assert refusal(folder).startswith("saved: dataset_dict.json in it names no splits; ")


# Size.


def gzipped(path: Path, *parts: tuple[bytes, int]) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part, times in parts:
            for _ in range(times):
                file.write(part)
    return path


HUGE = (b"a" * 2**20, 2 * (MAX_ROW_BYTES >> 20))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_line_that_is_too_large_is_stepped_over(suffix: str, tmp_path: Path) -> None:
    path = gzipped(tmp_path / f"a{suffix}.gz", (b'{"text": "one"}\n', 1), HUGE, (b"\n", 1), (b'{"text": "three"}', 1))
    tracemalloc.start()
    try:
        (first, _), second, (third, _) = told(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_ROW_BYTES * 1.2
    finally:
        tracemalloc.stop()
    what = "a line of more than 64 MiB, a row must be smaller; split it or drop it"
    assert (first, third) == (1, 3) and second == (2, f"too large: {what}")


def test_a_line_may_be_large(tmp_path: Path) -> None:
    parts = ((b'{"text": "', 1), (b"a" * 2**20, (MAX_ROW_BYTES >> 20) - 1), (b'"}\n{}\n', 1))
    (_, large), last = open_source(gzipped(tmp_path / "a.jsonl.gz", *parts), "a", "text")
    assert len(large["text"]) == MAX_ROW_BYTES - 2**20 and last == (2, {})


def test_a_row_that_is_too_large_ends_an_array_or_a_table(tmp_path: Path) -> None:
    rest = f"split it, and {HERE_ON}"
    path = gzipped(tmp_path / "a.json.gz", (b'[{},\n{"a": "', 1), HUGE, (b'"}, {}]', 1))
    assert told(path) == [(1, {}), (2, f"too large: a row of more than 64 MiB, a row must be smaller; {rest}")]
    rule = "a row must be smaller (is a quoted cell not closed?)"
    for part in (b"a" * 2**20, b"a" * (2**20 - 1) + b"\n"):
        path = gzipped(tmp_path / "a.csv.gz", (b'a\n1\n"', 1), (part, HUGE[1]), (b'"\n2\n', 1))
        assert told(path) == [(2, {"a": "1"}), (3, f"too large: a row of more than 64 MiB, {rule}; {rest}")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    row = {"prompt": "a" * 400, "completion": "b" * 400}
    line = "".join(row.values()) if ".txt" in name else json.dumps(row)
    count, joint = 20_000, ",\n" if ".json" in name and "jsonl" not in name else "\n"
    content = joint.join([line] * count)
    if joint != "\n":
        content = f"[{content}]"
    if name == "a.csv":
        content = "prompt,completion\n" + "\n".join([",".join(row.values())] * count)
    path = write(tmp_path / name, content)
    if name.endswith(".zst"):
        import pyarrow  # noqa: F401  what it needs itself is not counted
    tracemalloc.start()
    try:
        assert sum(isinstance(record, dict) for _, record in open_source(path, name, "text")) == count
        assert tracemalloc.get_traced_memory()[1] < 3_000_000 < len(content) / 5
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"text": os.urandom(500).hex()} for _ in range(40_000)])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10**6)
    script = (
        "import sys, pyarrow; from pathlib import Path; from align_pipeline.data.sources import open_source\n"
        "print(sum(1 for _ in open_source(Path(sys.argv[1]), 'a', 'text')), pyarrow.default_memory_pool().max_memory())"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "a.parquet")]
    count, peak = map(int, subprocess.run(run, capture_output=True, check=True, text=True).stdout.split())
    assert count == 40_000 and peak < 15_000_000


@pytest.mark.parametrize(
    ("name", "first", "rest"),
    [
        ("a.jsonl", b'{"a": "1"}\n', b'{"a": "2"}\n'),
        ("a.csv", b"a\n1\n", b"2\n"),
        ("a.json", b'[{"a": "1"},' + b" " * 2**17, b'{"a": "2"}]'),
    ],
)
def test_the_first_row_comes_before_the_end_of_the_file_is_written(
    name: str, first: bytes, rest: bytes, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    asked = threading.Event()

    def write_slowly() -> None:
        with (tmp_path / name).open("wb", buffering=0) as file:
            file.write(first)
            assert asked.wait(20), "the first row was not yielded"
            file.write(rest)

    writer = threading.Thread(target=write_slowly)
    writer.start()
    rows = open_source(tmp_path / name, name, "text")
    _, record = next(rows)
    assert record == {"a": "1"} and not asked.is_set()
    asked.set()
    assert [record for _, record in rows] == [{"a": "2"}]
    writer.join()


# Pieces: where the file is cut for reading changes nothing.


def texts(generator: random.Random) -> Iterator[str]:
    while True:
        signs = ["a", "é", "日", "😀", "\n", "\\", '"', "\u2028", ",", "[", "}", "1e5", "\ud83d", "NaN", "\t"]
        yield "".join(generator.choices(signs, k=generator.randrange(20)))


def some_rows(generator: random.Random) -> list[dict[str, Any]]:
    text = texts(generator)
    return [
        {next(text): [next(text), {"a": {next(text): generator.random()}}, -12, None, True]}
        for _ in range(generator.randrange(1, 7))
    ]


def written(kind: str, rows: list[dict[str, Any]], generator: random.Random) -> bytes:
    ascii_only = generator.random() < 0.3
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if kind == "json":
        return ("[" + generator.choice([",", ",\n ", "\n,"]).join(lines) + "]").encode("utf-8", "replace")
    if kind == "csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["a", "b"], *([line, "x\ny"] for line in lines)])
        return file.getvalue().encode("utf-8", "replace")
    return "".join(line + generator.choice(["\n", "\r\n", "\n\n"]) for line in lines).encode("utf-8", "replace")


def damaged(content: bytes, generator: random.Random) -> bytes:
    at = generator.randrange(len(content))
    return generator.choice([
        content[:at],
        content[:at] + content[at + generator.randrange(9) :],
        content[:at] + generator.choice([b'"', b",", b"{", b"]", b"\n", b"\xff", b"NaN", b"\\", b"\0"]) + content[at:],
        content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :],
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_pieces_change_nothing_whatever_is_broken(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(kind)
    path = tmp_path / f"a.{kind}"
    for turn in range(150):
        rows = some_rows(generator)
        content = written(kind, rows, generator)
        if turn % 3:
            content = damaged(content, generator)
        path.write_bytes(content)
        whole = told(path)
        if not turn % 3:
            records = [json.loads(record["a"]) if kind == "csv" else record for _, record in whole]
            assert json.dumps(records, ensure_ascii=False).encode("utf-8", "replace") == json.dumps(
                rows, ensure_ascii=False
            ).encode("utf-8", "replace")
        for piece in (1, 5):
            with monkeypatch.context() as patch:
                patch.setattr(sources, "_PIECE", piece)
                patch.setattr(json_text, "_WINDOW_BYTES", piece)
                assert told(path) == whole


# Speed.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_rows_of_a_kilobyte_are_read_fast(name: str, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant of a shop. Answer politely. " * 2},
        {"role": "user", "content": "My parcel has not arrived yet, what can I do about it now? " * 5},
        {"role": "assistant", "content": "Please give me the number of your order, I will look it up. " * 8},
    ]
    rows = [json.dumps({"messages": turns, "id": number}) for number in range(20_000)]
    path = write(tmp_path / name, "\n".join(rows) if "jsonl" in name else "[" + ",\n".join(rows) + "]")
    start = time.process_time()
    count = sum(isinstance(record, dict) for _, record in open_source(path, name, "sft"))
    rate = count / (time.process_time() - start)
    assert count == len(rows) and rate > 80_000, f"{rate:,.0f} rows per CPU second"
