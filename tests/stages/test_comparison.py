"""Verdicts on two models: what is said, and whether what cannot be seen is what a simulation does not see."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from align_pipeline.stages.comparison import gap, shown, verdict
from align_pipeline.stages.statistics import bootstrap, detectable


def test_the_verdict_names_the_winner_and_its_interval() -> None:
    wins = [1.0] * 488 + [0.0] * 312
    limit = "at that size differences under 5.0% cannot be seen"  # (1.96 + 0.84) / 2 / sqrt(800) = 0.0495
    assert verdict(wins, 0.576, 0.644) == f"B wins 61.0% [57.6%, 64.4%] of 800 prompts; {limit}."
    lost = [1 - win for win in wins]
    assert verdict(lost, 0.356, 0.424) == f"A wins 61.0% [57.6%, 64.4%] of 800 prompts; {limit}."
    even = [1.0] * 408 + [0.0] * 392
    assert verdict(even, 0.475, 0.545) == (
        f"No difference can be seen: B wins 51.0% [47.5%, 54.5%] of 800 prompts, and {limit}."
    )


def test_few_prompts_are_not_believed_though_the_bootstrap_is_sure() -> None:
    wins = [1.0] * 3
    assert bootstrap(3, 0)(wins) == (1.0, 1.0)
    assert verdict(wins, 1.0, 1.0).startswith("No difference can be seen: B wins 100.0% [100.0%, 100.0%] of 3 prompts")
    says = "No difference can be seen: B wins 100.0% [100.0%, 100.0%] of 7 prompts, and at that size none could be."
    assert verdict([1.0] * 7, 1.0, 1.0) == says
    assert verdict([1.0] * 8 + [0.0] * 2, 0.6, 1.0).startswith(
        "No difference can be seen: B wins 80.0% [60.0%, 100.0%]"
    )
    assert verdict([1.0] * 12, 1.0, 1.0).startswith("B wins 100.0%")


def test_scores_that_are_equal_everywhere_say_so() -> None:
    assert (
        verdict([0.5] * 7, 0.5, 0.5)
        == "No difference can be seen: the scores of A and B are equal on all of 7 prompts."
    )


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_the_detectable_difference_is_seen_four_times_out_of_five(ties: float) -> None:
    """Simulated: a win rate of 1/2 + d, and its 95 % bootstrap interval; 300 samples of 400 prompts."""
    draw = random.Random(2)
    prompts, samples = 400, 300
    null = [0.5 if draw.random() < ties else float(draw.random() < 0.5) for _ in range(20_000)]
    difference = detectable(null) * (len(null) / prompts) ** 0.5
    assert difference == pytest.approx(2.8016 * 0.5 * (1 - ties) ** 0.5 / prompts**0.5, rel=0.03)
    interval = bootstrap(prompts, 0, resamples=500)
    seen = {0.0: 0, difference: 0}
    for d in seen:
        for _ in range(samples):
            rate = 0.5 + d / (1 - ties)
            wins = [0.5 if draw.random() < ties else float(draw.random() < rate) for _ in range(prompts)]
            low, high = interval(wins)
            seen[d] += not verdict(wins, low, high).startswith("No difference")
    assert 0.72 <= seen[difference] / samples <= 0.88, "80 %, give or take three standard errors"
    assert seen[0.0] / samples <= 0.09, "5 % where there is none"


def test_the_pair_that_differs_most_is_shown_and_does_nothing_to_a_terminal() -> None:
    def answers(*scores: float) -> list[dict]:
        return [{"text": f"says {score}\n\x1b[31m", "scores": {"reward": score}} for score in scores]

    row = {"prompt": [{"role": "user", "content": "why?\r"}], "answers": {"A": answers(1, 5, 3), "B": answers(2, 1, 6)}}
    found = gap(row)
    assert (found.size, found.prompt) == (-4, "why?")
    assert found.answers == {"A": "says 5  [31m", "B": "says 1  [31m"}
    assert len(shown("x" * 1000)) == 300 and fmean(map(len, (shown("a b"), shown("a\tb")))) == 3
