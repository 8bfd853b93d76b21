"""Whose words each row rests on: kept apart from the rows, so that a user can be forgotten and no row names one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_pipeline.data.feedback.tables import quoted

FILES = ("pairs.train", "pairs.test", "unpaired.train", "unpaired.test")


def digests_of(folder: Path) -> dict[str, str]:
    """Return the digests of the files of rows in a folder, by which stages name them as their inputs."""
    found = {}
    for name in FILES:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            with path.open("rb") as file:
                found[name] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return found


def dataset_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of all rows: which files there are and what they hold."""
    listed = "".join(f"{name} {digest.removeprefix('sha256:')}\n" for name, digest in digests.items())
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


@dataclass(frozen=True)
class Entry:
    """Rows that were written once: where they lie, by whose words, and under which digests they may be trained on."""

    place: str
    """The folder, or `store/KEY` of an artifact."""
    dataset: str
    lineage: str
    """The name of its file of lineage."""
    digests: tuple[str, ...]


def remember(private: Path, entry: Entry) -> None:
    """Write down that rows lie somewhere; of one place the last entry is what lies there now."""
    with os.fdopen(os.open(private / "datasets.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def entries(private: Path) -> list[Entry]:
    """Return all that was remembered, the oldest first."""
    path = private / "datasets.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    return [Entry(one["place"], one["dataset"], one["lineage"], tuple(one["digests"])) for one in found]


def lineage_file(private: Path, name: str) -> Path:
    """Return where a file of lineage lies."""
    return private / "lineage" / name


def keep_lineage(private: Path, made: Path) -> str:
    """Give a file of lineage its place, and the name that its content has; return the name."""
    name = f"{hashlib.sha256(made.read_bytes()).hexdigest()[:24]}.parquet"
    path = lineage_file(private, name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made.chmod(0o600)
    shutil.move(made, path)
    return name


def write_lineage(database: Any, scratch: Path, private: Path) -> str:
    """Write down on whose words each row rests, one line for a row and a person; return the name of the file.

    Columns: kind (pair or unpaired), row, source, side (1: what speaks for the chosen answer or for the one answer
    there is; 2: for or against the rejected one; 0: a comparison of both), who (null: unnamed), says (1 or -1), weight.
    """
    path = scratch / "lineage.parquet"
    database.execute(f"""
        COPY (
            WITH written AS (SELECT kind, row FROM ordered UNION ALL SELECT 'pair', row FROM completed),
            side AS (
                SELECT 'pair' AS kind, row, source, prompt, chosen AS answer, 1 AS side
                FROM pair WHERE source = 'thumbs'
                UNION ALL
                SELECT 'pair', row, source, prompt, rejected, 2 FROM pair WHERE source = 'thumbs'
                UNION ALL
                SELECT 'pair', row, 'completed', prompt, answer, 2 FROM completed
                UNION ALL
                SELECT 'unpaired', row, 'thumbs', prompt, answer, 1 FROM unpaired)
            SELECT kind, row, source, side, who, word.label::TINYINT AS says, weight
            FROM side SEMI JOIN written USING (kind, row)
            JOIN word ON word.prompt = side.prompt AND word.one = side.answer
            WHERE NOT torn AND word.label IN (-1, 1)
            UNION ALL
            SELECT 'pair', row, source, 0, who, if(compared.one = chosen, 1, -1)::TINYINT, weight
            FROM pair SEMI JOIN (SELECT row FROM written WHERE kind = 'pair') USING (row)
            JOIN compared ON compared.prompt = pair.prompt AND compared.low = least(chosen, rejected)
                AND compared.high = greatest(chosen, rejected)
                AND (says = BETTER()) = (source = 'comparison') AND (says = REGENERATE()) = (source = 'regenerate')
            WHERE source <> 'thumbs'
        ) TO {quoted(path)} (FORMAT parquet)
    """)
    return keep_lineage(private, path)
