"""What the training files of the three peers have in common, as fields of a stage.

Keys go by their names in Transformers' configuration, which LLaMA-Factory and TRL take over; axolotl's own names are in
`PeerFile.names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align_pipeline.pipeline.errors import did_you_mean
from align_pipeline.pipeline.imported import OFF, Draft, PeerFile, Source
from align_pipeline.pipeline.trainer_fields import trainer_fields, type_problem


def starting_model(file: PeerFile, stage: Draft, name: str, revision: str) -> Draft | None:
    """Carry over the model to start from; return the stage when an earlier file makes it."""
    if not file.given(name):
        file.refuse(name, "missing; nothing says which model to start from")
    path = file.text(name)
    if path is None:
        return None
    if maker := file.maker(path):
        file.value(revision)
        stage.put(stage.starts_from, f"stage:{maker.name}", f"{file.key(name)}: {path}")
        if maker.get("tuning") == "lora":
            file.but(name, f"{stage.starts_from}: stage:{maker.name}, whose adapter goes on being trained")
        return maker
    commit = file.text(revision)
    if ref := file.reference(name, path, commit):
        stage.put(stage.starts_from, ref, ", ".join(file.key(one) for one in (name, revision) if file.given(one)))
        if ref.startswith("file:") and file.given(revision):
            file.lost(revision, "a folder has no revisions")
    return None


def continue_adapter(file: PeerFile, stage: Draft, name: str, reference: str = "") -> Draft | None:
    """Go on training the adapter of an earlier file; refuse one that lies on the disk.

    `reference` is what the peer measures preferences against, where that is something else.
    """
    path = file.text(name)
    maker = file.maker(path)
    if maker is None:
        file.refuse(
            name,
            f"{path} is an adapter, and an adapter goes on being trained only where the stage that made it is in the "
            "same pipeline; name the file that made it first (align import FIRST.yaml SECOND.yaml), or merge it and "
            "name the merged model",
        )
        return None
    stage.put(stage.starts_from, f"stage:{maker.name}", f"{file.key(name)}: {path}")
    what = f"{stage.starts_from}: stage:{maker.name}, whose adapter goes on being trained"
    if reference and stage.kind in ("dpo", "kto", "ppo"):
        what += f"; the reference is a frozen copy of it here, and {reference} there"
    file.but(name, what)
    return maker


def adapter(file: PeerFile, stage: Draft, shape: Mapping[str, str], named: list[str]) -> None:
    """Carry over a LoRA adapter; `shape` has the peer's key of each part, `named` its layers or `all-linear` alone."""
    for part in ("r", "alpha"):
        stage.put(("lora", part), file.whole(shape[part], 1), file.origin(shape[part]))
    stage.put(("lora", "dropout"), file.number(shape["dropout"], 0), file.origin(shape["dropout"]))
    layers: str | list[str] = "all-linear" if named == ["all-linear"] else named
    targets = shape["target_modules"]
    if not isinstance(layers, str) and not all(re.fullmatch(r"[\w.]+", layer) for layer in layers):
        file.lost(targets, "layers go by the last part of their names, patterns are not read; all-linear is written")
        layers = "all-linear"
    stage.put(("lora", "target_modules"), layers, file.origin(targets))


def fit(file: PeerFile, stage: Draft, maker: Draft | None, name: str, shape: Mapping[str, str]) -> None:
    """Let an adapter that goes on being trained keep its shape, and refuse to train it as whole weights.

    `name` is the key that names the model that the stage starts from.
    """
    if maker is None or maker.get("tuning") != "lora":
        return
    if stage.get("tuning") == "full":
        what = f"{maker.name} makes an adapter, and this file trains whole weights"
        file.refuse(name, f"{what}; train the adapter on here too, or merge it and name the merged model")
        return
    for part in ("r", "alpha", "target_modules"):
        old = maker.get("lora", part)
        if old != stage.get("lora", part):
            stage.put(("lora", part), old, f"as in {maker.name}")
            if file.given(shape[part]):
                file.lost(shape[part], f"the adapter of {maker.name} goes on being trained, with {old}")


def scaled_by_root(file: PeerFile, stage: Draft, name: str) -> None:
    """Carry over rank-stabilised LoRA: alpha / sqrt(r) there is alpha / r here, for an alpha that is sqrt(r) larger."""
    alpha, rank = stage.get("lora", "alpha"), stage.get("lora", "r")
    if not file.on(name) or alpha is None or rank is None:
        return
    exact = alpha * rank**0.5
    origin = stage.fields[("lora", "alpha")][1]
    stage.put(("lora", "alpha"), round(exact), f"{origin} x sqrt(r), by {file.key(name)}")
    file.but(
        name, f"lora.alpha: {round(exact)}, which is alpha x sqrt(r)" + (" rounded" if exact != round(exact) else "")
    )


def trainer(file: PeerFile, stage: Draft) -> None:
    """Carry over how a file trains: batches, steps, learning rate, precision; what it logs and saves."""
    _batches(file, stage)
    _steps_and_rate(file, stage)
    _machine(file, stage)


def _batches(file: PeerFile, stage: Draft) -> None:
    rows, times = "per_device_train_batch_size", "gradient_accumulation_steps"
    size, accumulated = file.whole(rows, 1) or 1, file.whole(times, 1) or 1
    batch = size * accumulated
    stage.put("batch_size", batch, f"{file.key(rows)} {size} x {file.key(times)} {accumulated}, of one device")
    what = f"batch_size: {batch}, a step's rows on all devices: right for one device, multiply it for more"
    if file.given(rows) or file.given(times):
        file.but(rows if file.given(rows) else times, what)
    else:
        file.unsaid(rows, what)
    if stage.kind == "kto":
        _kl_batch(file, stage, size, batch)
    elif stage.kind != "ppo":
        stage.put(("how", "micro_batch"), size, file.origin(rows))


def _kl_batch(file: PeerFile, stage: Draft, size: int, batch: int) -> None:
    """The rows of a forward pass estimate KTO's KL term, so that they are no matter of memory here."""
    rows = "per_device_train_batch_size"
    if size > 1:
        stage.put("kl_batch", size, file.origin(rows))
        return
    pairs = batch if batch % 2 == 0 else 2 * batch
    stage.put("batch_size", pairs, stage.fields[("batch_size",)][1])
    stage.put("kl_batch", 2, "the least")
    file.but(rows, f"kl_batch: 2 and batch_size: {pairs}; one row alone has no mismatched answer to estimate the KL by")


def _steps_and_rate(file: PeerFile, stage: Draft) -> None:
    steps = file.whole("max_steps") or 0
    if stage.kind == "ppo":
        pass  # it counts episodes
    elif steps > 0:
        stage.put("max_steps", steps, file.key("max_steps"))
        if file.given("num_train_epochs"):
            file.needless("num_train_epochs", "max_steps wins, here as there")
    else:
        stage.put("epochs", file.number("num_train_epochs", 0), file.origin("num_train_epochs"))
    stage.put("learning_rate", file.number("learning_rate", 0), file.origin("learning_rate"))
    schedule = file.text("lr_scheduler_type") or ""
    known = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
    stage.put("schedule", known.get(schedule, "cosine"), file.origin("lr_scheduler_type"))
    if schedule not in known:
        file.lost("lr_scheduler_type", f"{schedule} is no schedule here (cosine, linear, constant); cosine is written")
        if file.given("lr_scheduler_kwargs"):
            file.lost("lr_scheduler_kwargs", f"they are {schedule}'s")
    _warmup(file, stage, steps, none=schedule == "constant")
    for name in ("weight_decay", "max_grad_norm", "seed"):
        stage.put(name, file.number(name, 0), file.origin(name))
    if stage.get("max_grad_norm") == 0:
        stage.put("max_grad_norm", 1e9, "0 there: no clipping")
        file.but("max_grad_norm", "1e9, a norm that is never reached: nothing is clipped")
    if file.given("data_seed") and file.whole("data_seed") != stage.get("seed"):
        file.lost("data_seed", "one `seed` draws the adapter and orders the rows")


def _warmup(file: PeerFile, stage: Draft, steps: int, none: bool) -> None:
    """Carry over the warmup, which is a share of all steps here."""
    given, share = file.number("warmup_steps", 0), file.number("warmup_ratio", 0)
    if none:
        stage.put("warmup", 0.0, "constant has none there")
        for name in ("warmup_steps", "warmup_ratio"):
            if file.given(name):
                file.needless(name, "constant has no warmup there; constant_with_warmup would have had one")
    elif given and given >= 1 and steps > given:
        stage.put("warmup", given / steps, f"{file.key('warmup_steps')} {given:g} of {steps} steps")
    elif given and given >= 1:
        stage.put("warmup", 0.03, "not carried over, see warmup_steps")
        file.lost(
            "warmup_steps",
            f"`warmup` is a share of all steps, which depend on the rows; 0.03 is written, put {given:g} / steps there",
        )
    elif given or (file.given("warmup_steps") and not file.given("warmup_ratio")):
        stage.put("warmup", given or 0.0, file.key("warmup_steps"))
    else:
        stage.put("warmup", share or 0.0, file.origin("warmup_ratio"))


def _machine(file: PeerFile, stage: Draft) -> None:
    """Carry over what changes no result: memory, logs, checkpoints, precision."""
    if file.given("gradient_checkpointing"):
        value = file.value("gradient_checkpointing")
        if isinstance(value, str) and value.startswith("offload"):
            stage.put(("how", "gradient_checkpointing"), True, "gradient_checkpointing")
            file.but("gradient_checkpointing", "how.gradient_checkpointing: true; nothing is moved off the device")
        else:
            stage.put(("how", "gradient_checkpointing"), file.flag("gradient_checkpointing"), "")
    for name, ours in (("logging_steps", "logging_steps"), ("save_steps", "checkpoint_every_steps")):
        steps = file.number(name, 0) if file.given(name) else None
        if steps and steps >= 1:
            stage.put(("how", ours), int(steps), file.key(name))
        elif steps is not None:
            file.lost(name, f"how.{ours} counts whole steps")
    if file.given("save_strategy") and (strategy := file.text("save_strategy")) != "steps":
        file.needless("save_strategy", f"{strategy}: checkpoints serve resuming alone, and are due by time")
    if file.given("dataloader_num_workers"):
        stage.put(("how", "workers"), file.whole("dataloader_num_workers", 0), file.key("dataloader_num_workers"))
    if file.given("report_to"):
        loggers = [name for name in file.words("report_to") if name != "none"]
        if loggers == ["all"]:
            file.lost("report_to", "all: name the loggers in how.report_to")
        elif not loggers:
            file.needless("report_to", "no logger, and none here")
        else:
            stage.put(("how", "report_to"), loggers, "report_to")
    if file.values.get("bf16") in (False, "false", "no"):
        file.lost("bf16", "bfloat16 is used wherever the device has it")


def held_out(file: PeerFile, stage: Draft, name: str) -> None:
    """Carry over the rows that are set aside, a share here."""
    share = file.number(name, 0) or 0.0
    if share < 1:
        stage.put("held_out", float(share), file.origin(name))
    else:
        stage.put("held_out", 0.05, f"not carried over, see {file.key(name)}")
        file.lost(name, f"`held_out` is a share of the rows, at most 0.99; 0.05 is written, put {share:g} / rows there")


def evaluation(file: PeerFile, stage: Draft) -> None:
    """Carry over when held-out rows are evaluated and what stops training early; whether there are any is known."""
    any_rows = bool(stage.get("held_out")) or stage.get("evaluation") is not None
    said = {name: file.settled(name) for name in ("eval_strategy", "eval_steps")}
    strategy = file.text("eval_strategy") if file.given("eval_strategy") else None
    steps = file.number("eval_steps", 0) if file.given("eval_steps") else None
    if not any_rows:
        for name in ("eval_strategy", "eval_steps"):
            if file.given(name) and not said[name]:
                file.needless(name, "there are no held-out rows")
    elif steps and steps >= 1:
        stage.put("evaluate_every", int(steps), ", ".join(file.key(name) for name in said if file.given(name)))
    elif steps:
        file.lost("eval_steps", "`evaluate_every` counts whole steps")
    elif strategy not in (None, "no", "steps"):
        file.lost("eval_strategy", f"{strategy}: evaluated at the end; write evaluate_every: STEPS for more")
    patience = file.whole("early_stopping_patience") if file.given("early_stopping_patience") else None
    best = file.on("load_best_model_at_end")
    metric = file.text("metric_for_best_model") if file.given("metric_for_best_model") else None
    if patience and any_rows:
        names = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model")
        origin = ", ".join(file.key(name) for name in names if file.given(name))
        stage.put(("early_stopping", "patience"), patience, origin)
    elif patience:
        file.lost("early_stopping_patience", "there are no held-out rows to stop by; set held_out above 0")
    elif best:
        file.lost(
            "load_best_model_at_end", "`early_stopping` keeps the best weights; without it the last ones are kept"
        )
    if metric and (not patience or metric.removeprefix("eval_") != "loss"):
        file.lost("metric_for_best_model", "early_stopping judges by the loss on held-out rows")
    if file.given("greater_is_better"):
        file.needless("greater_is_better", "early_stopping judges by the loss on held-out rows")


def rows(file: PeerFile, stage: Draft, at: str, sources: Sequence[Source], key: str, origin: str = "") -> None:
    """Write the sources of rows that a key names: one as it is, several under their names."""
    if not sources:
        return
    named: dict[str, Source] = {}
    for one in sources:
        again = sum(other.name == one.name for other in named.values())
        named[f"{one.name}-{again + 1}" if again else one.name] = one
    refs = {name: one.ref for name, one in named.items()}
    stage.put(at, refs if len(refs) > 1 else sources[0].ref, origin or key)
    if at != "evaluation":
        for part, values in (
            ("format", {name: one.format for name, one in named.items()}),
            ("columns", {name: dict(one.columns) for name, one in named.items()}),
        ):
            if value := _shared(values):
                stage.put(part, value)
    elif (sources[0].format, dict(sources[0].columns)) != (stage.get("format"), stage.get("columns") or {}):
        file.lost(key, "its own format and columns: these rows are read as those to train on; make them alike")


def _shared(values: Mapping[str, Any]) -> Any:
    """Return the one value that all have, or those that are not empty under their names."""
    first = next(iter(values.values()))
    alike = all(value == first for value in values.values())
    return first if alike else {name: value for name, value in values.items() if value}


SHARED_OUT = (
    "for one machine write launch: {processes: N, accelerate: fsdp} at the top: each process then holds a share of the "
    "weights, gradients and optimizer (docs/launch.md); it excludes quantize and train.optim"
)
NOT_SPLIT = (
    "layers and rows are not split between devices; launch: {processes: N, accelerate: fsdp} shares weights out, and "
    "what does not fit takes quantize: 4bit, how.gradient_checkpointing: true or a smaller how.micro_batch"
)
WEIGHTS = "`data_weights` says how often rows of each source are seen"
NO_KERNELS = "it changes speed and memory alone; PyTorch's own kernels are used"
UPLOADS = "nothing is uploaded; `align export FILE:STAGE -o DIR` makes the folder to upload"
LOCAL_STORE = "results lie in the store (runs/, or --store DIR)"
AUTO = "it is found out from the model's own files"

NEEDLESS: Mapping[str, str] = {
    "output_dir": LOCAL_STORE,
    "overwrite_output_dir": "what is up to date is not run again, and `--force STAGE` runs it anew",
    "do_train": "a stage trains",
    "do_eval": "held-out rows are evaluated where there are any",
    "per_device_eval_batch_size": "how.micro_batch counts in evaluations too",
    "save_total_limit": "old checkpoints are removed by themselves",
    "save_only_model": "checkpoints serve resuming alone; what is published is the model",
    "save_safetensors": "weights are written as safetensors only",
    "resume_from_checkpoint": "the same command run again goes on where it was",
    "logging_strategy": "how.logging_steps says when",
    "logging_first_step": "every step is in the curve",
    "logging_dir": LOCAL_STORE,
    "remove_unused_columns": "columns of rows are checked before",
    "dataset_num_proc": "rows are encoded once and kept",
    "disable_tqdm": "there is no such bar",
    "low_cpu_mem_usage": "weights are read straight into place",
    "bf16": "bfloat16 is used wherever the device has it",
    "pad_to_multiple_of": "rows are padded to the longest of a forward pass",
}
"""Keys, by their names in Transformers, whose effect is there without them."""

LOST: Mapping[str, str] = {
    "deepspeed": SHARED_OUT,
    "fsdp": SHARED_OUT,
    "fsdp_config": SHARED_OUT,
    "use_liger_kernel": NO_KERNELS,
    "attn_implementation": NO_KERNELS,
    "push_to_hub": UPLOADS,
    "hub_model_id": UPLOADS,
    "hub_strategy": UPLOADS,
    "hub_always_push": UPLOADS,
    "hub_revision": UPLOADS,
    "hub_token": "log in with `hf auth login`",
    "liger_kernel_config": NO_KERNELS,
    "hub_private_repo": UPLOADS,
    "trust_remote_code": "remote code is never run; the model must be one that Transformers itself knows",
    "group_by_length": "rows are dealt in random order",
    "train_sampling_strategy": "rows are dealt in random order",
    "use_cpu": "the GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=",
    "fp16": "bfloat16 where the device has it, else float32",
    "gradient_checkpointing_kwargs": "checkpointing does not re-enter the graph; it is memory and speed alone",
    "load_in_4bit": "weights that are trained whole are not quantised",
    "load_in_8bit": "frozen weights are held in 16 bits, or with quantize: 4bit in four",
    "streaming": "rows are read whole, and kept as they are encoded",
}
"""Keys that have nothing here which does their work."""


USUAL: Mapping[str, tuple[Any, ...]] = {
    "attn_implementation": ("sdpa",),
    "flash_attn": ("auto", "sdpa"),
    "quantization_type": ("nf4",),
    "bnb_4bit_quant_type": ("nf4",),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False},),
    "double_quantization": (True,),
    "use_bnb_nested_quant": (True,),
    "mix_strategy": ("concat",),
    "enable_thinking": (),
    "truncation_mode": ("keep_start",),
    "excess_length_strategy": ("truncate",),
    "shuffle_merged_datasets": (True,),
    "pretrain_multipack_attn": (True,),
    "low_cpu_mem_usage": (True,),
    "torch_dtype": ("auto", "bfloat16"),
    "dtype": ("auto", "bfloat16"),
}
"""Of keys that are lost, the values that lose nothing; switched off they are lost all the same."""


def finish(file: PeerFile, stage: Draft, needless: Mapping[str, str], lost: Mapping[str, str]) -> None:
    """Pass on what the trainer's own configuration has, and name every other key that was not taken."""
    needless, lost = {**NEEDLESS, **needless}, {**LOST, **lost}
    fields = trainer_fields(*stage.cls.trainer_config) if stage.cls.trainer_config else {}
    theirs = {ours: name for name, ours in file.names.items()}
    for name in list(file.left()):
        value, ours = file.values[name], theirs.get(name, name)
        if ours in needless:
            file.needless((name,), needless[ours])
        elif value in USUAL.get(ours, ()):
            file.needless((name,), "so it is here")
        elif value in OFF and (name in file.switches or (ours in lost and ours not in USUAL)):
            file.needless((name,), "it is off, and here too")
        elif ours in lost:
            file.lost((name,), lost[ours])
        elif ours in fields and ours not in stage.cls.owned:
            if problem := type_problem(fields[ours], value):
                file.lost((name,), f"train.{ours} {problem}")
            else:
                stage.put(("train", ours), value, name)
        elif ours in fields:
            instead = stage.cls.owned[ours]
            file.lost((name,), f"align sets it; use {instead}" if instead else "it is fixed here")
        else:
            near = did_you_mean(name, {*fields, *needless, *lost, *file.defaults, *file.names.values()} - {name})
            file.lost((name,), f"no key of {file.peer} that align knows{near}")
