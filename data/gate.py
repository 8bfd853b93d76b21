"""The gate: what is wrong with the rows of a file, counted by cause, each with its address.

Nothing is trained on that was not looked at. A row passes or is rejected; rejected ones stop the work, or with
`on_bad_row: skip` are left out, counted, and kept in `rejects.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from align_pipeline.data.rows import Row
from align_pipeline.pipeline.errors import DataError

OnBadRow = Literal["error", "skip"]

SHOWN_EACH = 5
"""Addresses that are shown of one cause."""
SHOWN_FLAT = 20
"""Up to so many bad rows are listed as they come, more of them by cause."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: `file:line`, its cause in a word or two, the problem in a line, what stood there.

    Of what is no row the beginning of its text is kept.
    """

    where: str
    cause: str
    problem: str
    record: Any = None

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass
class Gate:
    """Lets rows pass and keeps count of those that do not; memory does not grow with the file."""

    rejects: Path | None = None
    """The file that rejected rows are written to, one JSON object a line; None: they are only counted."""
    rows: int = 0
    """Rows that passed."""
    causes: dict[str, int] = field(default_factory=dict)
    """Rejected rows by cause, in the order in which causes were met."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """For each cause its first problems with their addresses."""
    listed: list[str] = field(default_factory=list)
    """The first problems of any cause, in the order of the rows."""
    _file: TextIO | None = None

    @property
    def bad(self) -> int:
        return sum(self.causes.values())

    def take(self, rows: Iterable[Row | Reject]) -> Iterator[Row]:
        """Yield the rows that pass."""
        try:
            for row in rows:
                if isinstance(row, Reject):
                    self.reject(row)
                else:
                    self.rows += 1
                    yield row
        finally:
            self.close()

    def close(self) -> None:
        """Close the file of rejected rows."""
        if self._file:
            self._file.close()
            self._file = None

    def reject(self, bad: Reject) -> None:
        """Count a row that cannot be used, and keep it where that was asked for."""
        self.causes[bad.cause] = self.causes.get(bad.cause, 0) + 1
        first = self.first.setdefault(bad.cause, [])
        if len(first) < SHOWN_EACH:
            first.append(str(bad))
        if len(self.listed) < SHOWN_FLAT:
            self.listed.append(str(bad))
        if self.rejects:
            self._file = self._file or self.rejects.open("a", encoding="utf-8")
            self._file.write(_line(bad) + "\n")

    def take_back(self, rejects: Iterable[Reject]) -> None:
        """Reject rows that had passed, and turned out not to be usable later on."""
        for bad in rejects:
            self.rows -= 1
            self.reject(bad)

    def found(self) -> dict[str, Any]:
        """Return what was counted as plain values: `Gate(**found)` goes on from there."""
        return {"rows": self.rows, "causes": self.causes, "first": self.first, "listed": self.listed}

    def add(self, other: Gate) -> None:
        """Count what another source's gate found."""
        self.rows += other.rows
        count_in(self.causes, self.first, other.causes, other.first)
        self.listed = [*self.listed, *other.listed][:SHOWN_FLAT]

    def problems(self) -> list[str]:
        """Return what is wrong in lines for people: all bad rows if they are few, else totals and the first of each."""
        if self.bad <= SHOWN_FLAT:
            return list(self.listed)
        return [f"{self.bad:,} of {self.bad + self.rows:,} rows cannot be used", *by_cause(self.causes, self.first)]

    def judge(self, on_bad_row: OnBadRow = "error", max_bad_share: float = 0.0, name: str = "") -> None:
        """Raise DataError unless every row passed, or with `skip` unless the share of bad rows is small enough.

        `name` is the source whose rows these are.
        """
        if not self.bad:
            return
        if on_bad_row == "error":
            raise DataError(self.problems())
        share = self.bad / (self.bad + self.rows)
        if share > max_bad_share:
            rule = f"max_bad_share allows {max_bad_share:.3g}; mend the file, or raise max_bad_share"
            whose = f"{name}: " if name else ""
            raise DataError([*self.problems(), f"{whose}{share:.1%} of the rows are bad, {rule}"])


def count_in(
    causes: dict[str, int],
    first: dict[str, list[str]],
    more_causes: Mapping[str, int],
    more_first: Mapping[str, Sequence[str]],
) -> None:
    """Add what another source's rows were rejected for to `causes` and `first`."""
    for cause, count in more_causes.items():
        causes[cause] = causes.get(cause, 0) + count
        first[cause] = [*first.get(cause, ()), *more_first[cause]][:SHOWN_EACH]


def by_cause(causes: dict[str, int], first: dict[str, list[str]]) -> Iterator[str]:
    """Yield for each cause its total and, indented, the first of its problems; the commonest cause first."""
    for cause, count in sorted(causes.items(), key=lambda item: -item[1]):
        yield f"{cause}: {count:,} row{'s' * (count != 1)}"
        yield from (f"  {problem}" for problem in first[cause])
        if count > len(first[cause]):
            yield f"  ... and {count - len(first[cause]):,} more"


def _line(bad: Reject) -> str:
    record = {"where": bad.where, "cause": bad.cause, "problem": bad.problem}
    try:
        # Read again with every NaN as text: there is no word for it in JSON.
        row = json.loads(json.dumps(bad.record, default=str), parse_constant=str)
    except (RecursionError, ValueError, TypeError):  # what stood there cannot be written as JSON
        row = None
    return json.dumps({**record, "row": row})
