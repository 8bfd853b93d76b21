"""Reward model: a score for an answer, such that preferred answers score higher.

Bradley-Terry (Ouyang et al. 2022, equation 1): the loss of a pair is -log sigmoid(score(chosen) - score(rejected)).
Only differences matter to it, so a small penalty on their sum keeps scores near 0 (Eisenstein et al. 2023, section 3).
The score is read at the last token of prompt and answer. Left out: process rewards and several outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Inputs, Kind, Metrics, Model, Work
from align_pipeline.stages import training
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.reading import first
from align_pipeline.stages.training import Training


class Reward(Training):
    """A reward model from preference pairs; it starts from the policy whose answers it will judge."""

    produces: ClassVar[Kind] = "reward_model"
    starts_from: ClassVar[str] = "model"
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.reward_config", "RewardConfig")
    owned: ClassVar[Mapping[str, str]] = {**OWNED, "center_rewards_coefficient": "center_rewards"}

    version: ClassVar[int] = 3
    reads: ClassVar[Task] = "preference"
    held_out_metrics: ClassVar[tuple[str, ...]] = (
        "accuracy", "loss", "calibration_error", "reward_mean", "reward_sd", "n",
    )  # fmt: skip
    also_measured: ClassVar[tuple[str, ...]] = ("train_accuracy",)

    type: Literal["reward"] = "reward"
    model: Model
    """The model to start from, usually the SFT stage: its adapter is copied and gets a fresh score head."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate. The default suits LoRA; `tuning: full` wants about a tenth."""
    center_rewards: float = Field(0.01, ge=0)
    """Weight of the penalty that keeps scores near 0; it also makes their differences a few per cent smaller."""

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_reward_trainable, save_model, write_reference_scores

        source = inputs["model"]
        tokenizer = training.load_tokenizer(inputs, "model")
        rows = _whole(training.prepare(self, inputs, tokenizer, work), tokenizer.pad_token_id)
        model = load_reward_trainable(
            source, tuning=self.tuning, lora=self.lora, quantize=self.quantize, seed=self.seed
        )
        trainer = self.trainer(model, tokenizer, rows, work)
        curve = training.fit(trainer, self, work)
        if not trainer.is_world_process_zero():
            return {}
        save_model(model, tokenizer, work.out, source)
        judged = rows.held_out or rows.train
        write_reference_scores(
            model, [ids for pair in judged for ids in (pair["chosen_ids"], pair["rejected_ids"])], work.out
        )
        held_out: Metrics = {}
        if rows.held_out:
            scored = score_pairs(model, rows.held_out)
            held_out = judge(scored)
            write_scores(scored, work.out)
        train_accuracy = judge(score_pairs(model, first(rows.train, 256)))["accuracy"]
        return {**held_out, "train_accuracy": train_accuracy, **training.facts(rows, trainer, curve)}

    def trainer(self, model: Any, tokenizer: Any, rows: training.Rows, work: Work) -> Any:
        """Return TRL's trainer on rows of `chosen_ids` and `rejected_ids`, prompt included."""
        import trl

        train, held_out = training.tables(rows)
        args = training.arguments(
            self,
            work,
            trl.RewardConfig,
            train,
            held_out,
            max_length=None,
            center_rewards_coefficient=self.center_rewards,
        )
        return training.trainer_class(trl.RewardTrainer, self, work)(
            model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )


def score_pairs(model: Any, pairs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the scores of each pair's chosen and rejected answer."""
    from align_pipeline.stages.models import score

    scores = score(model, [ids for pair in pairs for ids in (pair["chosen_ids"], pair["rejected_ids"])])
    return list(zip(scores[::2], scores[1::2], strict=True))


def write_scores(scored: Sequence[tuple[float, float]], out: Path) -> None:
    """Publish the scores of the held-out pairs in their order: calibration and distributions are read from them."""
    lines = (json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in scored)
    (out / "held_out_scores.jsonl").write_text("".join(lines), encoding="utf-8")


def judge(scored: Sequence[tuple[float, float]]) -> Metrics:
    """Return how well the scores of chosen and rejected answers predict preferences.

    `accuracy`: pairs whose chosen answer scores higher, ties half. `loss`: mean -log sigmoid(margin).
    `calibration_error`: ECE with 10 bins over the confidence sigmoid(|margin|) (Guo et al. 2017, equation 3).
    `reward_mean`, `reward_sd`: of all scores.
    """
    scores = [value for pair in scored for value in pair]
    margins = [chosen - rejected for chosen, rejected in scored]
    mean = sum(scores) / len(scores)
    return {
        "accuracy": sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins),
        "loss": sum(training.log1p_exp(-margin) for margin in margins) / len(margins),
        "calibration_error": _calibration_error(margins),
        "reward_mean": mean,
        "reward_sd": math.sqrt(sum((value - mean) ** 2 for value in scores) / len(scores)),
        "n": float(len(margins)),
    }


def _calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Return sum over bins of share * |accuracy - mean confidence|, confidences lying in [0.5, 1]."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        place = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        members[place].append((confidence, (margin > 0) + 0.5 * (margin == 0)))
    gaps = (abs(sum(right for _, right in group) - sum(sure for sure, _ in group)) for group in members)
    return sum(gaps) / len(margins)


def _whole(rows: training.Rows, pad_id: int) -> training.Rows:
    """Return rows in which each answer is a whole sequence: a score is read at the end of prompt and answer."""
    with_margin = "margin" in rows.train[0]  # the reader wants it in every row of a file, or in none

    def whole(row: Mapping[str, Any]) -> dict[str, Any]:
        sides = {side: [*row["prompt_ids"], *row[side]] for side in ("chosen_ids", "rejected_ids")}
        if any(ids[-1] == pad_id for ids in sides.values()):
            raise DataError(
                [f"data: an answer ends with the pad token (id {pad_id}), which looks like padding; drop that token"]
            )
        return {**sides, "margin": row["margin"]} if with_margin and "margin" in row else sides

    from dataclasses import replace

    return replace(rows, train=[whole(row) for row in rows.train], held_out=[whole(row) for row in rows.held_out])
