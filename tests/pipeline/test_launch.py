"""What cannot run on several processes, or is not proven to, is said by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from align_pipeline.pipeline import plan as plans
from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.manifest import Manifest
from align_pipeline.pipeline.plan import Planner
from align_pipeline.pipeline.stage import gpus
from align_pipeline.pipeline.store import Store

PIPELINE = """\
name: ranks
model: file:model
stages:
  sft:
    type: sft
    data: file:rows.jsonl
    batch_size: 12
    how: {micro_batch: 3}
  dpo:
    type: dpo
    policy: stage:sft
    data: file:rows.jsonl
    batch_size: 12
  kto:
    type: kto
    policy: stage:sft
    data: file:rows.jsonl
    batch_size: 12
    kl_batch: 4
  ppo:
    type: ppo
    policy: stage:sft
    reward: scorer:score
    value: fresh
    prompts: file:rows.jsonl
    batch_size: 4
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "scorer.py").write_text("def score(prompts, completions, **columns): ...")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path / "p.yaml"


def misfits(file: Path, *changes: str, targets: tuple[str, ...] = ()) -> list[str]:
    pipeline = load(file, changes)
    store = Store(file.parent / "runs")
    planner = Planner(pipeline, store, Manifest(store, pipeline.name, pipeline.file))
    return [one.removeprefix(f"{file}:").removeprefix("--set ") for one in planner.misfits(planner.plan(targets))]


def test_two_processes_run_all_of_it(project: Path) -> None:
    assert misfits(project, "launch.processes=2") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("launch.processes=5",), [
            "7: stages.sft.batch_size: 12 rows cannot be dealt to launch.processes 5 evenly; make it a multiple (10)",
            "13: stages.dpo.batch_size: 12 rows cannot be dealt to launch.processes 5 evenly; make it a multiple (10)",
            "19: stages.kto.kl_batch: 4, must be a multiple of launch.processes 5, which share it, and two for each at "
            "least; set 10, and batch_size to a multiple of it",
            "26: stages.ppo.batch_size: 4 answers for launch.processes 5; raise it",
        ]),
        (("launch.processes=3", "stages.kto.kl_batch=6"), [
            "8: stages.sft.how.micro_batch: 3 times launch.processes 3 must divide batch_size 12; set 1",
        ]),
        (("launch.processes=2", "stages.dpo.loss=aot"), [
            "stages.dpo.loss=aot: stages.dpo.loss: aot sorts the pairs of a batch, which several processes share; take "
            "another loss, or set launch.processes: 1",
        ]),
        (("launch={processes: 2, accelerate: fsdp}", "stages.sft.quantize=4bit"), [
            "stages.sft.quantize=4bit: stages.sft.quantize: not proven with launch.accelerate: fsdp; remove it, or set "
            "ddp",
            "21: stages.ppo.type: ppo samples with the model that it trains, and trains two adapters on one base: not "
            "proven with launch.accelerate: fsdp; set ddp",
        ]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(project: Path, changes: tuple[str, ...], expected: list[str]) -> None:
    assert misfits(project, *changes) == expected


def test_one_process_shares_with_nobody(project: Path) -> None:
    project.write_text(PIPELINE + "launch: {processes: 2, accelerate: fsdp}\n")
    assert misfits(project) != [] and misfits(project, "launch.processes=1") == []


@pytest.mark.parametrize(("dropout", "processes", "refused"), [("0.1", 1, True), ("0.1", 2, False), ("0", 1, False)])
def test_who_drew_dropout_goes_on_as_many(project: Path, dropout: str, processes: int, refused: bool) -> None:
    changes = (f"launch.processes={processes}", f"stages.sft.dropout={dropout}", "stages.sft.how.micro_batch=2")
    pipeline, store = load(project, changes), Store(project.parent / "runs")
    (step,) = Planner(pipeline, store, Manifest(store, pipeline.name, pipeline.file)).plan(("sft",))
    for made_by, checkpoint in ((1, "checkpoint-9"), (2, "checkpoint-30")):
        folder = store.work_path(str(step.key)) / "scratch" / checkpoint
        folder.mkdir(parents=True)
        for rank in range(made_by):
            (folder / f"rng_state_{rank}.pth").touch()
    says = (
        "launch.processes=1: launch.processes: 1, but sft/checkpoint-30 was made by 2, and each draws its own dropout "
        "or noise; set launch.processes: 2 to go on, or start anew with --force"
    )
    assert misfits(project, *changes, targets=("sft",)) == ([says] if refused else [])


def test_only_stages_that_would_run_are_asked(project: Path) -> None:
    assert misfits(project, "launch={processes: 2, accelerate: fsdp}", targets=("dpo", "kto")) == []


def test_gpus_are_counted_without_torch(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "tty0"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(tmp_path) == 2
    monkeypatch.setattr(plans, "gpus", lambda: 2)
    assert misfits(project, "launch.processes=4", targets=("dpo",)) == [
        "launch.processes=4: launch.processes: 4, one a GPU, and here are 2; lower it"
    ]
    for chosen, count in (("1", 1), ("", 0), ("-1", 0), ("0,1,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert gpus(tmp_path) == count
