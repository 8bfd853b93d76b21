"""A chain of real stages from a hub model, offline: what people type, with a model that lies in the hub's cache."""

import json
import os
from pathlib import Path

import pytest

from harness import align
from tiny import write_tiny_model

COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"
PIPELINE = """\
name: chain
model: hub:org/tiny
lora: {r: 4}
stages:
  sft: {type: sft, data: file:sft.jsonl, batch_size: 16, epochs: 4, learning_rate: 5e-3}
  reward: {type: reward, model: stage:sft, data: file:pairs.jsonl, batch_size: 16, max_steps: 4}
  dpo: {type: dpo, policy: stage:sft, data: file:pairs.jsonl, batch_size: 16, max_steps: 4, learning_rate: 1e-3}
  kto: {type: kto, policy: stage:sft, data: file:thumbs.jsonl, batch_size: 16, max_steps: 4}
  merged: {type: merge, model: stage:dpo}
  evaluate:
    type: evaluate
    models: {sft: stage:sft, dpo: stage:dpo, kto: stage:kto, merged: stage:merged}
    baseline: sft
    scorer: stage:reward
    prompts: file:prompts.jsonl
    max_new_tokens: 8
"""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_chain_from_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sums = [(f"What is {a} and {b}?", f" {a + b}") for a in range(9) for b in range(9)]
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": q, "completion": a} for q, a in sums])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": " no"} for q, a in sums])
    write_jsonl(tmp_path / "thumbs.jsonl", [{"prompt": q, "completion": a, "label": True} for q, a in sums])
    with (tmp_path / "thumbs.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": q, "completion": " no", "label": False}) + "\n" for q, _ in sums)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": q} for q, _ in sums[:20]])
    cached = tmp_path / "hub" / "models--org--tiny"
    write_tiny_model(cached / "snapshots" / COMMIT, [q + a for q, a in sums], vocab_size=300, positions=64)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setitem(os.environ, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "p.yaml").write_text(PIPELINE)

    align(tmp_path, "run", "p.yaml")

    runs = tmp_path / "runs" / "chain"
    records = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/artifact.json")}
    base = f"hub:org/tiny@{COMMIT}"
    assert records["sft"]["model"] == {"base": base, "base_digest": f"git:{COMMIT}", "adapter": "adapter"}
    assert records["dpo"]["model"] == records["sft"]["model"], "one base, one adapter, all along the chain"
    assert records["dpo"]["inputs"]["policy"]["artifact"] == records["sft"]["key"]
    written = json.loads((runs / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/tiny", COMMIT)
    assert records["merged"]["model"]["adapter"] is None
    metrics = records["evaluate"]["metrics"]
    assert abs(metrics["dpo/kl"] - metrics["merged/kl"]) < 1e-4, "the merged weights are the adapter's"
    assert metrics["dpo/kl"] > 0 and metrics["dpo/reward"] == pytest.approx(metrics["merged/reward"], abs=1e-4)
    assert records["dpo"]["metrics"]["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert records["sft"]["metrics"]["train_loss"] < records["sft"]["metrics"]["first_loss"]
