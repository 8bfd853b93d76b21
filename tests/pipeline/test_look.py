"""Rows of every stage are looked at before the first one runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import Align

PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
PIPELINE = """\
name: rows
stages:
  first:
    type: toy
  dpo:
    type: dpo
    policy: stage:first
    data: {shop: file:shop.jsonl, web: file:web.csv}
    columns:
      web: {prompt: question}
    evaluation: file:pairs.json.gz
  kto:
    type: kto
    policy: stage:first
    data: file:thumbs.parquet
  ppo:
    type: ppo
    policy: stage:first
    reward: scorer:score
    value: fresh
    prompts: file:prompts.txt
  evaluate:
    type: evaluate
    models: {dpo: stage:dpo}
    baseline: dpo
    scorer: scorer:score
    prompts: file:prompts.txt
    text: file:folder
"""


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A pipeline whose rows fit, each file of another kind."""
    import gzip

    import pyarrow
    from pyarrow.parquet import write_table

    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "scorer.py").write_text("def score(completions, **rest):\n    return [0.0] * len(completions)\n")
    write(tmp_path / "shop.jsonl", *[PAIR] * 3)
    (tmp_path / "web.csv").write_text("question,chosen,rejected\nq,yes,no\n")
    (tmp_path / "pairs.json.gz").write_bytes(gzip.compress(json.dumps([PAIR]).encode()))
    write_table(pyarrow.table({"prompt": ["q"], "completion": ["yes"], "label": [True]}), tmp_path / "thumbs.parquet")
    (tmp_path / "prompts.txt").write_text("q\n")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "rows.jsonl", {"text": "once"})
    return tmp_path


def test_rows_that_fit_stop_nothing(align: Align, project: Path) -> None:
    planned = align("plan", "p.yaml")
    assert (planned.returncode, planned.stderr) == (0, "")


def test_all_files_that_do_not_fit_are_named_before_anything_runs(align: Align, project: Path) -> None:
    write(project / "shop.jsonl", *[{"prompt": "q", "chosn": "yes", "rejected": "no"}] * 3)
    (project / "web.csv").write_text("prompt,chosen,rejected\nq,yes,no\n")
    (project / "pairs.json.gz").write_text("[]")
    (project / "thumbs.parquet").write_text("{}")
    write(project / "folder" / "rows.jsonl", *[{"txt": "once"}] * 2)
    said = [
        "p.yaml:8: stages.dpo.data.shop: shop.jsonl:1: chosn: unknown field; did you mean chosen? (so it is in all of "
        "the first 3 rows)",
        "p.yaml:8: stages.dpo.data.web: web.csv:2: columns.prompt: no column question in the file; it has chosen, "
        "prompt, rejected",
        "p.yaml:11: stages.dpo.evaluation: pairs.json.gz: named .gz but not compressed so (it begins with b'[]'); "
        "rename or compress it",
        "p.yaml:15: stages.kto.data: thumbs.parquet: not a readable Parquet file (",
        "p.yaml:28: stages.evaluate.text: folder:1: txt: unknown field; did you mean text? (so it is in all of the "
        "first 2 rows)",
    ]
    for command in ("plan", "run"):
        found = align(command, "p.yaml")
        assert found.returncode == 3
        lines = found.stderr.splitlines()
        assert len(lines) == len(said), found.stderr
        assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), found.stderr
    assert not (project / "runs" / "executed.log").exists(), "the first stage ran"
    some = align("run", "p.yaml", "first")
    assert some.returncode == 0, "the stages that are asked for read none of these rows"


def test_single_bad_rows_are_left_to_the_gate(align: Align, project: Path) -> None:
    write(project / "shop.jsonl", PAIR, PAIR | {"chosen": "no"}, PAIR | {"chosn": ""})
    assert align("plan", "p.yaml").returncode == 0


def test_a_look_is_quick_and_imports_nothing_heavy(project: Path) -> None:
    (project / "p.yaml").write_text(PIPELINE.split("  kto:")[0].replace("stage:first", "file:folder"))
    write(project / "shop.jsonl", *[PAIR] * 5000)
    code = (
        "import sys, time\nsys.argv = ['align', 'plan', 'p.yaml']\nfrom align_pipeline.pipeline.cli import main\n"
        "from align_pipeline.pipeline.plan import Planner\nlook, spent = Planner.look, []\n"
        "def timed(*given):\n    begun = time.process_time()\n    found = look(*given)\n"
        "    spent.append(time.process_time() - begun)\n    return found\n"
        "Planner.look = timed\n"
        "try:\n    main()\nfinally:\n    print(*spent, *sys.modules, file=open('used', 'w'))\n"
    )
    text = (project / "p.yaml").read_text().replace("  first:\n    type: toy\n", "")
    (project / "p.yaml").write_text(text)
    process = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    seconds, *modules = (project / "used").read_text().split()
    assert float(seconds) < 0.5
    heavy = {"torch", "transformers", "datasets", "trl", "pyarrow", "numpy", "tokenizers"}
    assert "align_pipeline.data.load" in modules and not heavy & set(modules)
