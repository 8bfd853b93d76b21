"""The manifest: which artifact each stage of one pipeline is. A view: delete it and the next run rebuilds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.errors import AlignError, ConfigError, InputError
from align_pipeline.pipeline.files import shown, write_json
from align_pipeline.pipeline.rules import Judged
from align_pipeline.pipeline.store import Artifact, Store

STATUSES = ("done", "failed", "blocked")
COMPARED = ".compare"
"""The folder of what `align compare` made: no pipeline can have this name."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Manifest:
    """`DIR/NAME/manifest.json` and the links beside it."""

    def __init__(self, store: Store, name: str, config: Path) -> None:
        self.folder = store.root / name
        self.path = self.folder / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = read_manifest(self.path)["stages"]
        self._head = {"schema": 1, "pipeline": name, "config": str(config.absolute())}
        self._mine: set[str] = set()

    def claim(self) -> str | None:
        """Return a note where the manifest was that of a file that is gone; None where it is new or this file's own.

        Raises ConfigError when it is that of another file, whose stages these are then not.
        """
        mine = Path(str(self._head["config"]))
        other = Path(str(read_manifest(self.path).get("config", mine)))
        name, store = self._head["pipeline"], shown(self.folder.parent)
        if not other.is_absolute() or other == mine or not mine.is_file():
            return None
        if not other.is_file():
            return f"note: {name!r} in {store} was the pipeline of {shown(other)}, which is not there any more"
        if other.samefile(mine):
            return None
        rule = "write another `name:` in one of them (what was made is found again), or use another --store"
        raise ConfigError([f"{shown(mine)}: name: {name!r} is {shown(other)}'s in {store}; {rule}"])

    def done(self, stage: str, artifact: Artifact, gates: Sequence[Judged] = ()) -> None:
        """Record that a stage is this artifact, and what came of its gates."""
        self._mine.add(stage)
        self.stages[stage] = {
            "status": "done",
            "artifact": artifact.key,
            "kind": artifact.kind,
            "digest": artifact.digest,
            "seconds": artifact.record["resources"]["seconds"],
            "metrics": artifact.record["metrics"],
            **({"gates": [gate.record() for gate in gates]} if gates else {}),
        }
        self._link(stage, artifact)

    def failed(self, stage: str, work: str, step: int, error: str, again: str) -> None:
        """Record that a stage failed, and what continues it."""
        self._mine.add(stage)
        self.stages[stage] = {"status": "failed", "work": work, "step": step, "error": error, "continue": again}

    def blocked(self, stage: str, gates: Sequence[Judged], error: str, again: str) -> None:
        """Record that a stage was not started, and which of its gates say so."""
        self._mine.add(stage)
        records = [gate.record() for gate in gates]
        self.stages[stage] = {"status": "blocked", "gates": records, "error": error, "continue": again}

    def save(self, order: list[str]) -> None:
        """Write the manifest, with the stages in the order of the file; those that left the file leave it too.

        Another run of the pipeline may have written since: its stages are kept, ours replace their own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            old = read_manifest(self.path)
            latest = {**old["stages"], **{name: self.stages[name] for name in self._mine}}
            self.stages = {name: latest[name] for name in order if name in latest}
            if old != {**self._head, "updated": old.get("updated"), "stages": self.stages}:
                write_json(self.path, {**self._head, "updated": now(), "stages": self.stages})

    def _link(self, stage: str, artifact: Artifact) -> None:
        """Point `DIR/NAME/STAGE` at the artifact, for people; replaced by one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        link, target = self.folder / stage, Path(os.path.relpath(artifact.path, self.folder))
        if link.is_symlink() and link.readlink() == target:
            return
        if link.is_dir() and not link.is_symlink():
            raise AlignError(f"{link}: a folder stands where a link to {artifact.key} belongs; move it away")
        fresh = self.folder / f".{stage}.{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(link)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what a manifest says; of one that is damaged or not there, nothing: the next run writes it anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stages = {name: entry for name, entry in found["stages"].items() if entry["status"] in STATUSES}
        return {**found, "stages": stages}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"stages": {}}


def artifact_of(store: Store, name: str, file: Path, stage: str) -> tuple[Artifact, Mapping[str, Any]]:
    """Return what a stage of the pipeline `name` in `file` is now, and what the manifest says of it."""
    manifest = Manifest(store, name, file)
    manifest.claim()
    entry = manifest.stages.get(stage)
    if entry is None or entry["status"] != "done":
        why = "was never run" if entry is None else f"{entry['status']}: {entry['error']}"
        raise InputError(f"{file}:{stage}: {why}; `align run {file} {stage}` makes it")
    return store.find(entry["artifact"]), entry


def provenance(gpu: str | None) -> dict[str, Any]:
    """Return when, where and by which versions an artifact is being made."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "at": now(),
        "host": socket.gethostname(),
        "command": " ".join(["align", *sys.argv[1:]]),
        "git": _git_revision(),
        "align": metadata.version("align-pipeline"),
        "python": sys.version.split()[0],
        **{name: version for name, version in versions.items() if version},
        "gpu": gpu,
    }


def _git_revision() -> str | None:
    """Return the commit of the folder the command runs in, with `+dirty` when files differ; None outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def lineage(store: Store, artifact: Artifact, depth: int = 0) -> list[str]:
    """Return an indented line per artifact and input that this one was made from, itself first."""
    lines = [f"{'  ' * depth}{artifact.key}  {artifact.digest[:19]}"]
    inputs: Mapping[str, Any] = artifact.record["inputs"]
    for name, one in inputs.items():
        made_by = one.get("artifact")
        source = store.get(made_by) if made_by else None
        if source is not None and source.digest == one["digest"]:
            head, *rest = lineage(store, source, depth + 1)
            lines += [f"{'  ' * (depth + 1)}{name}: {head.strip()}", *rest]
        else:
            lines.append(f"{'  ' * (depth + 1)}{name}: {one['ref']}  {one['digest'][:19]}")
    return lines


def ancestors(store: Store, artifact: Artifact) -> list[Artifact]:
    """Return the artifacts that this one was made from, directly or not, the oldest first and itself last."""
    found: dict[str, Artifact] = {}

    def visit(one: Artifact) -> None:
        if one.digest not in found:
            for source in one.record["inputs"].values():
                made = store.made(source.get("artifact"), source["digest"])
                if made is not None:
                    visit(made)
            found[one.digest] = one

    visit(artifact)
    return list(found.values())
