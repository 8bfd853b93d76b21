"""Whose words each row rests on: kept apart from the rows, so that a user can be forgotten and no row names one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

FILES = ("pairs.train", "pairs.test", "unpaired.train", "unpaired.test")


def dataset_digest(folder: Path) -> str:
    """Return the digest of the rows in a folder: which files there are and what they hold."""
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def lineage_file(private: Path, dataset: str) -> Path:
    """Return where the lineage of a dataset lies."""
    return private / "lineage" / f"{dataset.removeprefix('sha256:')[:24]}.parquet"


def write_lineage(database: Any, out: Path, private: Path) -> str:
    """Write down on whose words each row rests, one line for a row and a person; return the dataset's digest.

    Columns: kind (pair or unpaired), row, source, side (1: what speaks for the chosen answer or for the one answer
    there is; 2: for or against the rejected one; 0: a comparison of both), who (null: unnamed), says (1 or -1), weight.
    """
    dataset = dataset_digest(out)
    path = lineage_file(private, dataset)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        ) TO '{path}' (FORMAT parquet)
    """)
    path.chmod(0o600)
    return dataset
