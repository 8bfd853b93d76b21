"""How sure it is, from votes, which of two answers is better."""

from __future__ import annotations

import functools
import math

MARGIN_MAX = 3.0


@functools.lru_cache(100_000)
def thumbs(up_1: int, down_1: int, up_2: int, down_2: int) -> float:
    """Return P(X > Y) for X ~ Beta(1 + up_1, 1 + down_1) and Y ~ Beta(1 + up_2, 1 + down_2).

    The shares of people who like each answer, from uniform priors. The sum is exact for whole numbers:
    sum over i < 1 + up_1 of B(a_2 + i, b_1 + b_2) / ((b_1 + i) B(1 + i, b_1) B(a_2, b_2)) (Evan Miller, "Formulas for
    Bayesian A/B testing", equation 6).
    """
    a_1, b_1, a_2, b_2 = 1 + up_1, 1 + down_1, 1 + up_2, 1 + down_2
    total = sum(
        math.exp(_log_beta(a_2 + i, b_1 + b_2) - math.log(b_1 + i) - _log_beta(1 + i, b_1) - _log_beta(a_2, b_2))
        for i in range(a_1)
    )
    return min(max(total, 0.0), 1.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def comparisons(wins: int, losses: int) -> float:
    """Return the posterior mean of the share of people who prefer the first answer, from a uniform prior."""
    return (1 + wins) / (2 + wins + losses)


def margin(p: float) -> float:
    """Return the log-odds of a confidence, at most 3: what a Bradley-Terry model would have scores differ by."""
    return min(MARGIN_MAX, math.log(p / (1 - p))) if p < 1 else MARGIN_MAX


def weight(p: float) -> float:
    """Return 2p - 1: 0 for a coin toss, 1 for certainty; how much more often the order is right than wrong."""
    return 2 * p - 1
