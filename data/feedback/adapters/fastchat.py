"""FastChat: the logs of its web server (`YYYY-MM-DD-conv.json`, one object a line; name them .jsonl).

Scale: upvote is up and downvote down, on the last answer. leftvote, rightvote, tievote and bothbad_vote compare the
last answers of the two sides, which must have been asked the same up to there. A row of type chat says nothing about
its answer, so nothing comes of it.

What a template begins with (`system_message`, and messages before `offset`) is the models' own and no part of the
prompt. The ip is the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import Turn, diverged, inner, same
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

_RATINGS = {"upvote": 1, "downvote": -1}
_VOTES: dict[str, int | str] = {"leftvote": 0, "rightvote": 1, "tievote": "tie", "bothbad_vote": "both_bad"}
_CURSOR = "▌"
"""What stands at the end of an answer that is still being written."""
_FAILED = ("**NETWORK ERROR", "$MODERATION$", "YOUR INPUT VIOLATES")


def recognise(record: Record) -> bool:
    return {"tstamp", "type"} <= record.keys() and ("state" in record or "states" in record)


def events(record: Record) -> Iterator[Record]:
    sort = record.get("type")
    if sort == "chat":
        return
    about = {"ts": record.get("tstamp"), "user_id": record.get("ip")}
    if type(sort) is str and sort in _RATINGS:
        turns, state = _turns(record, "state")
        answer = _answer(turns, "state")
        rating = {"event_type": "rating", "label": _RATINGS[sort], "prompt": turns[:-1], "response": _bare(answer)}
        yield canonical({**about, **rating, **_state([state]), "finish_reason": _end(answer), **_failed([answer])})
    elif type(sort) is str and sort in _VOTES:
        states = record.get("states")
        if type(states) is not list or len(states) != 2:
            raise Bad(f"states: {show(states)}, must be the two sides; fix or drop it", "missing_response")
        sides = {f"states[{index}]": side for index, side in enumerate(states)}
        (left, one), (right, other) = (_turns(sides, key) for key in sides)
        answers = [_answer(turns, key) for turns, key in zip((left, right), sides, strict=True)]
        if not same(left[:-1], right[:-1]):
            raise diverged("states[1]", "states[0]")
        alternatives = [
            canonical({"response": _bare(answer), "model": state.get("model_name"), "finish_reason": _end(answer)})
            for answer, state in zip(answers, (one, other), strict=True)
        ]
        vote = {"event_type": "comparison", "winner": _VOTES[sort], "prompt": left[:-1], "alternatives": alternatives}
        yield canonical({**about, **vote, "conversation_id": one.get("conv_id"), **_failed(answers)})
    else:
        known = ", ".join((*_RATINGS, *_VOTES))
        what = "missing" if sort is None else show(sort)
        raise Bad(f"type: {what}, must be one of {known}, chat; drop the row", "unknown_event_type")


def _state(states: list[Record]) -> Record:
    return {"conversation_id": states[0].get("conv_id"), "model": states[0].get("model_name")}


def _turns(record: Record, key: str) -> tuple[list[Turn], Record]:
    """Return what was said on one side, and the side."""
    state = inner(record, key)
    messages, roles = state.get("messages"), state.get("roles")
    if type(messages) is not list or type(roles) not in (list, type(None)):
        raise Bad(f"{key}.messages: {kind(messages)} ({show(messages)}), must be a list; drop it", "wrong_type")
    user = roles[0] if roles else "USER"
    offset = state.get("offset")
    turns = []
    for index, message in enumerate(messages):
        if type(message) is not list or len(message) != 2:
            raise Bad(f"{key}.messages[{index}]: {show(message)}, must be [role, text]; drop it", "wrong_type")
        turns.append({"role": "user" if message[0] == user else "assistant", "content": _text(message[1])})
    return turns[offset if type(offset) is int and offset > 0 else 0 :], state


def _text(said: Any) -> Any:
    """Return a text, or what stands beside images as parts."""
    if type(said) is list and said:
        return [{"type": "text", "text": said[0]}, *({"type": "image"} for _ in said[1:])]
    return said


def _answer(turns: list[Turn], key: str) -> Turn:
    if not turns or turns[-1]["role"] != "assistant" or turns[-1]["content"] is None:
        raise Bad(f"{key}.messages: the last one is no answer, a vote is on one; drop the row", "missing_response")
    return turns[-1]


def _bare(answer: Turn) -> Any:
    """Return the text of an answer without the cursor."""
    said = answer["content"]
    return said.rstrip().removesuffix(_CURSOR) if type(said) is str else said


def _end(answer: Turn) -> str | None:
    """Return how an answer ended, where it was still being written."""
    said = answer["content"]
    return "unfinished" if type(said) is str and said.rstrip().endswith(_CURSOR) else None


def _failed(answers: list[Turn]) -> Record:
    """Return whether an answer is an error message."""
    texts = [answer["content"] for answer in answers if type(answer["content"]) is str]
    return {"error": True if any(text.startswith(_FAILED) for text in texts) else None}


ADAPTER = Adapter("fastchat", recognise, "tstamp, type, state or states", each(events))
