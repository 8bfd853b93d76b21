"""What is installed is what is here: the list of packages, the wheel's files, the command."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_the_tree():
    folders = {path.parent for package in ("pipeline", "stages", "data") for path in (ROOT / package).rglob("*.py")}
    names = {f"align_pipeline.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders}
    assert names | {"align_pipeline.configs"} == set(settings()["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module_and_config(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "pipeline", "stages", "data", "configs"], cwd=ROOT, capture_output=True
    )
    wanted = {f"align_pipeline/{name}" for name in tracked.stdout.decode().split()}
    assert wanted and wanted <= held, wanted - held
    assert not {name for name in held if name.startswith(("tests/", "align_pipeline/tests"))}


def test_constraints_pin_what_is_needed():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    for requirement in settings()["project"]["dependencies"]:
        name = requirement.split(">")[0].split("=")[0].split("<")[0].strip().lower()
        assert name in pinned or name.replace("-", "_") in pinned, requirement


def test_git_hides_no_package():
    hidden = subprocess.run(
        ["git", "check-ignore", "pipeline/x.py", "stages/x.py", "data/x.py", "configs/x.yaml", "tests/data/x.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert hidden.stdout == "", hidden.stdout
