"""Answers from a model: the samplers that `sample`, `evaluate` and PPO share.

Token ids go in and token ids come out. An answer depends on the model, its prompt and its own seed, never on the other
rows of a batch or on what was sampled before it, so that a run which was killed samples the same answers again.

vLLM runs in a child process, never in this one: an engine that hangs, or whose cache holds NaNs, cannot be cured from
within, but a process can be killed and started again, and the same seeds ask for the same answers.

Left out: nucleus, top-k and repetition penalties. The log-prob of an answer is the one of the distribution that it was
drawn from, and what trains on it assumes the model's whole distribution at that temperature.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.stages.engine import Engine, Lost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Finish = Literal["stop", "length"]
"""Whether an answer ended with a stop id, or was cut off at `max_new_tokens`."""

CACHE_BYTES = 2**30
"""What the keys and values of one batch may take where nobody named a batch size."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for; an adapter of another rank takes the room of the next one."""

LEAST_TEMPERATURE = 0.01
"""What vLLM raises a lower temperature to, unless it is 0."""


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


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published LoRA adapter: what a sampler that does not share the trainer's model is given instead of it."""

    version: int
    """Grows with every one that is published."""
    folder: Path
    """What PEFT wrote; a new folder for each version, never changed afterwards."""


class Sampler(Protocol):
    """Whatever answers prompts: a model in this process, an engine in another one, a fake in a test."""

    needs_adapter: bool
    """Whether it has to be told of new weights by an adapter; otherwise it samples from the live model."""

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int | str] | None = None,
        adapter: Adapter | None = None,
    ) -> list[list[Rollout]]:
        """Return `n` answers for each prompt, in order.

        `keys` name the prompts in the seeds of their answers: counters, such as row numbers or episodes. None: the
        prompts' own content, so that equal prompts get equal answers. `adapter` is the version to answer with.
        """
        ...


class HFSampler:
    """Sample with a Transformers model in this process: one batch of left-padded rows, which leave it as they end."""

    needs_adapter: bool = False

    def __init__(self, model: Any, pad_id: int, micro_batch: int | None = None) -> None:
        self.model = model
        self.pad_id = pad_id
        self.micro_batch = micro_batch

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int | str] | None = None,
        adapter: Adapter | None = None,
    ) -> list[list[Rollout]]:
        if adapter is not None:
            raise ValueError(f"HFSampler answers with the live model, not with {adapter}")
        requests = _requests(prompt_ids, n, sampling, keys, context(self.model))
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


def _requests(
    prompt_ids: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    keys: Sequence[int | str] | None,
    limit: int | None,
) -> list[tuple[Sequence[int], int]]:
    """Return each answer's prompt and seed, the `n` answers of a prompt side by side; check that they fit."""
    check_lengths(prompt_ids, [f"prompt {i}" for i in range(len(prompt_ids))], sampling.max_new_tokens, limit)
    keys = [content_key(ids) for ids in prompt_ids] if keys is None else keys
    return [
        (prompt, request_seed(sampling.seed, key, answer))
        for prompt, key in zip(prompt_ids, keys, strict=True)
        for answer in range(n)
    ]


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


# --- vLLM -------------------------------------------------------------------------------------------------------------


class VLLMSampler:
    """Sample with vLLM in a child process, which starts with the first prompts and ends with this object.

    It holds the base; a LoRA adapter is swapped in for each version, megabytes instead of a whole model. An engine that
    dies, hangs or answers with NaNs is replaced by a new one, which gets the same adapter and the whole batch again.
    """

    needs_adapter: bool = True

    def __init__(
        self,
        model_folder: Path,
        *,
        max_length: int,
        max_lora_rank: int | None,
        dtype: Literal["float32", "bfloat16"],
        memory_share: float = 0.4,
        timeout_seconds: float = 600.0,
        start_seconds: float = 1800.0,
        restarts: int = 2,
        log: Path | None = None,
        quantize: Literal["4bit"] | None = None,
    ) -> None:
        """Check what can be checked without an engine.

        `max_length`: tokens of a prompt and its answer. `max_lora_rank`: None serves the base alone. `memory_share`: of
        the whole GPU. `timeout_seconds`: the longest silence of an engine; it says once a second that it still works.
        `restarts`: how often in a row a new engine is tried. `log`: where what vLLM prints is kept.
        """
        check_installed()
        if not (model_folder / "config.json").is_file():
            raise AlignError(
                f"sampler: vllm: {model_folder}: no config.json in it; it must be a folder of whole weights"
            )
        self.max_length = max_length
        self.max_lora_rank = None if max_lora_rank is None else lora_room(max_lora_rank)
        self.timeout_seconds = timeout_seconds
        self.start_seconds = start_seconds
        self.restarts = restarts
        self.log = log
        self._arguments: dict[str, Any] = {
            "model": str(model_folder),
            "dtype": dtype,
            "max_model_len": max_length,
            "gpu_memory_utilization": memory_share,
            "quantization": "bitsandbytes" if quantize == "4bit" else None,
            "max_lora_rank": self.max_lora_rank,
        }
        self._engine: Engine | None = None
        self._checked: Adapter | None = None

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int | str] | None = None,
        adapter: Adapter | None = None,
    ) -> list[list[Rollout]]:
        """Return `n` answers for each prompt, in order; without an adapter, the base's own."""
        requests = _requests(prompt_ids, n, sampling, keys, self.max_length)
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise AlignError(
                f"temperature: {sampling.temperature}: vLLM draws at {LEAST_TEMPERATURE} or above, or at 0; change it, "
                "or set sampler: transformers"
            )
        self._check(adapter)
        message = {
            "do": "sample",
            "prompts": [[int(token) for token in ids] for ids in prompt_ids],
            "seeds": [seed for _, seed in requests],
            "n": n,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_ids": sorted(sampling.stop_ids),
            "temperature": sampling.temperature,
        }
        answers = self._answers(message, adapter) if requests else []
        return [answers[i * n : (i + 1) * n] for i in range(len(prompt_ids))]

    @property
    def pid(self) -> int | None:
        """Return the process id of the engine, while there is one."""
        return None if self._engine is None else self._engine.process.pid

    def close(self) -> None:
        """End the engine; the next call of `sample` starts another one."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, adapter: Adapter | None) -> None:
        """Refuse an adapter that the engine would serve wrongly, before the engine sees it."""
        if adapter is None or adapter == self._checked:
            return
        if self.max_lora_rank is None:
            raise ValueError(f"a VLLMSampler without max_lora_rank serves the base alone, not {adapter}")
        if self._checked is not None and adapter.folder == self._checked.folder:
            raise ValueError(f"{adapter} has the folder of version {self._checked.version}; write each to its own")
        check_adapter(adapter.folder, self.max_lora_rank)
        self._checked = adapter

    def _answers(self, message: dict[str, Any], adapter: Adapter | None) -> list[Rollout]:
        """Ask until an engine answers, a new one each time that one is lost."""
        lost = 0
        while True:
            try:
                engine = self._engine or self._start()
                lora = None if adapter is None else engine.swap(adapter.version, adapter.folder, self.timeout_seconds)
                return _rollouts(engine.ask({**message, "lora": lora}, self.timeout_seconds))
            except Lost as error:
                lost += 1
                end = self._log_end()
                self.close()
                if lost > self.restarts:
                    raise AlignError(
                        f"sampler: vllm: the engine failed {lost} times in a row, at last because {error}; lower "
                        f"max_new_tokens, change launch.vllm_memory, or set sampler: transformers{end}"
                    ) from error
                print(f"sampler: vllm: {error}; new engine {lost} of {self.restarts}, same batch", file=sys.stderr)
            except AlignError:  # an adapter that the engine refused, and survived; or it did not start
                raise
            except BaseException:  # Ctrl-C: its answer would be taken for that of the next question
                self.close()
                raise

    def _start(self) -> Engine:
        """Return a new engine that has answered one prompt."""
        self._engine = Engine(self.log)
        try:
            problem = self._engine.ask({"start": self._arguments}, self.start_seconds).get("error")
        except Lost as error:
            problem = str(error)
        if problem:
            end = self._log_end()
            self.close()
            raise AlignError(
                f"sampler: vllm: the engine did not start: {problem}; where memory is short change launch.vllm_memory, "
                "where the model's context is, lower max_new_tokens; a model that vLLM does not serve needs sampler: "
                f"transformers{end}"
            )
        return self._engine

    def _log_end(self) -> str:
        """Return the end of the engine's log, to go below a message."""
        lines = [] if self._engine is None else self._engine.last_lines()
        name = "its log" if self.log is None else str(self.log)
        return "".join([f". The end of {name}:", *(f"\n  {line}" for line in lines)]) if lines else ""


def check_installed() -> None:
    """Raise AlignError unless vLLM is there."""
    if find_spec("vllm") is None:
        raise AlignError(
            "sampler: vllm needs vLLM; run pip install 'align-pipeline[vllm]', or set sampler: transformers"
        )


def lora_room(rank: int) -> int:
    """Return the rank that vLLM must be started with to serve adapters of `rank`."""
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        raise AlignError(
            f"lora.r: {rank}: vLLM serves ranks up to {LORA_RANKS[-1]}; lower lora.r, or set sampler: transformers"
        )
    return room


def check_swappable(settings: Mapping[str, Any], max_lora_rank: int = LORA_RANKS[-1]) -> None:
    """Raise AlignError naming what vLLM refuses, or leaves out in silence, of an adapter with this configuration.

    `settings` is the content of an `adapter_config.json`.
    """
    problems = []
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        problems.append(f"peft_type: {kind}; train a LoRA adapter")
    if (rank := settings.get("r") or 0) > max_lora_rank:
        problems.append(f"r: {rank}: the engine has room for rank {max_lora_rank}; lower lora.r")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias: {settings['bias']}; train without biases")
    # vLLM reads neither of the patterns: every layer would be scaled by alpha / r.
    for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if settings.get(name):
            problems.append(f"{name}: {settings[name]}; train without it")
    for name in ("target_parameters", "trainable_token_indices", "alora_invocation_tokens"):
        if settings.get(name):
            problems.append(f"{name}: given; train without it")
    targets = settings.get("target_modules") or ()
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        if re.search(r"\b(lm_head|embed_tokens|embed_out|wte)\b", target):
            problems.append(
                f"target_modules: {target}; leave the embedding and the output head out of lora.target_modules"
            )
    if problems:
        raise AlignError(
            "\n".join(f"adapter_config.json: {problem}, or set sampler: transformers" for problem in problems)
        )


def check_adapter(folder: Path, max_lora_rank: int) -> None:
    """Raise AlignError unless vLLM can serve this adapter and each of its numbers is finite.

    One NaN is enough to spoil an engine: it stays in the cache of keys and values, for other adapters as well.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    try:
        check_swappable(json.loads((folder / "adapter_config.json").read_text("utf-8")), max_lora_rank)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            for name in names:
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise AlignError(f"{path}: {name}: not finite, training diverged; lower learning_rate")
                if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                    raise AlignError(
                        f"{path}: {name}: vLLM serves LoRA matrices of linear layers only; retrain without it"
                    )
                if name.endswith(".lora_A.weight") and len(tensor) > max_lora_rank:
                    raise AlignError(
                        f"{path}: {name}: rank {len(tensor)}, the engine has room for {max_lora_rank}; lower lora.r"
                    )
    except (OSError, ValueError, SafetensorError) as error:
        raise AlignError(f"{folder}: not a readable adapter ({error}); publish it again") from error
    if not names:
        raise AlignError(f"{path}: it holds no tensors; publish it again")


def _rollouts(answer: Mapping[str, Any]) -> list[Rollout]:
    """Return what the engine drew; raise Lost when its numbers are none, since its cache may hold more of them."""
    drawn = [Rollout(tuple(ids), tuple(logprobs), finish) for ids, logprobs, finish in answer["answers"]]
    if not all(math.isfinite(value) for rollout in drawn for value in rollout.logprobs):
        raise Lost("the engine answered with log-probs that are not finite")
    return drawn
