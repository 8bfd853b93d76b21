"""The sampler: what it draws, what it says about it, and that a batch changes neither."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from align_pipeline.pipeline.errors import DataError
from align_pipeline.stages import rollout
from align_pipeline.stages.rollout import HFSampler, Rollout, Sampling, draw

PAD, STOP = 0, 3


def tiny(vocabulary: int = 48, positions: int = 64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        pad_token_id=PAD,
        eos_token_id=STOP,
        initializer_range=0.3,  # far from uniform, so that a wrong position or mask shows
    )
    return LlamaForCausalLM(config).eval()


def tiny_with_absolute_positions() -> Any:
    """A model to which the first position matters: rotary ones forgive an offset."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=STOP
    )
    return GPT2LMHeadModel(config).eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 48) for _ in range(draw.randrange(1, 20))] for _ in range(count)]


def ids_of(answers: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[answer.ids for answer in row] for row in answers]


@pytest.mark.parametrize("make", [tiny, tiny_with_absolute_positions])
def test_a_prompt_gets_the_same_answers_in_every_batch(make: Callable[[], Any]) -> None:
    model, asked, sampling = make(), prompts(9), Sampling(24, frozenset({STOP, 5}), seed=7)
    alone = [HFSampler(model, PAD).sample([ids], 3, sampling)[0] for ids in asked]
    answers = [answer for row in alone for answer in row]
    assert {answer.finish for answer in answers} == {"stop", "length"}, "both ends should occur here"
    for answer in answers:
        assert (answer.finish == "stop") == (answer.ids[-1] in sampling.stop_ids)
        assert not sampling.stop_ids & set(answer.ids[:-1])
        assert len(answer.ids) == len(answer.logprobs) <= 24
        assert answer.finish == "stop" or len(answer.ids) == 24
    assert len({answer.ids for answer in alone[0]}) > 1, "the answers to one prompt should differ"
    for micro_batch in (1, 7, None):
        together = HFSampler(model, PAD, micro_batch).sample(asked, 3, sampling)
        assert ids_of(together) == ids_of(alone)
        for row, expected in zip(together, alone, strict=True):
            for answer, other in zip(row, expected, strict=True):
                assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    backwards = HFSampler(model, PAD, 7).sample(asked[::-1], 3, sampling)[::-1]
    assert ids_of(backwards) == ids_of(alone)
    fewer = HFSampler(model, PAD).sample(asked, 2, sampling)
    assert ids_of(fewer) == [row[:2] for row in ids_of(alone)], "asking for more must not change the first answers"


def test_keys_and_seeds_tell_equal_prompts_apart() -> None:
    sampler, sampling = HFSampler(tiny(), PAD), Sampling(16, frozenset({STOP}), seed=1)
    twice = sampler.sample([[8, 9], [8, 9]], 1, sampling)
    assert twice[0] == twice[1]
    keyed = ids_of(sampler.sample([[8, 9], [8, 9]], 1, sampling, keys=[0, 1]))
    assert keyed[0] != keyed[1]
    assert keyed == ids_of(sampler.sample([[8, 9], [8, 9]], 1, sampling, keys=[0, 1]))
    assert keyed != ids_of(sampler.sample([[8, 9], [8, 9]], 1, Sampling(16, frozenset({STOP}), seed=2), keys=[0, 1]))


def test_log_probs_are_those_of_the_distribution_that_was_drawn_from() -> None:
    model, sampling = tiny(), Sampling(12, frozenset({STOP}), temperature=0.7, seed=3)
    asked = prompts(5, seed=1)
    for prompt, row in zip(asked, HFSampler(model, PAD).sample(asked, 2, sampling), strict=True):
        for answer in row:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(answer.ids)])).logits[0].double() / 0.7
            expected = [
                torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token].item() for t, token in enumerate(answer.ids)
            ]
            assert answer.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(4, 4)
    chosen, logprobs = draw(logits, 1.0, torch.tensor([0.0, 0.49, 0.51, 1 - 2**-53], dtype=torch.float64))
    assert chosen.tolist() == [1, 1, 2, 2]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax_of_the_logits(temperature: float) -> None:
    model, draws = tiny(vocabulary=8), 4000
    answers = HFSampler(model, PAD).sample([[4, 5, 6]], draws, Sampling(1, frozenset({STOP}), temperature, seed=11))[0]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[4, 5, 6]])).logits[0, -1].double() / temperature, -1).tolist()
    counts = Counter(answer.ids[0] for answer in answers)
    common = [token for token, share in enumerate(expected) if share * draws >= 5]
    rest = [token for token in range(8) if token not in common]
    groups = [[token] for token in common] + ([rest] if rest else [])
    statistic = sum(
        (sum(counts[t] for t in group) - draws * sum(expected[t] for t in group)) ** 2
        / (draws * sum(expected[t] for t in group))
        for group in groups
    )
    # The 0.999 quantile of chi-square with 7 degrees of freedom; fewer groups only make it stricter for us.
    assert len(groups) >= 4
    assert statistic < 24.32


def test_greedy_is_what_transformers_generates() -> None:
    model, asked = tiny(), prompts(6, seed=2)
    answers = HFSampler(model, PAD).sample(asked, 1, Sampling(20, frozenset({STOP, 5}), temperature=0))
    for prompt, (answer,) in zip(asked, answers, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[STOP, 5], pad_token_id=PAD
        )
        assert list(answer.ids) == generated[0, len(prompt) :].tolist()


def test_an_adapter_samples_as_its_merged_weights() -> None:
    from peft import LoraConfig, get_peft_model

    plain = ids_of(HFSampler(tiny(), PAD).sample(prompts(5), 2, Sampling(16, frozenset({STOP}))))
    torch.manual_seed(2)
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = ids_of(HFSampler(model, PAD).sample(prompts(5), 2, Sampling(16, frozenset({STOP}))))
    merged = HFSampler(model.merge_and_unload(), PAD).sample(prompts(5), 2, Sampling(16, frozenset({STOP})))
    assert plain != adapted == ids_of(merged)


def test_prompts_that_do_not_fit_are_named_with_their_numbers() -> None:
    sampler = HFSampler(tiny(positions=32), PAD)
    assert sampler.sample([[5] * 12], 1, Sampling(20, frozenset()))[0][0].finish == "length"
    with pytest.raises(DataError, match=r"prompt 1: .*13 tokens \+ max_new_tokens 20 = 33, the model has 32"):
        sampler.sample([[5], [5] * 13], 1, Sampling(20, frozenset({STOP})))
    with pytest.raises(DataError, match="prompt 0: prompt: no tokens"):
        sampler.sample([[]], 1, Sampling(20, frozenset({STOP})))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny().train()
    HFSampler(model, PAD).sample([[4, 5]], 1, Sampling(2, frozenset({STOP})))
    assert model.training
    assert torch.is_grad_enabled()


def test_a_batch_is_as_large_as_its_cache_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 (keys and values) x 2 layers x 2 heads x 8 numbers x 4 bytes = 256 bytes a token
    monkeypatch.setattr(rollout, "CACHE_BYTES", 256 * 100 * 3 + 1)
    assert rollout.rows_that_fit(tiny(), 100) == 3
    assert rollout.rows_that_fit(tiny(), 10_000) == 1
    assert rollout.rows_that_fit(tiny(), 1) == 256
