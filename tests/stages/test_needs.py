"""What a stage needs of the machine is said while it is looked at, before an earlier stage is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline.trainer_fields import optimizers
from align_pipeline.stages import needs
from align_pipeline.stages.ppo import PPO
from align_pipeline.stages.sft import SFT


def look(**fields: Any) -> dict[str, list[str]]:
    return SFT(data="file:rows.jsonl", model="file:b", **fields).look({})


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away every package but those that are always there."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None)


def test_an_optimizer_without_its_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for optimizer in ("adamw_bnb_8bit", "paged_adamw_32bit"):
        assert look(train={"optim": optimizer}) == {
            "train.optim": [
                f"{optimizer} needs bitsandbytes, which is not installed; pip install 'align-pipeline[qlora]', or set "
                "adamw_torch"
            ]
        }
    assert look(train={"optim": "adafactor"}) == look() == {}
    monkeypatch.setattr(needs, "find_spec", lambda name: name)
    assert look(train={"optim": "adamw_bnb_8bit"}) == {}


HANDLERS = {
    "bitsandbytes_optimizer": "bitsandbytes",
    "torchao_optimizer": "torchao",
    "galore_optimizer": "galore_torch",
    "apollo_optimizer": "apollo_torch",
    "lomo_optimizer": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_optimizer": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
}
"""What makes an optimizer in Transformers -> what it imports; the others need nothing."""


def test_each_optimizer_needs_what_transformers_imports_for_it() -> None:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    from transformers.training_args import OptimizerNames

    assert list(optimizers()) == [one.value for one in OptimizerNames]
    for name in OptimizerNames:
        module = HANDLERS.get(_OPTIMIZER_HANDLERS[name].__name__.removeprefix("_get_"))
        problems = needs.optimizer_problems(name.value)
        assert [problem.split()[2] for problem in problems] == ([f"{module},"] if module else []), name


def test_four_bits_need_a_gpu_and_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu, package = needs.quantize_problems(tmp_path)
    assert gpu == "4bit needs a CUDA GPU and there is none here; remove it, or run where there is one"
    assert package.startswith("4bit needs bitsandbytes, which is not installed; pip install 'align-pipeline[qlora]'")
    (tmp_path / "nvidia0").touch()
    assert needs.quantize_problems(tmp_path) == [package]
    monkeypatch.setattr(needs, "find_spec", lambda name: name)
    assert needs.quantize_problems(tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert needs.quantize_problems(tmp_path) == [gpu]
    (tmp_path / "dxg").touch()
    assert needs.quantize_problems(tmp_path) == [], "a GPU that cannot be counted"
    monkeypatch.setattr(needs, "quantize_problems", lambda: ["4bit"])
    assert look(quantize="4bit") == {"quantize": ["4bit"]} and look() == {}


def test_vllm_is_looked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from align_pipeline.stages import rollout

    ppo = {"policy": "file:b", "reward": "file:r", "prompts": "file:p.jsonl"}
    monkeypatch.setattr(rollout, "find_spec", lambda name: None)
    assert PPO(**ppo, sampler="vllm").look({}) == {
        "sampler": ["vllm needs vLLM; run pip install 'align-pipeline[vllm]', or set sampler: transformers"]
    }
    assert PPO(**ppo).look({}) == {}
