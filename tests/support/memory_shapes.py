"""Random Llamas and pipelines of short trainings on them, to see what their workers take at most."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.estimate import KEPT, estimate
from align_pipeline.pipeline.forecast import Forecaster
from align_pipeline.pipeline.manifest import Manifest
from align_pipeline.pipeline.plan import Planner
from align_pipeline.pipeline.store import Store
from harness import align

EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Makes glibc give back what is freed: by default it keeps holes that it cannot fill again; see docs/memory.md."""


@dataclass(frozen=True)
class Size:
    """A model, and the tokens of its longest row."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    length: int

    def __str__(self) -> str:
        return f"{self.hidden} wide, {self.layers} layers, vocabulary {self.vocabulary:,}, rows of {self.length}"


def write_model(folder: Path, size: Size) -> None:
    """Write a random Llama and a tokenizer whose words are w2, w3, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, size.vocabulary)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2 * size.length,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(folder: Path, size: Size, count: int = 32) -> None:
    """Write rows of random ids for every kind of stage; every other one is a quarter shorter, so batches are padded."""
    draw = random.Random(0)
    half = size.length // 2

    def ids(length: int) -> list[int]:
        return [draw.randrange(2, size.vocabulary) for _ in range(length)]

    def answer(number: int) -> list[int]:
        return [*ids((half if number % 2 else half // 2) - 1), 1]

    def write(name: str, row: Callable[[int], Mapping[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)))

    write("sft.jsonl", lambda i: {"prompt_ids": ids(half), "completion_ids": answer(i)})
    write("thumbs.jsonl", lambda i: {"prompt_ids": ids(half), "completion_ids": answer(i), "label": i % 4 < 2})
    write("prompts.jsonl", lambda i: {"prompt_ids": ids(half)})
    write("pairs.jsonl", lambda i: {"prompt_ids": ids(half), "chosen_ids": answer(i), "rejected_ids": answer(i + 1)})


def pipeline(size: Size) -> dict[str, Any]:
    """Return a pipeline file of every kind of training, each of two optimizer steps."""
    full = {"tuning": "full", "learning_rate": 1e-5}
    short = {"batch_size": 8, "max_steps": 2, "max_length": size.length, "held_out": 0}
    ppo = {
        "type": "ppo",
        "prompts": "file:prompts.jsonl",
        "episodes": 16,
        "batch_size": 16,
        "minibatches": 2,
        "max_new_tokens": size.length // 2,
        "evaluation_prompts": 0,
        "sampler": "transformers",
        "require": {"reward_above_chance": "off"},
    }

    def stage(kind: str, model: str, **more: Any) -> dict[str, Any]:
        field = "model" if kind in ("sft", "reward") else "policy"
        data = {"sft": "sft", "kto": "thumbs"}.get(kind, "pairs")
        rows = {"kl_batch": 4} if kind == "kto" else {"how": {"micro_batch": 4}}
        return {"type": kind, field: model, "data": f"file:{data}.jsonl", **short, **rows, **more}

    plain, tuned = "file:model", "stage:sft"
    stages = {
        "sft": stage("sft", plain),
        "reward": stage("reward", tuned),
        "dpo": stage("dpo", tuned),
        "kto": stage("kto", tuned),
        "ppo": {**ppo, "policy": tuned, "reward": "stage:reward"},
        "ppo-shared": {**ppo, "policy": tuned, "reward": "stage:reward", "value": "shared"},
        "sft-full": stage("sft", plain, **full),
        "reward-full": stage("reward", plain, **full),
        "dpo-full": stage("dpo", plain, **full),
        "kto-full": stage("kto", plain, **full),
        "ppo-full": {**ppo, "policy": plain, "reward": "stage:reward-full", **full},
        "sft-checkpointing": stage("sft", plain, seed=1, how={"micro_batch": 4, "gradient_checkpointing": True}),
    }
    return {"name": "shapes", "model": plain, "stages": stages}


def compared(folder: Path, size: Size, stages: Sequence[str] = ()) -> dict[str, tuple[float, float, int]]:
    """Run stages, or all, in a folder; return for each what was foretold, how much of it without what glibc keeps, and
    its worker's peak, in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "p.yaml").exists():
        write_model(folder / "model", size)
        write_rows(folder, size)
        (folder / "p.yaml").write_text(json.dumps(pipeline(size)))  # JSON is YAML
    loaded, store = load(folder / "p.yaml"), Store(folder / "runs")
    forecaster = Forecaster(Planner(loaded, store, Manifest(store, loaded.name, loaded.file)))
    align(folder, "run", "p.yaml", *stages)
    found = {}
    for name in stages or loaded.stages:
        stage = loaded.stages[name]
        foretold = estimate(stage, forecaster.shapes(stage), forecaster.machine, loaded.launch)
        record = json.loads((folder / "runs" / "shapes" / name / "artifact.json").read_text())
        held = foretold.bytes - foretold.parts[KEPT]
        found[name] = foretold.bytes, held, record["resources"]["peak_memory_bytes"]
    return found
