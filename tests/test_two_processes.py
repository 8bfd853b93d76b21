"""Several processes do what one does: the same curves and weights within rounding, also after kills and resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import align, start
from killing import matching
from tiny import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAVE_EVERY = 3
PIPELINE = f"""\
name: ranks
model: file:model
lora: {{r: 4, alpha: 8}}
stages:
  sft:
    type: sft
    data: file:sft.jsonl
    evaluation: file:sft_test.jsonl
    batch_size: 8
    epochs: 6
    learning_rate: 2e-3
    evaluate_every: 3
    how: {{micro_batch: 2, checkpoint_every_steps: {SAVE_EVERY}, logging_steps: 1}}
  reward:
    type: reward
    model: stage:sft
    data: file:pairs.jsonl
    evaluation: file:pairs_test.jsonl
    batch_size: 8
    epochs: 2
    learning_rate: 5e-3
    evaluate_every: 2
    how: {{micro_batch: 2, gradient_checkpointing: true}}
  dpo:
    type: dpo
    policy: stage:sft
    data: file:pairs.jsonl
    evaluation: file:pairs_test.jsonl
    batch_size: 8
    epochs: 6
    learning_rate: 2e-3
    evaluate_every: 3
    how: {{micro_batch: 2, checkpoint_every_steps: {SAVE_EVERY}, logging_steps: 1}}
  kto:
    type: kto
    policy: file:model
    tuning: full
    data: file:thumbs.jsonl
    evaluation: file:thumbs_test.jsonl
    batch_size: 8
    kl_batch: 4
    epochs: 2
    learning_rate: 1e-3
    evaluate_every: 2
  ppo:
    type: ppo
    policy: stage:sft
    reward: rewards:worth
    value: fresh
    prompts: file:prompts.jsonl
    on_bad_row: skip
    batch_size: 9
    minibatches: 3
    episodes: 90
    learning_rate: 1e-3
    max_new_tokens: 8
    evaluation_prompts: 3
    how: {{checkpoint_every_steps: {SAVE_EVERY}}}
"""
REWARDS = """\
def worth(prompts, completions, completion_ids, **columns):
    return [sum(token % 2 for token in ids) / 8 for ids in completion_ids]
"""
TRAINED, HELD_OUT = 21, 7
"""Nothing divides: of 21 rows in batches of 8 the last batch has 5; two processes take 2 each, and 1 is left."""
THINGS = ("apple", "bread", "candle", "drum", "egg", "flute", "glove", "hat")
ONE = "launch.processes=1"
DDP = "launch.processes=2"
FSDP = "launch={processes: 2, accelerate: fsdp}"
ALONE = "launch={processes: 1, accelerate: fsdp}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which one process has done everything, in `runs1`; answers are of very different lengths."""
    folder = tmp_path_factory.mktemp("ranks")
    texts = [f"Where is the {thing} number 1? Upstairs, on the left, beside the door." for thing in THINGS]
    write_tiny_model(folder / "model", texts, vocab_size=320, positions=128)
    files: dict[str, list[dict[str, Any]]] = {"sft": [], "pairs": [], "thumbs": [], "prompts": []}
    for number in range(TRAINED + HELD_OUT):
        prompt = f"Where is the {THINGS[number % len(THINGS)]} number {number}?"
        right = " Upstairs," + " on the left," * (number % 5) + " beside the door."
        wrong = " No" + " idea" * (number % 3) + "."
        files["sft"].append({"prompt": prompt, "completion": right})
        files["pairs"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        files["thumbs"].append({"prompt": prompt, "completion": (wrong, right)[number % 2], "label": number % 2 == 1})
        files["prompts"].append({"prompt": prompt})
    for name, rows in files.items():
        for file, some in ((name, rows[:TRAINED]), (f"{name}_test", rows[TRAINED:])):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    with (folder / "prompts.jsonl").open("a", encoding="utf-8") as prompts:
        prompts.write('{"prompt": ""}\n')
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    (folder / "p.yaml").write_text(PIPELINE, "utf-8")
    align(folder, "run", "p.yaml", "--store", "runs1", "--set", ONE, timeout=300)
    return folder


def curve(folder: Path, store: str, stage: str) -> list[dict[str, Any]]:
    text = (folder / store / "ranks" / stage / "curve.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def apart(folder: Path, store: str, stage: str) -> dict[str, float]:
    """Return how far a run lies from that of one process: of each number the largest relative difference of a step."""
    one, other = curve(folder, "runs1", stage), curve(folder, store, stage)
    assert [point["step"] for point in one] == [point["step"] for point in other]
    found = {}
    for name in ("loss", "grad_norm", "eval_loss", "num_tokens", "eval_objective"):
        pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) if name in a]
        if pairs:
            found[name] = max(abs(a - b) / abs(a) for a, b in pairs)
    metrics = [
        json.loads((folder / runs / "ranks" / stage / "artifact.json").read_text())["metrics"]
        for runs in ("runs1", store)
    ]
    found["metrics"] = max(abs(metrics[1][name] - value) / max(abs(value), 1e-3) for name, value in metrics[0].items())
    print(f"\n{store} {stage}:", {name: f"{value:.1g}" for name, value in found.items()})
    return found


def published(folder: Path, store: str, stage: str) -> dict[str, str | None]:
    """Return the files of a result; and of rows, which one process writes for all, what stands in them."""
    root = (folder / store / "ranks" / stage).resolve()
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    assert len(found) > 3
    same = ("report.md", "rejects.jsonl")
    return {name: path.read_text("utf-8") if name in same else None for name, path in found.items()}


@pytest.mark.parametrize("launch", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_do_what_one_does(folder: Path, launch: str) -> None:
    store = "ddp" if launch == DDP else "fsdp"
    stages = ["sft", "reward", "dpo", "kto", *(["ppo"] if launch == DDP else [])]
    align(folder, "run", "p.yaml", *stages, "--store", store, "--set", launch, timeout=300)
    found = {stage: apart(folder, store, stage) for stage in stages}
    assert {(stage, name): far for stage in stages for name, far in found[stage].items() if far > 1e-3} == {}
    for stage in stages:
        assert published(folder, store, stage) == published(folder, "runs1", stage)


@pytest.mark.parametrize(
    ("stage", "launch", "rank", "then"), [("sft", FSDP, 1, ALONE), ("dpo", DDP, 0, FSDP), ("ppo", DDP, 1, ONE)]
)
def test_a_killed_rank_is_a_failure_that_goes_on_with_another_launch(
    folder: Path, stage: str, launch: str, rank: int, then: str
) -> None:
    store = f"killed-{stage}-{rank}"
    shutil.copytree(
        folder / "runs1", folder / store, ignore=shutil.ignore_patterns(f"{stage}-*", "work"), symlinks=True
    )
    process = start(folder, "run", "p.yaml", stage, "--store", store, "--set", launch, toys=False)
    while process.poll() is None and not matching(folder / store, f"work/{stage}-*/scratch/checkpoint-*/files.json"):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(next(one.pid for one in workers if one.environ().get("RANK") == str(rank)), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"stage {stage} failed: its rank {rank} was killed (SIGKILL)"), err
    assert "continue with: align run" in err
    psutil.wait_procs(workers, timeout=10)
    assert not [one for one in workers if one.is_running()], "no rank outlives the run"
    (work,) = (folder / store).glob(f"work/{stage}-*")
    saved = max(int(path.name.split("-")[1]) for path in work.glob("scratch/checkpoint-*"))

    lines = len((work / "progress.jsonl").read_text().splitlines())
    process = start(folder, "run", "p.yaml", stage, "--store", store, "--set", then, toys=False)
    seen: list[str] = []
    while process.poll() is None:
        if (work / "progress.jsonl").exists():
            seen = (work / "progress.jsonl").read_text().splitlines()[lines:] or seen
        time.sleep(0.005)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    steps = [line["step"] for line in map(json.loads, seen) if "loss" in line]
    assert steps and steps[0] > saved, "it goes on where the checkpoint is"
    found = apart(folder, store, stage)
    assert {name: far for name, far in found.items() if far > 1e-3} == {}
    record = json.loads((folder / store / "ranks" / stage / "artifact.json").read_text())
    assert record["how"]["changed_between_resumes"]
