"""The only door to TRL: what its trainers share, and checkpoints that can be trusted.

A training stage tokenises its own rows (`data/chat.py`) and hands token ids to a TRL trainer, so TRL prepares nothing.
What is ours here: the fields that every training stage has, the TRL arguments made from them, checkpoints that are
complete or not there, early stopping that survives a resume, and the curve. Left out on purpose: TRL's own rotation of
checkpoints, its best-model loading and its model cards, because each of them trusts whatever lies on the disk.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align_pipeline.data.formats import FORMATS, FormatName
from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import AlignError, near_or_all
from align_pipeline.pipeline.stage import Config, Dataset, File, Inputs, Launch, Metrics, Resolved, Stage, Work
from align_pipeline.stages import loggers, models, needs, reading
from align_pipeline.stages.checkpoints import know_numbered_cpus, newest_checkpoint, newest_name, publish_checkpoint
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.reading import Rows

if TYPE_CHECKING:
    import datasets
    from transformers import Trainer, TrainingArguments

# --- fields -----------------------------------------------------------------------------------------------------------


class Lora(Config):
    """A low-rank adapter (Hu et al. 2021): the base stays as it is, two thin matrices a layer are trained."""

    r: int = Field(16, ge=1)
    """Rank. 8-32 is enough for most alignment; vLLM takes 8, 16, 32, 64, 128, 256, 320 and 512."""
    alpha: int = Field(32, ge=1)
    """The adapter's output is scaled by alpha / r; twice the rank is customary."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapter, in `sft` and `pretrain`; preference stages train without dropout."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear` (all but the output head), or last names such as q_proj."""


class EarlyStopping(Config):
    """Stop when held-out evaluations no longer improve, and keep the weights of the best one."""

    patience: int = Field(3, ge=1)
    """Evaluations without an improvement before training stops."""
    min_delta: float = Field(0.0, ge=0)
    """The least change for the better that counts."""


class Tuned(Stage):
    """What every stage that changes weights has in common."""

    chat_template: File | None = None
    """A Jinja file that replaces the tokenizer's own chat template."""
    tuning: Literal["lora", "full"] = "lora"
    """Train an adapter, or whole weights (in float32: 16 bytes a parameter with Adam)."""
    lora: Lora = Lora()
    """The adapter; usually given once for the whole pipeline."""
    quantize: Literal["4bit"] | None = None
    """Hold the frozen base in 4 bits (QLoRA): needs a CUDA GPU and bitsandbytes."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate. Defaults suit LoRA; `tuning: full` wants about a tenth."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup: to 0, or not at all."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps during which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    batch_size: int = Field(32, ge=1)
    """Rows per optimizer step, over all devices."""
    seed: int = Field(0, ge=0, lt=2**32 - 1)
    """Of the fresh adapter or head, the order of the rows and dropout."""
    early_stopping: EarlyStopping | None = None
    """Stop when held-out evaluations no longer improve."""
    format: FormatName | dict[str, FormatName] | None = None
    """What the rows are written in, where they do not say it themselves; of several sources, one under each name."""
    columns: dict[str, str] | dict[str, dict[str, str]] = Field({})
    """Names in your file for names that are expected, such as `prompt: question`; or such a map for each source."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: stop the stage, or be left out, counted, and kept in `rejects.jsonl`."""
    max_bad_share: float = Field(0.05, ge=0, lt=1)
    """Share of each source's rows that `on_bad_row: skip` may leave out before it stops the stage after all."""
    train: dict[str, Any] = Field({})
    """Any other field of the trainer's configuration, checked by name and type."""

    reads: ClassVar[Task]
    """What its rows are read for, and the fields that name them."""
    row_fields: ClassVar[tuple[str, ...]] = ("data", "evaluation")

    owned: ClassVar[Mapping[str, str]] = OWNED
    """What `train:` must not set; stages add the fields that they name themselves."""
    distributed: ClassVar[bool] = True
    judged_by: ClassVar[tuple[str, int]] = ("eval_loss", -1)
    """The number of an evaluation that tells the best weights, and 1 where more is better, -1 where less is."""
    shown: ClassVar[tuple[str, ...]] = ("loss", "learning_rate", "grad_norm")
    """What of a logged point is progress worth showing."""
    rows_field: ClassVar[str] = "how.micro_batch"
    """The field that says how much is in memory at once, and the one that says how long a row is."""
    length_field: ClassVar[str] = "max_length"

    @property
    def draws(self) -> bool:
        """Whether each process draws random numbers while it trains (dropout, noise), so that more draw others."""
        return False

    def resume_problem(self, scratch: Path, launch: Launch) -> str | None:
        checkpoint = newest_name(scratch)
        return _other_processes(self, checkpoint, launch.processes) if checkpoint else None

    @property
    def keeps_best(self) -> bool:
        """Whether training ends with the weights of its best evaluation instead of the last ones."""
        return self.early_stopping is not None

    @property
    def steps_at_once(self) -> int:
        """Optimizer steps that belong together: only after a multiple of them is there something to log or to save."""
        return 1

    @classmethod
    def inherit(cls, given: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
        """Take over the top level's settings, but no adapter's shape for whole weights: it would change the key."""
        found = super().inherit(given, top)
        tuning = given.get("tuning", found.get("tuning", cls.model_fields["tuning"].default))
        lora, shared = given.get("lora"), top.get("lora")
        if isinstance(lora, Mapping) and isinstance(shared, Mapping):
            found["lora"] = {**shared, **lora}  # a stage that changes one field keeps the others
        return {name: value for name, value in found.items() if name != "lora" or tuning != "full" or lora}

    @model_validator(mode="after")
    def _rows_are_known(self) -> Self:
        formats = {one.name: one for one in FORMATS[self.reads]}
        for name in self.format.values() if isinstance(self.format, Mapping) else (self.format,):
            if name is not None and name not in formats:
                raise ValueError(f"format: {name} is no format of {self.type}{near_or_all(name, formats)}")
        known = {field for one in formats.values() for field in one.fields}
        nested = [value for value in self.columns.values() if isinstance(value, Mapping)]
        from align_pipeline.data.load import twice_mapped

        for one in nested or [self.columns]:
            if problem := twice_mapped({ours: str(theirs) for ours, theirs in one.items()}):
                raise ValueError(f"columns: {problem}")
        for ours in (field for one in nested or [self.columns] for field in one):
            if ours not in known:
                near = near_or_all(ours, sorted(known))
                raise ValueError(f"columns: {ours} is no field of rows for {self.type}{near}")
        return self

    @model_validator(mode="after")
    def _one_tuning(self) -> Self:
        if self.tuning == "full" and (self.lora != Lora() or self.quantize is not None):
            raise ValueError("tuning: full trains whole weights; remove lora and quantize, or set tuning: lora")
        return self

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        tasks = dict.fromkeys(self.row_fields, self.reads)
        found = reading.look(inputs, tasks, format=self.format, columns=self.columns)
        lacking = {
            "how.report_to": loggers.missing(self.how.report_to),
            "train.optim": needs.optimizer_problems(self.train.get("optim", "")),
            "quantize": needs.quantize_problems() if self.quantize else [],
        }
        return {**found, **{field: problems for field, problems in lacking.items() if problems}}

    def misfit(self, field: str, maker: Stage) -> str | None:
        """Refuse rows of another kind, and an adapter that this stage cannot go on training: one runs along a chain."""
        if maker.type == "feedback" and self.reads not in ("preference", "unpaired", "prompt"):
            return "feedback makes pairs (for dpo and reward) and unpaired rows (for kto), none for this stage"
        if field != self.starts_from or not isinstance(maker, Tuned) or maker.tuning == "full":
            return None
        if self.tuning == "full":
            return (
                f"{maker.type} makes an adapter and tuning: full needs whole weights; put a `merge` stage between them"
            )
        for name in ("r", "alpha", "target_modules"):
            theirs, ours = getattr(maker.lora, name), getattr(self.lora, name)
            if theirs != ours and not (name == "target_modules" and "all-linear" in (theirs, ours)):
                return (
                    f"lora.{name}: {maker.type} trains an adapter with {theirs}, this stage asks for {ours}; one "
                    "adapter runs along a chain: set both alike, or put a `merge` stage between them"
                )
        return None


class Training(Tuned):
    """What every stage that learns from rows has in common."""

    held_out_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics on held-out rows."""
    also_measured: ClassVar[tuple[str, ...]] = ()
    """Metrics beside those and what every training reports."""

    data: Dataset | dict[str, Dataset]
    """The rows to train on; or several sources under names, mixed by `data_weights`."""
    data_weights: dict[str, float] = Field({})
    """How often rows of a source are seen in a pass: 2 takes each twice, 0.3 each by chance (content and `seed`)."""
    evaluation: Dataset | None = None
    """Held-out rows of your own; without it what feedback kept for testing, or `held_out` of the rows set aside."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the rows set aside for the loss that is reported, chosen by a hash of the prompt; 0 for none."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides `epochs`."""
    max_length: int = Field(1024, ge=2)
    """Tokens per row, at most the model's context; the rest of a longer answer is cut off and counted."""
    evaluate_every: int | None = Field(None, ge=1)
    """Optimizer steps between two evaluations; None: once an epoch when `early_stopping` is given, else at the end."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        micro_batch = self.how.micro_batch
        if micro_batch is not None and (micro_batch < 1 or self.batch_size % micro_batch):
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of how.micro_batch {micro_batch}")
        return self

    @property
    def draws(self) -> bool:
        return bool(self.train.get("neftune_noise_alpha")) or self.train.get("disable_dropout") is False

    def launch_problems(self, launch: Launch) -> dict[str, str]:
        if launch.shards:
            unproven = {"quantize": self.quantize, "train.optim": self.train.get("optim")}
            unproven |= {
                f"train.{name}": self.how.train.get(name) for name in ("torch_compile", "activation_offloading")
            }
            if found := [field for field, value in unproven.items() if value]:
                return dict.fromkeys(found, "not proven with launch.accelerate: fsdp; remove it, or set ddp")
        ranks, rows = launch.processes, f"launch.processes {launch.processes}"
        if self.batch_size % ranks:
            near = max(round(self.batch_size / ranks), 1) * ranks
            return {
                "batch_size": f"{self.batch_size} rows cannot be dealt to {rows} evenly; make it a multiple ({near})"
            }
        size = self.how.micro_batch
        if size and self.rows_field == "how.micro_batch" and self.batch_size // ranks % size:
            most = math.gcd(self.batch_size // ranks, size)
            return {"how.micro_batch": f"{size} times {rows} must divide batch_size {self.batch_size}; set {most}"}
        return {}

    @model_validator(mode="after")
    def _names_are_sources(self) -> Self:
        names = set(self.data) if isinstance(self.data, Mapping) else set()
        if isinstance(self.data, Mapping) and not names:
            raise ValueError("data: names no source; give at least one")
        nested = {name for name, value in self.columns.items() if isinstance(value, Mapping)}
        formats = set(self.format) if isinstance(self.format, Mapping) else set()
        for field, given in (("data_weights", set(self.data_weights)), ("format", formats), ("columns", nested)):
            for name in sorted(given - names):
                raise ValueError(f"{field}: {name!r} is no source of data{near_or_all(name, names) if names else ''}")
        for name, weight in self.data_weights.items():
            if not 0 < weight <= 100:
                raise ValueError(f"data_weights: {name} must be above 0 and at most 100, got {weight:g}")
        return self

    @model_validator(mode="after")
    def _can_stop(self) -> Self:
        if self.early_stopping is not None and self.evaluation is None and self.held_out == 0:
            raise ValueError("early_stopping needs held-out rows: set held_out above 0 or name an evaluation file")
        return self

    def measures(self) -> Mapping[str, str]:
        sources = self.data.values() if isinstance(self.data, Mapping) else [self.data]
        # What a stage made may bring held-out rows of its own.
        none = not self.held_out and self.evaluation is None and not any(ref.startswith("stage:") for ref in sources)
        lacks = "it needs held-out rows; set held_out above 0 or name an evaluation" if none else ""
        return {**dict.fromkeys(self.held_out_metrics, lacks), **dict.fromkeys((*self.also_measured, *FACTS), "")}


# --- rows -------------------------------------------------------------------------------------------------------------

FACTS = ("rows", "held_out_rows", "tokens", "truncated", "steps", "first_loss")
"""What every training reports of itself."""


def prepare(
    stage: Training,
    inputs: Inputs,
    tokenizer: Any,
    work: Work,
    loss_on: Literal["assistant", "all"] = "assistant",
    *,
    cut: bool = True,
) -> Rows:
    """Read, encode, split and mix a stage's rows; bad rows are one DataError with every cause and address.

    With `cut`, longer rows than `max_length` lose their end.
    """
    # A model with learnt positions cannot read further than it has any, one with rotary ones has never learnt to.
    start = inputs.get(stage.starts_from or "")
    length = min(stage.max_length, (start and models.context(start)) or stage.max_length)
    vocabulary = models.vocabulary(start) if start else None

    def given(field: str) -> list[reading.Source]:
        return reading.sources(
            inputs,
            field,
            format=stage.format,
            columns=stage.columns,
            weights=getattr(stage, f"{field}_weights", None),
            weight_column=getattr(stage, "weight_column", None),
        )

    def encode(found: Sequence[reading.Source]) -> list[reading.Entry]:
        how: dict[str, Any] = {"max_length": length if cut else None, "loss_on": loss_on, "vocabulary": vocabulary}
        return reading.encode(found, stage.reads, tokenizer, work, **how)

    data = given("data")
    kept_for_testing = [test for source in data if (test := source.tests(stage.reads))]
    return reading.prepared(
        encode(data),
        encode(given("evaluation") or kept_for_testing),
        work,
        task=stage.reads,
        held_out=stage.held_out,
        seed=stage.seed,
        on_bad_row=stage.on_bad_row,
        max_bad_share=stage.max_bad_share,
    )


def read_rows(stage: Tuned, inputs: Inputs, field: str, work: Work) -> list[Any]:
    """Return the typed rows that a field names, for a stage that encodes them itself."""
    return reading.read_rows(
        inputs,
        field,
        stage.reads,
        work,
        format=stage.format,
        columns=stage.columns,
        on_bad_row=stage.on_bad_row,
        max_bad_share=stage.max_bad_share,
    )


def load_tokenizer(inputs: Inputs, field: str) -> Any:
    """Return the tokenizer of a model input, with the stage's own chat template if it names one."""
    template = models.local_path(inputs["chat_template"]) if "chat_template" in inputs else None
    return models.load_tokenizer(inputs[field], template)


# --- TRL's arguments --------------------------------------------------------------------------------------------------

_CHOSEN_MICRO_BATCH = 8


def micro_batch(stage: Training, processes: int, size: int | None = None) -> int:
    """Return the rows per forward pass; raise AlignError when the global batch cannot be dealt out evenly.

    `size` is what the stage's method asks for; without it the stage's `how` decides.
    """
    per_process, left = divmod(stage.batch_size, processes)
    if left or per_process == 0:
        raise AlignError(
            f"batch_size: {stage.batch_size} rows cannot be dealt to {processes} processes evenly; make it a multiple"
        )
    size = size or stage.how.micro_batch
    if size is None:
        return max(rows for rows in range(1, min(per_process, _CHOSEN_MICRO_BATCH) + 1) if per_process % rows == 0)
    if per_process % size:
        raise AlignError(
            f"batch_size: {stage.batch_size} must be a multiple of the rows per forward pass ({size}) times "
            f"launch.processes ({processes})"
        )
    return size


def arguments(
    stage: Training,
    work: Work,
    config_class: type[TrainingArguments],
    train: datasets.Dataset,
    held_out: datasets.Dataset | None,
    size: int | None = None,
    **fixed: Any,
) -> TrainingArguments:
    """Return the trainer's configuration; `fixed` are the fields that only this stage's trainer has.

    Every step is logged to the curve, whatever `how.logging_steps` shows: a curve whose points depended on speed
    settings, or on the step at which a run was killed, would not be reproducible.
    """
    processes = work.launch.processes
    size = micro_batch(stage, processes, size)
    every = _evaluate_every(stage, len(train), held_out is not None)
    values: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "warmup_steps": _warmup_steps(stage, len(train)),
        "eval_strategy": "steps" if every else "no",
        "eval_steps": every,
    }
    return common_arguments(stage, work, config_class, **values, **fixed)


def common_arguments(
    stage: Tuned, work: Work, config_class: type[TrainingArguments], **fixed: Any
) -> TrainingArguments:
    """Return a trainer's configuration from what every training stage has; `fixed` are the fields beside these."""
    import torch

    loggers.open_loggers(stage.how.report_to, work)
    on_gpu = torch.cuda.is_available()
    checkpointing = stage.how.gradient_checkpointing
    values: dict[str, Any] = {
        "output_dir": str(work.scratch / "saving"),
        "use_cpu": not on_gpu,
        "bf16": models.has_bf16(),
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "gradient_checkpointing": on_gpu if checkpointing is None else checkpointing,
        "seed": stage.seed,
        "data_seed": stage.seed,
        "prediction_loss_only": True,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(stage.how.report_to) or "none",
        "run_name": loggers.run_name(work),
        "project": work.pipeline,
        "disable_tqdm": True,
        "dataloader_num_workers": stage.how.workers,
        "dataloader_pin_memory": on_gpu,
    }
    try:
        return config_class(**{**values, **fixed, **stage.train, **stage.how.train})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AlignError(f"train: {config_class.__name__} does not take these fields together: {error}") from error


def _warmup_steps(stage: Training, rows: int) -> int:
    """Return the share in whole steps, rounded down: rounded up, a run of one step would have a learning rate of 0."""
    steps = stage.max_steps or math.ceil(stage.epochs * math.ceil(rows / stage.batch_size))
    return int(stage.warmup * steps + 1e-9)


def _evaluate_every(stage: Training, rows: int, can_evaluate: bool) -> int | None:
    """Return the steps between evaluations; an epoch is counted in steps, so that a resume at its end misses none."""
    if not can_evaluate:
        if stage.early_stopping:
            raise AlignError(
                "early_stopping: there are no held-out rows to judge by; give more rows or an evaluation file"
            )
        return None
    if stage.evaluate_every or stage.early_stopping is None:
        return stage.evaluate_every
    return math.ceil(rows / stage.batch_size)


def tables(rows: Rows) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the tables that trainers take, to train on and to evaluate with; None for no held-out rows."""
    import datasets

    def table(rows: Any) -> datasets.Dataset:
        return rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)

    return table(rows.train), table(rows.held_out) if len(rows.held_out) else None


def trainer_class(base: type[Any], stage: Training, work: Work, *, together: bool = False) -> type[Any]:
    """Return a TRL trainer whose rows, and if asked its model, are dealt to all processes; `together`: see there."""
    from align_pipeline.stages.dealing import dealt_trainer

    dealt = dealt_trainer(base, stage.batch_size, together=together)
    if not work.launch.shards:
        return dealt
    from align_pipeline.stages.sharding import sharded_trainer

    return sharded_trainer(dealt)


# --- references -------------------------------------------------------------------------------------------------------


def frozen_copy(stage: Tuned, source: Resolved) -> Any:
    """Return the second model that whole-weight training needs as its reference; None with LoRA.

    With LoRA, TRL freezes a copy of the adapter `default` under the name `ref`, on the same base.
    """
    import torch

    return models.load_causal(source, dtype=torch.float32) if stage.tuning == "full" else None


def implicit_rewards(trainer: Any, answers: Sequence[tuple[Sequence[int], Sequence[int]]], beta: float) -> list[float]:
    """Return beta * (log policy - log reference) of each (prompt ids, answer ids): equation 5 of the DPO paper."""
    policy = models.completion_log_probs(trainer.model, answers)
    if trainer.ref_model is not None:
        reference = models.completion_log_probs(trainer.ref_model, answers)
    else:
        trainer.model.set_adapter("ref")
        reference = models.completion_log_probs(trainer.model, answers)
        trainer.model.set_adapter(models.ADAPTER)
    return [
        beta * float((ours.double() - theirs.double()).sum()) for ours, theirs in zip(policy, reference, strict=True)
    ]


def log1p_exp(value: float) -> float:
    """Return log(1 + exp(value)) without overflow, so -log sigmoid(x) is log1p_exp(-x)."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


# --- training ---------------------------------------------------------------------------------------------------------

Curve = list[dict[str, Any]]

_ROOM = 2**20
"""Bytes; with fewer left a disk counts as full."""


def fit(trainer: Trainer, stage: Tuned, work: Work, *, first_loss: tuple[float, float] | None = None) -> Curve:
    """Train from the newest whole checkpoint, or from the start, write `out/curve.jsonl` and return its points.

    `first_loss` is what the first step's loss must be and its tolerance. With early stopping the model ends with the
    weights of its best evaluation. Raises AlignError when the loss is not finite, when the first one is not what it
    must be, or when memory runs out.
    """
    import torch
    from transformers import PrinterCallback, TrainerState

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_callback(stage, work, first_loss))
    if stage.how.report_to:
        trainer.add_callback(loggers.settings_logger(stage))
    if trainer.args.world_size > 1 and trainer.args.device.type == "cpu":
        know_numbered_cpus()
    if trainer.is_world_process_zero():
        shutil.rmtree(work.scratch / "saving", ignore_errors=True)
    checkpoint = newest_checkpoint(work.scratch)
    processes = trainer.args.world_size
    if checkpoint and (problem := _other_processes(stage, checkpoint, processes)):
        raise AlignError(f"launch.processes: {processes}, but {problem}")
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if checkpoint and state and (state.global_step >= state.max_steps or _stopped(stage, state.log_history)):
        # Trainer would take one more step from a checkpoint that lies at the end.
        trainer.state = state
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise AlignError(
                f"{stage.rows_field}: a forward pass does not fit into GPU memory; halve {stage.rows_field} (the "
                f"result stays the same), set how.gradient_checkpointing, or lower {stage.length_field}"
            ) from error
        except Exception as error:
            if problem := loggers.explained(error, stage.how.report_to):
                raise problem from error
            # torch and safetensors each have their own words for a full disk, and leave a file that fills it.
            if shutil.disk_usage(work.scratch).free < _ROOM:
                raise AlignError(
                    f"{work.scratch}: no room on this disk for a checkpoint; make room and run again, training goes on "
                    "from the newest one"
                ) from error
            raise
    if work.launch.shards:
        from align_pipeline.stages.sharding import put_together

        put_together(trainer.model)
    history = trainer.state.log_history
    best = best_step(stage, history)
    if best is not None and best != trainer.state.global_step:
        trainer._load_from_checkpoint(str(work.scratch / f"checkpoint-{best}"))
    _check_weights(stage, trainer.model)
    curve = _curve(history)
    if trainer.is_world_process_zero():
        work.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(point, sort_keys=True) + "\n" for point in curve)
        (work.out / "curve.jsonl").write_text(lines, "utf-8")
    return curve


def _other_processes(stage: Tuned, checkpoint: Path, processes: int) -> str | None:
    """Refuse another number of processes where each draws its own random numbers: they would not go on."""
    made_by = len(list(checkpoint.glob("rng_state*.pth")))
    if not stage.draws or made_by in (0, processes):
        return None
    return (
        f"{checkpoint.name} was made by {made_by}, and each draws its own dropout or noise; set launch.processes: "
        f"{made_by} to go on, or start anew with --force"
    )


def facts(rows: Rows, trainer: Trainer, curve: Curve) -> Metrics:
    """Return what every training reports of itself: its rows, its steps and where its loss began."""
    return {**rows.metrics, "steps": float(trainer.state.global_step), "first_loss": curve[0]["loss"]}


def _callback(stage: Tuned, work: Work, first_loss: tuple[float, float] | None) -> Any:
    """Return what watches a training: progress, bad losses, checkpoints that are due, early stopping."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.saved_at = time.monotonic()
            self.tokens_before = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # TRL counts tokens from the start of the process; the count goes on where the checkpoint left it.
            self.tokens_before = _last(state.log_history, "num_tokens", 0.0)
            self.saved_at = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            entry = state.log_history[-1]
            if "num_tokens" in entry:
                entry["num_tokens"] = logs["num_tokens"] = entry["num_tokens"] + self.tokens_before
            _check_loss(stage, state.global_step, logs["loss"], first_loss)
            last = state.global_step == state.max_steps
            number = state.global_step // stage.steps_at_once
            if number % stage.how.logging_steps == 0 or number == 1 or last:
                shown = {"tokens": entry["num_tokens"]} if "num_tokens" in entry else {}
                shown |= {name: logs[name] for name in stage.shown if name in logs}
                work.log(step=state.global_step, total=state.max_steps, **shown)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> Any:
            name, _ = stage.judged_by
            shown = {name.replace("eval_", "held_out_"): metrics[name]}
            work.log(step=state.global_step, total=state.max_steps, **shown)
            if stage.keeps_best:
                control.should_save = control.should_save or best_step(stage, state.log_history) == state.global_step
                control.should_training_stop = control.should_training_stop or _stopped(stage, state.log_history)
            return control

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            every = stage.how.checkpoint_every_steps
            due = time.monotonic() - self.saved_at >= stage.how.checkpoint_every
            due = due or (every is not None and state.global_step % every == 0)
            due = due and state.global_step % stage.steps_at_once == 0
            control.should_save = control.should_save or _agreed(due, args.device)
            return control

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _barrier()
            if args.process_index == 0:
                saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                publish_checkpoint(saved, work.scratch, keep=best_step(stage, state.log_history))
            _barrier()
            self.saved_at = time.monotonic()

    return Watch()


def _check_loss(stage: Tuned, step: int, loss: float, first_loss: tuple[float, float] | None) -> None:
    if not math.isfinite(loss):
        raise AlignError(
            f"learning_rate: the loss is {loss} at step {step}; lower learning_rate (now {stage.learning_rate:g}), "
            "lengthen warmup, or look for broken rows"
        )
    if first_loss is not None and step == 1 and abs(loss - first_loss[0]) > first_loss[1]:
        raise AlignError(
            f"policy: the first loss is {loss:.6f} and must be {first_loss[0]:.6f} (tolerance {first_loss[1]:g}): the "
            "policy starts as its own reference, so here the reference is another model; report this as a defect"
        )


def _check_weights(stage: Tuned, model: Any) -> None:
    """Refuse a model that diverged in its last update, which no later loss shows."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(weight.isfinite().all()):
            raise AlignError(
                f"learning_rate: {name} is not finite after the last step; lower learning_rate "
                f"(now {stage.learning_rate:g}), lengthen warmup, or look for broken rows"
            )


def _evaluations(stage: Tuned, history: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the steps of the evaluations after the first step, and what each was worth."""
    name, sign = stage.judged_by
    return [(entry["step"], sign * entry[name]) for entry in history if name in entry and entry["step"] > 0]


def best_step(stage: Tuned, history: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step of the best evaluation; computed from the history alone, so a resume cannot lose it."""
    if not stage.keeps_best:
        return None
    least = stage.early_stopping.min_delta if stage.early_stopping else 0.0
    best: tuple[int, float] | None = None
    for step, worth in _evaluations(stage, history):
        if best is None or worth > best[1] + least:
            best = (step, worth)
    return best[0] if best else None


def _stopped(stage: Tuned, history: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether `patience` evaluations have passed since the best one."""
    best = best_step(stage, history)
    if stage.early_stopping is None or best is None:
        return False
    return sum(step > best for step, _ in _evaluations(stage, history)) >= stage.early_stopping.patience


def _last(history: Sequence[Mapping[str, Any]], name: str, default: float) -> float:
    return next((float(entry[name]) for entry in reversed(history) if name in entry), default)


_MEASURED = ("_runtime", "_seconds", "_per_second", "total_flos", "eval_num_tokens")


def _curve(history: Iterable[Mapping[str, Any]]) -> Curve:
    """Return the points that repeat: no times, no speeds, and not Trainer's summary, which is wrong after a resume."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(_MEASURED)}
        for entry in history
        if "loss" in entry or any(name.startswith("eval_") for name in entry)
    ]


def _agreed(due: bool, device: Any) -> bool:
    """Return rank 0's answer on every rank: clocks differ, and a checkpoint is made by all or none."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return due
    answer = torch.tensor([int(due)], device=device)
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def _barrier() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
