"""The store: content keys, locks, work directories and artifacts.

    store/KEY/       finished artifacts: immutable, each with its artifact.json and a hidden .progress.jsonl
    work/KEY/        {out,scratch} and log.txt of what is not finished; survives a failure
    locks/KEY        the runner's kernel lock; locks/KEY.worker is shared by the processes that write in work/KEY
    cache/           what any stage may keep and anyone may delete
    private/         secrets of feedback stages, for the owner's eyes only: salt, forgotten users, lineage of rows
    NAME/            manifest.json and links, for people

An artifact is published by one rename, so it exists whole or not at all. Two locks rather than one that is converted:
flock(2) gives the old lock up before it takes the new one, so a downgrade can lose it to another process.

The log of a stage (`work/KEY/progress.jsonl`) moves into its artifact as .progress.jsonl. It holds times, and after a
resume the steps that were lost twice, so it is no content: hidden files are neither listed nor digested nor verified.
They go where the artifact goes: aside with `--force`, away with `align gc`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.errors import AlignError, InputError, Locked
from align_pipeline.pipeline.files import canonical_digest, file_sha256, flush, visible_files, write_json
from align_pipeline.pipeline.inputs import digests_of
from align_pipeline.pipeline.stage import Config, Kind, Resolved, Stage, references

RECORD = "artifact.json"
PROGRESS = "progress.jsonl"
KEPT_PROGRESS = f".{PROGRESS}"
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP})


@dataclass(frozen=True)
class Artifact:
    """A finished result: an immutable folder and what is known about it."""

    key: str
    path: Path
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """`sha256:...` of the names and contents of its files; times and hosts do not count."""
        return str(self.record["digest"])

    @property
    def kind(self) -> Kind:
        kind: Kind = self.record["kind"]
        return kind

    def resolved(self, ref: str, base: Resolved | None) -> Resolved:
        """Return this artifact as the input of another stage; `base` is found by the caller when it is an adapter."""
        scores = self.path / "reference_scores.json"
        adapter = (self.record.get("model") or {}).get("adapter")
        return Resolved(
            ref=ref,
            digest=self.digest,
            path=str(self.path / "model" if (self.path / "model").is_dir() else self.path),
            artifact=self.key,
            kind=self.kind,
            adapter=str(self.path / adapter) if adapter else None,
            base=base,
            reference_scores=str(scores) if scores.exists() else None,
        )


def settings(stage: Stage) -> dict[str, Any]:
    """Return the configuration that enters a key: fields that differ from their defaults.

    `how` changes only speed and memory, `require` only what may follow; inputs enter by digest; all are left out.
    """
    return _dump(stage, exclude_defaults=True)


def configuration(stage: Stage) -> dict[str, Any]:
    """Return the same with the defaults filled in: what an artifact records and a plan compares."""
    return _dump(stage, exclude_defaults=False)


def _dump(stage: Stage, exclude_defaults: bool) -> dict[str, Any]:
    left_out: dict[str, Any] = {"type": True, "how": True, "require": True}
    for name in references(stage):
        _leave_out(left_out, stage, name)
    return stage.model_dump(mode="json", exclude_defaults=exclude_defaults, exclude=left_out)


def _leave_out(left_out: dict[str, Any], settings: Config, name: str) -> None:
    """Mark an input: the whole field, or where that is a configuration of its own only the input inside it."""
    field, _, inside = name.partition(".")
    value = getattr(settings, field)
    if isinstance(value, Config):
        _leave_out(left_out.setdefault(field, {}), value, inside)
    else:
        left_out[field] = True


def key(stage: Stage, inputs: Mapping[str, Resolved]) -> str:
    """Return the name of a result before it exists: `TYPE-` and 12 hexadecimal digits."""
    content = {
        "type": stage.type,
        "version": stage.version,
        "config": settings(stage),
        "inputs": digests_of(inputs),
    }
    return f"{stage.type}-{canonical_digest(content).removeprefix('sha256:')[:12]}"


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one line with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise AlignError(
                f"{root}: the disk is full; free some space (or name another --store) and run again: "
                "nothing finished is lost, and the stage continues where it was"
            ) from error
        if error.errno in NOT_WRITABLE:
            raise AlignError(
                f"{error.filename or root}: cannot be written ({os.strerror(error.errno or 0)}); "
                "make the store writable or name another one with --store"
            ) from error
        raise


def read_record(folder: Path) -> dict[str, Any]:
    """Return what an artifact says of itself; raise ValueError where a field that is needed everywhere is wrong."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"{_named(record)}, must be an object")
    for field in ("digest", "kind"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: {_named(record.get(field))}, must be text")
    for field in ("files", "metrics", "resources", "inputs"):
        if not isinstance(record.get(field), dict):
            raise ValueError(f"{field}: {_named(record.get(field))}, must be an object")
    for field in ("model", "data"):
        if not isinstance(record.get(field), dict | None):
            raise ValueError(f"{field}: {_named(record[field])}, must be an object or null")
    for name, entry in record["files"].items():
        if not (isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"files.{name}: {_named(entry)}, must be an object with sha256 and bytes")
    for name, value in (*record["metrics"].items(), ("seconds", record["resources"].get("seconds"))):
        if type(value) not in (int, float):
            raise ValueError(f"{name}: {_named(value)}, must be a number")
    for name, source in record["inputs"].items():
        if not (isinstance(source, dict) and isinstance(source.get("digest"), str)):
            raise ValueError(f"inputs.{name}: {_named(source)}, must be an object with a digest")
    return record


def _named(value: Any) -> str:
    """Return the beginning of a value, as JSON has it."""
    return f"{json.dumps(value):.40}"


def damages(folder: Path) -> Iterator[str]:
    """Yield a line for each file of an artifact that is not what its record says."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        yield f"{folder.name}/{RECORD}: missing, so nothing says what belongs here"
        return
    except (OSError, ValueError) as error:
        yield f"{folder.name}/{RECORD}: damaged ({type(error).__name__}: {error})"
        return
    digests = {name: entry["sha256"] for name, entry in record["files"].items()}
    for name, sha256 in digests.items():
        size = record["files"][name]["bytes"]
        path = folder / name
        if not path.is_file():
            yield f"{folder.name}/{name}: missing, it had {size:,} bytes"
        elif path.stat().st_size != size:
            yield f"{folder.name}/{name}: damaged, it has {path.stat().st_size:,} bytes instead of {size:,}"
        elif (found := file_sha256(path)) != sha256:
            yield f"{folder.name}/{name}: damaged, its sha256 is {found[:12]}... instead of {sha256[:12]}..."
    if record["digest"] != canonical_digest(digests):
        yield f"{folder.name}/{RECORD}: damaged, its digest is not that of the files it lists"


class Store:
    """A directory that holds everything; see the module's docstring for its layout."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def artifact_path(self, name: str) -> Path:
        return self.root / "store" / name

    def work_path(self, name: str) -> Path:
        return self.root / "work" / name

    def open(self) -> None:
        """Make the directories, or say why it cannot be done."""
        with disk_errors(self.root):
            for name in ("store", "work", "locks", "cache"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "locks" / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()

    # -- artifacts

    def get(self, name: str) -> Artifact | None:
        """Return a finished artifact, or None.

        Raises InputError when its record is damaged, or one of its files is missing or has another size: an artifact
        never changes, so somebody's hand was in it.
        """
        path = self.artifact_path(name)
        try:
            record = read_record(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{path / RECORD}: damaged ({error}): delete {path} and run again") from None
        for file, expected in record["files"].items():
            try:
                size = (path / file).stat().st_size
            except OSError:
                size = -1
            if size != expected["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes instead of {expected['bytes']}"
                raise InputError(f"{path / file}: {found}; the artifact is damaged: delete {path} and run again")
        return Artifact(name, path, record)

    def check(self, models: Iterable[Resolved]) -> None:
        """Digest again what was published of these inputs and their bases, before anything rests on it.

        Raises InputError when a file is not what its stage published.
        """
        read = [one for model in models for one in (model, model.base) if one is not None and one.artifact]
        for path in dict.fromkeys(Path(str(one.path)) for one in read):
            folder = path.parent if path.name == "model" and not (path / RECORD).exists() else path
            if problem := next(damages(folder), None):
                raise InputError(
                    f"{problem}; restore the file, or delete {folder} and run again; `align verify` names all"
                )

    def made(self, name: str | None, digest: str) -> Artifact | None:
        """Return the artifact of a key that has this content: `--force` moves the ones before to KEY~1, KEY~2, ..."""
        if name is None:
            return None
        folder = self.artifact_path(name).parent
        for path in [folder / name, *sorted(folder.glob(f"{name}~*"))]:
            artifact = self.get(path.name)
            if artifact is not None and artifact.digest == digest:
                return artifact
        return None

    def find(self, prefix: str) -> Artifact:
        """Return the artifact whose key starts with `prefix`, or whose content digest does."""
        folder = self.root / "store"
        names = sorted(path.name for path in folder.iterdir() if (path / RECORD).exists()) if folder.is_dir() else []
        found = [name for name in names if name == prefix] or [name for name in names if name.startswith(prefix)]
        if not found and len(prefix) >= 8:
            wanted = prefix if prefix.startswith("sha256:") else f"sha256:{prefix}"
            found = [name for name in names if (one := self.get(name)) and one.digest.startswith(wanted)]
        if len(found) != 1:
            what = "names no artifact" if not found else f"is the start of {', '.join(found)}"
            raise InputError(f"{prefix!r} {what} in {folder}; `align show FILE` lists the keys")
        artifact = self.get(found[0])
        assert artifact is not None
        return artifact

    def base_as_recorded(self, artifact: Artifact) -> Resolved | None:
        """Return the whole weights that an adapter belongs to, as its artifact names them; None for whole weights."""
        model = artifact.record.get("model") or {}
        if not model.get("adapter"):
            return None
        ref, digest = str(model["base"]), str(model["base_digest"])
        scheme, _, name = ref.partition(":")
        if scheme == "artifact":
            return self.find(digest).resolved(ref, None)
        if scheme == "hub":
            repo, _, revision = name.partition("@")
            return Resolved(ref=ref, digest=digest, hub=repo, revision=revision)
        return Resolved(ref=ref, digest=digest, path=name)

    def publish(self, name: str, record: Mapping[str, Any]) -> Artifact:
        """Turn `work/KEY/out` into an artifact: list and digest its files, fsync, rename.

        An artifact that is already there (`--force`) moves aside to KEY~1, KEY~2, ... and stays reachable by digest.
        A kill at any moment leaves either the work directory or the whole artifact; publishing again completes it.
        """
        out = self.work_path(name) / "out"
        if not (out / RECORD).exists():
            files = {}
            for path in visible_files(out):
                flush(path)
                files[str(path.relative_to(out))] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            digest = canonical_digest({file: entry["sha256"] for file, entry in files.items()})
            write_json(out / RECORD, {"schema": 1, "key": name, "digest": digest, **record, "files": files})
            for folder in {out, *(path.parent for path in visible_files(out))}:
                flush(folder)
        target = self.artifact_path(name)
        if target.exists():
            aside = next(path for n in range(1, 10**6) if not (path := target.with_name(f"{name}~{n}")).exists())
            target.rename(aside)
        log = self.work_path(name) / PROGRESS
        if log.exists():
            log.rename(out / KEPT_PROGRESS)
        out.rename(target)
        flush(target.parent)
        self.forget_work(name)
        artifact = self.get(name)
        assert artifact is not None
        return artifact

    def forget_work(self, name: str) -> None:
        """Delete a work directory: what it was for is published, or is to be made anew."""
        path = self.work_path(name)
        if path.exists():
            shutil.rmtree(path, ignore_errors=True)

    # -- locks

    @contextmanager
    def lock(self, name: str, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the exclusive lock of a key, after any other run and any left-over worker of it has ended.

        Says whom it waits for; raises Locked instead when `wait` is false. The kernel frees the lock of a process
        that dies, so there is nothing to clean up.
        """
        path = self.root / "locks" / name
        with path.open("a+", encoding="utf-8") as file:
            _flock(file.fileno(), path, wait, say)
            with self.worker_lock_path(name).open("a+", encoding="utf-8") as workers:
                _flock(workers.fileno(), path, wait, say)  # held for a moment: nobody writes in this work directory
            file.seek(0)
            file.truncate()
            started = time.strftime("%H:%M:%S")
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": started, "command": _command()}, file)
            file.flush()
            yield

    def worker_lock_path(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.worker"

    def busy(self, name: str) -> str | None:
        """Return who holds the lock of a key right now, in words; None when nobody does."""
        path = self.root / "locks" / name
        if not path.exists():
            return None
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder(path)
        return None


def _flock(descriptor: int, path: Path, wait: bool, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = holder(path)
        if not wait:
            raise Locked(f"{path.name} is being made by {who}; leave --no-wait out to wait for it") from None
        say(f"waiting for {who}, which is making {path.name}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def holder(path: Path) -> str:
    """Return who wrote a lock file last, in words."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"`{who['command']}` (pid {who['pid']} on {who['host']}, since {who['since']})"
    except (ValueError, KeyError):
        return "another run"


def _command() -> str:
    return " ".join(["align", *sys.argv[1:]])


def free_bytes(path: Path) -> int:
    """Return how many bytes can still be written where `path` lies."""
    return shutil.disk_usage(path).free
