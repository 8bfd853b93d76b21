"""Carry out a plan: for each stage lock, launch, watch, publish, and record it in the manifest."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_pipeline.pipeline import graph
from align_pipeline.pipeline import manifest as manifests
from align_pipeline.pipeline import store as stores
from align_pipeline.pipeline.errors import (
    ERRORS,
    AlignError,
    ConfigError,
    DataError,
    GateFailed,
    Interrupted,
    Locked,
    StageFailed,
)
from align_pipeline.pipeline.files import clean, shown, write_json
from align_pipeline.pipeline.plan import Planner, Step
from align_pipeline.pipeline.progress import Progress, Summary, read_progress
from align_pipeline.pipeline.rules import Judged
from align_pipeline.pipeline.store import RECORD, Artifact, disk_errors

LOG_LINES_SHOWN = 15
_KILLED_RANK = r"rank +: (\d+) .*\n *exitcode +: -9"
"""In the report of torch's launcher, which ends the other ranks by SIGTERM."""
_KILLED = "was killed (SIGKILL); when that was not you, the machine may be out of memory"


class Runner:
    """Runs the stages of one pipeline, one after another: they share one machine."""

    def __init__(self, planner: Planner, *, wait: bool, again: str, progress: Progress) -> None:
        self.planner, self.store, self.manifest = planner, planner.store, planner.manifest
        self.pipeline, self.wait, self.again, self.progress = planner.pipeline, wait, again, progress
        self.artifacts: dict[str, Artifact] = {}
        """What is up to date so far, also after a failure."""

    def run(self, targets: Sequence[str] = ()) -> dict[str, Artifact]:
        """Bring the targets up to date and return their artifacts; raise what a user can mend.

        The first stage that fails, or that a gate closes, ends the run.
        """
        order = graph.order(self.pipeline.stages, targets)
        done = self.artifacts
        with disk_errors(self.store.root):
            steps = self.planner.plan(targets)
            if problems := self.planner.misfits(steps):
                raise ConfigError(problems)
            if problems := self.planner.look(steps):
                raise DataError(problems)
            self.manifest.save(list(self.pipeline.stages))  # from now on the store knows which file plans its work
            try:
                for number, name in enumerate(order, 1):
                    self.progress.stage(number, len(order), name)
                    before = self._open(name, done)
                    done[name] = self._stage(name, done)
                    gates = self.planner.judge(name, done)
                    self.manifest.done(name, done[name], [*before, *gates])
                    self.manifest.save(list(self.pipeline.stages))
                    self._judge(name, gates)
            except (Locked, GateFailed):
                raise  # somebody else is making it, or it is made: that is no failure of it
            except AlignError as error:
                self._record_failure(order[len(done)], done, error)
                raise
        return done

    def _open(self, name: str, done: dict[str, Artifact]) -> list[Judged]:
        """Judge the gates that a stage has unasked; one that fails keeps it from starting."""
        gates = self.planner.judge_before(name, done)
        try:
            self._judge(name, gates)
        except GateFailed as error:
            self.manifest.blocked(name, gates, str(error), self.again)
            self.manifest.save(list(self.pipeline.stages))
            raise
        return gates

    def _judge(self, name: str, gates: Sequence[Judged]) -> None:
        """Say which gates hold, and raise GateFailed with those that do not."""
        failed = [
            f"{self.pipeline.place('stages', name, 'require', gate.gate)}: {gate.says}; {gate.remedy}"
            for gate in gates
            if not gate.passed
        ]
        if failed:
            raise GateFailed("\n".join(failed))
        for gate in gates:
            if gate.gate in self.pipeline.stages[name].require:
                self.progress.gate(f"{gate.gate}: {gate.says}")

    def _stage(self, name: str, done: dict[str, Artifact]) -> Artifact:
        step = self.planner.step(name, done)
        if step.status == "cached" and step.artifact:
            self.progress.cached(step.artifact)
            return step.artifact
        assert step.key and step.inputs is not None
        self.store.open()
        with self.store.lock(step.key, self.wait, self.progress.say):
            step = self.planner.step(name, done)  # while we waited, somebody may have made it
            if step.status == "cached" and step.artifact:
                self.progress.cached(step.artifact)
                return step.artifact
            artifact = self._make(step)
        self.planner.force.discard(name)
        self.progress.done(artifact, shown(self.store.root / self.pipeline.name / name))
        return artifact

    def _make(self, step: Step) -> Artifact:
        """Run a stage in its work directory and publish what it made."""
        assert step.key and step.inputs is not None
        work = self.store.work_path(step.key)
        if step.status == "run":
            self.store.forget_work(step.key)
        if not (work / "out" / RECORD).exists():  # else it was killed while publishing: everything is there
            self.store.check(step.inputs.values())
            self._prepare(step, work)
            self.progress.started(step.status, step.reason)
            self._launch(step, work)
            changed = self.planner.changed(step.inputs)
            if changed:
                self.store.forget_work(step.key)
                raise StageFailed(
                    f"stage {step.name}: {', '.join(changed)} changed while it ran, so its key does not say what it "
                    f"read; run again: {self.again}"
                )
        metrics = json.loads((work / "metrics.json").read_text(encoding="utf-8"))
        return self.store.publish(step.key, self._record(step, metrics, read_progress(work)))

    def _prepare(self, step: Step, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        if step.artifact and step.reason == "forced":  # remembered, so that a killed --force goes on as one
            (work / "forced").write_text(str(step.artifact.path.stat().st_ino), encoding="utf-8")
        (work / "scratch").mkdir(exist_ok=True)
        for left_over in ("out", "error.json", "metrics.json"):
            path = work / left_over
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (work / "out").mkdir()
        job: dict[str, Any] = {
            "stage": step.stage.model_dump(mode="json", exclude={"require"}),  # judged here, the work does not see it
            "inputs": {name: one.model_dump(mode="json") for name, one in (step.inputs or {}).items()},
            "launch": self.pipeline.launch.model_dump(mode="json"),
            "names": [self.pipeline.name, step.name],
        }
        old = work / "job.json"
        if old.exists():
            before = json.loads(old.read_text(encoding="utf-8"))
            if (before["stage"]["how"], before["launch"]) != (job["stage"]["how"], job["launch"]):
                (work / "how_changed").touch()
        write_json(old, job)

    def _launch(self, step: Step, work: Path) -> None:
        """Start the worker, show its progress, and raise StageFailed (or the worker's own error) when it fails."""
        worker = ["align_pipeline.pipeline.worker", str(work)]
        command = [sys.executable, "-m", *worker]
        if step.stage.distributed and self.pipeline.launch.processes > 1:
            ranks = ["--standalone", "--nproc_per_node", str(self.pipeline.launch.processes)]
            command = [sys.executable, "-m", "torch.distributed.run", *ranks, "--module", *worker]
        environment = {**os.environ, "ALIGN_RUNNER_PID": str(os.getpid())}
        with (work / "log.txt").open("ab") as log:
            began = log.tell()
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    self.progress.follow(work)
        except KeyboardInterrupt:
            _end(process)
            raise Interrupted(f"stage {step.name} was interrupted; continue with: {self.again}") from None
        self.progress.follow(work)
        if code or not (work / "metrics.json").exists():
            raise self._failure(step, work, code, began)

    def _failure(self, step: Step, work: Path, code: int, began: int) -> AlignError:
        """Return why a worker failed; `began` is the place in its log where this attempt begins."""
        log = work / "log.txt"
        killed = re.search(_KILLED_RANK, log.read_bytes()[began:].decode(errors="replace"))
        try:
            left = json.loads((work / "error.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            left = None
        crashed = False
        if killed:
            what = f"its rank {killed[1]} {_KILLED}"  # whatever the others said when they lost it
        elif left and left["error"] not in ("AlignError", "StageFailed"):
            cls, message = ERRORS[left["error"]], left["message"]
            return cls(left["problems"]) if issubclass(cls, DataError | ConfigError) else cls(message)
        elif left:
            what, crashed = left["message"], left["error"] == "StageFailed"
        elif stores.free_bytes(work) < 2**16:
            what = f"{work}: the disk is full; free some space and run again: the stage continues where it was"
        elif code == -signal.SIGKILL:
            what = f"its worker {_KILLED}"
        else:
            what, crashed = f"its worker ended with {'signal ' + str(-code) if code < 0 else f'exit code {code}'}", True
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        lines = [f"stage {step.name} failed: {what}", *(f"  | {line}" for line in tail)]
        lines += [f"  whole log: {shown(log)}", f"  continue with: {self.again}"]
        if crashed:
            lines.append(f"  report it with: {self._report(step)}")
        return StageFailed("\n".join(lines))

    def _report(self, step: Step) -> str:
        """Return the command that makes an issue of a crash."""
        file, root = self.pipeline.file, self.store.root
        what = f"{shown(file)}:{step.name}" if file.is_file() else str(step.key)
        flags = ["--store", shown(root)] if root != Path("runs").absolute() else []
        return shlex.join(["align", "report-bug", what, *flags])

    def _record_failure(self, name: str, done: dict[str, Artifact], error: AlignError) -> None:
        """Write the failure into the manifest; a disk that cannot hold it must not hide the error itself."""
        try:
            key = self.planner.step(name, done).key or ""
            step = read_progress(self.store.work_path(key)).step if key else 0
            first_line = clean(str(error)).splitlines()[0]
            self.manifest.failed(name, f"work/{key}", step, first_line, self.again)
            self.manifest.save(list(self.pipeline.stages))
        except (AlignError, OSError) as also:
            if str(also) != str(error):
                self.progress.say(f"the manifest could not be written: {also}")

    def _record(self, step: Step, metrics: dict[str, float], used: Summary) -> dict[str, Any]:
        """Return what artifact.json says beside the files."""
        assert step.key and step.inputs is not None
        work = self.store.work_path(step.key)
        stage, inputs = step.stage, step.inputs
        model: dict[str, Any] | None = None
        if (work / "out" / "adapter").is_dir():
            base = inputs[stage.starts_from or "model"].plain
            model = {"base": _base_name(base), "base_digest": base.digest, "adapter": "adapter"}
        elif (work / "out" / "model").is_dir():
            model = {"base": None, "base_digest": None, "adapter": None}
        return {
            "stage": stage.type,
            "version": stage.version,
            "kind": stage.produces,
            "model": model,
            "config": stores.configuration(stage),
            "how": {**stage.how.model_dump(mode="json"), "changed_between_resumes": (work / "how_changed").exists()},
            "inputs": {
                name: {
                    "ref": one.ref,
                    "digest": one.digest,
                    "base": one.base.digest if one.base else None,
                    "artifact": one.artifact,
                }
                for name, one in inputs.items()
            },
            "data": _reported(work, "rows"),
            "metrics": metrics,
            "resources": {**used.resources(), **_reported(work, "resources")},
            "made": manifests.provenance(used.gpu),
        }


def _reported(work: Path, what: str) -> dict[str, Any]:
    """Return what the stage said of its rows, by field, or of the machine, by name."""
    path = work / "scratch" / f"{what}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _base_name(base: Any) -> str:
    """Return how a later run finds the base of an adapter again; its digest is checked then."""
    if base.hub:
        return f"hub:{base.hub}@{base.revision}"
    return f"artifact:{base.artifact}" if base.artifact else f"file:{base.path}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a worker and its children to end, and make them when they do not."""
    for sign, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
