"""Write a trained model as others load it: a folder for Transformers, or an adapter for PEFT, proven by its answers.

What was written is loaded again from disk and answers as the model that it was made from: greedy answers to real
prompts are drawn with that model, and both are asked for the logits of every token of them. A reward model gives the
scores that its stage stored. A difference that is too large is an error, so a wrong folder is never handed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align_pipeline.pipeline.errors import AlignError, InputError
from align_pipeline.pipeline.stage import Resolved

if TYPE_CHECKING:
    import torch

Form = Literal["merged", "adapter"]

PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 8, 32, 512
"""How many prompts are answered, with how many tokens each, and how much of a prompt is read (its end)."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "float32": (1e-4, 0.99),
    "float16": (1e-2, 0.95),
    "bfloat16": (5e-2, 0.95),
}
"""Dtype of the files -> the largest difference of logits as a share of the largest logit, and the least agreement."""

LOST = 0.5
"""The share of what the adapter changes that rounding may cost; weights in which more is lost are no export of it."""

ROOM = 1.3
"""How much of a GPU's free memory the weights in float32 may want, their own size being 1."""

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about rain.",
    "How do I boil an egg?",
    "My order has not arrived. What can I do?",
    "Name three colours.",
)


@dataclass(frozen=True)
class Proof:
    """How near the written folder, loaded again, is to what it was made from."""

    difference: float
    """Largest difference of logits; of scores for a reward model."""
    bound: float
    dtype: str
    """Of the written weights."""
    prompts: int
    tokens: int = 0
    agreement: float | None = None
    """Share of the tokens of greedy answers that both choose; None for a reward model."""
    least_agreement: float | None = None


@dataclass(frozen=True)
class _Answers:
    """Greedy answers of a model and its logits at each of their tokens."""

    rows: list[tuple[list[int], list[int]]]
    """Prompt ids and answer ids."""
    logits: list[torch.Tensor]
    """One (T, V) a row, float32, on the CPU."""


def export(
    source: Resolved, form: Form, folder: Path, base_name: str | None, prompts: Sequence[Sequence[int]]
) -> Proof:
    """Write a model to the empty folder `folder`, load it from there again, and return how near it is.

    `base_name` is what an adapter's settings call its base: a hub id or a path. Raises AlignError when the written
    weights do not answer as the model does.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if form == "adapter" and source.adapter is None:
        raise InputError(f"{source.ref}: it is whole weights and has no adapter; leave --format out")
    if source.kind == "reward_model":
        return _export_reward(source, form, folder, base_name)
    return _export_causal(source, form, folder, base_name, prompts)


# --- causal models ----------------------------------------------------------------------------------------------------


def _export_causal(
    source: Resolved, form: Form, folder: Path, base_name: str | None, prompts: Sequence[Sequence[int]]
) -> Proof:
    import torch

    from align_pipeline.stages.merge import stored_dtype
    from align_pipeline.stages.models import eos_ids, load_causal, load_tokenizer

    tokenizer = load_tokenizer(source)
    where = _where(source)
    model: Any = load_causal(source, dtype=torch.float32, device=where)
    stops = eos_ids(source, tokenizer)
    answers = _answer(model, tokenizer.pad_token_id, prompts)
    plain: list[torch.Tensor] | None = None
    if source.adapter is not None:
        with model.disable_adapter():
            plain = [_logits(model, *row) for row in answers.rows]
    if form == "adapter":
        _copy_adapter(source, folder, base_name)
    elif source.adapter is None:
        _copy_weights(source, folder)
    else:
        _merge(model, tokenizer, source, folder)
    _set_stops(source, folder, sorted(stops), tokenizer.pad_token_id)
    del model
    again = load_causal(_written(source, form, folder), dtype=torch.float32, device=where)
    found = [_logits(again, *row) for row in answers.rows]
    proof = _compare(answers, found, _name(stored_dtype(source)))
    _check(proof, source)
    if form == "merged" and plain is not None:
        _check_kept(answers, plain, found, source)
    return proof


def prompts_of(
    source: Resolved,
    task: str | None = None,
    inputs: Mapping[str, Resolved] | None = None,
    field: str = "data",
    config: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the ids of the first prompts of a stage's rows; without rows, of a few questions of our own."""
    from align_pipeline.stages.models import load_tokenizer, vocabulary

    tokenizer = load_tokenizer(source)
    if task is None:
        return _questions(tokenizer)
    from align_pipeline.data.chat import Encoder
    from align_pipeline.data.gate import Gate
    from align_pipeline.stages.reading import sources

    config = config or {}
    encoder = Encoder(task, tokenizer, max_length=None, vocabulary=vocabulary(source))  # type: ignore[arg-type]
    given = sources(inputs or {}, field, format=config.get("format"), columns=config.get("columns"))
    found: list[list[int]] = []
    for row in Gate().take(given[0].scan(task)):  # type: ignore[arg-type]
        if prompt := _prompt(encoder.whole(row)):
            found.append(prompt)
        if len(found) == PROMPTS:
            break
    return found


def _questions(tokenizer: Any) -> list[list[int]]:
    from align_pipeline.data.chat import encode_prompt
    from align_pipeline.data.rows import Message, Prompt

    chat = bool(tokenizer.chat_template)
    asked = [(Message("user", text),) if chat else text for text in QUESTIONS]
    return [encode_prompt(Prompt(f"question {n}", content), tokenizer)["prompt_ids"] for n, content in enumerate(asked)]


def _prompt(encoded: Mapping[str, Any]) -> list[int]:
    """Return what a model reads before it answers: a row's prompt, or the first half of a text."""
    from align_pipeline.data.chat import IGNORED

    if "prompt_ids" in encoded:
        return list(encoded["prompt_ids"])
    ids, labels = list(encoded["input_ids"]), list(encoded["labels"])
    start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    return ids[: start or max(1, len(ids) // 2)]


def _answer(model: Any, pad_id: int, prompts: Sequence[Sequence[int]]) -> _Answers:
    """Return greedy answers to prompts, of which as much is read as leaves room for an answer.

    They go on after a token that ends an answer: a model that says little would be asked for few logits.
    """
    from align_pipeline.stages.rollout import HFSampler, Sampling, context

    positions = context(model) or PROMPT_TOKENS + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, max(1, positions // 2))
    room = min(PROMPT_TOKENS, positions - new_tokens)
    cut = [list(prompt[-room:]) for prompt in prompts]
    sampling = Sampling(new_tokens, frozenset(), temperature=0.0)
    drawn = HFSampler(model, pad_id).sample(cut, 1, sampling, keys=list(range(len(cut))))
    rows = [(prompt, list(answer.ids)) for prompt, (answer,) in zip(cut, drawn, strict=True)]
    return _Answers(rows, [_logits(model, *row) for row in rows])


def _logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the logits that choose each token of an answer, (T, V) in float32 on the CPU."""
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0]  # (P + T, V)
    return logits[len(prompt) - 1 : -1].float().cpu()


def _compare(answers: _Answers, again: Sequence[torch.Tensor], dtype: str) -> Proof:
    share, least = BOUNDS.get(dtype, BOUNDS["bfloat16"])
    largest = max(float(one.abs().max()) for one in answers.logits)
    difference = max(float((one - two).abs().max()) for one, two in zip(answers.logits, again, strict=True))
    equal = sum(int((one.argmax(-1) == two.argmax(-1)).sum()) for one, two in zip(answers.logits, again, strict=True))
    tokens = sum(len(one) for one in answers.logits)
    return Proof(difference, share * largest, dtype, len(answers.rows), tokens, equal / tokens, least)


def _check(proof: Proof, source: Resolved) -> None:
    """Raise AlignError when a proof is out of its bounds."""
    if not proof.difference <= proof.bound:
        raise AlignError(
            f"{source.ref}: the written weights, loaded again, differ by {proof.difference:.3g} in their logits from "
            f"the model (bound {proof.bound:.3g} for {proof.dtype}), so nothing was exported; {_ADVICE}"
        )
    if proof.agreement is not None and not proof.agreement >= (proof.least_agreement or 0):
        raise AlignError(
            f"{source.ref}: the written weights choose the model's token in {proof.agreement:.1%} of {proof.tokens} "
            f"(bound {proof.least_agreement:.0%} for {proof.dtype}), so nothing was exported; {_ADVICE}"
        )


_ADVICE = "`align verify` tells whether a file is damaged, and --format adapter exports without rounding"


def _check_kept(
    answers: _Answers, plain: Sequence[torch.Tensor], found: Sequence[torch.Tensor], source: Resolved
) -> None:
    """Raise AlignError when rounding cost most of what the adapter changes: half precision swallows small steps."""
    changed = sum(float(((one - two) ** 2).sum()) for one, two in zip(answers.logits, plain, strict=True))
    lost = sum(float(((one - two) ** 2).sum()) for one, two in zip(answers.logits, found, strict=True))
    if changed and lost > LOST**2 * changed:
        raise AlignError(
            f"{source.ref}: what its adapter changes is so small that {(lost / changed) ** 0.5:.0%} of it (bound "
            f"{LOST:.0%}) is lost when the sum is rounded to the dtype of the base, so nothing was exported; export it "
            "with --format adapter, or train further"
        )


# --- reward models ----------------------------------------------------------------------------------------------------


def _export_reward(source: Resolved, form: Form, folder: Path, base_name: str | None) -> Proof:
    import torch

    from align_pipeline.stages.merge import stored_dtype
    from align_pipeline.stages.models import load_reward, load_tokenizer

    if form == "adapter":
        _copy_adapter(source, folder, base_name)
    elif source.adapter is None:
        _copy_weights(source, folder)
    else:
        _merge(load_reward(source, dtype=torch.float32, device=_where(source)), load_tokenizer(source), source, folder)
    if source.reference_scores is None:
        raise InputError(f"{source.ref}: no reference scores in it, so nothing can be proven; run its stage again")
    stored = json.loads(Path(source.reference_scores).read_text("utf-8"))
    scores = _scores(source, form, folder, stored["input_ids"])
    dtype = _name(stored_dtype(source))
    share = BOUNDS.get(dtype, BOUNDS["bfloat16"])[0]
    scale = max(1.0, *(abs(score) for score in stored["scores"]))
    difference = max(abs(one - two) for one, two in zip(stored["scores"], scores, strict=True))
    proof = Proof(difference, share * scale, dtype, len(scores), sum(map(len, stored["input_ids"])))
    if not difference <= proof.bound:
        raise AlignError(
            f"{source.ref}: the written weights, loaded again, differ by {difference:.3g} in the scores that its stage "
            f"stored (bound {proof.bound:.3g} for {dtype}), so nothing was exported; {_ADVICE}"
        )
    return proof


def _scores(source: Resolved, form: Form, folder: Path, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return what the written folder gives, read as anyone reads a sequence classifier: `model(input_ids).logits`."""
    import torch

    from align_pipeline.stages.models import load_reward

    model: Any = load_reward(_written(source, form, folder), dtype=torch.float32, device=_where(source))
    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([row], device=model.device)).logits[0, 0]) for row in rows]


# --- files ------------------------------------------------------------------------------------------------------------


def _written(source: Resolved, form: Form, folder: Path) -> Resolved:
    """Return the written folder as an input: whole weights, or an adapter on the base that it was trained with."""
    from align_pipeline.stages.models import local_path

    again = Resolved(ref=f"export:{folder.name}", digest=source.digest, path=str(folder), kind=source.kind)
    if form == "merged":
        return again
    # What the written settings call the base is for other machines; here it is the one that was checked.
    base = source.plain.model_copy(update={"hub": None, "path": str(local_path(source.plain))})
    return again.model_copy(update={"adapter": str(folder), "base": base})


def _where(source: Resolved) -> str:
    """Return the GPU when the weights fit there in float32 with room to spare, else `cpu`."""
    import torch

    from align_pipeline.stages.merge import stored_dtype
    from align_pipeline.stages.models import device, weights_folder

    stored = sum(path.stat().st_size for path in weights_folder(source).glob("*.safetensors"))
    wanted = stored * 4 / stored_dtype(source).itemsize * ROOM
    if not torch.cuda.is_available() or wanted > torch.cuda.mem_get_info()[0]:
        return "cpu"
    return device()


def _merge(model: Any, tokenizer: Any, source: Resolved, folder: Path) -> None:
    """Write base and adapter as whole weights: summed in float32, rounded once to the dtype of the base's files."""
    from align_pipeline.stages.merge import stored_dtype, summed
    from align_pipeline.stages.models import save_model

    merged = summed(model).to(stored_dtype(source))
    made = save_model(merged, tokenizer, folder / "made", source)
    for path in sorted(made.iterdir()):
        path.rename(folder / path.name)
    shutil.rmtree(folder / "made")


def _copy_weights(source: Resolved, folder: Path) -> None:
    from align_pipeline.stages.models import weights_folder

    shutil.copytree(weights_folder(source), folder, dirs_exist_ok=True)


def _copy_adapter(source: Resolved, folder: Path, base_name: str | None) -> None:
    """Copy an adapter with its tokenizer, naming its base so that PEFT finds it."""
    from align_pipeline.stages.models import adapter_folder

    adapter = adapter_folder(source)
    assert adapter is not None
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["base_model_name_or_path"] = base_name
    settings["revision"] = source.plain.revision if base_name == source.plain.hub else None
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _set_stops(source: Resolved, folder: Path, stops: Sequence[int], pad_id: int) -> None:
    """Write the tokens at which answers end where everything that serves a model looks for them."""
    from align_pipeline.stages.models import weights_folder

    file = folder / "generation_config.json"
    origin = file if file.is_file() else weights_folder(source) / "generation_config.json"
    settings = json.loads(origin.read_text("utf-8")) if origin.is_file() else {}
    settings |= {"eos_token_id": list(stops) if len(stops) > 1 else stops[0], "pad_token_id": pad_id}
    settings.pop("_from_model_config", None)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
