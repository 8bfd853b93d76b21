"""The mathematics of PPO against the papers' definitions, summed up in plain Python, in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from align_pipeline.stages.ppo_math import (
    explained_variance,
    gae,
    importance_weights,
    kl_k1,
    kl_k3,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

BAR = 1e-10
SETTINGS = [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.99, 0.9)]
JUNK = [math.nan, math.inf, -math.inf, 1e9]
GAPS = [[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]]


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def error(found: Tensor, expected: Any) -> float:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def batch(seed: int, rows: int = 4, longest: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and a mask with gaps whose first token is real, all (B, T)."""
    draw = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, longest + 1, (), generator=draw))
    rewards, values, chance = torch.randn(3, rows, length, generator=draw, dtype=torch.float64)
    mask = chance < 0.52  # of a normal number: P = .7
    mask[:, 0] = True
    return rewards, values, mask


def junk_under(mask: Tensor, tensor: Tensor, junk: float) -> Tensor:
    return torch.where(mask, tensor, junk)


# --- generalised advantages -------------------------------------------------------------------------------------------


def advantages_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Average the k-step advantages of an episode, as Schulman et al. 2016 define it before they simplify (16).

    A_k = r_t + ... + gamma^(k-1) r_(t+k-1) + gamma^k V(t+k) - V(t), weight (1 - lambda) lambda^(k-1); all those that
    look past the end are alike, so the last one has what is left of the weight. V past the end is 0.
    """
    found = []
    for t in range(len(rewards)):
        left, total, discounted = len(rewards) - t, 0.0, 0.0
        for k in range(1, left + 1):
            discounted += gamma ** (k - 1) * rewards[t + k - 1]
            beyond = values[t + k] if k < left else 0.0
            weight = (1 - lam) * lam ** (k - 1) if k < left else lam ** (k - 1)
            total += weight * (discounted + gamma**k * beyond - values[t])
        found.append(total)
    return found


def over_real_tokens(rewards: Tensor, values: Tensor, mask: Tensor, episode: Callable[..., list[float]]) -> Tensor:
    """Cut the gaps out of each row, run `episode` on what is left, and put its numbers back in their places."""
    found = torch.zeros_like(rewards)
    for row in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[row, t]]
        found[row, at] = f64(*episode(rewards[row, at].tolist(), values[row, at].tolist()))
    return found


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_advantages_are_the_average_of_k_step_advantages(gamma: float, lam: float) -> None:
    def episode(rewards: list[float], values: list[float]) -> list[float]:
        return advantages_by_definition(rewards, values, gamma, lam)

    gaps = 0
    for seed in range(200):
        rewards, values, mask = batch(seed)
        gaps += int((~mask[:, :-1] & mask[:, 1:]).sum())
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        assert error(advantages, over_real_tokens(rewards, values, mask, episode)) <= BAR
        assert torch.equal(returns, torch.where(mask, advantages + values, 0.0))
    assert gaps > 1000, "the masks should have gaps"


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_the_discounted_return_less_the_value(gamma: float) -> None:
    def episode(rewards: list[float], values: list[float]) -> list[float]:
        sums = [sum(gamma**i * r for i, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        return [total - value for total, value in zip(sums, values, strict=True)]

    for seed in range(20):
        rewards, values, mask = batch(seed)
        assert error(gae(rewards, values, mask, gamma, 1.0)[0], over_real_tokens(rewards, values, mask, episode)) <= BAR


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_zero_is_the_error_of_one_step(gamma: float) -> None:
    def episode(rewards: list[float], values: list[float]) -> list[float]:
        following = [*values[1:], 0.0]
        return [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]

    for seed in range(20):
        rewards, values, mask = batch(seed)
        assert error(gae(rewards, values, mask, gamma, 0.0)[0], over_real_tokens(rewards, values, mask, episode)) <= BAR


def test_an_answer_that_was_cut_off_is_worth_nothing_after_its_end() -> None:
    """By hand: one token, then two; whatever value stands behind the end is not read."""
    rewards, values = f64([3.0, 0.0], [1.0, 3.0]), f64([1.0, 50.0], [2.0, 5.0])
    mask = torch.tensor([[True, False], [True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas: 3 - 1; 1 + .5 * 5 - 2 and 3 - 5; the first of the second row gets .25 of the one behind it
    assert advantages.tolist() == [[2.0, 0.0], [1.5 - 0.25 * 2.0, -2.0]]
    assert returns.tolist() == [[3.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
@pytest.mark.parametrize("junk", [0.0, *JUNK])
def test_padding_on_either_side_changes_nothing(gamma: float, lam: float, junk: float) -> None:
    for seed in range(10):
        rewards, values, mask = batch(seed)
        pads = torch.full((len(mask), 5), junk, dtype=torch.float64)
        unreal = torch.zeros_like(pads, dtype=torch.bool)
        for order in (lambda row, pad: [row, pad], lambda row, pad: [pad, row]):
            wide = [torch.cat(order(row, pad), 1) for row, pad in ((rewards, pads), (values, pads), (mask, unreal))]
            for alone, padded in zip(gae(rewards, values, mask, gamma, lam), gae(*wide, gamma, lam), strict=True):
                assert torch.equal(padded, torch.cat(order(alone, torch.zeros_like(pads)), 1))


@pytest.mark.parametrize("junk", JUNK)
def test_gaps_are_as_if_they_were_cut_out(junk: float) -> None:
    """No tolerance: the same numbers in the same order, whatever lies in the gaps."""
    for seed in range(20):
        rewards, values, mask = batch(seed)
        found = gae(junk_under(mask, rewards, junk), junk_under(mask, values, junk), mask, 0.99, 0.9)
        for row, real in enumerate(mask):
            cut = [tensor[row, real][None] for tensor in (rewards, values, mask)]
            for whole, short in zip(found, gae(*cut, 0.99, 0.9), strict=True):
                assert torch.equal(whole[row, real], short[0])
                assert not whole[row, ~real].any()


# --- rewards of tokens ------------------------------------------------------------------------------------------------


def test_the_score_is_paid_on_the_last_real_token_and_kl_on_each() -> None:
    mask = torch.tensor(GAPS, dtype=torch.bool)
    kl = torch.arange(30, dtype=torch.float64).reshape(5, 6) / 7
    scores = f64(2.0, -3.0, 0.5, 0.0, 10.0)
    found = token_rewards(scores, kl, mask, kl_coef=0.3)
    for row in range(5):
        last = max(t for t in range(6) if mask[row, t])
        for t in range(6):
            paid = (-0.3 * float(kl[row, t]) if mask[row, t] else 0.0) + (float(scores[row]) if t == last else 0.0)
            assert float(found[row, t]) == paid, (row, t)
    assert error(found.sum(-1), scores - 0.3 * (kl * mask).sum(-1)) <= BAR


def test_an_answer_of_one_token_gets_score_and_kl_on_it() -> None:
    found = token_rewards(f64(2.0, -1.0), f64([0.5], [-0.5]), torch.ones(2, 1, dtype=torch.bool), kl_coef=0.1)
    assert found.tolist() == [[2.0 - 0.05], [-1.0 + 0.05]]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_under_the_mask_is_not_paid(junk: float) -> None:
    mask = torch.tensor(GAPS, dtype=torch.bool)
    kl = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)
    scores = f64(1.0, 2.0, 3.0, 4.0, 5.0)
    clean = token_rewards(scores, kl, mask, 0.3)
    assert torch.equal(token_rewards(scores, junk_under(mask, kl, junk), mask, 0.3), clean)
    assert not clean[~mask].any()


def test_no_argument_is_written_to() -> None:
    rewards, values, mask = batch(3)
    before = [tensor.clone() for tensor in (rewards, values, mask)]
    token_rewards(rewards[:, 0], values, mask, 0.1)
    gae(rewards, values, mask, 1.0, 0.95)
    whiten(values, mask)
    assert all(torch.equal(old, new) for old, new in zip(before, (rewards, values, mask), strict=True))


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_both_estimators_have_the_kl_as_their_mean() -> None:
    """KL(p || q) of two dice, each face weighed with its probability: no sampling error."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (2 * torch.randn(2, 17, generator=draw, dtype=torch.float64)).softmax(-1)
        exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        k1, k3 = kl_k1(p.log(), q.log()), kl_k3(p.log(), q.log())
        assert abs(float((p * k1).sum()) - exact) <= BAR
        assert abs(float((p * k3).sum()) - exact) <= BAR
        assert error(k1, [math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]) <= BAR
        assert error(k3, [b / a - 1 + math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]) <= BAR
        assert (k3 >= 0).all()
        assert (k1 < 0).any(), "k1 should have both signs"


def test_equal_models_have_no_kl() -> None:
    logprobs = f64(-0.1, -2.0, -30.0)
    assert not kl_k1(logprobs, logprobs).any()
    assert not kl_k3(logprobs, logprobs).any()


# --- whitening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [0.0, *JUNK])
def test_whitened_tokens_have_mean_zero_and_variance_one(junk: float) -> None:
    for seed in range(50):
        values, _, mask = batch(seed)
        values = 5 * values + 3
        if mask.sum() < 2:
            continue
        real = values[mask].tolist()
        mean, deviation = statistics.fmean(real), math.sqrt(statistics.variance(real) + 1e-8)
        white = whiten(junk_under(mask, values, junk), mask)
        assert error(white[mask], [(value - mean) / deviation for value in real]) <= BAR
        assert not white[~mask].any()
        assert abs(statistics.fmean(white[mask].tolist())) <= 1e-6
        assert abs(statistics.variance(white[mask].tolist()) - 1) <= 1e-5
        kept = whiten(junk_under(mask, values, junk), mask, shift_mean=False)
        assert error(kept[mask], [(value - mean) / deviation + mean for value in real]) <= BAR
        assert not kept[~mask].any()


def test_padding_does_not_change_what_is_whitened() -> None:
    values, _, mask = batch(5)
    wide = torch.nn.functional.pad(values, (0, 5), value=1e9), torch.nn.functional.pad(mask, (0, 5))
    assert torch.equal(whiten(*wide)[:, :-5], whiten(values, mask))


def test_values_that_are_all_alike_become_zero() -> None:
    """A variance of nothing divides nothing by zero; a single token has no variance."""
    values, mask = f64([2.5, 2.5], [2.5, 9.0]), torch.tensor([[True, True], [True, False]])
    assert not whiten(values, mask).any()
    assert whiten(values, mask, shift_mean=False)[mask].tolist() == [2.5, 2.5, 2.5]
    assert not whiten(values, torch.tensor([[True, False], [False, False]])).any()


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_policy_loss_is_the_smaller_surrogate_with_a_minus() -> None:
    draw = torch.Generator().manual_seed(1)
    new, old, advantages = torch.randn(3, 40, 25, generator=draw, dtype=torch.float64)
    weights = torch.rand(40, 25, generator=draw, dtype=torch.float64)
    found = policy_loss(new / 3, old / 3, advantages, weights, clip=0.2)

    def surrogate(new: float, old: float, advantage: float) -> float:
        ratio = math.exp(new / 3) / math.exp(old / 3)
        return min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)

    for row in range(40):
        tokens = zip(*(tensor[row].tolist() for tensor in (new, old, advantages)), strict=True)
        expected = [-weight * surrogate(*t) for weight, t in zip(weights[row].tolist(), tokens, strict=True)]
        assert error(found[row], expected) <= BAR


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -1.2 * 2, 0),  # good and already likelier: no more
        (1.5, -2.0, 1.5 * 2, 1.5 * 2),  # bad and likelier: back
        (0.5, 2.0, -0.5 * 2, -0.5 * 2),  # good and rarer: back
        (0.5, -2.0, 0.8 * 2, 0),  # bad and already rarer: no more
        (1.1, 2.0, -1.1 * 2, -1.1 * 2),
        (0.9, -2.0, 0.9 * 2, 0.9 * 2),
        (1.0, 2.0, -2.0, -2.0),  # the first step: the policy gradient itself
        (1.0, -2.0, 2.0, 2.0),
        (3.0, 0.0, 0, 0),
    ],
)
def test_each_side_of_the_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    """The slope is the derivative in the log-prob; 0.7 is a weight, which scales both."""
    old = f64(-1.5)
    new = (old + math.log(ratio)).requires_grad_()
    found = policy_loss(new, old, f64(advantage), f64(0.7), clip=0.2)
    found.sum().backward()
    assert error(found.detach(), [0.7 * loss]) <= BAR
    assert error(new.grad, [0.7 * slope]) <= BAR


def test_the_value_loss_is_half_the_larger_square() -> None:
    draw = torch.Generator().manual_seed(2)
    new, old, returns = torch.randn(3, 1000, generator=draw, dtype=torch.float64)
    found = value_loss(new, old, returns, clip=0.2)
    expected = []
    for value, before, target in zip(new.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = min(max(value, before - 0.2), before + 0.2)
        expected.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    assert error(found, expected) <= BAR


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (1.1, 3.0, 0.5 * 1.9**2, -1.9),  # within the clip of the old value, 1
        (2.0, 3.0, 0.5 * 1.8**2, 0),  # far in the right direction: no more
        (0.0, 3.0, 0.5 * 3.0**2, -3.0),  # far in the wrong one: back
        (0.0, -1.0, 0.5 * 1.8**2, 0),
        (2.0, -1.0, 0.5 * 3.0**2, 3.0),
        (4.0, 2.5, 0.5 * 1.5**2, 1.5),  # so far that it is past the target and worse than the clipped one
    ],
)
def test_each_side_of_the_value_clip(value: float, target: float, loss: float, slope: float) -> None:
    new = f64(value).requires_grad_()
    found = value_loss(new, f64(1.0), f64(target), clip=0.2)
    found.sum().backward()
    assert error(found.detach(), [loss]) <= BAR
    assert error(new.grad, [slope]) <= BAR


# --- weights and explained variance -----------------------------------------------------------------------------------


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    trainer, sampler = f64(-1.0, -1.0, -1.0, -0.1, -3.0, 0.0), f64(-1.0, -1.2, -0.7, -5.0, -3.5, -5000.0)
    found = importance_weights(trainer, sampler, cap=2.0)
    assert error(found, [1.0, math.exp(0.2), math.exp(-0.3), 2.0, math.exp(0.5), 2.0]) <= BAR
    assert found[3] == found[5] == 2.0


def test_explained_variance() -> None:
    draw = torch.Generator().manual_seed(4)
    returns, noise = torch.randn(2, 300, generator=draw, dtype=torch.float64)
    values = 0.5 * returns + 0.3 * noise + 2
    left = [target - value for target, value in zip(returns.tolist(), values.tolist(), strict=True)]
    expected = 1 - statistics.pvariance(left) / statistics.pvariance(returns.tolist())
    assert 0.1 < expected < 0.9
    assert abs(float(explained_variance(values, returns)) - expected) <= BAR
    assert float(explained_variance(returns, returns)) == 1
    assert abs(float(explained_variance(returns + 7, returns)) - 1) <= BAR, "a constant error is not variance"
    assert abs(float(explained_variance(torch.zeros_like(returns), returns))) <= BAR
    assert float(explained_variance(-returns, returns)) < 0
    assert float(explained_variance(f64(1.0, 1.0), f64(2.0, 2.0))) == 1, "nothing to explain, nothing unexplained"
