"""The closed-form world itself: what it calls exact is exact, and is the world that it says it is."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import envb
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import models
from envb import OUTCOMES, PROMPTS, REWARDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return envb.base(tmp_path_factory)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return envb.load(folder)


@pytest.fixture(scope="module")
def reference(model: Any) -> Tensor:
    with torch.no_grad():
        return envb.logprobs(model)


def elsewhere(reference: Tensor, seed: int = 0) -> Tensor:
    """Return another policy: the reference, every outcome made likelier or rarer at random."""
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (reference + noise).log_softmax(-1)


# --- outcomes and rewards ---------------------------------------------------------------------------------------------


def test_the_outcomes_are_all_answers_that_end_or_are_three_long() -> None:
    assert len(OUTCOMES) == len(set(OUTCOMES)) == 1 + 7 + 49 * 8
    for ids in OUTCOMES:
        assert envb.EOS not in ids[:-1]
        assert ids[-1] == envb.EOS or len(ids) == 3
    assert any(envb.PAD in ids for ids in OUTCOMES), "pad may be drawn"


def test_rewards_by_hand() -> None:
    """Worth of the tokens: 0 -.0557, 1 .0602, 2 -.1848 (and .5 for ending), 3 -.1202."""
    found = envb.reward(None, ["", "", ""], [[2], [1, 3, 0], [1, 1, 2]], trainer_state=None)
    assert found == pytest.approx([0.3152, -0.1157, 0.4356], abs=2e-4)
    assert envb.zero(None, ["", ""], [[2], [1, 2]]) == [0.0, 0.0]


# --- the base ---------------------------------------------------------------------------------------------------------


def test_the_project_loads_the_base_and_its_eight_words(folder: Path) -> None:
    source = Resolved(ref="file:base", digest="sha256:" + "b" * 64, path=str(folder))
    tokenizer = models.load_tokenizer(source)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (0, 2, None, 8)
    assert tokenizer("f a <eos> <pad>")["input_ids"] == [7, 1, 2, 0]
    assert tokenizer.decode([7, 1, 2, 0]) == "f a <eos> <pad>"
    assert models.eos_ids(source, tokenizer) == {2}


def test_the_base_follows_the_chain(reference: Tensor) -> None:
    """An answer's probability is the product of the chain's steps, the first from the prompt's last token."""
    table = envb.chain()
    assert table.sum(-1).tolist() == pytest.approx([1.0] * 8, abs=1e-6)
    assert table[:, envb.EOS].tolist() == pytest.approx([0.3] * 8)
    for prompt, found in zip(PROMPTS, reference, strict=True):
        exact = [math.prod(float(table[a, b]) for a, b in pairwise((prompt[-1], *ids))) for ids in OUTCOMES]
        assert found.exp().tolist() == pytest.approx(exact, abs=2e-3)
        assert sum(p * (float(log) - math.log(p)) for p, log in zip(exact, found, strict=True)) > -3e-3


def test_outcomes_are_scored_as_a_model_writes_them(model: Any, reference: Tensor) -> None:
    """Token by token, without padding, one answer at a time."""
    for prompt, row in random.Random(0).sample([(p, o) for p in range(4) for o in range(400)], 30):
        text, total = list(PROMPTS[prompt]), 0.0
        for token in OUTCOMES[row]:
            with torch.no_grad():
                total += float(model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)[token])
            text.append(token)
        assert total == pytest.approx(float(reference[prompt, row]), abs=1e-5)


def test_a_fresh_adapter_changes_nothing_and_gets_gradients(folder: Path, reference: Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(envb.load(folder), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = envb.logprobs(adapted)
    assert torch.allclose(found, reference, atol=1e-6)
    envb.expected(found, REWARDS).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


# --- what is exact ----------------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one(reference: Tensor) -> None:
    for policy in (reference, elsewhere(reference), envb.best_policy(reference, 0.3)):
        assert policy.exp().sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_the_world_is_the_one_whose_figures_are_known(reference: Tensor) -> None:
    """Known from the chain alone; the trained base is a little off it."""
    start = envb.report(reference, reference, 0.3)
    assert start.kl == 0
    assert start.reward == start.reference_reward == pytest.approx(-0.0881, abs=2e-3)
    assert start.best == pytest.approx(0.1391, abs=2e-3)
    assert start.distance == pytest.approx(0.757, abs=5e-3)
    assert start.length == pytest.approx(1 * 0.3 + 2 * 0.7 * 0.3 + 3 * 0.7 * 0.7, abs=0.01)
    assert math.isnan(start.efficiency)


@pytest.mark.parametrize(
    ("beta", "kl", "reward", "best"),
    [
        (2, 0.0245, 0.0143, -0.0347),
        (1, 0.0818, 0.0919, 0.0102),
        (0.3, 0.4011, 0.2594, 0.1391),
        (0.1, 0.856, 0.3407, 0.2551),
        (0.05, 1.609, 0.3906, 0.3102),
    ],
)
def test_the_best_policy_is_best(reference: Tensor, beta: float, kl: float, reward: float, best: float) -> None:
    star = envb.report(envb.best_policy(reference, beta), reference, beta)
    assert (star.kl, star.reward, star.best) == pytest.approx((kl, reward, best), abs=3e-3)
    assert star.objective == pytest.approx(star.best, abs=1e-9)
    assert star.distance == pytest.approx(0, abs=1e-9)
    assert star.efficiency == pytest.approx(1, abs=1e-6)
    for seed in range(5):
        other = envb.report(elsewhere(envb.best_policy(reference, beta), seed), reference, beta)
        assert other.objective < star.objective
        assert other.efficiency < 1


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_what_is_lost_is_the_distance_to_the_best(reference: Tensor, beta: float) -> None:
    """The identity, with every sum taken once more in plain Python."""
    policy = elsewhere(reference)
    found = envb.report(policy, reference, beta)
    assert found.identity_error < 1e-5
    objective = best = distance = 0.0
    for ours, theirs in zip(policy.tolist(), reference.tolist(), strict=True):
        rewards = [envb.worth(ids) for ids in OUTCOMES]
        total = sum(math.exp(q + r / beta) for q, r in zip(theirs, rewards, strict=True))
        best += beta * math.log(total) / 4
        for p, q, r in zip(ours, theirs, rewards, strict=True):
            objective += math.exp(p) * (r - beta * (p - q)) / 4
            distance += math.exp(p) * (p - (q + r / beta - math.log(total))) / 4
    assert (found.objective, found.best, found.distance) == pytest.approx((objective, best, distance), abs=1e-9)
    assert best - objective == pytest.approx(beta * distance, abs=1e-9)
    assert distance > 0.01


def test_the_frontier_is_that_of_the_best_policies(reference: Tensor) -> None:
    for beta in (2, 0.7, 0.2):
        star = envb.report(envb.best_policy(reference, beta), reference, beta)
        assert envb.frontier(reference, star.kl) == pytest.approx(star.reward, abs=1e-9)
    assert envb.frontier(reference, 100.0) == pytest.approx(float(REWARDS.max()), abs=1e-3)


# --- rows -------------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_prompts(tmp_path: Path) -> None:
    envb.write_prompts(tmp_path / "prompts.jsonl", repeat=3)
    assert read(tmp_path / "prompts.jsonl") == [{"prompt_ids": list(prompt)} for prompt in PROMPTS] * 3


def utilities(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    assert all(tuple(row["prompt_ids"]) in PROMPTS and row["chosen_ids"] != row["rejected_ids"] for row in rows)
    return [(envb.worth(row["chosen_ids"]), envb.worth(row["rejected_ids"])) for row in rows]


def assert_bradley_terry(pairs: list[tuple[float, float]]) -> None:
    """The better answer is chosen as often as it should be, to four standard errors."""
    chances = [1 / (1 + math.exp(-abs(won - lost))) for won, lost in pairs]
    spread = math.sqrt(sum(chance * (1 - chance) for chance in chances))
    assert abs(sum(won > lost for won, lost in pairs) - sum(chances)) < 4 * spread


def test_preferences_are_between_answers_of_the_reference(tmp_path: Path, reference: Tensor) -> None:
    envb.write_pairs(tmp_path / "pairs.jsonl", reference, 20_000, seed=1)
    rows = read(tmp_path / "pairs.jsonl")
    pairs = utilities(rows)
    assert len(rows) == 20_000
    assert_bradley_terry(pairs)
    p = reference.exp()
    drawn = p * (1 - p) / (1 - p.square().sum(-1, keepdim=True))  # given that the two differ
    mean = float((drawn * REWARDS).sum(-1).mean())
    assert sum(won + lost for won, lost in pairs) / 40_000 == pytest.approx(mean, abs=0.01)
    assert abs(float(REWARDS.mean()) - mean) > 0.1, "answers that are drawn evenly should show"
    envb.write_pairs(tmp_path / "again.jsonl", reference, 20_000, seed=1)
    assert read(tmp_path / "again.jsonl") == rows


def test_utilities_are_compared_evenly(tmp_path: Path) -> None:
    envb.write_utility_pairs(tmp_path / "pairs.jsonl", 20_000, seed=2)
    pairs = utilities(read(tmp_path / "pairs.jsonl"))
    assert_bradley_terry(pairs)
    assert sum(won + lost for won, lost in pairs) / 40_000 == pytest.approx(float(REWARDS.mean()), abs=0.01)
    # Bayes: no scores agree with more of these labels than the utilities do.
    accuracy = sum(won > lost for won, lost in pairs) / len(pairs)
    assert accuracy == pytest.approx(envb.recovery(REWARDS).bayes_accuracy, abs=0.015)


def test_recovery_sees_order_scale_and_noise() -> None:
    exact = envb.recovery(3 + REWARDS.expand(4, -1) + torch.arange(4.0)[:, None])
    assert (exact.pearson, exact.slope) == pytest.approx((1, 1))
    assert exact.accuracy == pytest.approx(exact.bayes_accuracy) == pytest.approx(0.630, abs=1e-3)
    assert exact.log_loss == pytest.approx(exact.bayes_log_loss)
    double = envb.recovery(2 * REWARDS)
    assert (double.pearson, double.slope) == pytest.approx((1, 2))
    assert double.accuracy == pytest.approx(exact.accuracy)
    assert double.log_loss > exact.log_loss + 0.01
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    noisy = envb.recovery(REWARDS + noise)
    assert noisy.pearson < 0.7
    assert noisy.accuracy < exact.accuracy - 0.01
