"""Runs `align` in a folder as a user would, with the toy stages in its table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TOY = Path(__file__).parent
Align = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """The environment of an `align` that knows the toys."""
    return {**os.environ, "PYTHONPATH": str(TOY), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `align` in a folder without waiting for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "align_pipeline.pipeline.cli", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
