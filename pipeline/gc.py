"""`align gc`: what of a store no manifest leads to any more, and how much room it takes.

Kept are the artifacts that a manifest names or its pipeline file plans, those that were used for one that is kept (by
content, so that one which `--force` moved aside counts), and the work directories that are planned, failed or running,
with what they read. Where it cannot be known what is planned, every work directory is kept. `private/` and `cache/` are
never touched.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline.errors import AlignError, InputError, Locked

if TYPE_CHECKING:
    from align_pipeline.pipeline.store import Store

STALE_SECONDS = 3600.0
"""Age of a temporary name from which nobody is writing it any more."""

_TEMPORARY = re.compile(r"\..+\.(\d+|deleting|forgetting|gone)|\.probe-\d+")


@dataclass(frozen=True)
class Item:
    """Something that nothing leads to."""

    path: Path
    why: str
    key: str | None = None
    """The key whose lock guards it; None for a temporary name, which only its age guards."""


@dataclass
class _Kept:
    """What must stay."""

    artifacts: set[str] = field(default_factory=set)
    work: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    all_work: bool = False


def gc(
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed; without it nothing changes.")
    ] = False,
) -> None:
    """List what of the store no manifest leads to: artifacts, work directories, left-over temporary files.

    Exit codes: 0 listed or deleted, 1 something cannot be deleted, 3 the manifests do not say what must be kept.
    """
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.store import Store, disk_errors

    where = Store(store)
    kept = _kept(where)
    for note in kept.notes:
        typer.echo(note)
    freed = 0
    with disk_errors(where.root):
        for item in list(_garbage(where, kept)):
            size = _bytes(item.path)
            if busy := where.busy(item.key) if item.key else None:
                typer.echo(f"kept: {shown(item.path)}, running now: {busy}")
                continue
            if delete and (problem := _delete(where, item)):
                typer.echo(f"kept: {shown(item.path)}, {problem}")
                continue
            freed += size
            typer.echo(f"{'deleted: ' if delete else ''}{shown(item.path)}  {size:,} bytes  {item.why}")
        if delete:
            _drop_links(where)
    typer.echo(f"{freed:,} bytes {'freed' if delete else 'would be freed; --delete does it'}")


# --- what is kept -----------------------------------------------------------------------------------------------------


def _kept(store: Store, mine: str | None = None) -> _Kept:
    """Follow the manifests and the plans to everything that must stay; `mine` is the key whose lock we hold."""
    from align_pipeline.pipeline.manifest import COMPARED

    manifests = _manifests(store)
    records = _records(store)
    lost = next(_without_manifest(store), None)
    if records and (lost or not any(path.parent.name != COMPARED for path in manifests)):
        raise InputError(
            f"{lost or store.root}: no manifest in it, so nothing says which of its artifacts are wanted; `align run "
            f"FILE` writes it anew, {'or delete the folder' if lost else '--store names another folder'}"
        )
    kept = _Kept()
    for path, manifest in manifests.items():
        for entry in manifest["stages"].values():
            if entry["status"] == "done":
                kept.artifacts.add(str(entry["artifact"]))
            elif entry["status"] == "failed":
                kept.work.add(str(entry["work"]).rpartition("/")[2])
        if path.parent.name != COMPARED:  # no file plans it; asking again does
            _plan(store, path, manifest, kept)
    _keep_inputs(store, records, kept, mine)
    return kept


def _without_manifest(store: Store) -> Iterator[Path]:
    """Yield the folders of pipelines whose links still stand and whose manifest does not."""
    for folder in sorted(store.root.glob("[!.]*")):
        if folder.is_dir() and not (folder / "manifest.json").exists() and any(map(Path.is_symlink, folder.iterdir())):
            yield folder


def _manifests(store: Store) -> dict[Path, dict[str, Any]]:
    """Return the manifests of a store; one that cannot be read would make everything of its pipeline look unwanted."""
    from align_pipeline.pipeline.manifest import STATUSES

    found = {}
    for path in sorted(store.root.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if any(entry["status"] not in STATUSES for entry in manifest["stages"].values()):
                raise ValueError("an unknown status")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path}: damaged, so nothing says which artifacts are wanted; delete it and `align run FILE` writes "
                "it anew"
            ) from None
        found[path] = manifest
    return found


def _records(store: Store) -> dict[str, Any]:
    """Return the records of all artifacts, also of those whose files are damaged."""
    from align_pipeline.pipeline.store import RECORD, read_record

    found = {}
    for path in sorted((store.root / "store").glob("*/" + RECORD)):
        if path.parent.name.startswith("."):
            continue
        try:
            found[path.parent.name] = read_record(path.parent)
        except ValueError:
            raise InputError(
                f"{path}: damaged, so it does not say what it was made from; `align verify` names what is wrong"
            ) from None
    return found


def _plan(store: Store, path: Path, manifest: Mapping[str, Any], kept: _Kept) -> None:
    """Keep the work directories that a pipeline's file still plans; all of them when that cannot be told."""
    from align_pipeline.pipeline.config import load
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.manifest import Manifest
    from align_pipeline.pipeline.plan import Planner

    file = Path(str(manifest.get("config")))
    try:
        if not file.is_absolute():
            raise InputError("its manifest is an old one and does not say in which folder")
        pipeline = load(file)
        if pipeline.name != path.parent.name:
            raise InputError(f"it is {pipeline.name!r} now")
        steps = Planner(pipeline, store, Manifest(store, path.parent.name, file)).plan()
    except (AlignError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        kept.all_work = True
        kept.notes.append(f"note: work directories are kept, as {shown(file)} cannot be planned ({first})")
        return
    work = store.root / "work"
    for step in steps:
        if step.key:
            kept.work.add(step.key)
        if step.artifact:
            kept.artifacts.add(step.artifact.key)
        if step.status == "waits":  # what it reads is not made yet, so its key is not known
            kept.work |= {one.name for one in work.glob(f"{step.stage.type}-*")}


def _keep_inputs(store: Store, records: Mapping[str, Any], kept: _Kept, mine: str | None) -> None:
    """Keep what kept artifacts and work directories were made from, however far up."""
    work = store.root / "work"
    for path in work.iterdir() if work.is_dir() else ():
        if kept.all_work or (path.name != mine and store.busy(path.name)):
            kept.work.add(path.name)
    sources: list[tuple[str, str]] = []
    for name in kept.work:
        sources += _read_by_job(work / name / "job.json")
    waiting = [name for name in kept.artifacts if name in records]
    while waiting or sources:
        if not sources:
            record = records[waiting.pop()]
            made = [one for one in record["inputs"].values() if one.get("artifact")]
            sources += [(str(one["artifact"]), str(one["digest"])) for one in made]
            sources += _base(record)
            continue
        key, digest = sources.pop()
        for name, record in records.items():
            if name.partition("~")[0] == key and record["digest"] == digest and name not in kept.artifacts:
                kept.artifacts.add(name)
                waiting.append(name)


def _base(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the artifact that holds the base of an adapter, when a stage made it."""
    model = record.get("model") or {}
    scheme, _, key = str(model.get("base")).partition(":")
    return [(key, str(model["base_digest"]))] if scheme == "artifact" else []


def _read_by_job(path: Path) -> list[tuple[str, str]]:
    """Return the artifacts that a work directory's job reads, bases included."""
    try:
        inputs = list(json.loads(path.read_text(encoding="utf-8"))["inputs"].values())
    except (OSError, ValueError, KeyError):
        return []
    inputs += [one["base"] for one in inputs if one.get("base")]
    return [(str(one["artifact"]), str(one["digest"])) for one in inputs if one.get("artifact")]


# --- what goes --------------------------------------------------------------------------------------------------------


def _garbage(store: Store, kept: _Kept) -> Iterator[Item]:
    """Yield what nothing leads to."""
    for name in _records(store):
        if name not in kept.artifacts:
            yield Item(store.artifact_path(name), "no manifest leads to it", key=name.partition("~")[0])
    work = store.root / "work"
    for path in sorted(work.iterdir()) if work.is_dir() else ():
        if path.is_dir() and path.name not in kept.work and not _TEMPORARY.fullmatch(path.name):
            yield Item(path, "no pipeline plans it", key=path.name)
    yield from _temporary(store)


def _temporary(store: Store) -> Iterator[Item]:
    """Yield names that a killed process left behind."""
    folders = [store.root, *(path.parent for path in store.root.glob("*/manifest.json"))]
    folders += [store.root / name for name in ("store", "work", "locks", "cache/rows")]
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            found = _TEMPORARY.fullmatch(path.name)
            if not found or time.time() - path.lstat().st_mtime < STALE_SECONDS:
                continue
            name = path.name[1:].rpartition(".")[0]
            if found[1] in ("forgetting", "gone") and not (folder / name).exists():
                continue  # the only copies: a kill between the two renames of `align forget`
            yield Item(path, "left behind by a process that ended")


def _delete(store: Store, item: Item) -> str | None:
    """Delete an item, under its lock when it has one; return why it stays, None when it is gone."""
    if item.key is None:
        _remove(item.path)
        return None
    store.open()
    try:
        with store.lock(item.key, wait=False, say=lambda line: None):
            again = _kept(store, item.key)  # another run may have led to it since it was listed
            if item.path.name in (again.artifacts if item.path.parent.name == "store" else again.work):
                return "wanted again"
            aside = item.path.with_name(f".{item.path.name}.deleting")  # whole or not there, whenever we are killed
            _remove(aside)
            item.path.rename(aside)
            _remove(aside)
    except Locked as error:
        return str(error).partition(";")[0]
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop_links(store: Store) -> None:
    """Remove the links for people that lead to what was deleted."""
    for manifest in store.root.glob("*/manifest.json"):
        for path in manifest.parent.iterdir():
            if path.is_symlink() and not path.exists():
                path.unlink()


def _bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_symlink() or one.is_file())
