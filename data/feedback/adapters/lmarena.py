"""LMArena: the released tables of votes between two models (33k, 55k, 100k, 140k).

Scale: model_a, model_b, tie, and both bad under any of its names; or the three columns winner_model_a, winner_model_b,
winner_tie of the 55k table, whose ties hold both kinds.

The vote compares the two last answers. Each side went on with its own answers, so of a longer battle only one whose
sides said the same before is a comparison; in the 140k table what was said before the vote is in full_conversation.
The judge is the user where one is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import Turn, diverged, first, parsed, same, turns, when
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

_WINNERS: dict[str, int | str] = {
    "model_a": 0,
    "model_b": 1,
    "tie": "tie",
    "tie (bothbad)": "both_bad",
    "bothbad": "both_bad",
    "both_bad": "both_bad",
}
_ONE_HOT: dict[str, int | str] = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": "tie"}


def recognise(record: Record) -> bool:
    keys = record.keys()
    said = {"conversation_a", "conversation_b"} <= keys or {"prompt", "response_a", "response_b"} <= keys
    return said and {"model_a", "model_b"} <= keys and ("winner" in keys or _ONE_HOT.keys() <= keys)


def events(record: Record) -> Iterator[Record]:
    sides = _sides(record) if "conversation_a" in record else _columns(record)
    for side, said in sides.items():
        if not said or said[-1]["role"] != "assistant":
            raise Bad(f"{side}: the last turn is no answer, a vote compares answers; drop the row", "missing_response")
    (_, one), (name, other) = sides.items()
    if not same(one[:-1], other[:-1]):
        raise diverged(name, next(iter(sides)))
    yield canonical(
        {
            "event_type": "comparison",
            "event_id": first(record, "question_id", "id"),
            "ts": when(first(record, "tstamp", "timestamp")),
            "user_id": first(record, "judge_hash", "judge"),
            "conversation_id": first(record, "evaluation_session_id"),
            "prompt": one[:-1],
            "winner": _winner(record),
            "alternatives": [
                canonical({"response": side[-1]["content"], "model": record.get(model)})
                for side, model in ((one, "model_a"), (other, "model_b"))
            ],
        }
    )


def _winner(record: Record) -> int | str:
    winner = record.get("winner")
    if winner is None:
        said = [place for column, place in _ONE_HOT.items() if record.get(column) in (1, "1", True)]
        if len(said) == 1:
            return said[0]
        shown = ", ".join(f"{column} {show(record.get(column))}" for column in _ONE_HOT)
        raise Bad(f"winner: {shown}, one of them must be 1; fix or drop it", "unknown_rating")
    found = _WINNERS.get(winner.lower()) if type(winner) is str else None
    if found is None:
        raise Bad(f"winner: {show(winner)}, must be one of {', '.join(_WINNERS)}; fix or drop it", "unknown_rating")
    return found


def _sides(record: Record) -> dict[str, list[Turn]]:
    """Return what was said on each side, with what came before."""
    before = parsed(record.get("full_conversation"))
    sides = {}
    for name, whose in (("conversation_a", "model_side_a"), ("conversation_b", "model_side_b")):
        value = parsed(record.get(name))
        found = turns(value)
        if found is None:
            rule = "must be a list of {role, content}"
            raise Bad(f"{name}: {kind(value)} ({show(value)}), {rule}; fix or drop it", "wrong_type")
        now = _voted_on(found, record.get("turn"))
        asked = sum(turn["role"] == "user" for turn in now)
        sides[name] = [*_earlier(before, whose, asked), *now]
    return sides


def _voted_on(said: list[Turn], turn: Any) -> list[Turn]:
    """Return what was said until the vote: MT-bench has votes on the first turn of two."""
    return said[: 2 * turn] if type(turn) is int and turn > 0 else said


def _earlier(full: Any, whose: str, asked: int) -> list[Turn]:
    """Return one side's turns of a whole session, without the last ones that were voted on."""
    if type(full) is not list or len(full) <= asked:
        return []
    earlier = []
    for index, turn in enumerate(full[: len(full) - asked]):
        for key, role in (("user", "user"), (whose, "assistant")):
            message = turn.get(key) if type(turn) is dict else None
            if type(message) is not dict:
                at = f"full_conversation[{index}].{key}"
                raise Bad(f"{at}: {show(message)}, must be a message; fix or drop it", "wrong_type")
            earlier.append({"role": role, "content": message.get("content")})
    return earlier


def _columns(record: Record) -> dict[str, list[Turn]]:
    """Return what was said on each side of a table that has questions and answers in lists of their own."""
    asked = _list(record, "prompt")
    sides = {}
    for key in ("response_a", "response_b"):
        answers = _list(record, key)
        if len(answers) != len(asked):
            raise Bad(f"{key}: {len(answers)} answers to {len(asked)} prompts; drop the row", "missing_response")
        sides[key] = [
            {"role": role, "content": text}
            for pair in zip(asked, answers, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return sides


def _list(record: Record, key: str) -> list[Any]:
    value = parsed(record.get(key))
    if type(value) is not list:
        raise Bad(f"{key}: {kind(value)} ({show(value)}), must be a list as JSON; fix or drop it", "wrong_type")
    return value


ADAPTER = Adapter("lmarena", recognise, "model_a, model_b, winner, conversation_a or response_a", each(events))
