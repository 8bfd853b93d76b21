"""What can be said of a share that was counted: its interval, and the difference that a sample can show."""

from __future__ import annotations

import math

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
