"""One grammar for a result on the command line: `FILE:STAGE`, or the start of an artifact's key or digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.config import Pipeline, load
from align_pipeline.pipeline.errors import AlignError, ConfigError, InputError, near_or_all
from align_pipeline.pipeline.inputs import Digests
from align_pipeline.pipeline.manifest import Manifest, artifact_of, read_manifest
from align_pipeline.pipeline.plan import Planner
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.pipeline.store import Artifact, Store


def known(pipeline: Pipeline, names: Sequence[str]) -> Sequence[str]:
    """Return names that are all stages of a pipeline; raise ConfigError for one that is not."""
    for name in names:
        if name not in pipeline.stages:
            raise ConfigError([f"{pipeline.file}: no stage {name!r}{near_or_all(name, pipeline.stages)}"])
    return names


def file_and_stage(what: str) -> tuple[Path, str] | None:
    """Return the parts of `FILE:STAGE`; None for the key of an artifact."""
    name, colon, stage = what.rpartition(":")
    return (Path(name), stage) if colon and Path(name).is_file() else None


def artifact_named(store: Store, what: str) -> Artifact:
    """Return the artifact that a word of the command line names."""
    return store.find(str(entry_named(store, what)["artifact"]) if file_and_stage(what) else what)


def entry_named(store: Store, what: str) -> Mapping[str, Any]:
    """Return what the manifest says of `FILE:STAGE`, which must be done."""
    parts = file_and_stage(what)
    assert parts is not None
    file, stage = parts
    pipeline = load(file, files_exist=False)
    known(pipeline, [stage])
    return artifact_of(store, pipeline.name, file, stage)[1]


def outdated(store: Store, what: str) -> str | None:
    """Return a note where FILE:STAGE would be made anew by a run now: what is there is of the file as it was."""
    parts = file_and_stage(what)
    if parts is None:
        return None
    file, stage = parts
    with suppress(AlignError, OSError):  # what the file reads may be gone: then nothing can be said
        pipeline = load(file)
        step = Planner(pipeline, store, Manifest(store, pipeline.name, file)).plan([stage])[-1]
        if step.status not in ("cached", "blocked"):
            return f"note: {what} was made before the file or what it reads changed ({step.status}: {step.reason})"
    return None


def pipeline_of(store: Store, what: str, artifact: Artifact) -> Pipeline | None:
    """Return the pipeline that made an artifact: the one that was named, else one whose manifest has it."""
    parts = file_and_stage(what)
    if parts is not None:
        return load(parts[0], files_exist=False)
    for path in sorted(store.root.glob("*/manifest.json")):
        manifest = read_manifest(path)
        file = Path(str(manifest.get("config", "")))
        if file.is_file() and any(entry.get("artifact") == artifact.key for entry in manifest["stages"].values()):
            with suppress(ConfigError):  # the file has changed since; what it made is what it was
                return load(file, files_exist=False)
    return None


def model_named(store: Store, what: str, artifact: Artifact, pipeline: Pipeline | None) -> Resolved:
    """Return a model of the store as an input, its base found and unchanged."""
    if pipeline is not None:
        planner = Planner(pipeline, store, Manifest(store, pipeline.name, pipeline.file))
        return artifact.resolved(what, planner.base_of(artifact))
    return artifact.resolved(what, _base(store, artifact))


def _base(store: Store, artifact: Artifact) -> Resolved | None:
    """Return the same; raise InputError for a file that is no longer what the adapter was trained on."""
    base = store.base_as_recorded(artifact)
    if base is None or base.path is None or base.artifact is not None:
        return base
    path = Path(base.path)
    if not path.exists() or Digests(store.root / "digests.json").of(path) != base.digest:
        state = "has changed since" if path.exists() else "is not there any more"
        raise InputError(
            f"{artifact.key} is an adapter of {base.ref}, which {state}; restore it, or name the stage as FILE:STAGE "
            "of a pipeline whose model is that base"
        )
    return base
