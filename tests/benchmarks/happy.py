"""Happy stories as one pipeline: gold, KL and reward of a real 260K-parameter model, its SFT, DPO and PPO.

    python tests/benchmarks/happy.py FOLDER --data DIR

DIR holds `models/stories260K` and `tinystories/`. Writes prompts, a scorer and `happy.yaml` into FOLDER, runs
`align run happy.yaml` there, and prints the table of README.md. Run again, it goes on, and what is done costs nothing.

The goal is continuations that VADER calls positive (gold). SFT learns the happiest of four stories to each opening; the
pairs are SFT's own stories, ordered by gold; DPO learns from them, PPO from a reward model that did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stories import NEW_TOKENS, openings

SCORER = '''\
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def gold(completions, **columns):
    """Return VADER's compound of each story, from -1 to 1."""
    return [analyzer.polarity_scores(text)["compound"] for text in completions]
'''
PIPELINE = """\
name: happy-stories
model: file:{base}
tuning: full
stages:
  happiest:
    type: sample
    policy: file:{base}
    prompts: file:train.jsonl
    scorer: sentiment:gold
    write: best
    max_new_tokens: {tokens}
  sft:
    type: sft
    data: stage:happiest
    learning_rate: 3e-4
    batch_size: 16
    held_out: 0
  pairs:
    type: sample
    policy: stage:sft
    prompts: file:train.jsonl
    scorer: sentiment:gold
    min_gap: 0.02
    max_new_tokens: {tokens}
    seed: 1
  reward:
    type: reward
    model: stage:sft
    data: stage:pairs
    learning_rate: 1e-3
    epochs: 2
    batch_size: 16
  dpo:
    type: dpo
    policy: stage:sft
    data: stage:pairs
    beta: 0.2
    learning_rate: 3e-4
    batch_size: 16
    held_out: 0
  ppo:
    type: ppo
    policy: stage:sft
    reward: stage:reward
    prompts: file:train.jsonl
    learning_rate: 3e-4
    episodes: 2432
    max_new_tokens: {tokens}
    missing_eos_penalty: 0  # these stories have no end of their own
  evaluate:
    type: evaluate
    models: {{base: "file:{base}", sft: stage:sft, dpo: stage:dpo, ppo: stage:ppo}}
    baseline: base
    scorer: stage:reward
    checks: {{gold: "sentiment:gold"}}
    prompts: file:heldout.jsonl
    max_new_tokens: {tokens}
    samples_per_prompt: 2
    how: {{speed: auto}}
"""
COLUMNS = ("gold", "reward", "kl", "distinct_2")


def write(folder: Path, data: Path) -> None:
    """Write the pipeline and what it reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("train", "heldout"), openings(data), strict=True):
        rows = "".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    (folder / "sentiment.py").write_text(SCORER, encoding="utf-8")
    pipeline = PIPELINE.format(base=(data / "models" / "stories260K").absolute(), tokens=NEW_TOKENS)
    (folder / "happy.yaml").write_text(pipeline, encoding="utf-8")


def table(folder: Path) -> list[str]:
    """Return a row for each model of the evaluation."""
    record = json.loads((folder / "runs" / "happy-stories" / "evaluate" / "artifact.json").read_text("utf-8"))
    metrics = record["metrics"]
    lines = ["| | " + " | ".join(COLUMNS).replace("_", "-") + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for model in ("base", "sft", "dpo", "ppo"):
        cells = [_cell(metrics, f"{model}/{name}") for name in COLUMNS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "0"  # the KL of the base to itself
    return f"{metrics[name]:.3f} [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--data", type=Path, required=True, help="folder with models/stories260K and tinystories/")
    given = parser.parse_args(arguments)
    write(given.folder, given.data)
    command = [sys.executable, "-m", "align_pipeline.pipeline.cli", "run", "happy.yaml"]
    subprocess.run(command, cwd=given.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    print("\n".join(table(given.folder)))


if __name__ == "__main__":
    main()
