"""The gate: bad rows are counted by cause, shown by their first addresses, kept where asked, and judged."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.gate import Gate, Reject, by_cause
from align_pipeline.data.load import scan
from align_pipeline.data.rows import Example, Row
from align_pipeline.pipeline.errors import DataError


def mixed(counts: dict[str, int], good: int = 0) -> Iterator[Row | Reject]:
    """Yield rejects of each cause in turn, then rows that pass; lines count up."""
    line = 0
    left = dict(counts)
    while any(left.values()):
        for cause in [cause for cause, count in left.items() if count]:
            left[cause] -= 1
            line += 1
            yield Reject(f"a:{line}", cause, f"{cause} is wrong")
    yield from (Example(f"a:{line + more}", "q", "yes") for more in range(1, good + 1))


def filled(counts: dict[str, int], good: int = 0) -> Gate:
    gate = Gate()
    assert len(list(gate.take(mixed(counts, good)))) == good
    return gate


# What is counted and shown.


def test_what_a_file_holds_is_counted_by_cause(tmp_path: Path) -> None:
    """A story with a real file: 7 pairs of one cause, 2 of another, 14 that can be used."""
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [pair | {"rejected": "yes"} if line % 3 == 0 else pair for line in range(1, 22)]
    rows += [pair | {"chosen": ""}, pair | {"chosen": " "}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = Gate()
    passed = list(gate.take(scan(tmp_path / "a.jsonl", "preference")))
    assert [int(row.where.split(":")[1]) for row in passed] == [line for line in range(1, 22) if line % 3]
    assert (gate.rows, gate.bad, gate.causes) == (14, 9, {"equal sides": 7, "empty": 2})
    equal = "chosen: equals rejected, a pair must differ; drop the row or fix the log"
    remedy = "must hold text; fill it in or drop the row"
    empty = [f"a.jsonl:22: chosen: empty, {remedy}", f"a.jsonl:23: chosen: blank, {remedy}"]
    assert gate.first == {"equal sides": [f"a.jsonl:{line}: {equal}" for line in (3, 6, 9, 12, 15)], "empty": empty}
    assert gate.problems() == [*(f"a.jsonl:{line}: {equal}" for line in range(3, 22, 3)), *empty]
    assert list(by_cause(gate.causes, gate.first)) == [
        "equal sides: 7 rows", *(f"  a.jsonl:{line}: {equal}" for line in (3, 6, 9, 12, 15)), "  ... and 2 more",
        "empty: 2 rows", *(f"  {line}" for line in empty),
    ]  # fmt: skip


@pytest.mark.parametrize(("few", "many"), [(20, 21), (1, 22)])
def test_few_bad_rows_are_listed_as_they_come_and_more_by_cause(few: int, many: int) -> None:
    counts = {"one": few // 2, "two": few - few // 2}
    listed = filled(counts, good=1000).problems()
    assert [line.split(":")[1] for line in listed] == [str(line) for line in range(1, few + 1)]
    head, *lines = filled({"one": 1, "two": many - 1}, good=979).problems()
    assert head == f"{many} of {many + 979:,} rows cannot be used"
    assert lines == [
        f"two: {many - 1} rows", *(f"  a:{line}: two is wrong" for line in range(2, 7)), f"  ... and {many - 6} more",
        "one: 1 row", "  a:1: one is wrong",
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_bad_rows() -> None:
    gate = filled({"one": 150_000, "two": 49_999, "three": 1}, good=10)
    assert (gate.rows, gate.bad) == (10, 200_000)
    assert gate.causes == {"one": 150_000, "two": 49_999, "three": 1}
    assert {cause: len(lines) for cause, lines in gate.first.items()} == {"one": 5, "two": 5, "three": 1}
    assert len(gate.listed) == 20 and len(gate.problems()) == 1 + 7 + 7 + 2
    assert gate.problems()[0] == "200,000 of 200,010 rows cannot be used"


# What is judged.


def test_every_bad_row_is_an_error_unless_they_are_skipped() -> None:
    gate = filled({"empty": 2}, good=98)
    with pytest.raises(DataError) as caught:
        gate.judge()
    assert caught.value.problems == ("a:1: empty is wrong", "a:2: empty is wrong")
    with pytest.raises(DataError):
        gate.judge("error", 1.0)
    gate.judge("skip", 1.0)
    filled({}, good=1).judge()
    Gate().judge("skip")


@pytest.mark.parametrize(
    ("bad", "good", "share"), [(1, 9, 0.1), (3, 27, 0.1), (1, 2, 1 / 3), (7, 93, 0.07), (5, 0, 1.0)]
)
def test_the_share_that_is_allowed_is_allowed(bad: int, good: int, share: float) -> None:
    filled({"empty": bad}, good).judge("skip", share)
    with pytest.raises(DataError) as caught:
        filled({"empty": bad}, good).judge("skip", share - 0.001)
    *rows, last = caught.value.problems
    assert rows == [f"a:{line}: empty is wrong" for line in range(1, bad + 1)]
    rule = f"max_bad_share allows {share - 0.001:.3g}; mend the file, or raise max_bad_share"
    assert last == f"{100 * bad / (bad + good):.1f}% of the rows are bad, {rule}"


# Several sources, and what is kept.


def test_what_was_found_is_plain_and_can_be_gone_on_from() -> None:
    gate = filled({"one": 7, "two": 2}, good=3)
    again = Gate(**json.loads(json.dumps(gate.found())))
    assert again == gate and again.problems() == gate.problems()
    again.reject(Reject("a:13", "two", "late"))
    assert (again.causes, again.first["two"][-1]) == ({"one": 7, "two": 3}, "a:13: late")


def test_gates_of_several_sources_add_up_in_the_order_of_the_sources() -> None:
    whole = Gate()
    for name, counts in (("b", {"one": 3}), ("c", {"two": 1, "one": 16}), ("d", {"one": 4})):
        gate = Gate()
        list(gate.take(Reject(f"{name}:{row.where[2:]}", row.cause, row.problem) for row in mixed(counts)))  # type: ignore[union-attr]
        gate.rows = 10
        whole.add(gate)
    assert (whole.rows, whole.bad, whole.causes) == (30, 24, {"one": 23, "two": 1})
    assert [line.split(": ")[0] for line in whole.first["one"]] == ["b:1", "b:2", "b:3", "c:2", "c:3"]
    assert whole.first["two"] == ["c:1: two is wrong"]
    assert [line.split(": ")[0] for line in whole.listed] == [
        *(f"b:{line}" for line in range(1, 4)), *(f"c:{line}" for line in range(1, 18)),
    ]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


def test_rejected_rows_are_kept_as_json_whatever_stood_there(tmp_path: Path) -> None:
    kept: list[tuple[Any, Any]] = [  # what stood there, and what the file says of it
        ({"prompt": "é", "chosen": 3}, {"prompt": "é", "chosen": 3}),
        (["q"], ["q"]),
        (None, None),
        ({"text": "half \ud83d"}, {"text": "half \ud83d"}),
        ({"at": datetime.date(2026, 1, 31)}, {"at": "2026-01-31"}),
        ({"image": b"\xff"}, {"image": r"b'\xff'"}),
        ({"text": nested(100_000)}, None),
        ({"number": 10**5000}, None),
        ({("a", "key"): 1}, None),
        ({"margin": [math.nan, -math.inf]}, {"margin": ["NaN", "-Infinity"]}),
    ]
    gate = Gate(tmp_path / "rejects.jsonl")
    list(gate.take(Reject(f"a:{line}", "empty", "text: empty", row) for line, (row, _) in enumerate(kept, 1)))
    content = (tmp_path / "rejects.jsonl").read_bytes()
    assert content.isascii() and content.count(b"\n") == len(kept)
    assert [json.loads(line) for line in content.splitlines()] == [
        {"where": f"a:{line}", "cause": "empty", "problem": "text: empty", "row": row}
        for line, (_, row) in enumerate(kept, 1)
    ]


def test_no_file_is_made_without_a_bad_row_or_without_being_asked(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "rejects.jsonl")
    assert len(list(gate.take(mixed({}, good=3)))) == 3
    assert filled({"one": 1}).rejects is None
    assert not list(tmp_path.iterdir())


def test_an_error_holds_every_cause_with_its_addresses() -> None:
    gate = Gate()
    list(gate.take(Reject(f"a:{n}", f"cause {n % 25}", "x: wrong") for n in range(1000)))
    with pytest.raises(DataError) as caught:
        gate.judge()
    said = str(caught.value).splitlines()
    assert said[0] == "1,000 of 1,000 rows cannot be used" and len(said) == 1 + 25 * 7
    assert [line for line in said if line.startswith("cause")] == [f"cause {n}: 40 rows" for n in range(25)]
