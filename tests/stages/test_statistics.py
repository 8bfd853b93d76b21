"""Statistics against other people's programs, against enumeration, and against simulations whose truth is known.

Numbers said to be of SciPy 1.17, scikit-learn 1.9 or statsmodels 0.15 were printed by those, on the inputs that stand
beside them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from statistics import NormalDist, fmean

import numpy as np
import pytest

from align_pipeline.stages.statistics import (
    bootstrap,
    cohen_kappa,
    confusion,
    detectable,
    detectable_difference,
    distinct_n,
    distinct_without,
    jackknife,
    length_controlled,
    logistic_fit,
    macro_f1,
    paired_shares,
    perplexity_metrics,
    quantile_interval,
    share_metrics,
    sign_flip_test,
    sign_test,
    table_interval,
    wilson,
    win_rate,
)

TRUTH = list("AABBBCCCCADB" * 3) + list("AB")
SAID = list("ABBBCCCCAAXB" * 3) + list("AA")


def share_of(repetitions: int, covered: Callable[[int], bool]) -> float:
    return fmean(covered(number) for number in range(repetitions))


# --- shares and means ---


def test_win_rate_counts_all_pairs_and_halves_ties() -> None:
    assert win_rate([1], [1]) == 0.5
    assert win_rate([2, 0], [1, 1]) == 0.5
    assert win_rate([3, 1, 1], [1, 0]) == pytest.approx((2 + 1.5 + 1.5) / 6)


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        (0, 20, (0.0, 0.1611251580528194)),
        (7, 20, (0.18119182410108203, 0.5671457233147638)),
        (95, 100, (0.8882495307680808, 0.9784563208456319)),
        (320, 400, (0.758029683133299, 0.8362629402661231)),
    ],
)
def test_wilson_is_the_interval_of_statsmodels(successes: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(expected, abs=1e-9)


def test_wilson_covers_a_share_by_exact_enumeration() -> None:
    """Every outcome of 60 trials, weighed with its binomial probability; averaged over shares from 0.02 to 0.98."""
    inside = [wilson(hits, 60) for hits in range(61)]

    def coverage(share: float) -> float:
        chances = [math.comb(60, hits) * share**hits * (1 - share) ** (60 - hits) for hits in range(61)]
        return sum(chance for chance, (low, high) in zip(chances, inside, strict=True) if low <= share <= high)

    found = [coverage(number / 100) for number in range(2, 99)]
    assert 0.93 <= fmean(found) <= 0.97
    assert min(found) > 0.9


def test_paired_shares_cover_their_difference_by_exact_enumeration() -> None:
    """Every way in which 40 prompts can be gained, lost or neither, weighed with its trinomial probability."""

    def coverage(up: float, down: float) -> float:
        total = 0.0
        for gained in range(41):
            for lost in range(41 - gained):
                low, high = paired_shares(gained, lost, 40)
                if low <= up - down <= high:
                    ways = math.comb(40, gained) * math.comb(40 - gained, lost)
                    total += ways * up**gained * down**lost * (1 - up - down) ** (40 - gained - lost)
        return total

    found = [coverage(up / 20, down / 20) for up in range(1, 10) for down in range(1, 10)]
    assert 0.94 <= fmean(found) <= 0.97
    assert min(found) > 0.92
    assert paired_shares(0, 0, 40) == pytest.approx((-1.959964 * math.sqrt(2) / 42, 1.959964 * math.sqrt(2) / 42))


def test_share_metrics_count_what_changed() -> None:
    yes, base = [True] * 5 + [False] * 3, [True] * 2 + [False] * 5 + [True]
    found = share_metrics("right", yes, base)
    assert (found["right"], found["right_gain"]) == (5 / 8, 2 / 8)
    assert (found["right_low"], found["right_high"]) == wilson(5, 8)
    assert (found["right_gain_low"], found["right_gain_high"]) == paired_shares(3, 1, 8)
    assert found["right_gain_p"] == sign_test(3, 1)
    assert set(share_metrics("right", yes, None)) == {"right", "right_low", "right_high"}


def test_bootstrap_intervals_cover_the_truth() -> None:
    """95 % intervals of the mean of 200 draws of two distributions, 1,000 times."""
    generator = np.random.default_rng(1)
    interval = bootstrap(200, seed=0)

    def covered(number: int) -> bool:
        values = generator.exponential(size=200) if number % 2 else generator.normal(1, 1, 200)
        low, high = interval(values.tolist())
        return low <= 1 <= high

    assert 0.93 <= share_of(1000, covered) <= 0.97


def test_bootstrap_is_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(3).random(2000)
    error = float(values.std()) / math.sqrt(2000)
    mean = float(values.mean())
    low, high = bootstrap(2000, seed=1)(values.tolist())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap(2000, seed=1)(values.tolist()) == (low, high)


def test_bootstrap_intervals_of_a_win_rate_cover_it() -> None:
    """200 prompts with wins, ties and losses of known chances; the truth is 0.62."""
    generator = np.random.default_rng(11)
    interval = bootstrap(200, seed=0)

    def covered(_: int) -> bool:
        low, high = interval(generator.choice([1.0, 0.5, 0.0], p=[0.5, 0.24, 0.26], size=200).tolist())
        return low <= 0.62 <= high

    assert 0.93 <= share_of(1000, covered) <= 0.97


def documents(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and tokens of 150 documents whose expected nats are 2.5 a token; long ones are easier to predict."""
    tokens = generator.integers(5, 200, 150)
    harder = 2.5 + 0.4 * (LENGTH_BY_LENGTH - tokens) / 100
    return tokens * harder * generator.gamma(8, 1 / 8, 150), tokens


LENGTH_BY_LENGTH = 133  # sum of t^2 / sum of t, for t from 5 to 199: weighs each document by its tokens


def test_the_interval_of_a_ratio_covers_it() -> None:
    """Nats a token of 150 documents of unequal length, 1,000 times."""
    generator = np.random.default_rng(5)
    interval = bootstrap(150, seed=0, resamples=1000)

    def covered(_: int) -> bool:
        low, high = interval(*documents(generator))
        return low <= 2.5 <= high

    lengths = np.arange(5, 200)
    assert (lengths**2).sum() / lengths.sum() == pytest.approx(LENGTH_BY_LENGTH, abs=0.1)
    assert 0.93 <= share_of(1000, covered) <= 0.97


def test_perplexities_are_compared_document_by_document() -> None:
    """A model that needs a tenth more nats for every document: nothing is left to chance in the ratio."""
    nats, tokens = documents(np.random.default_rng(6))
    found = perplexity_metrics((1.1 * nats).tolist(), tokens.tolist(), nats.tolist(), seed=0)
    rate = nats.sum() / tokens.sum()
    assert found["perplexity"] == pytest.approx(math.exp(1.1 * rate))
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.1 * rate))
    low, high = bootstrap(150, seed=0)(nats.tolist(), tokens.tolist())
    expected = (math.exp(0.1 * low), math.exp(0.1 * high))
    assert (found["perplexity_ratio_low"], found["perplexity_ratio_high"]) == pytest.approx(expected)
    assert found["perplexity_ratio_p"] == 1 / 10_001
    assert set(perplexity_metrics([1.0], [2], None, 0)) == {"perplexity", "perplexity_low", "perplexity_high"}


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_intervals_of_quantiles_cover_them(share: float) -> None:
    """1,000 samples of 100 skewed values; a bootstrap covers the 95th percentile 88 times in 100."""
    low, high = (int(rank) - 1 for rank in quantile_interval(list(range(1, 101)), share))
    samples = np.sort(np.random.default_rng(12).lognormal(0, 0.5, (1000, 100)), axis=1)
    truth = math.exp(0.5 * NormalDist().inv_cdf(share))
    assert 0.93 <= ((samples[:, low] <= truth) & (truth <= samples[:, high])).mean() <= 0.97
    with pytest.raises(ValueError, match="58 values are too few for an interval of the 0.95 quantile"):
        quantile_interval([1.0] * 58, 0.95)
    assert quantile_interval([3.0, *[1.0] * 58], 0.95)[1] == 3.0


def test_what_no_sample_of_that_size_can_show() -> None:
    """Seven prompts, even all won, are nearer to a half than the distance that is found four times in five."""
    assert detectable([1.0] * 7) is None
    assert detectable([1.0] * 8) == pytest.approx(2.801585 * 0.5 / 8**0.5)
    assert detectable([0.5] * 400) is None
    assert detectable([*[0.5] * 400, *[1.0] * 7]) is None, "ties show nothing"


def test_the_detectable_difference_is_found_with_that_power() -> None:
    """A normal test of 400 wins and losses at that distance rejects in four of five worlds."""
    difference = detectable_difference(400)
    assert difference == pytest.approx(0.07003963045282421)  # (norm.ppf(0.975) + norm.ppf(0.8)) / 2 / 20, SciPy
    wins = np.random.default_rng(0).binomial(400, 0.5 + difference, size=20_000) / 400
    found = (np.abs(wins - 0.5) > 1.959964 * 0.5 / 20).mean()
    assert found == pytest.approx(0.8, abs=0.02)
    assert detectable_difference(1600) == pytest.approx(difference / 2)


# --- tests of pairs ---


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(9, 1, 0.021484375), (30, 18, 0.11140289106101878), (4, 4, 1.0), (0, 7, 0.015625), (0, 0, 1.0)],
)
def test_the_sign_test_is_the_binomial_test_of_scipy(wins: int, losses: int, expected: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_the_sign_test_of_thousands_is_the_normal_test() -> None:
    assert sign_test(5200, 5000) == pytest.approx(math.erfc((200 - 1) / math.sqrt(10_200) / math.sqrt(2)), rel=1e-3)


def test_the_sign_flip_test_of_few_pairs_lists_all_signs() -> None:
    differences = [0.5, -0.2, 0.9, 0.3, -0.1, 0.4, 0.7, 0.2]
    assert sign_flip_test(differences, seed=0) == pytest.approx(0.0546875)  # SciPy's permutation_test, exact
    exact = [Fraction(str(value)) for value in differences]
    sums = [sum(s * d for s, d in zip(signs, exact, strict=True)) for signs in itertools.product((1, -1), repeat=8)]
    assert sign_flip_test(differences, seed=0) == fmean(abs(total) >= sum(exact) for total in sums)


def test_the_sign_flip_test_sees_that_thirds_cancel() -> None:
    """1/3 - 1/3 + ... is not quite 0 in floating point; every choice of signs gives a sum as large as 0."""
    values = [0.33333333333333326, -0.3333333333333333, -0.33333333333333337, 0.3333333333333333]
    assert sum(values) != 0
    assert sign_flip_test(values, seed=0) == 1.0


def test_the_sign_flip_test_of_many_pairs_draws_them() -> None:
    """Twenty differences of 1 or -1: the exact p-value is the sign test's."""
    differences = [1.0] * 14 + [-1.0] * 6
    assert sign_flip_test(differences, seed=3) == pytest.approx(sign_test(14, 6), abs=0.01)
    assert sign_flip_test(differences, seed=3) == sign_flip_test(differences, seed=3)
    assert sign_flip_test([1.0] * 40, seed=0) == 1 / 10_001, "never 0"
    assert sign_flip_test([0.0] * 40, seed=0) == 1.0
    assert sign_flip_test([*differences, *[0.0] * 50], seed=3) == pytest.approx(sign_test(14, 6), abs=0.01)


def test_the_sign_flip_test_rejects_what_is_equal_one_time_in_twenty() -> None:
    """1,000 worlds without a difference, skewed values on either side: p-values are uniform."""
    generator = np.random.default_rng(8)
    found = [
        sign_flip_test((generator.exponential(size=40) * generator.choice([-1, 1], 40)).tolist(), seed=n, flips=400)
        for n in range(1000)
    ]
    assert 0.035 <= fmean(p <= 0.05 for p in found) <= 0.065
    assert 0.46 <= fmean(p <= 0.5 for p in found) <= 0.54


# --- labels ---


def test_macro_f1_is_that_of_scikit_learn() -> None:
    assert float(macro_f1(confusion(TRUTH, SAID))) == pytest.approx(0.5341666666666667)
    whole = confusion(TRUTH, TRUTH)
    assert float(macro_f1(whole)) == 1.0
    assert float(macro_f1(confusion(["A", "B"], [None, None]))) == 0.0


def test_kappa_is_that_of_scikit_learn() -> None:
    labels = sorted({*TRUTH, *SAID})
    pairs = Counter(zip(TRUTH, SAID, strict=True))
    table = np.array([[pairs[a, b] for b in labels] for a in labels])
    assert float(cohen_kappa(table)) == pytest.approx(0.5222437137330754)
    assert math.isnan(float(cohen_kappa(np.array([[5, 0], [0, 0]]))))


def test_a_table_is_resampled_as_its_rows_are() -> None:
    rows = np.array([[TRUTH[i], SAID[i]] for i in range(len(TRUTH))])
    generator = np.random.default_rng(2)
    order = "".join(dict.fromkeys(TRUTH))
    scores = []
    for _ in range(2000):
        drawn = rows[generator.integers(len(rows), size=len(rows))]
        kept = [label for label in order if label in drawn[:, 0]]
        f1 = []
        for label in kept:
            hits = ((drawn[:, 0] == label) & (drawn[:, 1] == label)).sum()
            f1.append(2 * hits / ((drawn[:, 0] == label).sum() + (drawn[:, 1] == label).sum()))
        scores.append(fmean(f1))
    expected = np.quantile(scores, [0.025, 0.975])
    assert table_interval(confusion(TRUTH, SAID), macro_f1, seed=0) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("statistic", [macro_f1, cohen_kappa])
def test_table_intervals_cover_the_truth(statistic: Callable[[np.ndarray], np.ndarray]) -> None:
    """300 rows of two labels; the truth is the statistic of the table of probabilities."""
    chances = np.array([[0.38, 0.06], [0.09, 0.47]])

    def padded(table: np.ndarray) -> np.ndarray:
        return np.concatenate((table, np.zeros((2, 1))), axis=1) if statistic is macro_f1 else table

    truth = float(statistic(padded(chances * 1e6)))
    generator = np.random.default_rng(4)

    def covered(number: int) -> bool:
        table = generator.multinomial(300, chances.ravel()).reshape(2, 2).astype(float)
        low, high = table_interval(padded(table), statistic, seed=number, resamples=1000)
        return low <= truth <= high

    assert 0.93 <= share_of(1000, covered) <= 0.97


# --- answers ---


def test_distinct_n_counts_by_hand() -> None:
    answers = ["a b a b".split(), "a b c".split(), ["a"]]
    assert distinct_n(answers, 1) == 3 / 8
    assert distinct_n(answers, 2) == 3 / 5  # ab ba ab, ab bc
    assert distinct_n([["a"]], 2) == 0


def test_distinct_n_without_each_prompt_is_counted_by_hand() -> None:
    answers = [["a b a b".split(), "a b c".split()], ["c a b".split()], ["x".split()]]
    flat = [[answer for row in answers[:i] + answers[i + 1 :] for answer in row] for i in range(3)]
    assert distinct_without(answers, 2) == [distinct_n(row, 2) for row in flat] == [1.0, 3 / 5, 4 / 7]
    assert distinct_without([["a b".split()]], 2) == [0.0]


def test_jackknife_intervals_of_distinct_bigrams_cover_their_mean() -> None:
    """60 answers of 10 to 20 words, Zipf's law over 300 words, 1,000 times; the truth is the mean of all."""
    generator = np.random.default_rng(9)
    chances = 1 / np.arange(1, 301)
    words = generator.choice(300, size=(1000, 60, 20), p=chances / chances.sum()).tolist()
    lengths = generator.integers(10, 21, (1000, 60))
    values, intervals = [], []
    for rows, sizes in zip(words, lengths, strict=True):
        answers = [[row[:size]] for row, size in zip(rows, sizes, strict=True)]
        values.append(distinct_n([row[0] for row in answers], 2))
        intervals.append(jackknife(values[-1], distinct_without(answers, 2)))
    truth = fmean(values)
    assert 0.93 <= fmean(low <= truth <= high for low, high in intervals) <= 0.97


def soft_outcomes() -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(60)
    longer = (index * 53 % 41 - 15).astype(float)
    return np.clip(index * 37 % 11 / 10 + 0.2 * np.sign(longer), 0, 1), longer


def test_the_logistic_fit_is_that_of_statsmodels() -> None:
    outcome, longer = soft_outcomes()
    features = np.stack((np.ones(60), np.tanh(longer / longer.std())), axis=1)
    plain = logistic_fit(features, outcome, np.ones((1, 60)), ridge=0)[0]
    assert plain == pytest.approx([-0.0573064, 0.91642732], abs=1e-6)  # GLM, binomial
    held = logistic_fit(features, outcome, np.ones((1, 60)))[0]
    assert held == pytest.approx([-0.05691923, 0.91475656], abs=1e-5)  # SciPy's minimize of the penalised likelihood
    twice = logistic_fit(np.repeat(features, 2, axis=0), np.repeat(outcome, 2), np.ones((1, 120)), ridge=0)[0]
    assert logistic_fit(features, outcome, np.full((1, 60), 2.0), ridge=0)[0] == pytest.approx(twice)


def test_the_length_controlled_win_rate() -> None:
    outcome, longer = soft_outcomes()
    rate, low, high = length_controlled(outcome.tolist(), longer.tolist(), seed=0)
    assert rate == pytest.approx(1 / (1 + math.exp(0.05691923)), abs=1e-6)
    assert low < rate < high
    swapped = length_controlled((1 - outcome).tolist(), (-longer).tolist(), seed=0)
    assert swapped == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-6)


def test_a_judge_of_length_alone_finds_equals() -> None:
    """Whoever is longer wins, most of the time: the plain win rate says better, the controlled one says equal."""
    generator = np.random.default_rng(6)
    longer = generator.normal(30, 40, 2000)
    chance = 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    wins = (generator.random(2000) < chance).astype(float)
    assert wins.mean() > 0.65
    rate, _, _ = length_controlled(wins.tolist(), longer.tolist(), seed=0, resamples=200)
    assert abs(rate - 0.5) < 0.04


def test_length_control_of_what_has_no_variance() -> None:
    assert length_controlled([1.0, 0.0, 1.0, 1.0], [5.0] * 4, seed=0)[0] == pytest.approx(0.75, abs=5e-3)
    rate, low, high = length_controlled([1.0] * 50, list(range(50)), seed=0)
    assert 0.99 < low <= rate <= high <= 1


@pytest.mark.slow
def test_length_controlled_intervals_cover_the_truth() -> None:
    """Wins drawn from the model itself with theta = 0.4 and phi = 1.2, on 250 prompts of fixed lengths."""
    longer = np.random.default_rng(1).normal(10, 30, 250)
    chance = 1 / (1 + np.exp(-(0.4 + 1.2 * np.tanh(longer / longer.std()))))
    truth = 1 / (1 + math.exp(-0.4))
    generator = np.random.default_rng(2)

    def covered(number: int) -> bool:
        wins = (generator.random(250) < chance).astype(float)
        _, low, high = length_controlled(wins.tolist(), longer.tolist(), seed=number, resamples=500)
        return low <= truth <= high

    assert 0.93 <= share_of(1000, covered) <= 0.97


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

    assert wilson(share * count, count) == pytest.approx((turning(share, 0.0), turning(share, 1.0)), abs=1e-9)


def test_what_a_sample_with_ties_shows() -> None:
    assert detectable([1.0, 0.0] * 200) == pytest.approx(detectable_difference(400))
    assert detectable([1.0, 0.0, 0.5, 0.5] * 100) == pytest.approx(detectable_difference(400) / 2**0.5)
