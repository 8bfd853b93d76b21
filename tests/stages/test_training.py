"""What the training stages share: batches, checkpoints that can be trusted, resuming, early stopping."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.pipeline.stage import Launch, Resolved, Work
from align_pipeline.stages import checkpoints, owned, reading, training
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.kto import KTO
from align_pipeline.stages.reward import Reward
from align_pipeline.stages.sft import SFT
from tiny import adapter

from .conftest import assert_same_tensors, chats, rows_file

Make = Callable[..., Work]


def stage(**changes: Any) -> SFT:
    values: dict[str, Any] = {"data": "file:rows.jsonl", "model": "file:base", "learning_rate": 5e-3, "batch_size": 4}
    return SFT(**{**values, "epochs": 4, "held_out": 0.25, **adapter({"r": 4}, changes), **changes})


def dies_at(step: int) -> Callable[..., None]:
    """Return a check that kills the run when that step is logged, after the step and before its checkpoint."""

    def check(stage: Any, at: int, *_: Any) -> None:
        if at == step:
            raise KeyboardInterrupt

    return check


def run_killed_at(sft: SFT, inputs: dict[str, Resolved], work: Work, *steps: int) -> dict[str, float]:
    """Run, die at each of the steps, and run on to the end."""
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_check_loss", dies_at(step))
            with pytest.raises(KeyboardInterrupt):
                sft.run(inputs, work)
    return sft.run(inputs, work)


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SFT, Reward, DPO, KTO])
def test_owned_fields_are_the_trainers_and_every_how_field_is_one(kind: type[training.Training]) -> None:
    """A name that TRL renamed would be let through in silence."""
    assert kind.trainer_config is not None
    module, name = kind.trainer_config
    known = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
    own = set(kind.owned) - set(owned.OWNED)
    assert own <= known
    optional = {"chat_template_path", "eos_token", "pad_token", "truncation_mode", "model_init_kwargs"}
    assert set(owned.OWNED) - optional <= known
    optional = {"precompute_ref_log_probs", "precompute_ref_batch_size"}
    assert set(owned.HOW_ONLY) - optional <= known
    assert not set(owned.HOW_ONLY) & set(kind.owned)
    for mine in kind.owned.values():
        for field in mine.replace(" and ", " ").split():
            assert field == "launch" or field.split(".")[0] in kind.model_fields


@pytest.mark.parametrize(
    ("batch_size", "how", "processes", "expected"),
    [(32, None, 1, 8), (32, None, 8, 4), (6, None, 1, 6), (14, None, 1, 7), (11, None, 1, 1), (12, 3, 2, 3)],
)
def test_micro_batches_divide_the_batch(batch_size: int, how: int | None, processes: int, expected: int) -> None:
    assert training.micro_batch(stage(batch_size=batch_size, how={"micro_batch": how}), processes) == expected


def test_a_batch_that_cannot_be_dealt_out_is_refused(base: Resolved, work: Make, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"batch_size 6 must be a multiple of how\.micro_batch 4"):
        stage(batch_size=6, how={"micro_batch": 4})
    made = work()
    made.launch = Launch(processes=3)
    with pytest.raises(AlignError, match="4 rows cannot be dealt to 3 processes evenly"):
        stage().run({"model": base, "data": rows_file(tmp_path, chats())}, made)


@pytest.mark.parametrize(
    ("maker", "reader", "message"),
    [
        ({"lora": {"r": 8}}, {"lora": {"r": 4}}, "lora.r: sft trains an adapter with 8, this stage asks for 4"),
        ({"lora": {"r": 4, "alpha": 8}}, {}, "lora.alpha"),
        ({}, {"tuning": "full"}, "put a `merge` stage between them"),
        ({"tuning": "full"}, {"tuning": "full"}, None),
        ({"tuning": "full"}, {"lora": {"r": 4}}, None),
        ({}, {}, None),
    ],
)
def test_chains_that_cannot_work_are_known_before_training(
    maker: dict[str, Any], reader: dict[str, Any], message: str | None
) -> None:
    found = DPO(**{"data": "file:d", "policy": "stage:sft", **adapter({"r": 4}, reader), **reader}).misfit(
        "policy", stage(**maker)
    )
    assert found is None if message is None else message in str(found)
    assert DPO(data="file:d", policy="stage:sft", **reader).misfit("data", stage(**maker)) is None


def test_a_run_of_one_step_learns(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Warmup rounded up to one step would give the only step a learning rate of 0."""
    sft = stage(max_steps=1, warmup=0.03)
    sft.run({"model": base, "data": rows_file(tmp_path, chats())}, work("one"))
    (point,) = [json.loads(line) for line in (work("one").out / "curve.jsonl").open() if "grad_norm" in line]
    assert point["learning_rate"] > 0


def test_weights_that_diverged_in_the_last_step_are_not_published(base: Resolved, work: Make, tmp_path: Path) -> None:
    sft = stage(max_steps=1, learning_rate=1e39, held_out=0)
    with pytest.raises(AlignError, match="is not finite after the last step; lower learning_rate"):
        sft.run({"model": base, "data": rows_file(tmp_path, chats())}, work("high"))


def test_rows_end_where_the_models_context_does(base: Resolved, tmp_path: Path, work: Make) -> None:
    rows = [{"prompt_ids": [5] * 10, "completion_ids": [6] * 300}]
    inputs = {"model": base, "data": rows_file(tmp_path, rows)}
    found = training.prepare(stage(held_out=0), inputs, training.load_tokenizer(inputs, "model"), work("rows"))
    assert (len(found.train[0]["input_ids"]), found.truncated) == (256, 1)


def test_early_stopping_needs_held_out_rows() -> None:
    with pytest.raises(ValidationError, match="early_stopping needs held-out rows"):
        stage(held_out=0, early_stopping={})


def test_passed_through_fields_reach_the_trainer(base: Resolved, work: Make, tmp_path: Path) -> None:
    sft = stage(train={"adam_beta2": 0.5}, how={"train": {"run_name": "x"}})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    args = _trainer(sft, inputs, work()).args
    assert (args.adam_beta2, args.run_name, args.gradient_accumulation_steps) == (0.5, "x", 1)
    assert (args.use_cpu, args.bf16, args.gradient_checkpointing) == (True, False, False)


def _trainer(sft: SFT, inputs: dict[str, Resolved], work: Work) -> Any:
    from align_pipeline.stages.models import load_trainable

    tokenizer = training.load_tokenizer(inputs, "model")
    rows = training.prepare(sft, inputs, tokenizer, work, sft.loss_on)
    model = load_trainable(inputs["model"], tuning=sft.tuning, lora=sft.lora, seed=sft.seed)
    return sft.trainer(model, tokenizer, rows, work)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_own_evaluation_rows_replace_the_split(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {
        "model": base,
        "data": rows_file(tmp_path, chats()),
        "evaluation": rows_file(tmp_path, chats(3), "e.jsonl"),
    }
    rows = training.prepare(
        stage(evaluation="file:e.jsonl"), inputs, training.load_tokenizer(inputs, "model"), work("rows")
    )
    assert (len(rows.train), len(rows.held_out)) == (12, 3)


def test_columns_are_renamed_and_stage_output_is_found(work: Make, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    rows_file(folder, [{"question": "a", "answer": "b"}])
    made = Resolved(ref="stage:sample", digest="sha256:0", path=str(folder), kind="dataset")
    columns = {"prompt": "question", "completion": "answer"}
    (row,) = reading.read_rows({"data": made}, "data", "sft", work(), columns=columns)
    assert (row.prompt, row.completion) == ("a", "b")


def test_bad_rows_are_named(base: Resolved, work: Make, tmp_path: Path) -> None:
    data = rows_file(tmp_path, [*chats(2), {"messages": []}])
    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        stage().run({"model": base, "data": data}, work())


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4, "dropout": 0.2}},
        {"tuning": "full", "dropout": 0.2, "learning_rate": 1e-3},
        {"batch_size": 4, "how": {"checkpoint_every_steps": 2, "micro_batch": 2}, "lora": {"r": 4, "dropout": 0.2}},
        {"evaluate_every": 2},
    ],
    ids=["lora", "full", "accumulation", "evaluation"],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    base: Resolved, work: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    sft = stage(**{"how": {"checkpoint_every_steps": 2}, "held_out": 0.25, **changes})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    whole = sft.run(inputs, work("whole"))
    assert run_killed_at(sft, inputs, work("killed"), 4, 7) == whole
    assert_same_tensors(work("whole").out, work("killed").out)
    curves = [(work(name).out / "curve.jsonl").read_text() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert "runtime" not in curves[0] and "per_second" not in curves[0]


def test_only_the_steps_since_the_checkpoint_are_redone(base: Resolved, work: Make, tmp_path: Path) -> None:
    sft = stage(how={"checkpoint_every_steps": 3, "logging_steps": 1})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    run_killed_at(sft, inputs, work(), 6)
    logged = [json.loads(line) for line in (work().folder / "progress.jsonl").read_text().splitlines()]
    logged = [line for line in logged if line["total"]]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, *range(4, logged[-1]["total"] + 1)]
    tokens = {line["step"]: line["tokens"] for line in logged}
    assert sorted(tokens.values()) == [tokens[step] for step in sorted(tokens)], "the token count went back"


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(
    base: Resolved, work: Make, tmp_path: Path
) -> None:
    """Training stops inside an epoch, where Transformers would go on from the checkpoint."""
    sft = stage(max_steps=3, how={"checkpoint_every_steps": 3})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    first = sft.run(inputs, work("once"))
    again = sft.run(inputs, work("once"))
    assert again == first
    assert first["steps"] == 3.0


def test_a_checkpoint_is_due_by_time(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    stage(max_steps=3, how={"checkpoint_every": 0.0}).run(inputs, work("always"))
    assert checkpoints.newest_checkpoint(work("always").scratch) == work("always").scratch / "checkpoint-3"
    stage(max_steps=3).run(inputs, work("never"))
    assert checkpoints.newest_checkpoint(work("never").scratch) is None


def test_curve_does_not_depend_on_what_is_shown(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    curves = []
    for name, logging_steps in (("often", 1), ("seldom", 100)):
        stage(max_steps=5, how={"logging_steps": logging_steps}).run(inputs, work(name))
        curves.append((work(name).out / "curve.jsonl").read_bytes())
    assert curves[0] == curves[1]


RANKS = """
import sys
from pathlib import Path
import torch
from align_pipeline.pipeline.stage import Launch, Resolved, Work
from align_pipeline.pipeline.worker import leave
from align_pipeline.stages import checkpoints, training
from align_pipeline.stages.sft import SFT
torch.set_num_threads(1)
folder, dies_at = Path(sys.argv[1]), int(sys.argv[2])
def dying(stage, step, *rest):
    if step == dies_at:
        raise KeyboardInterrupt
training._check_loss = dying
work = Work(folder, Launch(processes=2))
source = lambda path: Resolved(ref=path, digest="sha256:0", path=path)
how = {"checkpoint_every_steps": 2}
sft = SFT(data="file:d", model="file:m", learning_rate=5e-3, batch_size=4, epochs=4, held_out=0, lora={"r": 4}, how=how)
sft.run({"model": source(sys.argv[3]), "data": source(sys.argv[4])}, work)
leave(0)
"""


@pytest.mark.slow
def test_two_processes_resume_together(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Each rank holds its own random state in the checkpoint, and rank 0 publishes for both."""
    data = rows_file(tmp_path, chats())
    (tmp_path / "ranks.py").write_text(RANKS)

    def run(name: str, dies_at: int) -> int:
        torchrun = str(Path(sys.executable).parent / "torchrun")
        command = [
            torchrun,
            "--standalone",
            "--nproc_per_node",
            "2",
            str(tmp_path / "ranks.py"),
            str(work(name).folder),
            str(dies_at),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(base.path), str(data.path)], env=environment, capture_output=True, text=True, timeout=180
        )
        print(name, done.stdout, done.stderr)  # shown when the test fails
        return done.returncode

    assert run("whole", -1) == 0
    assert run("killed", 5) != 0
    assert [path.name for path in work("killed").scratch.glob("checkpoint-*")] == ["checkpoint-4"]
    assert run("killed", -1) == 0
    assert_same_tensors(work("whole").out, work("killed").out)
    curves = [(work(name).out / "curve.jsonl").read_bytes() for name in ("whole", "killed")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("changes", "processes", "goes_on"),
    [({}, 1, True), ({"dropout": 0.1}, 2, True), ({"dropout": 0.1}, 1, False), ({"lora": {"dropout": 0.1}}, 3, False)],
)
def test_dropout_goes_on_with_the_same_number_of_processes_alone(
    changes: dict[str, Any], processes: int, goes_on: bool, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    for rank in range(2):
        (tmp_path / "checkpoint-9" / f"rng_state_{rank}.pth").touch()
    problem = stage(**changes).resume_problem(tmp_path, Launch(processes=processes))
    says = (
        "checkpoint-9 was made by 2, and each draws its own dropout or noise; set launch.processes: 2 to go on, or "
        "start anew with --force"
    )
    assert problem == (None if goes_on else says)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _saved(scratch: Path, step: int) -> Path:
    folder = scratch / "saving" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 100 + bytes([step]))
    (folder / "optimizer").write_bytes(b"o" * 50)
    return folder


def test_checkpoints_rotate_and_keep_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        checkpoints.publish_checkpoint(_saved(tmp_path, step), tmp_path, keep=4)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed", "no listing", "empty listing"])
def test_a_broken_checkpoint_is_passed_over_and_deleted(tmp_path: Path, damage: str) -> None:
    checkpoints.publish_checkpoint(_saved(tmp_path, 2), tmp_path)
    broken = checkpoints.publish_checkpoint(_saved(tmp_path, 4), tmp_path, keep=2)
    if damage == "missing":
        (broken / "optimizer").unlink()
    elif damage == "shorter":
        (broken / "weights").write_bytes(b"w" * 100)
    elif damage == "changed":
        (broken / "weights").write_bytes(b"w" * 100 + bytes([9]))
    elif damage == "no listing":
        (broken / checkpoints.LISTING).unlink()
    else:
        (broken / checkpoints.LISTING).write_text("{}")
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not broken.exists()


def test_a_run_goes_on_from_the_last_whole_checkpoint(base: Resolved, work: Make, tmp_path: Path) -> None:
    """The optimizer's file is lost: Transformers would go on without it, to other weights."""
    sft = stage(how={"checkpoint_every_steps": 2})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    whole = sft.run(inputs, work("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_check_loss", dies_at(5))
        with pytest.raises(KeyboardInterrupt):
            sft.run(inputs, work("broken"))
    (work("broken").scratch / "checkpoint-4" / "optimizer.pt").unlink()
    (work("broken").scratch / "saving" / "checkpoint-9").mkdir(parents=True)
    assert sft.run(inputs, work("broken")) == whole
    assert_same_tensors(work("whole").out, work("broken").out)


def test_a_full_disk_is_one_clear_line_and_loses_nothing(base: Resolved, work: Make, tmp_path: Path) -> None:
    sft = stage(how={"checkpoint_every_steps": 2})
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    whole = sft.run(inputs, work("whole"))
    flush = checkpoints.flush

    def full(path: Path) -> None:
        if "checkpoint-4" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file")
        flush(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "flush", full)
        with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
            sft.run(inputs, work("full"))
        patch.setattr(training.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 4096))
        with pytest.raises(AlignError, match="no room on this disk for a checkpoint; make room and run again"):
            sft.run(inputs, work("full"))
    assert checkpoints.newest_checkpoint(work("full").scratch) == work("full").scratch / "checkpoint-2"
    assert sft.run(inputs, work("full")) == whole
    assert_same_tensors(work("whole").out, work("full").out)


# --- losses that go wrong, and stopping -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_at_once(base: Resolved, work: Make, tmp_path: Path) -> None:
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    sft = stage(tuning="full", learning_rate=1e30, max_grad_norm=1e9, warmup=0)
    with pytest.raises(AlignError, match=r"the loss is (nan|inf) at step \d; lower learning_rate"):
        sft.run(inputs, work())


def _history(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (index + 1), "eval_loss": loss} for index, loss in enumerate(losses)]


def test_early_stopping_counts_evaluations_since_the_best() -> None:
    sft = stage(early_stopping={"patience": 2, "min_delta": 0.1})
    assert training.best_step(sft, _history(1.0, 0.95, 0.85, 0.8)) == 30
    assert not training._stopped(sft, _history(1.0, 0.95, 0.85, 0.8))
    assert training._stopped(sft, _history(1.0, 0.95, 0.85, 0.8, 0.9))
    assert training.best_step(stage(), _history(1.0)) is None


def test_early_stopping_keeps_the_best_weights_and_survives_a_kill(base: Resolved, work: Make, tmp_path: Path) -> None:
    """Held-out rows that contradict the training rows get worse once those are learnt."""
    wrong = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red apples and milk"}]} for row in chats()
    ]
    inputs = {
        "model": base,
        "data": rows_file(tmp_path, chats()),
        "evaluation": rows_file(tmp_path, wrong, "wrong.jsonl"),
    }
    sft = stage(
        evaluation="file:wrong.jsonl",
        evaluate_every=1,
        epochs=30,
        learning_rate=2e-2,
        early_stopping={"patience": 4},
        how={"checkpoint_every_steps": 1},
    )
    whole = sft.run(inputs, work("whole"))
    curve = [json.loads(line) for line in (work("whole").out / "curve.jsonl").read_text().splitlines()]
    losses = {point["step"]: point["eval_loss"] for point in curve if "eval_loss" in point}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 4 < 90
    assert whole["loss"] == pytest.approx(losses[best], abs=1e-4)
    assert losses[max(losses)] > losses[best] + 1e-3
    assert run_killed_at(sft, inputs, work("killed"), best + 1, best + 3) == whole
    assert_same_tensors(work("whole").out, work("killed").out)


def test_a_missing_best_checkpoint_cannot_go_unnoticed(tmp_path: Path) -> None:
    checkpoints.publish_checkpoint(_saved(tmp_path, 2), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert checkpoints.newest_checkpoint(tmp_path) is None
