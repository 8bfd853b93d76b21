"""PPO in Env B, through the stage that users call: its fields, its inputs, its trainer, and what came of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import envb
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import training
from align_pipeline.stages.ppo import PPO

SUPPORT = str(Path(__file__).parent)
SETTINGS: dict[str, Any] = {
    "policy": "file:base",
    "reward": "envb:reward",
    "prompts": "file:prompts.jsonl",
    "lora": {"r": 8, "alpha": 16},
    "value": "fresh",
    "value_coef": 1.0,
    "value_warmup": 5,
    "episodes": 80 * 256,
    "batch_size": 256,
    "minibatches": 4,
    "epochs": 4,
    "learning_rate": 3e-3,
    "kl_coef": 0.3,
    "max_new_tokens": envb.LENGTH,
    "missing_eos_penalty": 0.0,
    "evaluation_prompts": 0,
}
"""What reaches the best policy in 80 iterations of 256 answers."""


def stage(**changes: Any) -> PPO:
    return PPO(**{**SETTINGS, **changes})


def function(name: str) -> Resolved:
    """Return a function of this folder as an input, such as `envb:reward`."""
    return Resolved(ref=name, digest="sha256:" + "f" * 64, function=name, search_path=SUPPORT)


def inputs(folder: Path, base: Path, repeat: int = 8, **changes: Resolved) -> dict[str, Resolved]:
    """Write the prompts and return what a run of `stage()` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    envb.write_prompts(folder / "prompts.jsonl", repeat)
    prompts = Resolved(ref="file:prompts.jsonl", digest="sha256:" + "d" * 64, path=str(folder / "prompts.jsonl"))
    policy = Resolved(ref="file:base", digest="sha256:" + "b" * 64, path=str(base))
    return {"policy": policy, "reward": function("envb:reward"), "prompts": prompts, **changes}


def work(folder: Path) -> Work:
    made = Work(folder)
    made.out.mkdir(parents=True, exist_ok=True)
    made.scratch.mkdir(parents=True, exist_ok=True)
    return made


def trainer(ppo: PPO, found: dict[str, Resolved], made: Work) -> Any:
    """Return the trainer of a stage, its models loaded and nothing sampled."""
    tokenizer = training.load_tokenizer(found, "policy")
    prompts, held_out = ppo.read_prompts(found, tokenizer, made)
    return ppo.trainer(found, made, tokenizer, prompts, held_out)


def policy_of(made: Work, base: Path) -> torch.Tensor:
    """Return what a published policy thinks of every outcome, loaded anew by PEFT or transformers."""
    from peft import PeftModel

    if (made.out / "adapter").exists():
        model = PeftModel.from_pretrained(envb.load(base), str(made.out / "adapter"))
    else:
        model = envb.load(made.out / "model")
    with torch.no_grad():
        return envb.logprobs(model)


def reached(ppo: PPO, made: Work, base: Path) -> envb.Report:
    """Return where the published policy stands between its reference and the best one."""
    with torch.no_grad():
        reference = envb.logprobs(envb.load(base))
    return envb.report(policy_of(made, base), reference, ppo.kl_coef)
