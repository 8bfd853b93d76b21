"""A crash report holds what a maintainer needs, and none of the secrets that lie where a crash could meet them."""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline import report_bug
from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.report_bug import find_failure, report
from align_pipeline.pipeline.stage import Launch, Resolved
from align_pipeline.pipeline.store import Store
from align_pipeline.stages.sft import SFT
from harness import Align

MACHINE = {"torch": "2.13.0+cpu", "cuda": None, "devices": []}
KEY = "sft-0123456789ab"

SECRETS = {
    "an environment variable": "correct-horse-battery",
    "a token in the settings": "hf_AbCdEfGhIjKlMnOpQrStUv",
    "a path at home": "/home/carol/projects",
    "a user's name": "carol",
    "a column's name": "patient_diagnosis",
    "a file's name": "merger_plans",
    "a row in a message": "my sister told me in confidence",
    "a row that looks like a frame": "dear_diary",
    "an address with a password": "hunter2hunter2",
    "the host": "vault-of-acme",
    "an e-mail address": "carol@acme.example",
    "a key in a line of the user's code": "sk-proj-0123456789abcdef",
    "a function of the user's": "score_by_salary",
    "an exception of the user's": "AcmeLayoffError",
    "a signed token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYXJvbCJ9.c2lnbmF0dXJl",
}


@pytest.fixture
def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a store with an SFT stage that crashed, a secret at every turn."""
    secret = SECRETS
    monkeypatch.setenv("LOGNAME", secret["a user's name"])
    monkeypatch.setenv("ACME_PASSWORD", secret["an environment variable"])
    monkeypatch.setattr(socket, "gethostname", lambda: secret["the host"])
    model = tmp_path / "merger_plans"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "hidden_size": 64, "vocab_size": 512, "_name_or_path": "/home/carol/projects"}
        )
    )
    stage = SFT(
        data="file:merger_plans.jsonl",
        model="file:merger_plans",
        schedule="linear",
        batch_size=4,
        columns={"prompt": secret["a column's name"]},
        train={"optim_args": secret["a token in the settings"], "adam_beta2": 0.95},
        how={"micro_batch": 2, "train": {"run_name": "carol at acme"}},
        require={"loss": "< 3"},
    )
    inputs = {
        "model": Resolved(ref="file:/home/carol/projects/merger_plans", digest="sha256:0", path=str(model)),
        "data": Resolved(
            ref="file:merger_plans.jsonl", digest="sha256:1", path="/home/carol/projects/merger_plans.jsonl"
        ),
    }
    work = tmp_path / "runs" / "work" / KEY
    work.mkdir(parents=True)
    (work / "job.json").write_text(
        json.dumps(
            {
                "stage": stage.model_dump(mode="json", exclude={"require"}),
                "inputs": {name: one.model_dump(mode="json") for name, one in inputs.items()},
                "launch": Launch().model_dump(mode="json"),
            }
        )
    )
    point = {"step": 3, "total": 40, "at": 1.0, "pid": 1, "cpu_seconds": 1.0, "peak_memory_bytes": 2**30}
    (work / "progress.jsonl").write_text(json.dumps(point) + "\n")
    (work / "log.txt").write_text(_log())
    return Store(tmp_path / "runs")


def _log() -> str:
    import pydantic

    ours, theirs, python = report_bug.__file__, pydantic.main.__file__, json.decoder.__file__
    return f"""\
$ python -m align_pipeline.pipeline.worker /home/carol/projects/runs/work/{KEY}
ValueError: of an attempt before
$ python -m align_pipeline.pipeline.worker /home/carol/projects/runs/work/{KEY}
a warning about my sister told me in confidence
Traceback (most recent call last):
  File "{python}", line 355, in raw_decode
    obj, end = self.scan_once(s, idx)
               ^^^^^^^^^^^^^^^^^^^^^^
StopIteration: my sister told me in confidence
  File "/home/carol/projects/dear_diary.py", line 3, in dear_diary

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/carol/projects/merger_plans.py", line 12, in score_by_salary
    client = Client("sk-proj-0123456789abcdef")
merger_plans.AcmeLayoffError: carol@acme.example

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "{ours}", line 1, in main
    metrics = stage.run(inputs, work, "sk-proj-0123456789abcdef")
  File "{theirs}", line 253, in __init__
    validated_self = self.__pydantic_validator__.validate_python(data)
  File "/home/carol/projects/merger_plans.py", line 14, in score_by_salary
    raise ValueError("my sister told me in confidence")
ValueError: could not convert 'my sister told me in confidence' of /home/carol/projects/merger_plans.jsonl to float
see https://carol:hunter2hunter2@vault-of-acme/x, hf_AbCdEfGhIjKlMnOpQrStUv, carol@acme.example
StageFailed: ValueError: could not convert 'my sister told me in confidence'
"""


def test_nothing_told_in_confidence_is_in_it_and_what_a_maintainer_needs_is(crashed: Store):
    text = report(find_failure(crashed, KEY[:8]), MACHINE)
    assert [what for what, secret in SECRETS.items() if secret.lower() in text.lower()] == []
    for word in ("sister", "acme", "https", "/home", str(crashed.root)):
        assert word not in text
    assert text.startswith("# SFT: ValueError\n")
    for needed in (
        "- torch: 2.13",
        "- torch works: 2.13.0+cpu, built with no CUDA",
        "- type sft, version ",
        "- step 3 of 40, attempt 1, 0 s in all",
        "- peak memory 1,024 MiB",
        "- `model`: a folder (llama, hidden_size 64, vocab_size 512)",
        "- `data`: a .jsonl file",
        '  File "align_pipeline/pipeline/report_bug.py", line 1, in main\n    """`align report-bug`',
        '  File "pydantic/main.py", line 253, in __init__\n  File <other code>\nValueError: <message of ',
        '  File "python/json/decoder.py", line 355, in raw_decode\nStopIteration: <message of ',
        "  File <other code>\n<exception of other code>: <message of ",
        "\nDuring handling of the above exception, another exception occurred:\n",
    ):
        assert needed in text, needed
    assert "attempt before" not in text
    told = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert told == {
        "schedule": "linear",
        "batch_size": 4,
        "columns": {"name 1": "<text of 17 characters>"},
        "train": {"optim_args": "<text of 25 characters>", "adam_beta2": 0.95},
        "how": {"micro_batch": 2, "train": {"run_name": "<text of 13 characters>"}},
    }


def test_a_message_is_added_only_when_asked_for_and_masked_then(crashed: Store):
    text = report(find_failure(crashed, KEY), MACHINE, with_message=True)
    assert "ValueError: could not convert <text of 31 characters> of <text of " in text and "> to float\n" in text
    for what in (
        "an address with a password",
        "a token in the settings",
        "an e-mail address",
        "a path at home",
        "the host",
    ):
        assert SECRETS[what] not in text, what


@pytest.mark.parametrize(
    "said, secret",
    [
        ("login with password: MyS3cretPw! failed", "MyS3cretPw"),
        ('login with {"db_password": MyS3cretPw!}', "MyS3cretPw"),
        ("cannot log in, pw=Zq9", "Zq9"),
        ("Authorization: Bearer abc.def", "abc.def"),
        ("bad key AIzaSyA12345", "AIza"),
        ("ssn 123-45-6789 in row 3", "6789"),
        ("call +49 170 555 12 34", "555"),
        ("no route to 10.0.0.7:80 or fe80::1ff:fe23:4567:890a", "10.0.0.7"),
        ("no route to 10.0.0.7:80 or fe80::1ff:fe23:4567:890a", "fe80"),
        ("refused wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE by S3", "wJalrXUtnFEMI"),
        ("refused YWJjZGVmZ2hpamtsbW5vcA== by S3", "YWJjZGVm"),
        ("refused carol1234@acme.example", "carol"),
    ],
)
def test_what_looks_like_a_secret_in_a_message_is_masked_without_its_quotes(crashed: Store, said: str, secret: str):
    log = crashed.work_path(KEY) / "log.txt"
    log.write_text(f"$ x\nTraceback (most recent call last):\nValueError: {said}, of torch.Size([64, 2])\n")
    text = report(find_failure(crashed, KEY), MACHINE, with_message=True)
    assert "\nValueError: " in text and secret not in text
    assert "of torch.Size([64, 2])" in text or re.search("[:=] <text of ", text), "the rest is what a maintainer needs"


def test_a_long_message_is_masked_in_time_that_grows_with_its_length(crashed: Store):
    log = crashed.work_path(KEY) / "log.txt"
    log.write_text("$ x\nTraceback (most recent call last):\nValueError: " + "a" * 300_000 + " is too long\n")
    began = time.process_time()
    assert "is too long\n" in report(find_failure(crashed, KEY), MACHINE, with_message=True)
    assert time.process_time() - began < 5


def test_names_of_the_hub_and_of_our_choices_stay(crashed: Store):
    work = crashed.work_path(KEY)
    job = json.loads((work / "job.json").read_text())
    hub = Resolved(ref="hub:Qwen/Qwen3-0.6B", digest="git:0", hub="Qwen/Qwen3-0.6B", revision="c1899de")
    adapter = work / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    made = Resolved(ref="stage:a", digest="sha256:2", artifact="pretrain-00ff", path=str(work), base=hub)
    job["inputs"]["model"] = made.model_copy(update={"adapter": str(adapter)}).model_dump(mode="json")
    (work / "job.json").write_text(json.dumps(job))
    (work / "log.txt").unlink()
    text = report(find_failure(crashed, None), MACHINE)
    said = "- `model`: made by a stage of type pretrain, an adapter of rank 8 on hub:Qwen/Qwen3-0.6B@c1899de"
    assert said in text and text.startswith("# SFT: no traceback\n")
    assert "none: the process was ended, or crashed outside of Python" in text
    (work / "error.json").write_text('{"error": "DataError", "message": "rows.jsonl:3: dear diary", "problems": []}')
    text = report(find_failure(crashed, None), MACHINE)
    assert "none: the stage ended with DataError, which says what to mend and is no crash" in text
    assert "diary" not in text
    (work / "error.json").write_text(
        '{"error": "AlignError", "message": "score.py:score: raised RuntimeError: no \'dear diary\', pw=Zq9"}'
    )
    assert "RuntimeError" not in report(find_failure(crashed, None), MACHINE)
    text = report(find_failure(crashed, None), MACHINE, with_message=True)
    assert "is no crash\nAlignError: score.py:score: raised RuntimeError: no <text of 10 characters>, pw= <text" in text
    assert "diary" not in text and "Zq9" not in text


def test_words_of_the_trainer_stay(crashed: Store):
    train = {"optim": "adamw_bnb_8bit", "lr_scheduler_type": "cosine", "run_name": "carol", "optim_args": "carol"}
    told = report_bug._harmless(train, frozenset(), keys=True)
    masked = {"run_name": "<text of 5 characters>", "optim_args": "<text of 5 characters>"}
    assert told == {**train, **masked}
    assert report_bug._harmless({"optim": "My Own"}, frozenset(), keys=True) == {"optim": "<text of 6 characters>"}


def test_what_is_no_failure_is_refused(crashed: Store, tmp_path: Path):
    for what in ("dpo-", "p.yaml:sft", "s.yaml"):
        with pytest.raises(InputError, match="is no unfinished stage"):
            find_failure(crashed, what)
    assert find_failure(Store(tmp_path / "empty"), None) is None
    nothing = report(None, {"error": "/home/carol/projects is not there"})
    assert "No stage is unfinished" in nothing and "torch cannot be imported" in nothing and "/home" not in nothing


def test_a_crash_names_the_command_and_the_command_writes_the_text(align: Align, tmp_path: Path):
    (tmp_path / "p.yaml").write_text("name: toys\nstages:\n  carols_stage: {type: toy, fail: defect, steps: 7}\n")
    failed = align("run", "p.yaml", "--store", "s")
    assert failed.stderr.endswith("\n  report it with: align report-bug p.yaml:carols_stage --store s\n")
    user = align("run", "p.yaml", "--set", "stages.carols_stage.fail=user")
    assert user.returncode == 1 and "report-bug" not in user.stderr, "the user's own error is no bug"

    written = align("report-bug", "p.yaml:carols_stage", "--store", "s", "-o", "bug.md")
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "bug.md").read_text()
    assert text.startswith("# Toy: RuntimeError\n") and '"steps": 7' in text and "step 2 of 7" in text
    assert 'File "align_pipeline/pipeline/worker.py", line ' in text and "metrics = stage.run(inputs, work)" in text
    private: list[Any] = [tmp_path.name, "carol", "a defect of ours", Path.home(), socket.gethostname(), tmp_path]
    assert [one for one in map(str, private) if len(one) > 1 and one in text] == []
    again = align("report-bug", "p.yaml:carols_stage", "--store", "s", "-o", "bug.md")
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr
    unwritable = align("report-bug", "p.yaml:carols_stage", "--store", "s", "-o", "p.yaml/x/bug.md")
    assert unwritable.returncode == 3 and "--out p.yaml/x/bug.md: cannot be written (Not a dir" in unwritable.stderr
    whole = align("report-bug", "p.yaml", "--store", "s")
    assert whole.returncode == 0 and whole.stdout.partition("## Stage")[2] == text.partition("## Stage")[2]
    nowhere = align("report-bug", "p.yaml", "--store", "t")
    assert nowhere.returncode == 3 and "p.yaml: no stage of it failed in " in nowhere.stderr
    unknown = align("report-bug", "p.yaml:b", "--store", "s")
    assert unknown.returncode == 2 and "no stage 'b'" in unknown.stderr
