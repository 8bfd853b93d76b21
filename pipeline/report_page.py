"""The page of a report: facts in, one HTML file out that loads nothing and runs nothing.

The page is `report.html.jinja` with `report.css` inside; it has no script, and its policy forbids all but that one
style sheet. The template escapes whatever it prints, and what no page may hold is replaced before that (`clean`).
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from align_pipeline.pipeline import report_charts as charts
from align_pipeline.pipeline import report_words as words
from align_pipeline.pipeline.files import clean
from align_pipeline.pipeline.plan import flattened
from align_pipeline.pipeline.progress import in_words, number
from align_pipeline.pipeline.report_charts import Bin, Box, Model, Series, drawable
from align_pipeline.pipeline.report_facts import COMPARED, Evaluation, Facts, StageFacts
from align_pipeline.pipeline.store import Artifact

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent
SAMPLES = 6
"""Prompts whose answers are shown side by side; as many again where the reward changed most."""

STATUS = {
    "done": "up to date",
    "outdated": "out of date",
    "running": "running",
    "unfinished": "not finished",
    "failed": "failed",
    "blocked": "blocked by a gate",
    "waits": "waiting",
    "new": "never run",
    "damaged": "damaged",
}

CURVES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "held out", "held_out_loss": "held out"}),
    ("Reward", {"score": "training prompts", "eval_score": "held-out prompts", "mean_reward": "mean of a batch"}),
    ("Implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Objective: reward less KL", {"eval_objective": "held-out prompts", "held_out_objective": "held-out prompts"}),
    ("KL to the reference, nats an answer", {"kl": "training prompts", "eval_kl": "held-out prompts"}),
    ("Pairs that are right", {"accuracy": "training", "rewards/accuracies": "training",
                              "eval_accuracy": "held out", "eval_rewards/accuracies": "held out"}),
    ("Gradient norm", {"grad_norm": "model", "value_grad_norm": "value model"}),
    ("Learning rate", {"learning_rate": "learning rate"}),
    ("Entropy, nats a token", {"entropy": "training", "eval_entropy": "held out"}),
    ("Answer length, tokens", {"length": "training prompts", "eval_length": "held-out prompts"}),
    ("Explained variance of the value model", {"explained_variance": "training"}),
    ("GPU utilisation, %", {"gpu_utilization": "at each log line"}),
)  # fmt: skip
"""Title -> what is logged under which names; of two names for one line the first that is there is drawn."""

FIRST = ("reward", "win_rate", "kl", "length_controlled_win_rate", "judge_win_rate", "length", "eos_rate", "perplexity",
         "distinct_2")  # fmt: skip
LAST = ("refusal_harmful", "refusal_harmless")


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows, and the names of its colours."""

    title: str
    drawing: Markup
    legend: Sequence[tuple[str, int]] = ()
    says: str = ""


def page(facts: Facts, made_at: str) -> str:
    """Return the whole page; `made_at` is when, in words."""
    style = (HERE / "report.css").read_text(encoding="utf-8")
    linked = {stage.name: f"stage-{place}" for place, stage in enumerate(facts.stages)}
    return _template().render(
        style=Markup(style),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        facts=facts,
        made_at=made_at,
        summary=list(words.summary(facts)),
        warnings=list(words.warnings(facts)),
        status=STATUS,
        link=linked,
        flows=flows(facts, linked),
        curves={stage.name: list(curves(stage)) for stage in facts.stages},
        evaluations=[evaluated(one, facts) for one in facts.evaluations],
        calibrations=[found for stage in facts.stages if (found := calibrated(stage))],
        data=[(stage.name, words.data_of(stage)) for stage in facts.stages if words.data_of(stage)],
        data_sentences=words.data_sentences,
        total_seconds=sum(stage.resources.get("seconds", 0.0) for stage in facts.stages),
        total_device_seconds=sum(stage.resources.get("device_seconds", 0.0) for stage in facts.stages),
        share_bar=charts.share_bar,
        names=names_of(facts),
        utilisation=utilisation(facts),
    )


@cache
def _template() -> Template:
    """Return the template, compiled once: that is a third of what a page costs."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=ChainableUndefined,  # artifacts of older versions lack what came later
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": number, "in_words": in_words, "size": size, "flattened": flattened}
    return environment.get_template("report.html.jinja")


def size(count: float) -> str:
    """Return bytes for people: `612 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


# --- the flow and the curves ------------------------------------------------------------------------------------------


def flows(facts: Facts, linked: Mapping[str, str]) -> Mapping[str, Markup]:
    """Return the graph of stages for wide and for narrow screens."""
    boxes = []
    for stage in facts.stages:
        seconds = stage.resources.get("seconds")
        state = in_words(seconds) if stage.status == "done" and seconds is not None else STATUS[stage.status]
        title = f"{stage.name} ({stage.type}): {STATUS[stage.status]}"
        boxes.append(Box(stage.name, stage.type, state, look(stage), title, stage.needs, linked[stage.name]))
    label = "The stages and what each reads: " + "; ".join(
        f"{stage.name} ({STATUS[stage.status]}) reads {', '.join(stage.needs) or 'no other stage'}"
        for stage in facts.stages
    )
    return {
        "wide": charts.flow(boxes, label, charts.ACROSS),
        "narrow": charts.flow(boxes, label, charts.UPRIGHT),
    }


def look(stage: StageFacts) -> str:
    """Return how a stage is coloured: as its status, or as failed where a gate of it did."""
    return "failed" if stage.status == "done" and any(not gate["passed"] for gate in stage.gates) else stage.status


def curves(stage: StageFacts) -> Iterator[Figure]:
    """Yield the curves of a stage that were logged."""
    for title, named in CURVES:
        series: dict[str, Series] = {}
        for name, label in named.items():
            points = [
                (point["step"], point[name]) for point in stage.points if math.isfinite(point.get(name, math.nan))
            ]
            if points and label not in series:
                series[label] = Series(label, points, len(series))
        if series:
            drawn = charts.curves(list(series.values()), f"{title} of {stage.name} over its steps")
            legend = [(label, one.colour) for label, one in series.items()]
            yield Figure(title, drawn, legend if len(legend) > 1 else [])


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluated(evaluation: Evaluation, facts: Facts) -> Mapping[str, Any]:
    """Return what the page shows of an evaluation."""
    colour = charts.colours(evaluation.models)
    return {
        "of": evaluation,
        "says": list(words.outcome(evaluation)),
        "told": len(facts.evaluations) > 1 or evaluation.title == COMPARED,
        "colour": colour,
        "columns": columns(evaluation),
        "figures": [*frontier(evaluation, facts, colour), *rewards(evaluation, colour)],
        "reads": {name: evaluation.artifact.record["inputs"].get(f"models.{name}", {}) for name in evaluation.models},
        "samples": list(side_by_side(evaluation)),
        "speeds": list(speeds(evaluation)),
    }


def columns(evaluation: Evaluation) -> list[str]:
    """Return the metrics of the first table, those that people look for first."""
    found = {key.partition("/")[2] for key in evaluation.metrics}
    checks = [name for check in evaluation.report.get("checks", ()) for name in (check, f"{check}_gain")]
    labelled = [f"{name}_accuracy" for name in evaluation.report.get("labelled", ())]
    return [name for name in (*FIRST, *checks, *labelled, *LAST) if name in found]


def speeds(evaluation: Evaluation) -> Iterator[tuple[str, str, Sequence[Mapping[str, float]]]]:
    """Yield model, requests at once and figures (milliseconds to the first token, tokens and requests a second).

    Each figure has a value and the ends of its interval; nothing where speed was not measured.
    """
    speed = evaluation.artifact.record["resources"].get("speed") or {}
    for model, rounds in speed.get("models", {}).items():
        for at_once, found in rounds.items():
            first = {name: seconds * 1000 for name, seconds in found["first_token_seconds"]["p50"].items()}
            yield model, at_once, (first, found["tokens_per_second"], found["requests_per_second"])


def frontier(evaluation: Evaluation, facts: Facts, colour: Mapping[str, int]) -> Iterator[Figure]:
    """Yield reward over KL of all models, with the way that PPO took where it is measured alike."""
    models = []
    for name in evaluation.models:
        kl = 0.0 if name == evaluation.baseline else evaluation.of(name, "kl")
        reward, low, high = (evaluation.of(name, f"reward{end}") for end in ("", "_low", "_high"))
        if kl is not None and reward is not None and low is not None and high is not None:
            models.append(Model(name, kl, reward, low, high, colour[name]))
    if not models:
        return
    paths, says = [], ["Points are models with the 95 % interval of their reward; the baseline lies at KL 0."]
    inputs = evaluation.artifact.record["inputs"]
    made = {name: inputs.get(f"models.{name}", {}).get("digest") for name in evaluation.models}
    base, scorer = made[evaluation.baseline], inputs.get("scorer", {}).get("digest")
    for stage in facts.stages:
        way = ppo_way(stage)
        if not way or stage.artifact is None:
            continue
        read = stage.record["inputs"]
        if read.get("policy", {}).get("digest") == base and read.get("reward", {}).get("digest") == scorer:
            mine = [name for name, digest in made.items() if digest == stage.artifact.digest]
            paths.append(Series(f"{stage.name} while it learnt", way, colour[mine[0]] if mine else len(colour)))
            says.append(f"The line is {stage.name} while it learnt, on its own prompts.")
        else:
            says.append(f"{stage.name} has no line: it started from another model or learnt from another reward.")
    title = "Reward and its price: the frontier"
    label = "Reward over KL: " + "; ".join(f"{one.label} {one.reward:.3g} at {one.kl:.3g}" for one in models)
    yield Figure(title, charts.frontier(models, paths, label), (), " ".join(says))


def ppo_way(stage: StageFacts) -> list[charts.Point]:
    """Return KL and score of each evaluation that PPO made of itself, else of each iteration."""
    for kl, score in (("eval_kl", "eval_score"), ("kl", "score")):
        way = [(point[kl], point[score]) for point in stage.points if kl in point and score in point]
        if len(way) > 1:
            return way
    return []


def rewards(evaluation: Evaluation, colour: Mapping[str, int]) -> Iterator[Figure]:
    """Yield how the rewards of all answers of each model are distributed."""
    rows = []
    for name in evaluation.models:
        scores = [one["scores"].get("reward") for row in evaluation.samples for one in row["answers"].get(name, ())]
        finite = [float(score) for score in scores if score is not None and drawable(score)]
        if finite:
            rows.append((name, finite, colour[name]))
    if rows:
        says = "One bar is a share of a model's answers; the line is their mean."
        if not evaluation.all_read:
            says += f" Of the first {len(evaluation.samples):,} prompts."
        label = "Rewards: " + "; ".join(f"{name} {sum(found) / len(found):.3g} in the mean" for name, found, _ in rows)
        yield Figure("Rewards of the answers", charts.distributions(rows, label, "reward"), (), says)


def side_by_side(evaluation: Evaluation) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Yield the first prompts whose answers differ, and those where the reward of the best model moved most."""
    different = [row for row in evaluation.samples if len({_first(row, name)["text"] for name in row["answers"]}) > 1]
    if different:
        alike = len(evaluation.samples) - len(different)
        yield f"The first prompts whose answers differ ({alike:,} are answered alike)", different[:SAMPLES]
    rest = different[SAMPLES:]
    others = [name for name in evaluation.models if evaluation.of(name, "win_rate") is not None]
    if not others or not rest:
        return
    best = max(others, key=lambda name: evaluation.of(name, "win_rate") or 0)
    moved = sorted(rest, key=lambda row: _score(row, best) - _score(row, evaluation.baseline))
    half = min(SAMPLES // 2, len(moved) // 2)
    if half:
        yield f"Where {best} scores highest above {evaluation.baseline}", moved[: -half - 1 : -1]
        yield f"Where {best} scores lowest below {evaluation.baseline}", moved[:half]


def _first(row: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    first: Mapping[str, Any] = row["answers"][model][0]
    return first


def _score(row: Mapping[str, Any], model: str) -> float:
    score = _first(row, model)["scores"].get("reward")
    return float(score) if score is not None and drawable(score) else 0.0


# --- reward models ----------------------------------------------------------------------------------------------------


def calibrated(stage: StageFacts) -> tuple[str, Sequence[Figure], Mapping[str, float]] | None:
    """Return how sure and how right a reward model is on its held-out pairs."""
    if stage.artifact is None or stage.artifact.kind != "reward_model":
        return None
    metrics = stage.record["metrics"]
    if not stage.pair_scores:
        return stage.name, (), metrics
    margins = [chosen - rejected for chosen, rejected in stage.pair_scores]
    bins = confidence_bins(margins)
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / len(margins)
    figures = [
        Figure(
            "Calibration",
            charts.calibration(bins, f"Accuracy over confidence of {stage.name}, calibration error {error:.3f}"),
            (),
            f"Each dot holds the pairs of about one confidence; on the dashed line a model is as often right as it is "
            f"sure, below it too sure. Calibration error {error:.3f} on {len(margins):,} held-out pairs.",
        )
    ]
    rows = [
        ("chosen", [chosen for chosen, _ in stage.pair_scores], 0),
        ("rejected", [rejected for _, rejected in stage.pair_scores], 1),
        ("difference", margins, 2),
    ]
    drawn = charts.distributions(rows, f"Scores of chosen and rejected answers by {stage.name}", "score")
    figures.append(Figure("Scores of held-out pairs", drawn, (), "Right of 0 the difference is a pair that is right."))
    return stage.name, figures, metrics


def confidence_bins(margins: Sequence[float], count: int = 10) -> list[Bin]:
    """Return the bins that have pairs, of equal width over the confidence sigmoid(|margin|) from 0.5 to 1."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        place = min(int((confidence - 0.5) * 2 * count), count - 1)
        members[place].append((confidence, (margin > 0) + 0.5 * (margin == 0)))
    return [
        Bin(sum(sure for sure, _ in group) / len(group), sum(right for _, right in group) / len(group), len(group))
        for group in members
        if group
    ]


# --- resources and lineage --------------------------------------------------------------------------------------------


def utilisation(facts: Facts) -> str:
    """Say why there is no curve of the GPU's utilisation; nothing where there is one."""
    if any("gpu_utilization" in point for stage in facts.stages for point in stage.points):
        return ""
    if not any(stage.resources.get("peak_device_memory_bytes") for stage in facts.stages):
        return "No stage used a GPU, so there is no utilisation to show."
    return "GPU utilisation was not logged; it is where nvidia-ml-py is installed beside torch."


def names_of(facts: Facts) -> Mapping[str, str]:
    """Return for each artifact's digest the stage of this pipeline that it is."""
    artifacts: list[tuple[Artifact, str]] = [(one.artifact, one.name) for one in facts.stages if one.artifact]
    return {artifact.digest: name for artifact, name in artifacts}
