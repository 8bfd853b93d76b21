"""What a stage costs beside the same TRL trainer called plainly: the same rows, model, settings, steps and losses.

    python tests/benchmarks/overhead.py --data DIR [--repeats 5] [--steps 120] [--folder DIR] [sft] [reward] [dpo]

DIR holds `sft/gsm8k_train.jsonl` and `pref/hh_harmless_base_test.jsonl.gz`. Each run is a process of its own on one
thread: `align run FILE` into a fresh store, or a script of a page that loads the same rows, calls TRL's trainer as its
documentation does, and saves the model. What counts is CPU seconds, children included, so other people's work on the
same cores does not. Ours and theirs take turns (ours first in even repeats, theirs first in odd ones) and the ratio is
one of pairs: its 95 % interval is Student's t over the logarithms.

The parts are marked in both: `start-up` up to the end of the first step (imports, the model, and the rows: ours reads,
checks and encodes them, TRL's maps them), `training` from there to the end of the last step, `end` what
follows (ours measures the published weights and stores reference scores, both save). Ours has a `runner` beside
that: its own imports, hashing of the inputs, the gate's look at the rows, publishing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(QUIET)

KINDS = ("sft", "reward", "dpo")
BATCH, LENGTH = 8, 256
RATES = {"sft": 1e-3, "reward": 3e-4, "dpo": 1e-4}
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom."""
PARTS = ("runner", "start-up", "training", "end", "whole")

# --- the same model and rows ------------------------------------------------------------------------------------------


def prepare(data: Path, folder: Path, rows: int) -> None:
    """Write a model of 1.1M parameters (causal, and as a classifier with one head), its tokenizer, and rows."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    with (data / "sft" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        asked = [json.loads(line) for line in file]
    examples = [{"prompt": one["question"] + "\n", "completion": one["answer"]} for one in asked]
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(
        (one["prompt"] + one["completion"] for one in examples), vocab_size=2048, special_tokens=["<pad>", "<eos>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "scorer")
    for name in ("model", "scorer"):
        tokenizer.save_pretrained(folder / name)

    def fits(*texts: str) -> bool:
        return len(tokenizer("".join(texts))["input_ids"]) < LENGTH

    _write(folder / "sft.jsonl", [one for one in examples if fits(*one.values())][:rows])
    pairs = []
    with gzip.open(data / "pref" / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            sides = json.loads(line)
            cut = sides["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
            prompt, *answers = sides["chosen"][:cut], sides["chosen"][cut:], sides["rejected"][cut:]
            same = sides["rejected"].startswith(prompt) and "\n\nAssistant:" not in answers[1]
            if same and all(answer.strip() and fits(prompt, answer) for answer in answers):
                pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    for name in ("reward", "dpo"):
        _write(folder / f"{name}.jsonl", pairs[:rows])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pipeline(kind: str, steps: int) -> str:
    """Return the pipeline file of one stage; what it does not say is a default that TRL is told below."""
    model = {"sft": "model: file:model", "reward": "model: file:scorer", "dpo": "policy: file:model"}[kind]
    return f"""\
name: overhead-{kind}
stages:
  {kind}:
    type: {kind}
    {model}
    data: file:{kind}.jsonl
    tuning: full
    held_out: 0
    learning_rate: {RATES[kind]}
    schedule: constant
    warmup: 0
    batch_size: {BATCH}
    max_steps: {steps}
    max_length: {LENGTH}
"""


def plain(kind: str, folder: Path, out: Path, steps: int) -> None:
    """Do the same with TRL alone, as its documentation does; write marks and losses to `out`."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    marks: list[float] = []

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (1, steps):
                marks.append(time.process_time())

    rows = datasets.load_dataset("json", data_files=str(folder / f"{kind}.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / ("scorer" if kind == "reward" else "model"))
    values: dict[str, Any] = {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": RATES[kind],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": LENGTH,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "data_seed": 0,
    }
    trainer: Any
    if kind == "sft":
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**values), train_dataset=rows, processing_class=tokenizer)
    elif kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "scorer", num_labels=1)
        args = trl.RewardConfig(**values, center_rewards_coefficient=0.01)
        trainer = trl.RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    else:
        model, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
        trainer = trl.DPOTrainer(
            model, reference, trl.DPOConfig(**values), train_dataset=rows, processing_class=tokenizer
        )
    trainer.add_callback(Mark())
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    history = [one for one in trainer.state.log_history if "loss" in one]
    (out / "plain.json").write_text(
        json.dumps({"marks": marks, "losses": {one["step"]: one["loss"] for one in history}})
    )


# --- measuring --------------------------------------------------------------------------------------------------------

Parts = dict[str, float]
"""CPU seconds by part."""
Losses = dict[int, float]
"""Training loss by step."""


def timed(command: list[str], folder: Path, log: Path) -> float:
    """Run a command and return its CPU seconds, those of its children included."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


@contextmanager
def kept(folder: Path, pattern: str, name: Path) -> Iterator[None]:
    """Give the first file below `folder` that matches another name, so that it outlives its deletion."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for found in folder.glob(pattern):
                os.link(found, name)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ours(kind: str, folder: Path, steps: int) -> tuple[Parts, Losses]:
    """Run the pipeline into a fresh store; return what each part cost and what each step lost."""
    (folder / f"{kind}.yaml").write_text(pipeline(kind, steps), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        store, progress = Path(scratch) / "store", Path(scratch) / "progress.jsonl"
        command = [sys.executable, "-m", "align_pipeline.pipeline.cli", "run", f"{kind}.yaml", "--store", str(store)]
        with kept(store, "work/*/progress.jsonl", progress):
            whole = timed(command, folder, folder / "ours.log")
        points = [json.loads(line) for line in progress.read_text().splitlines()]
        (curve,) = store.glob(f"store/{kind}-*/curve.jsonl")
        losses = {point["step"]: point["loss"] for point in map(json.loads, curve.read_text().splitlines())}
    first, last = (next(one["cpu_seconds"] for one in points if one["step"] == step) for step in (1, steps))
    end = points[-1]["cpu_seconds"]
    return {
        "runner": whole - end,
        "start-up": first,
        "training": last - first,
        "end": end - last,
        "whole": whole,
    }, losses


def theirs(kind: str, folder: Path, steps: int) -> tuple[Parts, Losses]:
    """Run TRL alone; return the same."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, kind, "--plain", out, "--folder", str(folder), "--steps", str(steps)]
        whole = timed(command, folder, folder / "theirs.log")
        found = json.loads((Path(out) / "plain.json").read_text())
    first, last = found["marks"]
    losses = {int(step): loss for step, loss in found["losses"].items()}
    return {"start-up": first, "training": last - first, "end": whole - last, "whole": whole}, losses


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and its 95 % interval: Student's t over their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    reach = T_975[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def _mean(losses: Losses, last: int) -> float:
    """Return the mean loss of the ten steps up to `last`, which is what TRL logs by default."""
    return statistics.fmean(losses[step] for step in range(last - 9, last + 1))


def compare(kind: str, folder: Path, steps: int, repeats: int) -> None:
    """Take turns, hold the losses against each other, and print the rows of the table."""
    found: dict[str, list[Parts]] = {"ours": [], "TRL": []}
    for repeat in range(repeats):
        losses = {}
        for name in ("ours", "TRL") if repeat % 2 == 0 else ("TRL", "ours"):
            parts, losses[name] = (ours if name == "ours" else theirs)(kind, folder, steps)
            found[name].append(parts)
            print(kind, repeat, name, {part: round(seconds, 2) for part, seconds in parts.items()}, file=sys.stderr)
        apart = max(abs(mean - _mean(losses["ours"], step)) for step, mean in losses["TRL"].items())
        if not apart < 1e-4:
            raise SystemExit(f"{kind}: the losses differ, so the two did other work: {losses}")
    for name, every in found.items():
        cells = [f"{statistics.median(one[part] for one in every):.1f}" if part in every[0] else "" for part in PARTS]
        print(f"| {kind} | {name} | {' | '.join(cells)} |")
    for part in ("training", "whole"):
        ratio = interval([a[part] / b[part] for a, b in zip(found["ours"], found["TRL"], strict=True)])
        print(f"{kind}: {part} ours / TRL {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]")
    print(f"{kind}: mean losses of each ten steps differ by at most {apart:.1g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all by default")
    parser.add_argument("--data", type=Path, help="the folder of the rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        plain(given.kinds[0], given.folder, given.plain, given.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(given.data, folder, given.steps * BATCH)
        print(f"| stage | | {' | '.join(PARTS)} |")
        for kind in given.kinds or KINDS:
            compare(kind, folder, given.steps, given.repeats)


if __name__ == "__main__":
    main()
