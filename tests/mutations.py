"""Make the mistakes of a careless port, one at a time, and print which test notices each: none may go unnoticed.

    python tests/mutations.py [NAME...]     all of them, or those whose names are given or begin with one given
    python tests/mutations.py --check       only see that each still fits the source

A mutation is a piece of source and what stands there instead. It is applied as its module is imported, in a process of
its own, so files are never touched; it must fit exactly once, and its module must have been imported. A mutation counts
as noticed where a test fails by an assertion or by an error that the project raises on purpose. Any other error means
that the mutation is a crash, which nobody would overlook, and is reported as such. The tests that are named run once
without a mutation, and must pass.

Left out, because nothing changes that one process on a CPU could observe: how ranks share rows and sum gradients; one
of two safeguards while the other stands (the base arrives frozen and is frozen again; a dropout of 0 is asked of an
adapter and set in the model); and gradients that are allowed to reach the reference, which no loss reads.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
LONGEST_SECONDS = 300
SETTINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake: `edits` are pairs of source and replacement."""

    name: str
    module: str
    """Below the package, such as `stages.ppo_math`."""
    tests: tuple[str, ...]
    """Those that must notice, as pytest node ids; the cheapest first, the run ends with the first that fails."""
    edits: tuple[tuple[str, str], ...]

    @property
    def file(self) -> Path:
        return ROOT / f"{self.module.replace('.', '/')}.py"

    def apply(self, source: str) -> str:
        for old, new in self.edits:
            found = source.count(old)
            if found != 1:
                raise ValueError(f"{self.name}: {self.module} has this {found} times, it must have it once: {old!r}")
            source = source.replace(old, new)
        return source


def mistake(name: str, module: str, test: str | Sequence[str], *edits: str) -> Mutation:
    tests = (test,) if isinstance(test, str) else tuple(test)
    return Mutation(name, module, tests, tuple(zip(edits[::2], edits[1::2], strict=True)))


# --- the tests that notice --------------------------------------------------------------------------------------------

MATH = "tests/stages/test_ppo_math.py::test_"
PAID = f"{MATH}the_score_is_paid_on_the_last_real_token_and_kl_on_each"
BY_DEFINITION = f"{MATH}advantages_are_the_average_of_k_step_advantages[0.99-0.9]"
GAPS = f"{MATH}gaps_are_as_if_they_were_cut_out[1000000000.0]"
WHITE = f"{MATH}whitened_tokens_have_mean_zero_and_variance_one[1000000000.0]"
CUT_OFF = f"{MATH}an_answer_that_was_cut_off_is_worth_nothing_after_its_end"
CLIP = f"{MATH}each_side_of_the_clip"
VALUE_CLIP = f"{MATH}each_side_of_the_value_clip"
WEIGHTS = f"{MATH}importance_weights_are_ratios_up_to_the_cap"

LOGPROBS = "tests/stages/test_logprobs.py::test_values_and_gradients_are_those_of_whole_logits"

PPO = "tests/stages/test_ppo.py::test_"
EXACT = f"{PPO}the_first_gradient_is_the_exact_gradient_of_the_objective[1.0-none]"
MICRO_BATCHES = f"{PPO}micro_batches_do_not_change_the_gradient[20]"
LEFT_PADDED = f"{PPO}log_probs_are_those_of_left_padded_rows_with_a_mask[llama]"
TWO_MODELS = f"{PPO}adapters_on_one_base_have_the_gradients_of_two_models[False]"
RECOMPUTED = f"{PPO}adapters_on_one_base_have_the_gradients_of_two_models[True]"
REFERENCE = f"{PPO}the_reference_is_the_adapter_that_came_in_not_the_base"
AS_ALONE = f"{PPO}the_reward_model_scores_as_it_does_alone_and_the_value_model_starts_as_it"
REWARDS = f"{PPO}several_rewards_are_a_weighted_sum"
WARM_UP = f"{PPO}warming_the_value_model_up_leaves_the_policy_as_it_is"
EPOCHS = f"{PPO}an_epoch_has_every_row_once_and_each_epoch_its_own_order"
PROMPTS = f"{PPO}prompts_are_asked_once_a_pass"
TARGET_KL = f"{PPO}target_kl_ends_the_passes_over_a_batch"
KILLED = f"{PPO}a_run_that_was_killed_ends_with_the_same_weights[changes0]"
BEST = f"{PPO}the_best_evaluation_is_published"

DETAILS = "tests/stages/test_ppo_details.py::test_"
ESTIMATES = f"{DETAILS}estimates_are_those_of_the_papers"
LATER = f"{DETAILS}a_later_minibatch_has_the_gradient_of_both_clipped_losses"
STAY_LORA = f"{DETAILS}reference_and_value_stay_where_they_are_when_the_policy_moves[lora]"
STAY_FULL = f"{DETAILS}reference_and_value_stay_where_they_are_when_the_policy_moves[full]"
NORMS = f"{DETAILS}each_gradient_is_clipped_to_its_own_norm"
COUNTERS = f"{DETAILS}a_run_depends_on_its_counters_alone"
EVALUATION = f"{DETAILS}an_evaluation_is_repeatable_and_its_objective_is_score_less_kl"
VERSIONS = f"{DETAILS}a_sampler_gets_each_version_of_the_policy_once_it_is_there"

ROLLOUT = "tests/stages/test_rollout.py::test_"
SAME_ANSWERS = f"{ROLLOUT}a_prompt_gets_the_same_answers_in_every_batch[tiny]"
MODELS = "tests/stages/test_models.py::test_"
DPO = "tests/stages/test_dpo.py::test_"
PAIRS = "tests/stages/test_pair_losses.py::test_"
BY_HAND = f"{PAIRS}the_weighed_loss_and_its_gradient_are_those_worked_out_by_hand"
MARGINS = "tests/stages/test_reward.py::test_margins_reach_the_loss_and_without_them_nothing_changes[6-True]"
CHAT = "tests/data/test_chat.py::test_"
MASKED = "tests/data/test_masks.py::test_"
MASKS = "tests/data/test_masks.py"
ROWS, GATE, SOURCES, LOADED = (f"tests/data/test_{name}.py" for name in ("formats", "gate", "sources", "load"))
READING = "tests/stages/test_reading.py::test_"
COMPLETED = "tests/stages/test_complete.py::test_"
VOTES = "tests/data/feedback/test_convert.py::test_"
ZIPPED = f"{VOTES}ten_liked_and_ten_disliked_answers_are_zipped_and_capped"
FORGET = "tests/pipeline/test_feedback_cli.py::test_a_forgotten_user_leaves_every_row_and_every_later_conversion"
MIXED = f"{READING}sources_are_mixed_by_weight_and_seed"
GATES = "tests/pipeline/test_gates.py::test_"
SURELY = "tests/stages/test_ppo.py::test_a_reward_model_must_beat_a_coin_surely"
SHARES = "tests/stages/test_statistics.py::test_"
SEEN = "tests/stages/test_comparison.py::test_"
KEYED = f"{READING}what_decides_the_ids_is_in_the_key[the chat template]"

STATED = "tests/stages/test_statistics.py::test_"
SETS = "tests/stages/test_evaluate_sets.py::test_"
JUDGED = "tests/stages/test_judge.py::test_"


# --- the mistakes -----------------------------------------------------------------------------------------------------

LOOP, ACTORS, ARITHMETIC = "stages.ppo_loop", "stages.actors", "stages.ppo_math"
STATISTICS = "stages.statistics"
PAY = "    rewards[torch.arange(len(scores), device=scores.device), last] += scores\n"
LATE = (
    "    late = last + 1 < rewards.shape[1]\n"
    "    rewards[torch.arange(len(scores))[late], last[late] + 1] += scores[late]\n"
)
ANSWERS = "prompts, ids = [one.ids for one in asked], [answer.ids for answer in answers]\n        lengths"
UNENDED = (
    "prompts = [one.ids for one in asked]\n"
    '        ids = [one.ids[: max(1, len(one.ids) - (one.finish == "stop"))] for one in answers]\n'
    "        lengths"
)

# fmt: off
MUTATIONS = [
    # Rewards of tokens.
    mistake("score-one-token-early", ARITHMETIC, PAID, PAY, PAY.replace("last]", "(last - 1).clamp(min=0)]")),
    mistake("score-one-token-late", ARITHMETIC, PAID, PAY, LATE),
    mistake("score-at-the-last-position", ARITHMETIC, PAID, PAY, PAY.replace("last]", "-1]")),
    mistake(
        "score-lost-when-cut-off", LOOP, REWARDS,
        "scores = scores - stage.missing_eos_penalty * cut",
        "scores = torch.where(cut, -stage.missing_eos_penalty, scores)",
    ),
    mistake("kl-halved", ARITHMETIC, PAID, "-kl_coef * kl", "-0.5 * kl_coef * kl"),
    mistake("kl-dropped", ARITHMETIC, PAID, "torch.where(mask, -kl_coef * kl, 0.0)", "torch.zeros_like(kl)"),
    mistake("kl-rewarded", ARITHMETIC, PAID, "-kl_coef * kl", "kl_coef * kl"),
    mistake("kl-halved-in-the-loop", LOOP, EXACT, "self.mask, stage.kl_coef)", "self.mask, stage.kl_coef / 2)"),
    mistake("kl-dropped-in-the-loop", LOOP, EXACT, "self.mask, stage.kl_coef)", "self.mask, 0.0)"),
    mistake(
        "kl-the-other-way-round", LOOP, EXACT,
        "kl = ppo_math.kl_k1(self.old, self.reference)", "kl = ppo_math.kl_k1(self.reference, self.old)",
    ),
    mistake("k3-in-the-reward", LOOP, EXACT, "kl = ppo_math.kl_k1(self.old", "kl = ppo_math.kl_k3(self.old"),
    mistake("kl-of-the-sampler", LOOP, ESTIMATES, "kl = ppo_math.kl_k1(self.old", "kl = ppo_math.kl_k1(self.sampler"),
    mistake(
        "k3-the-other-way-round", ARITHMETIC, f"{MATH}both_estimators_have_the_kl_as_their_mean",
        "difference = reference - logprobs", "difference = logprobs - reference",
    ),
    mistake(
        "missing-eos-rewarded", LOOP, REWARDS,
        "scores = scores - stage.missing_eos_penalty", "scores = scores + stage.missing_eos_penalty",
    ),
    mistake("eos-penalised", LOOP, REWARDS, 'answer.finish == "length" for', 'answer.finish == "stop" for'),
    mistake(
        "reward-clip-after-the-penalty", LOOP, REWARDS,
        (
            "        if stage.reward_clip is not None:\n"
            "            scores = scores.clamp(-stage.reward_clip, stage.reward_clip)\n"
            "        cut"
        ),
        "        cut",
        "        scores = scores - stage.missing_eos_penalty * cut\n",
        (
            "        scores = scores - stage.missing_eos_penalty * cut\n"
            "        if stage.reward_clip is not None:\n"
            "            scores = scores.clamp(-stage.reward_clip, stage.reward_clip)\n"
        ),
    ),
    mistake("reward-clip-on-one-side", LOOP, REWARDS, "clamp(-stage.reward_clip, stage", "clamp(max=stage"),
    mistake("reward-weights-ignored", LOOP, REWARDS, "scores += stage.weight(name) *", "scores += 1.0 *"),
    mistake("rewards-shifted-when-scaled-only", LOOP, ESTIMATES, "self.mask, shift_mean=False)", "self.mask)"),
    # Whitening.
    mistake("whitening-always-shifts", ARITHMETIC, WHITE, "if not shift_mean:", "if False:"),
    mistake("whitening-over-padding", ARITHMETIC, WHITE, "real = values[mask]", "real = values.flatten()"),
    mistake("whitening-fills-the-padding", ARITHMETIC, WHITE, "return torch.where(mask, white, 0.0)", "return white"),
    mistake("whitening-biased", ARITHMETIC, WHITE, "max(real.numel() - 1, 1)", "real.numel()"),
    mistake(
        "advantages-not-whitened", LOOP, ESTIMATES,
        "self.advantages = ppo_math.whiten(advantages, self.mask)", "self.advantages = advantages",
    ),
    mistake(
        "advantages-scaled-only", LOOP, ESTIMATES,
        "ppo_math.whiten(advantages, self.mask)", "ppo_math.whiten(advantages, self.mask, shift_mean=False)",
    ),
    mistake(
        "returns-of-whitened-advantages", LOOP, ESTIMATES,
        "self.advantages = ppo_math.whiten(advantages, self.mask)",
        (
            "self.advantages = ppo_math.whiten(advantages, self.mask)\n"
            "        self.returns = self.advantages + self.values"
        ),
    ),
    mistake(
        "advantages-whitened-per-micro-batch", LOOP, MICRO_BATCHES,
        "        logprobs, _ = self.actors.log_probs(states, targets)\n        losses",
        (
            "        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)\n"
            "        logprobs, _ = self.actors.log_probs(states, targets)\n"
            "        losses"
        ),
    ),
    # Generalised advantages.
    mistake(
        "gae-forgets-over-gaps", ARITHMETIC, GAPS,
        "carry = torch.where(real, advantage, carry)", "carry = advantage",
    ),
    mistake(
        "gae-reads-values-in-gaps", ARITHMETIC, GAPS,
        "next_value = torch.where(real, values[:, t], next_value)", "next_value = values[:, t]",
    ),
    mistake("lambda-dropped", ARITHMETIC, BY_DEFINITION, "gamma * lam * carry", "gamma * carry"),
    mistake("gamma-dropped-in-the-sum", ARITHMETIC, BY_DEFINITION, "gamma * lam * carry", "lam * carry"),
    mistake("gamma-dropped-in-the-error", ARITHMETIC, BY_DEFINITION, "gamma * next_value", "next_value"),
    mistake(
        "gamma-on-the-reward", ARITHMETIC, BY_DEFINITION,
        "rewards[:, t] + gamma * next_value", "gamma * (rewards[:, t] + next_value)",
    ),
    mistake(
        "gamma-and-lambda-mixed-up", LOOP, ESTIMATES,
        "stage.gamma, stage.gae_lambda", "stage.gae_lambda, stage.gamma",
    ),
    mistake("value-after-the-token", ARITHMETIC, BY_DEFINITION, "next_value - values[:, t]", "next_value - next_value"),
    mistake(
        "cut-off-answers-go-on", ARITHMETIC, CUT_OFF,
        "carry = next_value = torch.zeros_like(rewards[:, 0])",
        "carry, next_value = torch.zeros_like(rewards[:, 0]), values[:, -1]",
    ),
    mistake(
        "returns-are-advantages", ARITHMETIC, BY_DEFINITION,
        "torch.where(mask, advantages + values, 0.0)", "torch.where(mask, advantages, 0.0)",
    ),
    # Losses.
    mistake("min-for-max-in-the-policy-loss", ARITHMETIC, CLIP, "torch.maximum(-adv", "torch.minimum(-adv"),
    mistake("min-for-max-in-the-value-loss", ARITHMETIC, VALUE_CLIP, "torch.maximum((values", "torch.minimum((values"),
    mistake(
        "policy-not-clipped-below", ARITHMETIC, CLIP,
        "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)",
    ),
    mistake(
        "policy-not-clipped-above", ARITHMETIC, CLIP,
        "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(min=1 - clip)",
    ),
    mistake("policy-not-clipped", ARITHMETIC, CLIP, "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
    mistake("value-not-clipped-below", ARITHMETIC, VALUE_CLIP, ".clamp(-clip, clip)", ".clamp(max=clip)"),
    mistake("value-not-clipped-above", ARITHMETIC, VALUE_CLIP, ".clamp(-clip, clip)", ".clamp(min=-clip)"),
    mistake("value-loss-not-halved", ARITHMETIC, VALUE_CLIP, "return 0.5 * torch.max", "return torch.max"),
    mistake(
        "advantage-sign", ARITHMETIC, CLIP,
        "-advantages * ratio, -advantages * clipped", "advantages * ratio, advantages * clipped",
    ),
    mistake("ratio-detached", ARITHMETIC, CLIP, "-advantages * ratio, ", "-advantages * ratio.detach(), "),
    mistake("weights-left-out-of-the-loss", ARITHMETIC, CLIP, "return weights * torch", "return torch"),
    mistake(
        "ratio-to-the-policy-of-now", LOOP, LATER,
        "ppo_math.policy_loss(logprobs, old,", "ppo_math.policy_loss(logprobs, logprobs.detach(),",
    ),
    mistake(
        "old-log-probs-of-the-sampler", LOOP, EXACT,
        "old, advantages = batch.old[rows][real]", "old, advantages = batch.sampler[rows][real]",
    ),
    mistake(
        "value-clip-around-the-value-of-now", LOOP, LATER,
        "ppo_math.value_loss(values, old,", "ppo_math.value_loss(values, values.detach(),",
    ),
    mistake("value-clip-of-the-policy", LOOP, LATER, "returns, self.stage.value_clip)", "returns, self.stage.clip)"),
    mistake("policy-clip-of-the-value", LOOP, LATER, "[real], self.stage.clip)", "[real], self.stage.value_clip)"),
    mistake("importance-weights-inverted", ARITHMETIC, WEIGHTS, "(trainer - sampler)", "(sampler - trainer)"),
    mistake("importance-weights-uncapped", ARITHMETIC, WEIGHTS, ".exp().clamp(max=cap)", ".exp()"),
    mistake("importance-weights-also-raised", ARITHMETIC, WEIGHTS, ".clamp(max=cap)", ".clamp(1, cap)"),
    mistake(
        "importance-weights-mixed-up", LOOP, ESTIMATES,
        "importance_weights(self.old, self.sampler,", "importance_weights(self.sampler, self.old,",
    ),
    mistake("importance-weights-forgotten", LOOP, LATER, "advantages, batch.weights[rows][real],", "advantages, 1.0,"),
    mistake("policy-mean-per-micro-batch", LOOP, MICRO_BATCHES, "policy_loss.sum() / tokens", "policy_loss.mean()"),
    mistake(
        "value-mean-per-micro-batch", LOOP, MICRO_BATCHES,
        "loss = self._value_loss(batch, some, states, total).sum() / tokens",
        "loss = self._value_loss(batch, some, states, total).mean()",
    ),
    mistake("sum-per-answer", LOOP, TWO_MODELS, "policy_loss.sum() / tokens", "policy_loss.sum() / len(rows)"),
    mistake(
        "mean-over-padding", LOOP, TWO_MODELS,
        "tokens = int(batch.mask[rows].sum())", "tokens = batch.mask[rows].numel()",
    ),
    mistake("value-coef-dropped", LOOP, LATER, "backward(self.stage.value_coef * loss)", "backward(loss)"),
    mistake("rows-counted-in-the-minibatch", LOOP, LATER, "some = [rows[i] for i in group]", "some = list(group)"),
    mistake(
        "eos-not-trained", LOOP, EXACT,
        ANSWERS, UNENDED,
        "sampler[mask] = torch.tensor([value for answer in answers for value in answer.logprobs])",
        (
            "sampler[mask] = torch.tensor([value for one, answer in zip(ids, answers) for value in "
            "answer.logprobs[: len(one)]])"
        ),
    ),
    mistake("approximate-kl-the-other-way-round", LOOP, LATER, "kl_k3(old, logprobs)", "kl_k3(logprobs, old)"),
    mistake("approximate-kl-with-signs", LOOP, LATER, "kl_k3(old, logprobs)", "kl_k1(old, logprobs)"),
    # Values: of the state before the token, by the value model.
    mistake(
        "state-after-the-token", ACTORS, LEFT_PADDED,
        "columns = [len(prompt) - 1 + t for", "columns = [min(len(prompt) + t, len(prompt) + len(answer) - 1) for",
    ),
    mistake(
        "value-of-the-state-after", LOOP, AS_ALONE,
        "parts[2] = self.actors.values(states)", "parts[2] = self.actors.values(states.roll(-1, 0))",
    ),
    mistake(
        "value-of-the-state-before", LOOP, AS_ALONE,
        "parts[2] = self.actors.values(states)", "parts[2] = self.actors.values(states.roll(1, 0))",
    ),
    mistake(
        "value-loss-of-the-state-after", LOOP, TWO_MODELS,
        "values = self.actors.values(states)", "values = self.actors.values(states.roll(-1, 0))",
    ),
    mistake(
        "value-loss-of-the-state-before", LOOP, TWO_MODELS,
        "values = self.actors.values(states)", "values = self.actors.values(states.roll(1, 0))",
    ),
    mistake(
        "values-read-by-the-policy", ACTORS, AS_ALONE,
        'role == "value" and self.shares_value else', 'role == "value" else',
    ),
    mistake(
        "values-trained-in-the-policy", LOOP, TWO_MODELS,
        'with self.actors.acting("value") as trunk:', 'with self.actors.acting("policy") as trunk:',
    ),
    mistake(
        "policy-read-by-the-value-model", ACTORS, STAY_LORA,
        "name = ADAPTER if role ==", 'name = "value" if role == "policy" else ADAPTER if role ==',
    ),
    mistake(
        "policy-trained-in-the-value-model", LOOP, TWO_MODELS,
        '            with self.actors.acting("policy") as trunk:\n                for',
        '            with self.actors.acting("value") as trunk:\n                for',
    ),
    mistake(
        "value-backward-after-its-act", LOOP, RECOMPUTED,
        "        ratio_max = torch.zeros((), device",
        "        later: list[Tensor] = []\n        ratio_max = torch.zeros((), device",
        "self.accelerator.backward(self.stage.value_coef * loss)", "later.append(self.stage.value_coef * loss)",
        "        self._sum_over_ranks(total)\n",
        (
            "        for loss in later:\n"
            "            self.accelerator.backward(loss)\n"
            "        self._sum_over_ranks(total)\n"
        ),
    ),
    mistake(
        "policy-backward-while-the-value-model-acts", LOOP, RECOMPUTED,
        "        ratio_max = torch.zeros((), device",
        "        later: list[Tensor] = []\n        ratio_max = torch.zeros((), device",
        "self.accelerator.backward(loss)", "later.append(loss)",
        'with self.actors.acting("value") as trunk:',
        (
            'with self.actors.acting("value") as trunk:\n'
            "                for loss in later:\n"
            "                    self.accelerator.backward(loss)"
        ),
    ),
    mistake("adapter-left-on-after-an-act", ACTORS, EPOCHS, "            self.model.set_adapter(ADAPTER)\n", ""),
    mistake(
        "adapter-left-on-after-scoring",
        ACTORS,
        f"{DETAILS}a_reward_model_on_the_same_base_leaves_the_sampler_the_policy",
        "            model.set_adapter(ADAPTER)\n            self.actors", "            self.actors",
    ),
    mistake(
        "value-model-frozen-after-an-act", ACTORS, AS_ALONE,
        "            self.freeze_all_but_trained()  #", "            pass  #",
    ),
    mistake(
        "shared-value-warms-the-policy-up", LOOP, f"{DETAILS}a_shared_value_head_warms_up_alone",
        "states if policy else states.detach()", "states",
    ),
    mistake(
        "value-head-not-copied", ACTORS, AS_ALONE,
        'head.weight.data.copy_(models.graft(model, "value", source).float())', 'models.graft(model, "value", source)',
    ),
    mistake(
        "value-head-random", ACTORS, AS_ALONE,
        'head.weight.data.copy_(models.graft(model, "value", source).float())',
        'models.graft(model, "value", source), nn.init.normal_(head.weight)',
    ),
    mistake(
        "value-adapter-not-copied", ACTORS, AS_ALONE,
        'head.weight.data.copy_(models.graft(model, "value", source).float())',
        (
            'models.add_fresh_adapter(model, "value", 1), head.weight.data.copy_(models.graft(model, '
            '"spare", source).float())'
        ),
    ),
    mistake(
        "whole-value-head-not-copied", ACTORS, f"{DETAILS}whole_weights_of_a_value_model_start_as_the_reward_model",
        "head.weight.data.copy_(inner.score.weight.float())", "pass",
    ),
    mistake(
        "fresh-value-head-random", ACTORS, STAY_LORA,
        "nn.init.zeros_(head.weight)", "nn.init.normal_(head.weight)",
    ),
    mistake(
        "value-model-of-another-base", ACTORS, f"{PPO}a_value_model_never_starts_elsewhere_in_silence",
        "reward.plain.digest == policy.plain.digest", "True",
    ),
    # The reference.
    mistake("reference-is-the-live-policy", LOOP, EXACT, 'self._read("reference"', 'self._read("policy"'),
    mistake(
        "reference-is-the-policys-adapter", ACTORS, REFERENCE,
        '"reference": reference,', '"reference": reference and ADAPTER,',
    ),
    mistake(
        "reference-is-the-base-under-the-adapter", ACTORS, REFERENCE,
        "elif policy.adapter is not None:\n        reference", "elif False:\n        reference",
    ),
    mistake(
        "reference-is-the-live-whole-model", ACTORS, STAY_FULL,
        "reference = models.load_causal(policy, dtype=torch.float32)", "reference = model",
    ),
    mistake(
        "value-is-the-live-whole-model", ACTORS, STAY_FULL,
        "return models.load_causal(policy, dtype=torch.float32), head", "return model, head",
    ),
    mistake(
        "reference-by-the-policys-head", LOOP, STAY_FULL,
        "self.actors.log_probs(states, targets, role)", "self.actors.log_probs(states, targets)",
    ),
    mistake("base-trained-along", ACTORS, AS_ALONE, "self.requires_grad_(False)", "self.requires_grad_(True)"),
    mistake("dropout-of-whole-models-left-on", ACTORS, STAY_FULL, "module.p = 0.0", "pass"),
    mistake(
        "dropout-of-adapters-left-on", ACTORS, STAY_LORA,
        "module.p = 0.0", "pass",
        'model_copy(update={"dropout": 0.0})', "model_copy()",
    ),
    # Sampling and log-probs.
    mistake(
        "sampling-without-temperature", "stages.ppo", LEFT_PADDED,
        "eos_ids(actors.model, tokenizer), self.temperature,", "eos_ids(actors.model, tokenizer), 1.0,",
    ),
    mistake(
        "log-probs-without-temperature", ACTORS, LEFT_PADDED,
        "get_text_config(), temperature)", "get_text_config())",
    ),
    mistake(
        "drawn-without-temperature", "stages.rollout", f"{ROLLOUT}frequencies_are_the_softmax_of_the_logits[0.5]",
        "cumulative = logprobs.double()", "cumulative = logits.log_softmax(-1).double()",
    ),
    mistake(
        "sampler-reports-the-models-own-log-probs",
        "stages.rollout",
        f"{ROLLOUT}log_probs_are_those_of_the_distribution_that_was_drawn_from",
        "return chosen, logprobs.gather", "return chosen, logits.log_softmax(-1).gather",
    ),
    mistake(
        "answers-never-end", "stages.ppo", LATER,
        "eos_ids(actors.model, tokenizer), self.temp", "frozenset(), self.temp",
    ),
    mistake(
        "end-token-left-out-of-answers", "stages.rollout", SAME_ANSWERS,
        "= step + 1, True", "= max(step, 1), True",
    ),
    mistake(
        "noise-by-the-place-in-a-batch", "stages.rollout", SAME_ANSWERS,
        "_uniforms([seed for _, seed in requests]", "_uniforms(list(range(len(requests)))",
    ),
    mistake(
        "seeds-without-a-key", "stages.rollout", f"{ROLLOUT}keys_and_seeds_tell_equal_prompts_apart",
        '{seed}/{key}/{answer}', '{seed}/{answer}',
    ),
    mistake(
        "seeds-without-the-runs-seed", "stages.rollout", f"{ROLLOUT}keys_and_seeds_tell_equal_prompts_apart",
        '{seed}/{key}/{answer}', '{key}/{answer}',
    ),
    mistake(
        "seeds-by-the-place-in-a-batch", LOOP, COUNTERS,
        "self._answers(asked, list(episodes))", "self._answers(asked, list(range(len(asked))))",
    ),
    mistake("always-the-first-episodes", LOOP, COUNTERS, "first = iteration * self.stage.batch_size", "first = 0"),
    mistake("slope-of-the-cap-missing", "stages.logprobs", LOGPROBS, "(1 - inner.square())", "torch.ones_like(inner)"),
    mistake(
        "slope-of-the-temperature-missing", "stages.logprobs", LOGPROBS,
        "slope = (1 - inner.square()).mul_(self.factor / self.temperature)",
        "slope = (1 - inner.square()).mul_(self.factor)",
    ),
    mistake(
        "slope-without-temperature-or-cap", "stages.logprobs", LOGPROBS,
        "products.mul_(factor)), factor", "products.mul_(factor)), self.factor",
    ),
    mistake(
        "slope-of-the-scale-missing", "stages.logprobs", LOGPROBS,
        "isinstance(slope, float) and slope == 1.0", "isinstance(slope, float)",
    ),
    mistake(
        "entropy-sign", "stages.logprobs", LOGPROBS,
        "entropy[part] = normaliser.squeeze(-1) - (probabilities * logits).sum(-1)",
        "entropy[part] = (probabilities * logits).sum(-1) - normaliser.squeeze(-1)",
    ),
    # The loop.
    mistake("the-same-order-in-every-epoch", LOOP, EPOCHS, 'f"order {iteration}", epoch)', 'f"order {iteration}", 0)'),
    mistake("the-same-order-in-every-iteration", LOOP, EPOCHS, 'f"order {iteration}", epoch)', '"order", epoch)'),
    mistake(
        "order-from-the-process", LOOP, COUNTERS,
        "torch.randperm(len(self.batch.answers), generator=order)", "torch.randperm(len(self.batch.answers))",
    ),
    mistake("minibatches-overlap", LOOP, EPOCHS, "rows[number * size :", "rows[number * (size - 1) :"),
    mistake("minibatches-skip-a-row", LOOP, EPOCHS, "(number + 1) * size]", "(number + 1) * size - 1]"),
    mistake("always-the-first-minibatch", LOOP, EPOCHS, "rows[number * size : (number + 1) * size]", "rows[:size]"),
    mistake(
        "prompt-order-from-the-process", LOOP, PROMPTS,
        "torch.randperm(prompts, generator=generator)", "torch.randperm(prompts)",
    ),
    mistake(
        "the-same-prompt-order-in-every-pass", LOOP, PROMPTS,
        'request_seed(seed, "prompts", number)', 'request_seed(seed, "prompts", 0)',
    ),
    mistake(
        "prompts-drawn-with-replacement", LOOP, PROMPTS,
        "torch.randperm(prompts, generator=generator)", "torch.randint(prompts, (prompts,), generator=generator)",
    ),
    mistake("warm-up-trains-the-policy", LOOP, WARM_UP, "policy=iteration >= self.stage.value_warmup", "policy=True"),
    mistake("warm-up-one-iteration-long", LOOP, WARM_UP, "policy=iteration >= self", "policy=iteration > self"),
    mistake("target-kl-ignored", LOOP, TARGET_KL, "self.stopped_epochs = epoch_kl > self.stage.target_kl", "pass"),
    mistake(
        "policy-gradient-not-clipped", LOOP, NORMS,
        "            (\"grad_norm\", self.actors.policy_parameters()),\n",
        "            (\"grad_norm\", [p.detach() for p in self.actors.policy_parameters()]),\n",
    ),
    mistake(
        "value-gradient-not-clipped", LOOP, NORMS,
        '("value_grad_norm", self.actors.value_parameters()),',
        '("value_grad_norm", [p.detach() for p in self.actors.value_parameters()]),',
    ),
    mistake(
        "one-norm-for-both-gradients", LOOP, NORMS,
        "clip_grad_norm_(parameters, self",
        "clip_grad_norm_([*self.actors.policy_parameters(), *self.actors.value_parameters()], self",
    ),
    mistake(
        "gradients-clipped-once-more-together", "stages.ppo", NORMS,
        '"max_grad_norm": 0.0', '"max_grad_norm": self.max_grad_norm',
    ),
    mistake("epsilon-of-adam", "stages.ppo", NORMS, '"adam_epsilon": 1e-5, ', ""),
    mistake(
        "held-out-prompts-are-trained-on", "stages.ppo", f"{DETAILS}held_out_prompts_are_not_trained_on",
        "rows, held = (rest, held) if rest", "rows, held = (rows, held) if rest",
    ),
    mistake(
        "objective-rewards-kl", LOOP, EVALUATION,
        "batch.scores - self.stage.kl_coef * kl", "batch.scores + self.stage.kl_coef * kl",
    ),
    mistake(
        "objective-per-token", LOOP, EVALUATION,
        "torch.where(mask, values, 0.0).sum(-1)", "torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)",
    ),
    mistake(
        "evaluations-with-other-seeds", LOOP, EVALUATION,
        '[f"evaluation {i}" for', '[f"evaluation {self.state.global_step} {i}" for',
    ),
    mistake(
        "best-by-the-worst-evaluation", "stages.ppo", f"{DETAILS}the_best_evaluation_has_the_highest_objective",
        '("eval_objective", 1)', '("eval_objective", -1)',
    ),
    mistake(
        "worst-evaluation-reported", "stages.ppo", BEST,
        'if step and point["step"] == step', 'if step and point["step"] > step',
    ),
    mistake(
        "last-weights-published", "stages.training", BEST,
        "if best is not None and best != trainer.state.global_step:", "if False:",
    ),
    # Going on.
    mistake(
        "checkpoint-without-the-value-head", LOOP, KILLED,
        "parameter.copy_(stored[name])", 'parameter.copy_(parameter if name == "value_head.weight" else stored[name])',
    ),
    mistake(
        "checkpoint-without-the-value-adapter", LOOP, KILLED,
        "parameter.copy_(stored[name])", 'parameter.copy_(parameter if ".value." in name else stored[name])',
    ),
    mistake(
        "checkpoint-without-the-policy", LOOP, KILLED,
        "parameter.copy_(stored[name])", 'parameter.copy_(parameter if ".default." in name else stored[name])',
    ),
    mistake(
        "checkpoint-without-the-optimizer", "stages.training", KILLED,
        '"save_strategy": "no",', '"save_strategy": "no",\n        "save_only_model": True,',
    ),
    # The sampler.
    mistake(
        "probe-tolerance-ignored", LOOP, f"{DETAILS}a_sampler_that_kept_the_old_adapter_is_found_out_before_it_answers",
        "if not gap <= allowed:", "if False:",
    ),
    mistake(
        "adapter-published-once", LOOP, VERSIONS,
        "if self.published is None or self.published.version != version:", "if self.published is None:",
    ),
    mistake(
        "adapter-published-for-every-batch", LOOP, VERSIONS,
        "if self.published is None or self.published.version != version:", "if True:",
    ),
    mistake("old-adapters-kept", LOOP, VERSIONS, "if before is not None:", "if False:"),
    mistake(
        "nan-adapter-published", "stages.models", f"{DETAILS}a_broken_adapter_is_not_published",
        (
            "not bool(weight.isfinite().all()):\n"
            '            raise AlignError(f"learning_rate: {name} is not finite; lower learning_rate, or'
        ),
        "False:\n            raise AlignError(f\"learning_rate: {name} is not finite; lower learning_rate, or",
    ),
    mistake(
        "sampler-of-other-weights", LOOP, f"{PPO}a_sampler_with_other_weights_stops_the_run",
        'if now["sampler_gap"] > GAP_LIMIT:', "if False:",
    ),
    # The reward model.
    mistake(
        "reward-of-the-token-before-last", "stages.models", f"{MODELS}a_score_is_what_the_classifier_returns",
        "mask.sum(dim=1) - 1]", "mask.sum(dim=1) - 2]",
    ),
    mistake(
        "reward-of-the-last-position", "stages.models", f"{MODELS}a_score_does_not_depend_on_padding",
        "hidden[torch.arange(len(ids)), mask.sum(dim=1) - 1]", "hidden[:, -1]",
    ),
    mistake(
        "joined-reward-of-the-token-before-last", ACTORS, AS_ALONE,
        "[len(rows[i]) - 1 for i in group]", "[len(rows[i]) - 2 for i in group]",
    ),
    mistake("joined-reward-of-the-last-position", ACTORS, AS_ALONE, "[len(rows[i]) - 1 for i in group]", "-1"),
    mistake(
        "joined-reward-head-random", ACTORS, AS_ALONE,
        "self.head = head.to(actors.device)", "self.head = torch.randn_like(head)",
    ),
    mistake(
        "joined-reward-of-the-policys-adapter", ACTORS, AS_ALONE,
        "model.set_adapter(self.adapter)", "model.set_adapter(ADAPTER)",
    ),
    mistake(
        "joined-reward-not-proven", ACTORS, f"{PPO}a_damaged_reward_model_is_refused",
        "models.check_reference_scores(self.score_ids, actors.model.dtype, source)", "pass",
    ),
    mistake(
        "reward-not-proven", "stages.models", f"{MODELS}a_random_head_is_refused",
        "check_reference_scores(lambda rows: score(model, rows), model.dtype, source)", "pass",
    ),
    mistake(
        "reward-without-the-prompt",
        "stages.reward",
        "tests/stages/test_reward.py::test_preferences_are_learnt_and_the_published_model_proves_itself",
        '[*row["prompt_ids"], *row[side]]', '[*row[side]]',
    ),
    mistake(
        "reward-margin-sign",
        "stages.reward",
        "tests/stages/test_reward.py::test_preferences_are_learnt_and_the_published_model_proves_itself",
        "margins = [chosen - rejected for", "margins = [rejected - chosen for",
    ),
    # Direct preference optimisation, and rows.
    mistake(
        "eos-left-out-of-dpo", "stages.dpo", f"{DPO}token_ids_are_taken_exactly",
        "train, held_out = training.tables(rows)",
        (
            "from dataclasses import replace\n"
            "        sides = (\"chosen_ids\", \"rejected_ids\")\n"
            "        cut = [{**row, **{side: row[side][:-1] for side in sides}} for row in rows.train]\n"
            "        train, held_out = training.tables(replace(rows, train=cut))"
        ),
    ),
    mistake(
        "eos-left-out-of-dpos-judge", "stages.models", EVALUATION,
        "[True] * len(completion)", "[True] * (len(completion) - 1) + [False]",
    ),
    mistake("log-probs-of-the-token-itself", "stages.models", EVALUATION, "hidden[row, at - 1]", "hidden[row, at]"),
    mistake(
        "eos-left-out-of-text", "data.chat", f"{CHAT}text_ends_with_one_eos_and_starts_with_one_bos",
        'return text if text.endswith(eos) else f"{text}{eos}"', "return text",
    ),
    mistake(
        "eos-left-out-of-an-answers-labels", "data.chat", f"{CHAT}text_and_string_pairs_equal_trl",
        "[IGNORED] * len(prompt) + completion}", "[IGNORED] * len(prompt) + completion[:-1] + [IGNORED]}",
    ),
    mistake(
        "prompts-are-learnt", "data.chat", f"{CHAT}ids_are_taken_exactly",
        "[IGNORED] * len(prompt) + completion}", "list(ids)}",
    ),
    mistake(
        "a-turn-is-learnt-without-its-end", "data.spans", MASKS,
        "start, stop) - 1] + 1))", "start, stop) - 1]))",
    ),
    mistake(
        "a-turn-is-learnt-past-its-end", "data.spans", MASKS,
        "start, stop) - 1] + 1))", "start, stop) - 1] + 2))",
    ),
    mistake(
        "special-tokens-in-words-pass", "data.spans", f"{MASKED}words_that_hold_a_special_token_are_refused[qwen3]",
        "if found := self._special.search(message.content):", "if found := None:",
    ),
    mistake(
        "ends-inside-an-answer-pass", "data.chat", f"{CHAT}an_answer_in_plain_text_ends_at_its_end_and_once",
        "if rest and not rest.isspace():", "if False:",
    ),
    mistake(
        "ids-of-no-embedding-pass", "data.chat", f"{READING}ids_are_held_against_the_models_embedding",
        "if ids and max(ids) >= vocabulary:", "if False:",
    ),
    mistake(
        "an-embedding-is-as-large-as-its-tokenizer", "stages.training",
        f"{READING}ids_are_held_against_the_models_embedding",
        "vocabulary = models.vocabulary(start) if start else None", "vocabulary = None",
    ),
    mistake(
        "sides-that-are-equal-once-cut-pass", "data.chat",
        f"{READING}pairs_that_differ_only_where_they_are_cut_are_bad_rows",
        'if self.task == "preference" and cut["chosen_ids"] == cut["rejected_ids"]:', "if False:",
    ),
    mistake(
        "any-order-of-turns", "data.fields", ROWS,
        "if message.role != expected and not (index == 0 and start):", "if False:",
    ),
    mistake("equal-sides-pass", "data.fields", ROWS, "if chosen == rejected:", "if False:"),
    mistake(
        "sides-may-part-anywhere", "data.formats", ROWS,
        "if not shared or len(chosen) != shared + 1 or len(rejected) != shared + 1:", "if not shared:",
    ),
    mistake("blank-text-passes", "data.fields", LOADED, "if not value or value.isspace():", "if not value:"),
    mistake("unknown-fields-pass", "data.formats", ROWS, "near or (missing is None and not named)", "False"),
    mistake(
        "the-first-reading-wins", "data.formats", f"{ROWS}::test_two_readings_are_a_question_that_format_answers",
        "if len(likely) > 1:", "if False:",
    ),
    mistake("one-address-too-few", "data.gate", GATE, "len(first) < SHOWN_EACH", "len(first) < SHOWN_EACH - 1"),
    mistake(
        "a-share-at-the-limit-is-refused", "data.gate", GATE,
        "if share > max_bad_share:", "if share >= max_bad_share:",
    ),
    mistake(
        "duplicate-keys-pass", "data.json_text", SOURCES,
        "                if key in seen:", "                if False:",
    ),
    mistake(
        "held-out-rows-are-repeated", "stages.reading", MIXED,
        "held.append(numbers[~mine & (taken | (whole >= 1))])",
        "held.append(numpy.concatenate([numbers[~mine]] * max(1, int(whole))))",
    ),
    mistake("the-seed-chooses-no-rows", "stages.reading", MIXED, "(seed * 0x9E3779B97F4A7C15 +", "(0 * seed +"),
    mistake(
        "weights-without-their-fraction", "stages.reading", MIXED,
        "numbers[mine & taken]", "numbers[mine & False]",
    ),
    mistake(
        "a-damaged-entry-is-taken-for-whole", "stages.reading",
        f"{READING}a_damaged_entry_is_made_again[one bit of the rows]",
        "if digest != canonical_digest(found) or any(", "if False and any(",
    ),
    mistake(
        "a-large-source-hides-a-small-one", "stages.reading", f"{READING}each_source_is_judged_by_its_own_share",
        "            gate.judge(on_bad_row, max_bad_share, name)",
        "            [gate.add(other) for _, other in found if other is not gate]\n"
        "            gate.judge(on_bad_row, max_bad_share, name)",
    ),
    mistake(
        "rows-of-a-line-share-an-address", "data.json_text",
        f"{READING}rows_of_an_array_on_one_line_have_addresses_of_their_own",
        "index if line == before else None", "None",
    ),
    mistake("the-template-is-not-in-the-key", "stages.reading", KEYED, ', "chat_template")', ")"),
    mistake(
        "dpo-reference-is-the-policy", "stages.training", f"{DPO}the_reference_is_the_policy_that_came_in[lora]",
        'trainer.model.set_adapter("ref")', "pass",
    ),
    mistake(
        "dpo-of-another-beta", "stages.dpo", f"{DPO}the_stage_trains_as_plain_trl_does",
        "beta=self.beta,", "beta=1.0,",
    ),
    mistake(
        "learning-rate-does-not-fall", "stages.training", f"{DPO}the_stage_trains_as_plain_trl_does",
        'if stage.schedule == "constant" else stage.schedule', 'if stage.schedule == "constant" else "constant"',
    ),
    mistake(
        "dpo-mean-of-micro-batch-means", "stages.dealing", f"{DPO}micro_batches_change_nothing[3]",
        "return loss * (rows * passes * ranks / self._rows_in_step)", "return loss",
    ),
    mistake(
        "dpo-first-loss-not-checked", "stages.training", f"{DPO}another_reference_is_refused_at_the_first_step",
        "abs(loss - first_loss[0]) > first_loss[1]", "False",
    ),
    # How sure a preference is.
    mistake(
        "weights-of-pairs-are-lost", "stages.pair_losses", f"{BY_HAND}[4-0.0]",
        "(each if weights is None else weights * each).mean()", "each.mean()",
    ),
    mistake(
        "weights-divided-by-the-batch-s-own-sum", "stages.pair_losses", f"{BY_HAND}[4-0.0]",
        'row["weight"] / self.mean for', 'row["weight"] * len(rows) / sum(r["weight"] for r in rows) for',
    ),
    mistake(
        "a-step-s-loss-of-its-own-scale", "stages.pair_losses", f"{PAIRS}a_killed_run_goes_on_with_its_weights",
        'logs["loss"] /= self._step_weight', "pass",
    ),
    mistake(
        "held-out-weights-of-the-training-s-mean", "stages.pair_losses",
        f"{PAIRS}held_out_pairs_are_weighed_by_their_own_weights",
        "weights * (mean / held_out_mean)", "weights",
    ),
    mistake(
        "conservative-dpo-is-robust-dpo", "stages.pair_losses", f"{BY_HAND}[4-0.3]",
        "clean + smoothing * flipped if smoothing", "clean - smoothing * flipped if smoothing",
    ),
    mistake(
        "smoothing-of-sigmoid-ignored", "stages.dpo", f"{PAIRS}smoothing_stops_where_the_pair_is_as_sure_as_the_votes",
        'or (self.label_smoothing > 0 and "sigmoid" in self.losses)', "",
    ),
    mistake(
        "weightless-pairs-are-learnt", "stages.reading", f"{PAIRS}pairs_that_weigh_nothing_are_in_no_part",
        'self.column("weight") > 0', 'self.column("weight") >= 0',
    ),
    mistake(
        "the-weight-column-is-not-in-the-key", "stages.reading",
        f"{PAIRS}the_weights_decide_the_entry_and_no_row_s_side",
        '"weight_column": source.weight_column,', "",
    ),
    mistake(
        "negative-weights-pass", "data.fields", f"{LOADED}::test_a_weight_that_is_none_is_a_bad_row",
        "not 0 <= value <= 1e30", "not value <= 1e30",
    ),
    mistake(
        "margins-do-not-reach-the-reward-model", "stages.reward", MARGINS,
        'with_margin and "margin" in row', "False",
    ),
    # feedback
    mistake(
        "the-earliest-vote-counts", "data.feedback.decide",
        f"{VOTES}the_latest_vote_of_a_user_counts_wherever_it_stands",
        "ORDER BY coalesce(ts, if(label = RETRACTED(), {_NOW}, -1)) DESC,",
        "ORDER BY coalesce(ts, if(label = RETRACTED(), {_NOW}, -1)),",
    ),
    mistake(
        "contradictions-of-one-time-count", "data.feedback.decide",
        f"{VOTES}votes_of_one_time_that_contradict_each_other_count_for_nothing",
        "min(label) <> max(label) AS torn", "false AS torn",
    ),
    mistake(
        "every-up-with-every-down", "data.feedback.decide", ZIPPED,
        "best.prompt = worst.prompt AND best.place = worst.place", "best.prompt = worst.prompt",
    ),
    mistake(
        "a-cap-takes-answers-away", "data.feedback.decide", ZIPPED,
        "FROM pair WHERE pair.prompt = answer.prompt AND (chosen = answer.answer OR rejected = answer.answer))",
        "FROM ranked WHERE ranked.prompt = answer.prompt AND (chosen = answer.answer OR rejected = answer.answer))",
    ),
    mistake(
        "a-tie-is-a-dislike", "data.feedback.decide", f"{VOTES}a_tie_is_dropped",
        "WHEN up = down THEN {_fate(\"tied\")}\n            ELSE", "ELSE",
    ),
    mistake(
        "slips-are-edits", "data.feedback.decide", f"{VOTES}an_edit_is_a_pair_unless_it_is_a_slip_or_another_text",
        "WHEN edited AND alike > {high} THEN", "WHEN edited AND alike > 2 THEN",
    ),
    mistake(
        "a-pair-counts-once-for-two-owners", "data.feedback.decide",
        "tests/data/feedback/test_properties.py::test_no_user_decides_more_than_its_share[0]",
        "cap = max(CAP_AT_LEAST, int(settings.user_share * kept))",
        "cap = max(CAP_AT_LEAST, int(2 * settings.user_share * kept))",
    ),
    mistake(
        "dislikes-of-the-other-forgotten",
        "data.feedback.confidence",
        "tests/data/feedback/test_confidence.py::test_confidence_of_thumbs_is_the_integral",
        "a_1, b_1, a_2, b_2 = 1 + up_1, 1 + down_1, 1 + up_2, 1 + down_2",
        "a_1, b_1, a_2, b_2 = 1 + up_1, 1 + down_1, 1 + up_2, 1 + 0 * down_2",
    ),
    mistake(
        "the-system-turn-is-no-context", "data.feedback.keys", f"{VOTES}equal_prompts_are_equal_messages",
        'if ignore_system and prompt[0].role == "system"', 'if prompt[0].role == "system"',
    ),
    mistake(
        "conversations-are-parted", "data.feedback.arrange",
        f"{VOTES}near_duplicates_and_conversations_stay_on_one_side",
        "SELECT prompt, conversation FROM statement SEMI JOIN emitted",
        "SELECT prompt, event FROM statement SEMI JOIN emitted",
    ),
    mistake(
        "labels-come-in-blocks", "data.feedback.arrange",
        f"{VOTES}liked_and_disliked_rows_are_mixed_and_equal_prompts_kept_apart",
        "ORDER BY mixed, label, row", "ORDER BY label, mixed, row",
    ),
    mistake(
        "forgotten-votes-still-count", "data.feedback.forget", FORGET,
        "left = [word for word in words if word[1] != _number(user)]", "left = words[1:]",
    ),
    mistake(
        "tombstones-are-not-read", "data.feedback.index", FORGET,
        "if user in self.forgotten:", "if user in ():",
    ),
    # Gates and comparisons.
    mistake(
        "a-reward-model-at-chance-passes", "stages.ppo", f"{SURELY}[0.55-377-False]",
        "passed = low > 0.5", "passed = accuracy > 0.5",
    ),
    mistake(
        "wilson-is-wald-s-half-width", "stages.statistics",
        f"{SHARES}wilson_is_where_the_score_test_turns[0.5-40]",
        "z * z / (4 * count * count)", "0.0",
    ),
    mistake(
        "gates-enter-the-key", "pipeline.store", f"{GATES}gates_are_in_no_key_and_no_record",
        '{"type": True, "how": True, "require": True}', '{"type": True, "how": True}',
    ),
    mistake(
        "at-least-is-more-than", "pipeline.rules", f"{GATES}rules_are_compared_as_they_read[>= 0.5-0.5-None-True]",
        "operator.ge", "operator.gt",
    ),
    mistake(
        "a-factor-is-lost", "pipeline.rules", f"{GATES}rules_are_compared_as_they_read",
        "rule.factor * other", "other",
    ),
    mistake(
        "a-metric-that-is-no-number-passes", "pipeline.rules",
        f"{GATES}a_metric_that_is_missing_or_no_number_does_not_pass",
        'return "" if math.isfinite(value) else', 'return "" if True else',
    ),
    mistake(
        "a-model-s-name-is-a-stage-s", "pipeline.gates", f"{GATES}gates_that_mean_something",
        'if not head.startswith("stage:") and stage.metric_owner(head) is not None:', "if False:",
    ),
    mistake(
        "a-stage-that-is-not-read-may-be-asked", "pipeline.gates",
        f"{GATES}gates_that_mean_nothing_are_said_with_their_line[a stage that it does not read]",
        "if of != name and of not in reached:", "if False:",
    ),
    mistake(
        "a-handful-of-prompts-is-believed", "stages.comparison",
        f"{SEEN}few_prompts_are_not_believed_though_the_bootstrap_is_sure",
        " and abs(rate - 0.5) > Z_95 * even_error(wins)", "",
    ),
    mistake(
        "what-is-seen-half-the-time-counts-as-seen", "stages.statistics",
        f"{SEEN}the_verdict_names_the_winner_and_its_interval",
        "normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)", "normal.inv_cdf(1 - level / 2)",
    ),
    mistake(
        "the-worst-answer-completes", "stages.complete",
        f"{COMPLETED}the_best_answer_is_taken_where_it_is_better_by_enough",
        "top = max(range(len(others))", "top = min(range(len(others))",
    ),
    mistake(
        "gaps-are-not-in-deviations", "stages.complete",
        f"{COMPLETED}the_best_answer_is_taken_where_it_is_better_by_enough",
        "self.complete.min_gap * _deviation(scores)", "self.complete.min_gap",
    ),
    mistake(
        "what-was-cut-off-completes", "stages.complete",
        f"{COMPLETED}an_answer_that_was_cut_off_or_is_the_disliked_one_is_never_taken",
        'if answer.finish == "stop" and (', "if (",
    ),
    mistake(
        "completed-rows-are-never-forgotten", "data.feedback.lineage",
        "tests/data/feedback/test_complete.py::test_a_forgotten_users_dislike_takes_its_pair_along",
        "'completed', prompt, answer, 2 FROM completed", "'completed', prompt, answer, 2 FROM completed WHERE false",
    ),
    mistake(
        "settings-beside-nested-inputs-are-no-part-of-the-key", "pipeline.store",
        "tests/pipeline/test_store.py::test_inputs_inside_a_configuration_enter_the_key_by_digest_and_the_rest_as_it_is",
        "if isinstance(value, Config):", "if value is Config:",
    ),
    # --- evaluation ---
    mistake(
        "the-mean-of-ratios-for-the-ratio-of-means", STATISTICS, f"{STATED}the_interval_of_a_ratio_covers_it",
        "means(values) / means(over)", "means(np.divide(values, over))",
    ),
    mistake(
        "a-difference-that-no-win-rate-has", STATISTICS, f"{STATED}what_no_sample_of_that_size_can_show",
        "0 < smallest <= fmean(abs(win - 0.5) for win in wins)", "smallest",
    ),
    mistake(
        "the-warm-up-counts", "stages.speed", "tests/stages/test_speed.py::test_figures_are_those_of_the_clock",
        "return found[WARM_UP:]", "return found",
    ),
    mistake(
        "length-stays-in-the-controlled-rate",
        STATISTICS,
        f"{STATED}the_length_controlled_win_rate",
        "rate = _sigmoid(logistic_fit(features, outcome, np.ones((1, count)))[0, 0])",
        "rate = _sigmoid(logistic_fit(features, outcome, np.ones((1, count)))[0].sum())",
    ),
    mistake(
        "p-values-that-are-never-counted-in",
        STATISTICS,
        f"{STATED}the_sign_flip_test_of_many_pairs_draws_them",
        "(found + 1) / (flips + 1)",
        "found / flips",
    ),
    mistake("one-sided-sign-test", STATISTICS, f"{STATED}the_sign_test_is_the_binomial_test_of_scipy",
            "return min(1.0, 2 * tail", "return min(1.0, tail"),
    mistake(
        "unread-answers-are-a-label",
        STATISTICS,
        f"{STATED}macro_f1_is_that_of_scikit_learn",
        "    true = table.sum(-1)",
        "    true = table[..., :labels].sum(-1)",
    ),
    mistake(
        "gains-with-the-interval-of-no-pairs",
        STATISTICS,
        f"{STATED}paired_shares_cover_their_difference_by_exact_enumeration",
        "math.sqrt((up + down - (up - down) ** 2) / (count + 2))",
        "math.sqrt((up - down) ** 2 / (count + 2))",
    ),
    mistake(
        "the-first-number-instead-of-the-last",
        "stages.labelled",
        "tests/stages/test_labelled.py::test_the_last_number",
        'written[-1]["number"]',
        'written[0]["number"]',
    ),
    mistake(
        "thoughts-are-read-as-answers",
        "stages.labelled",
        "tests/stages/test_labelled.py::test_the_letter_of_a_choice",
        'answer = answer.rpartition("</think>")[2]',
        'answer = answer.removeprefix("<think>")',
    ),
    mistake(
        "questions-are-sampled-not-answered-greedily",
        "stages.evaluate",
        f"{SETS}scores_of_a_labelled_set_are_those_of_the_script",
        "likeliest if one.name else drawn",
        "drawn",
    ),
    mistake(
        "the-second-order-is-not-turned-round",
        "stages.judge",
        f"{JUDGED}both_orders_make_a_score",
        '{"A": 0.0, "B": 1.0, "C": 0.5}',
        '{"A": 1.0, "B": 0.0, "C": 0.5}',
    ),
    mistake(
        "a-verdict-anywhere-in-the-reply",
        "stages.judge",
        f"{JUDGED}a_verdict_stands_alone_in_the_last_line",
        "_VERDICT.findall(lines[-1])",
        "_VERDICT.findall(lines[0])",
    ),
    mistake(
        "marks-that-anyone-can-write",
        "stages.judge",
        f"{JUDGED}text_cannot_close_the_marks_it_stands_between",
        'hashlib.sha256("\\0".join((prompt, first, second)).encode())',
        'hashlib.sha256(prompt.encode())',
    ),
    mistake(
        "the-model-is-not-in-the-key-of-a-verdict",
        "stages.judge",
        f"{JUDGED}verdicts_are_kept_and_what_decides_them_is_their_key",
        'canonical_digest({"url": self.judge.url, **body})',
        'canonical_digest({"url": self.judge.url, "messages": chat})',
    ),
    mistake(
        "the-key-in-an-error",
        "stages.judge",
        f"{JUDGED}what_does_not_pass_ends_with_what_to_do",
        'return text.replace(self._secret, "***") if self._secret else text',
        "return text",
    ),
]
# fmt: on


# --- one mutation, in a process of its own ----------------------------------------------------------------------------


class Patched(importlib.machinery.SourceFileLoader):
    """Loads one module with its mutation; bytecode is neither read nor written."""

    mutation: Mutation

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        source = self.mutation.apply(Path(path).read_text("utf-8"))
        return compile(source, path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module, as every other finder would, and has it loaded with its mutation."""

    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation
        self.used = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"align_pipeline.{self.mutation.module}":
            return None
        loader = Patched(fullname, str(self.mutation.file))
        loader.mutation = self.mutation
        self.used = True
        return importlib.machinery.ModuleSpec(fullname, loader, origin=str(self.mutation.file))


class Watch:
    """Notes why tests fail, and lends them the trained base so that it is not trained anew."""

    base: Path

    def __init__(self, base: Path) -> None:
        Watch.base = base
        self.failures: list[dict[str, Any]] = []

    @pytest.fixture(scope="session", autouse=True)
    @classmethod
    def trained_base(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        (tmp_path_factory.getbasetemp() / "envb").symlink_to(cls.base, target_is_directory=True)

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        from align_pipeline.pipeline.errors import AlignError

        error = call.excinfo.value
        on_purpose = isinstance(error, AssertionError | pytest.fail.Exception | AlignError)
        self.failures.append(
            {
                "test": getattr(report, "nodeid", str(node)),
                "on_purpose": on_purpose and getattr(report, "when", None) in ("setup", "call"),
                "error": f"{type(error).__name__}: {error}".split("\n")[0][:160],
            }
        )


def in_child(mutation: Mutation | None, tests: Sequence[str], base: Path, folder: Path) -> dict[str, Any]:
    """Run tests in this process, which ends afterwards, and return what came of them."""
    finder = Finder(mutation) if mutation else None
    if finder:
        sys.meta_path.insert(0, finder)
    watch = Watch(base)
    arguments = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'temp'}", *tests]
    code = pytest.main(["-x", *arguments] if mutation else arguments, plugins=[watch])
    return {"code": int(code), "failures": watch.failures, "used": finder is None or finder.used}


def fork(mutation: Mutation | None, tests: Sequence[str], base: Path, folder: Path) -> int:
    """Start a child for one mutation; what it prints and what comes of it lie in its folder."""
    folder.mkdir()
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        found = in_child(mutation, tests, base, folder)
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        os._exit(0)


def verdict(mutation: Mutation, folder: Path, seconds: float) -> tuple[bool, str]:
    """Return whether a mutation was noticed as it should be, and the line that says so."""
    name = f"{mutation.name:<46}"
    if not (folder / "found.json").is_file():
        return False, f"{name} BROKEN: no result within {seconds:.0f} s (see {folder / 'output.txt'})"
    found = json.loads((folder / "found.json").read_text())
    if not found["used"]:
        return False, f"{name} BROKEN: {mutation.module} was never imported"
    if found["code"] == 0:
        return False, f"{name} SURVIVED {', '.join(mutation.tests)}"
    if not found["failures"] or not found["failures"][0]["on_purpose"]:
        why = found["failures"][0]["error"] if found["failures"] else f"pytest ended with {found['code']}"
        return False, f"{name} BROKEN: {why} (see {folder / 'output.txt'})"
    return True, f"{name} killed by {found['failures'][0]['test']} ({seconds:.1f} s)"


# --- all of them ------------------------------------------------------------------------------------------------------


def check(mutations: Sequence[Mutation]) -> list[str]:
    """Return what keeps mutations from being applied: all of it, before anything is run."""
    problems = []
    names = [mutation.name for mutation in mutations]
    problems += [f"{name}: two mutations have this name" for name in sorted({n for n in names if names.count(n) > 1})]
    for mutation in mutations:
        try:
            compile(mutation.apply(mutation.file.read_text("utf-8")), str(mutation.file), "exec", dont_inherit=True)
        except (ValueError, SyntaxError) as error:
            problems.append(f"{error}" if isinstance(error, ValueError) else f"{mutation.name}: {error}")
    return problems


def import_what_is_heavy() -> None:
    """Import once, before the forks, all that takes long and none of what is mutated."""
    import peft
    import torch
    import transformers
    import trl
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.llama import modeling_llama

    torch.set_num_threads(1)
    for owner, names in (
        (transformers, ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer", "Trainer")),
        (trl, ("DPOTrainer", "RewardTrainer", "SFTTrainer")),
        (peft, ("PeftModel", "LoraConfig")),
        (modeling_llama, ("LlamaForCausalLM",)),
        (modeling_gpt2, ("GPT2LMHeadModel",)),
    ):
        for name in names:
            getattr(owner, name)
    mutated = [name for name in sys.modules if name.startswith(("align_pipeline.stages", "align_pipeline.data"))]
    assert not mutated, f"imported before the mutations: {mutated}"


def train_base(folder: Path) -> Path:
    """Train the base of the closed-form world in a child, so that this process never runs a backward pass."""
    child = os.fork()
    if child == 0:
        try:
            sys.path.insert(0, str(ROOT / "tests" / "support"))
            import envb

            envb.write_base(folder / "unfinished")
            (folder / "unfinished").rename(folder / "envb")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "envb").is_dir(), "the base could not be trained"
    return folder / "envb"


def run_all(jobs: Sequence[tuple[Mutation | None, Sequence[str]]], base: Path, folder: Path) -> int:
    """Run jobs, `AT_ONCE` at a time, print a line for each, and return how many went wrong."""
    waiting, running, wrong = list(enumerate(jobs)), {}, 0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, (mutation, tests) = waiting.pop(0)
            place = folder / f"{number:03d}-{mutation.name if mutation else 'unmutated'}"
            running[fork(mutation, tests, base, place)] = (mutation, place, time.monotonic())
        time.sleep(0.05)
        for child in list(running):
            mutation, place, since = running[child]
            seconds = time.monotonic() - since
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                if mutation and seconds > LONGEST_SECONDS:
                    os.killpg(child, signal.SIGKILL)
                continue
            del running[child]
            if mutation:
                good, line = verdict(mutation, place, seconds)
            else:
                found = json.loads((place / "found.json").read_text()) if (place / "found.json").is_file() else {}
                good = found.get("code") == 0
                line = f"unmutated: {len(tests_of(jobs))} tests {'pass' if good else 'do not pass'} ({seconds:.1f} s)"
                line += "" if good else f" (see {place / 'output.txt'})"
            wrong += not good
            print(line, flush=True)
            if good:
                shutil.rmtree(place / "temp", ignore_errors=True)
    return wrong


def tests_of(jobs: Sequence[tuple[Mutation | None, Sequence[str]]]) -> list[str]:
    return sorted({test for mutation, tests in jobs if mutation for test in tests})


def main(arguments: Sequence[str]) -> int:
    chosen = [m for m in MUTATIONS if not arguments or any(m.name.startswith(name) for name in arguments)]
    if arguments == ["--check"]:
        chosen = MUTATIONS
    problems = check(chosen) if chosen else [f"no mutation is named {' or '.join(arguments)}"]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        print(f"{len(chosen)} mutations fit")
        return 0
    start = time.monotonic()
    os.environ.update(SETTINGS)
    os.chdir(ROOT)
    import_what_is_heavy()
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    base = train_base(folder)
    jobs: list[tuple[Mutation | None, Sequence[str]]] = [(mutation, mutation.tests) for mutation in chosen]
    jobs.insert(0, (None, tests_of(jobs)))
    wrong = run_all(jobs, base, folder)
    if not wrong:
        shutil.rmtree(folder)
    print(f"{len(chosen)} mutations, {wrong} wrong, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
