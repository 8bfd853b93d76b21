"""TensorZero: the tables of feedback (boolean, float, demonstration, comment) and the inferences that they are about.

Give the files of both: feedback finds its inference by id, or by its episode where that has one inference only,
wherever it stands. Only feedback is held in memory; inferences are read again.

Scale: a boolean metric is up where it is true. Its configuration may say that less is better (optimize = "min"), which
the tables do not: leave such metrics out of the files. A float says no direction and is left out, and so is a comment.
A demonstration is the answer that was wanted, beside the one that was given.

Metrics of evaluations are a model's, or an annotator's where the row says that a human gave it. The time is in the id.
The prompt is the function's input: an object of arguments is written as JSON, as the template that made it a text is
not in the tables. The user is the tag user_id where there is one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any
from uuid import UUID

from align_pipeline.data.feedback.adapter import Adapter, Events, Rows
from align_pipeline.data.feedback.adapters.common import (
    broken,
    compact,
    first,
    ident,
    objects,
    orphan,
    parsed,
    rated,
    system,
    when,
)
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

INFERENCE = frozenset(("function_name", "variant_name", "episode_id", "input", "output"))
_EVALUATION = "tensorzero::evaluation"
_HUMAN = "tensorzero::human_feedback"


def _is_feedback(record: Record) -> bool:
    keys = record.keys()
    about = {"target_id", "metric_name"} <= keys or {"target_id", "target_type"} <= keys or "inference_id" in keys
    return about and {"id", "value"} <= keys


def recognise(record: Record) -> bool:
    return record.keys() >= INFERENCE or _is_feedback(record)


def convert(rows: Rows) -> Events:
    yield from broken(rows)
    waiting: dict[str, list[tuple[str, Record]]] = defaultdict(list)
    episodes: Counter[str] = Counter()
    for where, record in objects(rows):
        if record.keys() >= INFERENCE:
            episodes[ident(record["episode_id"]) or ""] += 1
            continue
        try:
            waiting[_target(record)].append((where, record))
        except Bad as bad:
            yield where, bad
    for _, inference in objects(rows):
        if inference.keys() >= INFERENCE:
            episode = ident(inference["episode_id"]) or ""
            found = waiting.pop(ident(inference.get("id")) or "", [])
            if episodes[episode] == 1:
                found += waiting.pop(episode, [])
            for where, feedback in found:
                try:
                    yield where, _event(feedback, inference)
                except Bad as bad:
                    yield where, bad
    for target, left in waiting.items():
        for where, record in left:
            key = "inference_id" if "inference_id" in record else "target_id"
            if many := episodes[target]:
                what = f"{key}: {show(target)}, an episode of {many} inferences, a rating is read of one answer"
                yield where, Bad(f"{what}; drop it", "orphan_ref")
            else:
                yield where, orphan(key, target, "an inference")


def _target(record: Record) -> str:
    """Return what a feedback is about; raise Bad for what says neither up nor down."""
    if not _is_feedback(record):
        raise Bad("target_id: neither an inference nor feedback; drop the record", "unknown_event_type")
    target = ident(first(record, "target_id", "inference_id"))
    if target is None:
        raise Bad(f"target_id: {show(record.get('target_id'))}, must name an inference; drop the record", "orphan_ref")
    value = record["value"]
    if "inference_id" not in record:
        if "metric_name" not in record:
            raise Bad("value: a comment, which says neither up nor down; drop it", "comment")
        if type(value) in (int, float):
            rule = "a float metric says no direction"
            raise Bad(f"value: {show(value)} of {show(record['metric_name'])}, {rule}; drop it", "no_direction")
    return target


def _event(feedback: Record, inference: Record) -> Record:
    answer = _output(inference["output"], "output")
    demonstrated = "inference_id" in feedback
    if demonstrated:
        said = {
            "event_type": "demonstration",
            "response": _output(feedback["value"], "value"),
            "original_response": answer,
        }
    else:
        said = {"event_type": "rating", "label": rated(feedback["value"], "value"), "response": answer}
    tags, about = _tags(feedback), _tags(inference)
    name = ident(feedback.get("id"))
    return canonical(
        {
            **said,
            "event_id": name,
            "ts": when(feedback.get("timestamp")) or _time(name),
            "actor": _actor(feedback, tags),
            "user_id": first(tags, "user_id") or first(about, "user_id"),
            "conversation_id": inference.get("episode_id"),
            "prompt": _input(inference["input"]),
            "model": inference.get("variant_name"),
        }
    )


def _tags(record: Record) -> Record:
    tags = parsed(record.get("tags"))
    return tags if type(tags) is dict else {}


def _actor(feedback: Record, tags: Record) -> str | None:
    if str(tags.get(_HUMAN)).lower() == "true":
        return "annotator"
    automatic = str(feedback.get("metric_name")).startswith(_EVALUATION) or any(
        key.startswith(_EVALUATION) for key in tags
    )
    return "model" if automatic else None


def _time(name: str | None) -> int | None:
    """Return the milliseconds since 1970 in a UUID of version 7."""
    try:
        uuid = UUID(name or "")
    except ValueError:
        return None
    return uuid.int >> 80 if uuid.version == 7 else None


def _input(value: Any) -> list[Record]:
    given = parsed(value)
    if type(given) is not dict or type(given.get("messages")) is not list:
        raise Bad(f"input: {kind(given)} ({show(given)}), must be an object with messages; drop it", "missing_prompt")
    above = given.get("system")
    path = system(above if type(above) in (str, type(None)) else compact(above))
    for index, message in enumerate(given["messages"]):
        if type(message) is not dict:
            raise Bad(f"input.messages[{index}]: {show(message)}, must be an object; fix the export", "wrong_type")
        path.append(_turn(message))
    return path


def _turn(message: Record) -> Record:
    content = message.get("content")
    if type(content) is dict:  # as older gateways keep the arguments of a template
        content = compact(content)
    if type(content) is not list:
        return {"role": message.get("role"), "content": content}
    if any(type(part) is dict and part.get("type") in ("tool_call", "tool_result") for part in content):
        return {"role": "tool", "content": ""}
    return {"role": message.get("role"), "content": _parts(content)}


def _parts(content: list[Any]) -> list[Any]:
    """Return the parts of a message as the event reader takes them; thoughts are no part of it."""
    return [
        {"type": "text", "text": _said(part)}
        if type(part) is dict and part.get("type") in ("text", "raw_text", "template")
        else part
        for part in content
        if type(part) is not dict or part.get("type") != "thought"
    ]


def _said(part: Record) -> str:
    value = first(part, "text", "value", "arguments")
    return value if type(value) is str else "" if value is None else compact(value)


def _output(value: Any, key: str) -> Any:
    """Return an answer: the parts of a chat function's, the raw text of a JSON function's."""
    given = parsed(value)
    if type(given) is list:
        return _parts(given)
    if type(given) is dict and (given.get("raw") is not None or given.get("parsed") is not None):
        return given["raw"] if type(given.get("raw")) is str else compact(given.get("parsed"))
    raise Bad(f"{key}: {kind(given)} ({show(given)}), must be parts or {{raw}}; drop it", "missing_response")


ADAPTER = Adapter(
    "tensorzero",
    recognise,
    "function_name, variant_name, input of inferences; target_id, metric_name of feedback",
    convert,
)
