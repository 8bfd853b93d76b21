"""Gates: what may be written, which metric it means, and what a failed one holds back, from a user's seat."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from align_pipeline.pipeline import rules
from align_pipeline.pipeline import store as stores
from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.errors import ConfigError
from harness import Align
from toy_stages import Toy

# --- the grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "other", "passed"),
    [
        ("> 0.5", 0.5, None, False),
        (">= 0.5", 0.5, None, True),
        ("< -1e-3", -0.002, None, True),
        ("<= .5", 0.5000001, None, False),
        ("<2*sft/perplexity", 2.3, 1.2, True),
        ("  <  1.1  *  sft/perplexity ", 1.33, 1.2, False),
        (">= stage:sft/accuracy", 0.7, 0.7, True),
        ("> +2. * loss", 1.0, 0.5, False),
    ],
)
def test_rules_are_compared_as_they_read(text: str, value: float, other: float | None, passed: bool):
    judged = rules.judge("metric", rules.parse(text), value, other)
    assert judged.passed is passed and judged.value == value


@pytest.mark.parametrize(
    "text",
    ["", "0.5", "= 0.5", "== 0.5", "=> 0.5", "!= 1", ">", "> 65 %", "> nan", "> inf", "> 1e999", "> 1_000", "> 0x10",
     "> 2 3", "> sft/loss * 1.1", "> 1.1 sft/loss", "> 1 * 2", "> a/b/c", "> 1 + 1", "> __import__('os')", "> ٣",
     "> 1;", ">> 1", "> > 1", "> stage:loss", "> 1.1 * 1.2 * loss"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str):
    with pytest.raises(ValueError, match="no rule|no finite number"):
        rules.parse(text)


@pytest.mark.parametrize(
    ("value", "other", "says"),
    [
        (None, 1.0, "loss was not measured; must be < 2 * sft/loss"),
        (math.nan, 1.0, "loss is nan, no number; must be < 2 * sft/loss"),
        (1.0, None, "sft/loss was not measured; must be < 2 * sft/loss"),
        (1.0, math.inf, "sft/loss is inf, no number; must be < 2 * sft/loss"),
    ],
)
def test_a_metric_that_is_missing_or_no_number_does_not_pass(value: float | None, other: float | None, says: str):
    judged = rules.judge("loss", rules.parse("< 2 * sft/loss"), value, other)
    assert not judged.passed and judged.says == says
    json.dumps(judged.record(), allow_nan=False)


def test_numbers_that_look_alike_are_shown_whole():
    judged = rules.judge("accuracy", rules.parse("> 0.65"), 0.64999999, None)
    assert judged.says == "0.64999999, must be > 0.65" and judged.remedy == "raise accuracy, or lower the gate"
    judged = rules.judge("loss", rules.parse("< 1.5 * sft/loss"), 3.5, 2.0)
    assert judged.says == "3.5, must be < 1.5 * sft/loss = 3" and judged.remedy == "lower loss, or raise the gate"


# --- names ------------------------------------------------------------------------------------------------------------

PIPELINE = """\
model: hub:org/model
stages:
  sft:
    type: sft
    data: file:rows.jsonl
  reward:
    type: reward
    model: stage:sft
    data: file:rows.jsonl
    held_out: 0.0
    evaluation: file:rows.jsonl
  dpo:
    type: dpo
    policy: stage:sft
    data: file:rows.jsonl
    held_out: 0.0
  ppo:
    type: ppo
    policy: stage:sft
    reward: stage:reward
    prompts: file:rows.jsonl
  evaluate:
    type: evaluate
    models: {sft: stage:sft, dpo: stage:dpo, best: stage:dpo}
    baseline: sft
    scorer: stage:reward
    prompts: file:rows.jsonl
    text: file:rows.jsonl
"""


def problems(folder: Path, stage: str, *require: str, text: str = PIPELINE) -> list[str]:
    """Return the problems of the pipeline with gates on one of its stages, without their places."""
    (folder / "rows.jsonl").write_text("{}\n")
    head = f"  {stage}:\n    type: "
    assert text.count(head) == 1
    gates = "".join(f"      {line}\n" for line in require)
    file = folder / "p.yaml"
    file.write_text(text.replace(head, f"  {stage}:\n    require:\n{gates}    type: "))
    try:
        load(file)
    except ConfigError as error:
        return [problem.replace(f"{folder}/", "") for problem in error.problems]
    return []


def test_gates_that_mean_something(tmp_path: Path):
    assert problems(tmp_path, "sft", 'loss: "< 2"', 'stage:sft/perplexity: "< 1.5 * train_loss"') == []
    assert problems(tmp_path, "reward", 'accuracy: ">= 0.65"', 'sft/loss: "< 3"') == []
    assert problems(tmp_path, "ppo", "reward_above_chance: off", 'sft/steps: "> 1"', 'held_out_kl: "< 9"') == []
    of_the_issue = ('dpo/win_rate_low: "> 0.5"', 'dpo/perplexity: "< 1.1 * sft/perplexity"')
    through_others = ('reward/accuracy: "> 0.6"', 'stage:dpo/first_loss: "< 1 * stage:sft/first_loss"')
    assert problems(tmp_path, "evaluate", *of_the_issue, *through_others) == []


WRONG = {
    "no operator": ("sft", "loss: 2", "require.loss: 2 is no rule; write an operator before it, as in \">= 2\""),
    "no rule": ("sft", 'loss: "= 2"', "require.loss: '= 2' is no rule; write >, >=, < or <= and then a number"),
    "true": ("ppo", "reward_above_chance: true", "True is no rule; write"),
    "a metric of the stage behind a model": ("evaluate", 'dpo/first_loss: "< 9"', "it is written stage:dpo/first_loss"),
    "no metric": ("sft", '"a b": "> 2"', "require.a b: 'a b' names no metric; write METRIC, NAME/METRIC"),
    "an unknown metric": ("sft", 'los: "< 2"', "require.los: sft measures no 'los'; did you mean loss?"),
    "an unknown metric on the right": ("sft", 'loss: "< 2 * trian_loss"', "sft measures no 'trian_loss'; did you mean"),
    "an unknown stage": ("dpo", 'stf/loss: "< 2"', "require.stf/loss: no stage 'stf' in this file; did you mean sft?"),
    "a stage that it does not read": ("dpo", 'reward/loss: "< 2"', "dpo depends on no stage 'reward', its metrics"),
    "an unknown metric of a model": ("evaluate", 'dpo/winrate: "> 0"', "did you mean dpo/win_rate?"),
    "a metric without its model": ("evaluate", 'win_rate: "> 0"', "evaluate measures no 'win_rate'; did you mean"),
    "the baseline against itself": ("evaluate", 'sft/win_rate: "> 0"', "it compares with the baseline, which this is"),
    "a model that could be a stage": (
        "evaluate", 'ppo/kl: "< 9"',
        "'ppo/kl' can be model 'ppo' of this stage (stage:dpo) or stage 'ppo'; write stage:ppo/kl"),
    "nothing is held out": ("dpo", 'accuracy: "> 0"', "dpo does not measure 'accuracy': it needs held-out rows; set"),
    "what is not unasked": ("sft", "loss: off", "only gates that a stage has unasked can be off, and sft has none"),
    "a typo of it": ("ppo", "reward_above_chanse: off", "did you mean reward_above_chance?"),
    "a rule for it": ("ppo", 'reward_above_chance: "> 0.6"', "a gate of align's own holds unless it is `off`"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_gates_that_mean_nothing_are_said_with_their_line(tmp_path: Path, name: str):
    stage, gate, says = WRONG[name]
    text = PIPELINE
    if "could be" in name:
        text = text.replace("best: stage:dpo}", "ppo: stage:dpo, other: stage:ppo}")
    said = problems(tmp_path, stage, gate, text=text)
    assert len(said) == 1, said
    found = said[0]
    line = (tmp_path / "p.yaml").read_text().splitlines().index(f"      {gate}") + 1
    assert found.startswith(f"p.yaml:{line}: stages.{stage}.require.") and says in found, found


def test_a_rule_without_quotes_is_said_to_need_them(tmp_path: Path):
    (found,) = problems(tmp_path, "sft", "loss: > 0.5")
    assert found.startswith("p.yaml:5: not YAML") and found.endswith('; quote a rule, as in "> 0.5"')


def test_documents_are_asked_for_where_perplexity_is_required(tmp_path: Path):
    text = PIPELINE.replace("    text: file:rows.jsonl\n", "")
    (found,) = problems(tmp_path, "evaluate", 'dpo/perplexity: "< 1.1 * sft/perplexity"', text=text)
    assert found.endswith("evaluate does not measure 'dpo/perplexity': it is measured on documents; name them in text")


def test_gates_are_wrong_together_with_everything_else(tmp_path: Path):
    text = PIPELINE.replace("model: hub:org/model", "modle: hub:org/model").replace("stage:dpo}", "stage:dqo}")
    found = "\n".join(problems(tmp_path, "reward", 'acuracy: "> 0"', 'loss: "2"', text=text))
    assert "did you mean model?" in found and "no stage 'dqo'" in found and "'2' is no rule" in found


def test_a_reward_model_that_is_not_judged_is_refused_where_ppo_reads_it(tmp_path: Path):
    text = PIPELINE.replace("    evaluation: file:rows.jsonl\n", "", 1)
    (found,) = problems(tmp_path, "sft", 'loss: "< 9"', text=text)
    assert found.startswith("p.yaml:21: stages.ppo.reward: PPO starts only from a reward model that beats a coin")


# --- what a gate holds back -------------------------------------------------------------------------------------------

CHAIN = """\
name: toys
stages:
  a:
    type: toy
    data: file:rows.jsonl
  b:
    type: toy
    model: stage:a
    rate: 1e-1
    require:
      total: "> 0.5"
      a/total: "< 4 * total"
  c:
    type: toy
    model: stage:b
    rate: 2
  alone:
    type: toy
    rate: 3
  report:
    type: toy_report
    models: {c: stage:c}
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "p.yaml").write_text(CHAIN)
    return tmp_path


def manifest(folder: Path) -> dict:
    return json.loads((folder / "runs" / "toys" / "manifest.json").read_text())["stages"]


def executed(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "runs" / "executed.log").read_text().splitlines()]


def test_a_failed_gate_stops_the_run_and_keeps_the_artifact(align: Align, chain: Path):
    """a adds up to 3.0 and b to 0.6, so 3.0 < 4 * 0.6 = 2.4 does not hold."""
    result = align("run", "p.yaml")
    assert result.returncode == 1
    line = "p.yaml:12: stages.b.require.a/total: 3, must be < 4 * total = 2.4; lower a/total, or raise the gate\n"
    assert result.stderr == line
    stages = manifest(chain)
    assert list(stages) == ["a", "b"] and len(executed(chain)) == 6
    assert stages["b"]["status"] == "done", "what it made stays"
    assert [(one["gate"], one["passed"], one["value"], one["limit"]) for one in stages["b"]["gates"]] == [
        ("total", True, pytest.approx(0.6), 0.5),
        ("a/total", False, 3.0, pytest.approx(2.4)),
    ]
    assert "gates" not in stages["a"]
    again = align("run", "p.yaml")
    assert again.returncode == 1 and again.stderr == line and "b  cached" in again.stdout, (
        "a cached stage is judged too"
    )
    assert len(executed(chain)) == 6

    plan = align("plan", "p.yaml")
    assert plan.returncode == 0
    rows = [row.split(None, 2) for row in plan.stdout.splitlines()]
    key = stages["b"]["artifact"]
    assert [row[:2] for row in rows] == [
        ["a", "cached"], ["b", "cached"], ["c", "blocked"], ["alone", "run"], ["report", "blocked"]]  # fmt: skip
    assert rows[1][2] == f"{key}; gate failed: a/total: 3, must be < 4 * total = 2.4"
    assert rows[2][2] == "a gate of b failed: a/total: 3, must be < 4 * total = 2.4"
    assert rows[4][2] == "waits for c, which is blocked"

    for what in ("p.yaml", "p.yaml:b"):
        shown = align("show", what).stdout
        assert "gate holds: total: 0.6, must be > 0.5\n" in shown
        assert "gate FAILED: a/total: 3, must be < 4 * total = 2.4\n" in shown


def test_a_moved_threshold_trains_nothing_anew(align: Align, chain: Path):
    align("run", "p.yaml")
    (chain / "p.yaml").write_text(CHAIN.replace("4 * total", "6 * total"))
    result = align("run", "p.yaml")
    assert result.returncode == 0, result.stderr
    assert "[2/5] b  gate holds: a/total: 3, must be < 6 * total = 3.6" in result.stdout
    assert len(executed(chain)) == 12 and all(one["passed"] for one in manifest(chain)["b"]["gates"])
    (chain / "p.yaml").write_text(CHAIN.replace('"> 0.5"', '"> 0.7"').replace("4 * total", "6 * total"))
    assert align("run", "p.yaml", "c").returncode == 1, "and holds back what had been made before"
    (chain / "p.yaml").write_text(CHAIN.partition("    require:")[0] + "  c" + CHAIN.partition("\n  c")[2])
    assert align("run", "p.yaml").returncode == 0 and len(executed(chain)) == 12
    assert "gates" not in manifest(chain)["b"]


def test_gates_are_in_no_key_and_no_record():
    gated = Toy(require={"total": "> 0.5"})
    assert stores.key(gated, {}) == stores.key(Toy(), {})
    assert "require" not in stores.settings(gated) and "require" not in stores.configuration(gated)


def test_several_failed_gates_are_said_together(align: Align, chain: Path):
    (chain / "p.yaml").write_text(CHAIN.replace('"> 0.5"', '"> 0.7"'))
    result = align("run", "p.yaml")
    assert result.stderr.splitlines() == [
        "p.yaml:11: stages.b.require.total: 0.6, must be > 0.7; raise total, or lower the gate",
        "p.yaml:12: stages.b.require.a/total: 3, must be < 4 * total = 2.4; lower a/total, or raise the gate",
    ]


def test_a_metric_that_nobody_measured_fails_the_gate(align: Align, chain: Path):
    result = align("run", "p.yaml", "b", "--set", "stages.b.require.totl=> 0")
    assert result.returncode == 1
    assert "--set stages.b.require.totl=> 0: stages.b.require.totl: totl was not measured; must be > 0" in result.stderr


def test_the_report_that_a_gate_was_judged_by_is_printed(align: Align, chain: Path):
    (chain / "p.yaml").write_text(CHAIN.replace("4 * total", "9 * total") + '    require: {inputs: "> 1"}\n')
    result = align("run", "p.yaml")
    assert result.returncode == 1 and "# Report" in result.stdout
    assert result.stderr.startswith("p.yaml:23: stages.report.require.inputs: 1, must be > 1; ")


# --- PPO's own --------------------------------------------------------------------------------------------------------


def test_a_gate_of_a_stage_s_own_is_judged_before_it_starts(align: Align, chain: Path):
    """The toy refuses a toy that it starts from whose total is below its own steps."""
    text = CHAIN.replace("  c:\n    type: toy\n", "  c:\n    type: toy_picky\n").replace("4 * total", "9 * total")
    (chain / "p.yaml").write_text(text)
    result = align("run", "p.yaml")
    assert result.returncode == 1
    assert (
        result.stderr
        == "p.yaml:13: stages.c.require.enough: 0.6 is not enough; raise it, or set require: {enough: off}\n"
    )
    assert manifest(chain)["c"]["status"] == "blocked" and not manifest(chain)["c"]["gates"][0]["passed"]
    assert "c       blocked  enough: 0.6 is not enough" in align("plan", "p.yaml").stdout
    assert "  c  blocked  p.yaml:13: stages.c.require.enough" in align("show", "p.yaml").stdout
    assert "c: blocked: p.yaml:13" in align("show", "p.yaml:c").stderr
    assert len(executed(chain)) == 6

    (chain / "p.yaml").write_text(text.replace("    rate: 2\n", "    rate: 2\n    require: {enough: off}\n"))
    assert "c       run     a gate held it back before" in align("plan", "p.yaml").stdout
    assert align("run", "p.yaml").returncode == 0
    (chain / "p.yaml").write_text(text)
    assert align("run", "p.yaml").returncode == 1, "what is cached is held back as well"
