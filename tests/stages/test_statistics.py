"""Shares and what can be said of them, against other ways to the same numbers."""

from __future__ import annotations

import random
from statistics import NormalDist

import pytest

from align_pipeline.stages.statistics import wilson


@pytest.mark.parametrize(("share", "count"), [(0.5, 40), (0.8211, 95), (1.0, 4), (0.0, 7), (0.03, 200), (0.62, 4000)])
def test_wilson_is_where_the_score_test_turns(share: float, count: int) -> None:
    """Its bounds are the shares that a test of 95 % just does not reject: found by bisection, not by the formula."""
    z = NormalDist().inv_cdf(0.975)

    def turning(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            held = abs(share - middle) <= z * (middle * (1 - middle) / count) ** 0.5
            inside, outside = (middle, outside) if held else (inside, middle)
        return inside

    assert wilson(share, count) == pytest.approx((turning(share, 0.0), turning(share, 1.0)), abs=1e-9)


def test_wilson_covers_small_samples() -> None:
    """12 trials of a share of 0.8, 4,000 times: the interval holds the truth in at least 93 %, at most 99 %."""
    draw = random.Random(0)
    held = 0
    for _ in range(4000):
        low, high = wilson(sum(draw.random() < 0.8 for _ in range(12)) / 12, 12)
        held += low <= 0.8 <= high
    assert 0.93 <= held / 4000 <= 0.99


def test_no_trials_say_nothing() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)
