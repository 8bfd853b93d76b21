"""The imports point one way, each heavy library has one door, and nothing heavy is imported at start."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "data")
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "vllm", "accelerate", "pyarrow", "numpy", "bitsandbytes"}
DOORS = {
    "trl": {"training", "sft", "pretrain", "reward", "dpo", "kto"},
    "peft": {"models"},
    "vllm": {"engine"},
    "bitsandbytes": {"models"},
}
"""Library -> the files of stages/ that may import it."""

LAZY = {"actors", "dealing", "logprobs", "ppo_loop", "ppo_math", "sharding"}
"""Files of stages/ that are imported inside `run` only, and so may import torch and transformers at their top."""

PIPELINE = {
    "errors": set(),
    "files": set(),
    "rules": set(),
    "stage": {"rules"},
    "trainer_fields": {"errors"},
    "inputs": {"errors", "files", "stage"},
    "yaml_file": {"errors", "inputs"},
    "graph": {"stage"},
    "gates": {"errors", "rules", "stage"},
    "config": {"errors", "gates", "graph", "inputs", "stage", "trainer_fields", "yaml_file"},
    "store": {"errors", "files", "inputs", "stage"},
    "manifest": {"errors", "files", "rules", "store"},
    "plan": {"config", "errors", "gates", "graph", "inputs", "manifest", "rules", "stage", "store"},
    "schema": {"config", "stage"},
    "progress": {"files", "store"},
    "costs": {"errors", "manifest", "progress", "store"},
    "runner": {"errors", "files", "graph", "manifest", "plan", "progress", "rules", "stage", "store"},
    "report_charts": {"files"},
    "report_facts": {"errors", "files", "graph", "manifest", "plan", "progress", "store"},
    "report_words": {"report_facts"},
    "report_page": {"files", "plan", "progress", "report_charts", "report_facts", "report_words", "store"},
    "report_cli": {"config", "errors", "files", "manifest", "plan", "report_facts", "report_page", "store"},
    "worker": {"errors", "files", "stage", "store"},
    "named": {"config", "errors", "inputs", "manifest", "plan", "stage", "store"},
    "card": {"stage", "store"},
    "export": {"card", "errors", "files", "inputs", "manifest", "named", "stage", "store", "worker"},
    "verify": {"errors", "files", "manifest", "named", "store"},
    "gc": {"config", "errors", "files", "manifest", "plan", "store"},
    "init": {"config", "errors", "files", "inputs", "schema", "stage", "store"},
    "imported": {"errors", "stage", "yaml_file"},
    "imported_training": {"errors", "imported", "trainer_fields"},
    "from_llamafactory": {"errors", "imported", "imported_training", "stage"},
    "from_axolotl": {"imported", "imported_training"},
    "from_trl": {"imported", "imported_training", "trainer_fields"},
    "import_cli": {"config", "errors", "files", "from_axolotl", "from_llamafactory", "from_trl", "imported", "store"},
    "doctor": {"errors"},
    "report_bug": {
        "config",
        "doctor",
        "errors",
        "files",
        "manifest",
        "named",
        "progress",
        "stage",
        "store",
        "worker",
    },
    "estimate": {"stage"},
    "forecast": {"doctor", "errors", "estimate", "inputs", "manifest", "plan", "progress", "stage", "store"},
    "forget": {"errors", "files", "inputs", "manifest", "store"},
    "data_cli": {"errors", "inputs", "stage", "store"},
    "feedback_cli": {"config", "errors", "files", "store", "yaml_file"},
    "compare_cli": {
        "config",
        "costs",
        "errors",
        "inputs",
        "manifest",
        "plan",
        "progress",
        "runner",
        "stage",
        "store",
        "yaml_file",
    },
    "cli": {
        "compare_cli",
        "config",
        "costs",
        "data_cli",
        "doctor",
        "errors",
        "export",
        "feedback_cli",
        "files",
        "forecast",
        "forget",
        "gc",
        "import_cli",
        "init",
        "manifest",
        "named",
        "plan",
        "progress",
        "report_bug",
        "report_cli",
        "runner",
        "schema",
        "store",
        "verify",
    },
}
"""File of pipeline/ -> the others that it may import: each line names only lines above it."""

OUTWARD = {
    "compare_cli",
    "config",
    "data_cli",
    "estimate",
    "export",
    "feedback_cli",
    "forget",
    "imported",
    "schema",
    "worker",
}
"""Files of pipeline/ that may import stages and rows."""


def files(package: str) -> list[Path]:
    found = sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)
    assert found, f"no files in {package}/"
    return found


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports; with `top_level_only`, those that run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(tree.body) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """Return what a file imports of this project, as `pipeline.stage`."""
    names = {name.removeprefix("align_pipeline.") for name in imports(path) if name.startswith("align_pipeline.")}
    return {".".join(name.split(".")[:2]) for name in names}


def test_the_table_of_the_pipeline_names_its_files_and_points_one_way():
    assert set(PIPELINE) == {path.stem for path in files("pipeline")} - {"__init__"}
    seen: set[str] = set()
    for name, allowed in PIPELINE.items():
        assert allowed <= seen, f"{name} may import {allowed - seen}, which come after it"
        seen.add(name)


@pytest.mark.parametrize("name", PIPELINE)
def test_the_pipeline_imports_only_what_its_table_says(name: str):
    found = ours(ROOT / "pipeline" / f"{name}.py")
    inside = {one.split(".")[1] for one in found if one.startswith("pipeline.")}
    assert inside <= PIPELINE[name]
    outside = {one for one in found if not one.startswith("pipeline.")}
    assert not outside or name in OUTWARD, f"{name} imports {outside}"


def test_stages_import_the_interface_and_the_rows_and_no_more_of_the_machine():
    for path in files("stages"):
        for name in ours(path):
            package, _, module = name.partition(".")
            assert package in PACKAGES
            assert package != "pipeline" or module in {"stage", "rules", "errors", "files"}, (
                f"{path.name} imports {name}"
            )


def test_rows_know_neither_stages_nor_the_machine():
    for path in files("data"):
        for name in ours(path):
            assert name.startswith("data") or name == "pipeline.errors", f"{path.name} imports {name}"


def test_each_heavy_library_has_its_doors():
    for path in files("stages"):
        for name in imports(path):
            library = name.split(".")[0]
            assert library not in DOORS or path.stem in DOORS[library], f"{path.name} imports {library}"


def test_nothing_heavy_is_imported_at_start():
    for package in PACKAGES:
        for path in files(package):
            if path.stem in LAZY:
                continue
            at_top = set(imports(path, top_level_only=True))
            assert not {name.split(".")[0] for name in at_top} & HEAVY, f"{path} imports {at_top} at its top level"
            assert not {name.split(".")[2] for name in at_top if name.startswith("align_pipeline.stages.")} & LAZY, path


def test_the_machine_never_imports_torch():
    for path in files("pipeline"):
        assert not {name.split(".")[0] for name in imports(path)} & (HEAVY - {"accelerate"}), path


def test_files_end_where_a_reader_gives_up():
    """Sizes are aims, not limits; this one only stops a file from growing without anybody noticing."""
    for package in PACKAGES:
        for path in files(package):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 750, path
