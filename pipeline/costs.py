"""What the models of an evaluation cost to make, and how fast they answer: read from artifacts, part of no result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.manifest import ancestors
from align_pipeline.pipeline.progress import in_words
from align_pipeline.pipeline.store import Artifact, Store


@dataclass(frozen=True)
class Cost:
    """What was spent, on one stage or on several: seconds are sums, memory is the largest."""

    name: str
    """The artifact's key; of several stages how many they are."""
    seconds: float
    device_seconds: float
    cpu_seconds: float
    peak_memory_bytes: float
    peak_device_memory_bytes: float


def behind(store: Store, artifact: Artifact) -> list[Cost]:
    """Return what each stage behind an artifact cost, the oldest first and its own last."""
    names = ("seconds", "device_seconds", "cpu_seconds", "peak_memory_bytes", "peak_device_memory_bytes")
    return [
        Cost(one.key, *(one.record["resources"].get(name) or 0.0 for name in names))
        for one in ancestors(store, artifact)
    ]


def together(costs: Sequence[Cost]) -> Cost:
    """Return what one or more stages cost."""
    return Cost(
        f"{len(costs)} stages" if len(costs) > 1 else "1 stage",
        sum(one.seconds for one in costs),
        sum(one.device_seconds for one in costs),
        sum(one.cpu_seconds for one in costs),
        max(one.peak_memory_bytes for one in costs),
        max(one.peak_device_memory_bytes for one in costs),
    )


def behind_models(store: Store, evaluation: Artifact) -> dict[str, list[Cost]]:
    """Return what the stages behind each model of an evaluation cost; none for what was not made here."""
    found = {}
    for field, source in evaluation.record["inputs"].items():
        if field.startswith("models."):
            made = store.made(source.get("artifact"), source["digest"])
            found[field.removeprefix("models.")] = behind(store, made) if made else []
    return found


def gone(store: Store, artifact: Artifact) -> list[str]:
    """Return the keys of what an artifact was made from, as far as it is known, that this store no longer holds."""
    sources = [source for one in ancestors(store, artifact) for source in one.record["inputs"].values()]
    made = {source["artifact"]: source["digest"] for source in sources if source.get("artifact")}
    return [key for key, digest in made.items() if store.made(key, digest) is None]


def costs_and_speeds(store: Store, evaluation: Artifact, measure: str | None = None) -> list[str]:
    """Return the tables of an evaluation that its report cannot hold, as they differ from run to run.

    `measure` is the command that measures speeds, where they were asked for.
    """
    try:
        lines = costs_table(behind_models(store, evaluation))
        if lost := gone(store, evaluation):
            lines += [f"No longer in this store, and not counted: {', '.join(lost)}.", ""]
    except InputError as error:  # what was asked for is there; something that it was made from is not
        lines = [f"What the models cost cannot be told: {error}", ""]
    speed = evaluation.record["resources"].get("speed")
    if speed:
        return [*lines, *speed_table(speed)]
    if measure:
        return [*lines, f"Speed was not measured when {evaluation.key} was made; `{measure}` measures it.", ""]
    return lines


def costs_table(models: Mapping[str, Sequence[Cost]]) -> list[str]:
    """Return a row for each stage behind the models of an evaluation, then one for each model."""
    stages = {cost.name: cost for costs in models.values() for cost in costs}
    rows = [_row(cost, [name for name, costs in models.items() if cost in costs]) for cost in stages.values()]
    rows += [_row(together(costs), [name]) for name, costs in models.items() if costs]
    head = ("stage", "behind", "time", "CPU hours", "device hours", "peak memory", "peak device memory")
    return ["## What the models cost", "", *_table(head, rows)] if rows else []


def _row(cost: Cost, models: Sequence[str]) -> list[str]:
    hours = [f"{seconds / 3600:.3g}" for seconds in (cost.cpu_seconds, cost.device_seconds)]
    memory = [
        f"{size / 1e9:.2f} GB" if size else "" for size in (cost.peak_memory_bytes, cost.peak_device_memory_bytes)
    ]
    return [cost.name, ", ".join(models), in_words(cost.seconds), *hours, *memory]


def speed_table(speed: Mapping[str, Any]) -> list[str]:
    """Return a row for each model and number of requests at once, from `resources.speed` of artifact.json."""
    rows = []
    for model, by_number in speed["models"].items():
        for at_once, found in by_number.items():
            first = found["first_token_seconds"]
            cells = [_interval(first[name], 1000) for name in ("p50", "p95")]
            cells += [_interval(found[f"{what}_per_second"]) for what in ("tokens", "requests")]
            rows.append([model, at_once, *cells])
    head = ("model", "at once", "first token, ms", "95th percentile", "tokens/s", "requests/s")
    said = (
        f"{speed['engine']} on {speed['device']}, {speed['dtype']}: prompts of {speed['prompt_tokens']:g} tokens, "
        f"answers of {speed['new_tokens']}; medians of {speed['repeats']} rounds, in brackets their 95 % intervals. A "
        "first token is there when a request for one is answered; those at once are sent together. Whatever else the "
        "machine did counts too, and was not the same for each model."
    )
    return ["## Speed", "", said, "", *_table(head, rows)]


def _interval(figure: Mapping[str, float], times: float = 1.0) -> str:
    numbers = [figure[name] * times for name in ("value", "low", "high")]
    value, low, high = (f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in numbers)
    return f"{value} [{low}, {high}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]
