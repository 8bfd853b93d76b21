"""kill -9 of the runner, the worker, or both, at 20 seeded moments of real training: nothing but time is lost."""

import itertools
import json
import random
from pathlib import Path

import pytest

from harness import align
from killing import run_and_kill
from tiny import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SAVE_EVERY = 4
PIPELINE = f"""\
name: killed
model: file:model
lora: {{r: 4, alpha: 8, dropout: 0.1}}
stages:
  sft:
    type: sft
    data: file:sft.jsonl
    batch_size: 8
    epochs: 3
    learning_rate: 5e-3
    evaluate_every: 6
    held_out: 0.1
    how: {{micro_batch: 4, checkpoint_every_steps: {SAVE_EVERY}, logging_steps: 1}}
  dpo:
    type: dpo
    policy: stage:sft
    data: file:pairs.jsonl
    batch_size: 8
    epochs: 2
    learning_rate: 1e-3
    how: {{micro_batch: 4, checkpoint_every_steps: {SAVE_EVERY}, logging_steps: 1}}
"""
THINGS = ("apple", "bread", "candle", "drum", "egg", "flute", "glove", "hat")


def write_inputs(folder: Path) -> None:
    folder.mkdir()
    asked = [f"Where is the {thing} number {n}?" for n in range(10) for thing in THINGS]
    good, bad = "The {} is on shelf {}.", "Look for the {} yourself, {}!"
    texts = [good.format(thing, "A") for thing in THINGS] + asked + [bad.format(thing, "you") for thing in THINGS]
    write_tiny_model(folder / "model", texts, vocab_size=320, positions=128)
    with (folder / "sft.jsonl").open("w") as sft, (folder / "pairs.jsonl").open("w") as pairs:
        for i, question in enumerate(asked):
            thing = THINGS[i % len(THINGS)]
            right, wrong = good.format(thing, "ABCD"[i % 4]), bad.format(thing, "you")
            sft.write(json.dumps({"prompt": question, "completion": " " + right}) + "\n")
            pairs.write(json.dumps({"prompt": question, "chosen": " " + right, "rejected": " " + wrong}) + "\n")
    (folder / "p.yaml").write_text(PIPELINE)


def results(folder: Path) -> dict:
    stages = json.loads((folder / "runs/killed/manifest.json").read_text())["stages"]
    return {name: (entry["digest"], entry["metrics"]) for name, entry in stages.items()}


def test_twenty_kills_change_nothing(tmp_path: Path):
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    for folder in (calm, stormy):
        write_inputs(folder)
    align(calm, "run", "p.yaml")
    chance = random.Random(20)
    kills = []
    for number in range(20):
        moment = ("step", "saving", "step", "publishing", "step")[number % 5]
        victim = ("both", "runner", "worker")[number % 3]
        left = run_and_kill(
            stormy, "p.yaml", moment, at_step=chance.randint(2, 6), victim=victim, chance=chance, within=0.02
        )
        for path in (stormy / "runs" / "store").glob("*"):
            assert (path / "artifact.json").exists(), "half an artifact"
        if left is not None:
            kills.append(left)
            assert left.last_step - left.checkpoint <= SAVE_EVERY, "more than one save interval is lost"
    for before, after in itertools.pairwise(kills):
        if before.work == after.work:
            assert after.first_step == before.checkpoint + 1, "a resumed run goes on where the checkpoint is"
    align(stormy, "run", "p.yaml", "--no-wait")
    assert len(kills) >= 8, "most kills hit a training"
    assert results(stormy) == results(calm)
    assert list((stormy / "runs" / "work").iterdir()) == []
