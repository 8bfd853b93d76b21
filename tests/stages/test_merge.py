"""Merging: the merged weights answer as base and adapter did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages.merge import Merge


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_answer_as_base_and_adapter(
    adapted: Callable[[torch.dtype], Resolved], work: Callable[..., Work], dtype: torch.dtype
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, here = adapted(dtype), work()
    assert source.base is not None
    assert source.adapter is not None
    metrics = Merge(model="stage:sft").run({"model": source}, here)

    whole: Any = AutoModelForCausalLM.from_pretrained(source.base.path, dtype=torch.float32)
    plain = logits(whole)
    together = logits(PeftModel.from_pretrained(whole, source.adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(here.out / "model", dtype=torch.float32))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert (merged - together).abs().max() < tolerance < (plain - together).abs().max() / 5
    assert metrics["max_logit_difference_float32"] < 1e-4
    assert metrics["max_logit_difference"] < tolerance

    stored = load_file(here.out / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    # Every matrix by hand: W + alpha / r * B A, rounded once.
    before = load_file(Path(str(source.base.path)) / "model.safetensors")
    adapter = load_file(Path(source.adapter) / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    expected = before[f"{name}.weight"].float() + 12 / 4 * (b @ a)
    torch.testing.assert_close(
        stored[f"{name}.weight"], expected.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )
    assert torch.equal(stored["model.norm.weight"], before["model.norm.weight"])

    tokenizer = AutoTokenizer.from_pretrained(here.out / "model")
    ends = json.loads((here.out / "model" / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert not list(here.out.rglob("adapter_*"))


def test_nothing_to_merge_is_refused_with_advice(base: Resolved, work: Callable[..., Work]) -> None:
    with pytest.raises(InputError, match="file:base has no adapter, there is nothing to merge; remove this stage"):
        Merge(model="file:base").run({"model": base}, work())
