"""TRL's files (`trl sft|dpo|reward|kto --config FILE`) as stages; names and defaults of keys are its release 1.16's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.imported import DATA_FILE, Draft, PeerFile, Source
from align_pipeline.pipeline.imported_training import (
    AUTO,
    WEIGHTS,
    adapter,
    evaluation,
    finish,
    fit,
    held_out,
    rows,
    scaled_by_root,
    starting_model,
    trainer,
)
from align_pipeline.pipeline.trainer_fields import trainer_fields

NAME = "TRL"

TELLS = frozenset(
    "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming use_peft lora_task_type "
    "completion_only_loss assistant_only_loss dataset_text_field packing_strategy eval_packing use_bnb_nested_quant "
    "bnb_4bit_quant_type torch_dtype dtype chat_template_path test_split_size loss_type "
    "desirable_weight undesirable_weight model_init_kwargs max_prompt_length".split()
)
"""Keys that no other peer has."""

_ONLINE = ("num_generations", "reward_funcs", "reward_model_name_or_path")
_LOSSES = {"nll": "sft", "chunked_nll": "sft", "dft": "sft", "kto": "kto", "apo_zero_unpaired": "kto"}
_CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig", "reward": "RewardConfig", "kto": "KTOConfig"}
_RATES = {"sft": 2e-5, "dpo": 1e-6, "reward": 1e-4, "kto": 1e-6}

DEFAULTS: Mapping[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "max_length": 1024,
    "beta": 0.1,
    "loss_type": None,
    "label_smoothing": 0.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "center_rewards_coefficient": 0.0,
    "test_split_size": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
}

OLD = {"evaluation_strategy": "eval_strategy", "max_seq_length": "max_length"}

NEEDLESS: Mapping[str, str] = {
    "lora_task_type": AUTO,
    "dataset_num_proc": "rows are encoded once and kept",
    "padding_free": "packed rows are kept apart always",
    "eval_packing": "held-out rows are judged one by one",
    "dataset_train_split": "the split train is read",
    "ignore_bias_buffers": "no such buffers are sent",
}
LOST: Mapping[str, str] = {
    "dtype": "frozen weights are bfloat16 where the device has it, those that are trained float32",
    "torch_dtype": "frozen weights are bfloat16 where the device has it, those that are trained float32",
    "dataset_config": "of a dataset on the hub the default configuration is read; save another as a file",
    "dataset_streaming": "rows are read whole, and kept as they are encoded",
    "dataset_kwargs": "rows are encoded by align",
    "use_bnb_nested_quant": "4-bit weights are quantised twice",
    "bnb_4bit_quant_type": "4 bits are NF4",
    "bnb_4bit_quant_storage": "4-bit weights are held as bytes",
    "use_dora": "plain LoRA is trained",
    "lora_modules_to_save": "the adapter alone is trained, of a reward model also the score",
    "lora_target_parameters": "layers are named in lora.target_modules",
    "model_init_kwargs": "the model is loaded in one way",
    "eos_token": "an answer ends with what the chat template ends a turn with",
    "pad_token": "pad is a token that is not eos, the tokenizer's or a reserved one",
    "max_prompt_length": "max_length bounds prompt and answer together",
    "max_completion_length": "max_length bounds prompt and answer together",
    "truncation_mode": "a longer row loses the end of the answer",
    "sync_ref_model": "the reference is the policy that the stage starts from",
    "ref_model_mixup_alpha": "the reference is the policy that the stage starts from",
    "ref_model_sync_steps": "the reference is the policy that the stage starts from",
    "reference_free": "the reference is the policy that the stage starts from",
    "rpo_alpha": "write loss: [sigmoid, sft] with loss_weights",
    "accelerate_config": "write launch: {processes: N, accelerate: ddp} at the top, or fsdp (docs/launch.md)",
    "env": "set variables in the shell",
    "config": "name that file",
}


def draft(file: PeerFile) -> Draft | None:
    """Return the stage of a file; None when it cannot be one, which `file.refused` says."""
    kind = _kind(file)
    if kind is None:
        return None
    file.speaks({}, {**DEFAULTS, "learning_rate": _RATES[kind]}, OLD)
    stage = Draft(kind, kind)
    stage.put("type", kind, f"trl {kind}")
    maker = starting_model(file, stage, "model_name_or_path", "model_revision")
    _tuning(file, stage, maker)
    _rows(file, stage)
    trainer(file, stage)
    stage.put("max_length", file.whole("max_length", 2), file.origin("max_length"))
    if "max_length" in file.values and file.values["max_length"] is None:
        stage.put("max_length", 1_000_000, "null there: as long as the model reads")
    _held_out(file, stage)
    _of_the_stage(file, stage)
    _chat_template(file, stage)
    evaluation(file, stage)
    finish(file, stage, NEEDLESS, LOST)
    return stage


def _kind(file: PeerFile) -> str | None:
    """Return the command that a file is for: the one that was named, else the one whose configuration has all keys."""
    for key in _ONLINE:
        if file.given(key):
            what = "a key of grpo or rloo; no stage does this: ppo learns from scores, with `reward:` and `prompts:`"
            file.refuse(key, what)
            return None
    if file.command is not None:
        return file.command
    fields = {kind: trainer_fields(f"trl.trainer.{kind}_config", name) for kind, name in _CONFIGS.items()}
    known = {key for one in fields.values() for key in one} & file.values.keys()
    fitting = [kind for kind in _CONFIGS if known <= fields[kind].keys()]
    if loss := file.values.get("loss_type"):
        fitting = [kind for kind in fitting if kind == _LOSSES.get(str(loss), "dpo")]
    if len(fitting) == 1:
        return fitting[0]
    options = fitting or list(_CONFIGS)
    file.refuse((), f"a file of `trl {'|'.join(options)}`, which its keys do not tell; say which: --stage {options[0]}")
    return None


_SHAPE = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "lora_target_modules"}


def _tuning(file: PeerFile, stage: Draft, maker: Draft | None) -> None:
    lora = file.flag("use_peft")
    stage.put(
        "tuning", "lora" if lora else "full", "use_peft" if file.given("use_peft") else f"{NAME} without use_peft"
    )
    if not lora:
        for name in _SHAPE.values():
            if file.given(name):
                file.needless(name, "without use_peft whole weights are trained")
        fit(file, stage, maker, "model_name_or_path", _SHAPE)
        return
    named = file.words("lora_target_modules")
    if not named:
        file.unsaid(
            "lora_target_modules",
            "target_modules: [q_proj, v_proj] is written, PEFT's own choice for Llama, Mistral, Qwen and Gemma; other "
            "models have other layers, and all-linear learns more",
        )
    adapter(file, stage, _SHAPE, named or ["q_proj", "v_proj"])
    scaled_by_root(file, stage, "use_rslora")
    fit(file, stage, maker, "model_name_or_path", _SHAPE)
    if file.on("load_in_4bit"):
        stage.put("quantize", "4bit", "load_in_4bit")


def _held_out(file: PeerFile, stage: Draft) -> None:
    """TRL evaluates on a split of the hub's dataset, or on a share of a mixture."""
    held_out(file, stage, "test_split_size")
    asked = file.given("eval_strategy") and file.values["eval_strategy"] != "no"
    split = file.text("dataset_test_split") or "test"
    if asked and not stage.get("held_out"):
        file.lost(
            "eval_strategy",
            f"the split {split} of a dataset is not read; save it and write evaluation: file:NAME, or set held_out "
            f"above 0",
        )
        if file.given("dataset_test_split"):
            file.lost("dataset_test_split", "see eval_strategy")
    elif file.given("dataset_test_split"):
        file.needless("dataset_test_split", "nothing is evaluated there either")


def _of_the_stage(file: PeerFile, stage: Draft) -> None:
    """Carry over what one method has alone."""
    if stage.kind == "sft":
        _sft(file, stage)
    elif stage.kind == "reward":
        stage.put(
            "center_rewards", file.number("center_rewards_coefficient", 0), file.origin("center_rewards_coefficient")
        )
    else:
        stage.put("beta", file.number("beta", 0), file.origin("beta"))
        losses = file.words("loss_type") or ["kto" if stage.kind == "kto" else "sigmoid"]
        stage.put("loss", losses[0] if len(losses) == 1 else losses, file.origin("loss_type"))
    if stage.kind == "kto":
        for side in ("desirable_weight", "undesirable_weight"):
            stage.put(side, file.number(side, 0), file.origin(side))
    if stage.kind == "dpo":
        if file.given("loss_weights"):
            stage.put("loss_weights", file.value("loss_weights"), "loss_weights")
        smoothing = file.number("label_smoothing", 0)
        if smoothing and stage.get("loss") == "sigmoid":
            file.lost(
                "label_smoothing",
                f"{NAME} ignores it with sigmoid; here it would be conservative DPO: add label_smoothing: {smoothing}",
            )
        elif smoothing:
            stage.put("label_smoothing", smoothing, "label_smoothing")


def _sft(file: PeerFile, stage: Draft) -> None:
    strategy = file.text("packing_strategy")
    stage.put("packing", file.flag("packing"), file.origin("packing"))
    if strategy not in (None, "bfd"):
        file.lost("packing_strategy", f"{strategy}: rows are packed best-fit, and kept apart")
    answers = [name for name in ("completion_only_loss", "assistant_only_loss") if file.given(name)]
    if not answers:
        stage.put("loss_on", "assistant", "see assistant_only_loss")
        file.unsaid(
            "assistant_only_loss",
            f"loss_on: assistant is written; {NAME} learns the answers of rows with prompt and completion, but every "
            "token of messages and of text: for those write loss_on: all",
        )
        return
    only = [file.flag(name) for name in answers]
    said = answers[only.index(True)] if any(only) else answers[0]
    stage.put("loss_on", "assistant" if any(only) else "all", said)


def _chat_template(file: PeerFile, stage: Draft) -> None:
    path = file.text("chat_template_path")
    if path and path.endswith((".jinja", ".j2")):
        stage.put("chat_template", f"file:{file.found(path)}", "chat_template_path")
    elif path:
        file.lost(
            "chat_template_path",
            f"{path}: a template is a file here; save that tokenizer's chat_template.jinja, and name it",
        )


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(file: PeerFile, stage: Draft) -> None:
    column = file.text("dataset_text_field") if stage.kind == "sft" else None
    columns = {"text": column} if column and column != "text" else {}
    mixture = file.value("datasets")
    if mixture:
        if file.given("dataset_name"):
            file.needless("dataset_name", "`datasets` wins, here as there")
        if not isinstance(mixture, list):
            file.refuse("datasets", "a mixture is a list of mappings, each with a `path:`")
            return
        found = [one for number, entry in enumerate(mixture) if (one := _source(file, number, entry, columns))]
        if any(isinstance(entry, Mapping) and entry.get("fraction") is not None for entry in mixture):
            file.lost(
                "datasets",
                f"fraction: shares of the mixture depend on the rows; {WEIGHTS}",
            )
        rows(file, stage, "data", found, "datasets")
        return
    name = file.text("dataset_name")
    if name is None:
        file.refuse("dataset_name", "missing; nothing says which rows to train on")
        return
    split = file.text("dataset_train_split")
    if split not in (None, "train"):
        file.lost(
            "dataset_train_split", f"{split}: of a dataset on the hub the split train is read; save another as a file"
        )
    if ref := file.reference("dataset_name", name):
        rows(file, stage, "data", [Source("rows", ref, None, columns)], "dataset_name")


def _source(file: PeerFile, number: int, entry: Any, columns: Mapping[str, str]) -> Source | None:
    place = ("datasets", number)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        file.refuse(place, "a dataset is a mapping with a `path:`")
        return None
    path, files = entry["path"], entry.get("data_files")
    files = [files] if isinstance(files, str) else files
    if files and not (isinstance(files, list) and len(files) == 1):
        file.refuse((*place, "data_files"), "name each file as a dataset of its own")
        return None
    if files and path in ("json", "csv", "parquet", "text"):
        ref: str | None = f"file:{file.found(files[0])}"
    else:
        ref = file.reference((*place, "path"), path)
        if files:
            file.lost(
                (*place, "data_files"),
                "of a dataset on the hub the split train is read whole; save this file and name it",
            )
    for part in ("name", "data_dir"):
        if entry.get(part) is not None:
            file.lost(
                (*place, part), "of a dataset on the hub the default configuration is read; save another as a file"
            )
    if entry.get("split") not in (None, "train"):
        file.lost(
            (*place, "split"),
            f"{entry['split']}: of a dataset on the hub the split train is read; save another as a file",
        )
    if entry.get("columns"):
        file.lost(
            (*place, "columns"),
            "other columns than a format's are errors unless `format:` names it; drop them from the rows",
        )
    for part in entry:
        if part not in ("path", "name", "data_dir", "data_files", "split", "columns", "fraction"):
            unknown = f"no key of a dataset of {NAME}"
            file.lost((*place, part), f"{unknown}; {WEIGHTS}" if part.startswith("weight") else unknown)
    stem = Path(files[0] if files and DATA_FILE.search(files[0]) else path).name.split(".")[0]
    return Source(stem, ref, None, columns) if ref else None
