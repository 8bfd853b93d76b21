"""SFT: the answers are learnt, their ends too, and neither packing nor accumulation changes the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import models, training
from align_pipeline.stages.sft import SFT, mean_loss
from tiny import adapter

from .conftest import adapter_of, chats, rows_file, tensors

Make = Callable[..., Work]


def stage(**changes: Any) -> SFT:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "model": "file:base", "learning_rate": 2e-2, "batch_size": 4}
    return SFT(**{**values, "epochs": 40, "held_out": 0, **adapter({"r": 8}, changes), **changes})


def curve(work: Work) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work.out / "curve.jsonl").read_text().splitlines()]


def trainer_of(sft: SFT, inputs: dict[str, Resolved], work: Work) -> tuple[Any, training.Rows]:
    tokenizer = training.load_tokenizer(inputs, "model")
    rows = training.prepare(sft, inputs, tokenizer, work, sft.loss_on)
    model = models.load_trainable(inputs["model"], tuning=sft.tuning, lora=sft.lora)
    return sft.trainer(model, tokenizer, rows, work), rows


def test_answers_are_learnt_by_heart_and_end(base: Resolved, work: Make, tmp_path: Path) -> None:
    import torch

    made = work()
    sft = stage(tuning="full", learning_rate=3e-3, epochs=60)
    metrics = sft.run({"model": base, "data": rows_file(tmp_path, chats(6))}, made)
    assert metrics["first_loss"] > 4
    assert metrics["train_loss"] < 0.1
    source = base.model_copy(update={"path": str(made.out)})
    model, tokenizer = models.load_causal(source), models.load_tokenizer(source)
    for row in chats(6):
        question, answer = row["messages"]
        ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
        assert tokenizer.decode(said) == f"{answer['content']}<|im_end|>"


def test_metrics_are_those_of_the_published_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    made = work()
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    sft = stage(epochs=10, held_out=0.25)
    metrics = sft.run(inputs, made)
    assert metrics["train_loss"] < metrics["first_loss"] - 3
    rows = training.prepare(sft, inputs, training.load_tokenizer(inputs, "model"), work("rows"))
    model = models.load_causal(adapter_of(made, base))
    assert metrics["loss"] == pytest.approx(mean_loss(model, rows.held_out), abs=1e-6)
    assert metrics["held_out_rows"] == len(rows.held_out) >= 1
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(("loss_on", "learnt"), [("assistant", [7, 8, 2]), ("all", [5, 6, 7, 8, 2])])
def test_only_the_answer_is_learnt(base: Resolved, work: Make, tmp_path: Path, loss_on: str, learnt: list[int]) -> None:
    data = rows_file(tmp_path, [{"prompt_ids": [5, 6], "completion_ids": [7, 8, 2]}] * 2)
    trainer, _ = trainer_of(stage(loss_on=loss_on), {"model": base, "data": data}, work())
    batch = next(iter(trainer.get_train_dataloader()))[0]
    assert [label for label in batch["labels"][0].tolist() if label != -100] == learnt


def test_the_first_loss_is_the_mean_over_all_answer_tokens(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Compared with a plain softmax; answers of unequal length tell a token mean from a mean of row means."""
    import torch

    rows = [{"prompt_ids": [5], "completion_ids": [7, 2]}, {"prompt_ids": [6], "completion_ids": [8, 9, 10, 11, 12, 2]}]
    made = work()
    stage(max_steps=1, batch_size=2).run({"model": base, "data": rows_file(tmp_path, rows)}, made)
    model, losses = models.load_causal(base), []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += [-log_probs[i, token].item() for i, token in enumerate(ids[0, 1:].tolist())]
    assert curve(made)[0]["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_is_the_big_batch(base: Resolved, work: Make, tmp_path: Path, micro_batch: int) -> None:
    """Seven rows in batches of four leave three for every second step."""
    inputs = {"model": base, "data": rows_file(tmp_path, chats(7))}
    for size in (4, micro_batch):
        stage(epochs=2, learning_rate=1e-3, how={"micro_batch": size}).run(inputs, work(str(size)))
    big, small = curve(work("4")), curve(work(str(micro_batch)))
    assert [point["loss"] for point in small] == pytest.approx([point["loss"] for point in big], abs=2e-6)
    for name, weight in tensors(work("4").out).items():
        # Adam divides by the root of tiny second moments, which magnifies rounding.
        assert (tensors(work(str(micro_batch)).out)[name] - weight).abs().max() < 2e-4


def test_packing_is_exact(base: Resolved, work: Make, tmp_path: Path) -> None:
    """All rows in one step: packed and padded losses and gradients are the same sums."""
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    points = []
    for packing in (False, True):
        made = work(f"packing-{packing}")
        sft = stage(packing=packing, max_length=100, batch_size=12, max_steps=1, how={"micro_batch": 12})
        if packing:
            trainer, rows = trainer_of(sft, inputs, made)
            assert 1 < len(trainer.train_dataset) <= len(rows.train) / 2
        sft.run(inputs, made)
        points.append(curve(made)[0])
    assert points[0]["loss"] == pytest.approx(points[1]["loss"], abs=1e-5)
    assert points[0]["grad_norm"] == pytest.approx(points[1]["grad_norm"], rel=1e-4)


def test_packing_is_refused_where_rows_would_see_each_other(
    base: Resolved, work: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that ignores positions when it builds its mask attends across the border."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **all: plain(**{**all, "position_ids": None}))
    with pytest.raises(AlignError, match=r"packing: this model's answer to a row changes by .* set packing: false"):
        stage(packing=True).run({"model": base, "data": rows_file(tmp_path, chats())}, work())


def test_whole_weights(base: Resolved, work: Make, tmp_path: Path) -> None:
    made = work()
    inputs = {"model": base, "data": rows_file(tmp_path, chats(4))}
    metrics = stage(tuning="full", learning_rate=3e-3, epochs=20).run(inputs, made)
    assert metrics["train_loss"] < 0.5
    assert (made.out / "model" / "generation_config.json").is_file()
    again = base.model_copy(update={"path": str(made.out)})
    rows = training.prepare(stage(), inputs, training.load_tokenizer(inputs, "model"), work("rows"))
    assert mean_loss(models.load_causal(again), rows.train) == pytest.approx(metrics["train_loss"], abs=1e-6)


def test_the_published_model_does_not_tell_how_it_was_trained(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"model": base, "data": rows_file(tmp_path, chats(4))}
    settings = []
    for name, how in (("plain", {}), ("saving", {"gradient_checkpointing": True, "checkpoint_every_steps": 1})):
        stage(tuning="full", max_steps=2, how=how).run(inputs, work(name))
        settings.append((work(name).out / "model" / "config.json").read_bytes())
    assert settings[0] == settings[1]
    assert json.loads(settings[0])["use_cache"] is True
