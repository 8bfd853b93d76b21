"""The graph of a pipeline: its edges are the fields that name other stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align_pipeline.pipeline.stage import Stage, references


def needs(stage: Stage) -> list[str]:
    """Return the names of the stages that this one reads, in the order of its fields."""
    named = [ref.removeprefix("stage:") for ref, _ in references(stage).values() if ref.startswith("stage:")]
    return list(dict.fromkeys(named))


def order(stages: Mapping[str, Stage], targets: Sequence[str] = ()) -> list[str]:
    """Return the targets and what they need, each after what it reads; without targets, every stage.

    Stages that do not depend on each other keep the order of the file. The names must exist and the graph must have
    no cycle; `find_cycle` tells.
    """
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in done:
            return
        for other in needs(stages[name]):
            if other in stages:  # else it is given, as an artifact
                visit(other)
        done[name] = None

    for name in targets or stages:
        visit(name)
    return list(done)


def find_cycle(edges: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Return the names along a cycle, the first one again at the end; None when there is none."""
    state: dict[str, str] = {}
    path: list[str] = []

    def visit(name: str) -> list[str] | None:
        state[name] = "open"
        path.append(name)
        for other in edges.get(name, ()):
            if state.get(other) == "open":
                return [*path[path.index(other) :], other]
            if other in edges and other not in state:
                found = visit(other)
                if found:
                    return found
        path.pop()
        state[name] = "done"
        return None

    for name in edges:
        if name not in state:
            found = visit(name)
            if found:
                return found
    return None
