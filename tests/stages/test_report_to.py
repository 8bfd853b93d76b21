"""Loggers get the curves that the artifact keeps, their files outlive the work, a missing one is said beforehand."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import loggers
from align_pipeline.stages.sft import SFT

from .conftest import chats, rows_file


def stage(**how: object) -> SFT:
    return SFT(data="file:rows.jsonl", model="file:b", batch_size=4, max_steps=5, lora={"r": 4}, how=how)


def test_only_known_loggers_are_taken_and_a_missing_one_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValidationError, match="'tensorboard', 'wandb' or 'trackio'"):
        stage(report_to=["tensorbord"])
    installed = {"wandb"}

    def version(name: str) -> str:
        if name not in installed:
            raise loggers.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(loggers.metadata, "version", version)
    (problem,) = stage(report_to=["wandb", "trackio"]).look({})["how.report_to"]
    assert problem == "trackio is not installed; pip install trackio, or take it out of the list"
    assert "how.report_to" not in stage(report_to=["wandb"]).look({})
    assert stage().look({}) == {}


def test_each_logger_writes_below_the_store_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    work = Work(tmp_path / "runs" / "work" / "sft-01", pipeline="bot", stage="first")
    loggers.open_loggers((), work)
    assert not (tmp_path / "mine").exists()
    loggers.open_loggers(("tensorboard", "wandb", "trackio"), work)
    environment = loggers.os.environ
    assert environment["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs" / "tensorboard" / "bot" / "first" / "sft-01")
    assert environment["WANDB_DIR"] == str(tmp_path / "mine") and (tmp_path / "mine").is_dir()
    assert environment["WANDB_PROJECT"] == "bot"
    assert environment["TRACKIO_DIR"] == str(tmp_path / "runs" / "trackio")


def test_a_logger_that_cannot_begin_is_the_users_to_mend() -> None:
    usage_error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    found = loggers.explained(usage_error("No API key configured.\nmore"), ("wandb",))
    assert isinstance(found, AlignError)
    assert str(found).startswith("how.report_to: wandb: No API key configured; run `wandb login`, or set WANDB_MODE=")
    assert loggers.explained(usage_error("x"), ()) is None and loggers.explained(ValueError("x"), ("wandb",)) is None


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_losses_of_the_curve_and_of_the_progress(
    base: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("HF_TOKEN", "hf_planted0123456789")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    made = Work(tmp_path / "work" / "sft-01", pipeline="bot", stage="first")
    made.out.mkdir(parents=True)
    made.scratch.mkdir()
    inputs = {"model": base, "data": rows_file(tmp_path, chats())}
    stage(report_to=["tensorboard"], logging_steps=2).run(inputs, made)

    folder = tmp_path / "events" / "bot" / "first" / "sft-01"
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    curve = [json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()]
    assert losses == pytest.approx({point["step"]: point["loss"] for point in curve if "loss" in point}, rel=1e-6)
    progress = [json.loads(line) for line in (made.folder / "progress.jsonl").read_text().splitlines()]
    shown = {point["step"]: point["loss"] for point in progress if "loss" in point}
    assert list(losses) == [1, 2, 3, 4, 5] and list(shown) == [1, 2, 4, 5]
    assert {step: losses[step] for step in shown} == pytest.approx(shown, rel=1e-6)
    told = events.Tensors("stage/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(told.removeprefix("```json\n").removesuffix("\n```"))["batch_size"] == 4
    assert b"hf_planted" not in b"".join(file.read_bytes() for file in folder.iterdir())
    assert not [file for file in made.out.rglob("*") if "tfevents" in file.name], "nothing of it is in the artifact"
