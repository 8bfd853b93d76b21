"""The plan: for each stage whether it is cached, must run, can resume, waits or is blocked, and why, in words.

Reads the disk and changes nothing. Inputs enter a key by content, so the key of a stage that reads one that must run
is not known yet: it waits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from align_pipeline.pipeline import gates, graph
from align_pipeline.pipeline import store as stores
from align_pipeline.pipeline.config import Pipeline
from align_pipeline.pipeline.errors import AlignError, InputError
from align_pipeline.pipeline.inputs import Digests, Hub, file_path, resolve_reference
from align_pipeline.pipeline.manifest import Manifest
from align_pipeline.pipeline.rules import Judged
from align_pipeline.pipeline.stage import Metrics, Resolved, Stage, gpus, references
from align_pipeline.pipeline.store import Artifact, Store

Status = Literal["cached", "run", "resume", "waits", "blocked"]


@dataclass(frozen=True)
class Step:
    """One stage of a plan."""

    name: str
    stage: Stage
    status: Status
    reason: str
    key: str | None = None
    inputs: Mapping[str, Resolved] | None = None
    artifact: Artifact | None = None
    waits_for: tuple[str, ...] = ()
    """The stages that must be made before anything is known of it."""


class Planner:
    """Everything that planning one pipeline needs; the runner asks it again for each stage whose inputs are there."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        manifest: Manifest,
        *,
        force: Collection[str] = (),
        update: bool = False,
        rehash: bool = False,
        given: Mapping[str, Artifact] | None = None,
        bases: Collection[str] = (),
    ) -> None:
        """Plan for a store; `given` are artifacts by the names under which stages read them, beside those it makes.

        `bases` are further models, `file:` with absolute paths, that adapters among these may have been trained on.
        """
        self.given, self._bases = dict(given or {}), bases
        self.pipeline, self.store, self.manifest, self.force = pipeline, store, manifest, set(force)
        self._digests = Digests(store.root / "digests.json", rehash)
        self._hub = Hub(store.root / pipeline.name / "hub.json", update)

    def plan(self, targets: Sequence[str] = ()) -> list[Step]:
        """Plan the targets and what they need, in the order in which they would run."""
        done: dict[str, Artifact] = {}
        closed: dict[str, str] = {}  # stages that nothing may follow -> why
        steps = []
        for name in graph.order(self.pipeline.stages, targets):
            step = self.step(name, done)
            held = [closed[other] for other in graph.needs(step.stage) if other in closed]
            held += [f"{one.gate}: {one.says}" for one in self.judge_before(name, done) if not one.passed]
            if held:
                step = Step(name, step.stage, "blocked", "; ".join(dict.fromkeys(held)))
                closed[name] = f"waits for {name}, which is blocked"
            elif step.artifact and step.status == "cached":
                done[name] = step.artifact
                failed = [f"{one.gate}: {one.says}" for one in self.judge(name, done) if not one.passed]
                if failed:
                    step = replace(step, reason=f"{step.reason}; gate failed: {'; '.join(failed)}")
                    closed[name] = f"a gate of {name} failed: {'; '.join(failed)}"
            steps.append(step)
        return steps

    def judge(self, name: str, done: Mapping[str, Artifact]) -> list[Judged]:
        """Judge what is required of a stage that is done."""
        return gates.judge(name, self.pipeline.stages[name], _metrics(done))

    def judge_before(self, name: str, done: Mapping[str, Artifact]) -> list[Judged]:
        """Judge the gates that a stage has unasked; none yet while something that it reads is not there."""
        stage = self.pipeline.stages[name]
        if not all(other in done for other in graph.needs(stage)):
            return []
        return gates.judge_before(stage, self.pipeline.stages, _metrics(done))

    def look(self, steps: Sequence[Step]) -> list[str]:
        """Return what is wrong with the first rows of the files that these stages will read; cached ones read nothing.

        Rows on the hub and those that a stage makes are looked at when they are read.
        """
        problems = []
        for step in steps:
            if step.status == "cached":
                continue
            files = {
                field: Resolved(ref=ref, digest="", path=str(file_path(ref, self.pipeline.folder)))
                for field, (ref, marked) in references(step.stage).items()
                if ref.startswith("file:") and "dataset" in marked.kinds
            }
            for field, found in step.stage.look(files).items():
                place = self.pipeline.place("stages", step.name, *field.split("."))
                problems += [f"{place}: {problem}" for problem in found]
        return problems

    def misfits(self, steps: Sequence[Step]) -> list[str]:
        """Return what of these stages cannot run, or is not proven to run, on `launch`; cached ones run on nothing."""
        launch, place = self.pipeline.launch, self.pipeline.place
        processes = place("launch", "processes")
        begun = [
            (step, self.store.work_path(step.key) / "scratch") for step in steps if step.status == "resume" and step.key
        ]
        problems = [
            f"{processes}: {launch.processes}, but {step.name}/{problem}"
            for step, scratch in begun
            if (problem := step.stage.resume_problem(scratch, launch))
        ]
        running = [step for step in steps if step.status != "cached" and step.stage.distributed]
        if launch.processes == 1 or not running:
            return problems
        problems += [
            f"{place('stages', step.name, *field.split('.'))}: {problem}"
            for step in running
            for field, problem in step.stage.launch_problems(launch).items()
        ]
        if 0 < (there := gpus()) < launch.processes:
            problems.append(f"{processes}: {launch.processes}, one a GPU, and here are {there}; lower it")
        return problems

    def step(self, name: str, done: Mapping[str, Artifact]) -> Step:
        """Plan one stage, given the artifacts of those that are up to date."""
        stage, done = self.pipeline.stages[name], {**self.given, **done}
        missing = [other for other in graph.needs(stage) if other not in done]
        if missing:
            return Step(name, stage, "waits", f"waits for {', '.join(missing)}", waits_for=tuple(missing))
        inputs = self.resolve(name, done)
        key = stores.key(stage, inputs)
        work = self.store.work_path(key)
        artifact = self.store.get(key)
        forced_before = artifact is not None and _replaces(work / "forced", artifact)
        if name in self.force:
            return Step(name, stage, "run", "forced", key, inputs, artifact)
        if artifact and not forced_before:
            return Step(name, stage, "cached", artifact.key, key, inputs, artifact)
        if (work / "scratch").is_dir():
            reason = "forced, and not finished" if forced_before else "not finished"
            return Step(name, stage, "resume", reason, key, inputs, artifact)
        return Step(name, stage, "run", self._why(name, stage, inputs), key, inputs)

    def resolve(self, name: str, done: Mapping[str, Artifact]) -> dict[str, Resolved]:
        """Find the inputs of a stage; the stages that it reads must be done."""
        stage = self.pipeline.stages[name]
        resolved = {}
        for field, (ref, marked) in references(stage).items():
            try:
                if ref.startswith("stage:"):
                    artifact = done[ref.removeprefix("stage:")]
                    resolved[field] = artifact.resolved(ref, self.base_of(artifact))
                else:
                    resolved[field] = self._find(ref, marked.hub or "model")
            except InputError as error:
                raise InputError(f"{self.pipeline.place('stages', name, *field.split('.'))}: {error}") from error
        return resolved

    def _models(self) -> list[str]:
        """Return the models on disk that the pipeline names, and the further bases."""
        models = {*self._bases, *models_on_disk(self.pipeline)}
        return sorted(ref for ref in models if file_path(ref, self.pipeline.folder).exists())

    def changed(self, inputs: Mapping[str, Resolved]) -> list[str]:
        """Return the inputs whose content is no longer what was resolved."""
        refs = {name: one for name, one in inputs.items() if not one.artifact and not one.hub}
        return [name for name, one in refs.items() if self._find(one.ref, "model").digest != one.digest]

    def _find(self, ref: str, repo_type: str) -> Resolved:
        return resolve_reference(ref, repo_type, self.pipeline.folder, self._digests, self._hub)

    def commit(self, ref: str) -> Resolved:
        """Find the commit of a model on the hub; raise InputError when nobody knows it."""
        return self._hub.resolve(ref, "model")

    def base_of(self, artifact: Artifact) -> Resolved | None:
        """Find the whole weights that an artifact's adapter was trained on; None when it has no adapter."""
        model: Mapping[str, Any] = artifact.record.get("model") or {}
        if not model.get("adapter"):
            return None
        ref, digest = str(model["base"]), str(model["base_digest"])
        if ref.startswith("hub:"):
            name, _, revision = ref.removeprefix("hub:").partition("@")
            return Resolved(ref=ref, digest=digest, hub=name, revision=revision)
        if ref.startswith("artifact:"):
            made = self.store.find(digest)
            return made.resolved(ref, None)
        for named in self._models():  # wherever the project lies now
            found = self._find(named, "model")
            if found.digest == digest:
                return found
        found = self._find(ref, "model")
        if found.digest != digest:
            raise InputError(
                f"{artifact.key} is an adapter of {ref}, whose files have changed since "
                f"({digest[:19]} -> {found.digest[:19]}); restore them, or run with --force to train it anew"
            )
        return found

    def _why(self, name: str, stage: Stage, inputs: Mapping[str, Resolved]) -> str:
        """Say why a stage must run, by comparing it with what the manifest last knew."""
        entry = self.manifest.stages.get(name)
        if entry is None:
            return "never run"
        if entry["status"] == "blocked":
            return "a gate held it back before"
        if entry["status"] != "done":
            return f"what failed before had other settings or inputs ({entry['work']})"
        try:
            old = self.store.get(entry["artifact"])
        except AlignError:
            old = None
        if old is None:
            return f"{entry['artifact']} is not in the store"
        return "; ".join(_differences(old.record, stage, inputs)) or f"{old.key} was made by another key"


def models_on_disk(pipeline: Pipeline) -> set[str]:
    """Return the `file:` references of a pipeline's models, with absolute paths."""
    refs = [one for stage in pipeline.stages.values() for one in references(stage).values()]
    models = [ref for ref, marked in refs if ref.startswith("file:") and "model" in marked.kinds]
    return {f"file:{file_path(ref, pipeline.folder)}" for ref in models}


def _metrics(done: Mapping[str, Artifact]) -> dict[str, Metrics]:
    return {name: artifact.record["metrics"] for name, artifact in done.items()}


def _replaces(mark: Path, artifact: Artifact) -> bool:
    """Tell whether a killed `--force` was about to replace this very artifact: the mark holds its folder's inode."""
    return mark.exists() and mark.read_text(encoding="utf-8") == str(artifact.path.stat().st_ino)


def _differences(old: Mapping[str, Any], stage: Stage, inputs: Mapping[str, Resolved]) -> list[str]:
    """Say in words what changed since an artifact was made."""
    if old["stage"] != stage.type:
        return [f"type: {old['stage']} -> {stage.type}"]
    words = [f"version {old['version']} -> {stage.version}"] if old["version"] != stage.version else []
    words += [f"config: {field} {was} -> {now}" for field, (was, now) in changed_settings(old["config"], stage).items()]
    for field in sorted(old["inputs"].keys() | inputs.keys()):
        before, after = old["inputs"].get(field), inputs.get(field)
        if before is None or after is None:
            words.append(f"input {field}: {'added' if before is None else 'removed'}")
        elif (before["digest"], before.get("base")) != (after.digest, after.base.digest if after.base else None):
            was_made, is_made = _short(before["artifact"], before["digest"]), _short(after.artifact, after.digest)
            words.append(f"input {field}: {was_made} -> {is_made}")
    return words


def changed_settings(before: Mapping[str, Any], stage: Stage) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a stage that are others than those of an artifact's record: field -> then and now."""
    was, now = flattened(before), flattened(stores.configuration(stage))
    chosen = flattened(stores.settings(stage))  # a field that this version of the stage added, at its default, is none
    fields = sorted(name for name in was.keys() | now.keys() if name in was or name in chosen)
    return {name: (was.get(name), now.get(name)) for name in fields if was.get(name) != now.get(name)}


def _short(artifact: str | None, digest: str) -> str:
    return f"{artifact.split('-')[0]}-{digest[7:11]}" if artifact else digest[7:15]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings with nested ones under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
