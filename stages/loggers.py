"""TensorBoard, W&B and trackio: `how.report_to` says which of them get the curves, and nothing else turns one on.

Transformers' own callbacks write to them. What is ours: that a missing one is said before anything is trained; that
their files lie in the store beside the artifacts, where they outlive the work directory and enter no digest
(`DIR/tensorboard/PIPELINE/STAGE/KEY`, `DIR/wandb`, `DIR/trackio`); that a run is called PIPELINE/STAGE/KEY; and that
the stage's own settings are logged beside Trainer's. A variable of the user's environment wins over where we would
write.
Left out: the other loggers of Transformers, which nobody tried here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Logger, Stage, Work

if TYPE_CHECKING:
    from transformers import TrainerCallback


def missing(loggers: Sequence[Logger]) -> list[str]:
    """Return what is wrong with loggers that are not installed."""
    problems = []
    for name in loggers:
        try:
            metadata.version(name)  # a folder `wandb` in the working directory, as W&B makes one, can be imported too
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed; pip install {name}, or take it out of the list")
    return problems


def run_name(work: Work) -> str:
    """Return PIPELINE/STAGE/KEY."""
    return "/".join((work.pipeline, work.stage, work.folder.name))


def open_loggers(loggers: Sequence[Logger], work: Work) -> None:
    """Say to the loggers where to write; a trainer reads it from the environment when it is made."""
    store = work.folder.parent.parent
    if "tensorboard" in loggers:
        root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", store / "tensorboard")).expanduser()
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(root / run_name(work))
    if "wandb" in loggers:
        os.environ.setdefault("WANDB_PROJECT", work.pipeline)
    for name, variable, folder in (("wandb", "WANDB_DIR", store), ("trackio", "TRACKIO_DIR", store / "trackio")):
        if name in loggers:
            Path(os.environ.setdefault(variable, str(folder))).expanduser().mkdir(parents=True, exist_ok=True)


def settings_logger(stage: Stage) -> TrainerCallback:
    """Return what adds the stage's own settings to what the loggers say of a run."""
    from transformers import TrainerCallback

    settings = stage.model_dump(mode="json", exclude={"how", "require"})

    class Settings(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            if "tensorboard" in stage.how.report_to:
                from torch.utils.tensorboard import SummaryWriter

                with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
                    writer.add_text("stage", f"```json\n{json.dumps(settings, indent=1)}\n```")
            if "wandb" in stage.how.report_to:
                import wandb

                wandb.config.update({"stage": settings})
            if "trackio" in stage.how.report_to:
                import trackio

                trackio.config.update({"stage": settings})

    return Settings()


def explained(error: Exception, loggers: Sequence[Logger]) -> AlignError | None:
    """Return what a user can do about a logger that cannot begin, as W&B without a login; None for other errors."""
    name = type(error).__module__.partition(".")[0]
    if name not in loggers:
        return None
    remedy = "run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "mend that"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return AlignError(f"how.report_to: {name}: {first}; {remedy}, or take it out of the list")
