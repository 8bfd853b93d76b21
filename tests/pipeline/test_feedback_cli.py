"""`align feedback` and `align forget`: what they print and write, and their exit codes."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align_pipeline.data.feedback.keys import user_hash
from align_pipeline.pipeline.cli import app
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.stages.feedback import Feedback
from harness import align
from thumbs import rating


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *events: Any) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")
    return name


def run(*arguments: str) -> tuple[int, str]:
    """Run `align`; return its exit code and all that a user reads."""
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception
    if isinstance(error, AlignError):
        return error.exit_code, f"{result.output}{error}\n"
    assert error is None or isinstance(error, SystemExit), repr(error)
    return result.exit_code, result.output


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


PAIR = [rating(1, "A", "ann"), rating(-1, "B", "bob")]
CROWD = [rating(1, f"answer {i}", f"u{i}", f"question {i} of many") for i in range(30)]


def test_rows_are_written_and_the_next_step_is_said() -> None:
    log = write("log.jsonl", *PAIR, *CROWD, rating(-1, "no", "eve", "why so"))
    code, said = run("feedback", log, "-o", "out")
    assert code == 0, said
    assert "log.jsonl read as events: records have event_type" in said
    assert "33 events read, 33 used" in said and "pairs: 1 to train on" in said
    assert "  dpo: {type: dpo, policy: stage:sft, data: file:out/pairs.train.jsonl" in said
    assert (
        "  kto: {type: kto, policy: stage:sft, data: file:out/unpaired.train.jsonl" in said
        and "undesirable_weight: " in said
    )
    assert [row["chosen"][0]["content"] for row in rows("out/pairs.train.jsonl")] == ["A"]
    assert Path("out/report.md").read_text("utf-8").startswith("# Feedback\n")
    assert not list(Path().glob(".*")), "nothing is left beside the folder"


def test_the_command_starts_no_torch_and_says_how_far_it_is() -> None:
    write("log.jsonl", *PAIR)
    code = (
        "import sys\nsys.argv = ['align', 'feedback', 'log.jsonl', '-o', 'out']\n"
        "from align_pipeline.pipeline.cli import main\nmain()\n"
    )
    watched = (
        f"{code}"
        if False
        else code.replace(
            "main()\n",
            "try:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n",
        )
    )
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n"), done.stdout


def test_a_second_conversion_replaces_the_first_and_nothing_else() -> None:
    run("feedback", write("log.jsonl", *PAIR), "-o", "out")
    Path("out/notes.txt").write_text("mine", "utf-8")
    code, said = run("feedback", write("other.jsonl", *CROWD), "-o", "out")
    assert code == 0, said
    assert not Path("out/pairs.train.jsonl").exists() and Path("out/notes.txt").read_text("utf-8") == "mine"


def test_what_fails_leaves_the_rows_that_were_there() -> None:
    run("feedback", write("log.jsonl", *PAIR), "-o", "out")
    before = Path("out/pairs.train.jsonl").read_bytes()
    code, said = run("feedback", write("odd.jsonl", {"a": 1}), "-o", "out")
    assert code == 2 and "odd.jsonl: no log that is known (records have a)" in said
    assert Path("out/pairs.train.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["log.jsonl", "-o", "out", "--set", "min_confidence=2"], 2, "min_confidence: must be less than 1, got 2"),
        (["log.jsonl", "-o", "out", "--set", "pi=off"], 2, "pi: unknown setting; did you mean pii?"),
        (["log.jsonl", "-o", "out", "--format", "openwebi"], 2, "format: must be 'events', 'openwebui'"),
        (["log.jsonl", "-o", "out", "--column", "prompt"], 2, "--column prompt: must be a name, = and what"),
        (["nothing.jsonl", "-o", "out"], 3, "nothing.jsonl: does not exist; give the path of a log"),
        (["log.docx", "-o", "out"], 3, "log.docx: suffix .docx is not readable"),
        (["empty", "-o", "out"], 3, "empty: a folder without logs; logs end in .jsonl"),
        (["blank.jsonl", "-o", "out"], 3, "no rows from 0 events; report.md says what became of them"),
        (["log.jsonl", "-o", "log.jsonl"], 2, "--out log.jsonl: is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments: list[str], code: int, said: str) -> None:
    write("log.jsonl", *PAIR)
    write("log.docx", *PAIR)
    write("blank.jsonl")
    Path("empty").mkdir()
    found, text = run("feedback", *arguments)
    assert (found, said in text) == (code, True), text
    assert not Path("out/pairs.train.jsonl").exists()


def test_every_scale_that_is_offered_can_be_typed() -> None:
    columns = ["--column", "prompt=prompt", "--column", "response=response", "--column", "label=label"]
    log = write("log.jsonl", *(rating(1, "A", f"u{i}", f"prompt {i}") for i in range(3)))
    code, said = run("feedback", log, "-o", "out", *columns)
    offered = said.rpartition("rating_scale: one of ")[2].strip().split(", ")
    assert code == 2 and len(offered) == 4
    for scale in offered:
        code, said = run("feedback", log, "-o", f"out-{scale}", *columns, "--set", f"rating_scale={scale}")
        assert code == 0, said


def test_too_many_invalid_events_are_an_error_but_the_rows_are_there() -> None:
    bad = [{**rating(1, "A", f"u{i}"), "label": "meh"} for i in range(3)]
    code, said = run("feedback", write("log.jsonl", *PAIR, *bad), "-o", "out")
    assert code == 3 and "60.0% of the events are invalid, max_invalid_share allows 0.05" in said
    assert "log.jsonl:3: label: text ('meh'), is not a known rating" in said
    assert len(rows("out/pairs.train.jsonl")) == 1 and len(rows("out/rejects.jsonl")) == 3
    assert run("feedback", "log.jsonl", "-o", "out", "--set", "max_invalid_share=0.7")[0] == 0


def test_no_file_names_a_user_and_the_salt_is_private() -> None:
    run("feedback", write("log.jsonl", *PAIR, *CROWD), "-o", "out")
    secret = Path("runs/private/salt")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    name = user_hash("ann", bytes.fromhex(secret.read_text("ascii")))
    for path in Path("out").iterdir():
        text = path.read_text("utf-8")
        assert '"ann"' not in text and name not in text, path
    (lineage,) = Path("runs/private/lineage").iterdir()
    assert stat.S_IMODE(lineage.stat().st_mode) == 0o600


# As a stage.

PIPELINE = 'name: shop\nstages:\n  feedback:\n    type: feedback\n    logs: file:logs\n    pii: "off"\n'


def test_a_stage_makes_the_rows_of_the_command_once(tmp_path: Path) -> None:
    write("logs/a.jsonl", *PAIR)
    write("logs/b.jsonl", *CROWD)
    Path("pipeline.yaml").write_text(PIPELINE, "utf-8")
    first = align(tmp_path, "run", "pipeline.yaml")
    assert "logs/a.jsonl read as events: records have event_type" in first
    assert run("feedback", "logs", "-o", "out", "--set", "pii=off")[0] == 0
    made = tmp_path / "runs/shop/feedback"
    for name in ("pairs.train", "unpaired.train", "unpaired.test"):
        assert (made / f"{name}.jsonl").read_bytes() == Path(f"out/{name}.jsonl").read_bytes()
    record = json.loads((made / "artifact.json").read_text("utf-8"))
    assert set(record["metrics"]) <= set(Feedback(logs="file:log.jsonl").measures())
    assert record["metrics"]["pairs_train"] == 1 and record["data"]["logs"]["events"]["used"] == 32
    assert "cached" in align(tmp_path, "plan", "pipeline.yaml")


def test_a_stage_without_rows_fails_with_the_reason(tmp_path: Path) -> None:
    write("logs/a.jsonl", rating(0, "A"))
    Path("pipeline.yaml").write_text(PIPELINE, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "align_pipeline.pipeline.cli", "run", "pipeline.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 3 and "no rows from 1 event; report.md says what became of it" in done.stderr, done.stderr


# Forgetting.


def test_a_forgotten_user_leaves_every_row_and_every_later_conversion(tmp_path: Path) -> None:
    two_one = [rating(1, "C", "ann", "many"), rating(1, "C", "u1", "many"), rating(-1, "C", "u2", "many")]
    three = [rating(1, "D", user, "more") for user in ("ann", "u1", "u2")]
    write("logs/a.jsonl", *PAIR, *two_one, *three, rating(-1, "E", "u3", "else"))
    Path("pipeline.yaml").write_text(PIPELINE.replace("pii", "test: 0\n    pii"), "utf-8")
    align(tmp_path, "run", "pipeline.yaml")
    assert run("feedback", "logs", "-o", "out", "--set", "test=0")[0] == 0
    assert len(rows("out/pairs.train.jsonl")) == 1 and len(rows("out/unpaired.train.jsonl")) == 3

    code, said = run("forget", "ann")
    assert code == 0, said
    assert "out: 2 rows removed, 1 counted again without them" in said
    for folder in ("out", "runs/shop/feedback"):
        assert not Path(folder, "pairs.train.jsonl").exists()
        left = {row["completion"][0]["content"]: row for row in rows(f"{folder}/unpaired.train.jsonl")}
        assert sorted(left) == ["D", "E"] and (left["D"]["fb_up"], left["D"]["fb_users"]) == (2, 2)
        assert left["D"]["fb_confidence"] == 0.75  # (1 + 2) / (2 + 2)
        report = json.loads(Path(folder, "report.json").read_text("utf-8"))
        assert report["rows"] == {"unpaired.train": 2}
        assert report["forgotten"] == {"users": 1, "removed": 2, "changed": 1}
        told = Path(folder, "report.md").read_text("utf-8")
        assert "1 user was forgotten: 2 rows were removed since and 1 counted again;" in told
    assert "cached" in align(tmp_path, "plan", "pipeline.yaml"), "the stage itself is up to date"

    anew = run("feedback", "logs", "-o", "anew", "--set", "test=0")
    assert anew[0] == 0 and "3 tombstoned" in anew[1]
    fresh = {row["completion"][0]["content"] for row in rows("anew/unpaired.train.jsonl")}
    assert fresh == {"B", "D", "E"}  # without ann's vote bob's has no counterpart any more
    again = run("forget", "ann")
    assert again[0] == 0 and "no model of this store" in again[1]


def test_models_that_learnt_the_rows_are_named_however_far_down(tmp_path: Path) -> None:
    write("logs/a.jsonl", *PAIR, *CROWD)
    Path("pipeline.yaml").write_text(PIPELINE, "utf-8")
    align(tmp_path, "run", "pipeline.yaml")
    made = (tmp_path / "runs/shop/feedback").resolve()
    digest = json.loads((made / "artifact.json").read_text("utf-8"))["digest"]
    for key, read, own in (
        ("dpo-1", digest, "sha256:1"),
        ("ppo-2", "sha256:1", "sha256:2"),
        ("sft-3", "git:x", "sha256:3"),
    ):
        record = {"stage": key[:3], "kind": "model", "digest": own, "inputs": {"data": {"digest": read}}}
        folder = made.parent / key
        folder.mkdir()
        (folder / "artifact.json").write_text(json.dumps(record), "utf-8")
    code, said = run("forget", "ann")
    assert code == 0, said
    assert "model dpo-1" in said and "model ppo-2" in said and "sft-3" not in said
    assert "their weights are as they were" in said


def test_forgetting_needs_a_store_that_knows_people() -> None:
    code, said = run("forget", "ann")
    assert code == 3 and "no feedback was read with this store" in said


def test_an_id_that_nobody_has_does_not_look_like_success() -> None:
    assert run("feedback", write("log.jsonl", *PAIR, *CROWD), "-o", "out")[0] == 0
    for _ in range(2):
        code, said = run("forget", "anne")
        assert code == 3 and "USER anne: no rows that are known here rest on the words of this user" in said
    assert len(rows("out/pairs.train.jsonl")) == 1
    assert run("forget", "ann")[0] == 0 and run("forget", "ann")[0] == 0


def test_forgetting_touches_no_file_but_those_of_the_rows(tmp_path: Path) -> None:
    write("log.jsonl", *PAIR, *CROWD)
    Path("notes.txt").write_text("mine", "utf-8")
    assert run("feedback", "log.jsonl", "-o", ".")[0] == 0
    assert run("forget", "ann")[0] == 0
    assert Path("notes.txt").read_text("utf-8") == "mine" and Path("log.jsonl").exists()
    assert not Path("pairs.train.jsonl").exists() and len(rows("unpaired.train.jsonl")) > 20
    Path("real").mkdir()
    Path("link").symlink_to("real")
    run("feedback", "log.jsonl", "-o", "link")
    assert run("forget", "u3")[0] == 0
    assert Path("link").is_symlink() and "answer 3" not in Path("real/unpaired.train.jsonl").read_text("utf-8")


def test_models_of_earlier_rows_are_named_too(tmp_path: Path) -> None:
    write("logs/a.jsonl", *PAIR, *CROWD)
    Path("pipeline.yaml").write_text(PIPELINE, "utf-8")
    align(tmp_path, "run", "pipeline.yaml")
    made = (tmp_path / "runs/shop/feedback").resolve()
    digest = json.loads((made / "artifact.json").read_text("utf-8"))["digest"]
    record = {"stage": "dpo", "kind": "model", "digest": "sha256:1", "inputs": {"data": {"digest": digest}}}
    (made.parent / "dpo-1").mkdir()
    (made.parent / "dpo-1" / "artifact.json").write_text(json.dumps(record), "utf-8")
    for user in ("ann", "u3", "ann"):  # the rows are others after the first, the model is not
        assert "model dpo-1" in run("forget", user)[1], user


def test_people_behind_equal_rows_are_told_apart(tmp_path: Path) -> None:
    run("feedback", write("named.jsonl", *PAIR, *CROWD), "-o", "named")
    nameless = [{key: value for key, value in event.items() if key != "user_id"} for event in (*PAIR, *CROWD)]
    run("feedback", write("nameless.jsonl", *nameless), "-o", "nameless")
    assert Path("named/pairs.train.jsonl").read_bytes() == Path("nameless/pairs.train.jsonl").read_bytes()
    assert "named: 1 rows removed" in run("forget", "ann")[1]
    assert not Path("named/pairs.train.jsonl").exists() and Path("nameless/pairs.train.jsonl").exists()


def test_raw_text_of_a_forgotten_user_is_not_kept(tmp_path: Path) -> None:
    bad = {**rating(1, "A", "mallory"), "label": "SECRET"}
    run("feedback", write("log.jsonl", *PAIR, *CROWD, bad), "-o", "out")
    assert "mallory" in Path("out/rejects.jsonl").read_text("utf-8")
    assert run("forget", "mallory")[0] == 0
    for path in Path("out").iterdir():
        text = path.read_text("utf-8")
        assert "mallory" not in text and "SECRET" not in text, path


def test_a_moved_folder_is_found_by_its_rows_and_a_foreign_one_refused(tmp_path: Path) -> None:
    run("feedback", write("log.jsonl", *PAIR, *CROWD), "-o", "out")
    Path("out").rename("moved")
    assert "warning: out: no rows there any more" in run("forget", "u1")[1]
    assert "moved: " in run("forget", "ann", "moved")[1] and not Path("moved/pairs.train.jsonl").exists()
    run("feedback", write("more.jsonl", *CROWD[:9]), "-o", "other", "--store", "elsewhere")
    code, said = run("forget", "u2", "other")
    assert code == 3 and "other: nothing is known of rows in it" in said


def test_a_broken_folder_does_not_keep_the_others_from_being_rewritten(tmp_path: Path) -> None:
    log = write("log.jsonl", *PAIR, *CROWD)
    run("feedback", log, "-o", "one")
    run("feedback", log, "-o", "two")
    Path("one/report.json").write_text("{", "utf-8")
    code, said = run("forget", "ann")
    assert code == 1 and "one: cannot be rewritten" in said
    assert not Path("two/pairs.train.jsonl").exists()


def test_logs_and_foreign_files_are_never_written_over() -> None:
    write("mine/unpaired.test.jsonl", *PAIR)
    code, said = run("feedback", "mine/unpaired.test.jsonl", "-o", "mine")
    assert code == 2 and "unpaired.test.jsonl in it is one of the logs" in said
    Path("mine/report.md").write_text("my own report", "utf-8")
    code, said = run("feedback", write("log.jsonl", *PAIR), "-o", "mine")
    assert code == 2 and "which no conversion wrote" in said
    assert Path("mine/report.md").read_text("utf-8") == "my own report"


def test_odd_names_of_folders_are_names() -> None:
    code, said = run("feedback", write("John's [1] data*/log.jsonl", *PAIR, *CROWD), "-o", "John's [1] data*/a, b: {c}")
    assert code == 0, said
    assert len(rows("John's [1] data*/a, b: {c}/pairs.train.jsonl")) == 1
    assert 'data: "file:John\'s [1] data*/a, b: {c}/pairs.train.jsonl"' in said
    assert run("forget", "ann")[0] == 0
    assert not Path("John's [1] data*/a, b: {c}/pairs.train.jsonl").exists()


def test_what_a_killed_conversion_left_is_cleared_away() -> None:
    Path(".out.making-999999999").mkdir()
    assert run("feedback", write("log.jsonl", *PAIR), "-o", "out")[0] == 0
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_told_to_end_leaves_nothing(sign: signal.Signals) -> None:
    write("log.jsonl", *(rating(1, f"answer {i} " * 100, f"u{i}", f"question {i}") for i in range(20_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "align_pipeline.pipeline.cli", "feedback", "log.jsonl", "-o", "out"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(Path().glob(".out.making-*/scratch/index/*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; nothing was written" in said
    assert not list(Path().glob(".out*")) and not Path("out").exists()


def test_files_of_two_conversions_never_lie_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("feedback", write("one.jsonl", *PAIR, *CROWD), "-o", "out")[0] == 0

    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)  # what is moved file by file can be half moved
    assert run("feedback", write("two.jsonl", *CROWD), "-o", "out")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "report.json", "report.md", "unpaired.test.jsonl", "unpaired.train.jsonl"
    ]  # fmt: skip
    assert not list(Path().glob(".out*"))


def test_columns_and_a_format_are_not_both_given() -> None:
    write("log.jsonl", *PAIR)
    code, said = run("feedback", "log.jsonl", "-o", "out", "--format", "events", "--column", "prompt=prompt")
    assert code == 2 and "columns: cannot be mapped with format: events, which names its own; leave one out" in said


def test_the_printed_lines_are_stages(tmp_path: Path) -> None:
    from align_pipeline.pipeline.config import load

    _, said = run("feedback", write("log.jsonl", *PAIR, *CROWD, rating(-1, "no", "eve", "why so")), "-o", "out")
    printed = said.split("train on them with\n")[1].split("report: ")[0]
    write("sft.jsonl", {})
    Path("base").mkdir()
    text = f"name: a\nmodel: file:base\nstages:\n  sft: {{type: sft, data: file:sft.jsonl}}\n{printed}"
    Path("p.yaml").write_text(text, "utf-8")
    assert list(load(Path("p.yaml")).stages) == ["sft", "dpo", "kto"]
