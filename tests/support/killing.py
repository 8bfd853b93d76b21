"""Kills a run at a moment that is chosen by what it has done, not by the clock."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import start, worker_of

Moment = Literal["step", "saving", "publishing"]


@dataclass(frozen=True)
class Kill:
    """What a killed run left: the work directory it was in, its last step, and the checkpoint it can go on from."""

    work: str
    first_step: int
    last_step: int
    checkpoint: int


def run_and_kill(
    folder: Path,
    file: str,
    moment: Moment | Callable[[], bool],
    *,
    at_step: int = 1,
    victim: str = "both",
    chance: random.Random | None = None,
    within: float | None = None,
) -> Kill | None:
    """Start `align run FILE`, wait for the moment, kill -9; return what was left, None when it ended before that.

    `step`: some stage has taken `at_step` more steps. `saving`: a checkpoint is being written. `publishing`: the
    stage's weights lie in its `out`. A function: it returns True. The kill follows at a random time of the next
    `within` seconds.
    """
    chance = chance or random.Random(0)
    process = start(folder, "run", file, toys=False)
    root = folder / "runs" / "work"
    before = {path: len(_lines(path)) for path in root.glob("*/progress.jsonl")}
    while process.poll() is None:
        if callable(moment):
            reached = moment()
        elif moment == "step":
            logs = matching(root, "*/progress.jsonl")
            reached = any(len(_steps(path, before.get(path, 0))) >= at_step for path in logs)
        elif moment == "saving":
            reached = bool(matching(root, "*/scratch/saving/checkpoint-*/*"))
        else:
            reached = bool(matching(root, "*/out/*/*.safetensors"))
        if reached:
            break
        time.sleep(0.001)
    within = within if within is not None else 0.1 if moment == "step" else 0.02
    time.sleep(chance.uniform(0, within))
    worker = worker_of(process.pid)
    for target in {"runner": [process], "worker": [worker], "both": [process, worker]}[victim]:
        try:
            if target is not None:
                os.kill(target.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate(timeout=120)
    while worker is not None and worker.is_running() and worker.status() != "zombie":
        time.sleep(0.01)
    works = [path.parent for path in root.glob("*/progress.jsonl") if _steps(path, before.get(path, 0))]
    if not works:
        return None
    (work,) = works
    steps = _steps(work / "progress.jsonl", before.get(work / "progress.jsonl", 0))
    checkpoints = [
        int(path.name.split("-")[1]) for path in work.glob("scratch/checkpoint-*/files.json") for path in [path.parent]
    ]
    return Kill(work.name, steps[0], steps[-1], max(checkpoints, default=0))


def matching(root: Path, pattern: str) -> list[Path]:
    """Return what matches a pattern, in a folder that another process renames and removes things in."""
    try:
        return list(root.glob(pattern))
    except FileNotFoundError:
        return []


def _lines(path: Path) -> list[str]:
    """Return the lines of a log; none where its stage has ended and its folder is gone."""
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def _steps(path: Path, skip: int) -> list[int]:
    """Return the optimizer steps logged after the first `skip` lines."""
    steps = []
    for text in _lines(path)[skip:]:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # half a line
        if line["total"] and "loss" in line:
            steps.append(line["step"])
    return steps
