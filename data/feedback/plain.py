"""The commonest event, read the short way: a thumb on one answer, with nothing unusual about it.

What `read_event` and `Marker.rows` say of such a record is said here in half of their time. Whatever is not plain, in
any field, is theirs: here nothing is judged, mended or refused.
"""

from __future__ import annotations

from typing import Any

from align_pipeline.data.feedback.clean import hides, normal
from align_pipeline.data.feedback.events import (
    FIELDS,
    FIRST_TIME,
    MAX_MESSAGE_BYTES,
    MAX_PROMPT_MESSAGES,
    Reading,
    impersonal,
)
from align_pipeline.data.feedback.index import NO_SECOND, VOTE, Marker, Place, hashed
from align_pipeline.data.feedback.keys import answer_key, body_key, name_key, texts_key

_TURNS = ["user", "assistant"] * MAX_PROMPT_MESSAGES


def plain_row(record: Any, reading: Reading, marker: Marker, place: Place, latest: int) -> tuple[Any, ...] | None:
    """Return the row of the index that a plain rating gives; None for any other record.

    `latest` is a time in microseconds since 1970 that lies before those which are refused as future ones.
    """
    if type(record) is not dict or record.get("event_type") != "rating" or not FIELDS.issuperset(record):
        return None
    get = record.get
    label, seconds = get("label"), get("ts", 0)
    event, user, conversation = get("event_id"), get("user_id"), get("conversation_id")
    response, model = get("response_id"), get("model")
    usual = (
        (type(label) is int and -1 <= label <= 1)
        and (type(seconds) is int and FIRST_TIME <= seconds * 1_000_000 <= latest)
        and _is_name(event) and _is_name(user) and _is_name(conversation) and _is_name(response) and _is_name(model)
        and get("actor") is None and "end_user" in reading.actors
        and get("consent") is None and not reading.require_consent and get("error") is None
        and get("finish_reason") in (None, "stop")
        and not marker.ignore_system
    )  # fmt: skip
    answer = _answer(get("response"), reading) if usual else ""
    turns = _turns(get("prompt"), reading) if answer else None
    if turns is None:
        return None
    hash_, who = (None, None) if user is None else hashed(user, marker.secret)
    if hash_ in marker.forgotten:
        return None
    try:
        prompt = texts_key(turns)
        name = answer_key(prompt, answer)
    except UnicodeEncodeError:
        return None
    at = seconds * 1_000_000
    model = None if model is None else impersonal(model)
    body = body_key("rating", prompt, [name], label, 0, at, user, response, [model], "end_user", conversation, False)
    source = marker.source
    return (
        *place,
        body if event is None else name_key(source, event),
        body,
        at,
        who,
        1,
        None if conversation is None else name_key(source, conversation),
        None if response is None else name_key(source, response),
        prompt,
        sum(map(len, turns[1::2])),
        0, VOTE, label, name, 0, model, len(answer), *NO_SECOND,
    )  # fmt: skip


def _is_name(value: Any) -> bool:
    return value is None or (type(value) is str and 0 < len(value) <= 512 and value.isascii())


def _turns(prompt: Any, reading: Reading) -> list[str] | None:
    """Return the roles and the texts of a prompt, by turns."""
    if type(prompt) is str:
        text = _text(prompt)
        return ["user", text] if text else None
    if type(prompt) is not list or not 0 < len(prompt) <= MAX_PROMPT_MESSAGES:
        return None
    turns: list[Any] = []
    for message in prompt:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        text = _answer(content, reading) if role == "assistant" else _text(content)
        if not text:
            return None
        turns += (role, text)
    roles = turns[2::2] if turns[0] == "system" else turns[::2]
    return turns if len(roles) % 2 and roles == _TURNS[: len(roles)] else None


def _answer(value: Any, reading: Reading) -> str:
    """Return the text of an answer that holds no thought; an empty one for anything else."""
    text = _text(value)
    return "" if reading.strip_reasoning and "<" in text else text


def _text(value: Any) -> str:
    """Return a text as it is trained on; an empty one for anything else."""
    if type(value) is not str or len(value) * 4 > MAX_MESSAGE_BYTES or hides(value):
        return ""
    return normal(value)
