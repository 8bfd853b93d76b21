"""The mathematics of PPO: tensors in, tensors out. No model, no configuration, no device, no logging.

Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2016 (GAE, arXiv:1506.02438), Ziegler et al. 2019
(fine-tuning from preferences, arXiv:1909.08593), Huang et al. 2024 (the N+ details, arXiv:2403.17031), Schulman 2020
(approximating KL divergence: k1 and k3).

Shapes: B answers, T tokens, an answer's tokens on the left and junk after them; `mask` is true where a token is real.
Whatever stands under a false mask never reaches a result. Losses are one number a token, so that who sums them up
decides what they are divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return log p - log q of drawn tokens, in nats: unbiased for KL(p || q), and right inside a reward."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return q/p - 1 - log(q/p), in nats: unbiased and never negative, so it is good to look at.

    Inside a reward it is wrong: the gradient of its expectation is not that of the KL.
    """
    difference = reference - logprobs
    return difference.exp() - 1 - difference


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of each token, (B, T): -kl_coef * KL, and the score (B,) on the last real token.

    Ziegler et al. 2019, equation 2.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.long().cumsum(-1).argmax(-1)  # the first place where the count is whole: the last real token, (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both (B, T), 0 where the mask is false.

    Schulman et al. 2016, equation 16, backwards. `values[:, t]` is the value of what stands before token t. A masked
    token in between is as if it were not there. After the last token the value is 0, for an answer that was cut off
    as well: what a cut costs is for `missing_eos_penalty` to say.
    """
    advantages = torch.zeros_like(rewards)
    carry = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * carry
        advantages[:, t] = torch.where(real, advantage, 0.0)
        carry = torch.where(real, advantage, carry)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return values (B, T) scaled to variance 1 over all real tokens, and to mean 0 unless `shift_mean` is false."""
    real = values[mask]
    mean = real.mean()
    variance = (real - mean).square().sum() / max(real.numel() - 1, 1)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, 0.0)


def importance_weights(trainer: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """Return min(p_trainer / p_sampler, cap) of drawn tokens, from their log-probs.

    Corrects for answers that were drawn by other arithmetic than the one that trains on them (truncated importance
    sampling: Ionides 2008; for language models Yao et al. 2025).
    """
    return (trainer - sampler).exp().clamp(max=cap)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Return the clipped surrogate loss of each token (Schulman et al. 2017, equation 7), times its weight."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return weights * torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return the clipped squared error of each token's value: half the larger of the two (Huang et al. 2024, 10)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) of real tokens, (N,): 1 is perfect, 0 is a constant."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
