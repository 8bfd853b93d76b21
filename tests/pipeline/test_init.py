"""What `align init` writes can be planned at once, its rows can be used, and nothing of anybody's is overwritten."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from align_pipeline.pipeline.init import TEMPLATES
from align_pipeline.pipeline.schema import schema
from align_pipeline.pipeline.yaml_file import read
from harness import Align
from harness import align as run
from tiny import write_tiny_model

COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache knows the commit of the default model: a machine that has seen it, without a network."""
    refs = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    monkeypatch.setitem(os.environ, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.usefixtures("cached")
def test_a_template_is_planned_at_once(align: Align, tmp_path: Path, template: str):
    done = align("init", "mine.yaml", "--template", template)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["mine.yaml  written", "next: align plan mine.yaml"]
    plan = align("plan", "mine.yaml")
    assert plan.returncode == 0, plan.stderr
    steps = {line.split()[0]: line.split()[1] for line in plan.stdout.splitlines()}
    assert (
        steps
        == {
            "dpo": {"sft": "run", "reward": "waits", "dpo": "waits", "evaluate": "waits"},
            "ppo": {"sft": "run", "reward": "waits", "ppo": "waits", "evaluate": "waits"},
            "feedback": {"feedback": "run", "reward": "waits", "dpo": "waits", "evaluate": "waits"},
        }[template]
    )
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=align.schema.json\n") and text.count("  # ") >= 4
    value, _ = read(tmp_path / "mine.yaml", [])  # as editors read YAML
    jsonschema.validate(value, json.loads((tmp_path / "align.schema.json").read_text()))
    assert json.loads((tmp_path / "align.schema.json").read_text()) == json.loads(json.dumps(schema()))
    named = {line.split("file:")[1] for line in text.splitlines() if ": file:" in line and not line.startswith("#")}
    rows = {path.name for path in tmp_path.glob("*.jsonl")}
    assert rows == named, "every file that it names is written, and no other"
    for name in rows - {"example-feedback.jsonl"}:
        check = align("data", "check", name)
        assert (check.returncode == 0 and ": 12 rows" in check.stdout) or name == "example-heldout.jsonl", check.stdout


def test_the_example_of_feedback_makes_a_pair_of_each_question(align: Align):
    assert align("init", "--template", "feedback").returncode == 0
    done = align("feedback", "example-feedback.jsonl", "-o", "out", "--set", "test=0")
    assert done.returncode == 0 and "24 events read, 24 used" in done.stdout and "pairs: 12 to train on" in done.stdout


def test_nothing_is_overwritten(align: Align, tmp_path: Path):
    (tmp_path / "example-sft.jsonl").write_text("mine")
    (tmp_path / "align.schema.json").write_text("{}")
    done = align("init")
    assert "example-sft.jsonl  is there already, left as it is" in done.stdout
    assert (tmp_path / "example-sft.jsonl").read_text() == "mine" and (
        tmp_path / "align.schema.json"
    ).read_text() == "{}"
    before = (tmp_path / "pipeline.yaml").read_bytes()
    again = align("init", "--template", "ppo")
    assert again.returncode == 2
    assert again.stderr == "pipeline.yaml: it exists, and nothing is overwritten; name another file\n"
    assert (tmp_path / "pipeline.yaml").read_bytes() == before and not (tmp_path / "example-prompts.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--template", "dppo"), "--template dppo: no such template; did you mean "),
        (("--model", "Qwen/Qwen3"), "--model Qwen/Qwen3: names no model; write hub:ORG/NAME[@REV] or file:PATH"),
        (("--model", "module:function"), "names no model"),
        (("notes.txt",), "a pipeline file ends in .yaml or .yml"),
        (("my pipeline.yaml",), "a pipeline is named as its file"),
        (("store.yaml",), "a pipeline is named as its file"),
    ],
)
def test_what_cannot_be_written_says_why(align: Align, tmp_path: Path, arguments: tuple[str, ...], words: str):
    done = align("init", *arguments)
    assert done.returncode == 2 and words in done.stderr and not list(tmp_path.iterdir())


def test_names_that_yaml_reads_as_something_else(align: Align, tmp_path: Path):
    assert align("init", "deep/true.yaml").returncode == 0
    assert yaml.safe_load((tmp_path / "deep" / "true.yaml").read_text())["name"] == "true"
    assert (tmp_path / "deep" / "example-sft.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("template", ["dpo", "ppo"])
def test_a_template_runs(tmp_path: Path, template: str):
    """With a model that is small enough; only what takes long is set lower."""
    texts = ["Where is my order? Please tell me its number. Gladly, for two euros."] * 4
    write_tiny_model(tmp_path / "base", texts, vocab_size=300, positions=1024)
    run(tmp_path, "init", "p.yaml", "--template", template, "--model", "file:base")
    small = ["stages.evaluate.max_new_tokens=8"]
    small += ["stages.reward.held_out=0.0"]  # one pair of twelve would be no proof
    small += ["stages.ppo.episodes=8", "stages.ppo.batch_size=8", "stages.ppo.max_new_tokens=8"] * (template == "ppo")
    run(tmp_path, "run", "p.yaml", *(part for text in small for part in ("--set", text)))
    manifest = json.loads((tmp_path / "runs" / "p" / "manifest.json").read_text())
    assert {entry["status"] for entry in manifest["stages"].values()} == {"done"} and len(manifest["stages"]) == 4
