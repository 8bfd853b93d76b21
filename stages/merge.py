"""Fold an adapter into its base: whole weights that need no PEFT, and that another adapter can start from.

The sum W + (alpha / r) B A is computed in float32 and rounded once to the dtype of the base's files; merging in half
precision, or merging and unmerging again, would leave its errors in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.stage import Inputs, Kind, Metrics, Model, Resolved, Stage, Work
from align_pipeline.stages.training import Training

if TYPE_CHECKING:
    import torch


class Merge(Stage):
    """Merge an adapter into its base."""

    produces: ClassVar[Kind] = "model"

    type: Literal["merge"] = "merge"
    model: Model
    """A model that is a base and an adapter."""

    def measures(self) -> Mapping[str, str]:
        return {"max_logit_difference": "", "max_logit_difference_float32": ""}

    def misfit(self, field: str, maker: Stage) -> str | None:
        """Refuse whole weights: there is nothing to merge."""
        if isinstance(maker, Merge) or (isinstance(maker, Training) and maker.tuning == "full"):
            return f"{maker.type} makes whole weights, which have no adapter to merge; remove this stage"
        return None

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        import torch

        from align_pipeline.stages.models import eos_ids, load_causal, load_tokenizer, save_model

        source = inputs["model"]
        if source.adapter is None:
            raise InputError(
                f"model: {source.ref} has no adapter, there is nothing to merge; remove this stage and name "
                f"{source.ref} where its output was named"
            )
        tokenizer = load_tokenizer(source)
        stops = sorted(eos_ids(source, tokenizer))
        model: Any = load_causal(source, dtype=torch.float32)
        rows = probes(model, tokenizer)
        before = _logits(model, rows)
        merged = summed(model)
        exact = float((_logits(merged, rows) - before).abs().max())
        merged = merged.to(stored_dtype(source))
        rounded = float((_logits(merged, rows) - before).abs().max())
        # Whoever serves the weights without this program must stop at the same tokens.
        merged.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        save_model(merged, tokenizer, work.out, source)
        return {"max_logit_difference": rounded, "max_logit_difference_float32": exact}


def summed(model: Any) -> Any:
    """Return a base and its adapter, held in float32, as whole weights."""
    return model.merge_and_unload(safe_merge=True)


def stored_dtype(source: Resolved) -> Any:
    """Return the dtype that the base's files are in."""
    import torch
    from transformers import AutoConfig

    from align_pipeline.stages.models import weights_folder

    dtype = AutoConfig.from_pretrained(str(weights_folder(source)), local_files_only=True).dtype
    return dtype or torch.float32


def probes(model: Any, tokenizer: Any, count: int = 4, length: int = 32) -> list[list[int]]:
    """Return rows of ids that walk over the vocabulary: the same for every run, whatever the tokenizer."""
    from align_pipeline.stages.rollout import context

    size = min(len(tokenizer), model.config.get_text_config().vocab_size)
    length = min(length, context(model) or length)
    return [[(1 + row * 7919 + place * 104729) % size for place in range(length)] for row in range(count)]


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the logits of rows of one length, (B, T, V) in float32."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits
    return logits.float()
