"""What numbers on a few hundred prompts can be trusted to say: intervals, tests of pairs, and measures of agreement.

Prompts are what is drawn at random, so prompts are what is resampled; answers to one prompt are averaged first. Two
models answer the same prompts, so they are compared prompt by prompt: the difference between prompts then cancels
(Miller 2024, arXiv:2411.00640, section 4.2).

Intervals of means and fitted values are percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13). Where a
bootstrap is known to fail there are others: for shares Wilson's, which hold for few prompts and near 0 and 1, where a
bootstrap of 20 equal outcomes would have no width (Brown, Cai and DasGupta 2001); for quantiles those between order
statistics; for distinct n-grams the jackknife, as what is drawn twice is never new. Left out: BCa, whose correction is
smaller than the noise of 2,000 resamples for means of bounded scores, and corrections for many comparisons.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
FLIPS = 10_000
"""Draws of a sign-flip test: the smallest p-value is one in so many."""
RIDGE = 0.01
"""Keeps a logistic fit finite where one model always wins; of 40 prompts it moves the rate by a thousandth at most."""

Z_95 = NormalDist().inv_cdf(0.975)
"""Standard errors to each side of a 95 % interval."""

Interval = tuple[float, float]


# --- shares and means -------------------------------------------------------------------------------------------------


def win_rate(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return P(my score > theirs) + P(equal) / 2 over all pairs of one prompt's answers (Mann-Whitney's U / nm)."""
    return fmean((a > b) + (a == b) / 2 for a in mine for b in theirs)


def wilson(successes: float, count: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, equation 4)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(count: int, seed: int, resamples: int = RESAMPLES) -> Callable[..., Interval]:
    """Return the function from one value a prompt to the 95 % percentile interval of their mean.

    Given a second value a prompt as `over`, the interval is that of the ratio of both means. Every call resamples the
    same prompts, so that metrics are compared on equal terms.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    taken = generator.integers(count, size=(resamples, count), dtype=np.int32)
    pieces = np.array_split(taken, max(1, taken.size // 2**22))  # so that memory does not grow with the prompts

    def means(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        return np.concatenate([array[piece].mean(axis=1) for piece in pieces])

    def interval(values: Sequence[float], over: Sequence[float] | None = None) -> Interval:
        return middle(means(values) if over is None else means(values) / means(over))

    return interval


def mean_metrics(
    name: str,
    values: Sequence[float],
    base: Sequence[float] | None,
    interval: Callable[[Sequence[float]], Interval],
    seed: int,
) -> dict[str, float]:
    """Return a mean over prompts with its interval, and what it gained over the baseline: a sign-flip test of pairs."""
    found = with_interval(name, fmean(values), interval(values))
    if base is not None:
        gains = [mine - theirs for mine, theirs in zip(values, base, strict=True)]
        found |= with_interval(f"{name}_gain", fmean(gains), interval(gains))
        found[f"{name}_gain_p"] = sign_flip_test(gains, seed)
    return found


def with_interval(name: str, value: float, interval: Interval) -> dict[str, float]:
    """Return a metric beside the ends of its interval."""
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def perplexity_metrics(
    nats: Sequence[float], tokens: Sequence[float], base: Sequence[float] | None, seed: int
) -> dict[str, float]:
    """Return exp(nats / tokens) of all documents with its interval over documents, and how many times the baseline's.

    `nats` is what each document's `tokens` cost the model, `base` what they cost the baseline.
    """
    interval = bootstrap(len(nats), seed)

    def per_token(name: str, costs: Sequence[float]) -> dict[str, float]:
        low, high = interval(costs, tokens)
        return with_interval(name, math.exp(math.fsum(costs) / sum(tokens)), (math.exp(low), math.exp(high)))

    found = per_token("perplexity", nats)
    if base is not None:
        more = [mine - theirs for mine, theirs in zip(nats, base, strict=True)]
        found |= per_token("perplexity_ratio", more)
        found["perplexity_ratio_p"] = sign_flip_test(more, seed)
    return found


def paired_shares(gained: int, lost: int, count: int) -> Interval:
    """Return the 95 % interval of the difference of two shares of the same prompts (Bonett and Price 2012).

    `gained` prompts are right for the one only, `lost` for the other only. Where none differ it still has a width.
    """
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = NormalDist().inv_cdf(0.975) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def share_metrics(name: str, yes: Sequence[bool], base: Sequence[bool] | None) -> dict[str, float]:
    """Return a share with its interval, and what it gained over the baseline on the same prompts: McNemar's test."""
    found = with_interval(name, fmean(yes), wilson(sum(yes), len(yes)))
    if base is not None:
        gained = sum(a and not b for a, b in zip(yes, base, strict=True))
        lost = sum(b and not a for a, b in zip(yes, base, strict=True))
        found |= with_interval(f"{name}_gain", (gained - lost) / len(yes), paired_shares(gained, lost, len(yes)))
        found[f"{name}_gain_p"] = sign_test(gained, lost)
    return found


def middle(values: np.ndarray) -> Interval:
    """Return what the middle 95 % of resampled values lie between; resamples without a value are left out."""
    import numpy as np

    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def detectable_difference(count: int, deviation: float = 0.5, power: float = 0.8, level: float = 0.05) -> float:
    """Return the distance from a half that a win rate on `count` prompts must have to be found with that power.

    (z(1 - level/2) + z(power)) * deviation / sqrt(count): Miller 2024, section 5, for one difference a prompt. The
    `deviation` is that of the wins over prompts, at most a half.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * deviation / math.sqrt(count)


def even_error(wins: Sequence[float]) -> float:
    """Return the standard error that the mean of these wins (0 to 1, one a prompt) has where both sides are equal.

    Its variance is the mean square distance from 1/2: 1/4 when every prompt is won or lost, less with ties.
    """
    return math.sqrt(sum((win - 0.5) ** 2 for win in wins)) / len(wins)


def detectable(wins: Sequence[float]) -> float | None:
    """Return the same for the wins of a sample, whose ties make smaller differences visible.

    None where it is more than these wins could show if all went one way: of fewer than eight prompts that are won or
    lost, and where all are ties.
    """
    smallest = detectable_difference(len(wins), even_error(wins) * math.sqrt(len(wins)))
    return smallest if 0 < smallest <= fmean(abs(win - 0.5) for win in wins) else None


def quantile_interval(values: Sequence[float], share: float, confidence: float = 0.95) -> Interval:
    """Return the values between which a quantile lies with that confidence, whatever the distribution.

    Between the two order statistics, the fewest ranks apart, that hold it so often: the number of values below
    it is binomial (David and Nagaraja 2003, section 7.1). Raises ValueError for too few values: 0.95 wants 59.
    """
    ordered, count = sorted(values), len(values)
    below = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    for width in range(1, count):
        chance, rank = max((math.fsum(below[low : low + width]), low) for low in range(1, count - width + 1))
        if chance >= confidence:
            return ordered[rank - 1], ordered[rank + width - 1]
    raise ValueError(f"{count} values are too few for an interval of the {share:g} quantile")


def jackknife(value: float, without: Sequence[float]) -> Interval:
    """Return the 95 % normal interval of a statistic from its values without each of the prompts (Tukey 1958).

    Its variance is too large rather than too small (Efron and Stein 1981).
    """
    mean, count = fmean(without), len(without)
    half = Z_95 * math.sqrt((count - 1) / count * math.fsum((one - mean) ** 2 for one in without))
    return value - half, value + half


# --- tests of pairs ---------------------------------------------------------------------------------------------------


def sign_flip_test(differences: Sequence[float], seed: int, flips: int = FLIPS) -> float:
    """Return the two-sided p-value of a mean difference of pairs: how often random signs give one as large.

    Fisher's randomisation test of paired observations; the observed signs count as one draw, so that the p-value is
    never 0 and never too small (Phipson and Smyth 2010). Exact where all signs can be listed.
    """
    import numpy as np

    array = np.asarray([value for value in differences if value], dtype=np.float64)
    if not len(array):
        return 1.0
    # Sums of one set of numbers differ in their last bits: of those of the numbers, not of those of the sum.
    observed = abs(float(array.sum())) - 1e-9 * float(np.abs(array).sum())
    if 2 ** len(array) <= flips:
        signs = 1 - 2 * (np.arange(2 ** len(array))[:, None] >> np.arange(len(array)) & 1)  # (2^n, n)
        return float((np.abs(signs @ array) >= observed).mean())
    generator = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(array))
    found = 0
    for start in range(0, flips, rows):
        signs = generator.integers(2, size=(min(rows, flips - start), len(array)), dtype=np.int8) * 2 - 1
        found += int((np.abs(signs @ array) >= observed).sum())
    return (found + 1) / (flips + 1)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of wins against losses, ties left out; of right answers, McNemar's test."""
    count, less = wins + losses, min(wins, losses)
    tail = ways = 1
    for k in range(less):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << count))


# --- labels -----------------------------------------------------------------------------------------------------------


def confusion(truth: Sequence[Hashable], said: Sequence[Hashable]) -> np.ndarray:
    """Return how often what was said of each true label, (K, K + 1); the last column is whatever is no true label."""
    import numpy as np

    places = {label: place for place, label in enumerate(dict.fromkeys(truth))}
    table = np.zeros((len(places), len(places) + 1))
    for true, given in zip(truth, said, strict=True):
        table[places[true], places.get(given, len(places))] += 1
    return table


def macro_f1(table: np.ndarray) -> np.ndarray:
    """Return the mean over true labels of 2 TP / (2 TP + FP + FN), for tables (..., K, K + 1); labels of no row are
    left out, and an answer that names none is a miss of its label and no label of its own."""
    import numpy as np

    labels = table.shape[-2]
    true = table.sum(-1)  # (..., K)
    said = table[..., :labels].sum(-2)  # (..., K)
    hits = np.diagonal(table[..., :labels], axis1=-2, axis2=-1)  # (..., K)
    scores = np.where(true > 0, 2 * hits / np.maximum(true + said, 1), np.nan)
    return np.asarray(np.nanmean(scores, axis=-1))


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Return (agreement - expected) / (1 - expected) for tables (..., K, K) (Cohen 1960, equation 1).

    NaN where both say one label only: agreement by chance is then certain.
    """
    import numpy as np

    count = table.sum((-2, -1))
    agreement = np.diagonal(table, axis1=-2, axis2=-1).sum(-1) / count
    expected = (table.sum(-1) * table.sum(-2)).sum(-1) / count**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((agreement - expected) / (1 - expected))


def table_interval(
    table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Return the 95 % percentile interval of a statistic of a table: to resample rows is to draw a table anew."""
    import numpy as np

    count = int(table.sum())
    drawn = np.random.default_rng(seed).multinomial(count, (table / count).ravel(), size=resamples)
    return middle(statistic(drawn.reshape(resamples, *table.shape).astype(np.float64)))


# --- answers ----------------------------------------------------------------------------------------------------------


def distinct_n(answers: Sequence[Sequence[Any]], n: int) -> float:
    """Return distinct n-grams over all n-grams of all answers (Li et al. 2016, arXiv:1510.03055).

    More and longer answers lower it, so it compares models on the same prompts only; 0 where no answer has n tokens.
    """
    grams = _grams(answers, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_without(answers: Sequence[Sequence[Sequence[Any]]], n: int) -> list[float]:
    """Return for each prompt the same of all other prompts' answers: what a jackknife wants."""
    rows = [Counter(_grams(row, n)) for row in answers]
    whole = Counter[Any]()
    for row in rows:
        whole.update(row)
    found = []
    for row in rows:
        left = whole.total() - row.total()
        own = sum(whole[gram] == count for gram, count in row.items())
        found.append((len(whole) - own) / left if left else 0.0)
    return found


def _grams(answers: Sequence[Sequence[Any]], n: int) -> list[tuple[Any, ...]]:
    return [gram for answer in answers for gram in zip(*(answer[start:] for start in range(n)), strict=False)]


def length_controlled(
    wins: Sequence[float], longer: Sequence[float], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the win rate that answers of equal length would have, and its 95 % percentile interval.

    Dubois et al. 2024, arXiv:2404.04475, section 3: logit P(win) = theta + phi * tanh(longer / sd(longer)), and
    the win rate is sigmoid(theta). `wins` holds a value from 0 to 1 for each prompt, `longer` by how many tokens the
    model's answers are longer than the other's. Left out: the paper's term for how hard each prompt is, which is fitted
    on many models. Swapping the models gives one minus the same.
    """
    import numpy as np

    outcome = np.asarray(wins, dtype=np.float64)  # (n,)
    length = np.asarray(longer, dtype=np.float64)  # (n,)
    spread = float(length.std())
    feature = np.tanh(length / spread) if spread else np.zeros_like(length)
    features = np.stack((np.ones_like(feature), feature), axis=1)  # (n, 2)
    count = len(outcome)
    rate = _sigmoid(logistic_fit(features, outcome, np.ones((1, count)))[0, 0])
    generator = np.random.default_rng(seed)
    rates = []
    rows = max(1, 2**21 // count)
    for start in range(0, resamples, rows):
        weights = generator.multinomial(count, np.full(count, 1 / count), size=min(rows, resamples - start))
        rates.append(_sigmoid(logistic_fit(features, outcome, weights.astype(np.float64))[:, 0]))
    return float(rate), *middle(np.concatenate(rates))


def logistic_fit(features: np.ndarray, outcome: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Return the coefficients of weighted logistic regressions, (R, k), for features (n, k), weights (R, n).

    Newton's method, that is iteratively reweighted least squares (McCullagh and Nelder 1989, section 2.5), on the
    log-likelihood less ridge / 2 times the sum of squares; outcomes may lie between 0 and 1.
    """
    import numpy as np

    size = features.shape[1]
    squares = (features[:, :, None] * features[:, None, :]).reshape(len(features), size * size)
    found = np.zeros((len(weights), size))
    for _ in range(100):
        chance = _sigmoid(found @ features.T)  # (R, n)
        slope = (weights * (outcome - chance)) @ features - ridge * found  # (R, k)
        curve = (weights * chance * (1 - chance)) @ squares  # (R, k * k)
        curve = curve.reshape(-1, size, size) + ridge * np.eye(size)
        step = np.linalg.solve(curve, slope[..., None])[..., 0].clip(-2, 2)
        found += step
        if float(np.abs(step).max()) < 1e-9:
            break
    return found


def _sigmoid(values: Any) -> Any:
    import numpy as np

    return 0.5 * (1 + np.tanh(np.asarray(values) / 2))
