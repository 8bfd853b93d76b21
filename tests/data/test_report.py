"""The data report: duplicates, lengths, shares and notes, each against a number that is worked out another way."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.gate import Gate
from align_pipeline.data.load import scan
from align_pipeline.data.report import Part, Report, lines, markdown, summary
from align_pipeline.data.rows import (
    Chat,
    Example,
    ExampleIds,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Row,
    Task,
    Unpaired,
    content_hash,
)
from align_pipeline.data.show import histogram

# The parts of a report.


def part(rows: list[Row], name: str = "a", **more: Any) -> Part:
    made = Part(name, "preference", **more)
    for row in rows:
        made.add(row)
    return made


def of_lengths(lengths: list[int], name: str = "a", **more: Any) -> Part:
    return part([Prompt(f"{name}:{line}", "x" * length) for line, length in enumerate(lengths, 1)], name, **more)


def pair(line: int, chosen: str, rejected: str) -> Preference:
    return Preference(f"a:{line}", f"q{line}", chosen, rejected)


def thumb(line: int, label: bool) -> Unpaired:
    return Unpaired(f"a:{line}", f"q{line}", "yes", label)


def notes(task: str, *parts: Part) -> list[str]:
    return list(summary(task, parts, "characters")["notes"])


# Duplicates.


def test_duplicates_are_found_across_sources_with_the_address_of_the_earlier_one() -> None:
    def prompts(name: str, texts: str) -> Part:
        return part([Prompt(f"{name}:{10 * line}", text) for line, text in enumerate(texts, 1)], name)

    report = summary("prompt", [prompts("one", "abcb"), prompts("none", ""), prompts("two", "dabde")], "characters")
    assert report["duplicates"] == {
        "rows": 4,
        "first": [
            "one:40: says what one:20 says",
            "two:20: says what one:10 says",
            "two:30: says what one:20 says",
            "two:40: says what two:10 says",
        ],
    }
    assert report["notes"] == ["4 rows say what an earlier row says; each counts each time"]
    many = summary("prompt", [prompts("one", "a" * 1000)], "characters")["duplicates"]
    assert many["rows"] == 999 and len(many["first"]) == 5
    assert many["first"][4] == "one:60: says what one:10 says"
    assert notes("prompt", prompts("one", "aa")) == ["1 row says what an earlier row says; each counts each time"]
    assert summary("prompt", [prompts("one", "abc")], "characters")["duplicates"] == {"rows": 0, "first": []}


def test_a_hash_of_content_says_what_and_not_where() -> None:
    def said(*parts: str) -> tuple[Message, ...]:
        return tuple(Message("user" if index % 2 == 0 else "assistant", part) for index, part in enumerate(parts))

    same = [Chat("a:1", said("q", "yes")), Chat("b:2", said("q", "yes"))]
    assert content_hash(same[0]) == content_hash(same[1])
    assert content_hash(Prompt("a:1", "q", {"n": 1})) == content_hash(Prompt("a:1", "q", {"n": 2}))
    different: list[Row] = [
        Chat("a", said("ab", "c")), Chat("a", said("a", "bc")), Chat("a", said("abc")), Chat("a", said("a", "b", "c")),
        Chat("a", (Message("user", "ab"), Message("user", "c"))), Chat("a", said("assistant", "user")),
        Chat("a", said("ab\x00", "c")), Chat("a", said("ab", "\x00c")), Chat("a", said("é", "c")),
        Example("a", "ab", "c"), Example("a", "a", "bc"), Example("a", "ab", "c", "length"), Example("a", "c", "ab"),
        Example("a", said("ab"), said("c")), ExampleIds("a", (1, 2), (3,)), ExampleIds("a", (1,), (2, 3)),
        ExampleIds("a", (12,), (3,)), PreferenceIds("a", (1,), (2,), (3,)), PreferenceIds("a", (1,), (3,), (2,)),
        Preference("a", "q", "yes", "no"), Preference("a", "q", "no", "yes"), Preference("a", "q", "yes", "no", 1.0),
        Unpaired("a", "ab", "c", True), Unpaired("a", "ab", "c", False), Prompt("a", "ab"), Prompt("a", "ab\n"),
        Prompt("a", "(1,)"), PromptIds("a", (1,)),
    ]  # fmt: skip
    assert len({content_hash(row) for row in different}) == len(different)


def test_a_hundred_thousand_rows_have_as_many_hashes() -> None:
    """Short texts of few letters: many rows differ only in where one part ends and the next begins."""
    draw = random.Random(0)
    texts = set()
    while len(texts) < 100_000:
        texts.add(tuple("".join(draw.choices("ab ", k=draw.randint(1, 12))) for _ in range(2)))
    hashes = {content_hash(Example("a:1", prompt, answer)) for prompt, answer in texts}
    assert len(hashes) == 100_000 and all(-(2**63) <= one < 2**63 for one in hashes)


# Lengths.

ODD = {
    "one": [7],
    "two": [1, 2],
    "equal": [5] * 41,
    "odd": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
    "skewed": [length**3 for length in range(1, 60)],
    "one huge": [2] * 99 + [50_000],
}


@pytest.mark.parametrize("name", ODD)
def test_as_many_rows_as_it_says_are_no_longer_than_a_percentile(name: str) -> None:
    lengths = list(ODD[name])
    random.Random(1).shuffle(lengths)
    half = len(lengths) // 2
    report = summary("prompt", [of_lengths(lengths[:half]), of_lengths(lengths[half:])], "tokens")["lengths"]
    ordered = sorted(lengths)
    assert report == {
        "unit": "tokens",
        "total": sum(lengths),
        "mean": round(statistics.fmean(lengths), 1),
        "min": min(lengths),
        **{f"p{share}": ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (5, 50, 95, 99)},
        "max": max(lengths),
    }


def test_a_pair_is_two_sequences_and_a_row_of_ids_is_its_ids() -> None:
    turns = (Message("user", "four"), Message("assistant", "yes"))
    cases: list[tuple[Row, list[int]]] = [
        (Preference("a:1", "four", "yes", "no"), [4 + 3, 4 + 2]),
        (PreferenceIds("a:1", (9, 9), (1,), (2, 2, 2)), [2 + 1, 2 + 3]),
        (Chat("a:1", turns), [7]),
        (Example("a:1", turns[:1], turns[1:]), [7]),
        (ExampleIds("a:1", (), (1, 2)), [2]),
        (Unpaired("a:1", "four", "yes", True), [7]),
    ]
    for row, read in cases:
        made = part([row])
        assert (list(made.lengths), list(made.totals)) == ([max(read)], [sum(read)])


def test_the_histogram_counts_every_row_once() -> None:
    lengths = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 1024, 1025, *random.Random(3).choices(range(4000), k=500)]
    found = [re.fullmatch(r" *up to ([\d,]+) +([\d,]+)(?:  (█+))?", line) for line in histogram(lengths)]
    bars = [(int(one[1].replace(",", "")), int(one[2].replace(",", "")), len(one[3] or "")) for one in found if one]
    assert len(bars) == len(found) and [top for top, *_ in bars] == [2**power for power in range(13)]
    for top, count, bar in bars:
        assert count == sum((top // 2 if top > 1 else -1) < length <= top for length in lengths)
        assert (bar > 0) == (count > 0) and bar <= 40
    assert sum(count for _, count, _ in bars) == len(lengths) and max(bar for *_, bar in bars) == 40
    assert list(histogram([])) == []
    assert list(histogram([5, 100])) == [
        f"         up to 8          1  {'█' * 40}", "        up to 16          0", "        up to 32          0",
        "        up to 64          0", f"       up to 128          1  {'█' * 40}",
    ]  # fmt: skip


# Shares and notes.

LONGER = "the longer answer is chosen in {} of the pairs; a model may learn length instead of quality"
ONE_LABEL = "label: all rows are {}; learning what is liked needs both"


@pytest.mark.parametrize(
    ("longer", "shorter", "equal", "note"),
    [(13, 7, 0, "65%"), (13, 7, 90, "65%"), (19, 0, 0, None), (20, 0, 0, "100%"), (12, 8, 0, None), (7, 13, 0, None)],
)
def test_chosen_because_it_is_longer(longer: int, shorter: int, equal: int, note: str | None) -> None:
    sides = [("yes", "no")] * longer + [("no", "yes")] * shorter + [("yes", "not")] * equal
    report = summary("preference", [part([pair(line, *side) for line, side in enumerate(sides)])], "characters")
    assert report["longer_chosen"] == longer / (longer + shorter)
    assert report["notes"] == ([LONGER.format(note)] if note else [])
    assert f"chosen in {100 * longer / (longer + shorter):.1f}% of the pairs of unequal length." in markdown(report)


def test_what_is_liked() -> None:
    report = summary("unpaired", [part([thumb(line, line % 4 == 0) for line in range(100)])], "characters")
    assert report["liked"] == 0.25 and not report["notes"] and "25.0% of the answers were liked." in markdown(report)
    for label, word in ((True, "true"), (False, "false")):
        rows = part([thumb(line, label) for line in range(3)])
        assert notes("unpaired", rows) == [ONE_LABEL.format(word)]
        assert notes("unpaired", rows, part([thumb(9, not label)])) == []


def test_prompts_in_two_dialects() -> None:
    asked = (Message("user", "q"),)
    answer = (Message("assistant", "yes"),)
    plain = part([Example("a:1", "q", "yes"), Example("a:2", "q2", "yes")])
    turns = part([Example("b:1", asked, answer), Chat("b:2", (*asked, Message("assistant", "no")))], "b")
    ids = part([ExampleIds("c:1", (1,), (2,))], "c")
    assert notes("sft", plain, ids) == notes("sft", turns, ids) == []
    said = "prompts are messages and 2 plain text, which a model reads as two dialects; write all of them one way, "
    assert notes("sft", plain, turns, ids) == [f"2 {said}unless both will be asked"]


def test_what_rows_are_written_in() -> None:
    texts = {
        "Latin": ["Ja, naturlich.", "Où est-il?"],
        "Han": ["你好，再见 OK"],
        "Kana": ["お元気ですか、漢字"],
        "Cyrillic": ["Привет 1"],
    }
    rows = [Example("a:1", "ask", text) for group in texts.values() for text in group]
    turns = Chat("b:2", (Message("user", "q"), Message("assistant", "안녕하세요")))
    report = summary(
        "sft", [part([*rows, turns, Example("a:9", "ask", "42 + 1"), ExampleIds("c:1", (1,), (2,))])], "characters"
    )
    assert report["writing"] == {"Latin": 2, "Cyrillic": 1, "Hangul": 1, "Kana": 1, "Han": 1}
    assert next(iter(report["writing"])) == "Latin", "the most common comes first"
    assert "Written in Latin 2, " in markdown(report) and any("written in Latin 2, " in line for line in lines(report))
    ids = summary("sft", [part([ExampleIds("c:1", (1,), (2,))])], "tokens")
    assert "writing" not in ids and "ritten in" not in markdown(ids)


def test_what_is_cut_is_told_in_tokens() -> None:
    assert notes("prompt", of_lengths([1, 2, 3], cut=[0, 0, 0])) == []
    said = "rows are longer than max_length and lose their end ({} tokens); raise max_length to keep it"
    parts = [of_lengths([1, 2, 3], cut=[0, 700, 1]), of_lengths([4, 5], "b", cut=[0, 1300])]
    assert notes("prompt", *parts) == [f"3 {said.format('2,001')}"]
    assert summary("prompt", parts, "tokens")["cut"] == {"rows": 3, "tokens": 2001}


# For people.


def story(folder: Path) -> tuple[Report, Gate]:
    """Read 1,200 pairs and 30 bad ones from one file, 2 pairs and 4 bad ones from another."""
    good = [{"prompt": f"q{i}", "chosen": "yes" + "!" * (i % 7), "rejected": "no"} for i in range(1200)]
    bad = [{"prompt": "q", "chosen": "", "rejected": "no"}] * 29 + [good[0] | {"rejected": "yes"}]
    parts, whole = [], Gate()
    for name, records in (("big.jsonl", good + bad), ("small.jsonl", good[:2] + bad[:4])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        gate, made = Gate(), Part(name, "preference", weight=0.5, trained_on=600)
        for row in gate.take(scan(folder / name, "preference")):
            made.add(row)
        made.rejected(gate)
        whole.add(gate)
        parts.append(made)
    return summary("preference", parts, "characters"), whole


def test_lines_and_page_say_what_the_summary_says(tmp_path: Path) -> None:
    report, gate = story(tmp_path)
    assert json.loads(json.dumps(report)) == report
    lengths = report["lengths"]
    longer = [len(f"q{i}") + 3 + i % 7 for i in [*range(1200), 0, 1]]
    total = sum(longer) + sum(len(f"q{i}") + 2 for i in [*range(1200), 0, 1])
    assert (report["rows"], report["bad"], lengths["total"]) == (1202, 34, total)
    assert report["causes"] == {cause: {"rows": n, "first": gate.first[cause]} for cause, n in gate.causes.items()}
    told = list(lines(report))
    assert told == [
        "big.jsonl: read as preference: 1,230 rows, 30 of them bad",
        "small.jsonl: read as preference: 6 rows, 4 of them bad",
        "  empty: 33 rows", *(f"    {line}" for line in gate.first["empty"]), "    ... and 28 more",
        "  equal sides: 1 row", f"    {gate.first['equal sides'][0]}",
        f"  characters: {lengths['total']:,} in all, half of the rows up to {lengths['p50']}, "
        f"95 % up to {lengths['p95']}, the longest {max(longer)} (of a pair the longer side)",
        "  note: 2 rows say what an earlier row says; each counts each time",
        "    small.jsonl:1: says what big.jsonl:1 says", "    small.jsonl:2: says what big.jsonl:2 says",
        f"  note: {LONGER.format('100%')}",
    ]  # fmt: skip
    page = markdown(report).splitlines()
    numbers = [lengths[name] for name in ("mean", "min", "p5", "p50", "p95", "p99", "max")]
    for line in (
        "| source | format | rows | bad | weight | trained on |",
        "| big.jsonl | preference | 1,200 | 30 | 0.5 | 600 |",
        "| small.jsonl | preference | 2 | 4 | 0.5 | 600 |",
        f"{total:,} characters in all; per pair, its longer side:",
        "| mean | min | p5 | p50 | p95 | p99 | max |",
        f"| {' | '.join(f'{number:,}' for number in numbers)} |",
        f"- {LONGER.format('100%')}",
        "- empty: 33",
        f"  - `{gate.first['empty'][4]}`",
        "- equal sides: 1",
    ):
        assert line in page, line


@pytest.mark.parametrize("task", ["sft", "preference", "unpaired", "prompt", "text"])
def test_no_rows_are_a_report_too(task: Task) -> None:
    report = summary(task, [Part("a"), Part("b")], "tokens")
    assert (report["rows"], report["bad"], report["notes"]) == (0, 0, [])
    assert list(lines(report)) == ["a: 0 rows", "b: 0 rows"]
    assert "| a |  | 0 | 0 |" in markdown(report).splitlines()
