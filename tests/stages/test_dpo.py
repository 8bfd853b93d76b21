"""DPO: the reference is the policy's own start, and pairs are learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, training
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.sft import SFT
from tiny import adapter

from .conftest import adapter_of, assert_same_tensors, chats, pairs, rows_file, tensors

Make = Callable[..., Work]


def stage(**changes: Any) -> DPO:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "policy": "stage:sft", "learning_rate": 5e-3, "batch_size": 4}
    return DPO(**{**values, "epochs": 4, "held_out": 0.2, **adapter({"r": 4}, changes), **changes})


@pytest.fixture(scope="module")
def policy(base: Resolved, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """Return an SFT adapter that is clearly not the base."""
    work = Work(tmp_path_factory.mktemp("chain") / "work" / "sft")
    work.out.mkdir(parents=True)
    work.scratch.mkdir()
    data = rows_file(work.folder, chats())
    sft = SFT(data="file:x", model="file:b", learning_rate=1e-2, batch_size=4, epochs=4, held_out=0, lora={"r": 4})
    sft.run({"model": base, "data": data}, work)
    return adapter_of(work, base)


def test_pairs_are_learnt_from_a_first_loss_of_ln_2(policy: Resolved, work: Make, tmp_path: Path) -> None:
    made = work()
    metrics = stage(epochs=8).run({"policy": policy, "data": rows_file(tmp_path, pairs())}, made)
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["accuracy"] == 1.0
    assert metrics["margin"] > 0.5
    assert metrics["loss"] < 0.5
    assert not (made.out / "adapter" / "ref").exists()
    curve = [json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == list(range(1, int(metrics["steps"]) + 1))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_is_the_policy_that_came_in(
    base: Resolved, policy: Resolved, work: Make, tmp_path: Path, tuning: str
) -> None:
    source = policy if tuning == "lora" else base
    dpo = stage(tuning=tuning, learning_rate=5e-3 if tuning == "lora" else 1e-3)
    inputs = {"policy": source, "data": rows_file(tmp_path, pairs())}
    made = work(tuning)
    tokenizer = training.load_tokenizer(inputs, "policy")
    rows = training.prepare(dpo, inputs, tokenizer, work("rows"))
    answers = [(row["prompt_ids"], row["chosen_ids"]) for row in rows.train]
    model = models.load_trainable(source, tuning=dpo.tuning, lora=dpo.lora)
    trainer = dpo.trainer(model, training.frozen_copy(dpo, source), tokenizer, rows, made)
    training.fit(trainer, dpo, made, first_loss=dpo.first_loss())
    rewards = training.implicit_rewards(trainer, answers, beta=1.0)

    # The same number from the files alone: what was published, and what came in, loaded anew.
    models.save_model(model, tokenizer, made.out, source)
    after = adapter_of(made, base) if tuning == "lora" else base.model_copy(update={"path": str(made.out)})
    new = models.completion_log_probs(models.load_causal(after), answers)
    old = models.completion_log_probs(models.load_causal(source), answers)
    expected = [float((a - b).sum()) for a, b in zip(new, old, strict=True)]
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, rewards)) > 0.05


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_another_reference_is_refused_at_the_first_step(
    smoothing: float, base: Resolved, policy: Resolved, work: Make, tmp_path: Path
) -> None:
    dpo = stage(label_smoothing=smoothing)
    inputs = {"policy": policy, "data": rows_file(tmp_path, pairs())}
    tokenizer = training.load_tokenizer(inputs, "policy")
    rows = training.prepare(dpo, inputs, tokenizer, work("rows"))
    model = models.load_trainable(policy, tuning="lora", lora=dpo.lora)
    trainer = dpo.trainer(model, models.load_causal(base), tokenizer, rows, work())
    with pytest.raises(AlignError, match=r"first loss is .* must be 0\.693147"):
        training.fit(trainer, dpo, work(), first_loss=dpo.first_loss())


def test_a_killed_run_gives_the_same_adapter(policy: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"policy": policy, "data": rows_file(tmp_path, pairs())}
    dpo = stage(epochs=3, how={"checkpoint_every_steps": 2})
    whole = dpo.run(inputs, work("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_check_loss", _dies_at(5))
        with pytest.raises(KeyboardInterrupt):
            dpo.run(inputs, work("killed"))
    assert dpo.run(inputs, work("killed")) == whole
    assert_same_tensors(work("whole").out, work("killed").out)
    curves = [(work(name).out / "curve.jsonl").read_bytes() for name in ("whole", "killed")]
    assert curves[0] == curves[1]


def _dies_at(step: int) -> Callable[..., None]:
    def check(stage: Any, at: int, *_: Any) -> None:
        if at == step:
            raise KeyboardInterrupt

    return check


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing(policy: Resolved, work: Make, tmp_path: Path, micro_batch: int) -> None:
    """Ten rows in batches of six leave four for the second step, which micro-batches of three cannot divide."""
    inputs = {"policy": policy, "data": rows_file(tmp_path, pairs(10))}
    curves = []
    for size in (6, micro_batch):
        made = work(str(size))
        stage(batch_size=6, epochs=2, held_out=0, how={"micro_batch": size}, warmup=0).run(inputs, made)
        curves.append([json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()])
    for big, small in zip(*curves, strict=True):
        assert small["loss"] == pytest.approx(big["loss"], abs=2e-6)
        assert small["grad_norm"] == pytest.approx(big["grad_norm"], rel=1e-4)


def test_the_stage_trains_as_plain_trl_does(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Whole weights, the same ids and settings written out by hand: bit-equal models."""
    import torch
    import trl
    from datasets import Dataset

    made = work()
    dpo = stage(tuning="full", learning_rate=1e-3, epochs=2, held_out=0, batch_size=4, how={"micro_batch": 2})
    inputs = {"policy": base, "data": rows_file(tmp_path, pairs())}
    dpo.run(inputs, made)

    tokenizer = training.load_tokenizer(inputs, "policy")
    rows = training.prepare(dpo, inputs, tokenizer, work("rows")).train
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "plain"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2 * math.ceil(len(rows) / 4) // 10,
        beta=0.1,
        seed=0,
        data_seed=0,
        save_strategy="no",
        report_to="none",
    )
    plain = type("Plain", (trl.DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
    model, reference = (models.load_causal(base, dtype=torch.float32) for _ in range(2))
    model.requires_grad_(True).train()
    plain(model, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    found = tensors(made.out / "model")
    for name, weight in model.state_dict().items():
        assert torch.equal(found[f"model.safetensors/{name}"], weight), name


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_reference_log_probs_may_be_computed_beforehand(
    base: Resolved, policy: Resolved, work: Make, tmp_path: Path, tuning: str
) -> None:
    inputs = {"policy": policy if tuning == "lora" else base, "data": rows_file(tmp_path, pairs())}
    found = []
    for beforehand in (False, True):
        how = {"train": {"precompute_ref_log_probs": beforehand}}
        found.append(stage(tuning=tuning, learning_rate=1e-3, epochs=2, how=how).run(inputs, work(str(beforehand))))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_checkpointing_changes_nothing(smoothing: float, policy: Resolved, work: Make, tmp_path: Path) -> None:
    """The backward pass computes activations anew; with the reference's adapter they would be another model's."""
    inputs = {"policy": policy, "data": rows_file(tmp_path, pairs())}
    curves = []
    for on in (False, True):
        stage(epochs=2, label_smoothing=smoothing, how={"gradient_checkpointing": on}).run(inputs, work(str(on)))
        curves.append((work(str(on)).out / "curve.jsonl").read_text())
    plain, recomputed = ([json.loads(line) for line in text.splitlines()] for text in curves)
    assert [point["grad_norm"] for point in recomputed] == pytest.approx([p["grad_norm"] for p in plain], rel=1e-4)
    assert plain[-1]["loss"] < math.log(2) - 0.01


def test_token_ids_are_taken_exactly(policy: Resolved, work: Make, tmp_path: Path) -> None:
    dpo = stage(held_out=0)
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]}]
    inputs = {"policy": policy, "data": rows_file(tmp_path, rows)}
    tokenizer = training.load_tokenizer(inputs, "policy")
    prepared = training.prepare(dpo, inputs, tokenizer, work("rows"))
    model = models.load_trainable(policy, tuning="lora", lora=dpo.lora)
    trainer = dpo.trainer(model, None, tokenizer, prepared, work())
    (batch,) = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"][:, :5].tolist() == [[5, 6, 7, 2, tokenizer.pad_token_id], [5, 6, 8, 9, 2]]
    assert batch["completion_mask"][:, :5].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing: hinge has none"),
        ({"loss": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "1 weights for 2 losses"),
        ({"loss": "exo_pair"}, "exo_pair needs it above 0"),
        ({"loss": "sigmoidd"}, "sigmoid_norm"),
        ({"batch_size": 6, "how": {"micro_batch": 4}}, "must be a multiple of how.micro_batch 4"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**changes)


def test_several_losses(policy: Resolved, work: Make, tmp_path: Path) -> None:
    """RPO's loss starts at ln 2 plus the weighted likelihood of the chosen answers, so no first loss is demanded."""
    dpo = stage(loss=("sigmoid", "sft"), loss_weights=(1.0, 0.5), max_steps=1)
    assert dpo.first_loss() is None
    metrics = dpo.run({"policy": policy, "data": rows_file(tmp_path, pairs())}, work())
    assert metrics["first_loss"] > math.log(2) + 0.1
