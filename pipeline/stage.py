"""The one interface: a stage is a frozen model whose fields are its configuration and whose `run` does the work.

The contract of `run`: write only below `work.out`, `work.scratch`, `work.cache` and `work.private`; called again with
the same `work`, continue; read nothing but `self`, `inputs` and `work`; raise `AlignError` for what a user can mend and
let all else crash.
"""

from __future__ import annotations

import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from align_pipeline.pipeline.rules import Judged, check_rule

Kind = Literal["model", "reward_model", "dataset", "report"]
"""What a stage publishes, and what a field asks for."""

Metrics = dict[str, float]
"""Computed from weights and rows alone: the same run gives the same metrics, so no times and no speeds."""


class Config(BaseModel):
    """A frozen piece of configuration: unknown fields are errors, the docstring below a field is its documentation.

    `config.schema` reads those docstrings when it is asked; pydantic would read them at every start, which costs more
    than all other imports together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, protected_namespaces=())


@dataclass(frozen=True)
class InputField:
    """Marks a field as an edge of the graph: what it may name."""

    kinds: tuple[Kind, ...] = ()
    """What a `stage:` reference must produce; empty when no stage can be named."""
    hub: Literal["model", "dataset"] | None = None
    """What a `hub:` reference is downloaded as; None when it is not allowed."""
    file: bool = True
    function: bool = False
    """Whether `module:function`, a Python function, may be named."""


_REFERENCE = re.compile(
    r"(stage|file):\S.*|hub:[\w.-]+/[\w.-]+(@[\w./-]+)?|(?!(stage|file|hub):)[A-Za-z_][\w.]*:[A-Za-z_]\w*"
)


def is_reference(text: str) -> bool:
    """Tell whether a text has the form of an input."""
    return _REFERENCE.fullmatch(text) is not None


def _check_reference(text: str) -> str:
    if not is_reference(text):
        raise ValueError(f"{text!r} names no input; write stage:NAME, hub:ORG/NAME[@REV] or file:PATH")
    return text


_reference = AfterValidator(_check_reference)
Model = Annotated[str, InputField(kinds=("model",), hub="model"), _reference]
"""A causal language model: whole weights, or an adapter that knows its base."""
RewardModel = Annotated[str, InputField(kinds=("reward_model",), hub="model"), _reference]
"""A sequence classifier with one output."""
Scorer = Annotated[str, InputField(kinds=("reward_model",), hub="model", function=True), _reference]
"""A reward model, or `module:function` in TRL's reward-function signature."""
Function = Annotated[str, InputField(file=False, function=True), _reference]
"""`module:function` in TRL's reward-function signature."""
Dataset = Annotated[str, InputField(kinds=("dataset",), hub="dataset"), _reference]
"""Rows: a JSONL, JSON, CSV or Parquet file, a folder made by `Dataset.save_to_disk`, or a hub dataset."""
File = Annotated[str, InputField(), _reference]
"""A plain file, such as a chat template."""
Gate = Annotated[str, BeforeValidator(check_rule)]
"""What a metric must be, such as `"> 0.5"` or `"< 1.1 * sft/perplexity"`; or `off`."""


Logger = Literal["tensorboard", "wandb", "trackio"]
"""What `report_to` may name: the distribution to install has the same name."""


def _check_loggers(value: Any) -> Any:
    if value in ("none", "no", ["none"], ["no"]):
        raise ValueError(f"{value!r} names no logger; leave it out, none is used unasked")
    if isinstance(value, str):
        names = get_args(Logger)
        raise ValueError(f"must be a list, got {value!r}; write [{value if value in names else ', '.join(names)}]")
    return tuple(value) if isinstance(value, list) else value  # strict, pydantic takes JSON's lists but not Python's


class How(Config):
    """How a stage is run: speed and memory only, so nothing in here enters a key."""

    micro_batch: int | None = Field(None, ge=1)
    """Rows per forward pass on one device; the rest of `batch_size` is accumulated. None: the stage chooses."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. None: on where there is a GPU."""
    checkpoint_every: float = Field(300.0, ge=0)
    """Seconds between two checkpoints."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two checkpoints, beside `checkpoint_every`."""
    logging_steps: int = Field(10, ge=1)
    """Optimizer steps between two logged losses."""
    workers: int = Field(0, ge=0)
    """Processes that prepare batches."""
    report_to: Annotated[tuple[Logger, ...], BeforeValidator(_check_loggers)] = ()
    """Loggers that get the curves as they grow; they write below the store, and W&B where you are logged in."""
    train: dict[str, Any] = {}
    """Filled by the pipeline: those fields of a stage's `train:` that change only speed, memory or logging."""


class Launch(Config):
    """The machine: nothing in here enters a key."""

    processes: int = Field(1, ge=1)
    """Processes of a training stage, one a device (data parallel); the global batch stays what it is."""
    accelerate: Literal["ddp", "fsdp"] = "ddp"
    """Each process holds the whole model (`ddp`), or a share of its weights, gradients and optimizer (`fsdp`)."""
    vllm_memory: float = Field(0.4, gt=0, lt=1)
    """Share of a GPU's memory for the engine that samples PPO's answers: its copy of the base, and its cache."""

    @property
    def shards(self) -> bool:
        """Whether the model is dealt to several processes; one process holds it whole, whatever `accelerate` says."""
        return self.accelerate == "fsdp" and self.processes > 1


class Resolved(Config):
    """An input that was found: where it is and what it contains."""

    ref: str
    """As the pipeline file writes it."""
    digest: str
    """`sha256:...` of its content, or `git:...` for a revision on the hub."""
    path: str | None = None
    """The file or folder; None for a hub repository, which the worker fetches, and for a function."""
    hub: str | None = None
    """ORG/NAME, when it lies on the hub."""
    revision: str | None = None
    """The commit, when it lies on the hub."""
    function: str | None = None
    """`module:function`, when it is one."""
    search_path: str | None = None
    """The folder that a function's module is imported from, beside the installed ones."""
    artifact: str | None = None
    """The key of the artifact, when a stage made it."""
    kind: Kind | None = None
    """What the stage that made it produces; None when no stage did."""
    adapter: str | None = None
    """The folder of the LoRA adapter, for a model that is a base and an adapter."""
    base: Resolved | None = None
    """Whole weights that the adapter belongs to."""
    reference_scores: str | None = None
    """The file of scores that a reward model's loader must reproduce."""

    @property
    def plain(self) -> Resolved:
        """The whole weights: the base of an adapter, or the input itself."""
        return self.base or self


Inputs = Mapping[str, Resolved]
"""Field name (`policy`, `models.sft`, `complete.policy`) -> what it resolved to."""


@dataclass
class Work:
    """A stage's own directory: `out` is published, `scratch` is kept until then."""

    folder: Path
    launch: Launch = field(default_factory=Launch)
    pipeline: str = "align"
    stage: str = "stage"
    """Their names, for people: nothing that is computed may depend on them."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def cache(self) -> Path:
        """Shared between stages; whatever lies here can be deleted at any time."""
        return self.folder.parent.parent / "cache"

    @property
    def private(self) -> Path:
        """The store's own secrets: what users are hashed with, who is forgotten, whose words rows rest on."""
        return self.folder.parent.parent / "private"

    def report_resources(self, name: str, measured: Mapping[str, Any]) -> None:
        """Keep what was measured of the machine, for `resources` in artifact.json: it is no part of the result."""
        path = self.scratch / "resources.json"
        path.write_text(json.dumps({name: measured}), encoding="utf-8")

    def report_rows(self, field: str, report: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what the rows of a field were, for `data` in artifact.json; return the reports of all fields."""
        path = self.scratch / "rows.json"
        reports = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        reports[field] = report
        for folder in (self.scratch, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(reports), encoding="utf-8")
        return reports

    def log(self, *, step: int, total: int, **values: float | str) -> None:
        """Report progress: rank 0 appends one line to `progress.jsonl`, which the runner shows and sums up.

        Another rank appends what it uses itself to `progress.RANK.jsonl`; ranks of one launch name one launcher.
        """
        rank = os.environ.get("RANK")
        line: dict[str, Any] = {"at": time.time(), "pid": os.getpid(), **usage()}
        if rank is not None:
            line["launcher"] = os.getppid()
        if rank in (None, "0"):
            line = {"step": step, "total": total, **line, **values}
        name = "progress.jsonl" if rank in (None, "0") else f"progress.{rank}.jsonl"
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def gpus(devices: Path = Path("/dev")) -> int:
    """Return how many NVIDIA GPUs this process may use, without asking torch; 0 where none can be seen."""
    there = [path.name for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = there if chosen is None else [one for one in chosen.split(",") if one.strip() not in ("", "-1")]
    return min(len(there), len(wanted))


def usage() -> dict[str, Any]:
    """Return this process's CPU seconds (children included) and peak memory in bytes, so far."""
    import resource
    import sys

    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    values: dict[str, Any] = {"cpu_seconds": round(cpu, 3), "peak_memory_bytes": own.ru_maxrss * 1024}
    torch = sys.modules.get("torch")  # this package never imports it; a stage that did is asked for its device
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        values["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
        values["devices"] = int(os.environ.get("WORLD_SIZE", "1"))
        values["gpu"] = torch.cuda.get_device_name()
        with suppress(Exception):  # it asks nvidia-ml-py, which need not be there, and which knows no MIG slices
            values["gpu_utilization"] = torch.cuda.utilization()
    return values


class Stage(Config, ABC):
    """The unit of work and of documentation."""

    version: ClassVar[int] = 1
    """Raise it when the same fields should give another result; a changed default is such a case."""
    produces: ClassVar[Kind]
    starts_from: ClassVar[str | None] = None
    """The input whose base an adapter in `out/adapter` belongs to."""
    distributed: ClassVar[bool] = False
    """Whether it runs on all of `launch.processes`; other stages run in one process."""
    trainer_config: ClassVar[tuple[str, str] | None] = None
    """Module and name of the TRL or Transformers dataclass that `train:` is checked against."""
    owned: ClassVar[Mapping[str, str]] = {}
    """Fields of that dataclass that `train:` must not set -> the field of ours that does; empty: nothing may."""
    own_gates: ClassVar[tuple[str, ...]] = ()
    """Names of the gates that it has unasked; `require: {NAME: off}` switches one off."""

    type: str
    """What the stage does."""
    how: How = How()
    """How it is run: speed and memory, nothing that changes the result."""
    require: dict[str, Gate] = Field({})
    """Gates: what metrics must be before anything that needs this stage runs, such as `accuracy: "> 0.6"` or
    `dpo/perplexity: "< 1.1 * sft/perplexity"`; `NAME: off` for a gate that it has unasked. Never part of a key."""

    @classmethod
    def inherit(cls, given: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
        """Return those settings of the file's top level that this stage takes over: what it has but was not given."""
        return {name: value for name, value in top.items() if name in cls.model_fields and name not in given}

    def misfit(self, field: str, maker: Stage) -> str | None:
        """Say why this stage cannot read in `field` what `maker` will produce; None when it can.

        Found while the file is checked, so that a chain that cannot work costs no training first.
        """
        return None

    def launch_problems(self, launch: Launch) -> dict[str, str]:
        """Return what keeps this stage from running on all of `launch.processes`, by field; `type` for all of it."""
        return {}

    def resume_problem(self, scratch: Path, launch: Launch) -> str | None:
        """Say why what lies in `scratch` cannot be gone on with on this launch's processes; None when it can."""
        return None

    def measures(self) -> Mapping[str, str]:
        """Return the metrics of `run`: name -> what these settings lack for it, empty when it is measured.

        Empty as a whole where that is not known beforehand.
        """
        return {}

    def metric_owner(self, name: str) -> str | None:
        """Return what `name` in front of a metric's slash stands for here (an input, such as `stage:dpo`), or None."""
        return None

    def before(self, makers: Mapping[str, tuple[Stage, Metrics]]) -> list[Judged]:
        """Judge this stage's own gates before it starts; `makers` are the stages behind its inputs, by field."""
        return []

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        """Return what is wrong with the first rows of these inputs, by field; those that are not given are left out.

        Asked before anything runs, so that rows which a late stage cannot read cost no training first. It imports
        nothing heavy and reads no file to its end.
        """
        return {}

    @abstractmethod
    def run(self, inputs: Inputs, work: Work) -> Metrics:
        """Do the work; see the contract above."""


def input_field(info: FieldInfo) -> InputField | None:
    """Return what marks a field as an input, wherever in its annotation it stands; None for plain fields."""

    def search(annotation: Any) -> Iterator[InputField]:
        for item in getattr(annotation, "__metadata__", ()):
            if isinstance(item, InputField):
                yield item
        for argument in get_args(annotation):
            yield from search(argument)

    for item in info.metadata:
        if isinstance(item, InputField):
            return item
    return next(search(info.annotation), None)


def model_in(annotation: Any) -> Any:
    """Return the configuration class inside an annotation such as `Lora | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((found for argument in get_args(annotation) if (found := model_in(argument))), None)


def references(stage: Stage) -> dict[str, tuple[str, InputField]]:
    """Return the inputs that a stage names: field -> reference and what it may be.

    Inside a mapping the field is `models.sft`, inside a configuration of its own `complete.policy`.
    """
    return named(type(stage), dict(stage))


def named(cls: type[Config], settings: Mapping[str, Any]) -> dict[str, tuple[str, InputField]]:
    """Return the same of settings as they are written, whatever else is wrong with them."""
    found: dict[str, tuple[str, InputField]] = {}
    for name, info in cls.model_fields.items():
        marked, value, inner = input_field(info), settings.get(name), model_in(info.annotation)
        if marked is None:
            if inner and isinstance(value, Mapping | Config):
                found |= {f"{name}.{field}": one for field, one in named(inner, dict(value)).items()}
            continue
        several = {f"{name}.{key}": ref for key, ref in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {field: (ref, marked) for field, ref in several.items() if isinstance(ref, str) and is_reference(ref)}
    return found
