"""Open-Assistant: message trees (one tree a line), or its messages as a flat list that name their parents.

Scale: annotators ranked the answers to one message, 0 is the best. The best is compared with the worst, the second with
the last but one, and so on, so each answer stands in one comparison.

An answer that nobody put beside another says nothing, and nothing comes of it. Where there are others, one that cannot
be compared is counted: without a rank as `unknown_rating` (a list without ranks gives nothing but these), taken down or
refused by its reviewers as `deleted` and `not_reviewed`. Answers to what was taken down are `deleted` too.

A tree is read by itself. Of a flat list the texts of ranked answers and of what they answer are held, and the names of
all messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, Events, Rows
from align_pipeline.data.feedback.adapters.common import branch, broken, first, ident, objects, orphan, preferred
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import show
from align_pipeline.data.sources import Bad, Record

_ROLES = {"prompter": "user", "assistant": "assistant"}
_NAMES = ("message_id", "user_message_id")
_PARENTS = ("parent_id", "parent_message_id")
_SAYING = ("role", "rank", "deleted", "review_result", "model_name", "message_tree_id")
"""What is held of every message of a flat list; texts only where they are needed."""


def recognise(record: Record) -> bool:
    return _is_tree(record) or _is_message(record)


def _is_tree(record: Record) -> bool:
    prompt = record.get("prompt")
    return "message_tree_id" in record and type(prompt) is dict and "replies" in prompt


def _is_message(record: Record) -> bool:
    keys = record.keys()
    named = any(key in keys for key in _NAMES) and any(key in keys for key in _PARENTS)
    return named and {"role", "text"} <= keys


@dataclass(frozen=True, slots=True)
class _Message:
    """A message, where it stands, and what it answers."""

    name: str
    parent: str | None
    where: str
    record: Record


def convert(rows: Rows) -> Events:
    yield from broken(rows)
    for where, record in objects(rows):
        if _is_tree(record):
            messages = {one.name: one for one in _inside(where, record["prompt"])}
            for answers in _sets(messages.values()):
                yield from _compared(answers, messages, record["message_tree_id"])
        elif not _is_message(record):
            yield where, Bad("prompt: neither a tree nor a message; drop the record", "unknown_event_type")
    yield from _flat(rows)


def _inside(where: str, root: Record) -> Iterator[_Message]:
    """Yield the messages of a tree."""
    waiting: list[tuple[Any, str | None]] = [(root, None)]
    while waiting:
        record, parent = waiting.pop()
        name = ident(record.get("message_id")) if type(record) is dict else None
        if name is not None:
            yield _Message(name, parent, where, record)
            replies = record.get("replies")
            waiting.extend((reply, name) for reply in reversed(replies if type(replies) is list else []))


def _flat(rows: Rows) -> Events:
    """Yield the comparisons of messages that stand one to a record."""
    messages: dict[str, _Message] = {}
    for one in _listed(rows):
        slim = {key: one.record[key] for key in _SAYING if key in one.record}
        messages[one.name] = _Message(one.name, one.parent, one.where, slim)
    sets = list(_sets(messages.values()))
    needed: set[str] = set()
    for answers in sets:
        needed.update(one.name for one in answers if _wrong(one) is None)
        last = answers[0].parent
        while last in messages and last not in needed:
            needed.add(last)
            last = messages[last].parent
    for one in _listed(rows) if needed else ():
        if one.name in needed:
            messages[one.name] = one
    for answers in sets:
        whole = [messages[one.name] for one in answers]
        yield from _compared(whole, messages, answers[0].record.get("message_tree_id") or _root(answers[0], messages))


def _listed(rows: Rows) -> Iterator[_Message]:
    for where, record in objects(rows):
        if _is_message(record) and not _is_tree(record) and (name := ident(first(record, *_NAMES))):
            yield _Message(name, ident(first(record, *_PARENTS)), where, record)


def _root(message: _Message, messages: Mapping[str, _Message]) -> str:
    seen: set[str] = set()
    while message.parent is not None and message.parent in messages and message.name not in seen:
        seen.add(message.name)
        message = messages[message.parent]
    return message.name


def _sets(messages: Iterable[_Message]) -> Iterator[list[_Message]]:
    """Yield the answers to each message that has several."""
    found: dict[str, list[_Message]] = defaultdict(list)
    for one in messages:
        if one.parent is not None and one.record.get("role") == "assistant":
            found[one.parent].append(one)
    yield from (answers for answers in found.values() if len(answers) > 1)


def _wrong(message: _Message) -> Bad | None:
    """Return why an answer cannot be compared."""
    record = message.record
    if record.get("deleted") is True:
        return Bad(f"deleted: true on {show(message.name)}, it was taken down; drop it", "deleted")
    if record.get("review_result") is False:
        return Bad(f"review_result: false on {show(message.name)}, its reviewers refused it; drop it", "not_reviewed")
    rank = record.get("rank")
    if type(rank) is int:
        return None
    what = "missing" if rank is None else show(rank)
    rule = "nothing tells which answer is better"
    return Bad(f"rank: {what} on {show(message.name)}, {rule}; rank it, or leave it out", "unranked")


def _compared(answers: list[_Message], messages: Mapping[str, _Message], tree: Any) -> Events:
    """Yield the comparisons among the answers to one message."""
    ranked = []
    for one in answers:
        if (bad := _wrong(one)) is not None:
            yield one.where, bad
        else:
            ranked.append(one)
    ranked.sort(key=lambda one: int(one.record["rank"]))
    try:
        prompt = _prompt(ranked[0], messages) if len(ranked) > 1 else []
    except Bad as bad:
        yield from ((one.where, bad) for one in ranked)
        return
    for best, worst in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        if best.record["rank"] == worst.record["rank"]:
            what = f"rank: {best.record['rank']} on {show(best.name)} and {show(worst.name)}"
            yield best.where, Bad(f"{what}, nothing tells which answer is better; leave them out", "unranked")
            continue
        event = {
            "event_type": "comparison",
            "event_id": f"{best.name}>{worst.name}",
            "actor": "annotator",
            "conversation_id": tree,
            "prompt": prompt,
            **preferred(_answer(best), _answer(worst)),
        }
        yield best.where, canonical(event)


def _answer(message: _Message) -> Record:
    return canonical({"response": message.record.get("text"), "model": message.record.get("model_name")})


def _prompt(answer: _Message, messages: Mapping[str, _Message]) -> list[Record]:
    """Return what an answer answers; raise Bad where some of it is not there or was taken down."""

    def parent(name: str) -> str | None:
        if name not in messages:
            raise orphan("parent_id", name, "a message")
        if messages[name].record.get("deleted") is True:
            raise Bad(f"deleted: true on {show(name)}, which the answers go back to; drop them", "deleted")
        return messages[name].parent

    path = [messages[name].record for name in branch(answer.parent, parent, "parent_id")]
    return [{"role": _ROLES.get(str(one.get("role")), one.get("role")), "content": one.get("text")} for one in path]


ADAPTER = Adapter(
    "oasst", recognise, "message_tree_id and prompt.replies; or message_id, parent_id, role, text", convert
)
