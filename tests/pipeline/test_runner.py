"""The machine from a user's seat: run, run again, change something, fail, continue."""

import json
import signal
import time
from pathlib import Path

import pytest

from harness import Align, start

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
  report:
    type: toy_report
    models: {a: stage:a, b: stage:b}
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "p.yaml").write_text(CHAIN)
    return tmp_path


def manifest(folder: Path, name: str = "toys") -> dict:
    return json.loads((folder / "runs" / name / "manifest.json").read_text())


def executed(folder: Path) -> list[str]:
    log = folder / "runs" / "executed.log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_chain_runs_once_and_is_cached_then(align: Align, chain: Path):
    first = align("run", "p.yaml")
    assert first.returncode == 0, first.stderr
    stages = manifest(chain)["stages"]
    assert list(stages) == ["a", "b", "report"]
    assert {entry["status"] for entry in stages.values()} == {"done"}
    assert stages["a"]["metrics"] == {"total": (1 + 2 + 3) * 0.5}
    assert stages["b"]["metrics"]["total"] == pytest.approx((1 + 2 + 3) * 0.1)
    a = chain / "runs" / "toys" / "a"
    rows_digest = json.loads((a / "artifact.json").read_text())["inputs"]["data"]["digest"]
    assert (a / "model" / "weights.txt").read_text() == f"3.0 from {rows_digest}\n"
    assert f"from {stages['a']['digest']}" in (chain / "runs" / "toys" / "b" / "model" / "weights.txt").read_text()
    assert "# Report" in first.stdout and len(executed(chain)) == 6

    second = align("run", "p.yaml")
    assert second.returncode == 0 and second.stdout.count("cached") == 3 and len(executed(chain)) == 6
    assert manifest(chain)["updated"] == manifest(chain)["updated"]


def test_a_deleted_manifest_is_rebuilt(align: Align, chain: Path):
    align("run", "p.yaml")
    before = manifest(chain)["stages"]
    (chain / "runs" / "toys" / "manifest.json").unlink()
    (chain / "runs" / "toys" / "a").unlink()
    align("run", "p.yaml")
    assert manifest(chain)["stages"] == before and len(executed(chain)) == 6
    assert (chain / "runs" / "toys" / "a" / "artifact.json").exists()


def test_only_what_changed_runs_and_the_plan_says_so(align: Align, chain: Path):
    align("run", "p.yaml")
    plan = align("plan", "p.yaml", "--set", "stages.b.rate=0.3").stdout.splitlines()
    assert plan[0].startswith("a       cached")
    assert plan[1] == "b       run     config: rate 0.1 -> 0.3"
    assert plan[2] == "report  waits   waits for b"
    align("run", "p.yaml", "--set", "stages.b.rate=0.3")
    assert len(executed(chain)) == 9
    (chain / "rows.jsonl").write_text('{"a": 2}\n')
    changed = align("plan", "p.yaml").stdout.splitlines()
    assert changed[0].startswith("a       run     input data: ")
    assert changed[1] == "b       waits   waits for a"


def test_how_does_not_enter_the_key(align: Align, chain: Path):
    align("run", "p.yaml")
    assert align("plan", "p.yaml", "--set", "stages.b.how.logging_steps=1").stdout.count("cached") == 3


def test_force_runs_anew_and_what_follows_only_if_the_content_changed(align: Align, chain: Path):
    align("run", "p.yaml")
    plan = align("plan", "p.yaml", "--force", "a").stdout.splitlines()
    assert plan[0] == "a       run     forced" and plan[1] == "b       waits   waits for a"
    forced = align("run", "p.yaml", "--force", "a")
    assert forced.returncode == 0 and "[2/3] b  cached" in forced.stdout
    assert len(executed(chain)) == 9
    key = manifest(chain)["stages"]["a"]["artifact"]
    assert (chain / "runs" / "store" / f"{key}~1" / "artifact.json").exists()


def test_targets_run_what_they_need(align: Align, chain: Path):
    align("run", "p.yaml", "b")
    assert list(manifest(chain)["stages"]) == ["a", "b"]
    wrong = align("run", "p.yaml", "c")
    assert wrong.returncode == 2 and "no stage 'c'; choose a, b, report" in wrong.stderr


def test_two_stores_hold_equal_digests(align: Align, chain: Path):
    align("run", "p.yaml")
    align("run", "p.yaml", "--store", "elsewhere")
    other = json.loads((chain / "elsewhere" / "toys" / "manifest.json").read_text())["stages"]
    assert {name: one["digest"] for name, one in other.items()} == {
        name: one["digest"] for name, one in manifest(chain)["stages"].items()
    }


def test_a_file_that_is_one_stage(align: Align, tmp_path: Path):
    (tmp_path / "single.yaml").write_text("type: toy\nrate: 2.0\n")
    assert align("run", "single.yaml").returncode == 0
    assert manifest(tmp_path, "single")["stages"]["toy"]["metrics"] == {"total": 12.0}
    wrong = align("run", "single.yaml", "--set", "rate=-1")
    assert wrong.returncode == 2 and wrong.stderr == "--set rate=-1: stages.toy.rate: must be more than 0, got -1\n"


@pytest.mark.parametrize(
    ("fail", "code", "says"),
    [
        ("user", 1, "stage b failed: prompts.jsonl:3: the toy does not like it; give it another one"),
        ("data", 3, "rows.jsonl:3: chosen: equals rejected\nrows.jsonl:9: chosen: equals rejected\n"),
        ("defect", 1, "stage b failed: RuntimeError: a defect of ours"),
        ("kill", 1, "stage b failed: its worker was killed (SIGKILL)"),
    ],
)
def test_a_failure_says_what_where_and_how_to_go_on(align: Align, chain: Path, fail: str, code: int, says: str):
    result = align("run", "p.yaml", "--set", f"stages.b.fail={fail}")
    assert result.returncode == code and says in result.stderr
    if fail != "data":
        assert "whole log: " in result.stderr
        assert f"continue with: align run p.yaml --set stages.b.fail={fail}" in result.stderr
    if fail == "defect":
        assert "  | RuntimeError: a defect of ours" in result.stderr, "the traceback's end is shown"
    entry = manifest(chain)["stages"]["b"]
    assert entry["status"] == "failed" and entry["step"] == 2 and entry["work"].startswith("work/toy-")
    assert "report" not in manifest(chain)["stages"]
    assert "b       resume  not finished" in align("plan", "p.yaml", "--set", f"stages.b.fail={fail}").stdout


def test_what_a_users_function_says_does_nothing_to_the_terminal(align: Align, chain: Path):
    result = align("run", "p.yaml", "--set", "stages.b.fail=control")
    assert "] b  \ufffd[2Jnoted\ufffd\n" in result.stdout
    assert "  | RuntimeError: \ufffd[2Jgone\ufffd\n" in result.stderr
    assert manifest(chain)["stages"]["b"]["error"].endswith("RuntimeError: \ufffd[2Jgone\ufffd")


def test_resources_add_up_over_attempts(align: Align, chain: Path):
    align("run", "p.yaml", "b", "--set", "stages.b.fail=kill", "--set", "stages.b.sleep=0.2")
    # `fail` is in the key, so the same key is continued by taking the kill out of the way: step 1 is behind it
    result = align("run", "p.yaml", "b", "--set", "stages.b.fail=kill", "--set", "stages.b.sleep=0.2")
    assert result.returncode == 0, result.stderr
    record = json.loads((chain / "runs" / "toys" / "b" / "artifact.json").read_text())
    resources = record["resources"]
    assert resources["attempts"] == 2 and 0.6 <= resources["seconds"] < 20
    assert resources["cpu_seconds"] > 0 and resources["peak_memory_bytes"] > 10_000_000
    assert [line for line in executed(chain) if line.startswith(record["key"])] == [
        f"{record['key']} {step}" for step in range(3)
    ]


def test_two_runs_at_once_make_it_once_and_one_says_for_whom_it_waits(chain: Path):
    slow = ("run", "p.yaml", "--set", "stages.a.sleep=0.7")
    first = start(chain, *slow)
    while not executed(chain):
        time.sleep(0.02)
    refused = start(chain, *slow, "--no-wait")
    second = start(chain, *slow)
    out = [process.communicate(timeout=60) for process in (first, second, refused)]
    assert (first.returncode, second.returncode, refused.returncode) == (0, 0, 4), out
    assert f"waiting for `align {' '.join(slow)}` (pid {first.pid} on " in out[1][0]
    assert f"is being made by `align {' '.join(slow)}` (pid {first.pid}" in out[2][1]
    assert len(executed(chain)) == 6


def test_ctrl_c_ends_the_worker_and_continues_later(align: Align, chain: Path):
    slow = ("run", "p.yaml", "a", "--set", "stages.a.sleep=0.3")
    process = start(chain, *slow)
    while len(executed(chain)) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    again = f"stage a was interrupted; continue with: align {' '.join(slow)}"
    assert process.returncode == 130 and err.strip() == again
    assert align(*slow, "--no-wait").returncode == 0
    assert len(executed(chain)) <= 4, "at most the step in hand is done twice"


def test_show(align: Align, chain: Path):
    nothing = align("show")
    assert nothing.returncode == 3 and "holds no pipeline" in nothing.stderr
    align("run", "p.yaml")
    key = manifest(chain)["stages"]["b"]["artifact"]
    assert key in align("show").stdout and key in align("show", "p.yaml").stdout
    for name in (key, key[:9], "p.yaml:b"):
        shown = align("show", name).stdout
        assert f"{key}  model" in shown and "    data: file:rows.jsonl" in shown and "rate: 0.1" in shown
    assert "names no artifact" in align("show", "nonsense").stderr
    assert "no stage 'c'" in align("show", "p.yaml:c").stderr


def test_an_input_that_changes_while_it_is_read_is_not_cached(align: Align, chain: Path):
    process = start(chain, "run", "p.yaml", "a", "--set", "stages.a.sleep=0.3")
    while not executed(chain):
        time.sleep(0.02)
    (chain / "rows.jsonl").write_text('{"a": 2}\n')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stage a: data changed while it ran" in err
    assert list((chain / "runs" / "store").iterdir()) == []


@pytest.mark.parametrize("damage", ["[", "[1]", '{"stages": {"a": {}}}'])
def test_a_damaged_manifest_is_written_anew(align: Align, chain: Path, damage: str):
    align("run", "p.yaml", "a")
    (chain / "runs" / "toys" / "manifest.json").write_text(damage)
    assert align("show").returncode == 0 and align("plan", "p.yaml").returncode == 0
    assert align("run", "p.yaml", "a").returncode == 0 and manifest(chain)["stages"]["a"]["status"] == "done"


def test_two_runs_of_different_stages_share_the_manifest(chain: Path):
    (chain / "p.yaml").write_text("name: toys\nstages:\n  a: {type: toy, sleep: 0.4}\n  b: {type: toy, rate: 2}\n")
    first, second = start(chain, "run", "p.yaml", "a"), start(chain, "run", "p.yaml", "b")
    for process in (first, second):
        process.communicate(timeout=60)
    assert set(manifest(chain)["stages"]) == {"a", "b"}


def test_a_metric_that_is_not_finite_fails_the_stage(align: Align, chain: Path):
    result = align("run", "p.yaml", "a", "--set", "stages.a.rate=1e308", "--set", "stages.a.steps=3")
    assert result.returncode == 1 and "total is inf: the model diverged" in result.stderr
