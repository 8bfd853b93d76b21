"""LibreChat: conversations as its page exports them (JSON), or the `messages` collection of its MongoDB.

Scale: thumbsUp is up, thumbsDown is down; a message without feedback says nothing.

An export holds one conversation: `messages`, flat, or `messagesTree`, each message with its children. The page writes
it as one object over many lines; write it on one line of a .jsonl file (`jq -c . export.json`). Of the collection each
record is one message (mongoexport, with or without --jsonArray). The CSV export has no ratings and is refused.

The prompt is the branch from the first message to the rated one. In the collection messages find their parents by
conversationId and parentMessageId wherever they stand, so the texts of all branches that end in a rating are held:
memory grows with them, and with the names of all messages. An answer that was edited in place is the edited one: the
product keeps no other. Custom instructions are a system turn in an export whose `options` hold them; the collection of
messages has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, Events, Rows, not_object
from align_pipeline.data.feedback.adapters.common import branch, first, ident, objects, orphan, rated, system, when
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

KEYS = frozenset(("messageId", "parentMessageId", "isCreatedByUser"))
ROOT = "00000000-0000-0000-0000-000000000000"
"""The parent of a first message."""

Name = tuple[str | None, str]
"""Conversation and message."""


def recognise(record: Record) -> bool:
    return record.keys() >= KEYS or _exported(record) is not None


def _exported(record: Record) -> list[Any] | None:
    """Return the messages of an exported conversation."""
    for key in ("messagesTree", "messages"):
        found = record.get(key)
        if type(found) is list and found and type(found[0]) is dict and found[0].keys() >= {"messageId", "text"}:
            return found
    return None


def convert(rows: Rows) -> Events:
    parents: dict[Name, str | None] = {}
    rated_ones: list[Name] = []
    for _, message in _flat(rows):
        name = _name(message)
        if name is not None:
            parents[name] = _parent(message)
            if message.get("feedback"):
                rated_ones.append(name)
    needed: set[Name] = set()
    for conversation, one in rated_ones:
        last: str | None = one
        while last is not None and (conversation, last) not in needed:
            needed.add((conversation, last))
            last = parents.get((conversation, last))
    held = {name: message for _, message in _flat(rows) if (name := _name(message)) in needed and name}
    for where, record in rows:
        if type(record) is not dict:
            yield where, not_object(record)
            continue
        yield from _told(where, record, lambda name: held.get(name))


def _told(where: str, record: Record, find: Callable[[Name], Record | None]) -> Events:
    """Yield the events of one record: a message of the collection, or a whole conversation."""
    messages = [record] if record.keys() >= KEYS else None
    options: Any = None
    if messages is None:
        exported = {name: one for one in _inside(record) if (name := _name(one))}
        messages, options, find = list(exported.values()), record.get("options"), exported.get
        if _exported(record) is None:
            rule = f"must be a message ({', '.join(sorted(KEYS))}) or an exported conversation"
            yield where, Bad(f"messages: missing, a record {rule}; export it again", "missing_field")
            return
    for message in messages:
        try:
            if (event := _event(message, options, find)) is not None:
                yield where, event
        except Bad as bad:
            yield where, bad


def _event(message: Record, options: Any, find: Callable[[Name], Record | None]) -> Record | None:
    user = message.get("isCreatedByUser")
    if type(user) is not bool:
        rule = "must be true or false; a CSV export has no ratings, export JSON"
        raise Bad(f"isCreatedByUser: {kind(user)} ({show(user)}), {rule}", "wrong_type")
    feedback = message.get("feedback")
    if feedback in (None, "", {}):
        return None
    if type(feedback) is not dict:
        what = f"feedback: {kind(feedback)} ({show(feedback)}), must be an object with a rating"
        raise Bad(f"{what}; fix the export", "wrong_type")
    label = rated(feedback.get("rating"), "feedback.rating")
    if user:
        raise Bad("feedback: on a message of the user, only answers are rated; drop it", "bad_role_order")
    finish = message.get("finish_reason")
    return canonical(
        {
            "event_type": "rating",
            "event_id": message.get("messageId"),
            "label": label,
            "ts": when(first(message, "updatedAt", "createdAt")),
            "user_id": message.get("user"),
            "conversation_id": message.get("conversationId"),
            "prompt": _prompt(message, options, find),
            "response": _content(message),
            "model": message.get("model"),
            "finish_reason": "unfinished" if message.get("unfinished") is True else finish,
            "error": True if message.get("error") is True or _failed(message) else None,
        }
    )


def _prompt(message: Record, options: Any, find: Callable[[Name], Record | None]) -> list[Record]:
    conversation = ident(message.get("conversationId"))

    def known(name: str) -> Record:
        found = find((conversation, name))
        if found is None:
            raise orphan("parentMessageId", name, "a message", "export the whole conversation, or drop it")
        return found

    names = branch(_parent(message), lambda name: _parent(known(name)), "parentMessageId")
    path = [
        {"role": "user" if one.get("isCreatedByUser") is True else "assistant", "content": _content(one)}
        for one in map(known, names)
    ]
    told = first(options, "promptPrefix", "system") if type(options) is dict else None
    return [*system(told), *path]


def _flat(rows: Rows) -> Iterator[tuple[str, Record]]:
    """Yield the messages of the collection; those of an exported conversation are joined among themselves."""
    for where, record in objects(rows):
        if record.keys() >= KEYS:
            yield where, record


def _inside(record: Record) -> Iterator[Record]:
    """Yield the messages of an exported conversation, flat."""
    waiting = [(one, None) for one in reversed(_exported(record) or [])]
    while waiting:
        message, parent = waiting.pop()
        if type(message) is not dict:
            continue
        over = {"conversationId": first(message, "conversationId") or record.get("conversationId")}
        if parent is not None:
            over["parentMessageId"] = parent
        children = message.get("children")
        if type(children) is list:
            waiting.extend((child, message.get("messageId")) for child in reversed(children))
        yield {**message, **over}


def _name(message: Record) -> Name | None:
    name = ident(message.get("messageId"))
    return (ident(message.get("conversationId")), name) if name else None


def _parent(message: Record) -> str | None:
    parent = ident(message.get("parentMessageId"))
    return None if parent == ROOT else parent


def _content(message: Record) -> Any:
    """Return what a message says: its text, or the text parts of its content; thoughts and tool calls are no text."""
    said = message.get("text")
    parts = message.get("content")
    if said in (None, "") and type(parts) is list:
        said = _joined(parts)
    files = message.get("files")
    if type(files) is not list or not files:
        return said
    return [*(said if type(said) is list else [{"type": "text", "text": said}]), {"type": "file"}]


def _joined(parts: list[Any]) -> Any:
    texts = []
    for part in parts:
        sort = part.get("type") if type(part) is dict else None
        if sort == "text":
            text = part["text"].get("value") if type(part.get("text")) is dict else part.get("text")
            texts.append(text if type(text) is str else "")
        elif sort not in ("think", "tool_call", "error", "agent_update"):
            return parts
    return "\n\n".join(text for text in texts if text)


def _failed(message: Record) -> bool:
    parts = message.get("content")
    return type(parts) is list and any(type(part) is dict and part.get("type") == "error" for part in parts)


ADAPTER = Adapter("librechat", recognise, f"{', '.join(sorted(KEYS))}, or messagesTree", convert)
