"""Direct preference optimisation: learn from pairs without a reward model.

Rafailov et al. 2023, equation 7: -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), where a log-ratio
is log policy(answer) - log reference(answer). The reference is the policy as this stage got it: with LoRA a frozen copy
of the starting adapter on the same base, with whole weights a second frozen model. At the first step both agree, so the
loss must be ln 2; that is checked, because a wrong reference trains on happily.
How sure preferences are reaches the loss in two ways: `weight_column` weighs each pair, `label_smoothing` says what
share of all of them is wrong (`pair_losses.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.stage import Inputs, Kind, Launch, Metrics, Model, Work
from align_pipeline.stages import training
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.pair_losses import NOT_OF_A_PAIR, pair_loss_trainer
from align_pipeline.stages.training import Training

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip

_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses that TRL smooths; sigmoid is smoothed here."""
_OF_TRL_ALONE = ("use_weighting", "f_divergence_type", "ld_alpha")
"""Fields of `train:` that change TRL's losses from within."""


class DPO(Training):
    """Direct preference optimisation on pairs of answers."""

    produces: ClassVar[Kind] = "model"
    starts_from: ClassVar[str] = "policy"
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.dpo_config", "DPOConfig")
    owned: ClassVar[Mapping[str, str]] = {
        **OWNED,
        "beta": "beta",
        "loss_type": "loss",
        "loss_weights": "loss_weights",
        "label_smoothing": "label_smoothing",
        "padding_free": "",
    }

    version: ClassVar[int] = 3
    reads: ClassVar[Task] = "preference"
    held_out_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "loss")

    type: Literal["dpo"] = "dpo"
    policy: Model
    """The model to improve, which is also the reference."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate. The default suits LoRA; `tuning: full` wants about a tenth."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps during which the learning rate rises."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: smaller moves further."""
    loss: Loss | tuple[Loss, ...] = "sigmoid"
    """One of TRL's losses, or several whose weighted sum is minimised ([sigmoid, sft] is RPO)."""
    loss_weights: tuple[float, ...] | None = None
    """One weight per loss; all 1 by default."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs that are the wrong way round; for sigmoid (conservative DPO), robust, exo_pair and aot."""
    weight_column: str | None = Field(None, min_length=1)
    """The column of the rows that weighs each pair's loss: a number from 0 (not learnt); only ratios matter."""

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss,) if isinstance(self.loss, str) else self.loss

    @model_validator(mode="after")
    def _losses_fit(self) -> Self:
        if not self.losses:
            raise ValueError("loss: name at least one")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights: {len(self.loss_weights)} weights for {len(self.losses)} losses; give one each"
            )
        smoothed = [name for name in self.losses if name in ("sigmoid", *_SMOOTHED)]
        if self.label_smoothing and not smoothed:
            raise ValueError(
                f"label_smoothing: {self.losses[0]} has none; set loss: sigmoid, robust, exo_pair or aot, or remove it"
            )
        if self.label_smoothing and "sigmoid" in smoothed and len(smoothed) > 1:
            raise ValueError(
                f"label_smoothing: {' and '.join(smoothed)} each mean something else by it; name one of them in loss"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("label_smoothing: exo_pair needs it above 0; its paper recommends 0.001")
        return self

    @property
    def by_pair(self) -> bool:
        """Whether losses are computed pair by pair here, and not by TRL."""
        return self.weight_column is not None or (self.label_smoothing > 0 and "sigmoid" in self.losses)

    @model_validator(mode="after")
    def _pairs_have_losses(self) -> Self:
        if not self.by_pair:
            return self
        asked = "weight_column" if self.weight_column else "label_smoothing of sigmoid"
        for name in self.losses:
            if name in NOT_OF_A_PAIR:
                raise ValueError(f"{asked}: {name} {NOT_OF_A_PAIR[name]}, a pair has no loss of its own; remove one")
        for name in _OF_TRL_ALONE:
            if name in self.train:
                raise ValueError(f"{asked}: train.{name} changes losses inside TRL, which this replaces; remove one")
        return self

    def launch_problems(self, launch: Launch) -> dict[str, str]:
        mixed = [name for name in self.losses if name in NOT_OF_A_PAIR]
        if mixed:
            why = f"{mixed[0]} {NOT_OF_A_PAIR[mixed[0]]}, which several processes share"
            return {"loss": f"{why}; take another loss, or set launch.processes: 1"}
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
        """Return what the first loss must be and its tolerance, where that is known: ln 2."""
        from align_pipeline.stages.models import has_bf16

        weighted = self.loss_weights is not None and self.loss_weights != (1.0,)
        if self.losses != ("sigmoid",) or weighted or self.train.keys() & {"use_weighting", "router_aux_loss_coef"}:
            return None
        return math.log(2), 5e-3 if has_bf16() else 1e-3

    def trainer(self, model: Any, reference: Any, tokenizer: Any, rows: training.Rows, work: Work) -> Any:
        """Return TRL's trainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        import trl

        train, held_out = training.tables(rows)
        args = training.arguments(
            self,
            work,
            trl.DPOConfig,
            train,
            held_out,
            max_length=None,
            beta=self.beta,
            loss_type=list(self.losses),
            loss_weights=list(self.loss_weights) if self.loss_weights else None,
            label_smoothing=self.label_smoothing,
        )
        base = pair_loss_trainer(trl.DPOTrainer, train, held_out) if self.by_pair else trl.DPOTrainer
        return training.trainer_class(base, self, work)(
            model,
            ref_model=reference,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )


def judge(trainer: Any, pairs: Sequence[Mapping[str, Any]], beta: float) -> Metrics:
    """Return how well implicit rewards predict preferences: `accuracy` (ties half), mean `margin`, sigmoid `loss`.

    Pairs count alike here, and the loss is not smoothed, so that runs with other weights can be compared; `eval_loss`
    in the curve is weighed and smoothed like what is trained on. Pairs that weigh 0 are in neither.
    """
    answers = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    rewards = training.implicit_rewards(trainer, answers, beta)
    margins = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    return {
        "accuracy": sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins),
        "margin": sum(margins) / len(margins),
        "loss": sum(training.log1p_exp(-margin) for margin in margins) / len(margins),
    }
