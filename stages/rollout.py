"""Answers from a model: the sampler that `sample`, `evaluate` and PPO share, and the only door to an inference engine.

Token ids go in and token ids come out. An answer depends on the model, its prompt and its own seed, never on the other
rows of a batch or on what was sampled before it, so that a run which was killed samples the same answers again.

Left out: nucleus, top-k and repetition penalties. The log-prob of an answer is the one of the distribution that it was
drawn from, and what trains on it assumes the model's whole distribution at that temperature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from align_pipeline.pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Finish = Literal["stop", "length"]
"""Whether an answer ended with a stop id, or was cut off at `max_new_tokens`."""

CACHE_BYTES = 2**30
"""What the keys and values of one batch may take where nobody named a batch size."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    """Tokens after which an answer is cut off; its stop id counts."""
    stop_ids: frozenset[int]
    """The ids that end an answer; the one that did is the answer's last id."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    seed: int = 0
    """Together with the key of a prompt and the number of the answer, the seed of one answer."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """In nats, one for each id: of the distribution that it was drawn from; at temperature 0, of the model's own."""
    finish: Finish


class Sampler(Protocol):
    """Whatever answers prompts: a model in this process, an engine in another one, a fake in a test."""

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], n: int, sampling: Sampling, keys: Sequence[int | str] | None = None
    ) -> list[list[Rollout]]:
        """Return `n` answers for each prompt, in order.

        `keys` name the prompts in the seeds of their answers: counters, such as row numbers or episodes. None: the
        prompts' own content, so that equal prompts get equal answers.
        """
        ...


class HFSampler:
    """Sample with a Transformers model in this process: one batch of left-padded rows, which leave it as they end."""

    def __init__(self, model: Any, pad_id: int, micro_batch: int | None = None) -> None:
        self.model = model
        self.pad_id = pad_id
        self.micro_batch = micro_batch

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], n: int, sampling: Sampling, keys: Sequence[int | str] | None = None
    ) -> list[list[Rollout]]:
        check_lengths(
            prompt_ids, [f"prompt {i}" for i in range(len(prompt_ids))], sampling.max_new_tokens, context(self.model)
        )
        keys = [content_key(ids) for ids in prompt_ids] if keys is None else keys
        requests = [
            (prompt, request_seed(sampling.seed, key, answer))
            for prompt, key in zip(prompt_ids, keys, strict=True)
            for answer in range(n)
        ]
        # Prompts of one length share a batch: less padding. The sort is stable, so the order is always the same.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        longest = max((len(prompt) for prompt in prompt_ids), default=0) + sampling.max_new_tokens
        rows = self.micro_batch or rows_that_fit(self.model, longest)
        answers: dict[int, Rollout] = {}
        with evaluating(self.model):
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                drawn = _decode(self.model, [requests[i] for i in batch], self.pad_id, sampling)
                answers.update(zip(batch, drawn, strict=True))
        return [[answers[i * n + answer] for answer in range(n)] for i in range(len(prompt_ids))]


def content_key(ids: Sequence[int]) -> str:
    """Return a digest of token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def request_seed(seed: int, key: int | str, answer: int) -> int:
    """Return the seed of one answer: 63 bits that depend on nothing but these counters."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{answer}".encode()).digest()[:8], "big") >> 1


def context(model: Any) -> int | None:
    """Return how many positions a model has; None when its configuration names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_lengths(
    prompt_ids: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int, limit: int | None
) -> None:
    """Raise DataError naming each prompt that is empty or leaves no room for its answer."""
    problems = []
    for ids, name in zip(prompt_ids, names, strict=True):
        if not ids:
            problems.append(f"{name}: prompt: no tokens, a model answers at least one; drop the row")
        elif limit is not None and len(ids) + max_new_tokens > limit:
            problems.append(
                f"{name}: prompt: {len(ids)} tokens + max_new_tokens {max_new_tokens} = {len(ids) + max_new_tokens}, "
                f"the model has {limit} positions; shorten the prompt or lower max_new_tokens"
            )
    if problems:
        raise DataError(problems)


def rows_that_fit(model: Any, tokens: int) -> int:
    """Return how many rows of `tokens` tokens to decode at once: at most 256, and few enough for their cache."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize
    return max(1, min(256, int(CACHE_BYTES // (bytes_per_token * max(tokens, 1)))))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradients off, and leave the model as it was found."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _decode(
    model: Any, requests: Sequence[tuple[Sequence[int], int]], pad_id: int, sampling: Sampling
) -> list[Rollout]:
    """Answer one batch of (prompt ids, seed): one forward pass a token, with a cache of keys and values."""
    import torch
    from transformers import DynamicCache

    device = next(model.parameters()).device
    input_ids, mask = left_pad([prompt for prompt, _ in requests], pad_id, device)  # (B, P)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, P)
    noise = _uniforms([seed for _, seed in requests], sampling).to(device)  # (B, T), or (B, 0) when greedy
    stops = torch.tensor(sorted(sampling.stop_ids), dtype=torch.long, device=device)
    cache: Any = DynamicCache(config=model.config.get_text_config())

    rows = torch.arange(len(requests), device=device)  # of the requests that still run, (b,)
    ids = torch.full((len(requests), sampling.max_new_tokens), pad_id, dtype=torch.long, device=device)  # (B, T)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=device)  # (B, T)
    lengths = torch.full((len(requests),), sampling.max_new_tokens, device=device)  # (B,)
    ended = torch.zeros(len(requests), dtype=torch.bool, device=device)  # (B,)
    for step in range(sampling.max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (b, V)
        chosen, logprob = draw(logits, sampling.temperature, noise[rows, step] if sampling.temperature > 0 else None)
        ids[rows, step], logprobs[rows, step] = chosen, logprob
        stopped = torch.isin(chosen, stops)
        lengths[rows[stopped]], ended[rows[stopped]] = step + 1, True
        if stopped.any():
            keep = (~stopped).nonzero().squeeze(-1)
            if not len(keep):
                break
            rows, chosen, mask, positions = rows[keep], chosen[keep], mask[keep], positions[keep]
            cache.reorder_cache(keep)
        input_ids = chosen.unsqueeze(-1)
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), -1)
        positions = positions[:, -1:] + 1

    return [
        Rollout(tuple(row[:length]), tuple(values[:length]), "stop" if end else "length")
        for row, values, length, end in zip(
            ids.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True
        )
    ]


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both (B, P), with the padding on the left."""
    import torch

    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from logits (B, V) and uniform numbers (B,): its id and its log-prob, both (B,).

    The inverse of the cumulative distribution, in float64: each row uses its own number only, so that a row's token
    does not depend on its neighbours. Temperature 0 takes the first most likely token and the model's own log-prob.
    """
    import torch

    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)  # (B, V)
    if uniform is None:
        chosen = logprobs.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)  # (B, V)
        aim = uniform.unsqueeze(-1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, aim, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return chosen, logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def _uniforms(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Return a row of uniform numbers for each seed, (B, T): drawn on the CPU, so the same wherever the model is."""
    import torch

    if sampling.temperature == 0:
        return torch.zeros(len(seeds), 0, dtype=torch.float64)
    generator = torch.Generator()
    return torch.stack(
        [
            torch.rand(sampling.max_new_tokens, generator=generator.manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )
