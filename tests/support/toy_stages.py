"""Stages that count and sleep instead of training: real stages for the machine, in milliseconds, without torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.pipeline.rules import Judged
from align_pipeline.pipeline.stage import (
    Config,
    Dataset,
    Inputs,
    Kind,
    Metrics,
    Model,
    RewardModel,
    Scorer,
    Stage,
    Work,
)


class ToyJudge(Config):
    """Inputs in a configuration of their own."""

    model: Model
    reward: Scorer | None = None
    strictness: int = 2


class Toy(Stage):
    """Adds up numbers: step i adds (i + 1) * rate; the state is saved after every `save_every` steps."""

    produces: ClassVar[Kind] = "model"
    type: Literal["toy"] = "toy"
    model: Model | None = None
    data: Dataset | None = None
    rate: float = Field(0.5, gt=0)
    steps: int = 3
    save_every: int = 1
    sleep: float = 0.0
    fail: Literal["user", "data", "defect", "kill", "disk", "control"] | None = None

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        state_file = work.scratch / "state.json"
        state = json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "total": 0.0}
        for step in range(state["step"], self.steps):
            with (work.scratch.parent.parent.parent / "executed.log").open("a") as file:
                file.write(f"{work.folder.name} {step}\n")
            time.sleep(self.sleep)
            state = {"step": step + 1, "total": state["total"] + (step + 1) * self.rate}
            if state["step"] % self.save_every == 0 or state["step"] == self.steps:
                temporary = state_file.with_suffix(".partial")
                temporary.write_text(json.dumps(state))
                temporary.replace(state_file)
            work.log(step=step + 1, total=self.steps, loss=1.0 / (step + 1), samples=float(step + 1))
            if self.fail and step == 1:
                self._fail(work)
        (work.out / "model").mkdir()
        origin = "+".join(sorted(one.digest for one in inputs.values()))
        (work.out / "model" / "weights.txt").write_text(f"{state['total']} from {origin}\n")
        (work.out / "model" / "large.bin").write_bytes(bytes(200_000))
        return {"total": state["total"]}

    def _fail(self, work: Work) -> None:
        if self.fail == "user":
            raise AlignError("prompts.jsonl:3: the toy does not like it; give it another one")
        if self.fail == "data":
            raise DataError([f"rows.jsonl:{n}: chosen: equals rejected" for n in (3, 9)])
        if self.fail == "control":
            work.log(step=2, total=3, note="\x1b[2Jnoted\u202e")
            raise RuntimeError("\x1b[2Jgone\u202e")
        if self.fail == "kill":
            os.kill(os.getpid(), 9)
        raise RuntimeError("a defect of ours")


class ToyPicky(Toy):
    """Starts only from a toy that counted to 1."""

    own_gates: ClassVar[tuple[str, ...]] = ("enough",)
    type: Literal["toy_picky"] = "toy_picky"

    def before(self, makers: Mapping[str, tuple[Stage, Metrics]]) -> list[Judged]:
        total = makers["model"][1]["total"]
        says, remedy = f"{total:.6g} is not enough", "raise it, or set require: {enough: off}"
        return [Judged("enough", "at least 1", total >= 1, total, 1.0, says, remedy)]


class ToyReward(Stage):
    """Produces a reward model."""

    produces: ClassVar[Kind] = "reward_model"
    type: Literal["toy_reward"] = "toy_reward"
    model: Model

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        (work.out / "score.txt").write_text(inputs["model"].digest)
        return {"accuracy": 0.75}


class ToyReport(Stage):
    """Reads several models and a scorer."""

    produces: ClassVar[Kind] = "report"
    type: Literal["toy_report"] = "toy_report"
    models: dict[str, Model]
    scorer: Scorer | None = None
    judge: ToyJudge | None = None
    reward: RewardModel | None = None

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        (work.out / "report.md").write_text("# Report\n" + "".join(f"- {name}\n" for name in sorted(inputs)))
        return {"inputs": float(len(inputs))}


TOYS = {"toy": Toy, "toy_picky": ToyPicky, "toy_reward": ToyReward, "toy_report": ToyReport}
