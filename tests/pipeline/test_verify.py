"""Damage of every kind is named, file by file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.store import Store, damages
from harness import Align

PIPELINE = "name: toys\nstages:\n  a: {type: toy}\n  b: {type: toy, model: stage:a}\n"


@pytest.fixture
def made(align: Align, tmp_path: Path) -> dict[str, Path]:
    """Return the artifacts of a pipeline of two stages."""
    (tmp_path / "p.yaml").write_text(PIPELINE)
    assert align("run", "p.yaml").returncode == 0
    return {name: (tmp_path / "runs" / "toys" / name).resolve() for name in "ab"}


def test_a_sound_store_is_said_to_be_sound(align: Align, made: dict[str, Path]):
    done = align("verify")
    size = sum(path.stat().st_size for path in (made["a"] / "model").iterdir())
    assert done.returncode == 0 and f"{made['a'].name}  ok  2 files, {size:,} bytes" in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_every_damaged_missing_and_extra_file_is_named(align: Align, made: dict[str, Path]):
    a, b = made["a"], made["b"]
    text = (a / "model" / "weights.txt").read_text()
    (a / "model" / "weights.txt").write_text(text.replace("3.0", "4.0"))  # the same size, which a run does not notice
    assert align("plan", "p.yaml").returncode == 0
    (b / "model" / "large.bin").unlink()
    (b / "model" / "weights.txt").write_text("short")
    (b / "model" / "notes.txt").write_text("mine")
    (b / "model" / "nowhere").symlink_to("/nowhere")
    (b / "model" / "empty").mkdir()
    (b / ".cache").write_text("an editor's trace is no part of an artifact")
    done = align("verify")
    lines = done.stdout.splitlines()
    assert done.returncode == 3 and len(lines) == 6
    (of_a,) = [line for line in lines if line.startswith(a.name)]
    assert of_a.startswith(f"{a.name}/model/weights.txt: damaged, its sha256 is ")
    assert f"{b.name}/model/large.bin: missing, it had 200,000 bytes" in lines
    assert any(line.startswith(f"{b.name}/model/weights.txt: damaged, it has 5 bytes instead of ") for line in lines)
    for extra in ("notes.txt", "nowhere", "empty"):
        assert f"{b.name}/model/{extra}: extra, no stage published it" in lines
    assert "2 of 2 artifacts are not as published; restore the files, or delete" in done.stderr
    assert align("verify", "p.yaml:a").stdout.splitlines() == [of_a]
    only = align("verify", b.name)
    assert only.returncode == 3 and len(only.stdout.splitlines()) == 5 and "1 of 1 artifact is not" in only.stderr


def test_a_record_that_was_edited_is_damaged_too(align: Align, made: dict[str, Path]):
    record = json.loads((made["a"] / "artifact.json").read_text())
    del record["files"]["model/large.bin"]
    (made["a"] / "artifact.json").write_text(json.dumps(record))
    (made["b"] / "artifact.json").write_text("{")
    done = align("verify")
    assert done.returncode == 3
    assert f"{made['a'].name}/model/large.bin: extra" in done.stdout
    assert f"{made['a'].name}/artifact.json: damaged, its digest is not that of the files it lists" in done.stdout
    assert f"{made['b'].name}/artifact.json: damaged (JSONDecodeError" in done.stdout
    (made["b"] / "artifact.json").unlink()
    assert f"{made['b'].name}/artifact.json: missing" in align("verify", made["b"].name).stdout


def test_a_record_of_other_types_is_damaged_for_every_command(align: Align, made: dict[str, Path]):
    record = made["a"] / "artifact.json"
    sound = json.loads(record.read_text())
    changes: tuple[tuple[Any, str], ...] = (
        ({"metrics": {"total": "six"}}, 'total: "six", must be a number'),
        ({"model": "large"}, 'model: "large", must be an object or null'),
        ({"files": {"a": 3}}, "files.a: 3, must be an object with sha256 and bytes"),
        ({"inputs": {"model": []}}, "inputs.model: [], must be an object with a digest"),
        ({"resources": None}, "resources: null, must be an object"),
        ([], "[], must be an object"),
    )
    for changed, says in changes:
        record.write_text(json.dumps({**sound, **changed} if changed else changed))
        with pytest.raises(InputError) as error:
            Store(made["a"].parents[1]).get(made["a"].name)
        assert str(error.value) == f"{record}: damaged ({says}): delete {made['a']} and run again"
        assert list(damages(made["a"])) == [f"{made['a'].name}/artifact.json: damaged (ValueError: {says})"]
    for command in (["plan", "p.yaml"], ["export", "p.yaml:a", "-o", "out"], ["gc"], ["verify"]):
        done = align(*command)
        assert done.returncode == 3 and "damaged" in done.stderr + done.stdout, command
        assert "Traceback" not in done.stderr, command
    assert align("report", "p.yaml").returncode == 0, "the page says it"


def test_names_that_are_none(align: Align, made: dict[str, Path], tmp_path: Path):
    wrong = align("verify", "nothing")
    assert wrong.returncode == 3 and "'nothing' names no artifact in" in wrong.stderr
    assert align("verify", "--store", str(tmp_path / "elsewhere")).returncode == 3
    assert align("verify", "p.yaml:zz").returncode == 2


def test_an_artifact_that_is_gone_as_a_whole_is_missing(align: Align, made: dict[str, Path]):
    shutil.rmtree(made["b"])
    done = align("verify")
    assert f"{made['b'].name}: missing, its whole folder; toys/b is it" in done.stdout.splitlines()
    assert done.returncode == 3 and "1 of 2 artifacts is not as published" in done.stderr


def test_nothing_is_made_of_an_artifact_that_was_damaged(align: Align, made: dict[str, Path]):
    weights = made["a"] / "model" / "weights.txt"
    sound = weights.read_text()
    weights.write_text(sound.replace("3.0", "4.0"))
    done = align("run", "p.yaml", "--set", "stages.b.rate=9.0")
    assert done.returncode == 3 and f"{made['a'].name}/model/weights.txt: damaged, its sha256 is " in done.stderr
    weights.write_text(sound)
    assert align("run", "p.yaml", "--set", "stages.b.rate=9.0").returncode == 0


def test_what_was_made_can_be_looked_at_when_the_files_it_was_made_from_are_gone(align: Align, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "p.yaml").write_text("name: toys\nstages:\n  a: {type: toy, data: file:rows.jsonl}\n")
    assert align("run", "p.yaml").returncode == 0
    (tmp_path / "rows.jsonl").unlink()
    assert align("run", "p.yaml").returncode == 2
    for command in (("verify", "p.yaml:a"), ("show", "p.yaml"), ("show", "p.yaml:a")):
        done = align(*command)
        assert done.returncode == 0 and "toy-" in done.stdout, done.stderr


def test_what_was_made_before_the_file_changed_is_said_to_be(align: Align, made: dict[str, Path], tmp_path: Path):
    assert "note" not in align("show", "p.yaml:b").stdout
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("b: {type: toy,", "b: {type: toy, rate: 4.0,"))
    said = align("show", "p.yaml:b").stdout
    assert "note: p.yaml:b was made before the file or what it reads changed (run: config: rate 0.5 -> 4.0)" in said
