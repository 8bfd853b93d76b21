"""The process a stage runs in: `python -m align_pipeline.pipeline.worker DIR`.

Reads DIR/job.json, runs the stage, writes metrics.json or error.json. A process of its own gives the GPU's memory
back when it ends, and the same command runs a failed stage again under a debugger.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import json
import math
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from align_pipeline.pipeline.errors import AlignError, StageFailed
from align_pipeline.pipeline.files import write_json
from align_pipeline.pipeline.stage import Launch, Resolved, Stage, Work
from align_pipeline.pipeline.store import Store, free_bytes

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
"""No library reports home unless the user's environment says so."""


def main(folder: Path) -> int:
    """Run the stage that DIR/job.json describes; return the exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    die_with_parent()
    lock = Store(folder.parent.parent).worker_lock_path(folder.name).open("a+", encoding="utf-8")
    fcntl.flock(lock.fileno(), fcntl.LOCK_SH)  # held until this process ends, however it ends
    stage, inputs, work = read_job(folder)
    work.log(step=0, total=0)
    try:
        metrics = stage.run(inputs, work)
        wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise AlignError(f"{', '.join(wrong)}: the model diverged; lower learning_rate, or look for broken rows")
    except SystemExit as error:
        return fail(folder, AlignError(f"a function of yours ended the process ({error}); let it raise or return"))
    except Exception as error:
        problem = explained(error, folder)
        if problem is None:
            traceback.print_exc()
            problem = StageFailed(f"{type(error).__name__}: {error}")
        return fail(folder, problem)
    work.log(step=0, total=0)
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / "metrics.json", metrics)
    return 0


def read_job(folder: Path) -> tuple[Stage, dict[str, Resolved], Work]:
    """Return what the runner wrote: the stage, its inputs, and its work directory."""
    from align_pipeline.stages import STAGES

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    stage = STAGES[job["stage"]["type"]].model_validate_json(json.dumps(job["stage"]), strict=True)
    inputs = {name: Resolved.model_validate(value) for name, value in job["inputs"].items()}
    names = job.get("names", ())  # an older version wrote none
    return stage, inputs, Work(folder, Launch.model_validate(job["launch"]), *names)


def explained(error: Exception, folder: Path) -> AlignError | None:
    """Return what a user can do about an error; None when it is a defect that keeps its traceback."""
    if isinstance(error, AlignError):
        return error
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return AlignError(
            f"out of memory: {first}; lower how.micro_batch or max_length, or set how.gradient_checkpointing: true, "
            "and run again: the stage continues where it was"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or free_bytes(folder) < 2**16 or "No space left" in str(error):
        return AlignError(
            f"{folder}: the disk is full; free some space and run again: the stage continues where it was"
        )
    return None


def fail(folder: Path, error: AlignError) -> int:
    """Leave the error for the runner; the first rank that fails speaks for all."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    try:
        with (folder / "error.json").open("x", encoding="utf-8") as file:
            problems = list(getattr(error, "problems", ()))
            json.dump({"error": type(error).__name__, "message": str(error), "problems": problems}, file)
    except OSError:
        pass  # another rank was first, or the disk is full: the exit code says enough
    return error.exit_code


def die_with_parent() -> None:
    """End this process as soon as its parent does, so that no worker outlives its run and holds the GPU.

    On Linux the kernel does it; everywhere, standard input is a pipe whose other end only the runner holds.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    runner = os.environ.get("ALIGN_RUNNER_PID")
    if runner and "RANK" not in os.environ and os.getppid() != int(runner):
        os._exit(1)  # it died before this line

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    if runner:
        threading.Thread(target=watch, daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process without taking its libraries apart, which costs more than a second once torch is in it.

    It could also fail: Gloo's threads may outlive what they stand on and abort the process (`terminate called without
    an active exception`), and a rank that aborts after its work is done takes the whole run with it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
