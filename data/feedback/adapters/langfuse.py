"""Langfuse: scores and the traces they are about, from the API (camelCase) or the blob export (snake_case).

Give the files of both, and of observations where scores name them: scores find what they are about by its id wherever
it stands. Where no observation is in the files, a score of one is read as one of its trace. Only scores are held in
memory; traces are read again.

Scale: a BOOLEAN score is up where it is true. A CATEGORICAL one is up or down where it is such a word (like, bad, 👍).
A NUMERIC one is -1, 0 (neutral) or 1 where a score of its name is -1 somewhere; other numbers say no direction, 0 and 1
included, and are refused. A score for which more, or true, is worse (toxicity) must be left out of the files: nothing
in them says so. A CORRECTION of the output is an edit.

The end user is the trace's user. A score of source EVAL is a model's, of source ANNOTATION an annotator's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, Events, Rows
from align_pipeline.data.feedback.adapters.common import (
    broken,
    first,
    ident,
    objects,
    orphan,
    parsed,
    rated,
    turns,
    when,
)
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.feedback.scale import find_scale
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

_ACTORS = {"EVAL": "model", "ANNOTATION": "annotator", "API": "end_user"}


def _is_score(record: Record) -> bool:
    return ("dataType" in record or "data_type" in record) and {"name", "source"} <= record.keys()


def _is_trace(record: Record) -> bool:
    told = ("sessionId" in record or "session_id" in record) and ("userId" in record or "user_id" in record)
    return {"id", "input", "output"} <= record.keys() and told


def _is_observation(record: Record) -> bool:
    return {"id", "input", "output", "type"} <= record.keys() and ("traceId" in record or "trace_id" in record)


def recognise(record: Record) -> bool:
    return _is_score(record) or _is_trace(record) or _is_observation(record)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who the trace is of."""

    user: Any
    session: Any


def convert(rows: Rows) -> Events:
    yield from broken(rows)
    waiting: dict[tuple[str, str | None], list[tuple[str, Record]]] = defaultdict(list)
    numbers: dict[str, Counter[Any]] = defaultdict(Counter)
    known, owners = _look(rows)
    for where, record in objects(rows):
        if not _is_score(record):
            if not recognise(record):
                yield where, Bad("id: no score, trace or observation; drop the record", "unknown_event_type")
            continue
        trace, observation = _target(record)
        if trace is None:
            what = "a score of a session or run is about no single answer"
            yield where, Bad(f"traceId: missing, {what}; drop it", "orphan_ref")
            continue
        if _type(record) == "NUMERIC" and type(record.get("value")) in (int, float):
            numbers[str(record.get("name"))][record["value"]] += 1
        waiting[trace, observation if known else None].append((where, record))
    directed = {name for name, values in numbers.items() if _is_pm1(values)}
    for _, record in objects(rows):
        for where, score in waiting.pop(_own(record), ()):
            try:
                yield where, _event(score, record, owners, directed)
            except Bad as bad:
                yield where, bad
    for (trace, observation), scores in waiting.items():
        for where, _ in scores:
            if observation is None:
                yield where, orphan("traceId", trace, "a trace")
            else:
                yield where, orphan("observationId", observation, "an observation")


def _look(rows: Rows) -> tuple[bool, dict[str, _Owner]]:
    """Return whether observations are in the files, and whose each trace is."""
    known = False
    owners = {}
    for _, record in objects(rows):
        trace, observation = _own(record)
        known = known or observation is not None
        if trace and observation is None:
            owners[trace] = _Owner(first(record, "userId", "user_id"), first(record, "sessionId", "session_id"))
    return known, owners


def _own(record: Record) -> tuple[str, str | None]:
    """Return what scores name a trace or an observation by."""
    if not _is_score(record):
        name = ident(record.get("id")) or ""
        if _is_observation(record):
            return ident(first(record, "traceId", "trace_id")) or "", name
        if _is_trace(record):
            return name, None
    return "", None


def _target(score: Record) -> tuple[str | None, str | None]:
    subject = score.get("subject")
    if type(subject) is dict:
        name = ident(subject.get("id"))
        if subject.get("kind") == "trace":
            return name, None
        return ident(subject.get("traceId")), name if subject.get("kind") == "observation" else None
    trace = ident(first(score, "traceId", "trace_id"))
    return trace, ident(first(score, "observationId", "observation_id"))


def _type(score: Record) -> Any:
    return first(score, "dataType", "data_type")


def _is_pm1(values: Counter[Any]) -> bool:
    try:
        return find_scale(values)[0] == "pm1"
    except ValueError:
        return False


def _event(score: Record, record: Record, owners: dict[str, _Owner], directed: set[str]) -> Record:
    source = score.get("source")
    actor = _ACTORS.get(source) if type(source) is str else None
    if actor is None:
        raise Bad(f"source: {show(source)}, must be one of {', '.join(_ACTORS)}; fix the export", "unknown_value")
    said = _said(score, directed)
    trace = _own(record)
    owner = owners.get(trace[0], _Owner(None, None))
    answer = _output(record)
    user = owner.user if actor == "end_user" else first(score, "authorUserId", "author_user_id")
    event = {
        "event_id": score.get("id"),
        "ts": when(first(score, "timestamp", "updatedAt", "updated_at", "createdAt", "created_at")),
        "actor": actor,
        "user_id": user,
        "conversation_id": owner.session,
        "prompt": _input(record),
        "model": first(record, "model", "providedModelName", "provided_model_name"),
    }
    texts = {"original_response": answer} if "response" in said else {"response": answer}
    return canonical({**event, **said, **texts})


def _said(score: Record, directed: set[str]) -> Record:
    """Return what a score says: a label, or another text."""
    sort, name, value = _type(score), score.get("name"), score.get("value")
    text = first(score, "stringValue", "string_value", "longStringValue", "long_string_value")
    if sort == "BOOLEAN":
        return {"event_type": "rating", "label": rated(text if value is None else value, "value", "zero_one")}
    if sort == "CATEGORICAL":
        if text is None and type(value) is str:
            text = value
        return {"event_type": "rating", "label": rated(text, "stringValue")}
    if sort == "NUMERIC" and str(name) in directed:
        return {"event_type": "rating", "label": rated(value, "value", "pm1")}
    if sort == "NUMERIC":
        rule = "the numbers of a score are read where one of them is -1"
        cause = "ambiguous_zero" if value in (0, 1) else "unknown_rating"
        raise Bad(f"value: {show(value)} of {show(name)}, {rule}; make it BOOLEAN, or drop it", cause)
    if sort == "CORRECTION" and name == "output":
        return {"event_type": "edit", "response": _text(value if text is None else text, "value")}
    rule = "BOOLEAN, NUMERIC and CATEGORICAL scores and a CORRECTION of the output are read"
    raise Bad(f"dataType: {show(sort)} named {show(name)}, {rule}; drop it", "unknown_rating")


_QUESTIONS = ("input", "question", "prompt", "query")
_ANSWERS = ("content", "output", "answer", "response", "text")


def _input(record: Record) -> Any:
    """Return what was asked: messages or a text, whatever it is wrapped in."""
    value = parsed(record.get("input"))
    if type(value) is str:
        if value.strip():
            return value
    elif (found := turns(value)) is not None:
        return found
    elif type(value) is dict:
        if (found := turns(value.get("messages"))) is not None:
            return found
        inside = [value[key] for key in _QUESTIONS if key in value]
        if len(inside) == 1 and ((type(inside[0]) is str and inside[0].strip()) or turns(inside[0])):
            return inside[0] if type(inside[0]) is str else turns(inside[0])
    rule = f"must be messages, a text, or an object with one of messages, {', '.join(_QUESTIONS)}"
    raise Bad(f"input: {kind(value)} ({show(value)}), {rule}; rewrite it, or drop the trace", "missing_prompt")


def _output(record: Record) -> Any:
    return _text(record.get("output"), "output")


def _text(value: Any, key: str) -> Any:
    """Return the answer: a text or parts of one, whatever it is wrapped in."""
    value = parsed(value)
    found = value
    if type(found) is dict and type(found.get("choices")) is list and len(found["choices"]) == 1:
        found = found["choices"][0]
        found = found.get("message", found) if type(found) is dict else found
    if type(found) is list and len(found) == 1 and turns(found):
        found = found[0]
    if type(found) is dict:
        inside = [found[name] for name in _ANSWERS if found.get(name) is not None]
        found = inside[0] if len(inside) == 1 else None
        if type(found) is list and not all(type(part) is dict and "type" in part for part in found):
            found = None
    elif type(found) is list:
        found = None
    if (type(found) is str and found.strip()) or (type(found) is list and found):
        return found
    rule = f"must be a text, a message, or an object with one of choices, {', '.join(_ANSWERS)}"
    raise Bad(f"{key}: {kind(value)} ({show(value)}), {rule}; rewrite it, or drop the trace", "missing_response")


ADAPTER = Adapter(
    "langfuse", recognise, "dataType, name, source of scores; input, output, sessionId, userId of traces", convert
)
