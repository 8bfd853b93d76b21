"""`align init`: a commented pipeline file to start from, beside example rows that show what belongs where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from align_pipeline.pipeline.errors import ConfigError, near_or_all

MODEL = "hub:Qwen/Qwen3-0.6B"
SCHEMA = "align.schema.json"

_HEAD = """\
# yaml-language-server: $schema={schema}
# {title}
#
#   align plan {file}      what would run, and why
#   align run {file}       run it; what is up to date is not run again
#
# The example rows beside this file only show the form: put your own files in their place.
# `align data check FILE` looks at rows before anything is trained on them.
name: {name}
# The model to start from: hub:ORG/NAME[@REV], or file:PATH of a folder that Transformers loads.
model: {model}
# Small matrices beside frozen weights are trained. `quantize: 4bit` holds the frozen ones in four bits.
lora:
  r: 16
  alpha: 32
stages:
"""
_SFT = """\
  # Good answers to imitate: {"messages": [...]} or {"prompt": ..., "completion": ...}.
  sft:
    type: sft
    data: file:example-sft.jsonl
    learning_rate: 2e-4
    epochs: 2
    max_length: 1024
"""
_REWARD = """\
  # Learns to score answers from pairs: {"prompt": ..., "chosen": ..., "rejected": ...}.
  reward:
    type: reward
    model: stage:sft
    data: file:example-preferences.jsonl
"""
_EVALUATE = """\
  # Before and after, on prompts that nothing was trained on.
  evaluate:
    type: evaluate
    models:
      {baseline}: {reference}
      {tuned}: stage:{tuned}
    baseline: {baseline}
    scorer: stage:reward
    prompts: file:example-heldout.jsonl
    max_new_tokens: 256
"""
_DPO = """\
  # Makes preferred answers likelier than rejected ones; beta holds the model near where it started.
  dpo:
    type: dpo
    policy: stage:sft
    data: file:example-preferences.jsonl
    beta: 0.1
    learning_rate: 2e-5
"""
_PPO = """\
  # Answers these prompts again and again, and moves towards what the reward model scores higher.
  ppo:
    type: ppo
    policy: stage:sft
    reward: stage:reward
    prompts: file:example-prompts.jsonl
    # What a nat of KL to the start costs: smaller moves further, and finds more weaknesses of the reward model.
    kl_coef: 0.05
    episodes: 20000
    max_new_tokens: 256
    # A reward model must tell its held-out pairs apart better than a coin before PPO starts, which the few example rows
    # cannot show: delete these two lines when the rows are yours.
    require:
      reward_above_chance: off
"""
_FEEDBACK = """\
  # Thumbs, edits and comparisons of a product's users become preference pairs; personal data is replaced by tags.
  # Logs of Open WebUI, LibreChat, Langfuse and others are known by their form.
  feedback:
    type: feedback
    logs: file:example-feedback.jsonl
  # Learns to score answers from the pairs.
  reward:
    type: reward
    data: stage:feedback
  # Makes preferred answers likelier than rejected ones; each pair counts as much as the votes for it are sure.
  dpo:
    type: dpo
    policy: {model}
    data: stage:feedback
    weight_column: fb_weight
    beta: 0.1
    learning_rate: 2e-5
"""

TEMPLATES: Mapping[str, tuple[str, str]] = {
    "dpo": ("Supervised fine-tuning, then preferences learnt directly (DPO).", _SFT + _REWARD + _DPO),
    "ppo": ("Supervised fine-tuning, a reward model, then PPO against it.", _SFT + _REWARD + _PPO),
    "feedback": ("From the thumbs of a product's users to a better model.", _FEEDBACK),
}


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file to write.")] = Path("pipeline.yaml"),
    template: Annotated[
        str, typer.Option("--template", metavar="NAME", help=f"What to start from: {', '.join(TEMPLATES)}.")
    ] = "dpo",
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="The model to start from: hub:ORG/NAME or file:PATH.")
    ] = MODEL,
) -> None:
    """Write a commented pipeline file to start from, and example rows beside it; nothing is overwritten."""
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.store import disk_errors

    text = _text(file, template, model)
    if file.exists() or file.is_symlink():
        raise ConfigError([f"{file}: it exists, and nothing is overwritten; name another file"])
    with disk_errors(file.absolute().parent):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        for path, content in _beside(file, text):
            written = _write(path, content)
            typer.echo(f"{shown(path.absolute())}  {'written' if written else 'is there already, left as it is'}")
    typer.echo(f"next: align plan {file}")


def _text(file: Path, template: str, model: str) -> str:
    """Return the pipeline file; refuse what could not be planned."""
    import yaml

    from align_pipeline.pipeline.inputs import file_path, missing_file
    from align_pipeline.pipeline.stage import is_reference

    if template not in TEMPLATES:
        raise ConfigError([f"--template {template}: no such template{near_or_all(template, TEMPLATES)}"])
    if not is_reference(model) or model.partition(":")[0] not in ("hub", "file"):
        raise ConfigError([f"--model {model}: names no model; write hub:ORG/NAME[@REV] or file:PATH"])
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError([f"{file}: a pipeline file ends in .yaml or .yml; name it so"])
    title, stages = TEMPLATES[template]
    where = file.name if file.is_absolute() else file.as_posix()
    if model.startswith("file:") and not (found := file_path(model, file.absolute().parent)).exists():
        raise ConfigError([f"--model {model}: {missing_file(found)}"])
    model = model if yaml.safe_load(model) == model else json.dumps(model, ensure_ascii=False)
    head = _HEAD.format(schema=SCHEMA, title=title, file=where, name=_name(file), model=model)
    tuned = "ppo" if template == "ppo" else "dpo"
    baseline, reference = ("base", model) if template == "feedback" else ("sft", "stage:sft")
    evaluate = _EVALUATE.format(baseline=baseline, reference=reference, tuned=tuned)
    return head + stages.replace("{model}", model) + evaluate


def _name(file: Path) -> str:
    """Return the pipeline's name, the file's, as YAML writes it."""
    import yaml

    from align_pipeline.pipeline.config import FOLDERS

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.stem) or file.stem in FOLDERS:
        raise ConfigError(
            [f"{file}: a pipeline is named as its file, with letters, digits, _, - and .; name the file otherwise"]
        )
    plain = file.stem[0].isalpha() and yaml.safe_load(file.stem) == file.stem
    return file.stem if plain else json.dumps(file.stem)


def _beside(file: Path, text: str) -> Iterator[tuple[Path, str]]:
    """Yield the files to write: the rows that the pipeline names, its schema for editors, and itself last."""
    from align_pipeline.pipeline.schema import schema

    for name, rows in _examples().items():
        if f"file:{name}\n" in text:
            yield file.parent / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    yield file.parent / SCHEMA, json.dumps(schema(), indent=1) + "\n"
    yield file, text


def _write(path: Path, text: str) -> bool:
    """Write a file unless there is one; return whether it was written."""
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        return False
    return True


# --- example rows -----------------------------------------------------------------------------------------------------

_TALKS = (
    ("Where is my order?", "Please tell me its number and I will look it up for you.", "No idea."),
    ("Can I return a lamp?", "Yes, within 30 days; keep the receipt, please.", "Read the terms."),
    ("Do you ship to Norway?", "Yes, in five to seven days.", "Norway is a country in Europe."),
    ("The cup arrived broken.", "I am sorry! We will send you a new one today.", "That happens."),
    ("How do I change my address?", "Open Account, then Address, and save the new one.", "In the settings, probably."),
    ("Is the red chair in stock?", "It is; we have four of them left.", "Look at the shop."),
    ("My password does not work.", "Let us reset it: I have just sent you a link.", "Try another one."),
    ("When do you open?", "At nine, from Monday to Saturday.", "In the morning."),
    ("Can I pay by invoice?", "Yes, choose Invoice at the last step.", "We take money."),
    ("Which brush is for oil paint?", "The one with hog bristles, number 12.", "Any brush paints."),
    ("I was charged twice.", "I am sorry; the second charge goes back to you today.", "Ask your bank."),
    ("Do you wrap gifts?", "Gladly, for two euros; tick the box in the basket.", "Sometimes."),
)
"""What a customer asks, an answer that helps, and one that does not."""

_HELD_OUT = (
    "Where can I see my invoices?",
    "Is the blue cup in stock?",
    "The lamp does not work.",
    "Do you ship to Malta?",
)


def _examples() -> dict[str, list[dict[str, Any]]]:
    """Return the example files: a dozen rows each, of a shop's help desk."""

    def said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    def thumb(number: int, question: str, answer: str, label: int) -> dict[str, Any]:
        user = f"user-{2 * number + (label < 0)}"
        return {"event_type": "rating", "prompt": question, "response": answer, "label": label, "user_id": user}

    return {
        "example-sft.jsonl": [{"messages": [said("user", ask), said("assistant", good)]} for ask, good, _ in _TALKS],
        "example-preferences.jsonl": [
            {"prompt": [said("user", ask)], "chosen": [said("assistant", good)], "rejected": [said("assistant", bad)]}
            for ask, good, bad in _TALKS
        ],
        "example-prompts.jsonl": [{"prompt": [said("user", ask)]} for ask, _, _ in _TALKS],
        "example-heldout.jsonl": [{"prompt": [said("user", ask)]} for ask in _HELD_OUT],
        "example-feedback.jsonl": [
            thumb(number, ask, answer, label)
            for number, (ask, good, bad) in enumerate(_TALKS)
            for answer, label in ((good, 1), (bad, -1))
        ],
    }
