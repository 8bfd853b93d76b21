"""Log-probabilities of chosen tokens, without ever keeping a (B, T, V) tensor.

The logits of a few hundred positions at a time are made, read and dropped. Their gradient is worked out while they are
there: that of log p(y) in a hidden state h is W[y] - sum_v p(v) W[v], as large as h itself, and what comes from above
only scales it. So a frozen head is multiplied twice a token, not three times, and nothing of its size is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**22
"""Numbers in one chunk of logits on a CPU, 16 MiB in float32, which its caches still help with; a GPU takes more."""
_ON_GPU = 16


@dataclass(frozen=True)
class Scaling:
    """What lies between a head's product and the logits: some families scale them, some cap them, sampling heats."""

    factor: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: Any, temperature: float = 1.0) -> Scaling:
        """Read the scalings that Cohere, Falcon-H1, Granite, HyperCLOVA X and Gemma put on their logits."""
        factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        scaling = getattr(config, "logits_scaling", None) or 1.0
        # Granite divides by what HyperCLOVA X multiplies with.
        factor = factor * scaling if getattr(config, "model_type", None) == "hyperclovax" else factor / scaling
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(factor, cap or None, temperature)

    def logits(self, products: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return logits and their derivative in the products, both (C, V); the products are overwritten."""
        if self.cap is None:
            factor = self.factor / self.temperature
            return (products if factor == 1.0 else products.mul_(factor)), factor
        inner = products.mul_(self.factor / self.cap).tanh_()
        slope = (1 - inner.square()).mul_(self.factor / self.temperature)
        return inner * (self.cap / self.temperature), slope


def chosen_log_probs(
    states: Tensor, targets: Tensor, head: torch.nn.Linear, scaling: Scaling = Scaling()
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy of each distribution, in nats and float32, both (N,).

    `states` (N, H) are what the head reads, `targets` (N,) token ids. Gradients flow to the states and the head
    through the log-probs; the entropy has none.
    """
    return _ChosenLogProbs.apply(states.to(head.weight.dtype), targets, head.weight, head.bias, scaling)  # type: ignore[no-any-return]


class _ChosenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        logprobs = states.new_empty(len(states), dtype=torch.float32)  # (N,)
        entropy = torch.empty_like(logprobs)  # (N,)
        wanted = context.needs_input_grad[0]
        gradient = torch.empty_like(states) if wanted else None  # (N, H)
        for part in _chunks(states, weight):
            logits, slope, normaliser = _logits(states[part], weight, bias, scaling)
            chosen = targets[part, None]
            logprobs[part] = logits.gather(-1, chosen).squeeze(-1) - normaliser.squeeze(-1)
            probabilities = (logits - normaliser).exp_()  # (C, V)
            entropy[part] = normaliser.squeeze(-1) - (probabilities * logits).sum(-1)
            if gradient is not None:
                gradient[part] = _slopes(probabilities, chosen, slope).to(weight.dtype) @ weight
        context.mark_non_differentiable(entropy)
        context.save_for_backward(gradient, states, targets, weight, bias)
        context.scaling = scaling
        return logprobs, entropy

    @staticmethod
    def backward(context: Any, *above: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        gradient, states, targets, weight, bias = context.saved_tensors
        each = above[0]  # (N,)
        for_states = gradient * each[:, None].to(gradient.dtype) if context.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if context.needs_input_grad[2] else None
        for_bias = torch.zeros_like(bias) if context.needs_input_grad[3] else None
        if for_weight is not None or for_bias is not None:
            for part in _chunks(states, weight):
                logits, slope, normaliser = _logits(states[part], weight, bias, context.scaling)
                slopes = _slopes((logits - normaliser).exp_(), targets[part, None], slope)
                slopes = (slopes * each[part, None]).to(weight.dtype)  # (C, V)
                if for_weight is not None:
                    for_weight.addmm_(slopes.T, states[part])
                if for_bias is not None:
                    for_bias += slopes.sum(0)
        return for_states, None, for_weight, for_bias, None


def _chunks(states: Tensor, weight: Tensor) -> list[slice]:
    numbers = LOGITS_AT_ONCE if states.device.type == "cpu" else LOGITS_AT_ONCE * _ON_GPU
    size = max(1, numbers // len(weight))
    return [slice(start, min(start + size, len(states))) for start in range(0, len(states), size)]


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Return logits (C, V) in float32, their derivative in the head's products, and log sum exp (C, 1)."""
    logits, slope = scaling.logits(torch.nn.functional.linear(states, weight, bias).float())
    return logits, slope, logits.logsumexp(-1, keepdim=True)


def _slopes(probabilities: Tensor, chosen: Tensor, slope: Tensor | float) -> Tensor:
    """Return the derivative of log p(chosen) in the head's products, (C, V), overwriting the probabilities."""
    slopes = probabilities.neg_()
    slopes.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=slopes.dtype))
    return slopes if isinstance(slope, float) and slope == 1.0 else slopes.mul_(slope)
