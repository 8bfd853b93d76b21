"""axolotl's files (`axolotl train FILE`) as stages; names and defaults of keys are its release 0.19's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.imported import DATA_FILE, Draft, PeerFile, Source
from align_pipeline.pipeline.imported_training import (
    AUTO,
    NO_KERNELS,
    NOT_SPLIT,
    SHARED_OUT,
    UPLOADS,
    WEIGHTS,
    adapter,
    continue_adapter,
    evaluation,
    finish,
    fit,
    held_out,
    rows,
    scaled_by_root,
    starting_model,
    trainer,
)

NAME = "axolotl"

TELLS = frozenset(
    "base_model sequence_len micro_batch_size num_epochs sample_packing val_set_size lora_target_linear adapter rl "
    "dataset_prepared_path flash_attention pad_to_sequence_len eval_sample_packing pretraining_dataset rl_beta "
    "train_on_inputs special_tokens evals_per_epoch saves_per_epoch wandb_project test_datasets lr_scheduler".split()
)
"""Keys that no other peer has."""

NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "use_liger_kernel": "dpo_use_liger_kernel",
    "use_weighting": "dpo_use_weighting",
}
OLD = {"evaluation_strategy": "eval_strategy", "dpo_beta": "rl_beta", "model_revision": "revision_of_model"}
DEFAULTS: Mapping[str, Any] = {
    "sequence_len": 512,
    "val_set_size": 0.0,
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "rl_beta": 0.1,
    "kto_desirable_weight": 1.0,
    "kto_undesirable_weight": 1.0,
}

_LOGGER = "loggers take their settings from their own environment variables; how.report_to names them"
NEEDLESS: Mapping[str, str] = {
    "model_type": AUTO,
    "tokenizer_type": AUTO,
    "base_model_config": AUTO,
    "is_llama_derived_model": AUTO,
    "is_mistral_derived_model": AUTO,
    "is_qwen_derived_model": AUTO,
    "is_falcon_derived_model": AUTO,
    "tokenizer_use_fast": AUTO,
    "tokenizer_legacy": AUTO,
    "processor_type": "models of text alone are trained",
    "strict": "every key is checked",
    "dataset_prepared_path": "encoded rows are found again by their content",
    "dataset_processes": "rows are encoded once and kept",
    "dataset_num_proc": "rows are encoded once and kept",
    "dataset_keep_in_memory": "rows are mapped from the disk",
    "pad_to_sequence_len": "rows are padded to the longest of a forward pass",
    "eval_sample_packing": "held-out rows are judged one by one",
    "sample_packing_group_size": "packing finds its own way",
    "sample_packing_bin_size": "packing finds its own way",
    "sample_packing_eff_est": "packing finds its own way",
    "total_num_tokens": "tokens are counted always",
    "auto_resume_from_checkpoints": "the same command run again goes on where it was",
    "saves_per_epoch": "checkpoints serve resuming alone, and are due by time",
    "bfloat16": "bfloat16 is used wherever the device has it",
    "tf32": "PyTorch's own setting is used",
    "include_tokens_per_second": "speeds are in artifact.json",
    "include_tkps": "speeds are in artifact.json",
    "lora_fan_in_fan_out": AUTO,
    "lora_on_cpu": "adapters are merged in float32, by a stage of its own",
    "merge_lora": "align export FILE:STAGE --format merged",
    "qlora_sharded_model_loading": "each process reads the weights itself",
    "wandb_watch": _LOGGER,
    "gc_steps": "memory is cleared by itself",
    "num_labels": "a reward model has one score",
    "ddp": "launch.processes says how many",
}
LOST: Mapping[str, str] = {
    "flash_attention": NO_KERNELS,
    "xformers_attention": NO_KERNELS,
    "sdp_attention": NO_KERNELS,
    "flex_attention": NO_KERNELS,
    "eager_attention": NO_KERNELS,
    "sage_attention": NO_KERNELS,
    "flash_attn_cross_entropy": NO_KERNELS,
    "flash_attn_rms_norm": NO_KERNELS,
    "flash_attn_fuse_mlp": NO_KERNELS,
    "lora_mlp_kernel": NO_KERNELS,
    "lora_qkv_kernel": NO_KERNELS,
    "lora_o_kernel": NO_KERNELS,
    "use_kernels": NO_KERNELS,
    "chunked_cross_entropy": NO_KERNELS,
    "batch_flattening": NO_KERNELS,
    "unsloth_lora_mlp": NO_KERNELS,
    "plugins": "there are no plugins; what a kernel plugin changes is speed and memory alone",
    "liger_rope": NO_KERNELS,
    "liger_rms_norm": NO_KERNELS,
    "liger_glu_activation": NO_KERNELS,
    "liger_layer_norm": NO_KERNELS,
    "liger_fused_linear_cross_entropy": NO_KERNELS,
    "cut_cross_entropy": NO_KERNELS,
    "fsdp_version": SHARED_OUT,
    "tensor_parallel_size": NOT_SPLIT,
    "context_parallel_size": NOT_SPLIT,
    "sequence_parallel_degree": NOT_SPLIT,
    "dp_shard_size": SHARED_OUT,
    "device_map": NOT_SPLIT,
    "max_memory": NOT_SPLIT,
    "hub_model_id": UPLOADS,
    "hub_strategy": UPLOADS,
    "push_dataset_to_hub": UPLOADS,
    "hf_use_auth_token": "log in with `hf auth login`",
    "special_tokens": "tokens are the tokenizer's own: pad is one that is not eos, eos what the chat template ends a "
    "turn with",
    "tokens": "embeddings are never resized; use tokens that the tokenizer has",
    "added_tokens_overrides": "embeddings are never resized; use tokens that the tokenizer has",
    "tokenizer_config": "the tokenizer is the model's own",
    "resize_token_embeddings_to_32x": "embeddings are never resized",
    "default_system_message": "put a system turn into the rows",
    "chat_template_kwargs": "the template is rendered without arguments; write them into chat_template: "
    "file:NAME.jinja",
    "eot_tokens": "the end of a turn is what the chat template ends one with, and it is learnt",
    "lora_modules_to_save": "the adapter alone is trained; tuning: full trains everything",
    "lora_target_parameters": "layers are named in lora.target_modules",
    "peft_layers_to_transform": "all layers get an adapter",
    "peft_use_dora": "plain LoRA is trained",
    "peft_init_lora_weights": "the adapter starts as LoRA's does: B is 0",
    "peft": "the adapter starts as LoRA's does: B is 0",
    "loraplus_lr_ratio": "one learning rate for both matrices",
    "lr_groups": "one learning rate for all",
    "embedding_lr": "one learning rate for all",
    "unfrozen_parameters": "an adapter is trained, or everything",
    "relora": "one adapter is trained",
    "cosine_min_lr_ratio": "the cosine ends at 0",
    "cosine_constant_lr_ratio": "the cosine ends at 0",
    "evals_per_epoch": "`evaluate_every` counts steps; without it held-out rows are judged at the end",
    "eval_table_size": "a stage `evaluate` shows answers side by side",
    "eval_max_new_tokens": "a stage `evaluate` answers prompts",
    "eval_causal_lm_metrics": "a stage `evaluate` measures answers",
    "dataset_exact_deduplication": "equal rows are counted and said, none is dropped",
    "excess_length_strategy": "longer rows lose the end of the answer, and are counted",
    "eval_sequence_len": "held-out rows are read as the others are",
    "max_prompt_len": "max_length bounds prompt and answer together",
    "shuffle_merged_datasets": "rows are dealt in an order drawn from `seed`",
    "pretrain_multipack_attn": "packed rows are kept apart",
    "curriculum_sampling": "rows are dealt in an order drawn from `seed`",
    "shuffle_before_merging_datasets": "rows are dealt in an order drawn from `seed`",
    "save_first_step": "checkpoints are due by time",
    "trainer_cls": "the trainers are align's own",
    "rpo_alpha": "write loss: [sigmoid, sft] with loss_weights",
    "dpo_norm_loss": "write loss: sigmoid_norm",
    "dpo_padding_free": NO_KERNELS,
    "orpo_alpha": "there is no ORPO",
    "simpo_gamma": "there is no SimPO",
    "cpo_alpha": "there is no CPO",
    "trl": "its keys are of online methods; beta is a field of dpo and kto",
    "vllm": "it samples for ppo alone: launch.vllm_memory",
    "activation_offloading": "activations stay on the device; how.gradient_checkpointing saves memory",
    "float16": "bfloat16 where the device has it, else float32",
    "float32": "bfloat16 is used wherever the device has it",
    "fp8": "weights are held in 16 bits, or with quantize: 4bit in four",
    "gptq": "weights that are quantised already are not trained on; name the model as it was, with quantize: 4bit",
    "bnb_config_kwargs": "4 bits are NF4, quantised twice",
    "noisy_embedding_alpha": "write train: {neftune_noise_alpha: X}",
    "loss_watchdog_threshold": "PPO alone watches for trouble, with how.guards",
    "loss_watchdog_patience": "PPO alone watches for trouble, with how.guards",
    "pretrain_multipack_buffer_size": "rows are read whole, and kept as they are encoded",
    "streaming_multipack_buffer_size": "rows are read whole, and kept as they are encoded",
    "use_pose": "positions are the model's own",
    "rope_scaling": "positions are the model's own; change its config.json",
    "overrides_of_model_config": "the model is trained as it is; change its config.json",
    "model_config": "the model is trained as it is; change its config.json",
    "model_kwargs": "the model is loaded in one way",
    "wandb_project": _LOGGER,
    "wandb_entity": _LOGGER,
    "wandb_name": _LOGGER,
    "wandb_run_id": _LOGGER,
    "wandb_log_model": _LOGGER,
    "wandb_mode": _LOGGER,
    "mlflow_tracking_uri": _LOGGER,
    "mlflow_experiment_name": _LOGGER,
    "comet_project_name": _LOGGER,
    "trackio_project_name": _LOGGER,
    "debug": "stages say what they do",
    "local_rank": "the launcher sets it",
}

_LOGGERS = {
    "use_wandb": "wandb",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
}


def draft(file: PeerFile) -> Draft | None:
    """Return the stage of a file; None when it cannot be one, which `file.refused` says."""
    file.speaks(NAMES, DEFAULTS, OLD)
    kind = _kind(file)
    if kind is None:
        return None
    stage = Draft(kind, kind)
    stage.put(
        "type", kind, next((f"{key}: {file.values[key]}" for key in ("rl", "reward_model") if file.given(key)), "")
    )
    maker = _start(file, stage)
    _tuning(file, stage, maker)
    _rows(file, stage)
    if not file.given("learning_rate"):
        file.refuse("learning_rate", "missing; axolotl needs it too")
        return stage
    trainer(file, stage)
    _length(file, stage)
    _of_the_stage(file, stage)
    _chat_template(file, stage)
    evaluation(file, stage)
    loggers = [name for key, name in _LOGGERS.items() if file.given(key) and file.flag(key)]
    loggers += ["wandb"] if file.given("wandb_project") and "wandb" not in loggers else []
    if loggers:
        stage.put(("how", "report_to"), loggers, "use_wandb and the like")
    finish(file, stage, NEEDLESS, LOST)
    return stage


def _kind(file: PeerFile) -> str | None:
    method = file.text("rl")
    if method is not None and method not in ("dpo", "ipo", "kto"):
        file.refuse(
            "rl", f"{method}: no stage does this; dpo, ipo and kto are carried over, and ppo learns from scores"
        )
        return None
    if file.on("process_reward_model"):
        file.refuse(
            "process_reward_model", "rewards of single steps are not learnt; a stage `reward` scores whole answers"
        )
        return None
    if method:
        return "kto" if method == "kto" else "dpo"
    if file.on("reward_model"):
        return "reward"
    if file.given("pretraining_dataset"):
        return "pretrain"
    sets = file.values.get("datasets")
    documents = (
        isinstance(sets, list)
        and sets
        and all(isinstance(one, dict) and one.get("type") == "completion" for one in sets)
    )
    return "pretrain" if documents else "sft"


def _start(file: PeerFile, stage: Draft) -> Draft | None:
    if file.given("lora_model_dir"):
        file.value("base_model")  # the base of the adapter, which the stage that made it names
        return continue_adapter(file, stage, "lora_model_dir")
    return starting_model(file, stage, "base_model", "revision_of_model")


def _tuning(file: PeerFile, stage: Draft, maker: Draft | None) -> None:
    kind = file.text("adapter")
    if kind not in (None, "", "lora", "qlora"):
        file.refuse("adapter", f"{kind}: no such adapter here; write lora or qlora, or none for whole weights")
        return
    stage.put("tuning", "lora" if kind else "full", f"adapter: {kind}" if kind else f"{NAME} without adapter")
    if not kind:
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules"):
            if file.given(name):
                file.needless(name, "whole weights are trained")
        fit(file, stage, maker, "base_model", {})
        return
    everywhere, layers = file.on("lora_target_linear"), file.words("lora_target_modules")
    if everywhere and layers:
        file.needless("lora_target_modules", "lora_target_linear names every layer")
    elif not everywhere and not layers:
        file.unsaid("lora_target_linear", "all-linear is written: every layer gets an adapter")
    targets = "lora_target_linear" if everywhere else "lora_target_modules"
    named = ["all-linear"] if everywhere or not layers else layers
    shape = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": targets}
    adapter(file, stage, shape, named)
    scaled_by_root(file, stage, "peft_use_rslora")
    start = "lora_model_dir" if file.given("lora_model_dir") else "base_model"
    fit(file, stage, maker, start, shape)
    if file.on("load_in_4bit") or kind == "qlora":
        stage.put("quantize", "4bit", "load_in_4bit" if file.given("load_in_4bit") else "adapter: qlora")


def _length(file: PeerFile, stage: Draft) -> None:
    stage.put("max_length", file.whole("sequence_len", 2), file.origin("sequence_len"))
    if stage.kind in ("sft", "kto", "dpo", "reward") and file.values.get("excess_length_strategy") in (None, "drop"):
        file.but(
            "sequence_len",
            f"max_length: {stage.get('max_length')}; a longer row loses the end of the answer here and is dropped in "
            f"{NAME}",
        )
        file.value("excess_length_strategy")
    if file.given("test_datasets"):
        stage.put("held_out", 0.0, "there are test_datasets")
    else:
        held_out(file, stage, "val_set_size")


def _of_the_stage(file: PeerFile, stage: Draft) -> None:
    """Carry over what one method has alone."""
    if stage.kind in ("sft", "pretrain"):
        packed = file.flag("sample_packing")
        stage.put("packing", packed, file.origin("sample_packing"))
    elif file.given("sample_packing"):
        file.needless("sample_packing", "pairs are never packed, here or there")
    if stage.kind == "sft":
        stage.put("loss_on", "all" if file.flag("train_on_inputs") else "assistant", file.origin("train_on_inputs"))
    elif file.given("train_on_inputs"):
        file.needless("train_on_inputs", "it is a key of supervised fine-tuning")
    if stage.kind == "reward":
        center = file.number("center_rewards_coefficient", 0)
        stage.put("center_rewards", center or 0.0, file.origin("center_rewards_coefficient"))
    if stage.kind in ("dpo", "kto"):
        stage.put("beta", file.number("rl_beta", 0), file.origin("rl_beta"))
    if stage.kind == "kto":
        for side in ("desirable_weight", "undesirable_weight"):
            stage.put(side, file.number(f"kto_{side}", 0), file.origin(f"kto_{side}"))
    if stage.kind == "dpo":
        if file.values["rl"] == "ipo":
            stage.put("loss", "ipo", "rl: ipo")
        elif file.given("dpo_loss_type"):
            losses = file.words("dpo_loss_type")
            stage.put("loss", losses[0] if len(losses) == 1 else losses, "dpo_loss_type")
            if file.given("dpo_loss_weights"):
                stage.put("loss_weights", file.value("dpo_loss_weights"), "dpo_loss_weights")
        else:
            stage.put("loss", "sigmoid", f"default of {NAME}")
        if smoothing := file.number("dpo_label_smoothing", 0):
            stage.put("label_smoothing", smoothing, "dpo_label_smoothing")


def _chat_template(file: PeerFile, stage: Draft) -> None:
    inline = file.text("chat_template_jinja")
    if inline and re.fullmatch(r"[^\n{]+\.jinja2?", inline):
        stage.put("chat_template", f"file:{file.found(inline)}", "chat_template_jinja")
    elif inline:
        file.lost("chat_template_jinja", "write it into a file, and chat_template: file:NAME.jinja")
    named = file.text("chat_template")
    if named in (None, "jinja"):
        return
    if named == "tokenizer_default":
        file.needless("chat_template", "the tokenizer's own chat template is used")
    else:
        file.lost(
            "chat_template",
            f"{named}: the tokenizer's own chat template is used; for another one write chat_template: file:NAME.jinja",
        )


# --- rows -------------------------------------------------------------------------------------------------------------

_PAIRS: Mapping[str, tuple[str | None, Mapping[str, str]]] = {
    "icr": ("alpaca", {"instruction": "input"}),
    "intel": ("alpaca", {"instruction": "question"}),
    "prompt_pairs": ("alpaca", {"instruction": "prompt"}),
    "ultra": ("preference", {}),
    "argilla_chat": ("implicit", {}),
}
_THUMBS: Mapping[str, tuple[str | None, Mapping[str, str]]] = {
    "argilla": ("alpaca", {"output": "completion"}),
    "intel": ("alpaca", {"instruction": "question", "output": "completion"}),
    "prompt_pairs": ("prompt-completion", {}),
    "ultra": ("prompt-completion", {}),
}
"""The part of a type behind its dot -> the format that rows have here, and the file's names of our fields."""


def _rows(file: PeerFile, stage: Draft) -> None:
    key = "pretraining_dataset" if file.given("pretraining_dataset") else "datasets"
    given = file.value(key)
    if isinstance(given, str):
        given = [{"path": given}]
    if not isinstance(given, list) or not given:
        missing = "missing; nothing says which rows to train on"
        file.refuse(key, "must be a list of mappings; write `- ` before `path:`" if given else missing)
        return
    found = [_source(file, stage, key, number, one) for number, one in enumerate(given)]
    rows(file, stage, "data", [one for one in found if one], key)
    tests = file.value("test_datasets")
    if isinstance(tests, list) and len(tests) == 1:
        if source := _source(file, stage, "test_datasets", 0, tests[0]):
            rows(file, stage, "evaluation", [source], "test_datasets")
    elif tests:
        file.lost("test_datasets", "`evaluation` names one file; join them")


_READ = frozenset(
    "path type ds_type data_files split revision field text_column field_messages field_chosen field_rejected "
    "message_property_mappings message_field_role message_field_content roles roles_to_train train_on_eos train_on_eot "
    "chat_template name trust_remote_code".split()
)
"""Keys of a dataset that are looked at; every other one is named."""


def _source(file: PeerFile, stage: Draft, key: str, number: int, one: Any) -> Source | None:
    def place(part: str) -> tuple[str | int, ...]:
        return (key, number, part)

    if not isinstance(one, Mapping) or not isinstance(one.get("path"), str):
        file.refuse((key, number), "a dataset is a mapping with a `path:`")
        return None
    if wrong := [part for part, value in one.items() if not _is_of(part, value)]:
        for part in wrong:
            file.refuse(place(part), f"cannot be {one[part]!r}")
        return None
    ref = _where(file, one, place)
    if ref is None:
        return None
    format, columns = _columns(file, stage, one, place)
    for part in ("split", "name"):
        if one.get(part) not in (None, "train" if part == "split" else None):
            file.lost(
                place(part),
                f"{one[part]}: of a dataset on the hub the split train of its default configuration is read; save "
                f"another as a file",
            )
    for part in ("train_on_eos", "train_on_eot"):
        if one.get(part) not in (None, "turn", "all"):
            file.lost(place(part), f"{one[part]}: the end of each learnt turn is learnt")
    if one.get("roles_to_train") not in (None, ["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]):
        file.lost(place("roles_to_train"), "the assistant's words are learnt, or with loss_on: all every token")
    if one.get("chat_template") not in (None, "tokenizer_default"):
        file.lost(
            place("chat_template"),
            "the tokenizer's own chat template is used; for another one write chat_template: file:NAME.jinja",
        )
    if one.get("trust_remote_code"):
        file.lost(place("trust_remote_code"), "remote code is never run")
    for part in one:
        if part not in _READ and one[part] not in (None, False):
            why = f"{NAME} reads rows by it, align has no such key; change the rows"
            file.lost(place(part), WEIGHTS if part.startswith("weight") else why)
    name = re.sub(r"[^\w-]+", "-", Path(ref.partition("@")[0].rpartition("/")[2].removeprefix("file:")).stem)
    return Source(name, ref, format, columns)


def _is_of(part: str, value: Any) -> bool:
    """Tell whether a key of a dataset holds what it may, as far as it is looked at."""

    def texts(values: Any) -> bool:
        return all(isinstance(one, str) for one in values)

    if value is None or part not in _READ or part in ("roles_to_train", "trust_remote_code"):
        return True
    if part == "roles":
        return isinstance(value, Mapping) and all(isinstance(one, list) and texts(one) for one in value.values())
    if part == "data_files":
        return isinstance(value, str) or (isinstance(value, list) and bool(value) and texts(value))
    if part == "message_property_mappings":
        return isinstance(value, Mapping) and texts(value.values())
    if part == "type" and isinstance(value, Mapping):
        return texts(one for one in value.values() if one is not None)
    return isinstance(value, str)


def _where(file: PeerFile, one: Mapping[str, Any], place: Any) -> str | None:
    path, files = one["path"], one.get("data_files")
    files = [files] if isinstance(files, str) else files or []
    if re.match(r"(s3|gs|gcs|https?|oci|az|abfss?)://", path):
        file.refuse(place("path"), f"{path}: download it, and name the file")
        return None
    if len(files) > 1:
        file.refuse(place("data_files"), "name each file as a dataset of its own")
        return None
    if files and (path in ("json", "csv", "parquet", "text") or one.get("ds_type")):
        return f"file:{file.found(files[0] if path in ('json', 'csv', 'parquet', 'text') else f'{path}/{files[0]}')}"
    if files:
        file.lost(
            place("data_files"),
            f"{files[0]}: of a dataset on the hub the split train is read whole; save this file and name it",
        )
    if one.get("ds_type") and DATA_FILE.search(path):
        return f"file:{file.found(path)}"
    ref: str | None = file.reference(place("path"), path, one.get("revision"))
    return ref


def _columns(file: PeerFile, stage: Draft, one: Mapping[str, Any], place: Any) -> tuple[str | None, dict[str, str]]:
    """Return the format that a type means, and the file's names of our fields."""
    kind = one.get("type")
    if stage.kind == "pretrain":
        column = one.get("text_column") or one.get("field")
        return "text", {"text": column} if column and column != "text" else {}
    if isinstance(kind, Mapping):
        return _own_type(file, stage, kind, place)
    kind = str(kind or "")
    family, _, detail = kind.partition(".")
    if stage.kind == "sft":
        if family == "chat_template":
            return "messages", _renamed({"messages": one.get("field_messages")}, file, one, place)
        if family in ("alpaca", "alpaca_w_system", "alpaca_chat"):
            file.but(
                place("type"),
                "format: alpaca; instructions are turns of the chat template here, and text with ### headings there",
            )
            return "alpaca", {}
        if family == "sharegpt":
            return "sharegpt", {}
        if family == "completion":
            return "text", {"text": one["field"]} if one.get("field") not in (None, "text") else {}
    elif stage.kind in ("dpo", "reward"):
        if family == "chat_template" and detail in ("", "default"):
            wanted = {
                "conversations": one.get("field_messages") or "messages",
                "chosen": one.get("field_chosen"),
                "rejected": one.get("field_rejected"),
            }
            return "sharegpt", _renamed(wanted, file, one, place)
        if family == "bradley_terry":
            return "alpaca", {"instruction": "input"}
        if detail in _PAIRS:
            format, columns = _PAIRS[detail]
            return format, dict(columns)
    elif detail in _THUMBS:
        format, columns = _THUMBS[detail]
        return format, dict(columns)
    if kind:
        file.lost(
            place("type"),
            f"{kind}: rows say what they are, or `format:` and `columns:` do; `align data check FILE` shows how they "
            f"are read",
        )
    return None, {}


def _renamed(wanted: Mapping[str, str | None], file: PeerFile, one: Mapping[str, Any], place: Any) -> dict[str, str]:
    """Return the columns that have other names, once a message's own parts are ones that are read."""
    parts = dict(one.get("message_property_mappings") or {})
    parts.setdefault("role", one.get("message_field_role") or "role")
    parts.setdefault("content", one.get("message_field_content") or "content")
    if (parts["role"], parts["content"]) not in (("role", "content"), ("from", "value")):
        file.lost(
            place("message_property_mappings"), "messages are {role, content} or {from, value}; rename them in the rows"
        )
    others = sorted(set(parts) - {"role", "content"})
    if others:
        file.lost(place("message_property_mappings"), f"{', '.join(others)}: of a message role and content are read")
    for ours, theirs in (one.get("roles") or {}).items():
        odd = set(theirs) - {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}}.get(
            ours, set()
        )
        if odd:
            file.lost(
                place("roles"),
                f"{', '.join(sorted(odd))}: roles are user (human), assistant (gpt) and system; rename them in the "
                f"rows",
            )
    return {ours: theirs for ours, theirs in wanted.items() if theirs and theirs != ours}


def _own_type(file: PeerFile, stage: Draft, kind: Mapping[str, Any], place: Any) -> tuple[str | None, dict[str, str]]:
    """Return the columns of a type that the file spells out; its texts around them are not carried over."""
    fields = {
        "sft": (
            "alpaca",
            {
                "instruction": "field_instruction",
                "input": "field_input",
                "output": "field_output",
                "system": "field_system",
            },
        ),
        "kto": (
            "prompt-completion",
            {"prompt": "field_prompt", "completion": "field_completion", "label": "field_label"},
        ),
    }.get(
        stage.kind, ("preference", {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected"})
    )
    format, names = fields
    for part in kind:
        if part.endswith("format") and not re.fullmatch(r"\{(prompt|chosen|rejected|completion)\}", str(kind[part])):
            file.lost((*place("type"), part), "the chat template puts the text around what the rows say")
        elif part == "system_prompt" and kind[part]:
            file.lost((*place("type"), part), "put a system turn into the rows")
        elif part == "field_system" and stage.kind != "sft" and kind[part]:
            file.lost(
                (*place("type"), part), "rows of messages have a system turn; write format: alpaca and columns for it"
            )
    return format, {ours: kind[theirs] for ours, theirs in names.items() if kind.get(theirs) not in (None, "", ours)}
