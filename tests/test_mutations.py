"""The tests themselves: they notice every mistake of a list (tests/mutations.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutations.py")


def test_every_mutation_fits_the_source() -> None:
    """Source that moved takes its mutations along."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "mutations fit" in done.stdout


def test_a_mutation_that_is_unknown_is_an_error() -> None:
    """A name that was mistyped must not pass for a mutation that was noticed."""
    done = subprocess.run([sys.executable, str(SCRIPT), "no-such"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no mutation is named no-such" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_no_mutation_survives() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=2300)
    wrong = [line for line in done.stdout.splitlines() if " killed by " not in line]
    assert done.returncode == 0, "\n".join(wrong) + done.stderr[-2000:]
