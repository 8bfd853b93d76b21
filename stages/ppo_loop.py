"""The PPO trainer: Transformers' Trainer around the five lines of the method.

    for each iteration:  sample answers; score them; log-probs, reference, values -> advantages;
        for each epoch:  for each minibatch:  one optimizer step on the clipped losses

One optimizer step is one `training_step` that holds as many backward passes as it needs, so checkpoints, schedules,
callbacks and loggers are Trainer's own. Everything random is drawn from counters (seed, episode, iteration, epoch), and
checkpoints lie between iterations, so a run that was killed goes on to the same weights.

Every rank answers, scores and reads its share of a batch; then all ranks hold the whole batch. So advantages are
whitened over all of it, and a minibatch's loss is the mean over its tokens wherever they are computed: neither the
number of ranks nor the size of a micro-batch changes the result.

Left out: an adaptive KL coefficient (Ziegler et al. 2019, section 2.2), entropy bonus, pretraining loss (PPO-ptx),
turns of several messages, and answers sampled while the policy is being updated.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.stages import models, ppo_math
from align_pipeline.stages.actors import Actors, Role, before_answers, hidden_states, right_pad, token_micro_batches
from align_pipeline.stages.rollout import Adapter, Rollout, Sampler, Sampling, request_seed
from align_pipeline.stages.scoring import Asked, Scorer, text_of

if TYPE_CHECKING:
    from align_pipeline.pipeline.stage import Work
    from align_pipeline.stages.ppo import PPO

WEIGHTS = "trainable.safetensors"
TOKENS_AT_ONCE = {"cpu": 1024}
"""Tokens of a micro-batch, padding included, where nobody named a number; 4096 on other devices."""
SHOWN_SAMPLES = 8
PROBE_PROMPTS = 4
PROBE_TOKENS = 16
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By how many nats the log-prob of a token may differ between the sampler and the trainer, measured on one adapter."""
GAP_LIMIT = 0.1
"""Mean difference in nats, over a whole batch, that no arithmetic explains: the sampler has other weights."""

_SUMS = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl")


@dataclass
class Batch:
    """One iteration's answers and what PPO knows of each of their tokens: (B, T) with junk on the right."""

    prompts: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]
    scores: Tensor
    """(B,), as the score enters the reward: clipped, and less the penalty of an answer that was cut off."""
    mask: Tensor
    sampler: Tensor
    """The sampler's log-probs; the rest is the trainer's."""
    old: Tensor
    reference: Tensor
    entropy: Tensor
    values: Tensor
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)
    weights: Tensor = field(init=False)

    def estimate(self, stage: PPO) -> None:
        """Work out advantages, returns and importance weights."""
        kl = ppo_math.kl_k1(self.old, self.reference)
        rewards = ppo_math.token_rewards(self.scores, kl, self.mask, stage.kl_coef)
        if stage.whiten_rewards:
            rewards = ppo_math.whiten(rewards, self.mask, shift_mean=False)
        advantages, self.returns = ppo_math.gae(rewards, self.values, self.mask, stage.gamma, stage.gae_lambda)
        self.advantages = ppo_math.whiten(advantages, self.mask)
        self.weights = ppo_math.importance_weights(self.old, self.sampler, stage.importance_cap)


class PPOTrainer(Trainer):
    """Proximal policy optimisation of a language model; see the top of this file."""

    def __init__(
        self,
        stage: PPO,
        work: Work,
        args: TrainingArguments,
        actors: Actors,
        scorers: Mapping[str, Scorer],
        sampler: Sampler,
        sampling: Sampling,
        tokenizer: Any,
        prompts: Sequence[Asked],
        held_out: Sequence[Asked],
    ) -> None:
        super().__init__(model=actors, args=args, processing_class=tokenizer)
        self.stage, self.work = stage, work
        self.actors, self.scorers, self.sampler, self.sampling = actors, scorers, sampler, sampling
        self.prompts, self.held_out = prompts, held_out
        self.batch: Batch
        self.point: dict[str, float] = {}
        self.steps: list[dict[str, Tensor | float]] = []
        self.stopped_epochs = False
        self.seconds: Counter[str] = Counter()
        self.phase: str | None = None
        self.tokens = 0
        self.published: Adapter | None = None
        self.add_callback(_Evaluate(stage, bool(held_out)))

    # --- what Trainer asks for ---

    def get_train_dataloader(self) -> Any:
        """Return the numbers of the optimizer steps: the data of a step is sampled when its iteration begins."""
        steps: Any = [{"step": step} for step in range(self.args.max_steps)]
        return torch.utils.data.DataLoader(steps, batch_size=1, collate_fn=lambda rows: rows[0])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take one minibatch's gradient; at the first step of an iteration, sample its batch before."""
        iteration, step = divmod(self.state.global_step, self.stage.steps_at_once)
        epoch, number = divmod(step, self.stage.minibatches)
        if step == 0:
            if iteration == 0 and self.held_out:
                self.evaluate()
            self._begin(iteration)
        if self.stopped_epochs:  # target_kl: no gradient, so the optimizer changes nothing
            return torch.zeros((), device=self.args.device)
        with self._phase("update"):
            order = torch.Generator().manual_seed(request_seed(self.stage.seed, f"order {iteration}", epoch))
            rows = torch.randperm(len(self.batch.answers), generator=order).tolist()
            size = len(rows) // self.stage.minibatches
            chosen = rows[number * size : (number + 1) * size]
            stats = self.minibatch_gradient(self.batch, chosen, policy=iteration >= self.stage.value_warmup)
            self._clip_gradients(stats)
        self.steps.append(stats)
        last = number == self.stage.minibatches - 1
        if last and self.stage.target_kl is not None:
            epoch_kl = fmean(float(one["approx_kl"]) for one in self.steps[-self.stage.minibatches :])
            self.stopped_epochs = epoch_kl > self.stage.target_kl
        return torch.as_tensor(stats["loss"], device=self.args.device, dtype=torch.float32)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the iteration was like to the one point that Trainer logs of it."""
        if "loss" in logs:
            means = {name: fmean(float(one[name]) for one in self.steps) for name in self.steps[0]}
            means["ratio_max"] = max(float(one["ratio_max"]) for one in self.steps)
            means["updates"] = float(len(self.steps))
            times = {f"{name}_seconds": round(value, 3) for name, value in self.seconds.items()}
            logs = {**self.point, **means, "learning_rate": logs["learning_rate"], **times, "num_tokens": self.tokens}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Answer the held-out prompts, always with the same seeds, and log what the answers are worth."""
        with self._phase("evaluation"):
            keys = [f"evaluation {i}" for i in range(len(self.held_out))]
            answers, plain = self._answers(self.held_out, keys)
            batch = self._assess(self.held_out, answers, plain, values=False)
            kl = _per_answer(ppo_math.kl_k1(batch.old, batch.reference), batch.mask)
            metrics = {f"eval_{name}": value for name, value in self._described(batch, answers, plain).items()}
            metrics["eval_objective"] = float((batch.scores - self.stage.kl_coef * kl).mean())
        self._show_samples(answers, plain)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self.actors.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS, device=str(self.actors.device))
        wanted = {name: p for name, p in self.actors.named_parameters() if p.requires_grad}
        assert stored.keys() == wanted.keys(), f"a checkpoint of other actors: {sorted(stored.keys() ^ wanted.keys())}"
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(stored[name])

    # --- an iteration's batch ---

    def _begin(self, iteration: int) -> None:
        """Sample, score and read the answers of an iteration."""
        first = iteration * self.stage.batch_size
        episodes = range(first, first + self.stage.batch_size)
        asked = [self.prompts[i] for i in prompt_order(episodes, len(self.prompts), self.stage.seed)]
        answers, plain = self._answers(asked, list(episodes))
        self.batch = self._assess(asked, answers, plain)
        self.batch.estimate(self.stage)
        self.steps, self.stopped_epochs = [], False
        self.tokens += int(self.batch.mask.sum())
        real = self.batch.mask
        self.point = {
            "episodes": float(episodes.stop),
            **self._described(self.batch, answers, plain),
            **_gap(self.batch.sampler[real], self.batch.old[real]),
            "explained_variance": float(ppo_math.explained_variance(self.batch.values[real], self.batch.returns[real])),
        }
        self._guard(iteration)

    def _answers(
        self, asked: Sequence[Asked], keys: Sequence[int | str]
    ) -> tuple[list[Rollout], dict[str, list[float]]]:
        """Return one answer to each prompt and each scorer's numbers; each rank makes its share."""
        share = slice(self.args.process_index, None, self.args.world_size)
        mine, names = asked[share], keys[share]
        with self._phase("rollout"), self.compute_loss_context_manager():
            adapter = self._publish() if self.sampler.needs_adapter else None
            rows = self.sampler.sample([one.ids for one in mine], 1, self.sampling, names, adapter)
        with self._phase("score"), self.compute_loss_context_manager():
            scores = {
                name: [row[0] for row in scorer.score(mine, rows)] if mine else []
                for name, scorer in self.scorers.items()
            }
        return self._dealt_back([row[0] for row in rows]), {name: self._dealt_back(row) for name, row in scores.items()}

    def _dealt_back(self, mine: list[Any]) -> list[Any]:
        """Return what all ranks made, in the order in which it was dealt to them."""
        if self.args.world_size == 1:
            return mine
        from accelerate.utils import gather_object

        shares = gather_object([mine])
        return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]

    def _assess(
        self, asked: Sequence[Asked], answers: Sequence[Rollout], plain: Mapping[str, list[float]], values: bool = True
    ) -> Batch:
        """Read answers with the policy, the reference and the value model."""
        stage, device = self.stage, self.args.device
        scores = torch.zeros(len(answers), dtype=torch.float32)
        for name, numbers in plain.items():
            if not all(map(math.isfinite, numbers)):
                where = next(one.where for one, value in zip(asked, numbers, strict=True) if not math.isfinite(value))
                raise AlignError(f"{where}: reward {name} is not finite; its weights are damaged, or it overflows")
            scores += stage.weight(name) * torch.tensor(numbers, dtype=torch.float32)
        if stage.reward_clip is not None:
            scores = scores.clamp(-stage.reward_clip, stage.reward_clip)
        cut = torch.tensor([answer.finish == "length" for answer in answers])
        scores = scores - stage.missing_eos_penalty * cut
        prompts, ids = [one.ids for one in asked], [answer.ids for answer in answers]
        lengths = torch.tensor([len(one) for one in ids])
        mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]  # (B, T)
        sampler = torch.zeros(mask.shape)
        sampler[mask] = torch.tensor([value for answer in answers for value in answer.logprobs])
        with self._phase("assess"):
            old, entropy, shared = self._read("policy", prompts, ids, mask)
            reference, _, _ = self._read("reference", prompts, ids, mask)
            found = torch.zeros_like(old)
            if values:
                found = shared if self.actors.shares_value else self._read("value", prompts, ids, mask)[2]
        return Batch(
            prompts, ids, scores.to(device), mask.to(device), sampler.to(device), old, reference, entropy, found
        )

    @torch.no_grad()
    def _read(
        self, role: Role, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a role's log-probs, entropies and values of answers, each (B, T); each rank reads its share."""
        found = torch.zeros(3, *mask.shape, device=self.args.device)
        mine = range(self.args.process_index, len(answers), self.args.world_size)
        with self.actors.acting(role) as trunk, self.compute_loss_context_manager():
            for rows, states, targets in self._micro_batches(trunk, prompts, answers, mine):
                parts = torch.zeros(3, len(targets), device=self.args.device)
                if role != "value":
                    parts[0], parts[1] = self.actors.log_probs(states, targets, role)
                if role == "value" or (role == "policy" and self.actors.shares_value):
                    parts[2] = self.actors.values(states)
                real = mask[rows].to(self.args.device)
                part = torch.zeros(3, *real.shape, device=self.args.device)
                part[:, real] = parts
                found[:, rows] = part
        self._sum_over_ranks(found)
        return found[0], found[1], found[2]

    def _micro_batches(
        self, trunk: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield rows, the states before their answers' tokens (N, H), and those tokens (N,)."""
        lengths = [len(prompts[row]) + len(answers[row]) for row in rows]
        tokens = self.stage.how.tokens_per_micro_batch or TOKENS_AT_ONCE.get(self.args.device.type, 4096)
        for group in token_micro_batches(lengths, tokens):
            some = [rows[i] for i in group]
            asked, said = [prompts[row] for row in some], [answers[row] for row in some]
            ids = right_pad([[*a, *b] for a, b in zip(asked, said, strict=True)], self.args.device)
            targets = torch.tensor([token for answer in said for token in answer], device=self.args.device)
            yield some, before_answers(hidden_states(trunk, ids), asked, said), targets

    # --- a minibatch's gradient ---

    def minibatch_gradient(self, batch: Batch, rows: Sequence[int], policy: bool = True) -> dict[str, Tensor | float]:
        """Add the gradient of the clipped losses, each a mean over all tokens of these rows, and return statistics.

        Two passes, one for each adapter, each with its backward while that adapter is active. `policy` false leaves
        the policy as it is, to warm the value model up.
        """
        tokens = int(batch.mask[rows].sum())
        mine = rows[self.args.process_index :: self.args.world_size]
        total = torch.zeros(len(_SUMS), device=self.args.device, dtype=torch.float64)
        ratio_max = torch.zeros((), device=self.args.device)
        shared = self.actors.shares_value
        if policy or shared:
            with self.actors.acting("policy") as trunk:
                for some, states, targets in self._with_graph(trunk, batch, mine):
                    loss = torch.zeros((), device=self.args.device)
                    if policy:
                        policy_loss, ratio = self._policy_loss(batch, some, states, targets, total)
                        loss, ratio_max = policy_loss.sum() / tokens, torch.maximum(ratio_max, ratio.max())
                    if shared:
                        inputs = states if policy else states.detach()
                        loss = (
                            loss + self.stage.value_coef * self._value_loss(batch, some, inputs, total).sum() / tokens
                        )
                    self.accelerator.backward(loss)
        if not shared:
            with self.actors.acting("value") as trunk:
                for some, states, _ in self._with_graph(trunk, batch, mine):
                    loss = self._value_loss(batch, some, states, total).sum() / tokens
                    self.accelerator.backward(self.stage.value_coef * loss)
        self._sum_over_ranks(total)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(ratio_max, torch.distributed.ReduceOp.MAX)
        self._sum_gradients([*(self.actors.policy_parameters() if policy else ()), *self.actors.value_parameters()])
        means = {name: float(value) / tokens for name, value in zip(_SUMS, total.tolist(), strict=True)}
        loss_mean = means["policy_loss"] + self.stage.value_coef * means["value_loss"]
        if not math.isfinite(loss_mean):
            raise AlignError(
                f"learning_rate: the loss is {loss_mean} at step {self.state.global_step + 1}; lower learning_rate "
                f"(now {self.stage.learning_rate:g}), or set reward_clip if scores are very large"
            )
        return {"loss": loss_mean, **means, "ratio_max": float(ratio_max) if policy else 1.0}

    def _with_graph(self, trunk: Any, batch: Batch, rows: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        with self.compute_loss_context_manager():
            yield from self._micro_batches(trunk, batch.prompts, batch.answers, rows)

    def _policy_loss(
        self, batch: Batch, rows: list[int], states: Tensor, targets: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        real = batch.mask[rows]
        old, advantages = batch.old[rows][real], batch.advantages[rows][real]  # (N,)
        logprobs, _ = self.actors.log_probs(states, targets)
        losses = ppo_math.policy_loss(logprobs, old, advantages, batch.weights[rows][real], self.stage.clip)
        with torch.no_grad():
            ratio = (logprobs - old).exp()
            total[_SUMS.index("policy_loss")] += losses.sum()
            total[_SUMS.index("clip_fraction")] += ((ratio - 1).abs() > self.stage.clip).sum()
            total[_SUMS.index("approx_kl")] += ppo_math.kl_k3(old, logprobs).sum()
        return losses, ratio

    def _value_loss(self, batch: Batch, rows: list[int], states: Tensor, total: Tensor) -> Tensor:
        real = batch.mask[rows]
        old, returns = batch.values[rows][real], batch.returns[rows][real]  # (N,)
        values = self.actors.values(states)
        losses = ppo_math.value_loss(values, old, returns, self.stage.value_clip)
        with torch.no_grad():
            total[_SUMS.index("value_loss")] += losses.sum()
            total[_SUMS.index("value_clip_fraction")] += ((values - old).abs() > self.stage.value_clip).sum()
        return losses

    def _clip_gradients(self, stats: dict[str, Tensor | float]) -> None:
        """Scale the policy's gradient and the value model's, each to its own norm: neither may damp the other."""
        for name, parameters in (
            ("grad_norm", self.actors.policy_parameters()),
            ("value_grad_norm", self.actors.value_parameters()),
        ):
            stats[name] = float(torch.nn.utils.clip_grad_norm_(parameters, self.stage.max_grad_norm))
            if not math.isfinite(float(stats[name])):
                raise AlignError(
                    f"learning_rate: {name} is {stats[name]} at step {self.state.global_step + 1}; lower "
                    f"learning_rate (now {self.stage.learning_rate:g})"
                )

    def _sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add the ranks' gradients up: each is already divided by the tokens of all."""
        if self.args.world_size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # this rank had no row of the minibatch
                torch.distributed.all_reduce(parameter.grad)

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tensor)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent here to a phase; inside another phase they are that one's."""
        outer, self.phase = self.phase, self.phase or name
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase = outer
            if outer is None:
                self.seconds[name] += time.perf_counter() - start

    # --- the sampler ---

    @contextmanager
    def sampler_closed(self) -> Iterator[None]:
        """End the sampling engine when training ends, however it ends."""
        try:
            yield
        finally:
            close = getattr(self.sampler, "close", None)
            if close is not None:
                close()

    def _publish(self) -> Adapter:
        """Give the sampler the policy as it is now, once a version, and see that it answers with these weights."""
        version = self.state.global_step // self.stage.steps_at_once + 1
        if self.published is None or self.published.version != version:
            folder = self.work.scratch / "adapters" / f"version-{version}-{self.args.process_index}"
            models.publish_adapter(self.actors.model, folder)
            before, self.published = self.published, Adapter(version, folder)
            self._probe(self.published)
            if before is not None:
                shutil.rmtree(before.folder, ignore_errors=True)
        return self.published

    def _probe(self, adapter: Adapter) -> None:
        """Compare the sampler's log-probs of a few answers with the trainer's."""
        asked = self.prompts[:PROBE_PROMPTS]
        sampling = replace(self.sampling, max_new_tokens=min(PROBE_TOKENS, self.sampling.max_new_tokens))
        keys = [f"probe {i}" for i in range(len(asked))]
        answers = [row[0] for row in self.sampler.sample([one.ids for one in asked], 1, sampling, keys, adapter)]
        theirs = torch.tensor([value for answer in answers for value in answer.logprobs], device=self.args.device)
        prompts, ids = [one.ids for one in asked], [answer.ids for answer in answers]
        with torch.no_grad(), self.actors.acting("policy") as trunk, self.compute_loss_context_manager():
            states = hidden_states(
                trunk, right_pad([[*a, *b] for a, b in zip(prompts, ids, strict=True)], theirs.device)
            )
            targets = torch.tensor([token for answer in ids for token in answer], device=theirs.device)
            ours, _ = self.actors.log_probs(before_answers(states, prompts, ids), targets)
        gap, allowed = float((ours - theirs).abs().max()), PROBE_TOLERANCE[self.actors.model.dtype]
        if not gap <= allowed:
            raise AlignError(
                f"sampler: after the adapter of version {adapter.version} was loaded, its log-probs differ from the "
                f"trainer's by {gap:.3g} nats (allowed {allowed:g}): it answers with other weights; run again to start "
                "a fresh engine, or set sampler: transformers"
            )

    # --- what a person looks at ---

    def _described(
        self, batch: Batch, answers: Sequence[Rollout], plain: Mapping[str, list[float]]
    ) -> dict[str, float]:
        """Return what answers are like: their scores, their distance from the reference, their form."""
        total = [sum(self.stage.weight(name) * row[i] for name, row in plain.items()) for i in range(len(answers))]
        single = {f"score_{name}": fmean(row) for name, row in plain.items()} if len(plain) > 1 else {}
        real = batch.mask
        return {
            "score": fmean(total),
            "score_sd": pstdev(total),
            **single,
            "kl": float(_per_answer(ppo_math.kl_k1(batch.old, batch.reference), real).mean()),
            "kl_k3": float(_per_answer(ppo_math.kl_k3(batch.old, batch.reference), real).mean()),
            "entropy": float(batch.entropy[real].mean()),
            "length": fmean(len(answer.ids) for answer in answers),
            "eos_rate": fmean(answer.finish == "stop" for answer in answers),
            "repetition": fmean(repetition(answer.ids) for answer in answers),
        }

    def _show_samples(self, answers: Sequence[Rollout], plain: Mapping[str, list[float]]) -> None:
        """Keep what the same prompts are answered now; a run that goes on writes the same file again."""
        if not self.is_world_process_zero():
            return
        folder = self.work.scratch / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "step": self.state.global_step,
                "prompt": one.prompt,
                "answer": text_of(answer, self.processing_class),
                "finish": answer.finish,
                "scores": {name: row[i] for name, row in plain.items()},
            }
            for i, (one, answer) in enumerate(zip(self.held_out[:SHOWN_SAMPLES], answers, strict=False))
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"step-{self.state.global_step:08d}.jsonl").write_text(text, "utf-8")

    # --- guards ---

    def _guard(self, iteration: int) -> None:
        """Stop, or warn, when a run no longer does what it was started for."""
        now = self.point
        bad = [name for name in ("score", "kl", "entropy", "sampler_gap") if not math.isfinite(now[name])]
        if bad:
            raise AlignError(
                f"learning_rate: {bad[0]} is {now[bad[0]]} in iteration {iteration + 1}: the policy's numbers are "
                f"broken; lower learning_rate (now {self.stage.learning_rate:g})"
            )
        if now["sampler_gap"] > GAP_LIMIT:
            raise AlignError(
                f"sampler: its log-probs differ from the trainer's by {now['sampler_gap']:.3g} nats a token in the "
                f"mean (at most {GAP_LIMIT}): it answers with other weights or at another temperature; run again to "
                "start a fresh engine, or set sampler: transformers"
            )
        points = [entry for entry in self.state.log_history if "sampler_gap" in entry]
        first = points[0] if points else now
        if now["sampler_gap"] > max(3 * first["sampler_gap"], 0.02):
            self.warn(
                f"the sampler's log-probs drift from the trainer's: {first['sampler_gap']:.3g} -> "
                f"{now['sampler_gap']:.3g} nats a token; importance weights correct it, up to a cap"
            )
        for sign in drift(first, now, self.stage.kl_coef):
            if self.stage.how.guards == "stop":
                raise AlignError(f"{sign}; to go on as it is, set how.guards: warn and run again")
            self.warn(sign)

    def warn(self, text: str) -> None:
        if self.is_world_process_zero():
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self.work.log(step=self.state.global_step, total=self.state.max_steps, warning=text)


class _Evaluate(TrainerCallback):
    """Asks for an evaluation after every so many iterations, and after the last one."""

    def __init__(self, stage: PPO, possible: bool) -> None:
        self.stage, self.possible = stage, possible

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        iteration, step = divmod(state.global_step, self.stage.steps_at_once)
        due = iteration % self.stage.evaluation_interval == 0 or state.global_step == state.max_steps
        control.should_evaluate = self.possible and step == 0 and due
        return control


def prompt_order(episodes: Sequence[int], prompts: int, seed: int) -> list[int]:
    """Return the prompt of each episode: every pass over the prompts has an order of its own, drawn from its number."""
    orders: dict[int, list[int]] = {}
    for number in {episode // prompts for episode in episodes}:
        generator = torch.Generator().manual_seed(request_seed(seed, "prompts", number))
        orders[number] = torch.randperm(prompts, generator=generator).tolist()
    return [orders[episode // prompts][episode % prompts] for episode in episodes]


def repetition(ids: Sequence[int]) -> float:
    """Return the share of an answer's token pairs that stood in it before."""
    pairs = list(itertools.pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def drift(first: Mapping[str, float], now: Mapping[str, float], kl_coef: float) -> list[str]:
    """Return the signs that a policy exploits its reward or has left the language, each with what to do."""
    signs = []
    if now["kl"] > 2 * now["length"]:
        signs.append(
            f"kl_coef: the KL to the reference is {now['kl']:.1f} nats in answers of {now['length']:.0f} tokens: the "
            f"policy no longer speaks its language; raise kl_coef (now {kl_coef:g}), lower learning_rate, "
            "or bring a low temperature nearer to 1"
        )
    if now["repetition"] > 0.5 and now["repetition"] > first["repetition"] + 0.3:
        signs.append(
            f"reward: answers repeat themselves ({first['repetition']:.0%} -> {now['repetition']:.0%} of their token "
            f"pairs): the reward model likes it, people will not; raise kl_coef (now {kl_coef:g}), lower "
            "learning_rate, or mend the reward"
        )
    if now["length"] > 3 * first["length"] and now["score"] > first["score"]:
        signs.append(
            f"reward: answers grew from {first['length']:.0f} to {now['length']:.0f} tokens while the score rose: the "
            f"reward pays for length; raise kl_coef (now {kl_coef:g}) or missing_eos_penalty, or mend the reward"
        )
    if now["length"] < 0.1 * first["length"]:
        signs.append(
            f"reward: answers shrank from {first['length']:.0f} to {now['length']:.1f} tokens: the policy learnt to "
            f"say nothing; raise kl_coef (now {kl_coef:g}), or mend the reward"
        )
    return signs


def _per_answer(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1)


def _gap(sampler: Tensor, trainer: Tensor) -> dict[str, float]:
    """Return how far the sampler's log-probs of its own tokens lie from the trainer's, in nats a token."""
    difference = (sampler - trainer).abs()
    return {
        "sampler_gap": float(difference.mean()),
        "sampler_gap_max": float(difference.max()),
        "sampler_kl": float(ppo_math.kl_k3(sampler, trainer).mean()),
    }
