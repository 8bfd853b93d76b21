"""The embedded default, from nothing to an aligned model, as `make demo` runs it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import align

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NEEDED = {
    "dpo/win_rate", "dpo/win_rate_low", "dpo/success", "sft/success", "dpo/reward", "sft/reward", "dpo/kl",
    "dpo/perplexity", "sft/perplexity", "ppo/win_rate", "ppo/win_rate_low", "ppo/success", "ppo/reward", "ppo/kl",
    "ppo/perplexity",
}  # fmt: skip


def test_make_demo_runs_these_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "python -m align_pipeline.data.shop configs/shop\n\t$(BIN)/align run configs/quickstart.yaml" in makefile


def test_the_demo_aligns_a_model(tmp_path: Path):
    (tmp_path / "quickstart.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    subprocess.run([sys.executable, "-m", "align_pipeline.data.shop", str(tmp_path / "shop")], check=True)
    printed = align(tmp_path, "run", "quickstart.yaml")

    manifest = json.loads((tmp_path / "runs/quickstart/manifest.json").read_text())
    assert {entry["status"] for entry in manifest["stages"].values()} == {"done"}
    metrics = manifest["stages"]["evaluate"]["metrics"]
    assert set(metrics) >= NEEDED
    print(json.dumps(metrics, indent=1))
    assert 0.2 <= metrics["sft/success"] <= 0.75, "no strawman"
    for name in ("dpo", "ppo"):
        gained = metrics[f"{name}/success_gain"] >= 0.25 and metrics[f"{name}/success_gain_low"] > 0
        won = metrics[f"{name}/win_rate"] >= 0.80 and metrics[f"{name}/win_rate_low"] > 0.5
        assert gained or won
        assert metrics[f"{name}/success_gain"] >= 0.15, "it is better by the truth too, not by its reward model alone"
        assert metrics[f"{name}/perplexity"] <= 1.10 * metrics["sft/perplexity"]
    seconds = sum(entry["seconds"] for entry in manifest["stages"].values())
    print(f"{seconds:.0f} s in all stages")
    assert len(re.findall(r"^- (sft|dpo|ppo) \(", printed, flags=re.M)) >= 8, "a person sees samples before and after"
    for name in manifest["stages"]:
        record = json.loads((tmp_path / "runs/quickstart" / name / "artifact.json").read_text())
        assert record["resources"]["peak_memory_bytes"] < 4e9

    began = os.times()
    wall = time.perf_counter()
    again = align(tmp_path, "run", "quickstart.yaml")
    ended = os.times()
    assert again.count("  cached  ") == len(manifest["stages"])
    cpu = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert min(cpu, time.perf_counter() - wall) < 1.5, "a run of nothing takes no time, and does not import torch"

    change = ("quickstart.yaml", "--set", "stages.dpo.beta=0.3")
    planned = dict(line.split()[:2] for line in align(tmp_path, "plan", *change).splitlines())
    assert planned == dict.fromkeys(manifest["stages"], "cached") | {"dpo": "run", "evaluate": "waits"}
    align(tmp_path, "run", *change)
    after = json.loads((tmp_path / "runs/quickstart/manifest.json").read_text())["stages"]
    changed = {name for name in after if after[name]["artifact"] != manifest["stages"][name]["artifact"]}
    assert changed == {"dpo", "evaluate"}


def test_no_file_of_an_artifact_names_its_machine(tmp_path: Path):
    """A short chain of real stages: published files hold no absolute path, no time and no host, in any store."""
    from tiny import write_tiny_model

    rows = [{"prompt": f"What is {a} and {b}?", "completion": f" {a + b}"} for a in range(9) for b in range(9)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    write_tiny_model(tmp_path / "model", [json.dumps(row) for row in rows], vocab_size=300, positions=64)
    (tmp_path / "p.yaml").write_text(
        "name: chain\nmodel: file:model\nlora: {r: 4}\nstages:\n"
        "  sft: {type: sft, data: file:sft.jsonl, batch_size: 16, max_steps: 3}\n"
        "  reward: {type: reward, model: stage:sft, data: file:pairs.jsonl, batch_size: 16, max_steps: 3}\n"
        "  dpo: {type: dpo, policy: stage:sft, data: file:pairs.jsonl, batch_size: 16, max_steps: 3}\n"
        "  merged: {type: merge, model: stage:dpo}\n"
    )
    digests = []
    for store in ("one", "two"):
        align(tmp_path, "run", "p.yaml", "--store", store)
        stages = json.loads((tmp_path / store / "chain" / "manifest.json").read_text())["stages"]
        digests.append({name: entry["digest"] for name, entry in stages.items()})
        for path in (tmp_path / store / "store").rglob("*"):
            if path.is_file() and path.name != "artifact.json":
                assert str(tmp_path).encode() not in path.read_bytes(), path
                assert os.uname().nodename.encode() not in path.read_bytes() or len(os.uname().nodename) < 6, path
    assert digests[0] == digests[1]
