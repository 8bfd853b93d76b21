"""Feedback as a stage: what it makes feeds dpo and reward with pairs and kto with unpaired rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.load import read
from align_pipeline.pipeline.errors import ConfigError, InputError
from align_pipeline.stages.feedback import Feedback
from align_pipeline.stages.kto import KTO
from align_pipeline.stages.sft import SFT
from harness import align
from thumbs import rating
from tiny import write_tiny_model

PIPELINE = """
name: thumbs
model: file:base
lora: {r: 4, alpha: 8}
stages:
  feedback: {type: feedback, logs: {web: file:logs/web.jsonl, app: file:logs/app.json}, test: 0.2}
  dpo: {type: dpo, policy: file:base, data: stage:feedback, weight_column: fb_weight, max_steps: 2, batch_size: 4}
  reward: {type: reward, data: stage:feedback, max_steps: 2, batch_size: 4}
  kto: {type: kto, policy: file:base, data: stage:feedback, max_steps: 2, batch_size: 4, kl_batch: 4}
"""


def logs(folder: Path) -> None:
    """Write the logs of two products: pairs of thumbs in one, single thumbs and comparisons in the other."""
    words = ["where", "is", "milk", "left", "shelf", "right", "bread", "no", "idea", "when", "open", "today"]
    asked = [f"{a} {b} {c}" for a in words for b in words for c in words[:3]]
    web = [rating(1, f"yes {q}", f"u{i % 40}", f"{q} {i}", model="old") for i, q in enumerate(asked[:120])]
    web += [rating(-1, f"no {q}", f"v{i % 40}", f"{q} {i}", model="new") for i, q in enumerate(asked[:60])]
    app = [
        {
            "event_type": "comparison",
            "prompt": f"{q} please {i}",
            "alternatives": [{"response": f"good {q}"}, {"response": f"poor {q}"}],
            "winner": 0,
            "user_id": f"w{i}",
        }
        for i, q in enumerate(asked[:40])
    ]
    app += [rating(-1, f"bad {q}", f"x{i}", f"{i} {q} {q}") for i, q in enumerate(asked[:50])]
    (folder / "logs").mkdir()
    (folder / "logs" / "web.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in web), "utf-8")
    (folder / "logs" / "app.json").write_text(json.dumps(app), "utf-8")


def test_thumbs_reach_dpo_reward_and_kto(tmp_path: Path) -> None:
    logs(tmp_path)
    texts = (tmp_path / "logs" / "web.jsonl").read_text("utf-8").splitlines()
    write_tiny_model(tmp_path / "base", texts, vocab_size=400)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    said = align(tmp_path, "run", "pipeline.yaml")
    made = tmp_path / "runs" / "thumbs"
    record = {
        name: json.loads((made / name / "artifact.json").read_text("utf-8"))
        for name in ("feedback", "dpo", "reward", "kto")
    }
    rows = {name.replace("_", "."): int(count) for name, count in record["feedback"]["metrics"].items() if "_t" in name}
    assert rows["pairs.train"] + rows["pairs.test"] == 60 + 40
    assert rows["unpaired.train"] + rows["unpaired.test"] == 60 + 50
    for name, kind in (("dpo", "pairs"), ("reward", "pairs"), ("kto", "unpaired")):
        metrics = record[name]["metrics"]
        assert (metrics["rows"], metrics["held_out_rows"]) == (rows[f"{kind}.train"], rows[f"{kind}.test"]), name
        assert record[name]["inputs"]["data"]["digest"] == record["feedback"]["digest"]
        assert record[name]["data"]["data"]["sources"][1]["name"].endswith("(test)")
    assert "logs/app.json read as events" in said
    forgotten = align(tmp_path, "forget", "u1")
    assert all(f"thumbs: stage {name}" in forgotten for name in ("dpo", "reward", "kto"))
    planned = {line.split()[0]: line.split()[1] for line in align(tmp_path, "plan", "pipeline.yaml").splitlines()}
    assert planned == {"feedback": "cached", "dpo": "run", "reward": "run", "kto": "run"}


COMPLETED = """
name: completed
model: file:base
lora: {r: 4, alpha: 8}
stages:
  reward: {type: reward, data: file:pairs.jsonl, max_steps: 2, batch_size: 4}
  feedback:
    type: feedback
    logs: file:logs/app.json
    test: 0.2
    complete: {policy: file:base, reward: stage:reward, samples: 4, min_gap: 0, max_new_tokens: 64}
  dpo: {type: dpo, policy: file:base, data: stage:feedback, weight_column: fb_weight, max_steps: 2, batch_size: 4}
"""


def test_dislikes_that_a_policy_and_a_reward_model_of_the_pipeline_complete_reach_dpo(tmp_path: Path) -> None:
    logs(tmp_path)
    events = json.loads((tmp_path / "logs" / "app.json").read_text("utf-8"))
    write_tiny_model(tmp_path / "base", [event["prompt"] for event in events], vocab_size=300)
    pairs = [{"prompt": f"q {i}: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in pairs), "utf-8")
    (tmp_path / "pipeline.yaml").write_text(COMPLETED, "utf-8")
    align(tmp_path, "run", "pipeline.yaml")
    made = tmp_path / "runs" / "completed"
    record = {name: json.loads((made / name / "artifact.json").read_text("utf-8")) for name in ("feedback", "dpo")}
    metrics = record["feedback"]["metrics"]
    assert metrics["completed"] > 0
    assert metrics["pairs_train"] + metrics["pairs_test"] == 40 + metrics["completed"]
    assert metrics["unpaired_train"] + metrics["unpaired_test"] == 50
    assert record["dpo"]["metrics"]["rows"] == metrics["pairs_train"]
    reward = json.loads((made / "reward" / "artifact.json").read_text("utf-8"))
    assert set(record["feedback"]["inputs"]) == {"logs", "complete.policy", "complete.reward"}
    assert record["feedback"]["inputs"]["complete.reward"]["digest"] == reward["digest"]
    assert record["feedback"]["config"]["complete"]["samples"] == 4
    assert "policy" not in record["feedback"]["config"]["complete"]

    def planned(text: str) -> str:
        (tmp_path / "pipeline.yaml").write_text(text, "utf-8")
        return align(tmp_path, "plan", "pipeline.yaml")

    assert "config: complete.samples 4 -> 5" in planned(COMPLETED.replace("samples: 4", "samples: 5"))
    assert planned(COMPLETED.replace("test: 0.2", "test: 0.2\n    how: {micro_batch: 3}")).count("cached") == 3

    planned(COMPLETED)
    row = next(
        json.loads(line) for line in (made / "feedback" / "pairs.train.jsonl").read_text("utf-8").splitlines()[::-1]
    )
    assert row["fb_source"] == "completed"
    user = next(event["user_id"] for event in events if event.get("response") == row["rejected"][0]["content"])
    assert "completed: stage dpo" in align(tmp_path, "forget", user)
    left = (made / "feedback" / "pairs.train.jsonl").read_text("utf-8")
    assert row["fb_row_id"] not in left and len(left.splitlines()) < metrics["pairs_train"]


def test_what_feedback_did_not_give_is_said(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    row = {"prompt": "q", "completion": "a", "label": True, "fb_users": 1}
    (tmp_path / "made" / "unpaired.train.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    assert len(read(tmp_path / "made", "unpaired")) == 1 and len(read(tmp_path / "made", "prompt")) == 1
    with pytest.raises(InputError, match="made: rows made of feedback, which hold no pairs; report.md"):
        read(tmp_path / "made", "preference")
    with pytest.raises(InputError, match="which hold nothing for task sft"):
        read(tmp_path / "made", "sft")


def test_a_stage_that_reads_neither_is_refused_before_anything_runs() -> None:
    feedback = Feedback(logs="file:logs")
    sft: Any = SFT(model="file:base", data="stage:feedback")
    assert "none for this stage" in (sft.misfit("data", feedback) or "")
    kto = KTO(policy="file:base", data="stage:feedback")
    assert kto.misfit("data", feedback) is None


def test_settings_are_checked_as_in_every_stage(tmp_path: Path) -> None:
    from align_pipeline.pipeline.config import load

    (tmp_path / "logs").mkdir()
    (tmp_path / "p.yaml").write_text(
        "name: a\nstages:\n  feedback:\n    type: feedback\n    logs: file:logs\n    min_confidense: 0.8\n"
        "    test: 1.5\n    format: openwebiu\n",
        "utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "p.yaml")
    said = str(caught.value)
    assert "p.yaml:6: stages.feedback.min_confidense: unknown field; did you mean min_confidence?" in said
    assert "p.yaml:7: stages.feedback.test: must be less than 1, got 1.5" in said
    assert "p.yaml:8: stages.feedback.format: must be 'events', 'openwebui'" in said
