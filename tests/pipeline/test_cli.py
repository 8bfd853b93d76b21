"""The command line: quick, without torch, and documented as it is."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def cpu_seconds(*command: str) -> float:
    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = children()
    subprocess.run(command, check=True, capture_output=True)
    return children() - before


def test_help_answers_at_once():
    """Measured in CPU seconds: other jobs share the cores of a test machine."""
    help_ = min(cpu_seconds(sys.executable, "-m", "align_pipeline.pipeline.cli", "--help") for _ in range(3))
    imports = min(cpu_seconds(sys.executable, "-c", "import typer, pydantic, yaml") for _ in range(3))
    assert help_ < 0.6 and help_ < 2 * imports, (help_, imports)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['align', '--help']\nfrom align_pipeline.pipeline.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint(sorted(sys.modules))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "trl", "datasets", "numpy", "align_pipeline.stages.sft"):
        assert f"'{heavy}'" not in out


def test_the_installed_command_and_its_usage_errors():
    align = Path(sys.executable).with_name("align")
    assert subprocess.run([align, "--help"], capture_output=True, text=True).stdout.startswith("Usage: align")
    wrong = subprocess.run([align, "rnu"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "No such command 'rnu'" in wrong.stderr


def test_schema_prints_what_the_repository_holds():
    out = subprocess.run(
        [sys.executable, "-m", "align_pipeline.pipeline.cli", "schema"], capture_output=True, text=True, check=True
    ).stdout
    assert out == (ROOT / "configs" / "schema.json").read_text(encoding="utf-8"), "run `make schema`"


def test_output_that_is_cut_off_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m align_pipeline.pipeline.cli schema | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout == "{\n" and result.stderr == ""
