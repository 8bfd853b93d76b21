"""Reward models: preferences are learnt, measured from the final weights, and proven by every later loader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, reward, training
from align_pipeline.stages.reward import Reward
from tiny import adapter

from .conftest import adapter_of, assert_same_tensors, files, pairs, rows_file

Make = Callable[..., Work]


def stage(**changes: Any) -> Reward:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "model": "stage:sft", "learning_rate": 1e-2, "batch_size": 4}
    return Reward(**{**values, "epochs": 6, "held_out": 0.3, **adapter({"r": 4}, changes), **changes})


def test_preferences_are_learnt_and_the_published_model_proves_itself(
    base: Resolved, work: Make, tmp_path: Path
) -> None:
    made = work()
    inputs = {"model": base, "data": rows_file(tmp_path, pairs())}
    metrics = stage().run(inputs, made)
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=0.3)  # of a random head
    assert metrics["accuracy"] == metrics["train_accuracy"] == 1.0
    assert metrics["loss"] < 0.4

    model = models.load_reward(adapter_of(made, base, "reward_model"))
    tokenizer = training.load_tokenizer(inputs, "model")
    rows = training.prepare(stage(), inputs, tokenizer, work("rows"))
    scores = {
        side: models.score(model, [[*row["prompt_ids"], *row[side]] for row in rows.held_out])
        for side in ("chosen_ids", "rejected_ids")
    }
    margins = [a - b for a, b in zip(scores["chosen_ids"], scores["rejected_ids"], strict=True)]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["n"] == len(margins)
    kept = [json.loads(line) for line in (made.out / "held_out_scores.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in kept] == pytest.approx(scores["chosen_ids"], abs=1e-5)
    assert [row["rejected"] for row in kept] == pytest.approx(scores["rejected_ids"], abs=1e-5)
    json.dumps(metrics, allow_nan=False)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    """Confidences 0.88 (three right of four) and 0.52 (wrong): worked out by hand."""
    sure, unsure = math.log(0.88 / 0.12), math.log(0.52 / 0.48)
    expected = (abs(3 - 4 * 0.88) + abs(0 - 0.52)) / 5
    assert reward._calibration_error([sure, sure, -sure, sure, -unsure]) == pytest.approx(expected)
    assert reward._calibration_error([50.0]) == pytest.approx(0, abs=1e-9)


def test_a_killed_run_gives_the_same_reward_model(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"model": base, "data": rows_file(tmp_path, pairs())}
    run = stage(epochs=3, how={"checkpoint_every_steps": 2})
    whole = run.run(inputs, work("whole"))

    def dies(stage: Any, step: int, *_: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_check_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            run.run(inputs, work("killed"))
    assert run.run(inputs, work("killed")) == whole
    assert_same_tensors(work("whole").out, work("killed").out)
    assert files(work("whole").out) == files(work("killed").out)


def test_whole_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    made = work()
    metrics = stage(tuning="full", learning_rate=1e-3).run({"model": base, "data": rows_file(tmp_path, pairs())}, made)
    scores = str(made.out / "reference_scores.json")
    source = base.model_copy(update={"path": str(made.out), "reference_scores": scores})
    models.load_reward(source)
    assert metrics["train_accuracy"] == 1.0


def test_a_margin_is_asked_of_every_pair_or_none(base: Resolved, work: Make, tmp_path: Path) -> None:
    rows = [{**row, "margin": 2.0} for row in pairs(6)]
    metrics = stage(max_steps=1, held_out=0).run({"model": base, "data": rows_file(tmp_path, rows)}, work())
    # log(1 + exp(2)) where the two scores are equal, as they nearly are at the start
    assert metrics["first_loss"] == pytest.approx(math.log(1 + math.exp(2)), abs=0.4)
    del rows[3]["margin"]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: margin"):
        stage(held_out=0).run({"model": base, "data": rows_file(tmp_path, rows)}, work("mixed"))


@pytest.mark.parametrize("with_margins", [True, False])
@pytest.mark.parametrize("micro_batch", [2, 6])
def test_margins_reach_the_loss_and_without_them_nothing_changes(
    with_margins: bool, micro_batch: int, base: Resolved, work: Make, tmp_path: Path
) -> None:
    """A margin of each pair's own, and the loss worked out from scores of plain forward passes, one an answer."""
    import torch

    margins = [0.5, 3.0, -1.0, 0.0, 2.0, 7.0]
    run = stage(max_steps=1, held_out=0, batch_size=6, warmup=0, center_rewards=0.1, how={"micro_batch": micro_batch})
    given = [{**row, "margin": margin} if with_margins else row for row, margin in zip(pairs(6), margins, strict=True)]
    inputs = {"model": base, "data": rows_file(tmp_path, given)}
    run.run(inputs, work())
    point = json.loads((work().out / "curve.jsonl").read_text().splitlines()[0])

    rows = training.prepare(run, inputs, training.load_tokenizer(inputs, "model"), work("rows")).train
    assert all(("margin" in row) == with_margins for row in rows)
    model = models.load_reward_trainable(base, tuning="lora", lora=run.lora, seed=run.seed)
    chosen, rejected = (
        torch.stack([model(torch.tensor([row["prompt_ids"] + row[side]])).logits[0, 0] for row in rows])
        for side in ("chosen_ids", "rejected_ids")
    )
    wanted = torch.tensor(margins) if with_margins else 0.0
    loss = torch.log1p(torch.exp(-(chosen - rejected - wanted))).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    loss.backward()
    norm = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert point["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert point["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_an_answer_that_ends_with_padding_is_refused(base: Resolved, work: Make, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 0], "rejected_ids": [7, 2]}] * 2
    with pytest.raises(DataError, match="ends with the pad token"):
        stage(held_out=0).run({"model": base, "data": rows_file(tmp_path, rows)}, work())


def test_scores_are_kept_near_zero(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Without the penalty nothing says where the mean lies."""
    means = []
    for weight in (0.0, 1.0):
        made = work(str(weight))
        metrics = stage(center_rewards=weight, epochs=10).run(
            {"model": base, "data": rows_file(tmp_path, pairs())}, made
        )
        means.append(metrics["reward_sd"] + abs(metrics["reward_mean"]))
    assert means[1] < 0.7 * means[0]
