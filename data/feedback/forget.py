"""Forget a user: the rows that rest on their words go, or are counted again without them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.keys import tombstones
from align_pipeline.data.feedback.lineage import FILES, dataset_digest, digests_of, keep_lineage, lineage_file
from align_pipeline.data.feedback.report import markdown
from align_pipeline.data.feedback.tables import write_rows

LINEAGE = {"kind": "string", "row": "uint64", "source": "string", "side": "int32", "who": "int64", "says": "int8",
           "weight": "int32"}  # fmt: skip

Word = tuple[int, int | None, int, int]
"""Side, who, what they say, and the weight of it; see `write_lineage`."""


@dataclass(frozen=True)
class Forgotten:
    """What forgetting a user did to a dataset."""

    removed: int
    changed: int
    lineage: str
    """The name of the file of lineage that belongs to the rows now."""
    dataset: str


def bury(private: Path, user: str) -> None:
    """Write a tombstone for a user's hash: events of theirs are never used again."""
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user in tombstones(private):
        return
    with os.fdopen(os.open(private / "tombstones", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(f"{user}\n")


def touched(private: Path, lineage: str, user: str) -> bool:
    """Tell whether rows of a file of lineage rest on a user's words."""
    return any(word[1] == _number(user) for _, _, words in _lineage(private, lineage) for word in words)


def quotes(folder: Path, name: str) -> bool:
    """Tell whether what is kept of rejected events holds a user's id as it is written in the logs."""
    files = (folder / "rejects.jsonl", folder / "report.json")
    return any(path.is_file() and name in path.read_text("utf-8", errors="replace") for path in files)


def strike(private: Path, lineage: str, user: str) -> None:
    """Take a user out of a file of lineage that is kept for its other users' sake."""
    left = [
        (kind, row, source, *word)
        for (kind, row), source, words in _lineage(private, lineage)
        for word in words
        if word[1] != _number(user)
    ]
    fresh = lineage_file(private, f".{lineage}")
    write_rows(left, fresh, LINEAGE)
    fresh.chmod(0o600)
    fresh.replace(lineage_file(private, lineage))


def forget(folder: Path, made: Path, private: Path, lineage: str, user: str) -> Forgotten:
    """Write the rows of `folder` without a user into the empty folder `made`, with a report, and their lineage.

    `user` is a hash, see `user_hash`. Rows keep their order and their side of the split. What was kept of rejected
    events is raw text of nobody knows whom, and is left out.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    least = report["settings"]["min_confidence"]
    changes: dict[str, dict[str, Any] | None] = {}
    kept: list[tuple[Any, ...]] = []
    for (kind, row), source, words in _lineage(private, lineage):
        left = [word for word in words if word[1] != _number(user)]
        name = f"{row:016x}"
        if len(left) < len(words):
            changes[name] = _counted(kind, source, left, least)
        if changes.get(name, {}) is not None:
            kept += [(kind, row, source, *word) for word in left]
    for name in FILES:
        if (folder / f"{name}.jsonl").is_file():
            _rewrite(folder / f"{name}.jsonl", made / f"{name}.jsonl", changes)
    removed = sum(one is None for one in changes.values())
    dataset = dataset_digest(digests_of(made))
    _report(report, made, dataset, removed, len(changes) - removed)
    scratch = made / "lineage.parquet"
    write_rows(kept, scratch, LINEAGE)
    return Forgotten(removed, len(changes) - removed, keep_lineage(private, scratch), dataset)


def _report(report: dict[str, Any], made: Path, dataset: str, removed: int, changed: int) -> None:
    """Write the report of the rows that are left; what was counted before stays, and it says so."""
    report["dataset"] = dataset
    report["rows"] = {name: _count(made / f"{name}.jsonl") for name in FILES if (made / f"{name}.jsonl").is_file()}
    past = report.get("forgotten", {"users": 0, "removed": 0, "changed": 0})
    report["forgotten"] = {
        "users": past["users"] + 1,
        "removed": past["removed"] + removed,
        "changed": past["changed"] + changed,
    }
    for one in report["events"]["invalid"].values():
        one["first"] = []
    (made / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (made / "report.md").write_text(markdown(report), encoding="utf-8")


def _number(user: str) -> int:
    return int.from_bytes(bytes.fromhex(user), "big", signed=True)


def _lineage(private: Path, lineage: str) -> Iterator[tuple[tuple[str, int], str, list[Word]]]:
    """Yield (kind, row), source and the words of every row of a file of lineage, in no order."""
    from pyarrow.parquet import read_table

    path = lineage_file(private, lineage)
    if not path.is_file():
        return
    table = read_table(path)
    rows: dict[tuple[str, int], tuple[str, list[Word]]] = {}
    columns = (table.column(name).to_pylist() for name in LINEAGE)
    for kind, row, source, side, who, says, weight in zip(*columns, strict=True):
        rows.setdefault((kind, row), (source, []))[1].append((side, who, says, weight))
    yield from ((key, source, words) for key, (source, words) in rows.items())


def _counted(kind: str, source: str, words: Sequence[Word], least: float) -> dict[str, Any] | None:
    """Return the fields of a row by the words that are left; None where they no longer carry it."""

    def count(side: int, says: int, *, weighed: bool = True) -> int:
        return sum(weight if weighed else 1 for at, _, said, weight in words if at == side and said == says)

    if kind == "unpaired":
        up, down = count(1, 1), count(1, -1)
        if up == down:
            return None
        sure = confidence.comparisons(max(up, down), min(up, down))
        return {"label": up > down, "fb_up": up, "fb_down": down, **_sure(sure, len(words))}
    if source == "thumbs":
        votes = (count(1, 1), count(1, -1), count(2, 1), count(2, -1))
        sure = confidence.thumbs(*votes)
        if votes[0] <= votes[1] or votes[2] >= votes[3] or sure < least:
            return None
    elif source == "completed":
        votes = (0, 0, count(2, 1), count(2, -1))
        sure = confidence.comparisons(votes[3], votes[2])
        if votes[2] >= votes[3]:
            return None
    else:
        wins, losses = count(0, 1, weighed=False), count(0, -1, weighed=False)
        votes, sure = (wins, losses, losses, wins), confidence.comparisons(wins, losses)
        if wins <= losses:
            return None
    names = ("fb_up_c", "fb_down_c", "fb_up_r", "fb_down_r")
    return {
        **dict(zip(names, votes, strict=True)),
        "margin": round(confidence.margin(sure), 6),
        **_sure(sure, len(words)),
    }


def _sure(sure: float, people: int) -> dict[str, Any]:
    times = {"fb_ts_min": "", "fb_ts_max": ""}  # one of them may have been theirs
    return times | {"fb_confidence": round(sure, 6), "fb_weight": round(confidence.weight(sure), 6), "fb_users": people}


def _rewrite(old: Path, new: Path, changes: dict[str, dict[str, Any] | None]) -> None:
    with old.open("rb") as source, new.open("wb") as target:
        for line in source:
            row = json.loads(line)
            if row["fb_row_id"] not in changes:
                target.write(line)
            elif (change := changes[row["fb_row_id"]]) is not None:
                row |= {name: value for name, value in change.items() if name in row}
                target.write(msgspec.json.encode(row) + b"\n")
    if not new.stat().st_size:
        new.unlink()


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
