"""Losses of single pairs: TRL's where TRL has them, weighed and smoothed as worked out beside it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, training
from align_pipeline.stages.dealing import ROWS
from align_pipeline.stages.dpo import DPO, Loss
from align_pipeline.stages.pair_losses import NOT_OF_A_PAIR, pair_loss_trainer
from tiny import adapter

from .conftest import NAMES, assert_same_tensors, pairs, rows_file, tensors
from .test_dpo import _dies_at

Make = Callable[..., Work]

WEIGHTS = (3.0, 0.5, 1.0, 0.25, 2.0, 1.0, 0.75, 4.0, 1.5, 0.1, 1.0, 2.5)
OF_A_PAIR = [name for name in get_args(Loss) if name not in NOT_OF_A_PAIR]


def stage(**changes: Any) -> DPO:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "policy": "file:base", "learning_rate": 5e-3, "batch_size": 4}
    values |= {"epochs": 2, "held_out": 0, "warmup": 0}
    return DPO(**{**values, **adapter({"r": 4}, changes), **changes})


def weighed(weights: Any = WEIGHTS, column: str = "fb_weight") -> list[dict[str, Any]]:
    return [{**row, column: weight} for row, weight in zip(pairs(), weights, strict=False)]


def prepared(dpo: DPO, base: Resolved, made: Work, data: Any) -> training.Rows:
    given = {"policy": base} | ({"data": data} if isinstance(data, Resolved) else data)
    return training.prepare(dpo, given, models.load_tokenizer(base), made)


def curve_of(made: Work) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()]


def moved(base: Resolved) -> tuple[Any, Any]:
    """Return a policy of whole weights that is not its reference any more, and the reference."""
    import torch

    policy, reference = (models.load_causal(base, dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    policy.requires_grad_(True).train()
    return policy, reference


def loss_and_gradient(trainer: Any, batches: list[Any], model: Any) -> tuple[float, Any]:
    """Return what one optimizer step sees of these micro-batches: its loss as it is logged, and the gradient."""
    import torch

    model.zero_grad()
    (passes,), items = trainer.get_batch_samples(iter([batches]), 1, trainer.args.device)
    logs = {"loss": float(trainer.training_step(model, passes, items))}
    trainer.log(logs)
    return logs["loss"], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trainer_of(dpo: DPO, base: Resolved, made: Work, rows: training.Rows) -> tuple[Any, Any]:
    model, reference = moved(base)
    return dpo.trainer(model, reference, models.load_tokenizer(base), rows, made), model


def batches_of(trainer: Any, rows: Any, size: int) -> list[Any]:
    parts = [[rows[n] for n in range(i, i + size)] for i in range(0, len(rows), size)]
    return [{**trainer.data_collator(part), ROWS: len(part)} for part in parts]


@pytest.mark.parametrize("name", OF_A_PAIR)
def test_each_loss_is_trl_s(name: str, base: Resolved, work: Make, tmp_path: Path) -> None:
    """Pairs that all weigh 1: the loss and the gradient of TRL's own trainer."""
    import torch
    import trl

    smoothing = {"label_smoothing": 0.2} if name in ("robust", "exo_pair") else {}
    dpo = stage(tuning="full", loss=name, batch_size=12, beta=0.3, how={"micro_batch": 12}, **smoothing)
    rows = prepared(dpo, base, work(), rows_file(tmp_path, pairs()))
    plain, model = trainer_of(dpo, base, work(), rows)
    assert type(plain).__mro__[1] is trl.DPOTrainer
    expected = loss_and_gradient(plain, batches_of(plain, rows.train, 12), model)
    ones = stage(**{**dpo.model_dump(exclude_unset=True), "weight_column": "fb_weight"})
    rows = prepared(ones, base, work(), rows_file(tmp_path, weighed([1.0] * 12), "ones.jsonl"))
    ours, model = trainer_of(ones, base, work(), rows)
    loss, gradient = loss_and_gradient(ours, batches_of(ours, rows.train, 12), model)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert float(gradient.norm()) > 1e-4
    assert torch.allclose(gradient, expected[1], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_losses_of_several_and_their_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    found = []
    for losses, shares in (("sigmoid", None), ("ipo", None), (("sigmoid", "ipo"), (1.0, 0.25))):
        dpo = stage(tuning="full", loss=losses, loss_weights=shares, weight_column="fb_weight", batch_size=12)
        rows = prepared(dpo, base, work(), rows_file(tmp_path, weighed()))
        trainer, model = trainer_of(dpo, base, work(), rows)
        found.append(loss_and_gradient(trainer, batches_of(trainer, rows.train, 12), model)[0])
    assert found[2] == pytest.approx(found[0] + 0.25 * found[1], rel=1e-6)


def logits_by_hand(model: Any, reference: Any, rows: Any, beta: float) -> Any:
    """Return beta times the difference of log-ratios of each pair, one plain forward pass an answer."""
    import torch

    def log_prob(which: Any, prompt: list[int], answer: list[int]) -> Any:
        scores = which(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return scores[places, torch.tensor(answer)].sum()

    def ratio(row: Any, side: str) -> Any:
        with torch.no_grad():
            was = log_prob(reference, row["prompt_ids"], row[side])
        return log_prob(model, row["prompt_ids"], row[side]) - was

    return beta * torch.stack([ratio(row, "chosen_ids") - ratio(row, "rejected_ids") for row in rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_weighed_loss_and_its_gradient_are_those_worked_out_by_hand(
    smoothing: float, micro_batch: int, base: Resolved, work: Make, tmp_path: Path
) -> None:
    """A step of eight of the twelve pairs, in micro-batches whose weights differ."""
    import torch

    dpo = stage(tuning="full", weight_column="fb_weight", label_smoothing=smoothing, batch_size=8, beta=0.3)
    rows = prepared(dpo, base, work(), rows_file(tmp_path, weighed()))
    trainer, model = trainer_of(dpo, base, work(), rows)
    step = [rows.train[n] for n in range(8)]
    loss, gradient = loss_and_gradient(trainer, batches_of(trainer, step, micro_batch), model)

    model, reference = moved(base)
    h = logits_by_hand(model, reference, step, 0.3)
    weights = torch.tensor(WEIGHTS[:8])
    each = -(1 - smoothing) * torch.log(torch.sigmoid(h)) - smoothing * torch.log(torch.sigmoid(-h))
    assert loss == pytest.approx(float((weights * each.detach()).sum() / weights.sum()), rel=1e-5)
    ((weights * each).sum() / (8 * sum(WEIGHTS) / 12)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_equal_weights_change_nothing(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Every pair weighs 2: the run without weights, but for rounding."""
    plain, two = stage(), stage(weight_column="fb_weight")
    plain.run({"policy": base, "data": rows_file(tmp_path, pairs())}, work("plain"))
    two.run({"policy": base, "data": rows_file(tmp_path, weighed([2] * 12))}, work("two"))
    for one, other in zip(curve_of(work("plain")), curve_of(work("two")), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    other = tensors(work("two").out)
    for name, weight in tensors(work("plain").out).items():
        assert float((other[name] - weight).abs().max()) < 1e-4, name


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_batches_change_nothing(
    micro_batch: int, smoothing: float, base: Resolved, work: Make, tmp_path: Path
) -> None:
    """Ten rows in batches of six leave four for the second step, which micro-batches of three cannot divide."""
    inputs = {"policy": base, "data": rows_file(tmp_path, weighed()[:10])}
    curves = []
    for size in (6, micro_batch):
        changes = {"weight_column": "fb_weight", "label_smoothing": smoothing, "held_out": 0.2, "evaluate_every": 1}
        stage(batch_size=6, how={"micro_batch": size}, **changes).run(inputs, work(str(size)))
        curves.append(curve_of(work(str(size))))
    assert any("eval_loss" in point for point in curves[0])
    for big, small in zip(*curves, strict=True):
        for name in big.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert small[name] == pytest.approx(big[name], rel=1e-4, abs=2e-6), name
    assert curves[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_light_pair_moves_little_even_alone_in_its_batch(base: Resolved, work: Make, tmp_path: Path) -> None:
    light = [1e-6 if number % 2 else 1.0 for number in range(12)]
    dpo = stage(weight_column="fb_weight", tuning="full", batch_size=1)
    rows = prepared(dpo, base, work(), rows_file(tmp_path, weighed(light)))
    trainer, model = trainer_of(dpo, base, work(), rows)
    much, little = (
        loss_and_gradient(trainer, batches_of(trainer, [rows.train[number]], 1), model)[1] for number in (0, 1)
    )
    assert 0 < float(little.norm()) < 1e-4 * float(much.norm())


def test_held_out_pairs_are_weighed_by_their_own_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    import torch

    dpo = stage(
        tuning="full", weight_column="fb_weight", evaluation="file:e", how={"micro_batch": 4}, batch_size=4, beta=0.3
    )
    held = [{**row, "fb_weight": weight} for row, weight in zip(pairs(6), (1, 9, 1, 0, 2, 5), strict=True)]
    data = {"data": rows_file(tmp_path, weighed()), "evaluation": rows_file(tmp_path, held, "held.jsonl")}
    rows = prepared(dpo, base, work(), data)
    assert [row["weight"] for row in rows.held_out] == [1, 9, 1, 2, 5]
    trainer, model = trainer_of(dpo, base, work(), rows)
    found = trainer.evaluate()["eval_loss"]
    h = logits_by_hand(model, trainer.ref_model, list(rows.held_out), 0.3)
    weights = torch.tensor([1.0, 9, 1, 2, 5])
    expected = float((weights * torch.log1p(torch.exp(-h.detach()))).sum() / weights.sum())
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_goes_on_with_its_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"policy": base, "data": rows_file(tmp_path, weighed())}
    dpo = stage(epochs=3, weight_column="fb_weight", label_smoothing=0.1, how={"checkpoint_every_steps": 2})
    whole = dpo.run(inputs, work("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_check_loss", _dies_at(5))
        with pytest.raises(KeyboardInterrupt):
            dpo.run(inputs, work("killed"))
    assert dpo.run(inputs, work("killed")) == whole
    assert_same_tensors(work("whole").out, work("killed").out)
    assert curve_of(work("whole")) == curve_of(work("killed"))


RANKS = """
import sys
from pathlib import Path
import torch
from align_pipeline.pipeline.stage import Launch, Resolved, Work
from align_pipeline.pipeline.worker import leave
from align_pipeline.stages.dpo import DPO
torch.set_num_threads(1)
work = Work(Path(sys.argv[1]), Launch(processes=2))
source = lambda path: Resolved(ref=path, digest="sha256:0", path=path)
DPO.model_validate_json(sys.argv[2]).run({"policy": source(sys.argv[3]), "data": source(sys.argv[4])}, work)
leave(0)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Ranks get pairs of other weights; the step is divided by what all of them weigh. One pair is left over."""
    data = rows_file(tmp_path, weighed()[:11])
    dpo = stage(weight_column="fb_weight", label_smoothing=0.1, how={"micro_batch": 1})
    dpo.run({"policy": base, "data": data}, work("one"))
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "ranks.py"), str(work("two").folder)]
    command += [dpo.model_dump_json(exclude_unset=True), str(base.path), str(data.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    one, two = curve_of(work("one")), curve_of(work("two"))
    assert one[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("loss", "grad_norm"):
        assert [point[name] for point in two] == pytest.approx([point[name] for point in one], rel=1e-4), name


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_s_log_probs_may_be_computed_beforehand(
    tuning: str, base: Resolved, work: Make, tmp_path: Path
) -> None:
    inputs = {"policy": base, "data": rows_file(tmp_path, weighed())}
    curves = []
    for beforehand in (False, True):
        how = {"train": {"precompute_ref_log_probs": beforehand}}
        stage(tuning=tuning, weight_column="fb_weight", learning_rate=1e-3, how=how).run(inputs, work(str(beforehand)))
        curves.append([point["loss"] for point in curve_of(work(str(beforehand)))])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < math.log(2) - 0.001


def test_smoothing_stops_where_the_pair_is_as_sure_as_the_votes(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Pairs that are wrong one time in five: sigmoid(h) ends at 0.8, and goes further without smoothing."""
    sure = []
    for smoothing in (0.2, 0.0):
        dpo = stage(label_smoothing=smoothing, batch_size=4, epochs=40, learning_rate=1e-2, beta=1.0)
        rows = prepared(dpo, base, work(), rows_file(tmp_path, pairs(4)))
        made = work(str(smoothing))
        model = models.load_trainable(base, tuning="lora", lora=dpo.lora)
        trainer = dpo.trainer(model, None, models.load_tokenizer(base), rows, made)
        assert training.fit(trainer, dpo, made, first_loss=dpo.first_loss())[0]["loss"] == pytest.approx(math.log(2))
        answers = [(row["prompt_ids"], row[side]) for row in rows.train for side in ("chosen_ids", "rejected_ids")]
        rewards = training.implicit_rewards(trainer, answers, 1.0)
        sure.append([1 / (1 + math.exp(down - up)) for up, down in zip(rewards[::2], rewards[1::2], strict=True)])
    assert sure[0] == pytest.approx([0.8] * 4, abs=0.04)
    assert min(sure[1]) > 0.95


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_pairs_that_weigh_nothing_are_in_no_part(base: Resolved, work: Make, tmp_path: Path) -> None:
    dpo = stage(weight_column="fb_weight", held_out=0.4)
    rows = prepared(dpo, base, work(), rows_file(tmp_path, weighed([0, 1, 2] * 4)))
    left = [*rows.train, *rows.held_out]
    assert len(left) == 8 and {row["weight"] for row in left} == {1.0, 2.0}
    report = json.loads((work().scratch / "rows.json").read_text())["data"]
    assert "4 pairs weigh 0 and are not learnt" in report["notes"]
    with pytest.raises(DataError, match=r"rows.jsonl: fb_weight is 0 in every row, .*give one a weight above 0"):
        prepared(dpo, base, work("none"), rows_file(tmp_path, weighed([0] * 12)))


def test_weights_of_pairs_and_of_sources_work_together(base: Resolved, work: Make, tmp_path: Path) -> None:
    dpo = stage(
        data={"a": "file:a", "b": "file:b"}, data_weights={"a": 2}, weight_column="votes", tuning="full", batch_size=4
    )
    data = {
        "data.a": rows_file(tmp_path, weighed([3, 5], "votes"), "a.jsonl"),
        "data.b": rows_file(tmp_path, [{**row, "votes": 7} for row in pairs(4)[2:]], "b.jsonl"),
    }
    rows = prepared(dpo, base, work(), data)
    assert sorted(row["weight"] for row in rows.train) == [3, 3, 5, 5, 7, 7]
    trainer, _ = trainer_of(dpo, base, work(), rows)
    (batch,) = batches_of(trainer, list(rows.train), 6)
    assert sorted(batch["weight"].tolist()) == pytest.approx([w / 5 for w in (3, 3, 5, 5, 7, 7)])


def test_the_weights_decide_the_entry_and_no_row_s_side(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Another column is another entry of the cache; votes that change move no row between the sides."""
    rows = [{**row, "fb_weight": 1.0, "fb_votes": 2 + n} for n, row in enumerate(pairs())]
    data = rows_file(tmp_path, rows)
    found = {}
    for column in (None, "fb_weight", "fb_votes"):
        one = prepared(stage(weight_column=column, held_out=0.3), base, work(), data)
        found[column] = ([row["prompt_ids"] for row in one.held_out], [row.get("weight") for row in one.train])
    assert len({json.dumps(held) for held, _ in found.values()}) == 1
    assert set(found[None][1]) == {None} and set(found["fb_weight"][1]) == {1.0} and min(found["fb_votes"][1]) >= 2
    data = {"data.a": data}
    for column in ("fb_weight", "fb_votes"):
        share = stage(weight_column=column, data={"a": "file:a"}, data_weights={"a": 0.5})
        found[column] = [row["prompt_ids"] for row in prepared(share, base, work(), data).train]
    assert found["fb_weight"] == found["fb_votes"] and 0 < len(found["fb_votes"]) < len(NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_column": "w", "loss": "aot"}, "weight_column: aot sorts the pairs of a batch, a pair has no loss"),
        ({"weight_column": "w", "loss": ("sigmoid", "sft")}, "weight_column: sft is a mean over the tokens of a batch"),
        ({"label_smoothing": 0.1, "loss": ("sigmoid", "sft")}, "label_smoothing of sigmoid: sft is a mean"),
        ({"label_smoothing": 0.1, "loss": ("sigmoid", "robust")}, "sigmoid and robust each mean something else by it"),
        ({"weight_column": "w", "train": {"use_weighting": True}}, "train.use_weighting changes losses inside TRL"),
        ({"label_smoothing": 0.1, "train": {"ld_alpha": 0.5}}, "label_smoothing of sigmoid: train.ld_alpha"),
        ({"weight_column": ""}, "at least 1 character"),
    ],
)
def test_what_has_no_loss_of_a_pair_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        stage(**changes)
    assert message in str(caught.value)


def test_without_a_weight_or_smoothing_the_trainer_is_trl_s_own() -> None:
    assert not stage().by_pair and not stage(loss="robust", label_smoothing=0.1).by_pair
    assert stage(weight_column="w").by_pair and stage(label_smoothing=0.1).by_pair
    assert pair_loss_trainer(dict, None, None).__name__ == "dict"
