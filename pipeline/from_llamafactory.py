"""LLaMA-Factory's files (`llamafactory-cli train FILE`) as stages; names and defaults of keys are its 0.9.5's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from align_pipeline.pipeline.errors import did_you_mean
from align_pipeline.pipeline.imported import OFF, Draft, PeerFile, Source
from align_pipeline.pipeline.imported_training import (
    AUTO,
    NO_KERNELS,
    NOT_SPLIT,
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
from align_pipeline.pipeline.stage import is_reference

NAME = "LLaMA-Factory"

TELLS = frozenset(
    "finetuning_type cutoff_len template lora_rank lora_target dataset dataset_dir pref_beta pref_loss "
    "quantization_bit "
    "flash_attn enable_liger_kernel neat_packing preprocessing_num_workers val_size plot_loss train_on_prompt "
    "adapter_name_or_path export_dir".split()
)
"""Keys that no other peer has."""

STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}

NAMES = {"early_stopping_patience": "early_stopping_steps"}
OLD = {"evaluation_strategy": "eval_strategy"}
DEFAULTS: Mapping[str, Any] = {
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "val_size": 0.0,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "dpo_label_smoothing": 0.0,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "ppo_buffer_size": 1,
    "ppo_epochs": 4,
    "max_new_tokens": 1024,
    "temperature": 0.95,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
}

NEEDLESS: Mapping[str, str] = {
    "plot_loss": "the curve is in the artifact (curve.jsonl), and how.report_to names loggers that draw it",
    "overwrite_cache": "encoded rows are found again by their content",
    "preprocessing_num_workers": "rows are encoded once and kept",
    "preprocessing_batch_size": "rows are encoded once and kept",
    "use_fast_tokenizer": AUTO,
    "pad_to_sequence_len": "rows are padded to the longest of a forward pass",
    "include_num_input_tokens_seen": "tokens are counted always",
    "include_effective_tokens_per_second": "speeds are in artifact.json",
    "cache_dir": "HF_HOME says where the hub's files lie",
    "data_shared_file_system": "the store is shared",
    "ignore_pad_token_for_loss": "padding is never learnt",
    "compute_accuracy": "align evaluates what its stage measures",
    "use_reentrant_gc": "checkpointing never re-enters",
    "pissa_convert": "there is no PiSSA",
    "freeze_vision_tower": "models of text alone are trained",
    "freeze_multi_modal_projector": "models of text alone are trained",
    "image_max_pixels": "models of text alone are trained",
    "video_max_pixels": "models of text alone are trained",
    "top_k": "PPO samples from the whole distribution, as its log-probs are",
    "generation_max_length": "a stage `evaluate` has max_new_tokens",
    "reward_model_type": "the reward model is read as the stage that made it",
}
LOST: Mapping[str, str] = {
    "template": "the tokenizer's own chat template is used; for another one write chat_template: file:NAME.jinja",
    "default_system": "put a system turn into the rows",
    "tool_format": "rows with tools are not read",
    "enable_thinking": "the chat template decides; write another one as chat_template: file:NAME.jinja",
    "preserve_thinking": "the chat template decides; write another one as chat_template: file:NAME.jinja",
    "flash_attn": NO_KERNELS,
    "use_unsloth": NO_KERNELS,
    "use_unsloth_gc": NO_KERNELS,
    "enable_liger_kernel": NO_KERNELS,
    "use_v1_kernels": NO_KERNELS,
    "use_kt": NO_KERNELS,
    "upcast_layernorm": "frozen weights stay in 16 bits; adapters and weights trained whole are float32",
    "upcast_lmhead_output": "losses are computed in float32",
    "pure_bf16": "weights that are trained are float32: small steps vanish in bfloat16",
    "shift_attn": "attention is the model's own",
    "rope_scaling": "the model's own positions are used; change its config.json",
    "mixture_of_depths": "the model is trained as it is",
    "train_from_scratch": "a stage `pretrain` with `architecture:` starts from nothing",
    "resize_vocab": "embeddings are never resized",
    "add_tokens": "embeddings are never resized; use tokens that the tokenizer has",
    "add_special_tokens": "embeddings are never resized; use tokens that the tokenizer has",
    "split_special_tokens": "messages hold no special tokens, the chat template puts them in",
    "moe_aux_loss_coef": "the router is not balanced; sft takes train: {router_aux_loss_coef: X}",
    "quantization_type": "4 bits are NF4",
    "double_quantization": "4-bit weights are quantised twice",
    "quantization_device_map": NOT_SPLIT,
    "mask_history": "every answer of a conversation is learnt; cut the rows so that one answer is the last",
    "max_samples": "rows are not cut; name a smaller file, or fewer steps with max_steps",
    "mix_strategy": "sources are mixed whole; `data_weights` says how often rows of each are seen",
    "interleave_probs": "sources are mixed whole; `data_weights` says how often rows of each are seen",
    "buffer_size": "rows are read whole, and kept as they are encoded",
    "tokenized_path": "encoded rows are kept in the store",
    "eval_on_each_dataset": "held-out rows are judged together",
    "media_dir": "rows with images, videos or sounds are not read",
    "additional_target": "the adapter alone is trained; tuning: full trains everything",
    "use_dora": "plain LoRA is trained",
    "loraplus_lr_ratio": "one learning rate for both matrices",
    "loraplus_lr_embedding": "one learning rate for all",
    "pissa_init": "the adapter starts as LoRA's does: B is 0",
    "pissa_iter": "the adapter starts as LoRA's does: B is 0",
    "use_galore": "for less memory take tuning: lora, or train: {optim: galore_adamw, optim_target_modules: ...}",
    "use_apollo": "for less memory take tuning: lora, or train: {optim: apollo_adamw, optim_target_modules: ...}",
    "use_badam": "for less memory take tuning: lora",
    "use_adam_mini": "AdamW is used, or what `train: {optim: NAME}` says",
    "use_muon": "AdamW is used, or what `train: {optim: NAME}` says",
    "use_llama_pro": "no layers are added",
    "use_asft_loss": "the loss is the likelihood's",
    "use_eaft_loss": "the loss is the likelihood's",
    "disable_shuffling": "rows are dealt in an order drawn from `seed`",
    "pref_bco_weight": "write loss: [sigmoid, bco_pair] with loss_weights, which is near it",
    "simpo_gamma": "there is no SimPO",
    "ref_model": "the reference is the policy that the stage starts from",
    "ref_model_adapters": "the reference is the policy that the stage starts from",
    "ref_model_quantization_bit": "the reference is held as the policy is",
    "reward_model_adapters": "the reward model is read as the stage that made it",
    "reward_model_quantization_bit": "the reward model is held as its stage has it",
    "ppo_target": "kl_coef stays what it is; 0.2 is written, where the adaptive one starts there",
    "ppo_score_norm": "scores are taken as they are; reward_clip bounds them",
    "top_p": "PPO samples from the whole distribution, as its log-probs are",
    "repetition_penalty": "PPO samples from the model's own distribution",
    "do_sample": "PPO samples",
    "num_beams": "PPO samples",
    "do_predict": "a stage `evaluate` answers prompts",
    "predict_with_generate": "a stage `evaluate` answers prompts",
    "use_swanlab": "loggers are those of Transformers, in how.report_to",
    "ray_num_workers": "launch.processes of one machine",
    "fp8": "weights are held in 16 bits, or with quantize: 4bit in four",
    "hf_hub_token": "log in with `hf auth login`; a token belongs in no file",
}


def draft(file: PeerFile) -> Draft | None:
    """Return the stage of a file; None when it cannot be one, which `file.refused` says."""
    file.speaks(NAMES, DEFAULTS, OLD)
    if file.given("export_dir"):
        file.refuse(
            "export_dir",
            "this file merges an adapter; import the files that train, then align export FILE:STAGE -o DIR",
        )
        return None
    kind = file.text("stage") or ""
    if kind not in STAGES:
        file.refuse(
            "stage", f"{kind}: no such stage{did_you_mean(kind, STAGES) or '; it is one of ' + ', '.join(STAGES)}"
        )
        return None
    if file.given("do_train") and file.values["do_train"] in OFF:
        file.refuse("do_train", "nothing is trained; a stage `evaluate` judges models, align compare compares two")
    stage = Draft(STAGES[kind], STAGES[kind])
    stage.put("type", stage.kind, f"stage: {kind}" if file.given("stage") else file.origin("stage"))
    maker = _start(file, stage)
    _tuning(file, stage, maker)
    _rows(file, stage)
    trainer(file, stage)
    if file.given("disable_gradient_checkpointing"):
        off = file.flag("disable_gradient_checkpointing")
        stage.put(("how", "gradient_checkpointing"), not off, "disable_gradient_checkpointing")
    _of_the_stage(file, stage)
    if stage.kind != "ppo":
        length = file.whole("cutoff_len", 2)
        stage.put("max_length", length, file.origin("cutoff_len"))
        held_out(file, stage, "val_size")
    evaluation(file, stage)
    finish(file, stage, NEEDLESS, LOST)
    return stage


def _start(file: PeerFile, stage: Draft) -> Draft | None:
    if not file.given("adapter_name_or_path"):
        return starting_model(file, stage, "model_name_or_path", "model_revision")
    if file.on("create_new_adapter"):
        file.refuse(
            "create_new_adapter", "merge the old adapter in a `merge` stage, and start a fresh one on what it makes"
        )
    file.value("model_name_or_path")  # the base of the adapter, which the stage that made it names
    return continue_adapter(file, stage, "adapter_name_or_path", "the model without any adapter")


_SHAPE = {"r": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "lora_target"}


def _tuning(file: PeerFile, stage: Draft, maker: Draft | None) -> None:
    kind = file.text("finetuning_type")
    if kind not in ("lora", "full"):
        file.refuse("finetuning_type", f"{kind}: no such tuning here; write lora or full")
        return
    stage.put("tuning", kind, file.origin("finetuning_type"))
    if kind == "lora":
        layers = file.words("lora_target")
        named = ["all-linear"] if layers == ["all"] else layers
        adapter(file, stage, _SHAPE, named)
        if not file.given("lora_alpha"):
            stage.put(("lora", "alpha"), 2 * stage.get("lora", "r"), f"default of {NAME}: twice the rank")
        scaled_by_root(file, stage, "use_rslora")
    else:
        for name in _SHAPE.values():
            if file.given(name):
                file.needless(name, "whole weights are trained")
    start = "adapter_name_or_path" if file.given("adapter_name_or_path") else "model_name_or_path"
    fit(file, stage, maker, start, _SHAPE)
    bits = file.whole("quantization_bit")
    method = file.text("quantization_method") or "bnb"
    if bits == 4 and method in ("bnb", "bitsandbytes"):
        stage.put("quantize", "4bit", "quantization_bit, quantization_method")
    elif bits:
        file.lost(
            "quantization_bit", f"{bits} bits of {method}: 4 bits of bitsandbytes (quantize: 4bit), or 16 as written"
        )


def _of_the_stage(file: PeerFile, stage: Draft) -> None:
    """Carry over what one method has alone."""
    if stage.kind in ("sft", "pretrain"):
        _packing(file, stage)
    if stage.kind == "sft":
        learns_all = file.on("train_on_prompt")
        stage.put("loss_on", "all" if learns_all else "assistant", file.origin("train_on_prompt"))
        if file.on("use_dft_loss"):
            stage.put(("train", "loss_type"), "dft", "use_dft_loss")
    elif stage.kind == "reward":
        stage.put("center_rewards", 0.0, f"{NAME} has none")
    elif stage.kind == "dpo":
        _dpo(file, stage)
    elif stage.kind == "kto":
        stage.put("beta", file.number("pref_beta", 0), file.origin("pref_beta"))
        stage.put("desirable_weight", file.number("kto_chosen_weight", 0), file.origin("kto_chosen_weight"))
        stage.put("undesirable_weight", file.number("kto_rejected_weight", 0), file.origin("kto_rejected_weight"))
        if file.number("pref_ftx"):
            file.lost("pref_ftx", "kto has no likelihood term")
    elif stage.kind == "ppo":
        _ppo(file, stage)


def _packing(file: PeerFile, stage: Draft) -> None:
    neat = file.on("neat_packing")
    packed = file.flag("packing") if file.given("packing") else neat or stage.kind == "pretrain"
    origin = "neat_packing" if neat else file.origin("packing")
    stage.put("packing", neat or packed, origin)
    if packed and not neat:
        what = "packing: true; rows of a sequence are kept apart here, and read each other there"
        (file.but if file.given("packing") else file.unsaid)("packing", what)


def _dpo(file: PeerFile, stage: Draft) -> None:
    stage.put("beta", file.number("pref_beta", 0), file.origin("pref_beta"))
    loss = file.text("pref_loss")
    if loss not in ("sigmoid", "hinge", "ipo"):
        file.refuse(
            "pref_loss", f"{loss}: no such loss here; sigmoid, hinge and ipo are carried over, dpo's `loss` has more"
        )
        return
    likelihood = file.number("pref_ftx", 0) or 0.0
    smoothing = file.number("dpo_label_smoothing", 0)
    if likelihood and not smoothing:
        stage.put("loss", [loss, "sft"], "pref_loss, pref_ftx")
        stage.put("loss_weights", [1.0, float(likelihood)], "pref_ftx")
        file.but(
            "pref_ftx",
            f"loss: [{loss}, sft]; the likelihood is a mean over a batch's tokens here, over its answers there",
        )
    else:
        stage.put("loss", loss, file.origin("pref_loss"))
        if likelihood:
            file.lost("pref_ftx", "loss: [sigmoid, sft] and label_smoothing exclude each other; the smoothing is kept")
    if smoothing:
        stage.put("label_smoothing", smoothing, "dpo_label_smoothing")


def _ppo(file: PeerFile, stage: Draft) -> None:
    reward = file.text("reward_model")
    maker = file.maker(reward)
    if maker is None or maker.kind != "reward":
        file.refuse(
            "reward_model",
            f"{reward}: its value head is read by {NAME} alone; train the reward model here too: name its file first "
            "(align import REWARD.yaml PPO.yaml)",
        )
        return
    stage.put("reward", f"stage:{maker.name}", f"reward_model: {reward}")
    if not maker.get("held_out") and not maker.get("evaluation"):
        stage.put(("require", "reward_above_chance"), "off", f"{maker.name} keeps no rows to be judged by")
        what = "starts only from a reward model that beats a coin on held-out pairs, and its file keeps none (val_size)"
        file.but(
            "reward_model", f"reward: stage:{maker.name}; ppo {what}, so require.reward_above_chance: off is written"
        )
    buffer = file.whole("ppo_buffer_size", 1) or 1
    batch = stage.get("batch_size") * buffer
    stage.put("batch_size", batch, f"{stage.fields[('batch_size',)][1]}, x ppo_buffer_size {buffer}")
    stage.put("minibatches", buffer, file.origin("ppo_buffer_size"))
    stage.put("epochs", file.whole("ppo_epochs", 1), file.origin("ppo_epochs"))
    steps = file.whole("max_steps") or 0
    if steps > 0:
        stage.put("episodes", steps * batch, f"max_steps {steps} x batch_size")
    else:
        epochs = file.number("num_train_epochs")
        stage.put("episodes", 20_000, "not carried over, see num_train_epochs")
        file.lost(
            "num_train_epochs",
            f"`episodes` counts answers; 20000 is written, put {epochs:g} x the number of prompts there",
        )
    stage.put("max_new_tokens", file.whole("max_new_tokens", 1), file.origin("max_new_tokens"))
    stage.put("temperature", file.number("temperature", 0), file.origin("temperature"))
    stage.put("kl_coef", 0.2, f"where {NAME}'s adaptive one starts")
    stage.put("value", "shared", f"as in {NAME}: a head on the policy")
    stage.put("missing_eos_penalty", 0.0, f"{NAME} has none")
    stage.put("evaluation_prompts", 0, f"{NAME} keeps none")
    if file.given("ppo_whiten_rewards"):
        stage.put("whiten_rewards", file.flag("ppo_whiten_rewards"), "ppo_whiten_rewards")
    if file.given("cutoff_len"):
        file.lost("cutoff_len", "prompts are never cut; drop the long ones")


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(file: PeerFile, stage: Draft) -> None:
    """Carry over the rows that a file names: those of `dataset_info.json`, as it describes them."""
    at = "prompts" if stage.kind == "ppo" else "data"
    before = len(file.refused)
    names = file.words("dataset")
    if not names and len(file.refused) == before:
        file.refuse("dataset", "missing; nothing says which rows to train on")
    if stage.kind == "ppo" and len(names) > 1:
        file.refuse("dataset", "ppo reads one set of prompts; join the files")
    held = file.words("eval_dataset")
    table = _table(file, [*names, *held])
    origin = "dataset, in dataset_dir" if file.given("dataset_dir") else ""
    rows(file, stage, at, list(_sources(file, stage, "dataset", names, table)), "dataset", origin)
    if len(held) > 1:
        file.lost("eval_dataset", "`evaluation` names one file; join them")
    else:
        rows(file, stage, "evaluation", list(_sources(file, stage, "eval_dataset", held, table)), "eval_dataset")


def _table(file: PeerFile, names: list[str]) -> dict[str, Any] | None:
    """Return what `dataset_info.json` says; None where names are repositories on the hub."""
    folder = file.text("dataset_dir") or "data"
    if folder == "ONLINE":
        return None
    if folder.startswith("REMOTE:"):
        file.refuse("dataset_dir", f"{folder}: download its dataset_info.json and files, and name their folder")
        return {}
    path = file.where(f"{folder}/dataset_info.json")
    if path is None:
        return {name: {"file_name": f"{name}.json", "absent": folder} for name in names}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        file.refuse("dataset_dir", f"{path} cannot be read: {error}")
        return {}
    return table if isinstance(table, dict) else {}


def _sources(
    file: PeerFile, stage: Draft, key: str, names: list[str], table: dict[str, Any] | None
) -> Iterator[Source]:
    folder = file.text("dataset_dir") or "data"
    for name in names:
        if table is None:
            if ref := file.reference(key, name):
                yield Source(name.rpartition("/")[2], ref)
            continue
        entry = table.get(name)
        if not isinstance(entry, Mapping):
            if table or not file.refused:
                file.refuse(key, f"{name}: not in {folder}/dataset_info.json{did_you_mean(name, table)}")
            continue
        if "absent" in entry:
            file.but(
                key,
                f"file:{folder}/{name}.json; there is no {folder}/dataset_info.json here that says which file it is, "
                "nor its columns: put them right, or import where it lies",
            )
            yield Source(name, f"file:{file.found(f'{folder}/{name}.json')}")
        elif source := _described(file, stage, key, name, folder, entry):
            yield source


def _described(
    file: PeerFile, stage: Draft, key: str, name: str, folder: str, entry: Mapping[str, Any]
) -> Source | None:
    """Return the rows that an entry of `dataset_info.json` describes."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for part in (columns, tags):
        if not isinstance(part, Mapping) or not all(isinstance(one, str | None) for one in part.values()):
            file.refuse(
                key, f"{name}: its columns and tags in dataset_info.json must be mappings of texts, got {part!r}"
            )
            return None
    if bool(entry.get("ranking")) != (stage.kind in ("dpo", "reward")):
        said = f"says that it holds pairs (ranking: true), and {stage.kind} reads none; name another dataset"
        if not entry.get("ranking"):
            said = f"does not say that it holds pairs, and {stage.kind} reads pairs; name another, or add ranking: true"
        file.refuse(key, f"{name}: dataset_info.json {said}")
        return None
    media = [part for part in ("images", "videos", "audios") if columns.get(part)]
    if media:
        file.refuse(key, f"{name}: rows with {', '.join(media)} are not read, models of text alone are trained")
        return None
    if "hf_hub_url" in entry:
        ref = f"hub:{entry['hf_hub_url']}"
        if not is_reference(ref):
            file.refuse(key, f"{name}: hf_hub_url {entry['hf_hub_url']!r} is no ORG/NAME")
            return None
        for part, usual in (("subset", None), ("split", "train"), ("folder", None)):
            if entry.get(part) not in (None, usual):
                file.lost(
                    key,
                    f"{name}: {part} {entry[part]}; of a dataset on the hub the split train is read; save another as "
                    "a file",
                )
    elif "file_name" in entry:
        ref = f"file:{file.found(folder + '/' + str(entry['file_name']))}"
    else:
        given = ", ".join(part for part in entry if part.endswith(("_url", "_name")))
        file.refuse(key, f"{name}: {given or 'no file_name'}; download it, and name the file")
        return None
    if entry.get("num_samples"):
        file.lost(key, f"{name}: num_samples {entry['num_samples']}; `data_weights` says how often rows are seen")
    odd = [f"{tag} {value}" for tag, value in tags.items() if value is not None and value not in _TAGS.get(tag, ())]
    if odd:
        file.lost(
            key,
            f"{name}: tags {', '.join(odd)}; messages are {{role, content}} or {{from, value}}, of user (human), "
            "assistant (gpt) and system; rename them in the rows",
        )
    format, ours = _columns(stage, entry, columns)
    if format == "alpaca" and columns.get("query", "input" if not columns else None):
        file.but(key, f"{name}, format: alpaca; a blank line joins instruction and input here, a newline there")
    return Source(name, ref, format, {our: their for our, their in ours.items() if their and their != our})


_TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function", "tool"),
}
"""What our rows may call each tag."""


def _columns(stage: Draft, entry: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the format that rows are read as, and the file's name for each field of ours.

    Columns that an entry leaves out have their usual names only where it names none.
    """

    def named(theirs: str, usual: str) -> Any:
        return columns.get(theirs) if columns else usual

    label = {"label": columns.get("kto_tag")} if stage.kind == "kto" else {}
    sides = {side: columns.get(side) for side in ("chosen", "rejected")} if entry.get("ranking") else {}
    if stage.kind == "pretrain":
        return "text", {"text": named("prompt", "instruction")}
    if entry.get("formatting", "alpaca") == "alpaca":
        answer = {} if sides or stage.kind == "ppo" else {"output": named("response", "output")}
        asked = {"instruction": named("prompt", "instruction"), "input": named("query", "input")}
        more = {part: columns.get(part) for part in ("system", "history")}
        return "alpaca", {**asked, **answer, **more, **sides, **label}
    talk = named("messages", "conversations")
    more = {part: columns.get(part) for part in ("system", "tools")}
    return "sharegpt", {"conversations": talk, **more, **sides, **label}
