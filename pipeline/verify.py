"""`align verify`: are the artifacts still what was published? Every file is digested again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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

    Hidden files are no part of an artifact. Exit codes: 0 all are as they were published, 3 some are not, or there is
    no such artifact.
    """
    from align_pipeline.pipeline.store import damages

    folders = _folders(store.absolute(), what or [])
    wrong = 0
    for folder in folders:
        problems = [*damages(folder), *_extra(folder)]
        wrong += bool(problems)
        for problem in problems or [f"{folder.name}  ok  {_held(folder)}"]:
            typer.echo(problem)
    gone = [] if what else list(_missing(store.absolute()))
    for key, place in gone:
        typer.echo(f"{key}: missing, its whole folder; {place} is it")
    wrong, total = wrong + len(gone), len(folders) + len(gone)
    if wrong:
        raise InputError(
            f"{wrong} of {total} artifact{'s' * (total != 1)} {'is' if wrong == 1 else 'are'} not as "
            "published; restore the files, or delete the artifact's folder and run its pipeline again: what depends on "
            "other content then runs too"
        )


def _extra(folder: Path) -> Iterator[str]:
    """Yield a line for each thing in an artifact's folder that its record does not list; hidden ones are no matter."""
    from align_pipeline.pipeline.store import RECORD

    try:
        listed = {RECORD, *json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # that was said
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        holds = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        if str(name) not in listed and not hidden and not holds:
            yield f"{folder.name}/{name}: extra, no stage published it"


def _missing(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the key and the place of each artifact that a manifest names and that is not there."""
    from align_pipeline.pipeline.manifest import read_manifest

    for path in sorted(root.glob("*/manifest.json")):
        for stage, entry in read_manifest(path)["stages"].items():
            key = str(entry.get("artifact", ""))
            if key and not (root / "store" / key).is_dir():
                yield key, f"{path.parent.name}/{stage}"


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
