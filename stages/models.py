"""The only door to transformers and peft: where weights come from, and how they are written.

A model is a base and at most one adapter. What is loaded is always a local folder; a hub repository is downloaded
first, at the commit that the plan resolved. Remote code is never run, pickled weights are never read, embeddings are
never resized, and an adapter is never merged here: `merge` is a stage of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align_pipeline.pipeline.errors import AlignError, InputError
from align_pipeline.pipeline.files import flush
from align_pipeline.pipeline.stage import Resolved

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align_pipeline.stages.training import Lora

ADAPTER = "default"
"""The one adapter's name; TRL and vLLM look for it under this name and no other."""

Tuning = Literal["lora", "full"]
Quantize = Literal["4bit"]

_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.md", "original/*"]
_PADS = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")
_RESERVED = re.compile(r"<\|?(reserved|unused|extra)[\w ]*\|?>|\[unused\d+\]", re.IGNORECASE)


# --- where things are -------------------------------------------------------------------------------------------------


def local_path(source: Resolved) -> Path:
    """Return the file or folder that an input lies in; a hub repository is downloaded at its commit."""
    if source.path is not None:
        return Path(source.path)
    if source.hub is None:
        raise InputError(f"{source.ref}: it has neither a path nor a hub repository; write file:PATH or hub:ORG/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {"revision": source.revision, "ignore_patterns": _NOT_DOWNLOADED}
    try:
        return Path(snapshot_download(source.hub, **wanted))
    except Exception as error:  # whatever the HTTP library of this release raises: a whole local copy serves as well
        try:
            return Path(snapshot_download(source.hub, local_files_only=True, **wanted))
        except LocalEntryNotFoundError:
            raise InputError(
                f"{source.ref}: it could not be downloaded ({type(error).__name__}: {error}), and this machine has no "
                "whole copy; check the name, the network and, for a gated model, `hf auth login`"
            ) from error


def weights_folder(source: Resolved) -> Path:
    """Return the folder of the whole weights: of the base when the input is an adapter."""
    folder = local_path(source.plain)
    nested = folder / "model"
    folder = nested if (nested / "config.json").is_file() else folder
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file() or (folder / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"{source.ref}: it is an adapter, and only whole weights can be named by file: or hub:; read an adapter as "
            "stage:NAME of the pipeline that made it, or merge it there with a `merge` stage"
        )
    raise InputError(f"{source.ref}: no config.json in it; it must be a folder that `save_pretrained` wrote")


def adapter_folder(source: Resolved) -> Path | None:
    """Return the adapter's folder, or None for whole weights; refuse an adapter that another base was trained with."""
    if source.adapter is None:
        return None
    folder = Path(source.adapter)
    named = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    base = source.plain
    # A foreign adapter may name its base by a path on another machine, which says nothing about this base.
    pattern = r"(sha256|git):\w+" + (r"|[\w.-]+/[\w.-]+" if base.hub else "")
    comparable = isinstance(named, str) and re.fullmatch(pattern, named)
    if comparable and named not in (base.hub, base.digest):
        raise InputError(
            f"{source.ref}: its adapter was trained on {named}, not on {base.hub or base.digest} ({base.ref}); give it "
            "the base that it was trained on"
        )
    return folder


def context(source: Resolved) -> int | None:
    """Return how many positions a model has, from its configuration; None when that names no limit."""
    limit = getattr(_text_config(source), "max_position_embeddings", None)
    return int(limit) if limit else None


def vocabulary(source: Resolved) -> int | None:
    """Return how many token ids a model's embedding takes: often more than its tokenizer knows, for even shapes."""
    size = getattr(_text_config(source), "vocab_size", None)
    return int(size) if size else None


def _text_config(source: Resolved) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(weights_folder(source)), local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


# --- devices and numbers ----------------------------------------------------------------------------------------------


def device() -> str:
    """Return the device of this process: its own GPU, or `cpu`."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    """Return whether this device computes bfloat16 in hardware; a CPU is kept in fp32, where results repeat."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype() -> torch.dtype:
    """Return what frozen weights are held in: bfloat16 where the device has it, else float32."""
    import torch

    return torch.bfloat16 if has_bf16() else torch.float32


def check_quantize(quantize: Quantize | None) -> None:
    """Refuse 4-bit weights where they cannot work."""
    if quantize is None:
        return
    from importlib.util import find_spec

    import torch

    if not torch.cuda.is_available():
        raise AlignError("quantize: 4bit needs a CUDA GPU and there is none here; remove `quantize`")
    if find_spec("bitsandbytes") is None:
        raise AlignError("quantize: 4bit needs bitsandbytes; run `pip install 'align-pipeline[qlora]'`")


def _load_arguments(folder: Path, dtype: Any, where: str | None, quantize: Quantize | None) -> dict[str, Any]:
    """Return what every `from_pretrained` of a model gets."""
    check_quantize(quantize)
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "dtype": dtype,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if quantize == "4bit":
        import torch
        from transformers import BitsAndBytesConfig

        # QLoRA (Dettmers et al. 2023, sections 3: NF4 and double quantisation)
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if has_bf16() else torch.float16,
        )
        arguments["device_map"] = {"": where or device()}
    return arguments


# --- tokenizer --------------------------------------------------------------------------------------------------------


def load_tokenizer(
    source: Resolved, chat_template: Path | None = None, padding_side: Literal["left", "right"] = "right"
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside the adapter, else beside the weights, with a pad token that is not eos.

    Raises AlignError when the vocabulary holds no token that can serve as pad.
    """
    from transformers import AutoTokenizer

    adapter = adapter_folder(source)
    folder = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else weights_folder(source)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise AlignError(f"{source.ref}: its tokenizer has no eos token; set `eos_token` in its tokenizer_config.json")
    tokenizer.padding_side = padding_side
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text("utf-8")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _unused_special(tokenizer, source)
    return tokenizer


def _unused_special(tokenizer: PreTrainedTokenizerBase, source: Resolved) -> str:
    """Return a token of the vocabulary that no text produces, for padding."""
    vocabulary, added = tokenizer.get_vocab(), sorted(tokenizer.get_added_vocab())
    reserved = [token for token in added or sorted(vocabulary) if _RESERVED.fullmatch(token)]
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    for token in (*_PADS, *reserved):
        if token in vocabulary and token not in taken and token not in template:
            return token
    raise AlignError(
        f"{source.ref}: its tokenizer has no token to pad with ({tokenizer.eos_token!r} ends answers, so it cannot pad "
        "them); set `pad_token` in its tokenizer_config.json to a token of its vocabulary that no text uses"
    )


def eos_ids(model: PreTrainedModel | PeftModel | Resolved, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every id that ends an answer: of the generation config, the tokenizer, and the chat template's turn."""
    if isinstance(model, Resolved):
        file = weights_folder(model) / "generation_config.json"
        found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    else:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {found} if isinstance(found, int) else set(found or ())
    return frozenset(ids | {tokenizer.eos_token_id} | _turn_end(tokenizer))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special token that the chat template writes after an assistant's words, if it writes one."""
    from align_pipeline.data.chat import check_template

    if not tokenizer.chat_template:
        return set()
    try:
        return {check_template(tokenizer)}
    except AlignError:
        return set()  # nothing of it can be stopped at; what trains on conversations refuses such a template


# --- causal models ----------------------------------------------------------------------------------------------------


def load_causal(
    source: Resolved, *, dtype: Any = None, device: str | None = None, quantize: Quantize | None = None
) -> PreTrainedModel | PeftModel:
    """Return a frozen model in eval mode, its adapter (if any) unmerged."""
    from transformers import AutoModelForCausalLM

    where = device or _device()
    model = AutoModelForCausalLM.from_pretrained(
        **_load_arguments(weights_folder(source), dtype or compute_dtype(), where, quantize)
    )
    adapter = adapter_folder(source)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), adapter_name=ADAPTER)
    return _frozen(model, where, quantize)


def load_trainable(
    source: Resolved,
    *,
    tuning: Tuning,
    lora: Lora,
    quantize: Quantize | None = None,
    seed: int = 0,
    dropout: float = 0.0,
) -> PreTrainedModel | PeftModel:
    """Return a model to train: a PeftModel whose adapter is `default`, or whole weights in float32.

    An adapter in the input goes on being trained; a plain base gets a fresh one, drawn from `seed`. `dropout` is that
    of the model's own layers. Raises AlignError when the input's adapter does not have the rank and targets of `lora`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_tuning(source, tuning, quantize)
    folder, adapter = weights_folder(source), adapter_folder(source)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    _set_dropout(config, dropout)
    # Adam's small steps vanish in bfloat16 (8 bits of mantissa), so weights that are trained whole are held in float32.
    dtype = torch.float32 if tuning == "full" else compute_dtype()
    arguments = _load_arguments(folder, dtype, None, quantize)
    model = AutoModelForCausalLM.from_pretrained(config=config, **arguments)
    if tuning == "full":
        return model
    if adapter is None:
        return _fresh_adapter(model, lora, "CAUSAL_LM", seed)
    from peft import PeftModel

    settings = _continued(source, adapter, model, lora)
    return PeftModel.from_pretrained(model, str(adapter), adapter_name=ADAPTER, is_trainable=True, config=settings)


def _device() -> str:
    return device()


def _check_tuning(source: Resolved, tuning: Tuning, quantize: Quantize | None) -> None:
    if tuning == "full" and source.adapter is not None:
        raise AlignError(
            f"{source.ref}: tuning: full trains whole weights and this input is an adapter; put a `merge` stage "
            "between the two, or write tuning: lora"
        )
    if tuning == "full" and quantize is not None:
        raise AlignError("quantize: 4bit weights cannot be trained themselves; write tuning: lora, or remove quantize")


def _set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability that an architecture has; their names differ between families."""
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float | int):
            setattr(config, name, dropout)


def _fresh_adapter(model: PreTrainedModel, lora: Lora, task: str, seed: int) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    settings = LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    set_seed(seed)
    return get_peft_model(model, settings, adapter_name=ADAPTER)


def _continued(source: Resolved, adapter: Path, model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """Return the settings of an adapter that is trained on; refuse one that differs from what the stage asks for."""
    from peft import LoraConfig, PeftConfig

    settings = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(settings, LoraConfig):
        raise AlignError(f"{source.ref}: its adapter is {settings.peft_type}, only LoRA adapters go on being trained")
    has: dict[str, Any] = {"r": settings.r, "alpha": settings.lora_alpha}
    wanted: dict[str, Any] = {"r": lora.r, "alpha": lora.alpha}
    if _targeted(model, settings.target_modules) != _targeted(model, lora.target_modules):
        has["target_modules"], wanted["target_modules"] = settings.target_modules, lora.target_modules
    for name, value in wanted.items():
        if has[name] != value:
            raise AlignError(
                f"{source.ref}: lora.{name}: its adapter has {has[name]}, this stage asks for {value}; one adapter is "
                f"trained along a chain: set lora.{name} to {has[name]}, or put a `merge` stage between the two"
            )
    settings.lora_dropout, settings.inference_mode = lora.dropout, False
    # PEFT looks for the base by this name whenever it saves; the published name would send it to the network.
    settings.base_model_name_or_path = model.name_or_path
    return settings


def graft(model: PeftModel, name: str, source: Resolved) -> torch.Tensor:
    """Put an input's adapter beside those of a model on the same base, and return its score head (1, H), if it has one.

    A reward model's adapter fits a causal model: only its head has no place there. Without one the result is empty.
    Raises AlignError when a weight is missing or has no place.
    """
    from dataclasses import replace

    import torch
    from peft import PeftConfig
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    folder = adapter_folder(source)
    assert folder is not None
    settings = PeftConfig.from_pretrained(str(folder))
    settings = replace(settings, task_type="CAUSAL_LM", modules_to_save=None, inference_mode=False, lora_dropout=0.0)
    settings.base_model_name_or_path = model.name_or_path
    model.add_adapter(name, settings)
    weights = load_peft_weights(str(folder), device="cpu")
    head = [weights.pop(key) for key in list(weights) if key.endswith("score.weight")]
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise AlignError(
            f"{source.ref}: its adapter does not fit the base of the policy ({(missing or result.unexpected_keys)[0]})"
        )
    return head[0] if head else torch.empty(0)


def add_fresh_adapter(model: PeftModel, name: str, seed: int) -> None:
    """Put a fresh adapter of the shape of `default` beside it, drawn from `seed`."""
    from copy import deepcopy

    from transformers import set_seed

    set_seed(seed)
    model.add_adapter(name, deepcopy(model.peft_config[ADAPTER]))


def _targeted(model: PreTrainedModel, targets: str | Iterable[str] | None) -> frozenset[str]:
    """Return the linear layers that `target_modules` picks, in any of PEFT's ways to write it; never the heads."""
    import torch

    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output and name != "score"
    ]
    if targets == "all-linear":
        return frozenset(linear)
    if isinstance(targets, str):
        return frozenset(name for name in linear if re.fullmatch(targets, name))
    ends = tuple(targets or ())
    return frozenset(name for name in linear if any(name == end or name.endswith(f".{end}") for end in ends))


def _frozen(model: Any, where: str, quantize: Quantize | None) -> Any:
    model.requires_grad_(False)
    model.eval()
    return model if quantize else model.to(where)


# --- reward models ----------------------------------------------------------------------------------------------------


def load_reward(
    source: Resolved, *, dtype: Any = None, device: str | None = None, quantize: Quantize | None = None
) -> PreTrainedModel | PeftModel:
    """Return a frozen scorer, proven to give the scores that its stage stored.

    The base is loaded first and the adapter onto it: `from_pretrained` of a classifier on an adapter's folder leaves
    the score head random, without an error. Raises AlignError when a stored score is not reproduced.
    """
    where = device or _device()
    adapter = adapter_folder(source)
    model = _classifier(source, dtype or compute_dtype(), where, quantize, fresh_head=adapter is not None)
    if adapter is not None:
        from peft import PeftModel
        from safetensors import safe_open

        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            if not any("score" in name for name in file.keys()):  # noqa: SIM118 (no mapping)
                raise _not_a_reward_model(source)
        model = PeftModel.from_pretrained(model, str(adapter), adapter_name=ADAPTER)
    model = _frozen(model, where, quantize)
    check_reference_scores(lambda rows: score(model, rows), model.dtype, source)
    return model


def load_reward_trainable(
    source: Resolved, *, tuning: Tuning, lora: Lora, quantize: Quantize | None = None, seed: int = 0
) -> PreTrainedModel | PeftModel:
    """Return a scorer to train: the policy's adapter copied under a fresh score head, or a plain base with one.

    `quantize` and `tuning` are those of `load_trainable`. The input's own head goes on being trained if it has one.
    """
    import torch

    _check_tuning(source, tuning, quantize)
    adapter = adapter_folder(source)
    dtype = torch.float32 if tuning == "full" else compute_dtype()
    from transformers import set_seed

    set_seed(seed)
    model = _classifier(source, dtype, None, quantize, fresh_head=True)
    if tuning == "full":
        return model
    if adapter is None:
        return _fresh_adapter(model, lora, "SEQ_CLS", seed)
    from dataclasses import replace

    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    settings = replace(_continued(source, adapter, model, lora), task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(model, settings, adapter_name=ADAPTER)
    fresh = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    head = {name: weight for name, weight in fresh.items() if "lora_" not in name}
    weights = load_peft_weights(str(adapter), device="cpu")
    result = set_peft_model_state_dict(model, {**head, **weights}, adapter_name=ADAPTER)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise AlignError(
            f"{source.ref}: its adapter does not fit the sequence classifier of the same base "
            f"({(missing or list(result.unexpected_keys))[0]}); put a `merge` stage before the reward stage"
        )
    return model


def _not_a_reward_model(source: Resolved) -> AlignError:
    return AlignError(f"{source.ref}: no score head, so it is no reward model; name the output of a `reward` stage")


def _classifier(source: Resolved, dtype: Any, where: str | None, quantize: Quantize | None, *, fresh_head: bool) -> Any:
    """Return the whole weights as a sequence classifier with one label; a missing head is drawn only if allowed."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    arguments = _load_arguments(weights_folder(source), dtype, where, quantize)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a language model as a classifier always lacks the one head and has the other
    model, report = AutoModelForSequenceClassification.from_pretrained(
        num_labels=1, output_loading_info=True, **arguments
    )
    logging.set_verbosity(verbosity)
    if not fresh_head and any("score" in name or "classifier" in name for name in report["missing_keys"]):
        raise _not_a_reward_model(source)
    if not hasattr(model, "score"):
        raise AlignError(
            f"{source.ref}: {type(model).__name__} keeps its head elsewhere than in `score`; use a decoder-only model"
        )
    model.config.get_text_config().pad_token_id = load_tokenizer(source).pad_token_id
    return model


def score(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], micro_batch: int = 16) -> list[float]:
    """Return one score a row of token ids, read at the row's last token; batching and padding do not change it."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(inner, inner.base_model_prefix)
    head = inner.score.modules_to_save[ADAPTER] if hasattr(inner.score, "modules_to_save") else inner.score
    scores = [0.0] * len(rows)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for numbers, ids, mask, positions in _padded(rows, micro_batch, model.device):
            hidden = backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state  # (B, T, H)
            last = hidden[torch.arange(len(ids)), mask.sum(dim=1) - 1]  # (B, H)
            for number, value in zip(
                numbers, head(last.to(head.weight.dtype)).squeeze(-1).float().tolist(), strict=True
            ):
                scores[number] = value
    model.train(training)
    return scores


def _padded(
    rows: Sequence[Sequence[int]], micro_batch: int, where: Any
) -> Iterable[tuple[Sequence[int], Any, Any, Any]]:
    """Yield the numbers of rows of like length, so that little is padding, and their ids, masks, positions (B, T)."""
    import torch

    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(rows), micro_batch):
        numbers = order[start : start + micro_batch]
        batch = [torch.tensor(rows[number], dtype=torch.long) for number in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        yield numbers, ids.to(where), mask.to(where), positions.to(where)


def write_reference_scores(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], out: Path, count: int = 16
) -> None:
    """Store what the model gives the first `count` rows, so that every later loader can prove itself."""
    kept = [list(row) for row in rows[:count]]
    scores = score(model, kept)
    text = json.dumps({"input_ids": kept, "scores": scores}, separators=(",", ":"))
    (out / "reference_scores.json").write_text(text + "\n", "utf-8")


def check_reference_scores(
    scores_of: Callable[[Sequence[Sequence[int]]], list[float]], dtype: torch.dtype, source: Resolved
) -> None:
    """Raise AlignError unless a loaded reward model gives rows the scores that its stage stored for them."""
    if source.reference_scores is None:
        return
    import torch

    stored = json.loads(Path(source.reference_scores).read_text("utf-8"))
    found = scores_of(stored["input_ids"])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for row, (expected, value) in enumerate(zip(stored["scores"], found, strict=True)):
        if not abs(value - expected) <= tolerance * max(1.0, abs(expected)):
            raise AlignError(
                f"{source.ref}: reference row {row} scores {value:.6f}, its stage stored {expected:.6f} (tolerance "
                f"{tolerance}); these are not the weights that were trained: run the reward stage again with --force"
            )


# --- log-probabilities ------------------------------------------------------------------------------------------------


def completion_log_probs(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    micro_batch: int = 8,
) -> list[torch.Tensor]:
    """Return the log-probability of each completion token, one float32 vector a row of (prompt ids, completion ids)."""
    wanted = [[False] * len(prompt) + [True] * len(completion) for prompt, completion in rows]
    whole = [[*prompt, *completion] for prompt, completion in rows]
    return token_log_probs(model, whole, wanted, micro_batch)


def token_log_probs(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[bool]],
    micro_batch: int = 8,
) -> list[torch.Tensor]:
    """Return the log-probability of each wanted token given those before it, one float32 vector a row.

    A row's first token has nothing before it and is left out. There is never a (B, T, V) tensor
    of logits.
    """
    import torch

    from align_pipeline.stages.logprobs import Scaling, chosen_log_probs

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, head = getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()
    scaling = Scaling.of(inner.config.get_text_config())
    found: dict[int, torch.Tensor] = {}
    training = model.training
    model.eval()
    with torch.inference_mode():
        for numbers, ids, mask, positions in _padded(rows, micro_batch, model.device):
            hidden = backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state  # (B, T, H)
            for row, number in enumerate(numbers):
                at = torch.tensor([i for i, flag in enumerate(wanted[number]) if flag and i > 0], dtype=torch.long)
                at = at.to(ids.device)
                found[number] = chosen_log_probs(hidden[row, at - 1], ids[row, at], head, scaling)[0].cpu()
    model.train(training)
    return [found[number] for number in range(len(rows))]


# --- writing ----------------------------------------------------------------------------------------------------------


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path, base: Resolved
) -> Path:
    """Write `out/adapter` or `out/model` with the tokenizer beside it, and return that folder.

    Equal weights give equal bytes: no path, no time, no host, no model card, and only the adapter `default`. `base` is
    the input that the adapter belongs to; its hub id or digest is written as the adapter's base.
    """
    import shutil

    adapter = hasattr(model, "peft_config")
    folder = out / ("adapter" if adapter else "model")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    # Trainers switch the cache off for training; a published model must not depend on how it was trained.
    model.config.use_cache = True
    if adapter:
        model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    for file in sorted(folder.glob("*.json")):
        _rewrite(file, base.plain)
    return folder


def publish_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter `default` for an engine: whole or not there, and never a number that is not finite.

    A broken number would stay in the engine's cache and spoil answers that other weights give.
    """
    import shutil

    staged = folder.with_name(f".{folder.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name, weight in model.named_parameters():
        if f".{ADAPTER}." in name and not bool(weight.isfinite().all()):
            raise AlignError(f"learning_rate: {name} is not finite; lower learning_rate, or look for broken scores")
    model.save_pretrained(str(staged), selected_adapters=[ADAPTER], save_embedding_layers=False)
    (staged / "README.md").unlink(missing_ok=True)
    for file in staged.iterdir():
        flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


_PLACES = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "tokenizer_file", "vocab_file")


def _rewrite(file: Path, base: Resolved) -> None:
    """Make a settings file a function of its content: sorted, without the folder that the model was loaded from."""
    values = json.loads(file.read_text("utf-8"))
    if file.name in ("tokenizer.json", "vocab.json") or not isinstance(values, dict):
        return
    for name in _PLACES:
        values.pop(name, None)
    if file.name == "adapter_config.json":
        values["base_model_name_or_path"] = base.hub or base.digest
        values["revision"] = base.revision
        # PEFT writes sets in the order of their hashes, which differs from process to process.
        for name in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(values.get(name), list):
                values[name] = sorted(values[name])
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
