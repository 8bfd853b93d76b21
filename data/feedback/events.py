"""One statement about answers, whatever product it came from: the canonical event, checked and made clean.

A log in this form is JSON lines; adapters bring others into it. Fields (only `event_type` and what it needs are
required):

event_type         rating, comparison, edit, demonstration, regenerate or retract
prompt             the messages that the model saw, the last one the user's; or a text, which is one user message
response           the answer: rated, edited to (edit), wanted (demonstration), kept (regenerate), or voted for before
original_response  the answer that was edited, or corrected, or regenerated
label              rating: 1 up, -1 down, 0 neutral; words such as thumbsUp, like, 👎 too
alternatives       comparison: two or more {response, [model], [position], [finish_reason]}; a position of null is not
                   known
winner             comparison: the winner's place in alternatives, from 0; or "tie", or "both_bad"
response_id        names the response, so that a later event may leave its text and prompt out
event_id           one id, one event: of several the latest counts
ts                 ISO 8601, or seconds, milliseconds, microseconds or nanoseconds since 1970; not before 2000
user_id            who said so; hashed at once. Without it every event is a person of its own
actor              end_user (as without it), admin, annotator or model
conversation_id    turns of one conversation never stand in both train and test
model              what wrote the response
finish_reason      stop, end_turn, stop_sequence, eos, eos_token, complete, finish; an answer that ended otherwise is
                   never learnt as a good one. In a comparison it is that of the alternatives that have none of their
                   own
error              true: the answer is an error message, so the event is dropped
consent            false: the event is dropped
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec

from align_pipeline.data.feedback.clean import hides, normal, without_reasoning
from align_pipeline.data.feedback.pii import scrub
from align_pipeline.data.feedback.scale import label
from align_pipeline.data.fields import kind, list_of, show
from align_pipeline.data.rows import Message
from align_pipeline.data.sources import Bad, Record
from align_pipeline.pipeline.errors import did_you_mean

EventType = Literal["rating", "comparison", "edit", "demonstration", "regenerate", "retract"]
EVENT_TYPES: tuple[str, ...] = get_args(EventType)
Actor = Literal["end_user", "admin", "annotator", "model"]
ACTORS: tuple[str, ...] = get_args(Actor)

TIE, BOTH_BAD = -1, -2
"""What `winner` is where nobody won."""

# fmt: off
FIELDS = frozenset((
    "schema", "event_type", "event_id", "ts", "user_id", "actor", "conversation_id", "turn", "prompt", "response",
    "response_id", "label", "score", "alternatives", "winner", "original_response", "model", "model_version", "params",
    "finish_reason", "error", "reason", "comment", "tags", "consent", "origin",
))
# fmt: on
MAX_MESSAGE_BYTES = 2**20
MAX_PROMPT_MESSAGES = 200
_ZERO = re.compile(r"\s*[+-]?0+(\.0*)?\s*")
DAY = 86_400 * 1_000_000


class Dropped(Exception):
    """An event that is in order and that nothing is learnt from; `reason` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Answer(msgspec.Struct, frozen=True):
    """One answer to the prompt, as it is trained on."""

    text: str
    model: str | None = None
    position: int | None = None
    """Where it was shown, from 0: left is 0; None where that is not known."""
    unfinished: bool = False
    """comparison: it was cut off."""


class Event(msgspec.Struct, frozen=True):
    """A canonical event whose every field was checked; texts are normal, thoughts are gone."""

    type: EventType
    id: str | None
    at: int | None
    """Microseconds since 1970, UTC."""
    naive: bool
    """The time named no zone; it was taken as UTC."""
    user: str | None
    actor: Actor
    conversation: str | None
    response_id: str | None
    prompt: tuple[Message, ...]
    """Empty only where `response_id` stands for it."""
    answers: tuple[Answer, ...]
    """rating, retract: one, or none where `response_id` stands for it; comparison: all; edit, demonstration and
    regenerate: the better one, then the other one where there is one."""
    label: int
    """rating: 1, 0 or -1."""
    winner: int
    """comparison: a place in `answers`, TIE or BOTH_BAD."""
    unfinished: bool
    """The answer was cut off; of several the better one."""
    stripped: bool
    """A thought or a card was taken off."""

    @property
    def praises(self) -> bool:
        """It says that an answer is good, or better than another."""
        return self.label > 0 if self.type in ("rating", "retract") else self.winner >= 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How events are read: the settings that change an event itself."""

    strip_reasoning: bool = True
    require_consent: bool = False
    actors: frozenset[str] = frozenset(ACTORS) - {"model"}


def read_event(record: Any, reading: Reading, now: float | None = None) -> Event:
    """Return the event that a record says; raise Bad for what cannot be one, and Dropped for what is left out."""
    if type(record) is not dict:
        rule = "an event must be an object of fields; fix or drop it"
        raise Bad(f"{kind(record)} ({show(record)}), {rule}", "not_object")
    if not FIELDS.issuperset(record):
        _only_known(record)
    event_type = record.get("event_type")
    if event_type not in EVENT_TYPES:
        what = "missing" if event_type is None else show(event_type)
        raise Bad(f"event_type: {what}, must be one of {', '.join(EVENT_TYPES)}; fix or drop it", "unknown_event_type")
    at, naive = _time(record.get("ts"), now)
    actor = _one_of(record, "actor", ACTORS, "end_user")
    _may_be_used(record, actor, reading)
    prompt, answers, stripped = _texts(record, event_type, reading)
    response_id = _text_or_none(record, "response_id")
    if event_type == "retract" and _text_or_none(record, "user_id") is None:
        rule = "a retract takes back what one user said; add it, or drop the event"
        raise Bad(f"user_id: missing, {rule}", "missing_user")
    if not answers and response_id is None:
        raise Bad("response: missing, an event needs the answer or its response_id; add it", "missing_response")
    winner = _winner(record, len(answers)) if event_type == "comparison" else 0
    return Event(
        event_type,
        _text_or_none(record, "event_id"),
        at,
        naive,
        _text_or_none(record, "user_id"),
        actor,
        _text_or_none(record, "conversation_id"),
        response_id,
        prompt,
        answers,
        _label(record) if event_type == "rating" else 0,
        winner,
        answers[winner].unfinished if event_type == "comparison" and winner >= 0 else _cut_off(record),
        stripped,
    )


def _cut_off(record: Record) -> bool:
    reason = record.get("finish_reason")
    return reason is not None and not (type(reason) is str and reason.lower() in _FINISHED)


_FINISHED = frozenset(("", "stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "finish"))
"""The words of OpenAI, Anthropic, Gemini, Cohere, Bedrock and text-generation-inference for an answer that is whole."""


def _only_known(record: Record) -> None:
    """Raise Bad for a field that no event has; those of rows, `fb_...`, are stepped over."""
    if unknown := next((key for key in record if key not in FIELDS and not key.startswith("fb_")), None):
        near = did_you_mean(unknown, FIELDS)
        raise Bad(f"{unknown}: unknown field{near or f'; an event has {list_of(FIELDS)}; remove it'}", "unknown_field")


def read_texts(record: Record, reading: Reading) -> tuple[tuple[Message, ...], tuple[Answer, ...]]:
    """Return prompt and answers of a record that is known to be an event."""
    prompt, answers, _ = _texts(record, record["event_type"], reading)
    return prompt, answers


def read_answers(record: Record, reading: Reading) -> tuple[Answer, ...]:
    """Return the answers alone."""
    return _answers(record, record["event_type"], _Cleaner(reading.strip_reasoning))


def _texts(
    record: Record, event_type: EventType, reading: Reading
) -> tuple[tuple[Message, ...], tuple[Answer, ...], bool]:
    cleaner = _Cleaner(reading.strip_reasoning)
    answers = _answers(record, event_type, cleaner)
    return _prompt(record.get("prompt"), cleaner, needed=bool(answers)), answers, cleaner.stripped


def _label(record: Record) -> int:
    value = record.get("label")
    if value is None:
        raise Bad("label: missing, a rating is 1, -1 or 0; add it, or write a retract event", "unknown_rating")
    if type(value) is int and -1 <= value <= 1:
        return value
    if (type(value) in (float, Decimal) and value == 0) or (type(value) is str and _ZERO.fullmatch(value)):
        return 0  # this format's own scale: 0 is neutral
    return label(value)


def _winner(record: Record, count: int) -> int:
    value = record.get("winner")
    if value in ("tie", "both_bad"):
        return TIE if value == "tie" else BOTH_BAD
    if type(value) is str and len(value) < 4 and value.isascii() and value.isdigit():
        value = int(value)  # as tables write it
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < count:
        rule = f'must be a place in alternatives (0 to {count - 1}), "tie" or "both_bad"'
        raise Bad(f"winner: {show(value)}, {rule}; fix or drop it", "unknown_rating")
    return value


def _may_be_used(record: Record, actor: str, reading: Reading) -> None:
    consent, error = _flag(record, "consent"), _flag(record, "error")
    if consent is False or (reading.require_consent and consent is None):
        raise Dropped("no_consent")
    if actor not in reading.actors:
        raise Dropped("actor_excluded")
    if error:
        raise Dropped("error_or_unfinished")


_FLAGS = {"true": True, "false": False, "": None}


def _flag(record: Record, key: str) -> bool | None:
    """Return true, false or that nothing is said; tables write the words."""
    value = record.get(key)
    if value is None:
        return None
    found: Any = _FLAGS.get(value.strip().lower(), value) if type(value) is str else value
    if found is None or found is True or found is False:
        return found
    raise Bad(f"{key}: {show(value)}, must be true or false; fix it", "wrong_type")


def _one_of(record: Record, key: str, known: tuple[str, ...], default: Any) -> Any:
    value = record.get(key)
    if value is None:
        return default
    if value not in known:
        raise Bad(f"{key}: {show(value)}, must be one of {', '.join(known)}; fix or drop it", "unknown_value")
    return value


def _text_or_none(record: Record, key: str) -> str | None:
    value = record.get(key)
    if value is None or value == "":
        return None
    if type(value) is str and len(value) <= 512 and value.isascii():
        return value
    if type(value) is int or (type(value) is float and value.is_integer() and abs(value) < 2**53):
        return str(int(value))  # pandas makes 1.0 of 1 where a column has gaps
    if type(value) is not str or len(value) > 512:
        raise Bad(
            f"{key}: {kind(value)} ({show(value)}), must be a text of at most 512 characters; fix it", "wrong_type"
        )
    _whole(value, key)
    return value


def _whole(value: str, key: str) -> None:
    """Raise Bad for a text with half a character (a lone surrogate), which no file of text can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise Bad(f"{key}: half a character ({half}), must be Unicode; fix the export", "bad_encoding") from error


def _time(value: Any, now: float | None) -> tuple[int | None, bool]:
    """Return microseconds since 1970 and whether the zone was left open."""
    if value is None or value == "":
        return None, False
    number = _seconds(value) if type(value) is str else value
    if number is None:
        micros, naive = _date(value)
    elif type(number) not in (int, float) or not 0 <= number < 1e20:
        raise Bad(f"ts: {show(value)}, {_TIME_RULE}", "bad_timestamp")
    else:
        scale = 1_000_000 if number < 1e11 else 1_000 if number < 1e14 else 1
        micros, naive = number * scale if type(number) is int else round(number * scale), False
        micros = micros if number < 1e17 else micros // 1_000
    if micros < FIRST_TIME:
        raise Bad(f"ts: {show(value)}, lies before 2000, no log is so old; {_TIME_REMEDY}", "bad_timestamp")
    if micros > (time.time() if now is None else now) * 1e6 + DAY:
        raise Bad(f"ts: {show(value)}, lies in the future; fix the clock or the unit", "bad_timestamp")
    return micros, naive


FIRST_TIME = 946_684_800 * 1_000_000
"""The year 2000: what lies before it is no time of an event, but a number that counts something else."""
_NUMBER = re.compile(r"\s*([0-9]{1,20})(\.[0-9]{1,20})?\s*")
_TIME_REMEDY = "write the date and the time (2026-01-31T12:00:00Z), or seconds since 1970"
_TIME_RULE = f"must be ISO 8601 or a number since 1970; {_TIME_REMEDY}"


def _seconds(text: str) -> int | float | None:
    """Return the number that a text is; None for what may be a date, as a year of four digits is."""
    found = _NUMBER.fullmatch(text)
    if found is None or (len(found[1]) == 4 and not found[2]):
        return None
    return float(text) if found[2] else int(text)


def _date(text: str) -> tuple[int, bool]:
    """Return the microseconds since 1970 of a date, in UTC where it names no zone, and whether it names none."""
    try:
        text.encode("ascii")
        date = datetime.fromisoformat(text)
    except ValueError:
        raise Bad(f"ts: {show(text)}, {_TIME_RULE}", "bad_timestamp") from None
    naive = date.tzinfo is None
    return round((date.replace(tzinfo=UTC) if naive else date).timestamp() * 1e6), naive


# What was said.


class _Cleaner:
    """Makes texts normal and remembers whether a thought was taken off."""

    def __init__(self, strip: bool) -> None:
        self._strip = strip
        self.stripped = False

    def answer(self, value: Any, key: str) -> str:
        """Return an answer's text; Dropped when nothing is left of it."""
        text = self.text(value, key, "missing_response")
        if self._strip and "<" in text:
            bare = normal(without_reasoning(text))
            self.stripped |= bare != text
            text = bare
        if not text:
            raise Dropped("empty_after_clean")
        return text

    def text(self, value: Any, key: str, missing: str) -> str:
        if type(value) is not str:
            value = _text_of(value, key, missing)
        if len(value) > MAX_MESSAGE_BYTES or (
            len(value) * 4 > MAX_MESSAGE_BYTES < len(value.encode("utf-8", "replace"))
        ):
            raise Bad(f"{key}: {len(value):,} characters, a message has at most 1 MiB; cut or drop it", "too_long")
        if not value.isascii():
            _whole(value, key)
            if hides(value):
                raise Dropped("hidden_characters")
        return normal(value)


def _text_of(value: Any, key: str, missing: str) -> str:
    """Return the text of a message, or of a content that is written in parts."""
    if type(value) is dict:
        value = value.get("content")
    if type(value) is list:
        value = _joined(value, key)
    if value is None:
        raise Bad(f"{key}: missing, an event needs its text; add it or drop the event", missing)
    if type(value) is not str:
        raise Bad(f"{key}: {kind(value)} ({show(value)}), must be text; write it as a string", "wrong_type")
    return value


def _joined(parts: list[Any], key: str) -> str:
    """Return the text of a content that is written in parts."""
    texts = []
    for part in parts:
        if type(part) is str:
            texts.append(part)
        elif type(part) is not dict:
            raise Bad(f"{key}: {show(part)}, a part of a message must be text or an object; fix it", "wrong_type")
        elif part.get("type", "text") != "text":
            raise Dropped("multimodal")
        else:
            texts.append(part["text"] if type(part.get("text")) is str else "")
    return "".join(texts)


def _answers(record: Record, event_type: str, cleaner: _Cleaner) -> tuple[Answer, ...]:
    if event_type == "comparison":
        return _alternatives(record, cleaner)
    model = _model(record)
    found = []
    if record.get("response") is not None:
        found.append(Answer(cleaner.answer(record["response"], "response"), model))
    if event_type not in ("rating", "retract"):
        if not found:
            raise Bad(f"response: missing, {event_type} events need it; add it or drop the event", "missing_response")
        if record.get("original_response") is not None:
            found.append(Answer(cleaner.answer(record["original_response"], "original_response"), model))
        elif event_type != "demonstration":
            rule = f"{event_type} events need it; add it or drop the event"
            raise Bad(f"original_response: missing, {rule}", "missing_response")
    return tuple(found)


def _model(record: Record) -> str | None:
    """Return what wrote an answer: rows and the report show it."""
    name = _text_or_none(record, "model")
    return None if name is None else impersonal(name)


@functools.lru_cache(10_000)
def impersonal(name: str) -> str:
    """Return the name of a model without personal data."""
    return scrub([name])[0][0]


def _alternatives(record: Record, cleaner: _Cleaner) -> tuple[Answer, ...]:
    given = record.get("alternatives")
    if type(given) is not list or not 2 <= len(given) <= 100:
        raise Bad(
            f"alternatives: {show(given)}, must be a list of 2 to 100 answers; fix or drop it", "missing_response"
        )
    answers = []
    for index, one in enumerate(given):
        key = f"alternatives[{index}]"
        if type(one) is not dict:
            raise Bad(f"{key}: {show(one)}, must be an object with a response; fix it", "wrong_type")
        position = one.get("position", index)
        if type(position) not in (int, type(None)):
            raise Bad(f"{key}.position: {show(position)}, must be a whole number; fix it", "wrong_type")
        text = cleaner.answer(one.get("response"), f"{key}.response")
        unfinished = _cut_off(one if one.get("finish_reason") is not None else record)
        answers.append(Answer(text, _model(one), position, unfinished))
    return tuple(answers)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _prompt(value: Any, cleaner: _Cleaner, *, needed: bool) -> tuple[Message, ...]:
    if value is None or value == [] or value == "":
        if needed:
            raise Bad("prompt: missing, an answer needs what it answers; add it or drop the event", "missing_prompt")
        return ()
    if type(value) is str:
        return (_said("user", value, "prompt[0]", cleaner),)
    if type(value) is not list:
        rule = "must be text or a list of {role, content}; write it so"
        raise Bad(f"prompt: {kind(value)} ({show(value)}), {rule}", "wrong_type")
    if len(value) > MAX_PROMPT_MESSAGES:
        raise Bad(f"prompt: {len(value)} messages, at most {MAX_PROMPT_MESSAGES} are read; cut or drop it", "too_long")
    turns = [_turn(message, f"prompt[{index}]", cleaner) for index, message in enumerate(value)]
    start = turns[0].role == "system"
    for index, turn in enumerate(turns[start:]):
        if turn.role != ("user", "assistant")[index % 2]:
            rule = "after an optional system turn, user and assistant take turns"
            raise Bad(f"prompt[{index + start}].role: {turn.role}, {rule}; reorder or join the turns", "bad_role_order")
    if turns[-1].role != "user":
        rule = "it waits for an answer; drop the last turn"
        raise Bad(f"prompt: ends with {turns[-1].role}, must end with user ({rule})", "bad_role_order")
    return tuple(turns)


def _turn(message: Any, key: str, cleaner: _Cleaner) -> Message:
    if type(message) is not dict:
        raise Bad(f"{key}: {show(message)}, a message must be an object {{role, content}}; write it so", "wrong_type")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise Dropped("tool_calls")  # no stage trains on them
    known = _ROLES.get(role) if type(role) is str else None
    if known is None:
        near = did_you_mean(role, _ROLES) if type(role) is str else ""
        raise Bad(f"{key}.role: {show(role)}, must be one of {', '.join(_ROLES)}{near}", "bad_role_order")
    if known == "assistant":
        return Message(known, cleaner.answer(message.get("content"), f"{key}.content"))
    return _said(known, message.get("content"), key, cleaner)


def _said(role: str, value: Any, key: str, cleaner: _Cleaner) -> Message:
    text = cleaner.text(value, f"{key}.content", "missing_prompt")
    if not text:
        raise Bad(f"{key}.content: empty, must hold text; fill it in or drop the event", "missing_prompt")
    return Message(role, text)


def canonical(event: Mapping[str, Any]) -> Record:
    """Return an event without the fields that say nothing, for adapters that fill in what they have."""
    return {key: value for key, value in event.items() if value is not None}
