"""Open WebUI: the export of evaluations (Admin, Evaluations, Feedbacks), one array of ratings with a copy of each chat.

Scale: 1 up, -1 down, as numbers or text. 0 is neutral, as in the product's own leaderboard, and null takes the rating
back. The prompt is the branch that the rated message stands on, whatever branch the chat shows now; a system prompt
that was set in the chat is its first turn, but those of models are not in the export.

An answer that was edited after it was written keeps what the model wrote as `originalContent`. A thumb down belongs to
that text, a thumb up to the edited one, and both times the edit is an event of its own.

In the arena (`meta.arena`) a thumb up says that the answer beats all others to the same prompt, and a thumb down, where
there is one other, that it loses to it: these are comparisons. A thumb down on one of three or more is a rating only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import branch, first, ident, inner, orphan, rated, system, when
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import show
from align_pipeline.data.sources import Bad, Record

KEYS = frozenset(("type", "user_id", "data", "meta"))


def recognise(record: Record) -> bool:
    return record.keys() >= KEYS or _wrapped(record) is not None


def _wrapped(record: Record) -> tuple[str, list[Any]] | None:
    """Return the list of ratings in an object, and the field that holds it."""
    for key, value in record.items():
        if type(value) is list and value and type(value[0]) is dict and value[0].keys() >= KEYS:
            return key, value
    return None


def events(record: Record) -> Iterator[Record | Bad]:
    wrapped = None if record.keys() >= KEYS else _wrapped(record)
    if wrapped is None:
        yield from _rating(record)
        return
    key, ratings = wrapped
    for index, one in enumerate(ratings):
        if type(one) is not dict:
            yield Bad(f"{key}[{index}]: {show(one)}, a rating must be an object; fix the export", "not_object")
            continue
        try:
            yield from _rating(one)
        except Bad as bad:
            yield Bad(f"{key}[{index}].{bad.problem}", bad.cause)


def _rating(record: Record) -> Iterator[Record]:
    if record.get("type") != "rating":
        what = "missing" if record.get("type") is None else show(record["type"])
        rule = f"only rating is read, with {', '.join(sorted(KEYS))}; drop the record, or name another format"
        raise Bad(f"type: {what}, {rule}", "unknown_event_type")
    data, meta = inner(record, "data"), inner(record, "meta")
    rating = data.get("rating")
    label = rated(rating, "data.rating", "pm1") if rating not in (None, "") else None
    chat, messages = _chat(record)
    name = ident(meta.get("message_id"))
    if name is None or name not in messages:
        raise orphan("meta.message_id", meta.get("message_id"), "a message", "its snapshot lacks it; drop the record")
    message = messages[name]
    if message.get("role") != "assistant":
        role = show(message.get("role"))
        raise Bad(f"meta.message_id: a message of {role}, only answers are rated; drop the record", "bad_role_order")
    said, original = _content(message), first(message, "originalContent")
    edited = original is not None and original != said
    text = original if edited and label == -1 else said
    about = {
        "user_id": record.get("user_id"),
        "ts": when(first(record, "updated_at", "created_at")),
        "conversation_id": meta.get("chat_id"),
        "prompt": _prompt(chat, messages, message),
        "error": True if message.get("error") else None,
    }
    base = ident(record.get("id"))
    model = _model(message) or data.get("model_id")
    yield canonical({**about, "event_id": base} | _opinion(label, text, model, meta, messages, message))
    if edited:
        edit = {"event_type": "edit", "event_id": f"{base}:edit" if base else None, "model": model}
        yield canonical({**about, **edit, "response": said, "original_response": original})


def _opinion(
    label: int | None, text: Any, model: Any, meta: Record, messages: dict[str, Record], message: Record
) -> Record:
    """Return what the thumb says: a comparison in the arena, else a rating; without a thumb, that it was taken back."""
    end = {"finish_reason": "unfinished" if message.get("done") is False else None}
    others = _siblings(messages, message) if meta.get("arena") is True else []
    if others and (label == 1 or (label == -1 and len(others) == 1)):
        shown = sorted([message, *others], key=_place)
        answers = [
            {"response": text, "model": model, **end}
            if one is message
            else {"response": first(one, "originalContent") or _content(one), "model": _model(one)}
            for one in shown
        ]
        mine = next(index for index, one in enumerate(shown) if one is message)
        winner = mine if label == 1 else 1 - mine
        return {"event_type": "comparison", "alternatives": [canonical(one) for one in answers], "winner": winner}
    kind = "retract" if label is None else "rating"
    return {"event_type": kind, "response": text, "label": label, "model": model, **end}


def _chat(record: Record) -> tuple[Record, dict[str, Record]]:
    """Return the chat and its messages by name, from the copy that was made when the rating was given."""
    if record.get("snapshot") is None:
        what = "missing, the rating has no copy of its chat"
        raise Bad(f"snapshot: {what}; export it with snapshots, or drop the record", "orphan_ref")
    outer = inner(inner(record, "snapshot"), "chat", at="snapshot.")
    chat = outer["chat"] if type(outer.get("chat")) is dict else outer
    at = "snapshot.chat.chat." if chat is not outer else "snapshot.chat."
    messages = inner(inner(chat, "history", at=at), "messages", at=f"{at}history.")
    return chat, {name: one for name, one in messages.items() if type(one) is dict}


def _prompt(chat: Record, messages: dict[str, Record], message: Record) -> list[Record]:
    def parent(name: str) -> str | None:
        if name not in messages:
            raise orphan("parentId", name, "a message", "its snapshot lacks it; drop the record")
        return ident(messages[name].get("parentId"))

    names = branch(ident(message.get("parentId")), parent, "parentId")
    path = [{"role": messages[name].get("role"), "content": _content(messages[name])} for name in names]
    params = chat.get("params")
    prompt = params.get("system") if type(params) is dict else None
    begins = path and path[0]["role"] == "system"
    return path if begins else [*system(prompt or chat.get("system")), *path]


def _content(message: Record) -> Any:
    """Return what a message says; files that went with it are parts of it."""
    said = message.get("content")
    if said in (None, "") and type(message.get("output")) is list:
        said = _output(message["output"])
    files = message.get("files")
    if type(files) is not list or not files:
        return said
    kinds = [one.get("type") if type(one) is dict else None for one in files]
    parts = said if type(said) is list else [{"type": "text", "text": said}]
    return [*parts, *({"type": kind if kind != "text" and type(kind) is str else "file"} for kind in kinds)]


def _output(items: list[Any]) -> str:
    """Return the text of an answer that is kept as a list of items: those of messages, not thoughts and calls."""
    parts = [
        part
        for item in items
        if type(item) is dict and item.get("type") == "message" and type(item.get("content")) is list
        for part in item["content"]
    ]
    return "".join(part["text"] for part in parts if type(part) is dict and type(part.get("text")) is str)


def _siblings(messages: dict[str, Record], message: Record) -> list[Record]:
    """Return the other finished answers to the same message."""
    return [
        one
        for one in messages.values()
        if one is not message
        and one.get("parentId") == message.get("parentId")
        and one.get("role") == "assistant"
        and one.get("done") is not False
        and not one.get("error")
        and _content(one) not in (None, "")
    ]


def _place(message: Record) -> int:
    """Return where an answer was shown, from 0; several that the product did not number stay in the file's order."""
    place = message.get("modelIdx")
    return place if type(place) is int else 0


def _model(message: Record) -> Any:
    return first(message, "selectedModelId", "model")


ADAPTER = Adapter("openwebui", recognise, ", ".join(sorted(KEYS)), each(events))
