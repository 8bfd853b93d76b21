"""Several processes do what one does: the same curve, the same weights within rounding, kills and resumes included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import align
from tiny import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALIKE = """\
name: ranks
model: file:model
lora: {r: 4, alpha: 8}
stages:
  sft:
    type: sft
    data: file:sft.jsonl
    evaluation: file:sft_test.jsonl
    batch_size: 8
    epochs: 2
    learning_rate: 5e-3
    evaluate_every: 2
    how: {micro_batch: 2, checkpoint_every_steps: 3, logging_steps: 1}
  reward:
    type: reward
    model: stage:sft
    data: file:pairs.jsonl
    evaluation: file:pairs_test.jsonl
    batch_size: 8
    epochs: 2
    learning_rate: 5e-3
    evaluate_every: 2
    how: {micro_batch: 2, logging_steps: 1}
  dpo:
    type: dpo
    policy: stage:sft
    data: file:pairs.jsonl
    evaluation: file:pairs_test.jsonl
    batch_size: 8
    epochs: 2
    learning_rate: 5e-3
    evaluate_every: 2
    how: {micro_batch: 2, logging_steps: 1}
  kto:
    type: kto
    policy: stage:sft
    data: file:thumbs.jsonl
    evaluation: file:thumbs_test.jsonl
    batch_size: 8
    kl_batch: 4
    epochs: 2
    learning_rate: 5e-3
    evaluate_every: 2
    how: {logging_steps: 1}
"""
TRAINED, HELD_OUT = 21, 7
"""Nothing divides: of 21 rows in batches of 8, the last batch has 5, which two ranks with micro-batches of 2 share."""
THINGS = ("apple", "bread", "candle", "drum", "egg", "flute", "glove", "hat")


def write_inputs(folder: Path, pipeline: str = ALIKE) -> None:
    """Write a model and rows whose answers are of very different lengths, so that a mean of means shows."""
    folder.mkdir(exist_ok=True)
    texts = [f"Where is the {thing} number 1? Upstairs, on the left, beside the door." for thing in THINGS]
    write_tiny_model(folder / "model", texts, vocab_size=320, positions=128)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "pairs": [], "thumbs": []}
    for number in range(TRAINED + HELD_OUT):
        thing = THINGS[number % len(THINGS)]
        prompt = f"Where is the {thing} number {number}?"
        right = " Upstairs," + " on the left," * (number % 5) + " beside the door."
        wrong = " No" + " idea" * (number % 3) + "."
        rows["sft"].append({"prompt": prompt, "completion": right})
        rows["pairs"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        rows["thumbs"].append({"prompt": prompt, "completion": (wrong, right)[number % 2], "label": bool(number % 2)})
    for name, some in rows.items():
        for file, part in ((name, some[:TRAINED]), (f"{name}_test", some[TRAINED:])):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    (folder / "p.yaml").write_text(pipeline, "utf-8")


def curve(folder: Path, store: str, stage: str) -> list[dict[str, Any]]:
    text = (folder / store / "ranks" / stage / "curve.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def apart(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative differences between the losses and gradients of two curves."""
    assert [point["step"] for point in one] == [point["step"] for point in two]
    found = {}
    for name in ("loss", "eval_loss", "grad_norm", "num_tokens"):
        pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) if name in a]
        found[name] = max(abs(a - b) / abs(a) for a, b in pairs)
    return found


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for processes in (1, 2):
        store = ("--store", f"runs{processes}")
        align(tmp_path, "run", "p.yaml", *store, "--set", f"launch.processes={processes}", timeout=300)
    for stage in ("sft", "reward", "dpo", "kto"):
        found = apart(curve(tmp_path, "runs1", stage), curve(tmp_path, "runs2", stage))
        print(f"\n{stage}: {found}")
        for name, difference in found.items():
            assert difference <= 1e-3, (stage, name)
