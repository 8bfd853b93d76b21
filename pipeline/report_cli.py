"""`align report`: one HTML file that shows what a pipeline made; also written after each run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align_pipeline.pipeline.errors import InputError

if TYPE_CHECKING:
    from align_pipeline.pipeline.plan import Planner

NAME = "report.html"
MARK = b'<meta name="generator" content="align report">'
"""In the head of each page; what has it may be replaced by another."""


def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="OUT", help="The page to write; without it report.html beside the manifest."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B.C=VALUE", help="Override a value of the file, as the run did."),
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Write a page of what was made: who won, curves, samples, data, cost, lineage.

    One HTML file that loads nothing and runs no script. Each `align run` writes it too, as DIR/NAME/report.html.
    Exit codes: 0 written, 2 the file is wrong, 3 it cannot be written there.
    """
    from align_pipeline.pipeline.config import load
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.manifest import Manifest
    from align_pipeline.pipeline.plan import Planner
    from align_pipeline.pipeline.store import Store

    pipeline = load(file, overrides or [], files_exist=False)
    where = Store(store)
    planner = Planner(pipeline, where, Manifest(where, pipeline.name, file))
    planner.manifest.claim()
    path = out or planner.manifest.folder / NAME
    try:
        _check_place(path, file, out is None)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; name another file with -o") from error
    text = made(planner)
    try:
        write(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); name another file with -o") from error
    typer.echo(f"report: {shown(path)}")


def _check_place(path: Path, file: Path, beside: bool) -> None:
    """Raise InputError where a page cannot be written, or would take the place of something else."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the file, as in -o {path / NAME}")
    if path.exists() and not _is_page(path):
        raise InputError(f"{path}: is there and no page of align's, which one would replace; name another file with -o")
    if not path.parent.is_dir():
        remedy = f"`align run {file}` makes it" if beside else "make it first, or name another file with -o"
        raise InputError(f"{path.parent}: there is no such folder to write {path.name} into; {remedy}")


def _is_page(path: Path) -> bool:
    """Tell whether a file is a page that was written here."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK in file.read(2000)


def after_run(planner: Planner, targets: Sequence[str]) -> None:
    """Write the page beside the manifest after a run; whatever goes wrong with it is a warning, never a failure."""
    from align_pipeline.pipeline.files import shown

    if not planner.manifest.path.exists():
        return  # nothing was started
    path = planner.manifest.folder / NAME
    try:
        write(path, made(planner, targets))
        typer.echo(f"report: {shown(path)}")
    except Exception as error:  # the run is what counts, and it is over
        first = (str(error).splitlines() or [""])[0]
        typer.echo(
            f"warning: {shown(path)} was not written ({type(error).__name__}: {first}); `align report` tries again"
        )


def made(planner: Planner, targets: Sequence[str] = ()) -> str:
    """Return the page; only the targets are planned, without them every stage."""
    import time

    from align_pipeline.pipeline.report_facts import gather
    from align_pipeline.pipeline.report_page import page

    return page(gather(planner, targets), time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all: a temporary file, then a rename; a link goes on leading to it."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
