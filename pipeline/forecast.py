"""What a planned stage will take: memory by `estimate.py`, time as its last run here, and the setting that mends it.

Nothing here imports torch, and nothing is guessed: without a model's configuration there is no memory, and without a
run of the same stage on this machine no time.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.doctor import ask_driver, main_memory
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.estimate import GIB, Estimate, Machine, Shape, Unknown, estimate, holds_models, remedies
from align_pipeline.pipeline.inputs import file_path
from align_pipeline.pipeline.manifest import ancestors
from align_pipeline.pipeline.plan import Planner, Step, changed_settings
from align_pipeline.pipeline.progress import in_words, read_progress
from align_pipeline.pipeline.stage import Resolved, Stage, references
from align_pipeline.pipeline.store import configuration

ROOM = 0.9
"""Share of the memory that an estimate may fill: the rest is for what else runs there, and CUDA's allocator."""

NO_WORK = frozenset(
    "learning_rate schedule warmup weight_decay max_grad_norm seed beta label_smoothing lora.alpha center_rewards "
    "desirable_weight undesirable_weight kl_coef gamma gae_lambda clip value_clip value_coef missing_eos_penalty "
    "reward_clip whiten_rewards importance_cap".split()
)
"""Settings that change what is learnt and not how much is done for it; any other may change the time."""


@dataclass(frozen=True)
class Forecast:
    """What a stage will take, in words, and what to do when that is too much."""

    takes: str
    advice: str = ""


class Forecaster:
    """Says of the steps of one plan what they will take on this machine."""

    def __init__(self, planner: Planner, machine: Machine | None = None) -> None:
        self.planner, self._machine = planner, machine
        self._configs: dict[str, dict[str, Any] | Unknown] = {}

    @cached_property
    def machine(self) -> Machine:
        return self._machine or this_machine()

    def of(self, step: Step) -> Forecast | None:
        """Return what a step will take; None for one that does not run, or holds no model."""
        if step.status in ("cached", "blocked") or not holds_models(step.stage):
            return None
        time, whole = self._time(step), self.machine.memory
        try:
            shapes = self.shapes(step.stage)
            found = estimate(step.stage, shapes, self.machine, self.planner.pipeline.launch)
        except Unknown as reason:
            return Forecast(f"memory unknown: {reason}; {time}")
        except AlignError as reason:  # such as a batch that cannot be dealt, which the plan refuses and says itself
            why = "see below" if self.planner.misfits([step]) else reason
            return Forecast(f"memory unknown: {why}; {time}")
        takes = f"{_gib(found.bytes)} of {whole / GIB:.1f} GiB" if whole else _gib(found.bytes)
        if not whole or found.bytes <= self._room:
            return Forecast(f"{takes}, {time}")
        state = "too much" if found.bytes > whole else "too close"
        return Forecast(f"{takes}: {state}; {time}", self._advice(step.stage, shapes, found))

    @property
    def _room(self) -> float:
        return self.machine.memory * ROOM

    # --- memory -------------------------------------------------------------------------------------------------------

    def shapes(self, stage: Stage) -> dict[str, Shape]:
        """Return the shapes of the models that a stage holds, by field; raise Unknown."""
        found = {
            field: self._shape(ref)
            for field, (ref, marked) in references(stage).items()
            if {"model", "reward_model"} & set(marked.kinds) and ref.startswith(("stage:", "hub:", "file:"))
        }
        made = Shape.made_by(stage)
        return found | {"model": made} if made else found

    def _shape(self, ref: str) -> Shape:
        maker = self._maker(ref)
        if maker is None:
            config = self._config(ref)
            try:
                return replace(Shape.of(config), base=ref)
            except Unknown as reason:
                raise Unknown(f"{ref}: {reason}") from reason
        made, start = Shape.made_by(maker), _starts_from(maker)
        if made is not None:
            return replace(made, base=ref)
        if start is None:
            raise Unknown(f"{ref}: what it makes is not known here")
        whole = maker.type == "merge" or getattr(maker, "tuning", "") == "full"
        return replace(self._shape(start), base=ref) if whole else self._shape(start)

    def _maker(self, ref: str) -> Stage | None:
        return self.planner.pipeline.stages.get(ref.removeprefix("stage:")) if ref.startswith("stage:") else None

    def _origin(self, ref: str) -> str:
        """Return where the chain of stages behind a model begins."""
        maker = self._maker(ref)
        start = _starts_from(maker) if maker else None
        return self._origin(start) if start else ref

    def _config(self, ref: str) -> dict[str, Any]:
        """Return a model's config.json, looked for once; raise Unknown where it is not to be had."""
        if ref not in self._configs:
            try:
                self._configs[ref] = self._read_config(ref)
            except Unknown as reason:
                self._configs[ref] = reason
        found = self._configs[ref]
        if isinstance(found, Unknown):
            raise found
        return found

    def _read_config(self, ref: str) -> dict[str, Any]:
        if ref.startswith("file:"):
            folder = file_path(ref, self.planner.pipeline.folder)
            paths = [folder / "config.json", folder / "model" / "config.json"]
            path = next((path for path in paths if path.is_file()), paths[0])
        else:
            path = self._downloaded(ref)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unknown(f"{ref}: no config.json that can be read ({type(error).__name__})") from error
        if not isinstance(found, dict):
            raise Unknown(f"{ref}: its config.json holds {json.dumps(found)[:40]}, and must hold a mapping")
        return found

    def _downloaded(self, ref: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            where = self.planner.commit(ref)
            return Path(hf_hub_download(str(where.hub), "config.json", revision=where.revision, etag_timeout=5))
        except Exception as error:  # whatever the HTTP library of this release raises
            raise Unknown(f"{ref}: its config.json is not in the cache, and the hub gave none") from error

    def _advice(self, stage: Stage, shapes: Mapping[str, Shape], found: Estimate) -> str:
        """Return what is largest, and the least change that makes it fit."""
        largest, words = f"{_gib(found.parts[found.largest])} of it is {found.largest}", ""
        for words, changed, launch in remedies(stage, self.machine, self.planner.pipeline.launch):
            found = estimate(changed, shapes, self.machine, launch)
            if found.bytes <= self._room:
                return f"{largest}; with {words} it is {_gib(found.bytes)}"
        still = f"with {words} it is still {_gib(found.bytes)}: " if words else "no setting changes that: "
        return f"{largest}; {still}take a smaller model or more memory"

    # --- time ---------------------------------------------------------------------------------------------------------

    def _time(self, step: Step) -> str:
        """Return how long a step will take, as far as a run on this machine has shown it."""
        if step.status == "resume" and step.key:
            done = read_progress(self.planner.store.work_path(step.key))
            if 0 < done.step < done.total:
                left = done.seconds * (done.total - done.step) / done.step
                return f"~{in_words(left)} to go at its pace so far"
        try:
            seconds, times = self._last_run(step)
        except Unknown as reason:
            return f"time unknown {reason}"
        return f"~{in_words(seconds * times)} as its last run{f' ({in_words(seconds)})' if times != 1 else ''}"

    def _last_run(self, step: Step) -> tuple[float, float]:
        """Return the seconds of a stage's last run, and how much more there is to do now; raise Unknown."""
        key = self.planner.manifest.stages.get(step.name, {}).get("artifact")
        try:
            artifact = self.planner.store.get(key) if key else None
            made = ancestors(self.planner.store, artifact) if artifact else []
        except AlignError:  # damaged, which is not what is asked here
            artifact = None
        if artifact is None or artifact.record["stage"] != step.stage.type:
            raise Unknown("until it ran once here")
        record = artifact.record
        here = record["made"]["host"] == socket.gethostname() and bool(record["made"]["gpu"]) == self.machine.gpu
        began_with = {one["ref"] for ancestor in made for one in ancestor.record["inputs"].values()}
        begins_with = {self._origin(ref) for ref, marked in references(step.stage).values() if "model" in marked.kinds}
        if not (here and begins_with <= began_with):
            raise Unknown("until it ran once here")
        (scales, before), (scales_now, amount) = (
            _work(step.stage, record["config"]),
            _work(step.stage, configuration(step.stage)),
        )
        changed = changed_settings(record["config"], step.stage).keys() - NO_WORK - set(scales)
        if changed or scales != scales_now or record["inputs"].keys() != references(step.stage).keys():
            raise Unknown("with these settings")
        if any(self._reads_others(step, field, one) for field, one in record["inputs"].items()):
            raise Unknown("with other rows")
        return float(record["resources"]["seconds"]), amount / before

    def _reads_others(self, step: Step, field: str, before: Mapping[str, Any]) -> bool:
        """Tell whether the rows of a field are not, or may not be, those that its last run read."""
        ref, marked = references(step.stage)[field]
        if "dataset" not in marked.kinds:
            return False
        if step.inputs is not None:
            return step.inputs[field].digest != str(before["digest"])
        if ref.startswith("file:"):
            return bool(self.planner.changed({field: Resolved(ref=ref, digest=before["digest"])}))
        if not ref.startswith("stage:"):
            return ref != str(before["ref"])
        maker = ref.removeprefix("stage:")
        made = self.planner.manifest.stages.get(maker, {}).get("artifact")
        return maker in step.waits_for or made != str(before["artifact"])


def _starts_from(maker: Stage) -> str | None:
    return getattr(maker, maker.starts_from or "model", None)


def _work(stage: Stage, config: Mapping[str, Any]) -> tuple[tuple[str, ...], float]:
    """Return the settings with which a stage's work is known to grow, and how much it is."""
    if config.get("max_steps"):
        return ("max_steps", "batch_size", "epochs"), config["max_steps"] * config["batch_size"]
    grows = ("episodes", "epochs", "samples_per_prompt" if stage.type == "sample" else "")
    name = next((name for name in grows if name in config), None)
    return ((name,), float(config[name])) if name else ((), 1.0)


def _gib(size: float) -> str:
    return f"~{size / GIB:.1f} GiB"


# --- the machine ------------------------------------------------------------------------------------------------------


def this_machine() -> Machine:
    """Return the GPU that stages use here, or the machine itself where there is none."""
    if gpu := _gpu():
        return replace(gpu, vllm=find_spec("vllm") is not None)
    total, _ = main_memory() or (0, 0)
    return Machine("CPU", total)


def _gpu() -> Machine | None:
    """Return the first GPU that CUDA would show to torch; None where torch is built without it, too."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return None
    except metadata.PackageNotFoundError:
        return None
    rows = [row.split(", ") for row in ask_driver("index,uuid,name,memory.total,compute_cap")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = visible.split(",")[0].strip() if visible is not None else "0"
    for index, identity, name, mebibytes, capability in (row for row in rows if len(row) == 5):
        if first == index or (first and identity.startswith(first)):
            with suppress(ValueError):  # [N/A]
                return Machine(name, int(mebibytes) * 2**20, gpu=True, bf16=float(capability) >= 8)
    return None
