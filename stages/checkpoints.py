"""Checkpoints that are whole or not there: listed, flushed, renamed, and verified before anything goes on from one.

Transformers takes a checkpoint without its optimizer or its random state in silence and trains on to other weights.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

from align_pipeline.pipeline.files import file_sha256, flush

LISTING = "files.json"


def publish_checkpoint(saved: Path, scratch: Path, keep: int | None = None) -> Path:
    """Make a checkpoint that Trainer wrote the newest one, whole or not at all, and remove those before it.

    Every file is flushed to the disk, the listing of sizes and digests is written last, and one rename makes the
    checkpoint visible. `keep` is the step of one more checkpoint that must stay.
    """
    # TRL's frozen copy of the adapter (`ref`) is rebuilt from the stage's input. Left in the checkpoint it would do
    # harm: Transformers then loads the sub-folders only, and training would go on from the adapter's start.
    for folder in [path for path in saved.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    listing = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(saved.iterdir())
    }
    for path in saved.iterdir():
        flush(path)
    (saved / LISTING).write_text(json.dumps(listing, indent=1) + "\n", "utf-8")
    flush(saved / LISTING)
    flush(saved)
    target = scratch / saved.name
    shutil.rmtree(target, ignore_errors=True)
    saved.rename(target)
    flush(scratch)
    for other in scratch.glob("checkpoint-*"):
        if other != target and _step(other) != keep:
            shutil.rmtree(other)
    return target


def newest_checkpoint(scratch: Path) -> Path | None:
    """Return the newest checkpoint whose files are all there as they were written; broken ones are deleted."""
    for folder in sorted(scratch.glob("checkpoint-*"), key=_step, reverse=True):
        if _is_whole(folder):
            return folder
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    return None


def newest_name(scratch: Path) -> Path | None:
    """Return the checkpoint that is newest by its name, unread: what a plan may ask, which changes nothing."""
    return max(scratch.glob("checkpoint-*"), key=_step, default=None)


@functools.cache
def know_numbered_cpus() -> None:
    """Teach torch.load the place `cpu:0`, as several processes on a CPU call it."""
    import torch

    torch.serialization.register_package(
        5, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def _is_whole(folder: Path) -> bool:
    try:
        listing = json.loads((folder / LISTING).read_text("utf-8"))
        return bool(listing) and all(
            (folder / name).stat().st_size == entry["bytes"] and file_sha256(folder / name) == entry["sha256"]
            for name, entry in listing.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
