"""`align forget USER`: a user's words leave every dataset that was made of them, and models that learnt them are named.

What is forgotten here are rows. Trained weights do not change by it: only training again makes them anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.files import canonical_digest, file_sha256, shown, visible_files, write_json

if TYPE_CHECKING:
    from align_pipeline.data.feedback.forget import Forgotten
    from align_pipeline.pipeline.store import Store


def forget(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user's id, as the logs write it.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Folders of `align feedback` that were moved since they were made."),
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Take a user's words out of every dataset made from feedback, and name the models that were trained on them.

    Logs that are read again skip the user. Trained weights are not changed: run their pipelines again for that.
    """
    from align_pipeline.data.feedback import keys
    from align_pipeline.data.feedback.forget import bury
    from align_pipeline.pipeline.store import Store, disk_errors

    where = Store(store)
    private = where.root / "private"
    if not (private / "salt").is_file():
        raise InputError(f"{shown(private)}: no feedback was read with this store; name the right one with --store")
    with disk_errors(where.root):
        name = keys.user_hash(user, keys.salt(private))
        bury(private, name)
        typer.echo(f"forgotten: {name}; logs that are read from now on skip this user")
        old: set[str] = set()
        for folder in _datasets(where, private, folders or []):
            old |= _forget_in(where, folder, private, name)
        shutil.rmtree(where.root / "cache" / "rows", ignore_errors=True)  # encoded rows, theirs among them
        trained = list(_made_from(where, old))
    for line in trained or ["no model of this store was trained on rows that rest on their words"]:
        typer.echo(line)
    if trained:
        typer.echo("their weights are as they were; `align run FILE` trains them anew, on the rows that are left")


def _datasets(store: Store, private: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the folders that hold rows made from feedback: artifacts, and those of `align feedback`."""
    from align_pipeline.pipeline.store import RECORD

    for record in sorted((store.root / "store").glob("*/" + RECORD)):
        if json.loads(record.read_text(encoding="utf-8"))["stage"] == "feedback":
            yield record.parent
    remembered = private / "outputs"
    known = remembered.read_text(encoding="utf-8").splitlines() if remembered.is_file() else []
    for folder in dict.fromkeys([*(Path(line) for line in known), *(folder.absolute() for folder in folders)]):
        if (folder / "report.json").is_file():
            yield folder
        else:
            typer.echo(
                f"warning: {folder}: no dataset is there any more; if it was moved, name it: align forget USER DIR"
            )


def _forget_in(store: Store, folder: Path, private: Path, user: str) -> set[str]:
    """Rewrite one dataset; return the digests under which it, or a file of it, may have been trained on."""
    from align_pipeline.data.feedback.forget import forget, touched
    from align_pipeline.pipeline.inputs import Digests
    from align_pipeline.pipeline.store import RECORD

    dataset = json.loads((folder / "report.json").read_text(encoding="utf-8"))["dataset"]
    if not touched(private, dataset, user):
        return set()
    artifact = folder.parent == store.root / "store"
    digests = Digests(None)
    old = {digests.of(folder), *(digests.of(path) for path in folder.glob("*.jsonl"))}
    old |= {json.loads((folder / RECORD).read_text(encoding="utf-8"))["digest"]} if artifact else set()
    made = folder.with_name(f".{folder.name}.forgetting")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    done = forget(folder, made, private, user)
    _write_report(folder, made, done)
    if artifact:
        _record(folder, made)
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    made.rename(folder)
    shutil.rmtree(gone)
    typer.echo(f"{shown(folder)}: {done.removed:,} rows removed, {done.changed:,} counted again without them")
    return old


def _write_report(folder: Path, made: Path, done: Forgotten) -> None:
    said = f"- a user was forgotten: {done.removed:,} rows removed, {done.changed:,} counted again\n"
    (made / "report.md").write_text((folder / "report.md").read_text(encoding="utf-8") + said, encoding="utf-8")


def _record(folder: Path, made: Path) -> None:
    """Write the record of an artifact whose rows are others now: same key, new digest."""
    from align_pipeline.pipeline.store import RECORD

    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    files = {
        str(path.relative_to(made)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in visible_files(made)
    }
    digest = canonical_digest({file: entry["sha256"] for file, entry in files.items()})
    write_json(made / RECORD, {**record, "digest": digest, "files": files})


def _made_from(store: Store, digests: set[str]) -> Iterator[str]:
    """Yield a line for every artifact that was made from one of these, however far down."""
    from align_pipeline.pipeline.manifest import read_manifest
    from align_pipeline.pipeline.store import RECORD

    records: dict[str, Any] = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((store.root / "store").glob("*/" + RECORD))
    }
    names: dict[str, str] = {}
    for path in sorted(store.root.glob("*/manifest.json")):
        for stage, entry in read_manifest(path)["stages"].items():
            if entry["status"] == "done":
                names[entry["artifact"]] = f"{path.parent.name}: stage {stage}"
    found: dict[str, None] = {}
    reached = set(digests)
    while fresh := [
        key
        for key, record in records.items()
        if key not in found and any(one["digest"] in reached for one in record["inputs"].values())
    ]:
        found |= dict.fromkeys(fresh)
        reached |= {records[key]["digest"] for key in fresh}
    for key in found:
        yield f"  {records[key]['kind'].replace('_', ' ')} {key}{f' ({names[key]})' if key in names else ''}"
