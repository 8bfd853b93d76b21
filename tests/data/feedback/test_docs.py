"""The docs and the code agree: products, fields, settings and what the command prints."""

import json
import re
from pathlib import Path
from typing import get_args

import yaml

from align_pipeline.data.feedback.adapters import ADAPTERS
from align_pipeline.data.feedback.adapters.table import NAMES
from align_pipeline.data.feedback.complete import MODEL
from align_pipeline.data.feedback.events import ACTORS, EVENT_TYPES, FIELDS
from align_pipeline.data.feedback.settings import Product, Settings
from align_pipeline.pipeline.config import load
from align_pipeline.stages.complete import Complete
from align_pipeline.stages.feedback import Feedback
from harness import align
from thumbs import rating

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "feedback.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def words(text: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", text))


def table(title: str) -> list[str]:
    return [line for line in DOCS.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("| ")]


def test_every_product_is_named_once() -> None:
    named = {name for row in table("Whose logs are read") for name in words(row.split("|")[1])}
    named -= {"--format"}
    assert named == set(ADAPTERS) == set(get_args(Product))
    (columns,) = [row for row in table("Whose logs are read") if "OURS=THEIRS" in row]
    assert {name for name in words(columns) if name in NAMES} == set(NAMES) - {"model_chosen", "model_rejected"}


def test_every_field_that_is_named_is_read() -> None:
    rows = table("The canonical event")[1:]
    named = {name for row in rows for name in words(row.split("|")[1])}
    assert named <= FIELDS and set(EVENT_TYPES) == words(rows[0].split("|")[2])
    about = {"reason", "comment", "tags", "score", "params", "turn", "schema", "origin", "model_version"}
    assert FIELDS - named == about, "fields that are kept out of rows and decide nothing"
    assert set(ACTORS) == set(get_args(get_args(Settings.model_fields["actors"].annotation)[0]))


def test_settings_that_are_named_exist() -> None:
    named = set(re.findall(r"`(\w+)(?:: \w+)?`", DOCS.split("## What counts")[1].split("## Forgetting")[0]))
    settings = set(Settings.model_fields)
    for name in ("pairs_per_prompt", "min_confidence", "user_share", "drop_suspects", "margins", "regenerations"):
        assert name in named & settings
    assert Settings().min_confidence == 0.75 and Settings().user_share == 0.05
    assert set(Feedback.model_fields) == settings | {"type", "how", "require", "logs", "complete"}


def test_what_completes_dislikes_is_what_the_docs_say() -> None:
    (block,) = [text for text in re.findall(r"```\n(.*?)```", DOCS, flags=re.S) if text.startswith("    complete:")]
    complete = Complete(**yaml.safe_load(block)["complete"])
    assert complete == Complete(policy="stage:sft", reward="stage:reward"), "the defaults"
    assert f"`min_gap` ({complete.min_gap})" in DOCS and f"draws {complete.samples} answers" in DOCS
    assert f"`fb_model_c` is `{MODEL}`" in DOCS and "pairs.not_completed" in DOCS


def test_the_pipeline_of_the_docs_loads(tmp_path: Path) -> None:
    (block,) = [text for text in re.findall(r"```\n(.*?)```", DOCS, flags=re.S) if "type: feedback" in text]
    pipeline = f"name: a\nmodel: file:base\nstages:\n  sft: {{type: sft, data: file:sft.jsonl}}\n{block}"
    for name in ("base", "events"):
        (tmp_path / name).mkdir()
    for name in ("sft.jsonl", "openwebui.json"):
        (tmp_path / name).write_text("{}\n", "utf-8")
    (tmp_path / "p.yaml").write_text(pipeline, "utf-8")
    assert list(load(tmp_path / "p.yaml").stages) == list(yaml.safe_load(pipeline)["stages"])


def test_the_readme_shows_what_the_command_prints(tmp_path: Path) -> None:
    block = README.split("$ align feedback votes.jsonl -o out\n")[1].split("```")[0]
    events = [rating(1, "Left shelf.", f"u{i}", "Where is the milk?", model="new") for i in range(2)]
    events += [rating(-1, "No idea.", "u2", "Where is the milk?", model="old")]
    events += [rating(1 if i % 4 else -1, f"Answer {i}.", f"v{i}", f"Question {i} of many?") for i in range(60)]
    events += [{**events[0], "user_id": "bot", "actor": "model"}, {**events[0], "label": "meh"}]
    (tmp_path / "votes.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")
    printed = align(tmp_path, "feedback", "votes.jsonl", "-o", "out")
    assert printed == block
