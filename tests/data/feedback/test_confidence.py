"""How sure an order is: exact sums against integrals, and the report's other figures against their definitions."""

import math

import numpy
import pytest

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.report import kto_weight, wilson


def integral(up_1: int, down_1: int, up_2: int, down_2: int) -> float:
    """Return P(X > Y) of two Beta variables by adding up densities on a fine grid."""
    x = (numpy.arange(200_000) + 0.5) / 200_000
    one, two = x**up_1 * (1 - x) ** down_1, x**up_2 * (1 - x) ** down_2
    below = numpy.cumsum(two) - two / 2
    return float((one * below).sum() / one.sum() / two.sum())


@pytest.mark.parametrize(
    ("votes", "known"),
    [
        ((1, 0, 0, 1), 0.833),
        ((2, 0, 0, 2), 0.949),  # the first of 20 equal posteriors is 1/20 likely to be the wrong way round: 19/20 = .95
        ((1, 0, 1, 2), 0.798),
        ((3, 1, 1, 3), 0.897),
        ((5, 0, 0, 5), 0.999),
        ((1, 0, 0, 0), 0.667),
        ((7, 2, 3, 3), None),
        ((40, 11, 30, 16), None),
        ((0, 0, 0, 0), 0.5),
    ],
)
def test_confidence_of_thumbs_is_the_integral(votes: tuple[int, int, int, int], known: float | None):
    exact = confidence.thumbs(*votes)
    assert exact == pytest.approx(integral(*votes), abs=2e-5)
    assert known is None or exact == pytest.approx(known, abs=2e-3)
    assert exact + confidence.thumbs(*votes[2:], *votes[:2]) == pytest.approx(1)


def test_many_votes_stay_a_probability():
    assert confidence.thumbs(9000, 1000, 1000, 9000) == pytest.approx(1)
    assert confidence.thumbs(5000, 5000, 5000, 5000) == pytest.approx(0.5, abs=1e-6)


def test_margins_are_log_odds_up_to_three():
    assert confidence.margin(0.75) == pytest.approx(math.log(3))
    assert confidence.margin(0.999) == confidence.margin(1.0) == 3.0


def test_wilson_is_the_share_whose_score_test_is_just_not_rejected():
    low, high = wilson(8, 10) or (0, 0)
    for bound in (low, high):  # |8/10 - b| = z * sqrt(b (1 - b) / 10)
        assert abs(0.8 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 10), abs=2e-4)
    assert wilson(0, 0) is None


@pytest.mark.parametrize(("up", "down"), [(900, 100), (100, 900), (57, 12), (20, 23)])
def test_the_weight_of_kto_brings_the_ratio_into_its_range(up: int, down: int):
    found = kto_weight(up, down)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, found["set"]: found["weight"]}
    ratio = weights["desirable_weight"] * up / (weights["undesirable_weight"] * down)
    assert 1 <= ratio <= 4 / 3
    assert kto_weight(120, 100)["set"] is None and kto_weight(5, 0)["set"] is None
