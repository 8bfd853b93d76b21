"""The data report: what rows a stage read, how long they are, and what a person should know before trusting them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_pipeline.data import address
from align_pipeline.data.gate import SHOWN_EACH, Gate, by_cause, count_in
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
    Text,
    Unpaired,
    UnpairedIds,
    characters,
    content_hash,
)
from align_pipeline.data.writing import SYSTEMS, writing

LENGTH_BIAS = 0.65
"""Share of pairs whose longer answer is chosen from which it is worth a word."""

Report = dict[str, Any]


@dataclass
class Part:
    """The rows of one source in columns, one number a row, so that a million rows cost megabytes."""

    name: str
    format: str = ""
    lines: Sequence[int] = field(default_factory=lambda: array("q"))
    """Where each row stands, see `address.py`."""
    contents: Sequence[int] = field(default_factory=lambda: array("q"))
    """`content_hash` of each row."""
    lengths: Sequence[int] = field(default_factory=lambda: array("q"))
    """Of what a model reads at once, which is what `max_length` bounds: of a pair its longer side, prompt included."""
    totals: Sequence[int] = field(default_factory=lambda: array("q"))
    """Of all that a model reads for the row: a pair's prompt counts twice."""
    signs: Sequence[int] = field(default_factory=lambda: array("b"))
    """See `sign`."""
    dialects: Sequence[int] = field(default_factory=lambda: array("b"))
    """See `dialect`."""
    systems: Sequence[int] = field(default_factory=lambda: array("b"))
    """See `system`."""
    cut: Sequence[int] = ()
    """Tokens cut off each row; empty where nothing is cut."""
    weight: float = 1.0
    trained_on: int | None = None
    """Rows that training sees in a pass, those taken twice counted twice; None where nothing is trained."""
    causes: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Measure a row in characters; only for parts made of arrays."""
        self.lines.append(address.read(row.where))  # type: ignore[attr-defined]
        self.contents.append(content_hash(row))  # type: ignore[attr-defined]
        read = sequences(row)
        self.lengths.append(max(read))  # type: ignore[attr-defined]
        self.totals.append(sum(read))  # type: ignore[attr-defined]
        self.signs.append(sign(row))  # type: ignore[attr-defined]
        self.dialects.append(dialect(row))  # type: ignore[attr-defined]
        self.systems.append(system(row))  # type: ignore[attr-defined]

    def rejected(self, gate: Gate) -> None:
        self.causes, self.first = dict(gate.causes), {cause: list(lines) for cause, lines in gate.first.items()}


def sides(row: Row) -> tuple[Any, ...]:
    """Return everything that a row says, each part on its own."""
    match row:
        case Text():
            return (row.text,)
        case Chat():
            return (row.messages,)
        case Example() | Unpaired():
            return (row.prompt, row.completion)
        case ExampleIds() | UnpairedIds():
            return (row.prompt_ids, row.completion_ids)
        case Preference():
            return (row.prompt, row.chosen, row.prompt, row.rejected)
        case PreferenceIds():
            return (row.prompt_ids, row.chosen_ids, row.prompt_ids, row.rejected_ids)
        case Prompt():
            return (row.prompt,)
        case PromptIds():
            return (row.prompt_ids,)


def sequences(row: Row) -> list[int]:
    """Return how long each text is that a model reads for the row: of a pair the prompt with each of its sides."""
    lengths = list(map(characters, sides(row)))
    pair = isinstance(row, Preference | PreferenceIds)
    return [sum(lengths[:2]), sum(lengths[2:])] if pair else [sum(lengths)]


def sign(row: Row) -> int:
    """Return of a pair 1 when the chosen answer is longer, 0 when shorter; of a judged answer its label; else -1."""
    match row:
        case Preference() | PreferenceIds():
            _, chosen, _, rejected = map(characters, sides(row))
            return int(chosen > rejected) if chosen != rejected else -1
        case Unpaired() | UnpairedIds():
            return int(row.label)
    return -1


def dialect(row: Row) -> int:
    """Return 1 for a prompt of messages, 0 for one of plain text; of rows without a prompt, and of token ids, -1."""
    match row:
        case Chat():
            return 1
        case Example() | Preference() | Unpaired() | Prompt():
            return int(not isinstance(row.prompt, str))
    return -1


def system(row: Row) -> int:
    """Return the writing system of what a row ends with, see `writing`; of token ids -1."""
    last = sides(row)[-1]
    if isinstance(last, str):
        return writing(last)
    return writing(last[-1].content) if last and isinstance(last[-1], Message) else -1


def summary(task: str, parts: Sequence[Part], unit: str) -> Report:
    """Return the report as plain values; `unit` says what lengths count, `tokens` or `characters`."""
    causes: dict[str, int] = {}
    first: dict[str, list[str]] = {}
    for part in parts:
        count_in(causes, first, part.causes, part.first)
    report: Report = {
        "task": task,
        "rows": sum(len(part.lines) for part in parts),
        "bad": sum(causes.values()),
        "causes": {cause: {"rows": count, "first": first[cause]} for cause, count in causes.items()},
        "sources": [_source(part) for part in parts],
        "lengths": _lengths(parts, unit),
        "duplicates": _duplicates(parts),
    }
    ones, zeros = (_count(parts, value) for value in (1, 0))
    if task in ("preference", "unpaired") and ones + zeros:
        report["longer_chosen" if task == "preference" else "liked"] = ones / (ones + zeros)
    if any(len(part.cut) for part in parts):
        report["cut"] = {"rows": _sum(parts, lambda cut: cut > 0), "tokens": _sum(parts, lambda cut: cut)}
    turns, plain = (_count(parts, value, "dialects") for value in (1, 0))
    if turns and plain:
        report["dialects"] = {"messages": turns, "text": plain}
    written = {name: _count(parts, number, "systems") for number, name in enumerate(SYSTEMS)}
    if any(written.values()):
        report["writing"] = dict(sorted(((name, n) for name, n in written.items() if n), key=lambda one: -one[1]))
    report["notes"] = list(_notes(report, ones, zeros))
    return report


def _source(part: Part) -> Report:
    rows = {"name": part.name, "format": part.format, "rows": len(part.lines), "bad": sum(part.causes.values())}
    trained = {} if part.trained_on is None else {"weight": part.weight, "trained_on": part.trained_on}
    return {**rows, **trained}


def _lengths(parts: Sequence[Part], unit: str) -> Report:
    import numpy

    every = numpy.concatenate([numpy.asarray(part.lengths, dtype=numpy.int64) for part in parts])
    if not len(every):
        return {"unit": unit, "total": 0}
    # The least length that so many rows do not exceed: "95 % up to" is then true of it.
    at = numpy.percentile(every, _SHARES, method="inverted_cdf")
    shares = {f"p{share}": int(value) for share, value in zip(_SHARES, at, strict=True)}
    return {
        "unit": unit,
        "total": sum(int(numpy.asarray(part.totals, dtype=numpy.int64).sum()) for part in parts),
        "mean": round(float(every.mean()), 1),
        "min": int(every.min()),
        **shares,
        "max": int(every.max()),
    }


_SHARES = (5, 50, 95, 99)


def _duplicates(parts: Sequence[Part]) -> Report:
    """Count rows that say what an earlier row said, and name the first of them."""
    import numpy

    contents = [numpy.asarray(part.contents, dtype=numpy.int64) for part in parts]
    every = numpy.concatenate(contents)
    order = numpy.argsort(every, kind="stable")
    same = every[order][1:] == every[order][:-1]
    again = numpy.sort(order[1:][same])
    starts = numpy.cumsum([0, *map(len, contents)])

    def where(index: int) -> str:
        part = int(numpy.searchsorted(starts, index, side="right")) - 1
        return f"{parts[part].name}:{address.shown(int(parts[part].lines[index - int(starts[part])]))}"

    named = []
    for index in again[:SHOWN_EACH]:
        earlier = int(numpy.flatnonzero(every == every[index])[0])
        named.append(f"{where(int(index))}: says what {where(earlier)} says")
    return {"rows": len(again), "first": named}


def _count(parts: Iterable[Part], value: int, of: str = "signs") -> int:
    import numpy

    return sum(int((numpy.asarray(getattr(part, of), dtype=numpy.int8) == value).sum()) for part in parts)


def _sum(parts: Iterable[Part], of: Any) -> int:
    import numpy

    return sum(int(of(numpy.asarray(part.cut, dtype=numpy.int64)).sum()) for part in parts)


def _notes(report: Report, ones: int, zeros: int) -> Iterator[str]:
    """Yield what is no error and still worth a word, with what can be done about it."""
    duplicates = report["duplicates"]["rows"]
    if duplicates:
        say = "row says" if duplicates == 1 else "rows say"
        yield f"{duplicates:,} {say} what an earlier row says; each counts each time"
    if "cut" in report and report["cut"]["rows"]:
        cut = report["cut"]
        one = cut["rows"] == 1
        are = f"{'row is' if one else 'rows are'} longer than max_length and {'loses its' if one else 'lose their'}"
        yield f"{cut['rows']:,} {are} end ({cut['tokens']:,} tokens); raise max_length to keep it"
    if "dialects" in report:
        turns, plain = report["dialects"]["messages"], report["dialects"]["text"]
        are = f"{turns:,} {'prompt is' if turns == 1 else 'prompts are'} messages and {plain:,} plain text"
        yield f"{are}, which a model reads as two dialects; write all of them one way, unless both will be asked"
    share = report.get("longer_chosen", 0.5)
    if ones + zeros >= 20 and share >= LENGTH_BIAS:
        yield f"the longer answer is chosen in {share:.0%} of the pairs; a model may learn length instead of quality"
    if "liked" in report and not (ones and zeros):
        yield f"label: all rows are {'true' if ones else 'false'}; learning what is liked needs both"


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


# For people.


def lines(report: Report) -> Iterator[str]:
    """Yield the report in lines for a terminal."""
    for source in report["sources"]:
        total = source["rows"] + source["bad"]
        bad = f", {source['bad']:,} of them bad" if source["bad"] else ""
        read_as = f"read as {source['format']}: " if source["format"] else ""
        yield f"{source['name']}: {read_as}{total:,} {_rows(total)}{bad}"
    causes = {cause: entry["rows"] for cause, entry in report["causes"].items()}
    first = {cause: entry["first"] for cause, entry in report["causes"].items()}
    yield from (f"  {line}" for line in by_cause(causes, first))
    lengths = report["lengths"]
    if lengths["total"]:
        yield (
            f"  {lengths['unit']}: {lengths['total']:,} in all, half of the rows up to {lengths['p50']:,}, "
            f"95 % up to {lengths['p95']:,}, the longest {lengths['max']:,}"
            f"{' (of a pair the longer side)' if report['task'] == 'preference' else ''}"
        )
    if len(report.get("writing", ())) > 1:
        yield f"  {_written(report)}"
    addresses = report["duplicates"]["first"]
    for number, note in enumerate(report["notes"]):
        yield f"  note: {note}"
        if number == 0:  # duplicates are what is noted first
            yield from (f"    {line}" for line in addresses)


def _written(report: Report) -> str:
    return "written in " + ", ".join(f"{name} {count:,}" for name, count in report["writing"].items())


def markdown(report: Report) -> str:
    """Return the report as a page."""
    trained = any("trained_on" in source for source in report["sources"])
    head = ["source", "format", "rows", "bad", *(["weight", "trained on"] if trained else [])]
    table = [head, ["---"] * len(head)]
    for source in report["sources"]:
        cells = [source["name"], source["format"], f"{source['rows']:,}", f"{source['bad']:,}"]
        table.append(cells + ([f"{source['weight']:g}", f"{source['trained_on']:,}"] if trained else []))
    page = ["# Rows", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    lengths = report["lengths"]
    if lengths["total"]:
        names = [name for name in lengths if name not in ("unit", "total")]
        page += [
            f"{lengths['total']:,} {lengths['unit']} in all; per "
            f"{'pair, its longer side' if report['task'] == 'preference' else 'row'}:",
            "",
            f"| {' | '.join(names)} |",
            f"|{'---|' * len(names)}",
            f"| {' | '.join(f'{lengths[name]:,}' for name in names)} |",
            "",
        ]
    if "writing" in report:
        page += [f"W{_written(report)[1:]}.", ""]
    if "longer_chosen" in report:
        page += [f"The longer answer is chosen in {report['longer_chosen']:.1%} of the pairs of unequal length.", ""]
    if "liked" in report:
        page += [f"{report['liked']:.1%} of the answers were liked.", ""]
    if report["notes"]:
        page += ["## Notes", "", *(f"- {note}" for note in report["notes"]), ""]
    if report["causes"]:
        page += ["## Rows that were left out", ""]
        for cause, entry in report["causes"].items():
            page += [f"- {cause}: {entry['rows']:,}", *(f"  - `{line}`" for line in entry["first"])]
        page.append("")
    return "\n".join(page)
