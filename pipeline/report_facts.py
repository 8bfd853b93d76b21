"""What a report knows: every stage with its artifact, gates, curves and warnings, and every evaluation.

Read from the store, the manifest and the plan; nothing is changed. What cannot be read becomes a sentence on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align_pipeline.pipeline import graph
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.files import shown
from align_pipeline.pipeline.manifest import ancestors, read_manifest
from align_pipeline.pipeline.plan import Planner, Step
from align_pipeline.pipeline.progress import RESERVED, read_lines, read_progress, summed_up
from align_pipeline.pipeline.store import KEPT_PROGRESS, PROGRESS, Artifact, Store

Status = Literal["done", "outdated", "running", "unfinished", "failed", "blocked", "waits", "new", "damaged"]

_UNDRAWN = RESERVED - {"gpu_utilization"}
SAMPLES_READ_BYTES = 64 * 2**20
"""Of an evaluation's answers: the distributions are those of the prompts until here."""
LOG_TAIL_BYTES = 6000
COMPARE = ".compare/manifest.json"
"""The manifest of `align compare`, which holds what was compared last."""
COMPARED = "align compare"


@dataclass(frozen=True)
class StageFacts:
    """One stage of the pipeline, as it is now."""

    name: str
    type: str
    needs: tuple[str, ...]
    status: Status
    says: str = ""
    """Why it is what it is: an error, the reason of the plan, who is running it."""
    again: str = ""
    """The command that goes on."""
    artifact: Artifact | None = None
    """What it made; of an outdated stage what it made before."""
    gates: tuple[Mapping[str, Any], ...] = ()
    """As the manifest keeps them."""
    points: tuple[Mapping[str, float], ...] = ()
    """What was logged, in the order of steps."""
    warnings: tuple[str, ...] = ()
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Seconds, memory, rates: as in artifact.json, or of what is not finished so far."""
    pair_scores: tuple[tuple[float, float], ...] = ()
    """What a reward model gave the chosen and the rejected answer of each held-out pair."""
    log_tail: str = ""
    """The end of log.txt, of a stage that failed."""

    @property
    def record(self) -> Mapping[str, Any]:
        return self.artifact.record if self.artifact else {}


@dataclass(frozen=True)
class Evaluation:
    """Models beside a baseline on the same prompts."""

    title: str
    artifact: Artifact
    report: Mapping[str, Any]
    samples: tuple[Mapping[str, Any], ...]
    all_read: bool
    """Whether `samples` are those of all prompts."""

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.artifact.record["metrics"]
        return metrics

    @property
    def baseline(self) -> str:
        return str(self.report["baseline"])

    @property
    def models(self) -> list[str]:
        return [str(name) for name in self.report["models"]]

    def of(self, model: str, metric: str) -> float | None:
        """Return a metric of a model; None where it was not measured, or is no number."""
        value = self.metrics.get(f"{model}/{metric}")
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Facts:
    """All that a page is made of."""

    pipeline: str
    file: str
    """The pipeline file, as it is typed here."""
    stages: tuple[StageFacts, ...]
    """Each after what it reads."""
    evaluations: tuple[Evaluation, ...]
    lineage: tuple[Artifact, ...]
    """What the stages made and what that was made from, the oldest first."""
    problems: tuple[str, ...] = field(default=())
    """What could not be read, in words."""


def gather(planner: Planner, targets: Sequence[str] = ()) -> Facts:
    """Return what is known of a pipeline; of what is not planned (the targets are, or all), what its manifest says."""
    problems: list[str] = []
    steps: dict[str, Step] = {}
    try:
        steps = {step.name: step for step in planner.plan(targets)}
    except (AlignError, OSError) as error:
        problems.append(f"The pipeline cannot be planned now, so this is what the last run left: {error}")
    done = {name: step.artifact for name, step in steps.items() if step.status == "cached" and step.artifact}
    stages = tuple(
        _stage(planner, name, steps.get(name), done, problems) for name in graph.order(planner.pipeline.stages)
    )
    return Facts(
        pipeline=planner.pipeline.name,
        file=shown(planner.pipeline.file),
        stages=stages,
        evaluations=tuple(_evaluations(planner.store, stages, problems)),
        lineage=tuple(_lineage(planner.store, stages, problems)),
        problems=tuple(problems),
    )


# --- stages -----------------------------------------------------------------------------------------------------------


def _stage(
    planner: Planner, name: str, step: Step | None, done: Mapping[str, Artifact], problems: list[str]
) -> StageFacts:
    stage, entry = planner.pipeline.stages[name], planner.manifest.stages.get(name, {})
    store = planner.store
    artifact, damage = done.get(name), ""
    gates = tuple(entry.get("gates", ()))
    if step is not None:
        judged = [*planner.judge_before(name, done), *(planner.judge(name, done) if artifact else ())]
        gates = tuple(gate.record() for gate in judged) or gates
    if artifact is None and entry.get("status") == "done":
        artifact, damage = _made(store, entry)
    status, says = _status(store, step, entry, artifact, damage)
    work = None
    if status in ("failed", "running", "unfinished"):
        key = entry["work"].rpartition("/")[2] if status == "failed" else step.key if step else None
        work = store.work_path(key) if key else None
    log: list[dict[str, Any]] = []
    points: list[dict[str, float]] = []
    scores: list[tuple[float, float]] = []
    try:
        if work is not None:
            log = read_lines(work / PROGRESS)
        elif artifact is not None:
            log = read_lines(artifact.path / KEPT_PROGRESS)
        points = _points(None if work else artifact, log)
        scores = _pair_scores(artifact)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{name}: its curves cannot be read ({type(error).__name__}: {error})")
    used = read_progress(work) if work else summed_up(log)
    said = [text.removeprefix("warning: ") for text in used.said if text.startswith("warning: ")]
    return StageFacts(
        name=name,
        type=stage.type,
        needs=tuple(graph.needs(stage)),
        status=status,
        says=says,
        again=str(entry.get("continue", "")) if status in ("failed", "blocked") else "",
        artifact=artifact,
        gates=gates,
        points=tuple(points),
        warnings=tuple(said),
        resources=artifact.record["resources"] if artifact and not work else used.resources() if log else {},
        pair_scores=tuple(scores),
        log_tail=_tail(work / "log.txt") if work and status == "failed" else "",
    )


def _made(store: Store, entry: Mapping[str, Any]) -> tuple[Artifact | None, str]:
    """Return what the manifest says a stage is, or what is wrong with it."""
    try:
        return store.made(str(entry["artifact"]), str(entry["digest"])), ""
    except AlignError as error:
        return None, str(error)


def _status(
    store: Store, step: Step | None, entry: Mapping[str, Any], artifact: Artifact | None, damage: str
) -> tuple[Status, str]:
    """Return what a stage is now and why, from its plan and from what the last run wrote of it."""
    if damage:
        return "damaged", damage
    if step is not None and step.status == "cached":
        return "done", step.reason
    planned = step.reason if step else ""
    if step is not None and step.key and (who := store.busy(step.key)):
        return "running", who
    if entry.get("status") == "failed":
        return "failed", str(entry["error"])
    if (step is not None and step.status == "blocked") or (step is None and entry.get("status") == "blocked"):
        return "blocked", planned or str(entry["error"])
    if artifact is not None:
        return ("outdated", planned) if step else ("done", artifact.key)
    if step is not None and step.status == "resume":
        return "unfinished", planned
    return ("waits", planned) if step is not None and step.status == "waits" else ("new", planned)


def _points(artifact: Artifact | None, log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return a point for each step: the trainer's curve where there is one, and what only the log knows.

    A step that was taken again after a kill counts as it was taken last.
    """
    merged: dict[float, dict[str, float]] = {}
    for line in log:
        if line.get("total"):
            values = {name: value for name, value in line.items() if name not in _UNDRAWN and _is_number(value)}
            merged.setdefault(float(line["step"]), {}).update(values)
    curve = artifact.path / "curve.jsonl" if artifact else None
    if curve is not None and curve.is_file():
        with curve.open(encoding="utf-8") as file:
            for text in file:
                point = json.loads(text)
                merged.setdefault(float(point["step"]), {}).update({k: v for k, v in point.items() if _is_number(v)})
    return [{**merged[step], "step": step} for step in sorted(merged)]


def _pair_scores(artifact: Artifact | None) -> list[tuple[float, float]]:
    path = artifact.path / "held_out_scores.jsonl" if artifact and artifact.kind == "reward_model" else None
    if path is None or not path.is_file():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(float(row["chosen"]), float(row["rejected"])) for row in rows if math.isfinite(sum(row.values()))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tail(path: Path) -> str:
    """Return the end of a log file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace").split("\n", 1)[-1].strip()
    except OSError:
        return ""


# --- evaluations ------------------------------------------------------------------------------------------------------


def _evaluations(store: Store, stages: Sequence[StageFacts], problems: list[str]) -> Iterator[Evaluation]:
    """Yield what evaluate stages found, and what `align compare` found last when it was about models made here."""
    found = [(stage.name, stage.artifact) for stage in stages if stage.artifact is not None]
    entry = read_manifest(store.root / COMPARE)["stages"].get("compare", {})
    compared = _made(store, entry)[0] if entry.get("status") == "done" else None
    ours = {artifact.digest for _, artifact in found}
    if compared is not None and any(one["digest"] in ours for one in compared.record["inputs"].values()):
        found.append((COMPARED, compared))
    for title, artifact in found:
        path = artifact.path / "report.json"
        if artifact.kind != "report" or not path.is_file():
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            samples, all_read = _samples(artifact.path / "samples.jsonl")
            evaluation = Evaluation(title, artifact, report, samples, all_read)
            assert evaluation.baseline in evaluation.models
            yield evaluation
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            problems.append(f"{title}: what it found cannot be read ({type(error).__name__}: {error})")


_ANSWER: Mapping[str, Any] = {"text": "", "finish": "stop", "scores": {}}


def _samples(path: Path) -> tuple[tuple[Mapping[str, Any], ...], bool]:
    """Return what each prompt was answered, and whether these are all; the token ids are left out."""
    rows: list[Mapping[str, Any]] = []
    read = 0
    if not path.is_file():
        return (), True
    with path.open("rb") as file:
        for line in file:
            read += len(line)
            if read > SAMPLES_READ_BYTES and rows:
                return tuple(rows), False
            row = json.loads(line)
            answers = {
                model: [{name: one.get(name, default) for name, default in _ANSWER.items()} for one in given]
                for model, given in row["answers"].items()
            }
            rows.append({"prompt": row["prompt"], "answers": answers})
    return tuple(rows), True


def _lineage(store: Store, stages: Sequence[StageFacts], problems: list[str]) -> Iterator[Artifact]:
    seen: set[str] = set()
    for stage in stages:
        if stage.artifact is None:
            continue
        try:
            chain = ancestors(store, stage.artifact)
        except AlignError as error:
            chain = [stage.artifact]
            problems.append(f"{stage.name}: what it was made from cannot be read ({error})")
        for artifact in chain:
            if artifact.digest not in seen:
                seen.add(artifact.digest)
                yield artifact
