"""Runs `align` in a folder as a user would; with `toys`, the toy stages are in its table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

TOYS = Path(__file__).parent / "toys"
Align = Callable[..., "subprocess.CompletedProcess[str]"]


def start(folder: Path, *arguments: str, toys: bool = True) -> subprocess.Popen[str]:
    """Start `align` in a folder without waiting for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if toys:
        environment["PYTHONPATH"] = os.pathsep.join([str(TOYS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "align_pipeline.pipeline.cli", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def align(folder: Path, *arguments: str, toys: bool = False, timeout: float = 1800) -> str:
    """Run `align` to its end, which must be a good one, and return what it printed."""
    process = start(folder, *arguments, toys=toys)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    return out


def worker_of(pid: int) -> psutil.Process | None:
    """Return the worker that an `align` has running right now."""
    try:
        children = psutil.Process(pid).children()
        return next((child for child in children if "align_pipeline.pipeline.worker" in child.cmdline()), None)
    except psutil.NoSuchProcess:
        return None
