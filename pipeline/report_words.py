"""What a report says in sentences: the outcome on top, and what a person should know before trusting it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align_pipeline.pipeline.report_facts import Evaluation, Facts, StageFacts

CUT_OFF = 0.1
"""Share of answers that end at max_new_tokens from which it is worth a word."""


def summary(facts: Facts) -> Iterator[str]:
    """Yield the outcome, the most important first: what stopped, who won, what is not up to date."""
    by_status: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        by_status.setdefault(stage.status, []).append(stage)
    if len(by_status.get("new", ())) + len(by_status.get("waits", ())) == len(facts.stages):
        yield f"Nothing has run yet; `align run {facts.file}` starts it."
        return
    for stage in by_status.get("failed", ()):
        yield f"{stage.name} failed: {stage.says.removeprefix(f'stage {stage.name} failed: ')}"
    for stage in by_status.get("damaged", ()):
        yield f"{stage.name} is damaged: {stage.says}"
    for stage in facts.stages:
        for gate in stage.gates:
            if not gate["passed"]:
                numbers = f"{gate['gate']}: {gate['says']}"
                if stage.status == "blocked":
                    yield f"{stage.name} does not start, as its gate failed: {numbers}."
                else:
                    yield f"A gate of {stage.name} failed, so what depends on it does not run: {numbers}."
    for stage in by_status.get("running", ()):
        yield f"{stage.name} is running now, started by {stage.says}."
    outdated = {stage.name for stage in facts.stages if stage.status != "done"}
    for evaluation in facts.evaluations:
        before = "Before the last change: " if evaluation.title in outdated else ""
        yield from (f"{before}{sentence}" for sentence in outcome(evaluation))
    done = len(by_status.get("done", ()))
    if done == len(facts.stages):
        stages, made = (f"All {done} stages are", "they") if done > 1 else ("The one stage is", "it")
        yield f"{stages} up to date{'' if facts.evaluations else f'; no evaluation compares what {made} made'}."
        return
    left = ((status, [stage.name for stage in by_status.get(status, ())]) for status in _LEFT)
    yield f"{done} of {len(facts.stages)} stages are up to date; " + "; ".join(
        f"{_LEFT[status]}: {', '.join(names)}" for status, names in left if names
    )


_LEFT = {
    "outdated": "out of date",
    "unfinished": "not finished",
    "running": "running",
    "failed": "failed",
    "damaged": "damaged",
    "blocked": "blocked",
    "waits": "waiting for others",
    "new": "never run",
}


def outcome(evaluation: Evaluation) -> Iterator[str]:
    """Yield which model won an evaluation, how surely, and what it cost."""
    base, prompts = evaluation.baseline, evaluation.report.get("prompts", "?")
    others = [name for name in evaluation.models if evaluation.of(name, "win_rate") is not None]
    where = "" if evaluation.title == "evaluate" else f" ({evaluation.title})"
    if not others:
        yield f"Only {base} was evaluated, on {prompts} prompts{where}; a second model would be compared with it."
        return
    better = [name for name in others if _metric(evaluation, name, "win_rate_low") > 0.5]
    worse = [name for name in others if _metric(evaluation, name, "win_rate_high") < 0.5]
    best = max(better or others, key=lambda name: _metric(evaluation, name, "win_rate"))
    rate, low, high = (_metric(evaluation, best, f"win_rate{end}") for end in ("", "_low", "_high"))
    numbers = f"{rate:.1%} [{low:.1%}, {high:.1%}] of the comparisons on {prompts} prompts"
    kl = f", at a KL of {_metric(evaluation, best, 'kl'):.2f} nats an answer"
    if better:
        also = [f"{name} ({_metric(evaluation, name, 'win_rate'):.1%})" for name in better if name != best]
        yield f"{best} won{where}: by the scorer it beats {base} in {numbers}{kl}." + (
            f" Better than {base} too: {', '.join(also)}." if also else ""
        )
    elif len(worse) == len(others):
        yield f"Every model is worse than {base}{where}: {best}, the best, wins only {numbers}."
    else:
        yield f"No model is surely better than {base}{where}: {best} wins {numbers}{kl}."
    if better and worse:
        yield f"Worse than {base}: {', '.join(worse)}."


def _metric(evaluation: Evaluation, model: str, name: str) -> float:
    value = evaluation.of(model, name)
    return float("nan") if value is None else value


# --- warnings ---------------------------------------------------------------------------------------------------------


def warnings(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield a stage and what should be known of it, each once."""
    seen: set[tuple[str, str]] = set()
    for stage in facts.stages:
        for text in _of_stage(stage):
            if (stage.name, text) not in seen:
                seen.add((stage.name, text))
                yield stage.name, text
    for evaluation in facts.evaluations:
        for text in _of_evaluation(evaluation):
            yield evaluation.title, text


def _of_stage(stage: StageFacts) -> Iterator[str]:
    for report in data_of(stage).values():
        yield from (str(note) for note in report.get("notes", ()))
    yield from stage.warnings
    if stage.record.get("how", {}).get("changed_between_resumes"):
        yield "its speed and memory settings changed between two resumes, so it is the same within rounding only"
    metrics = stage.record.get("metrics", {})
    if "held_out_objective" in metrics and metrics["held_out_objective"] < metrics["start_objective"]:
        yield "the best evaluation is worse than that of the start; the policy did not improve"


def _of_evaluation(evaluation: Evaluation) -> Iterator[str]:
    most = evaluation.report.get("max_new_tokens", "?")
    for model in evaluation.models:
        ended = evaluation.of(model, "eos_rate")
        if ended is not None and 1 - ended >= CUT_OFF:
            yield f"{1 - ended:.0%} of the answers of {model} were cut off at {most} tokens"
        rate, low = evaluation.of(model, "win_rate"), evaluation.of(model, "win_rate_low")
        equal = evaluation.of(model, "length_controlled_win_rate_low")
        if rate is not None and low is not None and equal is not None and low > 0.5 >= equal:
            controlled = _metric(evaluation, model, "length_controlled_win_rate")
            yield (
                f"{model} wins {rate:.0%} by the scorer, but {controlled:.0%} where answers are of equal length, which "
                "is not surely more than half: its length may be what wins"
            )


def data_of(stage: StageFacts) -> Mapping[str, Mapping[str, Any]]:
    """Return the reports of the rows that a stage read, by field."""
    data = stage.record.get("data") or {}
    return {field: report for field, report in data.items() if isinstance(report, Mapping)}


def data_sentences(report: Mapping[str, Any]) -> Sequence[str]:
    """Return what the rows of a field are like, beside what the report itself notes."""
    said = []
    length = report.get("length") or {}
    longer = report.get("longer_chosen", length.get("chosen_longer_share") if isinstance(length, Mapping) else None)
    if longer is not None:
        said.append(f"The chosen answer is longer in {longer:.0%} of pairs.")
    if "liked" in report:
        said.append(f"{report['liked']:.0%} of the answers were liked.")
    return said
