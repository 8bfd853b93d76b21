"""`docs/commands.md` tells the truth: its commands run, one after another in one folder, and print what it shows.

What differs between two machines is left out of the comparison: numbers, digests and times.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from align_pipeline.pipeline.init import TEMPLATES
from tiny import write_tiny_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def shown() -> list[tuple[str, str]]:
    """Return the page's commands, and what it says they print."""
    blocks = re.findall(r"^```console\n\$ align (.*?)\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert blocks, "no commands found"
    return blocks


def prepare(folder: Path) -> None:
    """Write the small model that the page starts from."""
    texts = [text for _, text in TEMPLATES.values()]
    write_tiny_model(folder / "base", texts, vocab_size=400, positions=1024)


def printed(folder: Path, command: str) -> str:
    align = Path(sys.executable).with_name("align")
    done = subprocess.run(
        [align, *re.findall(r"[^\s']+", command)], cwd=folder, capture_output=True, text=True, timeout=600
    )
    return done.stdout + "".join(line for line in done.stderr.splitlines(keepends=True) if "it/s" not in line)


def likened(text: str) -> list[str]:
    """Return the lines of an output without what differs between machines."""
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "DIGEST", text)
    text = re.sub(r"\d+ min \d+ s|\d[\d.]* s\b", "TIME", text)
    text = re.sub(r"-?\d[\d,.]*(e[-+]?\d+)?", "N", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def assert_alike(found: str, page: str) -> None:
    """Compare line by line; `...` on the page stands for lines that are left out."""
    lines, rest = likened(found), likened(page)
    while "..." in rest:
        at = rest.index("...")
        assert lines[:at] == rest[:at]
        lines, rest = lines[at:], rest[at + 1 :]
        ends = rest[: rest.index("...")] if "..." in rest else rest
        start = next(i for i in range(len(lines) + 1) if lines[i : i + len(ends)] == ends)
        lines = lines[start:]
    assert lines == rest


def test_every_command_prints_what_the_page_shows(tmp_path: Path):
    prepare(tmp_path)
    commands = {command.split()[0] for command, _ in shown()}
    assert commands >= {"init", "plan", "run", "show", "verify", "gc", "export", "compare", "report", "doctor"}
    for command, page in shown():
        found = printed(tmp_path, command)
        if command == "doctor":  # what is found differs, what is looked for does not
            found, page = (re.sub(r"(?m)^\w+ +(.*?)  .*$", r"\1", text) for text in (found, page))
        assert_alike(found, page)
