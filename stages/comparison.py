"""Two models side by side, from what an `evaluate` stage left: the verdict, and the answers that differ most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_pipeline.stages.evaluate_report import first_table, judged, refusals, right_answers
from align_pipeline.stages.statistics import Z_95, detectable, even_error, win_rate

A, B = "A", "B"
"""The names of the two in the evaluation, whose baseline is A."""
EACH_WAY = 3
"""Prompts shown where B scores highest above A, and where lowest below it."""
LONGEST_SHOWN = 300


@dataclass(frozen=True)
class Gap:
    """One answer of each to the same prompt."""

    prompt: str
    answers: Mapping[str, str]
    scores: Mapping[str, float]

    @property
    def size(self) -> float:
        """How much higher B's answer scores."""
        return self.scores[B] - self.scores[A]


def compared(folder: Path) -> list[str]:
    """Return the lines that say what the evaluation in a folder found."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    wins = [win_rate(rewards(row, B), rewards(row, A)) for row in rows]
    metrics = report["metrics"]
    low, high = metrics[f"{B}/win_rate_low"], metrics[f"{B}/win_rate_high"]
    lines = [*first_table(report), "", verdict(wins, low, high)]
    if more := [*right_answers(report), *refusals(report), *judged(report)]:
        lines += ["", *more]
    gaps = [gap(row) for row in rows]
    for title, found in (
        ("B scores highest above A", sorted((one for one in gaps if one.size > 0), key=lambda one: -one.size)),
        ("A scores highest above B", sorted((one for one in gaps if one.size < 0), key=lambda one: one.size)),
    ):
        lines += ["", f"Where {title}:"] if found else []
        for one in found[:EACH_WAY]:
            lines += ["", f"  {one.prompt}"]
            lines += [f"  {name} ({one.scores[name]:.3g}): {one.answers[name]}" for name in (A, B)]
    return lines


def verdict(wins: Sequence[float], low: float, high: float) -> str:
    """Return one sentence: who wins, how surely, and what a sample of this size can show.

    `low` and `high` are the 95 % interval of B's win rate. A difference is seen when 1/2 lies outside of it and the
    rate is further from 1/2 than equal models get in 95 % of such samples: of very few prompts the bootstrap alone
    would be too sure.
    """
    if not any(win != 0.5 for win in wins):
        return f"No difference can be seen: the scores of A and B are equal on all of {len(wins):,} prompts."
    rate, smallest = sum(wins) / len(wins), detectable(wins)
    seen = smallest is not None and not low <= 0.5 <= high and abs(rate - 0.5) > Z_95 * even_error(wins)
    name, ends = (B, (rate, low, high)) if rate >= 0.5 else (A, (1 - rate, 1 - high, 1 - low))
    figures = f"{ends[0]:.1%} [{ends[1]:.1%}, {ends[2]:.1%}] of {len(wins):,} prompts"
    if smallest is None:
        return f"No difference can be seen: {name} wins {figures}, and at that size none could be."
    limit = f"at that size differences under {smallest:.1%} cannot be seen"
    if seen:
        return f"{name} wins {figures}; {limit}."
    return f"No difference can be seen: {name} wins {figures}, and {limit}."


def rewards(row: Mapping[str, Any], name: str) -> list[float]:
    """Return the scorer's numbers for one model's answers to a prompt."""
    return [answer["scores"]["reward"] for answer in row["answers"][name]]


def gap(row: Mapping[str, Any]) -> Gap:
    """Return the two answers, drawn with one seed, whose scores differ most on a prompt."""
    pairs = zip(row["answers"][A], row["answers"][B], strict=True)
    a, b = max(pairs, key=lambda pair: abs(pair[1]["scores"]["reward"] - pair[0]["scores"]["reward"]))
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    scores = {A: float(a["scores"]["reward"]), B: float(b["scores"]["reward"])}
    return Gap(shown(prompt), {A: shown(a["text"]), B: shown(b["text"])}, scores)


def shown(text: str) -> str:
    """Return text that stays on its line of a terminal and does nothing to it."""
    flat = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return flat if len(flat) <= LONGEST_SHOWN else flat[: LONGEST_SHOWN - 3] + "..."
