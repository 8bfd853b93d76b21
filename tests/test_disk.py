"""A full disk and a read-only store: one clear line, and nothing finished is lost."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import start

PIPELINE = "name: toys\nstages:\n  a: {type: toy}\n  b: {type: toy, model: stage:a}\n"


def mount(*arguments: str) -> None:
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting is refused here: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def align(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(tmp_path: Path, small_disk: Path):
    (tmp_path / "p.yaml").write_text(PIPELINE)
    store = ("--store", str(small_disk))
    assert align(tmp_path, "run", "p.yaml", "a", *store)[0] == 0
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    for room in (0, 60_000, 150_000):  # too little for a lock, for the weights, for publishing
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - room)
        code, _, err = align(tmp_path, "run", "p.yaml", *store)
        assert code == 1 and "the disk is full; free some space" in err and "Traceback" not in err, err
    artifact = json.loads((small_disk / "toys" / "a" / "artifact.json").read_text())
    assert (small_disk / "toys" / "a" / "model" / "large.bin").stat().st_size == 200_000
    filler.unlink()
    code, out, err = align(tmp_path, "run", "p.yaml", *store)
    assert code == 0 and f"cached  {artifact['key']}" in out, err
    assert json.loads((small_disk / "toys" / "manifest.json").read_text())["stages"]["b"]["status"] == "done"


def test_a_read_only_store_is_one_clear_line(tmp_path: Path, small_disk: Path):
    (tmp_path / "p.yaml").write_text(PIPELINE)
    store = ("--store", str(small_disk))
    assert align(tmp_path, "run", "p.yaml", "a", *store)[0] == 0
    mount("-o", "remount,ro", str(small_disk))
    code, _, err = align(tmp_path, "run", "p.yaml", *store)
    assert code == 1 and "cannot be written (Read-only file system); make the store writable" in err, err
    assert "Traceback" not in err
    code, out, _ = align(tmp_path, "plan", "p.yaml", *store)
    assert code == 0 and "a  cached" in out and "b  run" in out, "what is there can still be read"
