"""Put rows into their files: what belongs together on one side of the split, and an order that suits the trainers.

TRL's KTO trainer reads rows as they stand and holds each answer against its neighbour's: liked and disliked ones are
mixed evenly, and rows of one prompt are kept apart.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback.likeness import Groups
from align_pipeline.data.feedback.tables import every, write_rows
from align_pipeline.data.load import border
from align_pipeline.data.processes import in_order

APART = 16
"""Rows between two of one prompt, where that is possible."""

NAMES = {"pair": "pairs", "unpaired": "unpaired"}


@dataclass(frozen=True)
class Arranged:
    """The files that were written."""

    rows: dict[str, int]
    """pairs.train -> rows; files without rows are not written."""
    groups: int
    """Prompts, like ones and those of one conversation taken together."""
    largest_group: int
    """Rows of the largest group."""


def arrange(database: Any, rendered: Path, out: Path, *, test: float, seed: int) -> Arranged:
    """Write pairs and unpaired rows, each for training and for testing."""
    _group(database, rendered, seed)
    ends = database.execute("SELECT min(place), max(place) FROM line HAVING count(*) > 0").fetchone()
    line = border(ends or (), test)  # the places between them do not move it
    database.execute(f"""
        CREATE TABLE ordered AS
        SELECT *, (row_number() OVER (PARTITION BY part, label ORDER BY row) - 0.5)
            / count(*) OVER (PARTITION BY part, label) AS mixed
        FROM (SELECT * EXCLUDE place, kind || if(place < {line!r}, '.test', '.train') AS part FROM line);
    """)
    rows: Counter[str] = Counter()
    for name, count in in_order(lambda stretch: _copy(stretch, rendered, out), _stretches(database)):
        rows[name] += count
    groups, largest = database.execute(
        "SELECT count(*), max(n) FROM (SELECT count(*) AS n FROM line GROUP BY family)"
    ).fetchone()
    return Arranged(dict(rows), groups, largest or 0)


def _group(database: Any, rendered: Path, seed: int) -> None:
    """Find for every row the group of its prompt, the least of the prompts that it may not be parted from, and the
    group's place in the split."""
    database.execute(f"""
        CREATE TABLE plain_line AS SELECT * FROM read_parquet({every(rendered, "*.lines.parquet")});
        CREATE TEMP TABLE shared AS
        WITH emitted AS (SELECT DISTINCT prompt FROM plain_line), name AS (
            SELECT prompt, name FROM read_parquet({every(rendered, "*.names.parquet")}) SEMI JOIN emitted USING (prompt)
            UNION ALL
            SELECT prompt, conversation FROM statement SEMI JOIN emitted USING (prompt)
            WHERE conversation IS NOT NULL),
        shared_name AS (
            SELECT name, min(prompt) AS first FROM name GROUP BY name HAVING min(prompt) <> max(prompt))
        SELECT DISTINCT prompt, first FROM name JOIN shared_name USING (name) WHERE prompt <> first;
    """)
    groups = Groups()
    cursor = database.execute("SELECT prompt, first FROM shared")
    while edges := cursor.fetchmany(10_000):
        for one, other in edges:
            groups.join(one, other)
    path = rendered / "member.parquet"
    write_rows(list(groups.members()), path, {"prompt": "int64", "family": "int64"})
    database.execute(f"""
        CREATE TABLE line AS
        SELECT *, (md5_number_lower('{seed}:' || family) >> 11)::DOUBLE / 9007199254740992 AS place FROM (
            SELECT plain_line.*, coalesce(family, plain_line.prompt) AS family
            FROM plain_line LEFT JOIN read_parquet({every(path.parent, path.name)}) AS member
                ON plain_line.prompt = member.prompt);
    """)


_STRETCH = 4_096
"""Rows that one process copies at a time."""
_END = b',"fb_prompt_group":"%016x"}\n'


@dataclass(frozen=True)
class _Stretch:
    """Rows of one file that follow each other, and where in it the first of them begins."""

    kind: str
    name: str
    begin: int
    rows: list[tuple[Any, ...]]


def _stretches(database: Any) -> Iterator[_Stretch]:
    """Yield the rows of all files in their order; the copying is work for processes."""
    for kind, name in NAMES.items():
        for side in ("train", "test"):
            cursor = database.execute(
                "SELECT prompt, batch, start, size, family FROM ordered WHERE part = ? ORDER BY mixed, label, row",
                [f"{kind}.{side}"],
            )
            rows, begin = apart(_fetched(cursor)), 0
            while stretch := list(islice(rows, _STRETCH)):
                yield _Stretch(kind, f"{name}.{side}", begin, stretch)
                begin += sum(size for _, _, _, size, _ in stretch) + len(stretch) * len(_END % 0)


def _copy(stretch: _Stretch, rendered: Path, out: Path) -> tuple[str, int]:
    """Write rows where they belong; return the name of their file and how many they are."""
    open_files: dict[int, int] = {}
    descriptor = os.open(out / f"{stretch.name}.jsonl", os.O_WRONLY | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "wb", buffering=2**20) as file:
        file.seek(stretch.begin)
        for _, batch, start, size, family in stretch.rows:
            if batch not in open_files:
                open_files[batch] = os.open(rendered / f"{stretch.kind}-{batch:06}.jsonl", os.O_RDONLY)
            file.write(os.pread(open_files[batch], size, start))
            file.write(_END % (family % 2**64))
    for one in open_files.values():
        os.close(one)
    return stretch.name, len(stretch.rows)


def _fetched(cursor: Any) -> Iterator[tuple[Any, ...]]:
    while rows := cursor.fetchmany(10_000):
        yield from rows


def apart(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield rows in their order, but for those whose first value stood among the last ones: they wait.

    What still waits at the end is put between the rows that were not yielded yet, as far from its like as it can.
    """
    recent: deque[int] = deque(maxlen=APART)
    waiting: deque[tuple[Any, ...]] = deque()
    held: list[tuple[Any, ...]] = []
    for row in rows:
        for _ in range(len(waiting)):
            late = waiting.popleft()
            if late[0] in recent:
                waiting.append(late)
                continue
            recent.append(late[0])
            held.append(late)
        if row[0] in recent:
            waiting.append(row)
            continue
        recent.append(row[0])
        held.append(row)
        if len(held) > _HELD:
            yield from held[: _HELD // 2]
            del held[: _HELD // 2]
    for late in waiting:
        held.insert(_room(held, late[0]), late)
    yield from held


_HELD = 8_192
"""Rows that wait before they are written, so that there is room for the last ones between them."""


def _room(rows: list[tuple[Any, ...]], prompt: int) -> int:
    """Return the place where a row of a prompt stands farthest from the others of it."""
    at = [index for index, row in enumerate(rows) if row[0] == prompt]
    places = [(at[0], 0), *(((b - a) // 2, (a + b + 1) // 2) for a, b in pairwise(at)), (len(rows) - at[-1], len(rows))]
    return max(places)[1]
