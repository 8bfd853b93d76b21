"""Two models compared from a user's seat: real models, real sampling, numbers counted again from the samples."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from harness import start
from tiny import write_tiny_model

PIPELINE = """\
name: shop
model: file:base
lora: {r: 4}
stages:
  short:
    type: sft
    data: file:short.jsonl
    max_steps: 1
    batch_size: 4
  long:
    type: sft
    data: file:long.jsonl
    batch_size: 4
    epochs: 12
    learning_rate: 3e-2
  evaluate:
    type: evaluate
    models: {short: stage:short, long: stage:long}
    baseline: short
    scorer: rules:shelves
    prompts: file:prompts.jsonl
    max_new_tokens: 6
"""
THINGS = ("tea", "jam", "soap", "rice", "salt", "milk", "figs", "nuts", "eggs", "oats", "corn", "beer")


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose two models are trained: one hardly, one to say shelf."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "base").mkdir()
    texts = [f"where is the {thing}? on the shelf" for thing in THINGS]
    write_tiny_model(folder / "base", texts, vocab_size=300, positions=64)
    write(folder / "prompts.jsonl", [{"prompt": f"where is the {thing}?"} for thing in THINGS])
    rows = [{"prompt": f"where is the {thing}?", "completion": " shelf shelf"} for thing in THINGS]
    write(folder / "short.jsonl", rows)
    write(folder / "long.jsonl", rows)
    (folder / "rules.py").write_text(
        "def shelves(completions, **_):\n    return [float(text.count('shelf')) for text in completions]\n\n\n"
        "def even(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    (folder / "p.yaml").write_text(PIPELINE)
    code, _, err = run(folder, "run", "p.yaml", "short", "long")
    assert code == 0, err
    return folder


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments, toys=False)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def key(folder: Path, stage: str) -> str:
    return json.loads((folder / "runs" / "shop" / "manifest.json").read_text())["stages"][stage]["artifact"]


def test_two_stages_of_a_file_as_its_evaluation_says(project: Path) -> None:
    code, out, err = run(project, "compare", "p.yaml:short", "p.yaml:long")
    assert (code, err) == (0, "")
    assert f"A: p.yaml:short  ({key(project, 'short')})\nB: p.yaml:long  ({key(project, 'long')})\n" in out
    made = project / "runs" / ".compare" / "compare"
    record = json.loads((made / "artifact.json").read_text())
    assert record["config"]["max_new_tokens"] == 6, "the settings of the file's evaluate stage"
    assert record["inputs"]["models.B"]["artifact"] == key(project, "long")

    rows = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    scores = {name: [row["answers"][name][0]["text"].count("shelf") for row in rows] for name in "AB"}
    wins = [(b > a) + (a == b) / 2 for a, b in zip(scores["A"], scores["B"], strict=True)]
    assert fmean(wins) > 0.8, "the models should differ"
    low, high = (record["metrics"][f"B/win_rate_{end}"] for end in ("low", "high"))
    error = (fmean((win - 0.5) ** 2 for win in wins) / 12) ** 0.5
    verdict = f"B wins {fmean(wins):.1%} [{low:.1%}, {high:.1%}] of 12 prompts; at that size differences under "
    assert f"\n{verdict}{2.801585 * error:.1%} cannot be seen.\n" in out
    assert f"| A (baseline) | {fmean(scores['A']):.3f} [" in out and f"| B | {fmean(scores['B']):.3f} [" in out

    gaps = sorted((b - a for a, b in zip(scores["A"], scores["B"], strict=True)), reverse=True)
    shown = out.split("Where B scores highest above A:\n")[1].split("Where A")[0].split("##")[0].strip().split("\n\n")
    assert len(shown) == 3
    found = [[float(line.split("(")[1].split(")")[0]) for line in block.splitlines()[1:]] for block in shown]
    assert [b - a for a, b in found] == gaps[:3]


def test_the_same_question_is_answered_from_the_store_however_it_is_asked(project: Path) -> None:
    run(project, "compare", "p.yaml:short", "p.yaml:long")
    keys = key(project, "short"), key(project, "long")[:10]
    asked = ("--prompts", "prompts.jsonl", "--scorer", "rules:shelves", "--set", "max_new_tokens=6")
    code, out, _ = run(project, "compare", *keys, *asked)
    assert code == 0 and "compare  cached" in out and "B wins" in out
    code, out, _ = run(project, "compare", "p.yaml:short", "p.yaml:long", "--set", "max_new_tokens=7")
    assert code == 0 and "cached" not in out


def test_what_both_cost_and_how_to_learn_how_fast_they_are(project: Path) -> None:
    run(project, "compare", "p.yaml:short", "p.yaml:long")
    asked = ("compare", "p.yaml:short", "p.yaml:long", "--set", "how.speed=auto")
    code, out, _ = run(project, *asked)
    assert code == 0 and "compare  cached" in out, "speeds are no part of the key"
    made = (project / "runs" / ".compare" / "compare").resolve().name
    assert f"Speed was not measured when {made} was made; `align {' '.join(asked)} --force` measures it." in out
    for model, name in (("A", "short"), ("B", "long")):
        used = json.loads((project / "runs" / "shop" / name / "artifact.json").read_text())["resources"]
        row = f"{used['cpu_seconds'] / 3600:.3g} | 0 | {used['peak_memory_bytes'] / 1e9:.2f} GB |  |"
        (own,) = [line for line in out.splitlines() if line.startswith(f"| {key(project, name)} | {model} |")]
        (summed,) = [line for line in out.splitlines() if line.startswith(f"| 1 stage | {model} |")]
        assert own.endswith(row) and summed.endswith(row)


@pytest.mark.slow
def test_speeds_of_a_comparison_that_was_made_before(project: Path) -> None:
    """Made anew with the same answers and the same digest; the artifact says how fast, and `show` and `compare` do."""
    asked = ("compare", "p.yaml:short", "p.yaml:long")
    run(project, *asked)
    link = project / "runs" / ".compare" / "compare"
    before = json.loads((link / "artifact.json").read_text())
    assert "speed" not in before["resources"]
    code, out, err = run(project, *asked, "--set", "how.speed=auto", "--force")
    assert (code, err) == (0, "") and "compare  run: forced" in out
    after = json.loads((link / "artifact.json").read_text())
    assert (after["key"], after["digest"], after["metrics"]) == (before["key"], before["digest"], before["metrics"])
    speed = after["resources"]["speed"]
    assert (speed["engine"], speed["device"], list(speed["models"])) == ("transformers", "cpu", ["A", "B"])
    rate = speed["models"]["B"]["16"]["requests_per_second"]["value"]
    shown = f"{rate:,.0f} [" if rate >= 100 else f"{rate:.3g} ["
    for arguments in (asked, ("show", link.resolve().name)):
        code, out, _ = run(project, *arguments)
        (row,) = [line for line in out.splitlines() if line.startswith("| B | 16 |")]
        assert code == 0 and row.split(" | ")[-1].startswith(shown)


def test_a_folder_of_weights_and_a_scorer_that_sees_nothing(project: Path) -> None:
    code, out, err = run(project, "compare", "file:base", "p.yaml:short", "--scorer", "rules:even")
    assert (code, err) == (0, "")
    assert "\nNo difference can be seen: the scores of A and B are equal on all of 12 prompts.\n" in out
    assert "scores highest" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("p.yaml:short", "p.yaml:lang"), 2, "p.yaml: no stage 'lang'; did you mean long?"),
        (("p.yaml:short", "p.yaml:evaluate"), 3, "p.yaml:evaluate: was never run; `align run p.yaml "),
        (("p.yaml:short", "p.yml:long"), 2, "align compare: B: p.yml does not exist; did you mean p.yaml?"),
        (("p.yaml:short", "nonsense"), 3, "align compare: B: 'nonsense' names no artifact in "),
        (("file:base", "file:bse", "--prompts", "prompts.jsonl", "--scorer", "rules:even"), 2,
         "align compare: models.B: bse does not exist; did you mean base?"),
        (("file:base", "file:base"), 2, "align compare: --prompts: missing; give it, or name A or B as FILE:STAGE"),
        (("p.yaml:short", "p.yaml:long", "--prompts", "promts.jsonl"), 2, "promts.jsonl does not exist; did you"),
        (("p.yaml:short", "p.yaml:long", "--scorer", "rules:evn"), 2, "rules.py defines no 'evn'; did you mean even?"),
        (("p.yaml:short", "p.yaml:long", "--scorer", "p.yaml:short"), 3, "is a model, a reward model is needed"),
        (("p.yaml:short", "p.yaml:long", "--set", "max_new_tokns=3"), 2,
         "--set max_new_tokns=3: max_new_tokns: unknown field; did you mean max_new_tokens?"),
        (("p.yaml:short", "p.yaml:long", "--set", "baseline=B"), 2, "baseline: is what A and B say; remove the --set"),
        (("p.yaml:short", "p.yaml:long", "--set", "models.C=file:base"), 2, "models: is what A and B say"),
        (("p.yaml:short", "p.yaml:long", "--set", "scorer=stage:reward"), 2, "scorer: 'stage:reward': of which file?"),
        (("p.yaml:short", "p.yaml:long", "--prompts", "short.json"), 2, "short.json does not exist; did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(project: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    found, _, err = run(project, "compare", *arguments)
    assert (found, says in err.replace(f"{project}/", "")) == (code, True), err


def test_gates_on_an_evaluation(project: Path) -> None:
    """A name of its models is meant before the stage of that name, which measured another perplexity."""
    text = PIPELINE.replace("name: shop", "name: gated") + "    text: file:text.txt\n    require:\n"
    (project / "text.txt").write_text("where is the tea? on the shelf\n")
    good = '      long/win_rate_low: "> 0.5"\n      long/perplexity: "> 1e-3 * stage:short/perplexity"\n'
    (project / "gated.yaml").write_text(text + good)
    code, out, err = run(project, "run", "gated.yaml")
    assert (code, err) == (0, "") and "evaluate  gate holds: long/win_rate_low: " in out
    stages = json.loads((project / "runs" / "gated" / "manifest.json").read_text())["stages"]
    metrics, gates = stages["evaluate"]["metrics"], stages["evaluate"]["gates"]
    assert gates[1]["value"] == metrics["long/perplexity"] != stages["long"]["metrics"]["perplexity"]
    assert gates[1]["limit"] == pytest.approx(1e-3 * stages["short"]["metrics"]["perplexity"])

    (project / "gated.yaml").write_text(text + '      long/perplexity: "< 0.5 * short/perplexity"\n')
    code, out, err = run(project, "run", "gated.yaml")
    value, limit = metrics["long/perplexity"], 0.5 * metrics["short/perplexity"]
    assert code == 1 and "evaluate  cached" in out and "# Evaluation" in out
    assert err == (
        f"gated.yaml:25: stages.evaluate.require.long/perplexity: {value:.6g}, must be < 0.5 * short/perplexity = "
        f"{limit:.6g}; lower long/perplexity, or raise the gate\n"
    )
