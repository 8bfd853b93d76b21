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

from align_pipeline.pipeline.errors import AlignError, InputError
from align_pipeline.pipeline.files import canonical_digest, file_sha256, shown, visible_files, write_json

if TYPE_CHECKING:
    from align_pipeline.data.feedback.lineage import Entry
    from align_pipeline.pipeline.store import Store

BROKEN = (OSError, ValueError, LookupError, TypeError)
"""What a folder that somebody's hand was in may raise."""


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
    Exit code 3 says that nothing here is known of such a user: look whether the id is written as in the logs.
    """
    from align_pipeline.data.feedback import keys
    from align_pipeline.data.feedback.forget import bury, quotes, strike, touched
    from align_pipeline.data.feedback.lineage import entries
    from align_pipeline.pipeline.store import Store, disk_errors

    where = Store(store)
    private = where.root / "private"
    if not user.strip():
        raise InputError("USER: empty; name the user as the logs write it")
    if not (private / "salt").is_file():
        raise InputError(f"{shown(private)}: no feedback was read with this store; name the right one with --store")
    problems: list[str] = []
    with disk_errors(where.root):
        name = keys.user_hash(user, keys.salt(private))
        latest = _latest(where, entries(private), folders or [])
        resting = [entry for entry in entries(private) if touched(private, entry.lineage, name)]
        old = {digest for entry in resting for digest in (entry.dataset, *entry.digests)}
        quoted = any(quotes(folder, user) for folder in latest)
        bury(private, name)
        typer.echo(f"forgotten: {name}; logs that are read from now on skip this user")
        for folder, entry in latest.items():
            try:
                old |= _forget_in(where, folder, entry, private, name, user)
            except BROKEN as error:
                problems.append(f"{shown(folder)}: cannot be rewritten ({error}); mend or delete it, and forget again")
        for entry in resting:
            strike(private, entry.lineage, name)
        _clear(where)
        before = _learnt_before(private, name, old)
        old |= before
        trained = list(_made_from(where, old))
    if not (resting or quoted or before):
        what = f"USER {user}: no rows that are known here rest on the words of this user"
        raise InputError(f"{what}; is the id written as in the logs? If not, forget the right one too")
    for line in trained or ["no model of this store was trained on rows that rest on their words"]:
        typer.echo(line)
    if trained:
        typer.echo("their weights are as they were; `align run FILE` trains them anew, on the rows that are left")
    if problems:
        raise AlignError("\n".join(problems))


def _latest(store: Store, known: Sequence[Entry], given: Sequence[Path]) -> dict[Path, Entry]:
    """Return the folders that hold rows now, each with what is known of them; moved ones are found by their rows."""
    found: dict[Path, Entry] = {}
    for entry in known:
        if entry.place.startswith("store/"):
            key = entry.place.removeprefix("store/")
            folders = sorted((store.root / "store").glob(f"{key}*"))
            found |= {path: entry for path in folders if path.name.split("~")[0] == key and _holds(path, entry)}
        else:
            found[Path(entry.place)] = entry
    for folder in given:
        dataset = _dataset(folder)
        of_rows = [entry for entry in known if entry.dataset == dataset]
        if not of_rows:
            raise InputError(
                f"{folder}: nothing is known of rows in it; name a folder of `align feedback`, and its --store"
            )
        found[folder.resolve()] = of_rows[-1]
    gone = [path for path in found if not (path / "report.json").is_file()]
    for path in gone:
        del found[path]
        typer.echo(f"warning: {shown(path)}: no rows there any more; if it was moved, name it: align forget USER DIR")
    return found


def _dataset(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "report.json").read_text(encoding="utf-8"))["dataset"])
    except BROKEN:
        return None


def _holds(folder: Path, entry: Entry) -> bool:
    """Tell whether a folder's rows are those of an entry; one that cannot be read may be."""
    return _dataset(folder) in (entry.dataset, None)


def _forget_in(store: Store, folder: Path, entry: Entry, private: Path, user: str, name: str) -> set[str]:
    """Rewrite the files of one dataset, nothing else that lies there; return the digests that it had."""
    from dataclasses import replace

    from align_pipeline.data.feedback.forget import forget, quotes, touched
    from align_pipeline.data.feedback.lineage import FILES, digests_of, remember
    from align_pipeline.pipeline.inputs import Digests
    from align_pipeline.pipeline.store import RECORD

    rests = touched(private, entry.lineage, user)
    if not rests and not quotes(folder, name):
        return set()
    artifact = folder.parent == store.root / "store"
    old = {Digests(None).of(folder), *digests_of(folder).values()}
    old |= {json.loads((folder / RECORD).read_text(encoding="utf-8"))["digest"]} if artifact else set()
    made = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        done = forget(folder, made, private, entry.lineage, user)
        if artifact:
            _record(folder, made)
        remember(private, replace(entry, digests=tuple(sorted({*entry.digests, *old}))))  # as it was trained on
        digests = tuple(digests_of(made).values())
        remember(private, replace(entry, dataset=done.dataset, lineage=done.lineage, digests=digests))
        for path in (folder / f"{one}.jsonl" for one in (*FILES, "rejects")):
            if not (made / path.name).exists():
                path.unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == RECORD):  # the record is the last
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    typer.echo(f"{shown(folder)}: {done.removed:,} rows removed, {done.changed:,} counted again without them")
    return old if rests else set()


def _record(folder: Path, made: Path) -> None:
    """Write the record of an artifact whose rows are others now: same key, new digest."""
    from align_pipeline.pipeline.store import RECORD

    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    files = {
        str(path.relative_to(made)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in visible_files(made)
    }
    digest = canonical_digest({file: entry["sha256"] for file, entry in files.items()})
    report = json.loads((made / "report.json").read_text(encoding="utf-8"))
    write_json(made / RECORD, {**record, "digest": digest, "files": files, "data": {"logs": report}})


def _clear(store: Store) -> None:
    """Delete what quotes rows and can be made again: the cache, pages of reports, feedback stages that did not end."""
    shutil.rmtree(store.root / "cache" / "rows", ignore_errors=True)
    for page in store.root.glob("*/report.html"):
        page.unlink()
    for work in (store.root / "work").glob("feedback-*"):
        if not store.busy(work.name):
            store.forget_work(work.name)


def _learnt_before(private: Path, user: str, digests: set[str]) -> set[str]:
    """Keep under which digests a user's words were trained on, and return what was kept of them before."""
    path = private / "forgotten.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = set(kept.get(user, ()))
    kept[user] = sorted(before | digests)
    path.touch(mode=0o600)
    write_json(path, kept)
    return before


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
