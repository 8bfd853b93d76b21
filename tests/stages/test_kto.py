"""KTO: thumbs are learnt, and the KL term comes from answers dealt to other prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, training
from align_pipeline.stages.kto import KTO, deal
from tiny import adapter

from .conftest import assert_same_tensors, rows_file, unpaired

Make = Callable[..., Work]


def stage(**changes: Any) -> KTO:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "policy": "file:base", "learning_rate": 1e-2, "batch_size": 4}
    return KTO(**{**values, "kl_batch": 4, "epochs": 10, "held_out": 0, **adapter({"r": 4}, changes), **changes})


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_thumbs_are_learnt_from_a_first_loss_of_one_half(
    base: Resolved, work: Make, tmp_path: Path, tuning: str
) -> None:
    inputs = {"policy": base, "data": rows_file(tmp_path, unpaired())}
    kto = stage(tuning=tuning, held_out=0.3, learning_rate=1e-2 if tuning == "lora" else 1e-3)
    metrics = kto.run(inputs, work())
    assert metrics["first_loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["accuracy"] == 1.0
    assert metrics["margin"] == pytest.approx(metrics["reward_liked"] - metrics["reward_disliked"])
    assert metrics["margin"] > 0.2


def test_answers_are_dealt_to_other_prompts_of_the_same_pass(base: Resolved, work: Make, tmp_path: Path) -> None:
    kto = stage()
    inputs = {"policy": base, "data": rows_file(tmp_path, unpaired(11))}
    tokenizer = training.load_tokenizer(inputs, "policy")
    rows = training.prepare(kto, inputs, tokenizer, work("rows"))
    model = models.load_trainable(base, tuning="lora", lora=kto.lora)
    trainer = kto.trainer(model, None, tokenizer, rows, work())
    seen = 0
    for batch in itertools.chain(*trainer.get_train_dataloader()):
        answers = [_answer(batch, row, "") for row in range(4)]
        mismatched = [_answer(batch, row, "KL_") for row in range(4)]
        assert sorted(answers) == sorted(mismatched)
        assert mismatched == [answers[-1], *answers[:-1]]
        seen += len(answers)
    assert seen == 8, "eleven rows are two groups of four; a smaller group would pair answers with their own prompts"


def _answer(batch: Any, row: int, prefix: str) -> list[int]:
    ids, mask = batch[f"{prefix}input_ids"][row], batch[f"{prefix}completion_mask"][row]
    return [int(token) for token in ids[mask.bool()]]


def test_the_order_depends_on_the_seed_alone() -> None:
    rows = [{"completion_ids": [number]} for number in range(9)]
    assert deal(rows, 4, seed=1) == deal(rows, 4, seed=1) != deal(rows, 4, seed=2)
    assert len(deal(rows, 4, seed=1)) == 8


def test_a_killed_run_gives_the_same_adapter(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"policy": base, "data": rows_file(tmp_path, unpaired())}
    kto = stage(epochs=3, how={"checkpoint_every_steps": 2})
    whole = kto.run(inputs, work("whole"))

    def dies(stage: Any, step: int, *_: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_check_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            kto.run(inputs, work("killed"))
    assert kto.run(inputs, work("killed")) == whole
    assert_same_tensors(work("whole").out, work("killed").out)


def test_weights_move_the_first_loss(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Six liked and six disliked rows of loss 1/2, weighted 1 and 3, are 1 on average."""
    inputs = {"policy": base, "data": rows_file(tmp_path, unpaired())}
    kto = stage(undesirable_weight=3.0, batch_size=12, max_steps=1)
    assert kto.first_loss() is None
    assert kto.run(inputs, work())["first_loss"] == pytest.approx(1.0, abs=1e-6)


def test_sizes_that_do_not_fit_are_refused(base: Resolved, work: Make, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must be a multiple of kl_batch 8"):
        stage(kl_batch=8)
    with pytest.raises(ValidationError, match="KTO's forward passes have kl_batch rows"):
        stage(how={"micro_batch": 2})
    with pytest.raises(AlignError, match="there are only 3"):
        stage().run({"policy": base, "data": rows_file(tmp_path, unpaired(3))}, work())
