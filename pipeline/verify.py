"""`align verify`: are the artifacts still what was published? Every file is digested again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from align_pipeline.pipeline.errors import InputError


def verify(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE:STAGE|KEY", help="Only these artifacts; without them all of the store."),
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Digest every file of artifacts again, and name each that is damaged, missing or extra.

    Exit codes: 0 all are as they were published, 3 some are not, or there is no such artifact.
    """
    from align_pipeline.pipeline.store import differences

    folders = _folders(store.absolute(), what or [])
    wrong = 0
    for folder in folders:
        problems = list(differences(folder))
        wrong += bool(problems)
        for problem in problems or [f"{folder.name}  ok  {_held(folder)}"]:
            typer.echo(problem)
    if wrong:
        raise InputError(
            f"{wrong} of {len(folders)} artifact{'s' * (len(folders) != 1)} {'is' if wrong == 1 else 'are'} not as "
            "published; restore the files, or delete the artifact's folder and run its pipeline again: what depends on "
            "other content then runs too"
        )


def _folders(root: Path, what: Sequence[str]) -> list[Path]:
    """Return the folders of the artifacts that are named; damaged ones can be named too."""
    folder = root / "store"
    here = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    here = [path for path in here if not path.name.startswith(".")]
    if not here:
        raise InputError(f"{folder}: no artifact in it; name the right folder with --store")
    found: dict[Path, None] = {}
    for word in what:
        key = _key(root, word)
        paths = [path for path in here if path.name == key] or [path for path in here if path.name.startswith(key)]
        if not paths:
            raise InputError(f"{word!r} names no artifact in {folder}; `align show FILE` lists the keys")
        found |= dict.fromkeys(paths)
    return list(found) if what else here


def _key(root: Path, word: str) -> str:
    """Return the key that `FILE:STAGE` stands for, or the word itself."""
    from align_pipeline.pipeline.named import entry_named, file_and_stage
    from align_pipeline.pipeline.store import Store

    return str(entry_named(Store(root), word)["artifact"]) if file_and_stage(word) else word


def _held(folder: Path) -> str:
    from align_pipeline.pipeline.store import RECORD

    files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    return f"{len(files)} file{'s' * (len(files) != 1)}, {sum(entry['bytes'] for entry in files.values()):,} bytes"
