"""Proximal policy optimisation: the policy answers, a reward model scores, the policy moves to what scores well.

Schulman et al. 2017 (arXiv:1707.06347), for language models Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al.
2022 (arXiv:2203.02155, equation 2): the score of an answer, less kl_coef times its KL to the model that PPO started
from. The defaults follow Huang et al. 2024 (arXiv:2403.17031), with one pass over each batch as in Ouyang et al.

The loop is in `ppo_loop.py`, its mathematics in `ppo_math.py`, the models in `actors.py`, the sampler in `rollout.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.rules import OFF, Judged
from align_pipeline.pipeline.stage import (
    Dataset,
    How,
    Inputs,
    Kind,
    Launch,
    Metrics,
    Model,
    Resolved,
    Scorer,
    Stage,
    Work,
)
from align_pipeline.stages import training
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.reward import Reward
from align_pipeline.stages.statistics import wilson
from align_pipeline.stages.training import Tuned

if TYPE_CHECKING:
    from align_pipeline.stages.ppo_loop import PPOTrainer
    from align_pipeline.stages.scoring import Asked

MAX_LORA_RANK = 512
"""vLLM's largest."""
ABOVE_CHANCE = "reward_above_chance"
"""The gate that a reward model must pass before PPO learns from it."""
_OF_AN_ANSWER = ("score", "kl", "length", "eos_rate")


class PPOHow(How):
    """How PPO is run: speed and memory, and what is done about signs of trouble."""

    logging_steps: int = Field(1, ge=1)
    """Iterations between two lines of progress."""
    tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Tokens per forward pass on one device, padding included: short answers do not pay for long ones."""
    engine_timeout: float = Field(1800.0, gt=0)
    """Seconds of silence after which a sampling engine is killed and started anew."""
    guards: Literal["stop", "warn"] = "stop"
    """What a KL that explodes and answers that grow, shrink or repeat themselves do to the run."""


class PPO(Tuned):
    """Reinforcement learning from a reward model, or from any function that scores answers."""

    produces: ClassVar[Kind] = "model"
    starts_from: ClassVar[str] = "policy"
    own_gates: ClassVar[tuple[str, ...]] = (ABOVE_CHANCE,)
    trainer_config: ClassVar[tuple[str, str]] = ("transformers.training_args", "TrainingArguments")
    owned: ClassVar[Mapping[str, str]] = {
        **{name: ours for name, ours in OWNED.items() if ours != "max_length"},
        "num_train_epochs": "episodes",
        "max_steps": "episodes",
        "eval_on_start": "",
        "neftune_noise_alpha": "",
        "label_smoothing_factor": "",
    }
    judged_by: ClassVar[tuple[str, int]] = ("eval_objective", 1)
    shown: ClassVar[tuple[str, ...]] = (
        *("score", "score_sd", "kl", "entropy", "length", "eos_rate", "loss", "clip_fraction", "explained_variance"),
        *("sampler_gap", "rollout_seconds", "score_seconds", "assess_seconds", "update_seconds", "evaluation_seconds"),
    )
    rows_field: ClassVar[str] = "how.tokens_per_micro_batch"
    length_field: ClassVar[str] = "max_new_tokens"

    reads: ClassVar[Task] = "prompt"
    row_fields: ClassVar[tuple[str, ...]] = ("prompts", "evaluation")

    type: Literal["ppo"] = "ppo"
    policy: Model
    """The model to improve; what it is at the start is the reference of the KL."""
    reward: Scorer | dict[str, Scorer]
    """A reward model or `module:function`; or several under names, whose weighted sum is the score."""
    reward_weights: dict[str, float] = Field({})
    """The weight of each named reward; 1 where none is given."""
    prompts: Dataset
    """What the policy answers."""
    evaluation: Dataset | None = None
    """Held-out prompts of your own, the first `evaluation_prompts` of them; without it a tenth of the prompts."""
    evaluation_prompts: int = Field(64, ge=0)
    """Held-out prompts that each evaluation answers; 0 for no evaluation."""
    evaluate_every: int | None = Field(None, ge=1)
    """Iterations between two evaluations; None: ten times a run. The best one's weights are what is published."""
    value: Literal["reward", "fresh", "shared"] = "reward"
    """Where the value model starts: from the reward model; `fresh`: from the policy; `shared`: it is a head on it."""
    episodes: int = Field(20_000, ge=1)
    """Answers to train on; rounded up to whole batches."""
    batch_size: int = Field(64, ge=1)
    """Answers per iteration, over all devices."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps per pass over a batch."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch; more than one reuses answers that were costly to sample."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens after which an answer is cut off."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in sampling and in every log-prob."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of policy and value model. The default suits LoRA; `tuning: full` wants about a third."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warmup: to 0, or not at all."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps during which the learning rate rises."""
    kl_coef: float = Field(0.05, ge=0)
    """Reward lost per nat of KL to the reference: smaller moves further."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """How far advantages look ahead: 0 trusts the value model, 1 the rewards."""
    clip: float = Field(0.2, gt=0)
    """A token's probability counts for the loss until it has changed by this share."""
    value_clip: float = Field(0.2, gt=0)
    """A value counts until it has changed by this much."""
    value_coef: float = Field(0.1, gt=0)
    """Weight of the value loss."""
    value_warmup: int = Field(0, ge=0)
    """Iterations at the start in which only the value model is trained."""
    target_kl: float | None = Field(None, gt=0)
    """Nats a token between the policy and the one that sampled, after which the passes over a batch end."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken from the score of an answer that was cut off."""
    reward_clip: float | None = Field(None, gt=0)
    """Scores are clipped to this size."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch to variance 1, keeping their mean."""
    importance_cap: float = Field(2.0, ge=1)
    """Largest weight of a token that the trainer finds likelier than the sampler did."""
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    """What answers: vLLM (LoRA only), or the model itself; `auto` takes vLLM where it is installed beside a GPU."""
    how: PPOHow = PPOHow()
    """How it is run: speed and memory, nothing that changes the result."""

    @property
    def rewards(self) -> Mapping[str, str]:
        """The rewards by name; a single one is called `reward`."""
        return self.reward if isinstance(self.reward, Mapping) else {"reward": self.reward}

    def weight(self, name: str) -> float:
        return self.reward_weights.get(name, 1.0)

    @property
    def iterations(self) -> int:
        return math.ceil(self.episodes / self.batch_size)

    @property
    def steps_at_once(self) -> int:
        return self.epochs * self.minibatches

    @property
    def evaluation_interval(self) -> int:
        """Iterations between two evaluations."""
        return self.evaluate_every or math.ceil(self.iterations / 10)

    @property
    def keeps_best(self) -> bool:
        return self.evaluation_prompts > 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.rewards:
            raise ValueError("reward: name at least one")
        for name in self.rewards:
            if not re.fullmatch(r"[\w-]+", name) or name == "sd" or name.endswith(("seconds", "runtime")):
                raise ValueError(
                    f"reward: {name!r} cannot name a reward; use letters, digits, - and _, no unit of time"
                )
        unknown = self.reward_weights.keys() - self.rewards.keys()
        if unknown:
            raise ValueError(f"reward_weights: {min(unknown)!r} is none of the rewards ({', '.join(self.rewards)})")
        models = [ref for ref in self.rewards.values() if ref.startswith(("stage:", "hub:", "file:"))]
        if self.value == "reward" and len(models) != 1:
            found = f"there are {len(models)}" if models else "there is none, only functions"
            raise ValueError(
                f"value: reward starts the value model from the one reward model, and {found}; write value: fresh (it "
                "starts from the policy) or value: shared (a head on the policy)"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of minibatches {self.minibatches}")
        if self.value_warmup >= self.iterations:
            raise ValueError(
                f"value_warmup {self.value_warmup} leaves none of the {self.iterations} iterations (episodes / "
                "batch_size) to the policy; lower it, or raise episodes"
            )
        if self.evaluation is not None and not self.evaluation_prompts:
            raise ValueError("evaluation: it is never answered with evaluation_prompts: 0; remove one of the two")
        if self.early_stopping is not None and not self.evaluation_prompts:
            raise ValueError("early_stopping needs held-out prompts: set evaluation_prompts above 0")
        if self.sampler == "vllm" and self.tuning == "full":
            raise ValueError("sampler: vllm gets an adapter each iteration; set tuning: lora or sampler: transformers")
        if self.sampler == "vllm" and self.lora.r > MAX_LORA_RANK:
            raise ValueError(f"lora.r: vLLM takes ranks up to {MAX_LORA_RANK}, got {self.lora.r}; lower it")
        heads = {"lm_head", "embed_tokens"} & set(self.lora.target_modules)
        if self.tuning == "lora" and heads:
            raise ValueError(f"lora.target_modules: {min(heads)} cannot be trained by PPO; remove it")
        return self

    def measures(self) -> Mapping[str, str]:
        lacks = "" if self.evaluation_prompts else "it needs held-out prompts; set evaluation_prompts above 0"
        held_out = ("objective", *_OF_AN_ANSWER, "repetition")
        evaluated = [f"held_out_{name}" for name in held_out]
        evaluated += ["start_objective", "start_score", "start_length", "best_step"]
        counts = ("episodes", "iterations", "steps", "prompts", "held_out_prompts")
        return {**dict.fromkeys(evaluated, lacks), **dict.fromkeys((*_OF_AN_ANSWER, "entropy", *counts), "")}

    def launch_problems(self, launch: Launch) -> dict[str, str]:
        if launch.shards:
            why = "ppo samples with the model that it trains, and trains two adapters on one base"
            return {"type": f"{why}: not proven with launch.accelerate: fsdp; set ddp"}
        if self.batch_size < launch.processes:
            return {"batch_size": f"{self.batch_size} answers for launch.processes {launch.processes}; raise it"}
        return {}

    def before(self, makers: Mapping[str, tuple[Stage, Metrics]]) -> list[Judged]:
        """Judge the reward models: PPO finds every weakness of one, and learns noise from one that knows nothing."""
        rewards = {field: made for field, made in makers.items() if field.partition(".")[0] == "reward"}
        return [
            judge_reward(self.rewards[field.partition(".")[2] or "reward"], metrics)
            for field, (maker, metrics) in rewards.items()
            if isinstance(maker, Reward)
        ]

    def misfit(self, field: str, maker: Stage) -> str | None:
        """Refuse a reward model that cannot be judged, or that the value model cannot start from."""
        problem = super().misfit(field, maker)
        if problem or field.partition(".")[0] != "reward" or not isinstance(maker, Tuned):
            return problem
        lacks = maker.measures().get("accuracy")
        if lacks and self.require.get(ABOVE_CHANCE) != OFF:
            return (
                "PPO starts only from a reward model that beats a coin on held-out pairs, and this one is judged on "
                f"none ({lacks}); or set require: {{{ABOVE_CHANCE}: off}}"
            )
        if self.value != "reward":
            return None
        if self.tuning == "lora" and maker.tuning == "full":
            return (
                "value: reward starts the value model, an adapter, from this reward model, which is whole weights; set "
                "value: fresh or value: shared, or train the reward model with tuning: lora"
            )
        return None

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        from align_pipeline.stages.rollout import check_installed

        found = super().look(inputs)
        if self.sampler == "vllm":
            try:
                check_installed()
            except AlignError as error:
                found["sampler"] = [str(error).removeprefix("sampler: ")]
        return found

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import save_model
        from align_pipeline.stages.rollout import check_installed

        if self.sampler == "vllm":
            check_installed()  # before minutes of loading
        tokenizer = training.load_tokenizer(inputs, "policy")
        prompts, held_out = self.read_prompts(inputs, tokenizer, work)
        if self.early_stopping is not None and not held_out:
            raise AlignError(
                f"early_stopping: none of the {len(prompts)} prompts could be held out to judge by; give more "
                "prompts, or an evaluation file"
            )
        trainer = self.trainer(inputs, work, tokenizer, prompts, held_out)
        with trainer.sampler_closed():
            curve = training.fit(trainer, self, work)
        if not trainer.is_world_process_zero():
            return {}
        metrics = self._metrics(curve)
        if metrics.get("held_out_objective", 0.0) < metrics.get("start_objective", 0.0):
            trainer.warn(
                f"the best evaluation ({metrics['held_out_objective']:.4g}) is worse than that of the start "
                f"({metrics['start_objective']:.4g}): PPO made the policy worse; lower learning_rate"
            )
        save_model(trainer.actors.model, tokenizer, work.out, inputs["policy"])
        samples = [file.read_text("utf-8") for file in sorted((work.scratch / "samples").glob("step-*.jsonl"))]
        (work.out / "samples.jsonl").write_text("".join(samples), "utf-8")
        return {**metrics, "prompts": float(len(prompts)), "held_out_prompts": float(len(held_out))}

    def reward_inputs(self, inputs: Inputs) -> dict[str, Resolved]:
        """Return what each reward resolved to, by its name."""
        single = not isinstance(self.reward, Mapping)
        return {name: inputs["reward" if single else f"reward.{name}"] for name in self.rewards}

    def read_prompts(self, inputs: Inputs, tokenizer: Any, work: Work) -> tuple[list[Asked], list[Asked]]:
        """Return the prompts to train on and those held out, checked against the model's context."""
        from align_pipeline.data.load import split
        from align_pipeline.stages.models import context
        from align_pipeline.stages.rollout import check_lengths
        from align_pipeline.stages.scoring import ask

        rows = training.read_rows(self, inputs, "prompts", work)
        held: Sequence[Any] = []
        if self.evaluation_prompts and "evaluation" in inputs:
            held = training.read_rows(self, inputs, "evaluation", work)
        elif self.evaluation_prompts:
            rest, held = split(rows, min(0.1, self.evaluation_prompts / len(rows)))
            rows, held = (rest, held) if rest else (rows, [])
        asked = ask(rows, tokenizer)
        held_out = ask(held[: self.evaluation_prompts], tokenizer) if held else []
        limit = context(inputs["policy"])
        every = [*asked, *held_out]
        check_lengths([one.ids for one in every], [one.where for one in every], self.max_new_tokens, limit)
        return asked, held_out

    def trainer(
        self, inputs: Inputs, work: Work, tokenizer: Any, prompts: Sequence[Asked], held_out: Sequence[Asked]
    ) -> PPOTrainer:
        """Return the trainer with its models loaded; nothing is sampled yet."""
        from transformers import TrainingArguments

        from align_pipeline.stages.actors import load_actors
        from align_pipeline.stages.models import eos_ids
        from align_pipeline.stages.ppo_loop import PPOTrainer
        from align_pipeline.stages.rollout import Sampling

        steps = self.iterations * self.steps_at_once
        args = training.common_arguments(
            self,
            work,
            TrainingArguments,
            per_device_train_batch_size=1,
            max_steps=steps,
            warmup_steps=int(self.warmup * steps + 1e-9),
            logging_steps=self.steps_at_once,
            # Huang et al. 2024, section 3: Adam's eps as in the PPO paper; the trainer clips each model's own gradient.
            **{"adam_epsilon": 1e-5, "max_grad_norm": 0.0, **self.train},
        )
        actors, scorers = load_actors(
            self, inputs["policy"], self.reward_inputs(inputs), tokenizer, self.how.micro_batch
        )
        sampling = Sampling(self.max_new_tokens, eos_ids(actors.model, tokenizer), self.temperature, self.seed)
        sampler = self._sampler(inputs["policy"], actors.model, tokenizer, [*prompts, *held_out], work)
        return PPOTrainer(
            self, work, args, actors, scorers, sampler, sampling, tokenizer, prompts=prompts, held_out=held_out
        )

    def _sampler(self, policy: Resolved, model: Any, tokenizer: Any, prompts: Sequence[Asked], work: Work) -> Any:
        from importlib.util import find_spec

        import torch

        from align_pipeline.stages.models import weights_folder
        from align_pipeline.stages.rollout import HFSampler, VLLMSampler

        found = find_spec("vllm") is not None and torch.cuda.is_available() and self.tuning == "lora"
        if self.sampler == "transformers" or (self.sampler == "auto" and not found):
            return HFSampler(model, tokenizer.pad_token_id, self.how.micro_batch)
        return VLLMSampler(
            weights_folder(policy),
            max_length=max(len(one.ids) for one in prompts) + self.max_new_tokens,
            max_lora_rank=self.lora.r,
            dtype="float32" if model.dtype == torch.float32 else "bfloat16",
            memory_share=work.launch.vllm_memory,
            timeout_seconds=self.how.engine_timeout,
            log=work.scratch / "engine.log",
            quantize=self.quantize,
        )

    def _metrics(self, curve: training.Curve) -> Metrics:
        """Return what came of it: the published weights on held-out prompts, beside those of the start."""
        evaluations = [point for point in curve if "eval_objective" in point]
        points = [point for point in curve if "score" in point]
        step = training.best_step(self, curve)
        best = next((point for point in evaluations if step and point["step"] == step), None)
        names = ("objective", "score", "kl", "length", "eos_rate", "repetition")
        found = {f"held_out_{name}": best[f"eval_{name}"] for name in names} if best else {}
        began = ("objective", "score", "length")
        start = {f"start_{name}": evaluations[0][f"eval_{name}"] for name in began} if best else {}
        last = {name: points[-1][name] for name in ("score", "kl", "length", "eos_rate", "entropy")}
        return {
            **start,
            **found,
            **last,
            "episodes": points[-1]["episodes"],
            "iterations": curve[-1]["step"] / self.steps_at_once,
            "steps": float(curve[-1]["step"]),
            **({"best_step": float(best["step"])} if best else {}),
        }


def judge_reward(ref: str, metrics: Metrics) -> Judged:
    """Judge whether a reward model tells its own held-out pairs apart better than a coin, with 95 % confidence."""
    accuracy, count = metrics.get("accuracy"), metrics.get("n")
    rule = "held-out accuracy whose 95 % interval lies above 0.5"
    off = f"or set require: {{{ABOVE_CHANCE}: off}}"
    if accuracy is None or not count:
        says = f"{ref} was judged on no held-out pairs, it must be better than a coin"
        remedy = f"set its held_out above 0 or name an evaluation, {off}"
        return Judged(ABOVE_CHANCE, rule, False, None, 0.5, says, remedy)
    low, high = wilson(accuracy * count, int(count)) if count else (0.0, 1.0)
    passed = low > 0.5
    says = f"{ref} tells {accuracy:.1%} [{low:.1%}, {high:.1%}] of {count:.0f} held-out pairs apart, a coin 50%"
    what = "perhaps nothing" if accuracy > 0.5 else "nothing"
    remedy = f"there is {what} to learn from it: give it more or cleaner pairs, or more held-out ones, {off}"
    return Judged(ABOVE_CHANCE, rule, passed, low, 0.5, says, "" if passed else remedy)
