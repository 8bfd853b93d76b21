"""kill -9 at many moments: of the runner, of the worker, of both. What was made must be as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness import Align, start, worker_of

PIPELINE = """\
name: toys
stages:
  a: {type: toy, steps: 8, sleep: 0.03, save_every: 2}
  b: {type: toy, steps: 8, sleep: 0.03, save_every: 2, model: stage:a}
"""


def digests(folder: Path) -> dict[str, tuple]:
    stages = json.loads((folder / "runs" / "toys" / "manifest.json").read_text())["stages"]
    return {name: (entry["digest"], entry["artifact"], entry["metrics"]) for name, entry in stages.items()}


def executed(folder: Path) -> int:
    log = folder / "runs" / "executed.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def await_moment(process: subprocess.Popen[str], folder: Path, publishing: bool) -> None:
    """Wait for some more steps, or for the file that is written last; then a little longer."""
    steps = executed(folder) + random.randint(1, 3)
    while process.poll() is None:
        out_files = list((folder / "runs" / "work").glob("*/out/model/large.bin"))
        if (publishing and out_files) or (not publishing and executed(folder) >= steps):
            break
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.06 if not publishing else 0.004))


@pytest.mark.parametrize("victim", ["runner", "worker", "both"])
def test_a_kill_at_any_moment_changes_nothing_but_the_time(align: Align, tmp_path: Path, victim: str):
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    for folder in (calm, stormy):
        folder.mkdir()
        (folder / "p.yaml").write_text(PIPELINE)
    assert align("run", "p.yaml", folder=calm).returncode == 0
    random.seed(victim)
    kills = 0
    for number in range(7):
        process = start(stormy, "run", "p.yaml")
        await_moment(process, stormy, publishing=number % 3 == 2)
        worker = worker_of(process.pid)
        targets = {"runner": [process], "worker": [worker], "both": [process, worker]}[victim]
        for target in targets:
            try:
                if target is not None:
                    os.kill(target.pid, signal.SIGKILL)
                    kills += 1
            except ProcessLookupError:
                pass
        process.communicate(timeout=60)
        for path in (stormy / "runs" / "store").glob("*"):
            assert (path / "artifact.json").exists(), "half an artifact"
    last = align("run", "p.yaml", "--no-wait", folder=stormy)
    assert last.returncode == 0, last.stderr
    assert digests(stormy) == digests(calm)
    assert list((stormy / "runs" / "work").iterdir()) == []
    assert kills >= 2 and 16 <= executed(stormy) <= 16 + 2 * kills, "a kill costs at most one save interval"


def test_no_worker_outlives_its_runner(tmp_path: Path):
    (tmp_path / "p.yaml").write_text("name: toys\nstages:\n  a: {type: toy, sleep: 5}\n")
    process = start(tmp_path, "run", "p.yaml")
    worker = None
    while worker is None:
        time.sleep(0.02)
        worker = worker_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    worker.wait(timeout=2)
