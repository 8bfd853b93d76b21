"""A world so small that every answer can be listed: what an aligned model should become is known, not estimated.

Eight tokens, answers of at most three, four prompts: 400 outcomes. The base follows a Markov chain; the reward is a sum
over tokens. With J(pi) = E[r] - beta KL(pi || ref) the best policy is pi* = ref exp(r / beta) / Z with J* = beta ln Z,
and J* - J(pi) = beta KL(pi || pi*) (Korbak et al. 2022, arXiv:2205.11275). All sums run over all outcomes, in float64,
so a verdict has no sampling error. Everything is in nats; figures are means over the four prompts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pytest

PAD, EOS, VOCABULARY, LENGTH = 0, 2, 8, 3
TOKENS = ("<pad>", "a", "<eos>", "b", "c", "d", "e", "f")
PROMPTS = ((3, 7), (5, 1), (1, 4), (6, 3))
STEPS, BATCH, RATE = 300, 256, 3e-3


# --- outcomes and what they are worth ---------------------------------------------------------------------------------


def _outcomes(start: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if start and (start[-1] == EOS or len(start) == LENGTH):
        yield start
        return
    for token in range(VOCABULARY):
        yield from _outcomes((*start, token))


OUTCOMES: list[tuple[int, ...]] = list(_outcomes())
"""1 + 7 + 49 * 8 = 400 answers, each ended by EOS or by its length; PAD is a token like any other when it is drawn."""

RATED = [row for row, ids in enumerate(OUTCOMES) if ids[-1] != PAD]
"""The rows of OUTCOMES that a reward model is asked for: a last token that pads looks like padding, and is refused."""

WORTH: list[float] = (0.5 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(123))).tolist()


def worth(ids: Sequence[int]) -> float:
    """Return r(y): the worth of each token, EOS too, and a half for having ended."""
    return sum(WORTH[token] for token in ids) + 0.5 * (EOS in ids)


REWARDS = torch.tensor([worth(ids) for ids in OUTCOMES], dtype=torch.float64)  # (400,)


def reward(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Reward answers by their token ids, in TRL's signature."""
    return [worth(ids) for ids in completion_ids]


def zero(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Reward nothing: a policy that is trained on this must stay where it is."""
    return [0.0] * len(completion_ids)


# --- the base ---------------------------------------------------------------------------------------------------------


def chain() -> Tensor:
    """Return P(next | last) of the chain that the base learns, (8, 8): EOS .3 everywhere, the rest a softmax."""
    logits = 0.7 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(77)).double()
    logits[:, EOS] = -math.inf
    table = 0.7 * logits.softmax(-1)
    table[:, EOS] = 0.3
    return table


def base(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the base; it is trained once per test session."""
    folder = factory.getbasetemp() / "envb"
    if not folder.is_dir():
        unfinished = factory.mktemp("envb-unfinished")
        write_base(unfinished)
        unfinished.rename(folder)
    return folder


def write_base(folder: Path) -> None:
    """Write a Llama that follows the chain after every prompt, and a tokenizer of eight words; about five seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # The states that a frozen head reads have a bounded norm: a wider head lets probabilities be as small as pi*'s.
        model.lm_head.weight.data *= 6
        _train(model)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _train(model: Any) -> None:
    """Train on drawn texts, towards the chain's own probabilities: no noise of labels is left in the base."""
    table = chain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        ids = torch.tensor(PROMPTS)[torch.randint(len(PROMPTS), (BATCH,))]  # (B, 2)
        for _ in range(LENGTH):
            ids = torch.cat([ids, torch.multinomial(table[ids[:, -1]], 1)], dim=-1)
        read = ids[:, 1:-1]  # (B, 3): what stands before each token of the answer
        logits = model(input_ids=ids[:, :-1]).logits[:, 1:]  # (B, 3, V)
        unended = (ids[:, 2:-1] == EOS).long().cumsum(-1) == 0  # (B, 2): no EOS so far
        real = torch.cat([torch.ones_like(unended[:, :1]), unended], dim=-1)  # (B, 3)
        loss = torch.nn.functional.cross_entropy(logits[real], table[read][real].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=TOKENS[PAD], eos_token=TOKENS[EOS])


def load(folder: Path) -> Any:
    """Return the model of a folder as it is, through transformers alone, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


# --- what a model thinks of every outcome -----------------------------------------------------------------------------


def logprobs(model: Any) -> Tensor:
    """Return log pi(y | x) of all outcomes after all prompts, (4, 400) in float64; gradients flow.

    `model` is anything that transformers or PEFT can call. What stands after an answer cannot change it: causal
    attention does not look there, and it is not summed up.
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *ids, *[PAD] * (LENGTH - len(ids))] for prompt in PROMPTS for ids in OUTCOMES]
    ids = torch.tensor(rows, device=device)  # (1600, 5)
    lengths = torch.tensor([len(ids) for ids in OUTCOMES] * len(PROMPTS), device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # (1600, 5, V)
    each = logits[:, 1:-1].double().log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1)  # (1600, 3)
    real = torch.arange(LENGTH, device=device) < lengths[:, None]
    return torch.where(real, each, 0.0).sum(-1).reshape(len(PROMPTS), len(OUTCOMES)).cpu()


# --- how good a policy is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Where a policy stands between its reference and the best policy at `beta`."""

    beta: float
    kl: float
    """KL(pi || ref)."""
    reward: float
    """E_pi[r]."""
    reference_reward: float
    """E_ref[r]."""
    objective: float
    """J(pi) = E_pi[r] - beta KL(pi || ref)."""
    best: float
    """J*, the largest objective that any policy has."""
    distance: float
    """KL(pi || pi*)."""
    identity_error: float
    """The largest |J* - J - beta KL(pi || pi*)| of a prompt: not 0 only if these figures are wrong."""
    efficiency: float
    """(E_pi[r] - E_ref[r]) / (r* - E_ref[r]), r* the most reward at this KL from the reference; nan at KL 0."""
    length: float
    """Mean answer length under pi, in tokens."""


def report(policy: Tensor, reference: Tensor, beta: float) -> Report:
    """Compare a policy with its reference and with the best, given both as `logprobs` returns them."""
    policy, reference = policy.detach().double(), reference.detach().double()
    star = best_policy(reference, beta)
    kls, rewards, distances = _kl(policy, reference), expected(policy, REWARDS), _kl(policy, star)  # (4,) each
    bests = beta * (reference + REWARDS / beta).logsumexp(-1)
    objectives = rewards - beta * kls
    reference_reward = _mean(expected(reference, REWARDS))
    gain = frontier(reference, _mean(kls)) - reference_reward
    return Report(
        beta=beta,
        kl=_mean(kls),
        reward=_mean(rewards),
        reference_reward=reference_reward,
        objective=_mean(objectives),
        best=_mean(bests),
        distance=_mean(distances),
        identity_error=float((bests - objectives - beta * distances).abs().max()),
        efficiency=(_mean(rewards) - reference_reward) / gain if _mean(kls) > 1e-9 else math.nan,
        length=_mean(expected(policy, torch.tensor([len(ids) for ids in OUTCOMES]).double())),
    )


def best_policy(reference: Tensor, beta: float) -> Tensor:
    """Return log pi*, (4, 400): the reference times exp(r / beta), made to sum to one."""
    return (reference + REWARDS / beta).log_softmax(-1)


def expected(policy: Tensor, values: Tensor) -> Tensor:
    """Return the expectation of `values` (400,) under a policy (4, 400), one number a prompt."""
    return (policy.exp() * values).sum(-1)


def frontier(reference: Tensor, kl: float) -> float:
    """Return the most reward that a policy can have at this KL from the reference: that of the pi* with this KL."""
    low, high = 1e-3, 1e6  # beta; the KL of pi* falls as beta grows
    for _ in range(100):
        middle = math.sqrt(low * high)
        closer = _mean(_kl(best_policy(reference, middle), reference)) < kl
        low, high = (low, middle) if closer else (middle, high)
    return _mean(expected(best_policy(reference, low), REWARDS))


def _kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum(-1)


def _mean(values: Tensor) -> float:
    return float(values.mean())


# --- rows to train on -------------------------------------------------------------------------------------------------


def write_prompts(file: Path, repeat: int = 1) -> None:
    """Write the four prompts `repeat` times over, one `prompt_ids` a row."""
    _write(file, [{"prompt_ids": list(prompt)} for _ in range(repeat) for prompt in PROMPTS])


def write_pairs(file: Path, reference: Tensor, count: int, seed: int = 0) -> None:
    """Write preferences between two different answers that the reference draws; the labels follow the true reward.

    Bradley-Terry: P(a beats b) = sigmoid(r(a) - r(b)). DPO on them has its optimum at pi*.
    """
    weights = reference.detach().exp().tolist()
    _write_pairs(file, count, seed, lambda draw, prompt: draw.choices(OUTCOMES, weights[prompt])[0])


def write_utility_pairs(file: Path, count: int, seed: int = 0) -> None:
    """Write preferences between two different rated answers, all equally likely, as `write_pairs` labels them."""
    _write_pairs(file, count, seed, lambda draw, prompt: OUTCOMES[draw.choice(RATED)])


def _write_pairs(file: Path, count: int, seed: int, answer: Callable[[random.Random, int], tuple[int, ...]]) -> None:
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        prompt = draw.randrange(len(PROMPTS))
        a, b = answer(draw, prompt), answer(draw, prompt)
        if a == b:
            continue
        if draw.random() >= 1 / (1 + math.exp(worth(b) - worth(a))):
            a, b = b, a
        rows.append({"prompt_ids": list(PROMPTS[prompt]), "chosen_ids": list(a), "rejected_ids": list(b)})
    _write(file, rows)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@dataclass(frozen=True)
class Recovery:
    """How well scores recover the utilities behind Bradley-Terry labels."""

    pearson: float
    slope: float
    """Of the scores in the utilities: 1 is calibrated, which accuracy does not see."""
    accuracy: float
    bayes_accuracy: float
    """That of the utilities themselves: labels are drawn, so no scores do better."""
    log_loss: float
    bayes_log_loss: float


def recovery(scores: Tensor) -> Recovery:
    """Compare the scores of all outcomes, (400,) or (4, 400), with their utilities, over all pairs of rated ones."""
    utilities = REWARDS[RATED]  # (R,)
    scores = scores.detach().double().reshape(-1, len(OUTCOMES))[:, RATED]  # (P, R)
    u = (utilities - utilities.mean()).expand_as(scores)
    s = scores - scores.mean(-1, keepdim=True)
    slope = (u * s).sum() / u.square().sum()
    pairs = ~torch.eye(len(RATED), dtype=torch.bool)
    chance = (utilities[:, None] - utilities).sigmoid()[pairs]  # of the first to win, one a pair

    def judged(values: Tensor) -> tuple[float, float]:
        gaps = (values[:, :, None] - values[:, None])[:, pairs]
        right = torch.where(gaps == 0, 0.5, torch.where(gaps > 0, chance, 1 - chance))
        logistic = torch.nn.functional.logsigmoid
        return _mean(right), -_mean(chance * logistic(gaps) + (1 - chance) * logistic(-gaps))

    accuracy, log_loss = judged(scores)
    bayes_accuracy, bayes_log_loss = judged(utilities[None])
    pearson = float(slope * u.norm() / s.norm())
    return Recovery(pearson, float(slope), accuracy, bayes_accuracy, log_loss, bayes_log_loss)
