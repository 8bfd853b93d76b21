"""A reward model that learnt noise is stopped before PPO follows it: real stages, from a user's seat."""

import json
import random
from pathlib import Path

import pytest

from harness import start
from tiny import write_tiny_model

PIPELINE = """\
name: noise
model: file:base
lora: {r: 4}
stages:
  reward:
    type: reward
    data: file:pairs.jsonl
    held_out: 0.3
    batch_size: 16
    learning_rate: 1e-2
    epochs: 2
  ppo:
    type: ppo
    policy: file:base
    reward: stage:reward
    prompts: file:prompts.jsonl
    episodes: 8
    batch_size: 8
    max_new_tokens: 4
"""
ITEMS = [f"{color} {thing}" for color in ("red", "green", "old", "new", "big") for thing in "tea jam soap rice".split()]
QUESTIONS = [f"where is the {item} {number}" for item in ITEMS for number in range(8)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    (folder / "base").mkdir()
    write_tiny_model(folder / "base", [*QUESTIONS, "please see shelf", "no idea"], vocab_size=300, positions=64)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS[:16]))
    (folder / "p.yaml").write_text(PIPELINE)
    return folder


def write_pairs(folder: Path, swapped: float) -> None:
    """Write pairs whose polite answer is the better one, the other way round in this share of them."""
    chance = random.Random(3)
    with (folder / "pairs.jsonl").open("w") as file:
        for question in QUESTIONS:
            sides = [" please see shelf", " no idea"]
            if chance.random() < swapped:
                sides.reverse()
            file.write(json.dumps({"prompt": question, "chosen": sides[0], "rejected": sides[1]}) + "\n")


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments, toys=False)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def manifest(folder: Path) -> dict:
    return json.loads((folder / "runs" / "noise" / "manifest.json").read_text())["stages"]


def test_a_reward_model_of_shuffled_labels_is_stopped(project: Path) -> None:
    write_pairs(project, swapped=0.5)
    code, _, err = run(project, "run", "p.yaml")
    metrics = manifest(project)["reward"]["metrics"]
    accuracy, n = metrics["accuracy"], metrics["n"]
    assert n >= 30 and accuracy == pytest.approx(0.5, abs=0.15), "the labels say nothing"
    assert code == 1
    place = "p.yaml:12: stages.ppo.require.reward_above_chance: "
    assert err.startswith(f"{place}stage:reward tells {accuracy:.1%} [") and err.count("\n") == 1, err
    assert f"of {n:.0f} held-out pairs apart, a coin 50%; there is " in err
    assert err.endswith("set require: {reward_above_chance: off}\n")
    assert manifest(project)["reward"]["status"] == "done" and manifest(project)["ppo"]["status"] == "blocked"
    assert not list((project / "runs" / "work").glob("ppo-*")), "PPO was not started"
    assert "ppo     blocked  reward_above_chance: stage:reward tells" in run(project, "plan", "p.yaml")[1]
    off = run(project, "plan", "p.yaml", "--set", "stages.ppo.require.reward_above_chance=off")[1]
    assert "ppo     run" in off


def test_one_of_true_labels_is_let_through(project: Path) -> None:
    write_pairs(project, swapped=0.0)
    code, _, err = run(project, "run", "p.yaml", "reward")
    assert (code, err) == (0, "")
    assert manifest(project)["reward"]["metrics"]["accuracy"] > 0.9
    assert "ppo     run" in run(project, "plan", "p.yaml")[1]
