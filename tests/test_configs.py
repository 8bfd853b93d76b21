"""Every pipeline that people copy loads, says its command, and matches the schema in the repository."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.schema import schema
from align_pipeline.pipeline.yaml_file import read

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
assert CONFIGS, "no configs found"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_loads_and_is_headed_by_its_command(file: Path, tmp_path: Path):
    text = file.read_text(encoding="utf-8")
    copy = Path(shutil.copy(file, tmp_path))
    for name in re.findall(r"file:(\S+)", text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    pipeline = load(copy)
    assert pipeline.name == file.stem, "its name is the file's"
    head = text[: text.index("\nname:")]
    assert f"align run configs/{file.name}" in head or "make demo" in head
    assert "Machine:" in head
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert "{" not in re.sub(r"#.*", "", text), "block style, so that people can add to it"


def test_configs_of_people_are_short():
    """The promise is a file of at most 25 lines; ours are longer only by what they explain."""
    for file in CONFIGS:
        if file.stem != "quickstart":
            lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
            assert len(lines) <= 40, file


def test_the_schema_is_current():
    written = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    assert written == schema(), "run `make schema`"


def test_the_schema_accepts_the_configs():
    for file in CONFIGS:
        value, _ = read(file, [])  # as editors read YAML: by its version 1.2
        jsonschema.validate(value, schema())
    wrong, _ = read(CONFIGS[0], [])
    wrong["stages"]["sft"]["learning_rat"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema())
