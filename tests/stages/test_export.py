"""Export's own bounds: what rounding may cost, and prompts of every kind of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages.export import _Answers, _check, _compare, _where, export, prompts_of

from .conftest import chats, pairs, rows_file, unpaired


def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once(
    adapted: Callable[..., Resolved], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    source, out = adapted(torch.bfloat16), tmp_path / "out"
    assert source.base is not None and source.adapter is not None
    out.mkdir()
    proof = export(source, "merged", out, None, prompts_of(source))
    assert proof.dtype == "bfloat16" and proof.tokens == 5 * 32
    assert 0 < proof.difference < proof.bound and (proof.agreement or 0) >= 0.95
    before = load_file(Path(str(source.base.path)) / "model.safetensors")
    adapter = load_file(Path(source.adapter) / "adapter_model.safetensors")
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for layer in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"model.layers.0.{layer}"
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        expected = before[f"{name}.weight"].float() + 12 / 4 * (b @ a)
        assert torch.equal(stored[f"{name}.weight"], expected.to(torch.bfloat16))


def test_an_adapter_that_rounding_swallows_is_refused_with_a_way_out(
    adapted: Callable[..., Resolved], tmp_path: Path
) -> None:
    source = adapted(torch.bfloat16, std=1e-5)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(AlignError, match=r"so small that \d+% of it .* is lost .* export it with --format adapter"):
        export(source, "merged", tmp_path / "one", None, prompts_of(source))
    assert export(source, "adapter", tmp_path / "two", "org/base", prompts_of(source)).difference == 0


def test_bounds_are_those_of_the_dtype() -> None:
    one = torch.tensor([[4.0, 1.0, 0.0], [0.0, -8.0, 7.9]])
    answers = _Answers([([1], [0, 2])], [one])
    near = one + torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.0, 0.0]])
    proof = _compare(answers, [near], "bfloat16")
    assert (proof.difference, proof.bound) == (pytest.approx(0.3), pytest.approx(0.05 * 8))
    assert (proof.agreement, proof.tokens, proof.prompts) == (1.0, 2, 1)
    source = Resolved(ref="stage:sft", digest="sha256:1")
    _check(proof, source)
    with pytest.raises(AlignError, match=r"differ by 0.3 in their logits from the model \(bound 0.0008 for float32\)"):
        _check(_compare(answers, [near], "float32"), source)
    with pytest.raises(AlignError, match="differ by nan"):
        _check(_compare(answers, [one * float("nan")], "float32"), source)
    close = _Answers([([1], [0, 2])], [torch.tensor([[4.0, 1.0, 0.0], [0.1, -8.0, 0.2]])])
    proof = _compare(close, [torch.tensor([[4.0, 1.0, 0.0], [0.3, -8.0, 0.2]])], "bfloat16")
    assert proof.agreement == 0.5
    with pytest.raises(AlignError, match=r"choose the model's token in 50.0% of 2 \(bound 95% for bfloat16\)"):
        _check(proof, source)


@pytest.mark.parametrize(
    ("task", "rows"),
    [("sft", chats(12)), ("preference", pairs(12)), ("unpaired", unpaired(12))],
)
def test_prompts_are_those_of_the_rows(base: Resolved, tmp_path: Path, task: str, rows: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    found = prompts_of(base, task, {"data.a": rows_file(tmp_path, rows)}, "data", {"format": None, "columns": {}})
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    texts = [tokenizer.decode(ids) for ids in found]
    assert texts[0] == "<|im_start|>user\nwhere is bread<|im_end|>\n<|im_start|>assistant\n"
    assert len(texts) == 8


def test_half_of_a_text_is_a_prompt_and_without_rows_there_are_questions(base: Resolved, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    text = "bread and milk are on the left shelf"
    (ids,) = prompts_of(base, "text", {"data": rows_file(tmp_path, [{"text": text}])})
    whole = tokenizer(text + "<|im_end|>")["input_ids"]
    assert ids == whole[: len(whole) // 2]
    questions = [tokenizer.decode(ids) for ids in prompts_of(base)]
    assert len(questions) == 5 and questions[0].endswith("France?<|im_end|>\n<|im_start|>assistant\n")


def test_weights_that_do_not_fit_on_the_gpu_are_summed_in_main_memory(
    adapted: Callable[..., Resolved], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = adapted(torch.bfloat16)
    assert source.base is not None
    stored = (Path(str(source.base.path)) / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, where in ((int(stored * 2 * 1.4), "cuda:0"), (int(stored * 2 * 1.2), "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert _where(source) == where
