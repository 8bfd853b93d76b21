"""Kahneman-Tversky optimisation: learn from single answers with a thumb up or down.

Ethayarajh et al. 2024, equation 8: a liked answer should be worth more than the policy's average drift from the
reference (the KL term), a disliked one less. That KL is estimated from mismatched pairs: the answers of one forward
pass dealt to each other's prompts; several processes share one and take the mean of what each finds. So its size is a
field, not a speed setting, and rows are dealt in an order of ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Inputs, Kind, Launch, Metrics, Model, Work
from align_pipeline.stages import training
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.training import Training


class KTO(Training):
    """Kahneman-Tversky optimisation on answers that were liked or not."""

    produces: ClassVar[Kind] = "model"
    starts_from: ClassVar[str] = "policy"
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.kto_config", "KTOConfig")
    owned: ClassVar[Mapping[str, str]] = {
        **OWNED,
        "beta": "beta",
        "loss_type": "loss",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    }

    version: ClassVar[int] = 3
    reads: ClassVar[Task] = "unpaired"
    held_out_metrics: ClassVar[tuple[str, ...]] = ("reward_liked", "reward_disliked", "margin", "accuracy")

    rows_field: ClassVar[str] = "kl_batch"

    type: Literal["kto"] = "kto"
    policy: Model
    """The model to improve, which is also the reference."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate. The default suits LoRA; `tuning: full` wants about a tenth."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps during which the learning rate rises."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: smaller moves further."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """KTO, or APO-zero (D'Oosterlinck et al. 2024), which has no KL term."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of liked rows; with few of them, raise it until weight x rows is about equal on both sides."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of disliked rows."""
    kl_batch: int = Field(8, ge=2)
    """Rows of one forward pass, over all devices, whose mismatched answers estimate the KL term."""

    @model_validator(mode="after")
    def _kl_batch_fits(self) -> Self:
        if self.how.micro_batch not in (None, self.kl_batch):
            raise ValueError(
                f"how.micro_batch: {self.how.micro_batch}, KTO's forward passes have kl_batch rows; set that"
            )
        if self.batch_size % self.kl_batch:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of kl_batch {self.kl_batch}")
        return self

    def launch_problems(self, launch: Launch) -> dict[str, str]:
        ranks = launch.processes
        if self.kl_batch % ranks or self.kl_batch < 2 * ranks:
            near = max(round(self.kl_batch / ranks), 2) * ranks
            rule = f"must be a multiple of launch.processes {ranks}, which share it, and two for each at least"
            return {"kl_batch": f"{self.kl_batch}, {rule}; set {near}, and batch_size to a multiple of it"}
        return super().launch_problems(launch)

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_trainable, save_model

        source = inputs["policy"]
        tokenizer = training.load_tokenizer(inputs, "policy")
        rows = training.prepare(self, inputs, tokenizer, work)
        model = load_trainable(source, tuning=self.tuning, lora=self.lora, quantize=self.quantize, seed=self.seed)
        trainer = self.trainer(model, training.frozen_copy(self, source), tokenizer, rows, work)
        curve = training.fit(trainer, self, work, first_loss=self.first_loss())
        if not trainer.is_world_process_zero():
            return {}
        save_model(model, tokenizer, work.out, source)
        judged = judge(trainer, rows.held_out, self.beta) if len(rows.held_out) else {}
        return {**judged, **training.facts(rows, trainer, curve)}

    def first_loss(self) -> tuple[float, float] | None:
        """Return what the first loss must be and its tolerance: weight / 2 a row, as policy and reference agree."""
        from align_pipeline.stages.models import has_bf16

        if self.desirable_weight != self.undesirable_weight or "router_aux_loss_coef" in self.train:
            return None
        return self.desirable_weight / 2, 5e-3 if has_bf16() else 1e-3

    def trainer(self, model: Any, reference: Any, tokenizer: Any, rows: training.Rows, work: Work) -> Any:
        """Return TRL's trainer on rows of `prompt_ids`, `completion_ids`, `KL_completion_ids` and `label`."""
        import trl

        if len(rows.train) < self.kl_batch:
            raise AlignError(f"kl_batch: {self.kl_batch} rows a pass, but there are only {len(rows.train)}; lower it")
        dealt = replace(rows, train=deal(rows.train, self.kl_batch, self.seed), held_out=_rotated(rows.held_out))
        train, held_out = training.tables(dealt)
        args = training.arguments(
            self,
            work,
            trl.KTOConfig,
            train,
            held_out,
            size=self.kl_batch // work.launch.processes,
            max_length=None,
            beta=self.beta,
            loss_type=self.loss,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            train_sampling_strategy="sequential",
        )
        return training.trainer_class(trl.KTOTrainer, self, work, together=True)(
            model,
            ref_model=reference,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )


def deal(rows: Sequence[Mapping[str, Any]], size: int, seed: int) -> list[dict[str, Any]]:
    """Return shuffled rows in groups of `size`, each row with the answer of its neighbour in the group.

    The rows of a last, smaller group are left out: a group of one would pair an answer with its own prompt.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    whole = len(order) - len(order) % size
    groups = [[rows[index] for index in order[start : start + size]] for start in range(0, whole, size)]
    return [row for group in groups for row in _rotated(group)]


def _rotated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their predecessor's answer as `KL_completion_ids`."""
    return [{**row, "KL_completion_ids": rows[index - 1]["completion_ids"]} for index, row in enumerate(rows)]


def judge(trainer: Any, rows: Sequence[Mapping[str, Any]], beta: float) -> Metrics:
    """Return mean implicit rewards of liked and disliked rows, and how often a liked one is above a disliked one."""
    rewards = training.implicit_rewards(trainer, [(row["prompt_ids"], row["completion_ids"]) for row in rows], beta)
    liked = [reward for reward, row in zip(rewards, rows, strict=True) if row["label"]]
    disliked = [reward for reward, row in zip(rewards, rows, strict=True) if not row["label"]]
    metrics: Metrics = {}
    if liked:
        metrics["reward_liked"] = sum(liked) / len(liked)
    if disliked:
        metrics["reward_disliked"] = sum(disliked) / len(disliked)
    if liked and disliked:
        metrics["margin"] = metrics["reward_liked"] - metrics["reward_disliked"]
        above = sum((up > down) + 0.5 * (up == down) for up in liked for down in disliked)
        metrics["accuracy"] = above / (len(liked) * len(disliked))
    return metrics
