"""Speeds: figures of a clock that a test turns, real samplers, and nothing of it in the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import speed
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.rollout import Rollout, Sampling

from .conftest import files, rows_file

PROMPTS = [list(range(20 * number, 23 * number)) for number in range(1, 6)]


class Clocked:
    """A sampler that takes 10 ms for a first token, 2 ms for each further one, twice that for 16, and a while more."""

    needs_adapter = False

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[tuple[Sequence[Sequence[int]], Sampling]] = []

    def sample(self, prompts: Any, n: int, sampling: Sampling, keys: Any = None, adapter: Any = None) -> Any:
        number = len(self.asked) % (speed.WARM_UP + speed.REPEATS)
        self.asked.append((prompts, sampling))
        late = 100.0 if number < speed.WARM_UP else (number - speed.WARM_UP) / 1e4
        self.now += (0.01 + 0.002 * (sampling.max_new_tokens - 1)) * (1 + len(prompts) // 16) + late
        return [[Rollout((1,) * sampling.max_new_tokens, (), "length")] for _ in prompts]


def test_figures_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Clocked()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: sampler.now)
    found = speed.speed(sampler, PROMPTS)

    late = [number / 1e4 for number in range(100)]  # the rounds of the warm-up are not among them
    for at_once, times in ((1, 1), (16, 2)):
        figures = found[str(at_once)]
        whole = (0.01 + 0.002 * 31) * times + median(late)
        assert figures["first_token_seconds"]["p50"]["value"] == pytest.approx(0.01 * times + median(late), rel=1e-3)
        assert figures["first_token_seconds"]["p95"]["value"] == pytest.approx(0.01 * times + 0.00940, abs=1e-4)
        assert figures["answer_seconds"]["p50"]["value"] == pytest.approx(whole, rel=1e-3)
        assert figures["requests_per_second"]["value"] == pytest.approx(at_once / whole, rel=1e-3)
        assert figures["tokens_per_second"]["value"] == pytest.approx(at_once * 32 / whole, rel=1e-3)
        for one in (*figures["first_token_seconds"].values(), figures["tokens_per_second"]):
            assert one["low"] < one["value"] < one["high"]

    kinds = [(len(prompts), sampling.max_new_tokens) for prompts, sampling in sampler.asked]
    assert kinds == [(n, tokens) for n in (1, 16) for tokens in (1, 32) for _ in range(103)]
    assert {(sampling.temperature, sampling.stop_ids) for _, sampling in sampler.asked} == {(0.0, frozenset())}
    for start in range(0, len(sampler.asked), 103):
        flat = [ids for prompts, _ in sampler.asked[start : start + 103] for ids in prompts]
        for place, ids in enumerate(flat):
            assert sorted(ids) == PROMPTS[place % 5], "the evaluation's prompts in turn, their tokens in another order"
        longest = [tuple(ids) for ids in flat[4::5]]
        assert len(set(longest)) == len(longest) >= 20


@pytest.fixture
def inputs(base: Resolved, tmp_path: Path) -> dict[str, Resolved]:
    (tmp_path / "speed_rules.py").write_text(
        "def length(completions, **_):\n    return [len(c) for c in completions]\n"
    )
    rule = "speed_rules:length"
    scorer = Resolved(ref=rule, digest="sha256:" + "d" * 64, function=rule, search_path=str(tmp_path))
    prompts = rows_file(tmp_path, [{"prompt": "where is bread?"}, {"prompt": "milk"}])
    return {"models.new": base, "models.old": base, "scorer": scorer, "prompts": prompts}


def stage(**how: Any) -> Evaluate:
    return Evaluate(
        models={"new": "stage:new", "old": "stage:old"},
        baseline="old",
        scorer="speed_rules:length",
        prompts="file:rows.jsonl",
        max_new_tokens=4,
        how=how,
    )


def test_an_evaluation_with_speeds_is_the_same_evaluation(
    inputs: dict[str, Resolved], work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"NEW_TOKENS": 2, "REPEATS": 59, "WARM_UP": 1}.items():
        monkeypatch.setattr(speed, name, few)
    plain, timed = work("plain"), work("timed")
    metrics = stage().run(inputs, plain)
    assert stage(speed="transformers").run(inputs, timed) == metrics
    assert files(timed.out) == files(plain.out)
    assert not (plain.scratch / "resources.json").exists()
    kept = json.loads((timed.scratch / "resources.json").read_text("utf-8"))["speed"]
    about = {name: kept[name] for name in ("engine", "dtype", "new_tokens", "repeats")}
    assert about == {"engine": "transformers", "dtype": "float32", "new_tokens": 2, "repeats": 59}
    assert list(kept["models"]) == ["new", "old"]
    for figures in kept["models"].values():
        assert list(figures) == ["1", "16"]
        assert 0 < figures["1"]["first_token_seconds"]["p50"]["value"] < figures["1"]["answer_seconds"]["p50"]["value"]
        assert figures["16"]["tokens_per_second"]["value"] > 2 * figures["1"]["tokens_per_second"]["value"]

    def never(*_: Any) -> Any:
        raise AssertionError("a model was asked again")

    monkeypatch.setattr(speed, "speed", never)
    stage(speed="auto").run(inputs, timed)
    assert json.loads((timed.scratch / "resources.json").read_text("utf-8"))["speed"] == kept


def test_an_engine_that_is_not_there_is_missed_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    problem = "vllm needs vLLM; run pip install 'align-pipeline[vllm]', or set transformers"
    assert stage(speed="vllm").look({}) == {"how.speed": [problem]}
    assert stage(speed="auto").look({}) == stage().look({}) == {}
    assert speed.engine_for("auto") == "transformers"
    with pytest.raises(ValidationError, match="'auto', 'vllm' or 'transformers'"):
        stage(speed=True)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_serves_a_base_and_an_adapter(
    adapted: Callable[..., Resolved], inputs: dict[str, Resolved], work: Callable[..., Work]
) -> None:
    import torch

    adapter = adapted(torch.float32)
    here = work()
    stage(speed="vllm").run({**inputs, "models.new": adapter, "models.old": adapter.plain}, here)
    kept = json.loads((here.scratch / "resources.json").read_text("utf-8"))["speed"]
    print(json.dumps(kept, indent=1))
    assert (kept["engine"], kept["new_tokens"]) == ("vllm", 32)
    for figures in kept["models"].values():
        for at_once in ("1", "16"):
            assert (
                figures[at_once]["first_token_seconds"]["p50"]["value"]
                < figures[at_once]["answer_seconds"]["p50"]["value"]
            )
        assert figures["16"]["tokens_per_second"]["value"] > figures["1"]["tokens_per_second"]["value"]
