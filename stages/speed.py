"""How fast a model answers: the time to its first token, and tokens and requests a second, alone and 16 at once.

What is asked are the evaluation's prompts with their tokens shuffled, so that no cache of prefixes helps and every
model reads the same. Each answer has NEW_TOKENS tokens, the most likely ones, whatever they are: models that would end
sooner gain nothing. A first token is there when a request for one token is answered: it was sent, read and drawn, and
the id came back. 16 at once are sent together, and the next 16 when all are answered; with answers of one length no
place would be free any sooner. What is timed is the sampler's `sample`, by the clock; WARM_UP rounds come before.

Every figure is of REPEATS rounds, with the 95 % interval of a quantile (`statistics.quantile_interval`). It says what
this machine did in those minutes: work beside it counts.

Left out: requests at random times, answers of unequal lengths, and the time that tokens take to become text.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import fmean
from typing import Any, Literal

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.files import write_json
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages.rollout import Adapter, HFSampler, Sampler, Sampling, VLLMSampler
from align_pipeline.stages.statistics import quantile_interval

EngineName = Literal["vllm", "transformers"]

NEW_TOKENS = 32
AT_ONCE = (1, 16)
WARM_UP = 3
REPEATS = 100
"""Rounds of each kind: a 95th percentile has an interval from 59 on."""


def engine_for(wanted: Literal["auto"] | EngineName) -> EngineName:
    """Return what answers: with `auto`, vLLM where it is installed beside a GPU."""
    import torch

    if wanted == "auto":
        return "vllm" if find_spec("vllm") is not None and torch.cuda.is_available() else "transformers"
    return wanted


def problem_with(wanted: Literal["auto"] | EngineName | None) -> str | None:
    """Say what is missing for an engine; None when nothing is."""
    if wanted == "vllm" and find_spec("vllm") is None:
        return "vllm needs vLLM; run pip install 'align-pipeline[vllm]', or set transformers"
    return None


def speeds(
    engine: EngineName, sources: Mapping[str, Resolved], prompts: Sequence[Sequence[int]], pad_id: int, work: Work
) -> dict[str, Any]:
    """Return how fast each model answers, and with what; what was measured of one is kept in scratch."""
    import torch

    from align_pipeline.stages.models import compute_dtype, context, device

    limit = min((size for source in sources.values() if (size := context(source))), default=None)
    prompts = [ids[: None if limit is None else max(1, limit - NEW_TOKENS)] for ids in prompts]
    found = {}
    for number, (name, source) in enumerate(sources.items()):
        work.log(step=number, total=len(sources), model=f"speed of {name}")
        done = work.scratch / name / f"speed-{engine}.json"
        if not done.exists():
            try:
                with serving(source, engine, pad_id, max(map(len, prompts)), work) as (sampler, adapter):
                    write_json(done, speed(sampler, prompts, adapter))
            except AlignError as error:
                rule = "its speed cannot be measured; set how.speed: transformers, or leave it out"
                raise AlignError(f"models.{name}: {rule}: {error}") from error
        found[name] = json.loads(done.read_text(encoding="utf-8"))
    where = device()
    return {
        "engine": engine,
        "device": torch.cuda.get_device_name() if where.startswith("cuda") else where,
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "prompt_tokens": round(fmean(map(len, prompts)), 1),
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "models": found,
    }


@contextmanager
def serving(
    source: Resolved, engine: EngineName, pad_id: int, longest: int, work: Work
) -> Iterator[tuple[Sampler, Adapter | None]]:
    """Yield a sampler that holds nothing but this model, and the adapter that it answers with."""
    import torch

    from align_pipeline.stages.models import adapter_folder, compute_dtype, load_causal, weights_folder

    if engine == "transformers":
        yield HFSampler(load_causal(source), pad_id), None
        return
    torch.cuda.empty_cache()  # what this process kept of models that it held is the engine's now
    folder = adapter_folder(source)
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8")) if folder else {}
    with VLLMSampler(
        weights_folder(source),
        max_length=longest + NEW_TOKENS,
        max_lora_rank=settings.get("r"),
        dtype="float32" if compute_dtype() == torch.float32 else "bfloat16",
        memory_share=work.launch.vllm_memory,
        log=work.scratch / "engine.log",
    ) as sampler:
        yield sampler, Adapter(1, folder) if folder else None


def speed(sampler: Sampler, prompts: Sequence[Sequence[int]], adapter: Adapter | None = None) -> dict[str, Any]:
    """Return the figures of one model, by how many requests there are at once."""
    found = {}
    for at_once in AT_ONCE:
        first, whole = (_seconds(sampler, prompts, at_once, tokens, adapter) for tokens in (1, NEW_TOKENS))
        found[str(at_once)] = figures(first, whole, at_once)
    return found


def _seconds(
    sampler: Sampler, prompts: Sequence[Sequence[int]], at_once: int, tokens: int, adapter: Adapter | None
) -> list[float]:
    """Return how long each round took: so many requests for so many tokens."""
    sampling = Sampling(tokens, frozenset(), temperature=0.0)
    found = []
    for number in range(WARM_UP + REPEATS):
        draw = random.Random(f"{at_once}/{tokens}/{number}")
        places = range(number * at_once, (number + 1) * at_once)
        asked = [draw.sample(prompts[place % len(prompts)], len(prompts[place % len(prompts)])) for place in places]
        began = time.perf_counter()
        sampler.sample(asked, 1, sampling, adapter=adapter)
        found.append(time.perf_counter() - began)
    return found[WARM_UP:]


def figures(first: Sequence[float], whole: Sequence[float], at_once: int) -> dict[str, Any]:
    """Return quantiles of the seconds to first tokens and to whole answers, and the rates of the median round."""
    median = _quantile(whole, 0.5)
    seconds = (median["value"], median["high"], median["low"])  # the longest time is the lowest rate
    return {
        "first_token_seconds": {"p50": _quantile(first, 0.5), "p95": _quantile(first, 0.95)},
        "answer_seconds": {"p50": median, "p95": _quantile(whole, 0.95)},
        "requests_per_second": _named(at_once / one for one in seconds),
        "tokens_per_second": _named(at_once * NEW_TOKENS / one for one in seconds),
    }


def _quantile(values: Sequence[float], share: float) -> dict[str, float]:
    import numpy as np

    return _named((np.quantile(values, share), *quantile_interval(values, share)))


def _named(values: Iterable[float]) -> dict[str, float]:
    return {name: float(f"{one:.4g}") for name, one in zip(("value", "low", "high"), values, strict=True)}
