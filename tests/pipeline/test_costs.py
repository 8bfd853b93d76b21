"""What models cost: sums and maxima counted by hand over artifacts that were made from each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align_pipeline.pipeline.costs import Cost, behind, behind_models, costs_and_speeds, together
from align_pipeline.pipeline.progress import read_progress
from align_pipeline.pipeline.store import Artifact, Store


def made(store: Store, key: str, inputs: dict[str, Artifact | None], resources: dict) -> Artifact:
    """Publish an artifact; an input that is None lies outside of the store."""
    out = store.work_path(key) / "out"
    out.mkdir(parents=True)
    (out / "w.txt").write_text(key)
    sources = {
        name: {"artifact": one.key if one else None, "digest": one.digest if one else "sha256:0"}
        for name, one in inputs.items()
    }
    record = {"kind": "report" if key.startswith("evaluate") else "model", "metrics": {}, "inputs": sources}
    record["resources"] = {"seconds": 1.0, **resources}
    return store.publish(key, record)


def used(seconds: float, cpu: float, device: float, memory: float, device_memory: float | None) -> dict:
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "device_seconds": device,
        "peak_memory_bytes": memory,
        "peak_device_memory_bytes": device_memory,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    store.open()
    return store


@pytest.fixture
def evaluation(store: Store) -> Artifact:
    """SFT; a reward model and DPO of it; PPO of both; and an evaluation of a model of elsewhere, SFT, DPO and PPO."""
    sft = made(store, "sft-1", {"data": None}, used(60, 100, 60, 2e9, 8e9))
    reward = made(store, "reward-1", {"model": sft}, used(30, 40, 30, 3e9, 6e9))
    dpo = made(store, "dpo-1", {"policy": sft, "data": None}, used(3600, 3700, 3600, 2e9, 20e9))
    ppo = made(store, "ppo-1", {"policy": sft, "reward": reward}, used(7200, 9000, 14_400, 5e9, 7e9))
    models = {"models.base": None, "models.sft": sft, "models.dpo": dpo, "models.ppo": ppo, "scorer": reward}
    return made(store, "evaluate-1", models, used(10, 20, 10, 1e9, None))


def test_every_stage_behind_a_model_counts_once(store: Store, evaluation: Artifact) -> None:
    models = behind_models(store, evaluation)
    assert {name: [cost.name for cost in costs] for name, costs in models.items()} == {
        "base": [],
        "sft": ["sft-1"],
        "dpo": ["sft-1", "dpo-1"],
        "ppo": ["sft-1", "reward-1", "ppo-1"],
    }
    assert together(models["dpo"]) == Cost("2 stages", 3660, 3660, 3800, 2e9, 20e9)
    assert together(models["ppo"]) == Cost("3 stages", 7290, 14_490, 9140, 5e9, 8e9)
    assert [cost.name for cost in behind(store, evaluation)] == ["sft-1", "dpo-1", "reward-1", "ppo-1", "evaluate-1"]


def test_people_see_stages_and_sums(store: Store, evaluation: Artifact) -> None:
    lines = costs_and_speeds(store, evaluation)
    assert "| sft-1 | sft, dpo, ppo | 1 min 00 s | 0.0278 | 0.0167 | 2.00 GB | 8.00 GB |" in lines
    assert "| reward-1 | ppo | 30 s | 0.0111 | 0.00833 | 3.00 GB | 6.00 GB |" in lines
    assert "| 3 stages | ppo | 2 h 01 min | 2.54 | 4.03 | 5.00 GB | 8.00 GB |" in lines
    assert not [line for line in lines if "base" in line or "Speed" in line]
    asked = "Speed was not measured when evaluate-1 was made; `align run p.yaml --force evaluate` measures it."
    assert asked in costs_and_speeds(store, evaluation, "align run p.yaml --force evaluate")


def test_an_evaluation_of_models_from_elsewhere_has_no_table(store: Store) -> None:
    assert costs_and_speeds(store, made(store, "evaluate-2", {"models.a": None}, used(1, 1, 0, 1e9, None))) == []


def test_what_is_gone_is_named_and_not_counted(store: Store, evaluation: Artifact) -> None:
    shutil.rmtree(store.artifact_path("reward-1"))
    lines = costs_and_speeds(store, evaluation)
    assert "No longer in this store, and not counted: reward-1." in lines
    assert "| 2 stages | ppo | 2 h 01 min | 2.53 | 4.02 | 5.00 GB | 8.00 GB |" in lines


def test_a_damaged_ancestor_spoils_its_table_and_not_the_run(store: Store, evaluation: Artifact) -> None:
    (store.artifact_path("sft-1") / "w.txt").write_text("shorter and longer")
    (line, _) = costs_and_speeds(store, evaluation)
    assert line.startswith("What the models cost cannot be told: ") and "the artifact is damaged" in line


def test_speeds_are_shown_as_they_were_measured(store: Store) -> None:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value * 0.9, "high": value * 1.1}

    seconds = {"p50": figure(0.02), "p95": figure(0.03)}
    measured = {
        "first_token_seconds": seconds,
        "answer_seconds": seconds,
        "tokens_per_second": figure(1234.5),
        "requests_per_second": figure(38.6),
    }
    about = {"engine": "vllm", "device": "NVIDIA H100", "dtype": "bfloat16", "prompt_tokens": 13.5, "new_tokens": 32}
    speed = {**about, "repeats": 100, "models": {"sft": {"1": measured}}}
    evaluation = made(store, "evaluate-3", {"models.a": None}, {**used(1, 1, 0, 1e9, None), "speed": speed})
    lines = costs_and_speeds(store, evaluation, "align run p.yaml --force evaluate")
    assert "| sft | 1 | 20 [18, 22] | 30 [27, 33] | 1,234 [1,111, 1,358] | 38.6 [34.7, 42.5] |" in lines
    assert lines[2].startswith("vllm on NVIDIA H100, bfloat16: prompts of 13.5 tokens, answers of 32; medians of 100")


RANKS = """
import os, subprocess, sys
program = '''
import json, sys, time
from pathlib import Path
from align_pipeline.pipeline.stage import Work, usage
work, held = Work(Path(sys.argv[1])), bytearray(int(sys.argv[2]) * 2**20)
work.log(step=1, total=2)
while time.process_time() < float(sys.argv[3]):
    pass
before = usage()
work.log(step=2, total=2)
print(json.dumps(before))
'''
for rank in range(int(sys.argv[2])):
    size, seconds = (("40", "0.3"), ("120", "0.5"))[rank]
    environment = {**os.environ, **({"RANK": str(rank)} if sys.argv[2] != "1" else {})}
    subprocess.run([sys.executable, "-c", program, sys.argv[1], size, seconds], env=environment, check=True)
"""


def test_every_process_of_a_stage_counts(tmp_path: Path) -> None:
    """Two processes that were stopped, then one that went on: seconds add up, memory where it was held at once."""
    said: list[list[dict[str, float]]] = []
    for ranks in ("2", "1"):
        command = [sys.executable, "-c", RANKS, str(tmp_path), ranks]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        said.append([json.loads(line) for line in done.stdout.splitlines()])
    summary = read_progress(tmp_path)
    seconds = sum(one["cpu_seconds"] for attempt in said for one in attempt)
    assert summary.cpu_seconds == pytest.approx(seconds, abs=0.1) and seconds >= 0.3 + 0.5 + 0.3
    together = sum(one["peak_memory_bytes"] for one in said[0])
    assert summary.peak_memory_bytes == pytest.approx(together, rel=0.02) and together > 160 * 2**20
    assert (summary.attempts, summary.step, summary.total) == (2, 2, 2)
