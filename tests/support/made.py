"""A pipeline whose stages are published by hand: real keys, a real store, and in it whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align_pipeline.pipeline import store as stores
from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.manifest import Manifest
from align_pipeline.pipeline.plan import Planner
from align_pipeline.pipeline.store import Artifact, Store
from align_pipeline.stages import reward

PIPELINE = """\
name: clerk
model: file:base
lora: {r: 4}
stages:
  sft:
    type: sft
    data: file:rows.jsonl
  reward:
    type: reward
    model: stage:sft
    data: file:rows.jsonl
    require: {accuracy: "> 0.6"}
  ppo:
    type: ppo
    policy: stage:sft
    reward: stage:reward
    prompts: file:rows.jsonl
  evaluate:
    type: evaluate
    models: {sft: stage:sft, ppo: stage:ppo}
    baseline: sft
    scorer: stage:reward
    prompts: file:rows.jsonl
"""
HOSTILE = (
    "<script>window.ran=1</script></script>\"><img src=x onerror=ran=1>' style=x {{7*7}} {% x %} "
    "\u202egnp.exe \u2066 שלום 👩‍🚀 \x00\x07\ud800 &amp; <!-- --> ]]>"
)
SCORES = [(2.0, -1.0), (0.4, 0.1), (-0.5, 0.2), (1.0, 1.0), (3.0, -3.0)]
ROWS = {
    "task": "preference", "rows": 40, "bad": 2,
    "causes": {"chosen: equals rejected": {"rows": 2, "first": ["rows.jsonl:41: chosen: equals rejected"]}},
    "sources": [{"name": "rows.jsonl", "format": "pairs", "rows": 40, "bad": 2, "weight": 1.0, "trained_on": 36}],
    "lengths": {"unit": "tokens", "total": 900, "mean": 22.5, "min": 3, "p5": 4, "p50": 21, "p95": 51, "max": 60},
    "duplicates": {"rows": 0, "first": []}, "longer_chosen": 0.71,
    "notes": ["the longer answer is chosen in 71% of the pairs; a model may learn length instead of quality"],
}  # fmt: skip
USED = {
    "seconds": 75.0, "cpu_seconds": 70.5, "device_seconds": 36.0, "peak_memory_bytes": 612_000_000,
    "peak_device_memory_bytes": 2_500_000_000, "attempts": 1, "tokens": 9000, "tokens_per_second": 120.0,
}  # fmt: skip


class Made:
    """The pipeline, its store, and what was published so far."""

    def __init__(self, folder: Path, text: str = PIPELINE) -> None:
        self.file = folder / "p.yaml"
        self.file.write_text(text)
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        (folder / "rows.jsonl").write_text('{"prompt": "q"}\n')
        self.store = Store(folder / "runs")
        self.store.open()
        self.done: dict[str, Artifact] = {}

    def planner(self) -> Planner:
        pipeline = load(self.file)
        return Planner(pipeline, self.store, Manifest(self.store, pipeline.name, self.file))

    def publish(
        self,
        name: str,
        metrics: Mapping[str, float],
        files: Mapping[str, Sequence[Any] | Mapping[str, Any]] | None = None,
        data: Mapping[str, Any] | None = None,
        log: Sequence[Mapping[str, Any]] = (),
        **record: Any,
    ) -> Artifact:
        """Publish a stage as its worker and the runner would: lists become JSON lines, mappings JSON files."""
        planner = self.planner()
        step = planner.step(name, self.done)
        assert step.key and step.inputs is not None
        work = self.store.work_path(step.key)
        (work / "out").mkdir(parents=True)
        for file, held in (files or {}).items():
            text = json.dumps(held) if isinstance(held, Mapping) else "".join(json.dumps(row) + "\n" for row in held)
            (work / "out" / file).write_text(text)
        if log:
            write_log(work, log)
        inputs = {
            field: {"ref": one.ref, "digest": one.digest, "base": None, "artifact": one.artifact}
            for field, one in step.inputs.items()
        }
        made = {"at": "2026-01-02T03:04:05Z", "host": "secret-host", "command": "align run", "git": None, "gpu": None}
        self.done[name] = self.store.publish(
            step.key,
            {
                "stage": step.stage.type,
                "version": step.stage.version,
                "kind": step.stage.produces,
                "model": None,
                "config": stores.configuration(step.stage),
                "how": {"changed_between_resumes": False},
                "inputs": inputs,
                "data": data or {},
                "metrics": metrics,
                "resources": USED,
                "made": {**made, "align": "0.1.0", "torch": "2.13.0"},
                **record,
            },
        )
        planner.manifest.done(name, self.done[name], planner.judge(name, self.done))
        planner.manifest.save(list(planner.pipeline.stages))
        return self.done[name]


def write_log(work: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write what a worker would log, a second a line."""
    used = {"pid": 1, "cpu_seconds": 1.0, "peak_memory_bytes": 10**8, "step": 0, "total": 0}
    work.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**used, "at": float(at), **line}) + "\n" for at, line in enumerate(lines))
    (work / "progress.jsonl").write_text(text)


def evaluation(rewards: Mapping[str, Sequence[float]], kl: Mapping[str, float], baseline: str) -> dict[str, Any]:
    """Return the metrics and the files of an evaluation whose models got these rewards, one answer a prompt."""
    count = len(rewards[baseline])
    metrics: dict[str, float] = {}
    for name, given in rewards.items():
        mean = sum(given) / count
        metrics |= {f"{name}/reward": mean, f"{name}/reward_low": mean - 0.1, f"{name}/reward_high": mean + 0.1}
        metrics |= {f"{name}/length": 7.0, f"{name}/eos_rate": 1.0}
        if name != baseline:
            wins = [(a > b) + (a == b) / 2 for a, b in zip(given, rewards[baseline], strict=True)]
            rate = sum(wins) / count
            metrics |= {f"{name}/win_rate": rate, f"{name}/win_rate_low": rate - 0.05}
            metrics |= {f"{name}/win_rate_high": min(1.0, rate + 0.05), f"{name}/kl": kl[name]}
    report = {
        "baseline": baseline, "models": list(rewards), "prompts": count, "samples_per_prompt": 1,
        "max_new_tokens": 16, "temperature": 1.0, "checks": [], "labelled": {}, "metrics": metrics,
    }  # fmt: skip
    samples = [
        {
            "prompt": f"question {i}",
            "prompt_ids": [1],
            "answers": {
                name: [{"text": f"{name} says {i}", "ids": [2], "finish": "stop", "scores": {"reward": given[i]}}]
                for name, given in rewards.items()
            },
        }
        for i in range(count)
    ]
    return {"metrics": metrics, "files": {"report.json": report, "samples.jsonl": samples}}


def curve(steps: int, **values: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / step, "grad_norm": 0.5, **values} for step in range(1, steps + 1)]


def all_done(made: Made, text: str = "", rewards: dict | None = None) -> None:
    """Publish all four stages; `text` is put wherever a user's or a file's text may stand."""
    plain = text.replace("\ud800", "")  # a record is UTF-8, so it cannot hold one
    rows = json.loads(json.dumps(ROWS).replace("rows.jsonl", json.dumps(plain)[1:-1] or "rows.jsonl"))
    noted = [{"warning": text or "half of the answers are empty"}, {"step": 1, "total": 2, "loss": 2.0}]
    made.publish("sft", {"train_loss": 0.25}, {"curve.jsonl": curve(3)}, log=noted)
    metrics = reward.judge(SCORES)
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in SCORES]
    made.publish(
        "reward", {**metrics, "accuracy": 0.7, "n": 400.0}, {"held_out_scores.jsonl": pairs}, data={"data": rows}
    )
    way = [{"step": step, "kl": step / 4, "score": 0.1 * step} for step in range(3)]
    made.publish("ppo", {"score": 0.2}, {"curve.jsonl": way})
    rewards = rewards or {"sft": [0.0, 1.0, 0.5, 0.2], "ppo": [1.0, 0.5, 1.5, 1.2]}
    found = evaluation(rewards, {"ppo": 0.75}, "sft")
    if text:
        for row in found["files"]["samples.jsonl"]:
            row["prompt"] = [{"role": text, "content": text}]
            row["answers"]["ppo"][0]["text"] = text + "x" * 1_000_000
    made.publish("evaluate", **found)
