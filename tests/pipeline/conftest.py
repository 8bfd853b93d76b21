"""Toy stages for the machine's tests, in this process and in every worker."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from align_pipeline.stages import STAGES
from harness import Align, start
from toy_stages import TOYS


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the toys into the table of stages."""
    for name, cls in TOYS.items():
        monkeypatch.setitem(STAGES, name, cls)


@pytest.fixture
def align(tmp_path: Path) -> Align:
    """Run `align` in an empty folder as a user would."""

    def call(*arguments: str, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        process = start(folder, *arguments)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return call
