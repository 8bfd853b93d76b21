"""What can be said of a share that was counted: its interval, and the difference that a sample can show."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054
"""The normal quantile at 0.975: two-sided 95 %."""


def wilson(share: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent trials (Wilson 1927).

    Unlike share +- z * error it holds for few trials and for shares of 0 and 1.
    """
    if count <= 0:
        return 0.0, 1.0
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


Z_80 = 0.8416212335729143
"""The normal quantile at 0.8: a test that sees what is there four times out of five."""


def even_error(wins: Sequence[float]) -> float:
    """Return the standard error that the mean of these wins (0 to 1, one a prompt) has where both sides are equal.

    Its variance is the mean square distance from 1/2: 1/4 when every prompt is won or lost, less with ties.
    """
    return math.sqrt(sum((win - 0.5) ** 2 for win in wins)) / len(wins)


def detectable(wins: Sequence[float]) -> float:
    """Return the smallest distance of a win rate from 1/2 that so many prompts show, at 5 % two-sided and 80 % power.

    (z_0.975 + z_0.8) times the standard error (Cohen 1988, section 2.4): smaller differences are missed more than one
    time in five.
    """
    return (Z_95 + Z_80) * even_error(wins)
