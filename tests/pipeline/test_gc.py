"""What nothing leads to goes, and nothing else: of every kind one that stays and one that goes."""

import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from align_pipeline.pipeline import gc
from harness import Align, start

PIPELINE = """\
name: toys
stages:
  a: {type: toy, rate: 0.5}
  b: {type: toy, model: stage:a, rate: 2.0}
"""


@pytest.fixture
def folder(align: Align, tmp_path: Path) -> Path:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    assert align("run", "p.yaml").returncode == 0
    return tmp_path


def keys(folder: Path) -> dict[str, str]:
    stages = json.loads((folder / "runs" / "toys" / "manifest.json").read_text())["stages"]
    return {name: entry.get("artifact", entry.get("work")) for name, entry in stages.items()}


def held(folder: Path, where: str = "store") -> set[str]:
    return {path.name for path in (folder / "runs" / where).iterdir()}


def bytes_of(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def test_a_store_in_use_holds_nothing_to_delete(align: Align, folder: Path):
    done = align("gc", "--delete")
    assert (done.returncode, done.stdout) == (0, "0 bytes freed\n"), done.stdout + done.stderr
    assert len(held(folder)) == 2


def test_artifacts_that_no_manifest_leads_to_are_listed_and_deleted_when_asked(align: Align, folder: Path):
    before = keys(folder)
    assert align("run", "p.yaml", "--set", "stages.b.rate=3.0").returncode == 0
    assert align("gc").stdout.startswith("0 bytes"), "the file still plans the one of before"
    (folder / "p.yaml").write_text(PIPELINE.replace("rate: 2.0", "rate: 3.0"))
    old = folder / "runs" / "store" / before["b"]
    size = bytes_of(old)
    listed = align("gc")
    assert listed.stdout.splitlines() == [
        f"runs/store/{before['b']}  {size:,} bytes  no manifest leads to it",
        f"{size:,} bytes would be freed; --delete does it",
    ]
    assert len(held(folder)) == 3
    done = align("gc", "--delete")
    assert done.stdout.splitlines()[-1] == f"{size:,} bytes freed" and done.returncode == 0
    assert held(folder) == {before["a"], keys(folder)["b"]}
    assert align("verify").returncode == 0
    assert align("run", "p.yaml").stdout.count("cached") == 2


def test_what_a_kept_artifact_was_made_from_is_kept_by_its_content(align: Align, folder: Path):
    """`b` rests on the `a` of before, which --force moved aside; the new one, and its stage, the file has left."""
    a, b = keys(folder)["a"], keys(folder)["b"]
    store = folder / "runs" / "store"
    record = json.loads((store / a / "artifact.json").read_text())
    (store / a).rename(store / f"{a}~1")
    (store / a).mkdir()
    (store / a / "artifact.json").write_text(json.dumps({**record, "digest": "sha256:" + "0" * 64, "files": {}}))
    path = folder / "runs" / "toys" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stages"]["a"]
    path.write_text(json.dumps(manifest))
    (folder / "p.yaml").write_text("name: toys\nstages:\n  b: {type: toy, rate: 4.0}\n")
    assert align("gc", "--delete").returncode == 0
    assert held(folder) == {f"{a}~1", b}


def killed(folder: Path, *arguments: str) -> str:
    """Kill a run in its first step and return the work directory that it left."""
    before = held(folder, "work")
    process = start(folder, "run", *arguments)
    while not (fresh := [name for name in held(folder, "work") - before if _begun(folder, name)]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    time.sleep(0.2)  # its worker dies with it
    return fresh[0]


def _begun(folder: Path, name: str) -> bool:
    log = folder / "runs" / "work" / name / "progress.jsonl"
    return log.exists() and len(log.read_text().splitlines()) > 1


def test_work_that_the_file_plans_stays_and_other_work_goes(align: Align, folder: Path):
    slow = ["--set", "stages.b.sleep=0.3", "--set", "stages.b.rate=7.0"]
    unplanned = killed(folder, "p.yaml", *slow)
    (folder / "p.yaml").write_text(PIPELINE.replace("rate: 2.0", "rate: 5.0, sleep: 0.3"))
    planned = killed(folder, "p.yaml")
    assert held(folder, "work") == {unplanned, planned}
    done = align("gc", "--delete")
    assert f"runs/work/{unplanned}" in done.stdout and planned not in done.stdout
    assert held(folder, "work") == {planned}
    resumed = align("run", "p.yaml")
    assert "resume" in resumed.stdout + resumed.stderr and resumed.returncode == 0


def test_the_first_stage_of_a_run_that_was_killed_is_planned_work(align: Align, tmp_path: Path):
    (tmp_path / "p.yaml").write_text("name: toys\nstages:\n  a: {type: toy, sleep: 0.3}\n")
    (tmp_path / "runs" / "work").mkdir(parents=True)
    work = killed(tmp_path, "p.yaml")
    assert align("gc", "--delete").stdout == "0 bytes freed\n"
    assert held(tmp_path, "work") == {work}


def test_work_of_a_stage_whose_key_is_not_known_yet_is_kept(align: Align, folder: Path):
    """What it reads must be made again first; with the same content its work goes on."""
    (folder / "p.yaml").write_text(PIPELINE.replace("rate: 2.0", "rate: 5.0, sleep: 0.3"))
    work = killed(folder, "p.yaml")
    shutil.rmtree(folder / "runs" / "store" / keys(folder)["a"])
    assert "waits" in align("plan", "p.yaml").stdout
    align("gc", "--delete")
    assert work in held(folder, "work")
    assert "resume" in (done := align("run", "p.yaml")).stderr + done.stdout


def test_work_is_kept_when_the_file_cannot_be_planned(align: Align, folder: Path):
    work = killed(folder, "p.yaml", "--set", "stages.b.sleep=0.3", "--set", "stages.b.rate=7.0")
    (folder / "p.yaml").rename(folder / "moved.yaml")
    done = align("gc", "--delete")
    assert "note: work directories are kept, as p.yaml cannot be planned" in done.stdout
    assert held(folder, "work") == {work} and len(held(folder)) == 2


def test_a_held_lock_keeps_what_it_guards(align: Align, folder: Path):
    before = keys(folder)["b"]
    (folder / "p.yaml").write_text(PIPELINE.replace("rate: 2.0", "rate: 3.0"))
    assert align("run", "p.yaml").returncode == 0
    with (folder / "runs" / "locks" / before).open("a+") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        done = align("gc", "--delete")
        assert f"kept: runs/store/{before}, running now: " in done.stdout and "0 bytes freed" in done.stdout
        assert before in held(folder)
    with (folder / "runs" / "locks" / f"{before}.worker").open("a+") as lock:  # a worker that outlives its run
        fcntl.flock(lock.fileno(), fcntl.LOCK_SH)
        done = align("gc", "--delete")
        assert f"kept: runs/store/{before}, " in done.stdout and before in held(folder)
    assert align("gc", "--delete").returncode == 0 and before not in held(folder)


def test_a_running_stage_and_what_it_reads_are_never_touched(align: Align, folder: Path):
    """Its settings stand in no file and in no manifest: only its lock says that it is wanted."""
    old = held(folder)
    process = start(folder, "run", "p.yaml", "--set", "stages.a.rate=9.0", "--set", "stages.b.sleep=0.5")
    while not any("stage:a" in path.read_text() for path in (folder / "runs" / "work").glob("*/job.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (read,) = held(folder) - old
    nothing = {"schema": 1, "pipeline": "toys", "config": str(folder / "p.yaml"), "stages": {}}
    (folder / "runs" / "toys" / "manifest.json").write_text(json.dumps(nothing))
    assert align("gc", "--delete").stdout == "0 bytes freed\n"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert {read, *old} < held(folder) and align("verify").returncode == 0


def test_left_over_temporary_names_go_once_nobody_writes_them(align: Align, folder: Path):
    runs = folder / "runs"
    (runs / "store" / ".toy-1.deleting").mkdir()
    (runs / "store" / ".toy-1.deleting" / "half.bin").write_bytes(bytes(1000))
    (runs / "toys" / ".manifest.json.4242").write_text("{")
    (runs / "locks" / ".probe-4242").touch()
    (runs / "store" / ".alone.forgetting").mkdir()  # the artifact itself is not there: these are the only rows
    (runs / "private").mkdir()
    (runs / "private" / ".salt.4242").write_text("secret")
    (runs / "toys" / ".lock").touch()
    assert "0 bytes would be freed" in align("gc").stdout, "they are young"
    hour_ago = time.time() - gc.STALE_SECONDS - 5
    for path in [*runs.rglob(".*")]:
        os.utime(path, (hour_ago, hour_ago))
    done = align("gc", "--delete")
    assert done.stdout.splitlines()[-1] == "1,001 bytes freed"
    left = {path.name for path in runs.rglob(".*")}
    assert left == {".lock", ".alone.forgetting", ".salt.4242", ".progress.jsonl"}, "an artifact keeps its log"


def test_links_to_what_was_deleted_go_too(align: Align, folder: Path):
    (folder / "p.yaml").write_text("name: toys\nstages:\n  a: {type: toy, rate: 0.5}\n")
    assert align("run", "p.yaml").returncode == 0
    assert (folder / "runs" / "toys" / "b").is_symlink()
    align("gc", "--delete")
    assert {path.name for path in (folder / "runs" / "toys").iterdir()} == {
        ".lock", "a", "manifest.json", "report.html",
    }  # fmt: skip


def test_without_a_sound_manifest_nothing_is_deleted(align: Align, folder: Path):
    manifest = folder / "runs" / "toys" / "manifest.json"
    manifest.write_text("{")
    done = align("gc", "--delete")
    assert done.returncode == 3 and "damaged, so nothing says which artifacts are wanted" in done.stderr
    manifest.unlink()
    done = align("gc", "--delete")
    assert done.returncode == 3 and "no manifest in it" in done.stderr
    assert len(held(folder)) == 2


def test_a_file_of_the_same_name_elsewhere_plans_nothing_here(align: Align, folder: Path):
    other = folder / "other"
    other.mkdir()
    (other / "p.yaml").write_text("name: others\nstages:\n  a: {type: toy, rate: 7.0}\n")
    work = folder / "runs" / "work" / keys(folder)["b"]
    (work / "scratch").mkdir(parents=True)
    (folder / "p.yaml").write_text(PIPELINE.replace("rate: 2.0", "rate: 2.0, steps: 5"))
    planned = next(line for line in align("plan", "p.yaml").stdout.splitlines() if line.startswith("b "))
    assert " run " in planned
    (folder / "p.yaml").write_text(PIPELINE)
    assert align("gc", "--store", "../runs", "--delete", folder=other).returncode == 0
    assert work.is_dir(), "p.yaml of the folder above plans it"


def test_two_files_of_one_name_are_refused_before_one_takes_the_other_s_place(align: Align, folder: Path):
    before = keys(folder)
    (folder / "other.yaml").write_text("name: toys\nstages:\n  c: {type: toy}\n")
    for command in ("run", "plan"):
        done = align(command, "other.yaml")
        assert done.returncode == 2
        assert done.stderr.startswith("other.yaml: name: 'toys' is p.yaml's in runs; write another `name:` in one of")
    for command in (("show", "other.yaml"), ("export", "other.yaml:c", "-o", "out"), ("report", "other.yaml")):
        done = align(*command)
        assert done.returncode == 2 and "is p.yaml's in runs" in done.stderr, done.stdout + done.stderr
    assert keys(folder) == before
    (folder / "p.yaml").rename(folder / "moved.yaml")
    done = align("run", "moved.yaml")
    assert done.stdout.count("cached") == 2, "a file may move"
    assert done.stderr == "note: 'toys' in runs was the pipeline of p.yaml, which is not there any more\n"
    assert align("run", "moved.yaml").stderr == ""


def test_a_stage_that_a_gate_holds_back_does_not_keep_gc_from_its_work(align: Align, folder: Path):
    path = folder / "runs" / "toys" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["stages"]["c"] = {"status": "blocked", "gates": [], "error": "too low", "continue": "align run p.yaml"}
    path.write_text(json.dumps(manifest))
    done = align("gc")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0 bytes would be freed; --delete does it"), (
        done.stderr
    )


def test_a_comparison_keeps_no_work_directory(align: Align, folder: Path):
    compared = folder / "runs" / ".compare"
    compared.mkdir()
    entry = {"status": "done", "artifact": keys(folder)["a"], "metrics": {}, "seconds": 1.0}
    head = {"schema": 1, "pipeline": ".compare", "config": "/nowhere/.compare", "stages": {"compare": entry}}
    (compared / "manifest.json").write_text(json.dumps(head))
    (folder / "runs" / "work" / "evaluate-000000000000").mkdir()
    done = align("gc", "--delete")
    assert done.returncode == 0 and "note" not in done.stdout
    assert held(folder, "work") == set()


def test_a_comparison_s_manifest_says_nothing_of_other_models(align: Align, folder: Path):
    entry = {"status": "done", "artifact": keys(folder)["a"], "metrics": {}, "seconds": 1.0}
    head = {"schema": 1, "pipeline": ".compare", "config": "/nowhere/.compare", "stages": {"compare": entry}}
    (folder / "runs" / ".compare").mkdir()
    (folder / "runs" / ".compare" / "manifest.json").write_text(json.dumps(head))
    (folder / "runs" / "toys" / "manifest.json").unlink()
    before = held(folder)
    done = align("gc", "--delete")
    assert done.returncode == 3 and "runs/toys: no manifest in it" in done.stderr and held(folder) == before
    shutil.rmtree(folder / "runs" / "toys")
    done = align("gc", "--delete")
    assert done.returncode == 3 and "runs: no manifest in it" in done.stderr and held(folder) == before
