"""Gates: which metric a name in `require` means, and what came of each, from the metrics that artifacts hold.

METRIC is one of the stage itself. NAME/METRIC is one of the stage's own where it measures under that name, as an
`evaluate` stage does under the names of its `models`; otherwise of the stage NAME, which this one depends on.
`stage:NAME/METRIC` is always the stage's. A name that could be a model and another stage is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from align_pipeline.pipeline import rules
from align_pipeline.pipeline.errors import did_you_mean, near_or_all
from align_pipeline.pipeline.rules import OFF, Judged
from align_pipeline.pipeline.stage import Metrics, Stage, references


def meant(text: str, name: str, stage: Stage) -> tuple[str, str]:
    """Return the stage and the metric that a name in the gates of stage `name` means."""
    head, slash, metric = text.rpartition("/")
    if not slash:
        return name, text
    if not head.startswith("stage:") and stage.metric_owner(head) is not None:
        return name, text
    return head.removeprefix("stage:"), metric


def problems(
    name: str, stage: Stage, edges: Mapping[str, Collection[str]], stages: Mapping[str, Stage]
) -> Iterator[tuple[str, str]]:
    """Yield the gates of a stage whose names mean nothing, and why.

    `edges` are the stages that each stage of the file reads; `stages` those of them that are right so far.
    """
    for gate, written in stage.require.items():
        if written == OFF or gate in stage.own_gates:
            problem = _own_gate_problem(gate, written, stage)
        else:
            other = rules.parse(written).metric
            found = (_name_problem(text, name, stage, edges, stages) for text in (gate, other) if text)
            problem = next(filter(None, found), None)
        if problem:
            yield gate, problem


def _own_gate_problem(gate: str, written: str, stage: Stage) -> str | None:
    if gate not in stage.own_gates:
        kind = f"{stage.type} has {', '.join(stage.own_gates)}" if stage.own_gates else f"{stage.type} has none"
        near = did_you_mean(gate, stage.own_gates)
        return f"only gates that a stage has unasked can be off, and {kind}{near or '; remove the line'}"
    if written != OFF:
        return f"{written!r}: a gate of align's own holds unless it is `off`; write `off`, or remove the line"
    return None


def _name_problem(
    text: str, name: str, stage: Stage, edges: Mapping[str, Collection[str]], stages: Mapping[str, Stage]
) -> str | None:
    if not rules.is_metric(text):
        return f"{text!r} names no metric; write METRIC, NAME/METRIC or stage:NAME/METRIC"
    reached = _reached(name, edges)
    head = text.rpartition("/")[0]
    owner = stage.metric_owner(head) if head else None
    if owner is not None and head in reached and owner != f"stage:{head}":
        return (
            f"{text!r} can be model {head!r} of this stage ({owner}) or stage {head!r}; write stage:{text} for the "
            "stage, or name the model otherwise"
        )
    of, metric = meant(text, name, stage)
    if of not in edges:
        return f"no stage {of!r} in this file{near_or_all(of, [*reached, name])}"
    if of != name and of not in reached:
        return f"{name} depends on no stage {of!r}, its metrics may be of another day; choose {', '.join(reached)}"
    known = stages[of].measures() if of in stages else {}
    if known and metric not in known:
        measured = [one for one, lacks in known.items() if not lacks]
        if head in reached and head in stages and metric.rpartition("/")[2] in stages[head].measures():
            return f"{of} measures no {metric!r}; of stage {head!r} it is written stage:{text}"
        return f"{of} measures no {metric!r}{near_or_all(metric, measured)}"
    if known and known[metric]:
        return f"{of} does not measure {metric!r}: {known[metric]}"
    return None


def _reached(name: str, edges: Mapping[str, Collection[str]]) -> list[str]:
    """Return the stages that a stage depends on, directly or through others."""
    found: dict[str, None] = {}
    waiting = list(edges.get(name, ()))
    while waiting:
        one = waiting.pop(0)
        if one in edges and one not in found and one != name:
            found[one] = None
            waiting += edges[one]
    return list(found)


def judge(name: str, stage: Stage, metrics: Mapping[str, Metrics]) -> list[Judged]:
    """Judge what a stage that is done requires; `metrics` are those of the stages that are done, itself included."""

    def value(text: str) -> float | None:
        of, metric = meant(text, name, stage)
        return metrics.get(of, {}).get(metric)

    written = {gate: rules.parse(text) for gate, text in stage.require.items() if text != OFF}
    return [
        rules.judge(gate, rule, value(gate), value(rule.metric) if rule.metric else None)
        for gate, rule in written.items()
    ]


def judge_before(stage: Stage, stages: Mapping[str, Stage], metrics: Mapping[str, Metrics]) -> list[Judged]:
    """Judge the gates that a stage has unasked, before it starts; the stages that it reads are done."""
    makers = {
        field: (stages[maker], metrics[maker])
        for field, (ref, _) in references(stage).items()
        if ref.startswith("stage:") and (maker := ref.removeprefix("stage:")) in metrics
    }
    return [judged for judged in stage.before(makers) if stage.require.get(judged.gate) != OFF]
