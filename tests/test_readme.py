"""The README tells the truth: its commands run, its outputs are what is printed, its pipeline loads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from align_pipeline.pipeline.config import load
from align_pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALIGN = Path(sys.executable).with_name("align")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)
    assert found, f"no {language} blocks"
    return found


def printed_after(command: str) -> str:
    """Return what the README shows below `$ command`."""
    for block in blocks("console"):
        if block.startswith(f"$ {command}\n"):
            return block.split("\n", 1)[1]
    pytest.fail(f"the README does not show {command!r}")


def test_every_command_is_one_that_tests_run():
    commands = set(re.findall(r"^\$ (.*)$", README, flags=re.M))
    assert commands == {
        "make demo",  # test_demo.py
        "make test",  # this run
        "align plan configs/quickstart.yaml --set stages.dpo.beta=0.3",  # test_demo.py, and below
        "align --help",
        "align run pipeline.yaml",
        "align data check configs/shop/sft.jsonl",
        "align feedback votes.jsonl -o out",  # tests/data/feedback/test_docs.py
    }


def test_make_runs_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), flags=re.M) == ["lint", "test", "test-slow"]


def test_help():
    assert subprocess.run([ALIGN, "--help"], capture_output=True, text=True).stdout == printed_after("align --help")


def test_a_check_of_the_demo_s_rows(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "align_pipeline.data.shop", "configs/shop"], cwd=tmp_path, check=True)
    command = [ALIGN, "data", "check", "configs/shop/sft.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed_after("align data check configs/shop/sft.jsonl"))


def test_the_pipeline_of_at_most_25_lines_loads(tmp_path: Path):
    (text,) = blocks("yaml")
    assert len(text.splitlines()) <= 25
    assert f"A pipeline of {len(text.splitlines())} lines" in README
    (tmp_path / "pipeline.yaml").write_text(text)
    for name in re.findall(r"file:([\w.]+)", text):
        (tmp_path / name).write_text("{}\n")
    assert list(load(tmp_path / "pipeline.yaml").stages) == ["sft", "reward", "dpo", "evaluate"]


def test_the_stage_of_ppo_fits_into_that_pipeline(tmp_path: Path):
    (text,) = blocks("yaml")
    stage = README.split("### PPO\n\n```\n")[1].split("```")[0]
    (tmp_path / "pipeline.yaml").write_text(text + stage)
    for name in re.findall(r"file:([\w.]+)", text + stage):
        (tmp_path / name).write_text("{}\n")
    ppo = load(tmp_path / "pipeline.yaml").stages["ppo"]
    assert ppo.type == "ppo" and ppo.episodes == 20_000


def test_the_errors_are_those_of_the_shown_mistakes(tmp_path: Path):
    (text,) = blocks("yaml")
    for right, wrong in (
        ("r: 16", "r: 0"),
        ("file:sft.jsonl", "file:sft.json"),
        ("type: reward", "type: rewad"),
        ("    policy: stage:sft", "    policy: stage:stf\n    learning_rat: 1e-4\n    train: {adam_beta_2: 0.95}"),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "pipeline.yaml").write_text(text)
    for name in ("sft.jsonl", "preferences.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("{}\n")
    result = subprocess.run([ALIGN, "run", "pipeline.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == printed_after("align run pipeline.yaml")


def test_the_table_of_stages_names_them_all():
    table = re.findall(r"^\| `(\w+)` \|", README, flags=re.M)
    assert [name for name in table if name in STAGES] == list(STAGES)


def test_the_demo_shows_every_stage_and_what_is_measured():
    shown = printed_after("make demo")
    stages = list(load_quickstart())
    assert re.findall(r"^\[\d/\d\] (\w+)  done in", shown, flags=re.M) == stages
    for metric in ("reward", "perplexity", "success", "win rate", "kl", "success gain"):
        assert f"| {metric} |" in shown
    assert len(re.findall(r"^- (sft|dpo|ppo) \(", shown, flags=re.M)) >= 4
    planned = printed_after("align plan configs/quickstart.yaml --set stages.dpo.beta=0.3").splitlines()
    assert [line.split()[0] for line in planned] == stages
    expected = dict.fromkeys(stages, "cached") | {"dpo": "run", "evaluate": "waits"}
    assert {line.split()[0]: line.split()[1] for line in planned} == expected


def load_quickstart() -> dict:
    import yaml

    return yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))["stages"]
