"""Alignment as a whole, where the best policy is known: how near PPO and DPO come to it, and what may befall a run.

Everything lies in the closed-form world of `envb.py`: 400 answers to each of four prompts, so that every verdict is a
sum over all of them and not an estimate. The figures that a test prints are those that were measured (`pytest -s`).
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import envb
import envb_ppo
from align_pipeline.pipeline.files import file_sha256
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import models
from align_pipeline.stages.checkpoints import newest_checkpoint
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.reward import Reward
from harness import align, start
from killing import matching, run_and_kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LORA = {"r": 8, "alpha": 16}
FAST = {"batch_size": 256, "learning_rate": 2e-3, "schedule": "linear", "warmup": 0.0, "how": {"micro_batch": 256}}
"""What the stages of this small world train well with; a forward pass holds a whole batch."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are bit-equal from run to run on one thread only."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return envb.base(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(base: Path) -> torch.Tensor:
    with torch.no_grad():
        return envb.logprobs(envb.load(base))


def rows_of(file: Path) -> Resolved:
    return Resolved(ref=f"file:{file.name}", digest=f"sha256:{file_sha256(file)}", path=str(file))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# --- what is reached --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "beta"), [(1, 0.3), (2, 0.3), (0, 1.0), (0, 0.1)])
def test_ppo_reaches_the_best_policy(
    base: Path, reference: torch.Tensor, tmp_path: Path, seed: int, beta: float
) -> None:
    """T3; seed 0 at beta 0.3 is a quick test's."""
    ppo = envb_ppo.stage(seed=seed, kl_coef=beta)
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    ppo.run(envb_ppo.inputs(tmp_path, base), made)
    found = envb_ppo.reached(ppo, made, base)
    print(f"\nPPO seed {seed}:", found)
    assert found.identity_error <= 1e-4
    assert found.efficiency >= 0.985
    if beta == 0.3:
        assert found.distance <= 0.02
        assert found.objective >= 0.97 * found.best


def test_the_reward_stage_recovers_the_utilities(base: Path, tmp_path: Path) -> None:
    """T4: known utilities come back from 60,000 choices that follow them, as a scale and not as an order alone."""
    envb.write_utility_pairs(tmp_path / "pairs.jsonl", 60_000)
    # Without the penalty on the sum of a pair's scores: its default of .01 makes scores about 8 % smaller here, since
    # it pulls with 2 * .01 where the choices hold against with the mean of p(1 - p), .23.
    stage = Reward(model="file:b", data="file:p", lora=LORA, epochs=3, held_out=0, center_rewards=0, **FAST)
    policy = envb_ppo.inputs(tmp_path, base)["policy"]
    made = envb_ppo.work(tmp_path / "work" / "reward")
    metrics = stage.run({"model": policy, "data": rows_of(tmp_path / "pairs.jsonl")}, made)
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=0.15)
    reward = _reward_model(made.out, policy)
    model = models.load_reward(reward)
    every = [[*prompt, *ids] for prompt in envb.PROMPTS for ids in envb.OUTCOMES]
    found = envb.recovery(torch.tensor(models.score(model, every, 256)).reshape(4, -1))
    print("\nreward:", found)
    assert found.pearson >= 0.985
    assert 0.9 <= found.slope <= 1.1
    assert found.log_loss - found.bayes_log_loss <= 0.002
    assert found.bayes_accuracy - found.accuracy <= 0.003
    _assert_padding_changes_nothing(model, reward, base)


def _reward_model(out: Path, base: Resolved) -> Resolved:
    return Resolved(
        ref="stage:reward",
        digest="sha256:" + "a" * 64,
        path=str(out),
        kind="reward_model",
        adapter=str(out / "adapter"),
        base=base,
        reference_scores=str(out / "reference_scores.json"),
    )


def _assert_padding_changes_nothing(model: Any, reward: Resolved, base: Path) -> None:
    """Recovery cannot see a score that is read at a pad, since the model learns around it; this can."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rows = [[*prompt, *envb.OUTCOMES[i]] for prompt in envb.PROMPTS for i in envb.RATED[::7]]
    alone = [models.score(model, [row])[0] for row in rows]
    longer = [[*envb.PROMPTS[0], 1, 3, 5, 4, 6, 7, 1, 2]]
    batches = [models.score(model, [row, *longer])[0] for row in rows]
    assert batches == pytest.approx(alone, abs=1e-5)

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain = PeftModel.from_pretrained(plain, reward.adapter).eval()
    gaps = {}
    for side in ("left", "right"):
        padded = [_padded(row, 8, side) for row in rows]
        ids, mask = (torch.tensor(part) for part in zip(*padded, strict=True))
        with torch.no_grad():
            found = plain(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        gaps[side] = max(abs(a - b) for a, b in zip(found.logits[:, 0].tolist(), alone, strict=True))
    print("gap of padded rows:", gaps)
    assert max(gaps.values()) <= 1e-5


def _padded(row: list[int], length: int, side: str) -> tuple[list[int], list[int]]:
    pads, ones = [envb.PAD] * (length - len(row)), [1] * len(row)
    return ([*pads, *row], [*pads, *ones]) if side == "left" else ([*row, *pads], [*ones, *pads])


@pytest.mark.parametrize("beta", [0.3, 1.0, 0.1])
def test_dpo_reaches_the_best_policy(base: Path, reference: torch.Tensor, tmp_path: Path, beta: float) -> None:
    """T5: from 20,000 choices between answers of the reference."""
    envb.write_pairs(tmp_path / "pairs.jsonl", reference, 20_000)
    stage = DPO(policy="file:b", data="file:p", lora=LORA, beta=beta, epochs=3, held_out=0, **FAST)
    made = envb_ppo.work(tmp_path / "work" / "dpo")
    policy = envb_ppo.inputs(tmp_path, base)["policy"]
    metrics = stage.run({"policy": policy, "data": rows_of(tmp_path / "pairs.jsonl")}, made)
    found = envb.report(envb_ppo.policy_of(made, base), reference, beta)
    print("\nDPO:", found)
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.identity_error <= 1e-4
    assert found.efficiency >= 0.95
    if beta >= 0.3:
        assert found.distance <= 0.03


def test_labels_that_say_nothing_teach_nothing(base: Path, tmp_path: Path) -> None:
    """Pairs whose labels were shuffled: on others, never seen, the reward model is a coin."""
    for name, count, seed in (("train", 20_000, 1), ("test", 12_000, 2)):
        envb.write_utility_pairs(tmp_path / f"{name}.jsonl", count, seed)
        _shuffle_labels(tmp_path / f"{name}.jsonl", seed)
    stage = Reward(model="file:b", data="file:train.jsonl", evaluation="file:test.jsonl", lora=LORA, **FAST)
    found = {name: rows_of(tmp_path / f"{file}.jsonl") for name, file in (("data", "train"), ("evaluation", "test"))}
    made = envb_ppo.work(tmp_path / "work" / "reward")
    metrics = stage.run({"model": envb_ppo.inputs(tmp_path, base)["policy"], **found}, made)
    print("\nshuffled labels:", metrics)
    assert metrics["n"] == 12_000
    assert metrics["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=0.02)


def _shuffle_labels(file: Path, seed: int) -> None:
    chance, rows = random.Random(seed), read(file)
    for row in rows:
        if chance.random() < 0.5:
            row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# --- from a user's seat -----------------------------------------------------------------------------------------------

REWARDS = f"""\
import json, os, time
from pathlib import Path

WORTH = {envb.WORTH!r}


def worth(prompts, completions, completion_ids, **columns):
    tell(completions)
    return [sum(WORTH[token] for token in ids) + 0.5 * ({envb.EOS} in ids) for ids in completion_ids]


def nothing(prompts, completions, completion_ids, **columns):
    tell(completions)
    return [0.0] * len(completions)


def tell(completions):
    line = {{"at": time.time(), "answers": len(completions), "rank": os.environ.get("RANK", "0")}}
    with Path(__file__).with_name("told.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")


def raises(prompts, completions, completion_ids, **columns):
    return [float(text) for text in completions]


def nan(prompts, completions, completion_ids, **columns):
    return [float("nan")] * len(completions)


def few(prompts, completions, completion_ids, **columns):
    return [0.0]
"""
"""Functions that also write down when they were asked for how many scores: so a test knows where a run is."""

PIPELINE = """\
name: small
lora: {r: 8, alpha: 16}
stages:
  reward:
    type: reward
    model: file:base
    data: file:pairs.jsonl
    batch_size: 64
    learning_rate: 3e-3
    held_out: 0
"""


def write_folder(folder: Path, base: Path, pipeline: str, pairs: int = 1024) -> None:
    """Write what a user has: a base model, prompts, pairs, reward functions, and a pipeline of them."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(base, folder / "base")
    envb.write_prompts(folder / "prompts.jsonl", repeat=8)
    envb.write_utility_pairs(folder / "pairs.jsonl", pairs)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "p.yaml").write_text(pipeline)


def results(runs: Path) -> dict[str, tuple[str, dict[str, float]]]:
    stages = json.loads((runs / "small" / "manifest.json").read_text())["stages"]
    return {name: (entry["digest"], entry["metrics"]) for name, entry in stages.items()}


RANKS = f"""{PIPELINE}\
  by_model:
    type: ppo
    policy: file:base
    reward: stage:reward
    require: {{reward_above_chance: off}}
    prompts: file:prompts.jsonl
    value: reward
    batch_size: 65
    minibatches: 5
    epochs: 2
    episodes: 390
    learning_rate: 1e-3
    max_new_tokens: 3
    evaluation_prompts: 4
  by_function:
    type: ppo
    policy: file:base
    reward: rewards:worth
    prompts: file:prompts.jsonl
    value: fresh
    batch_size: 65
    minibatches: 5
    epochs: 2
    episodes: 390
    learning_rate: 1e-3
    max_new_tokens: 3
    evaluation_prompts: 4
"""
"""Nothing divides evenly: of 65 answers two ranks make 33 and 32, of a minibatch of 13 they take 7 and 6."""


def test_two_processes_do_what_one_does(base: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, base, RANKS)
    asked = {}
    for processes in (1, 2):
        (tmp_path / "told.jsonl").unlink(missing_ok=True)
        store = f"runs{processes}"
        align(tmp_path, "run", "p.yaml", "--store", store, "--set", f"launch.processes={processes}", timeout=300)
        asked[processes] = Counter((line["rank"], line["answers"]) for line in read(tmp_path / "told.jsonl"))
    evaluations = 7  # at the start and after each iteration
    held_out = len(read(tmp_path / "runs1/small/by_function/samples.jsonl")) // evaluations
    assert held_out >= 2
    assert asked[1] == {("0", 65): 6, ("0", held_out): evaluations}
    deals = {"0": (33, held_out - held_out // 2), "1": (32, held_out // 2)}
    assert asked[2] == {(rank, n): m for rank, own in deals.items() for n, m in zip(own, (6, evaluations), strict=True)}
    for stage in ("by_model", "by_function"):
        one, two = (tmp_path / f"runs{processes}/small/{stage}" for processes in (1, 2))
        assert (one / "samples.jsonl").read_text() != ""
        for left, right in zip(read(one / "samples.jsonl"), read(two / "samples.jsonl"), strict=True):
            scores = pytest.approx(right.pop("scores"), abs=1e-3)
            assert left == {**right, "scores": scores}
        curves = read(one / "curve.jsonl"), read(two / "curve.jsonl")
        assert [point["kl"] for point in curves[0] if "kl" in point][-1] > 0.01, "it has learnt something"
        worst = 0.0
        for left, right in zip(*curves, strict=True):
            assert left == pytest.approx(right, rel=0, abs=1e-4), stage
            worst = max(worst, *(abs(left[name] - right[name]) for name in left))
        print(f"\n{stage}: largest difference between the curves of 1 and 2 processes {worst:.2g}")


# --- kills ------------------------------------------------------------------------------------------------------------

BATCH, STEPS, SAVE_EVERY, EVALUATE_EVERY = 64, 4, 12, 2
"""Answers and optimizer steps of an iteration; steps between two checkpoints; iterations between two evaluations."""
KILLED = f"""{PIPELINE}\
    epochs: 3
  ppo:
    type: ppo
    policy: file:base
    reward: {{good: stage:reward, nothing: "rewards:nothing"}}
    require: {{reward_above_chance: off}}
    prompts: file:prompts.jsonl
    value: reward
    batch_size: {BATCH}
    minibatches: 2
    epochs: 2
    episodes: {50 * BATCH}
    learning_rate: 3e-3
    kl_coef: 0.1
    max_new_tokens: 16
    evaluation: file:prompts.jsonl
    evaluation_prompts: 32
    evaluate_every: {EVALUATE_EVERY}
    how: {{checkpoint_every_steps: {SAVE_EVERY}, guards: warn}}
"""
SECONDS = {"rollout": 0.015, "update": 0.1, "evaluation": 0.02, "saving": 0.01}
"""About what a phase takes, so how long after its beginning a kill may come."""


class Watch:
    """Knows in which phase of PPO a run is, from what it wrote since this was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = {path: len(path.read_text().splitlines()) for path in (self._told, *self._logs()) if path.exists()}

    @property
    def _told(self) -> Path:
        return self.folder / "told.jsonl"

    def _logs(self) -> list[Path]:
        return list(self.folder.glob("runs/work/ppo-*/progress.jsonl"))

    @staticmethod
    def _lines(path: Path, skip: int = 0) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)[skip:]
        return [json.loads(text) for text in lines if text.endswith("}\n") and text.startswith("{")]

    def begun(self) -> list[str]:
        """Return the phases that have begun, in order: each event ends one and begins the next."""
        new = [line for path in (self._told, *self._logs()) for line in self._lines(path, self.seen.get(path, 0))]
        phases = []
        for line in sorted(new, key=lambda line: line["at"]):
            if line.get("answers") == BATCH:
                phases.append("update")
            elif "answers" in line:
                phases.append("evaluation")
            elif "loss" in line:
                due = line["step"] // STEPS % EVALUATE_EVERY == 0
                phases.append("evaluation" if due else "rollout")
            elif "held_out_objective" in line:
                phases.append("rollout")
        saves = bool(matching(self.folder, "runs/work/ppo-*/scratch/saving/checkpoint-*/*"))
        return [*phases, "saving"] if phases and saves else phases

    def waits_for(self, phase: str, times: int) -> Callable[[], bool]:
        """Return what tells that a phase has just begun, after it began `times` - 1 times before."""

        def reached() -> bool:
            phases = self.begun()
            return bool(phases) and phases[-1] == phase and phases.count(phase) >= times

        return reached


def test_twenty_kills_change_nothing(base: Path, tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    for folder in (calm, stormy):
        write_folder(folder, base, KILLED, pairs=4096)
    align(calm, "run", "p.yaml", timeout=300)
    metrics = results(calm / "runs")["ppo"][1]
    assert metrics["best_step"] > 60 and metrics["held_out_kl"] > 0.2, "what is published was learnt late"
    chance = random.Random(20)
    kills, hit = [], Counter[str]()
    for number in range(20):
        phase = min(SECONDS, key=lambda phase: hit[phase])  # a moment may be missed: aim where few have landed
        times = 1 if phase == "saving" else chance.randint(2, 4)
        victim = ("both", "runner", "worker")[number % 3]
        watch = Watch(stormy)
        moment = watch.waits_for(phase, times)
        left = run_and_kill(stormy, "p.yaml", moment, victim=victim, chance=chance, within=SECONDS[phase])
        assert any((stormy / "runs/work").glob("ppo-*")), "it ended before it was killed"
        hit[watch.begun()[-1]] += 1
        for path in (stormy / "runs/store").glob("*"):
            assert (path / "artifact.json").exists(), "half an artifact"
        if left is not None:
            kills.append(left)
            assert left.last_step - left.checkpoint <= SAVE_EVERY, "more than one save interval is lost"
    for before, after in itertools.pairwise(kills):
        assert after.first_step == before.checkpoint + STEPS, "a resumed run goes on where the checkpoint is"
    align(stormy, "run", "p.yaml", "--no-wait", timeout=300)
    print(f"\nkills by phase: {dict(hit)}; {len(kills)} after an iteration; last one at {kills[-1]}")
    assert all(hit[phase] >= 3 for phase in SECONDS), hit
    assert len(kills) >= 15
    assert results(stormy / "runs") == results(calm / "runs")
    adapters = [folder / "runs/small/ppo/adapter/adapter_model.safetensors" for folder in (calm, stormy)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert list((stormy / "runs/work").iterdir()) == []
    record = json.loads((stormy / "runs/small/ppo/artifact.json").read_text())
    assert record["resources"]["attempts"] >= 20, "the kills were of this stage"


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL = f"""{PIPELINE}\
  ppo:
    type: ppo
    policy: file:base
    reward: stage:reward
    require: {{reward_above_chance: off}}
    prompts: file:prompts.jsonl
    batch_size: 32
    minibatches: 2
    epochs: 2
    episodes: {40 * 32}
    learning_rate: 1e-3
    max_new_tokens: 8
    evaluation_prompts: 0
    how: {{checkpoint_every_steps: 8, guards: warn}}
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting is refused here: {result.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_saved(base: Path, tmp_path: Path, small_disk: Path) -> None:
    write_folder(tmp_path, base, FULL)
    align(tmp_path, "run", "p.yaml", timeout=300)
    store = ("--store", str(small_disk))
    align(tmp_path, "run", "p.yaml", "reward", *store, timeout=300)
    filler = small_disk / "filler"
    for attempt in ("it fills up", "it is still full"):
        process = start(tmp_path, "run", "p.yaml", *store, toys=False)
        while attempt == "it fills up" and not [*small_disk.glob("work/ppo-*/scratch/checkpoint-*/files.json")]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        if attempt == "it fills up":
            fill(filler, room=100_000)  # enough for a line of progress, too little for a checkpoint
        out, err = process.communicate(timeout=300)
        (work,) = small_disk.glob("work/ppo-*")
        checkpoints = [path for path in (work / "scratch").glob("checkpoint-*") if (path / "files.json").exists()]
        print(
            f"\n{attempt}: exit code {process.returncode}, {[path.name for path in checkpoints]}, {err.splitlines()[0]}"
        )
        assert process.returncode == 1, out + err
        assert str(small_disk) in err.splitlines()[0]
        assert "no room on this disk" in err or "the disk is full" in err
        assert "Traceback" not in err
        assert len(checkpoints) == 1
        assert newest_checkpoint(work / "scratch") == checkpoints[0], "the checkpoint before is whole"
    filler.unlink()
    steps = [line["step"] for line in read(work / "progress.jsonl") if "loss" in line]
    align(tmp_path, "run", "p.yaml", *store, timeout=300)
    assert results(small_disk) == results(tmp_path / "runs")
    record = json.loads((small_disk / "small/ppo/artifact.json").read_text())
    assert record["resources"]["attempts"] == 3
    assert max(steps) < 40 * 4, "it could not go on without a checkpoint"


def fill(file: Path, room: int) -> None:
    """Write zeros until the disk is full, and give `room` bytes back."""
    try:
        with file.open("wb") as handle:
            while True:
                handle.write(bytes(4096))
                handle.flush()
    except OSError as error:
        assert error.errno == errno.ENOSPC
    os.truncate(file, file.stat().st_size - room)


# --- what is wrong is said --------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "type": "ppo",
    "policy": "file:base",
    "reward": "rewards:worth",
    "prompts": "file:prompts.jsonl",
    "value": "fresh",
    "batch_size": 8,
    "episodes": 16,
    "max_new_tokens": 3,
    "evaluation_prompts": 0,
}
OTHERS = {
    "dpo": "  dpo: {type: dpo, policy: file:base, data: file:pairs.jsonl}\n",
    "sft": "  sft: {type: sft, model: file:base, data: file:prompts.jsonl, lora: {r: 4}}\n",
    "full": "  full: {type: reward, model: file:base, data: file:pairs.jsonl, tuning: full}\n",
    "one": "  one: {type: reward, model: file:base, data: file:pairs.jsonl}\n",
    "two": "  two: {type: reward, model: file:base, data: file:pairs.jsonl, seed: 1}\n",
}
TWO = {"a": "stage:one", "b": "stage:two"}
PLAN = "align plan says so at once"


@pytest.fixture(scope="module")
def seat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that a user may get wrong."""
    folder = tmp_path_factory.mktemp("seat")
    write_folder(folder, base, "", pairs=64)
    (folder / "empty.jsonl").write_text("")
    (folder / "unnamed.jsonl").write_text('{"prompt": "a b"}\n{"question": "a b"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a b"}) + "\n" + json.dumps({"prompt": "a " * 62}) + "\n")
    (folder / "broken.py").write_text("import of_no_such_name\n\n\ndef f(**_):\n    return []\n")
    shutil.copytree(base, folder / "endless")
    settings = json.loads((folder / "endless/tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "endless/tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        ({"kl_coeff": 0.1}, PLAN, "p.yaml:14: stages.ppo.kl_coeff: unknown field; did you mean kl_coef?"),
        ({"kl_coef": -0.1}, PLAN, "p.yaml:14: stages.ppo.kl_coef: must be at least 0, got -0.1"),
        (
            {"how": {"microbatch": 4}},
            PLAN,
            "p.yaml:14: stages.ppo.how.microbatch: unknown field; did you mean micro_batch?",
        ),
        ({"train": {"max_steps": 4}}, PLAN, "p.yaml:14: stages.ppo.train.max_steps: is set by align; use episodes"),
        ({"minibatches": 3}, PLAN, "p.yaml:4: stages.ppo: batch_size 8 must be a multiple of minibatches 3"),
        ({"policy": "file:bas"}, PLAN, "p.yaml:6: stages.ppo.policy: bas does not exist; did you mean base?"),
        (
            {"policy": "stage:one"},
            PLAN,
            "p.yaml:7: stages.ppo.policy: stage 'one' makes a reward model, but a model is",
        ),
        (
            {"policy": "stage:sft"},
            PLAN,
            "p.yaml:7: stages.ppo.policy: lora.r: sft trains an adapter with 4, this stage asks",
        ),
        (
            {"prompts": "file:prompt.jsonl"},
            PLAN,
            "p.yaml:8: stages.ppo.prompts: prompt.jsonl does not exist; did you mean",
        ),
        (
            {"reward": "stage:dpo"},
            PLAN,
            "p.yaml:8: stages.ppo.reward: stage 'dpo' makes a model, but a reward model is",
        ),
        (
            {"reward": "rewards:wort"},
            PLAN,
            "p.yaml:7: stages.ppo.reward: .*/rewards.py defines no 'wort'; did you mean worth",
        ),
        ({"reward": "reward:worth"}, PLAN, "p.yaml:7: stages.ppo.reward: no module 'reward' in "),
        (
            {"value": "reward"},
            PLAN,
            "p.yaml:4: stages.ppo: value: reward starts the value model from the one reward model, and",
        ),
        (
            {"value": "reward", "reward": TWO},
            PLAN,
            "p.yaml:6: stages.ppo: value: reward starts the value model from the one",
        ),
        (
            {"value": "reward", "reward": "stage:full"},
            PLAN,
            "p.yaml:8: stages.ppo.reward: value: reward starts the value model",
        ),
        ({"prompts": "file:empty.jsonl"}, 3, "empty.jsonl: no rows, at least one is needed"),
        ({"prompts": "file:unnamed.jsonl"}, 3, "unnamed.jsonl:2: prompt: missing, rows of this file need prompt"),
        (
            {"prompts": "file:long.jsonl"},
            3,
            "long.jsonl:2: prompt: 62 tokens \\+ max_new_tokens 3 = 65, the model has 64",
        ),
        (
            {"policy": "file:endless"},
            1,
            "stage ppo failed: file:endless: its tokenizer has no eos token; set `eos_token`",
        ),
        ({"reward": "file:base"}, 1, "stage ppo failed: file:base: no score head, so it is no reward model"),
        (
            {"reward": "broken:f"},
            1,
            r"stage ppo failed: broken:f: it cannot be imported \(ModuleNotFoundError: No module",
        ),
        (
            {"reward": "rewards:raises"},
            1,
            r"stage ppo failed: prompts.jsonl:\d+: rewards:raises raised ValueError: could not",
        ),
        (
            {"reward": "rewards:nan"},
            1,
            r"stage ppo failed: prompts.jsonl:\d+: rewards:nan returned nan, a score is a finite",
        ),
        (
            {"reward": "rewards:few"},
            1,
            "stage ppo failed: rewards:few returned 1 scores for 8 answers",
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_in_one_line(seat: Path, changes: dict[str, Any], code: int | str, line: str) -> None:
    settings = {**SMALL, **changes}
    fields = "".join(f"    {name}: {json.dumps(value)}\n" for name, value in settings.items())
    named = [text for name, text in OTHERS.items() if f"stage:{name}" in fields]
    (seat / "p.yaml").write_text(f"name: seat\nlora: {json.dumps(LORA)}\nstages:\n{''.join(named)}  ppo:\n{fields}")
    command = "plan" if code == PLAN else "run"
    process = start(seat, command, "p.yaml", toys=False)
    out, err = process.communicate(timeout=120)
    print(f"\n{process.returncode}: {err}")
    assert process.returncode == (2 if code == PLAN else code), out + err
    assert re.match(line, err), err
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == 1 or code == 1, "one line says it; a failed stage shows its log's end below"
