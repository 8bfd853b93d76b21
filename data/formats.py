"""The formats that rows come in: which fields each has, how it is recognised, and how a record becomes a row.

task        format                fields (optional ones in brackets)
sft         prompt-completion     prompt, completion, [finish]
            messages              messages, [prompt]
            alpaca                instruction, output, [input, system, history]
            sharegpt              conversations, [system, tools]
            token-ids             prompt_ids, completion_ids
            text                  text, [finish]
preference  preference            prompt, chosen, rejected, [margin, messages]
            implicit              chosen, rejected, [margin]: two whole conversations
            hh-rlhf               chosen, rejected: texts with `\\n\\nHuman:` and `\\n\\nAssistant:`
            alpaca                instruction, chosen, rejected, [input, system, history, margin]
            sharegpt              conversations, chosen, rejected, [system, tools, margin]
            message-pairs         chosen_messages, rejected_messages, [margin]
            token-ids             prompt_ids, chosen_ids, rejected_ids, [margin]
unpaired    prompt-completion     prompt, completion, label
            messages              messages, label
            alpaca                instruction, output, label, [input, system, history]
            sharegpt              conversations, label, [system, tools]
            token-ids             prompt_ids, completion_ids, label
prompt      prompt                prompt; every other column is kept as `extra`
            messages              messages
            alpaca                instruction, [input, system, history]
            sharegpt              conversations, [system, tools]
            token-ids             prompt_ids
text        text                  text, [finish]

A message is `{role, content}` or `{from, value}`; its content is text, or a list of parts of type `text`. An Alpaca row
is a conversation: instruction and input, with a blank line between, are what the user says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from align_pipeline.data.rows import (
    ROLES,
    Chat,
    Content,
    Example,
    ExampleIds,
    Ids,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Row,
    Task,
    Text,
    Unpaired,
    UnpairedIds,
)
from align_pipeline.data.sources import Bad, Record
from align_pipeline.pipeline.errors import did_you_mean

FormatName = Literal[
    "prompt-completion",
    "messages",
    "alpaca",
    "sharegpt",
    "token-ids",
    "text",
    "preference",
    "implicit",
    "hh-rlhf",
    "message-pairs",
    "prompt",
]
"""What `format:` may say."""

# fmt: off
METADATA = frozenset({
    "id", "_id", "idx", "index", "uuid", "row_id", "prompt_id", "conversation_id", "message_id", "source",
    "dataset", "origin", "url", "subset", "split", "category", "task", "topic", "tags", "lang", "language",
    "license", "created_at", "updated_at", "timestamp", "date", "model", "chosen_model", "rejected_model",
    "score_chosen", "score_rejected", "metadata", "meta", "note",
})
# fmt: on
"""Columns that describe a row and change nothing: ignored in every task but `prompt`, which keeps them as `extra`."""


@dataclass(frozen=True)
class Format:
    """One way to write a row."""

    name: FormatName
    required: tuple[str, ...]
    build: Callable[[str, Record], Row]
    optional: tuple[str, ...] = ()
    test: Callable[[Record], bool] = lambda record: True
    """Whether a record that has the required fields is of this format."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


# Recognition: rows say what they are, and between two readings nobody guesses.


def recognise(records: Sequence[Record], formats: Sequence[Format], task: str) -> Format | tuple[int, str]:
    """Return the format that most of the first records have, or the number of a record and what is wrong.

    Of two formats of one record the one with more fields counts when it has all of the other's. When two formats are
    equally common because records have both, only `format:` can tell; when records differ, the first one counts.
    """
    readings = [_readings(record, formats) for record in records]
    counts = {one: sum(one in found for found in readings) for one in formats}
    most = max(counts.values())
    if not most:
        nearest = _nearest(records[0], formats, task)
        return (0, nearest) if isinstance(nearest, str) else nearest
    for number, (record, found) in enumerate(zip(records, readings, strict=True)):
        likely = [one for one in found if counts[one] == most]
        if len(likely) > 1:
            names = " and ".join(f"{one.name} ({', '.join(one.required)})" for one in likely)
            return number, f"{list_of(record)}: can be read as {names}; say which: format: {likely[0].name}"
        if likely:
            return likely[0]
    raise AssertionError("some record has the commonest format")


def likeness(records: Sequence[Record], formats: Sequence[Format]) -> float:
    """Return how many required fields of a format the first records have; a misspelt one counts a little less.

    Half of the records must have all of them; 0 when there is no such format.
    """
    most = 0.0
    for each in formats:
        scores = [_found(record, each) for record in records if each.name != "hh-rlhf"]
        whole = [score for score in scores if score > len(each.required) - 1 and score >= 1]
        if scores and 2 * len(whole) >= len(scores):
            most = max(most, max(whole))
    return most


def _found(record: Record, format: Format) -> float:
    """Return how many required fields a record has, misspelt ones counted as nine tenths."""
    names = [key for key, value in record.items() if value is not None]
    missing = [key for key in format.required if key not in names]
    near = sum(bool(get_close_matches(key, names, 1, 0.8)) for key in missing)
    return len(format.required) - len(missing) + 0.9 * near


def _readings(record: Record, formats: Sequence[Format]) -> list[Format]:
    """Return the formats whose required fields a record has, but for those that ask for less than another.

    Token ids are exact, so the text that may stand beside them is no second reading.
    """
    names = {key for key, value in record.items() if value is not None}
    found = [one for one in formats if names >= set(one.required) and one.test(record)]
    found = [one for one in found if one.name == "token-ids"] or found
    return [one for one in found if not any(set(one.required) < set(other.required) for other in found)]


def _nearest(record: Record, formats: Sequence[Format], task: str) -> Format | str:
    """Return the format that a record has most of, misspelt or missing fields aside; or what is wrong with all."""

    def score(each: Format) -> float:
        found = sum(2 if key in record else len(get_close_matches(key, record, 1, 0.8)) for key in each.required)
        return found / len(each.required)

    best = max(formats, key=score)
    if score(best):
        return best
    wanted = " or ".join(dict.fromkeys("{" + ", ".join(each.required) + "}" for each in formats))
    example = ", ".join(
        f"{ours}: {theirs}"
        for ours, theirs in zip(formats[0].required, [*_texts(record), "NAME", "NAME"], strict=False)
    )
    return (
        f"{list_of(record) or 'no fields'}: no format of task {task}, which reads {wanted}; rename or map them "
        f"(columns: {{{example}}})"
    )


def _texts(record: Record) -> list[str]:
    """Return the fields that hold text and describe nothing, in the order of the file: what a map may mean."""
    return [key for key, value in record.items() if isinstance(value, str) and value and key not in METADATA]


def check_fields(record: Record, format: Format, known: set[str], *, named: bool) -> None:
    """Refuse fields that are missing or unknown; a null field counts as absent.

    `named` says that the user named the format: other fields are then no question, unless they look like misspelt ones.
    """
    required = format.required
    missing = next((key for key in required if record.get(key) is None), None)
    if missing is None and len(record) == len(required):
        return
    for key, value in record.items():
        if key in required or key in format.optional or key in METADATA or value is None:
            continue
        if key in known and (named or (format.name == "token-ids" and missing is None)):
            continue
        if key in known:
            rule = f"the rows of this file are read as {format.name} ({', '.join(required)})"
            raise Bad(
                f"{key}: belongs to another format, {rule}; use one format per file, name it with format:, or map with "
                "columns",
                "another format",
            )
        lacking = [one for one in required if record.get(one) is None]
        near = did_you_mean(key, lacking or (format.fields if named else known))
        if near or (missing is None and not named):
            raise Bad(
                f"{key}: unknown field{near or '; remove it, or name the wanted ones with columns'}", "unknown field"
            )
    if missing is not None:
        state = "null" if missing in record else "missing"
        has = list_of(key for key, value in record.items() if value is not None) or "nothing"
        needs = f"rows of this file need {', '.join(required)} (this one has {has})"
        raise Bad(f"{missing}: {state}, {needs}; add or map it", "missing field")


# Records become rows.


def _build_chat(where: str, record: Record) -> Chat:
    messages = _conversation(record["messages"], "messages", ends="assistant")
    if record.get("prompt") is not None:
        _same_prompt(record["prompt"], tuple(part for part in messages[:2] if part.role != "assistant"), "messages")
    return Chat(where, messages)


def _build_chat_sharegpt(where: str, record: Record) -> Chat:
    return Chat(where, _sharegpt(record, ends="assistant"))


def _build_text(where: str, record: Record) -> Text:
    return Text(where, _text(record["text"], "text"), _finish(record))


def _build_example(where: str, record: Record) -> Example:
    prompt = _prompt(record["prompt"], "prompt")
    return Example(where, prompt, _answer(record["completion"], "completion", prompt), _finish(record))


def _build_example_alpaca(where: str, record: Record) -> Example:
    return Example(where, _alpaca(record), (Message("assistant", _text(record["output"], "output")),))


def _build_example_ids(where: str, record: Record) -> ExampleIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids", empty=True)
    return ExampleIds(where, prompt, _ids(record["completion_ids"], "completion_ids"))


def _build_preference(where: str, record: Record) -> Preference:
    if _whole_conversation(record["chosen"]) and _whole_conversation(record["rejected"]):
        row = _build_implicit(where, record)
        _same_prompt(record["prompt"], row.prompt, "chosen and rejected")
        _same_messages(record, row)
        return row
    if type(record["prompt"]) is str and all(_begins_dialogue(record[side]) for side in _SIDES):
        row = _build_hh(where, record)
        _same_prompt(record["prompt"], row.prompt, "chosen and rejected")
        return row
    prompt = _prompt(record["prompt"], "prompt")
    chosen = _answer(record["chosen"], "chosen", prompt)
    rejected = _answer(record["rejected"], "rejected", prompt)
    row = _pair(where, prompt, chosen, rejected, record)
    _same_messages(record, row)
    return row


def _build_preference_alpaca(where: str, record: Record) -> Preference:
    prompt = _alpaca(record)
    chosen, rejected = (
        (Message("assistant", _text(record[side], side)),)
        if type(record[side]) is str
        else _answer(record[side], side, prompt)
        for side in ("chosen", "rejected")
    )
    return _pair(where, prompt, chosen, rejected, record)


def _build_preference_sharegpt(where: str, record: Record) -> Preference:
    prompt = _sharegpt(record, ends="user")
    chosen, rejected = (_answer(record[side], side, prompt) for side in ("chosen", "rejected"))
    return _pair(where, prompt, chosen, rejected, record)


def _build_implicit(where: str, record: Record) -> Preference:
    """Take the turns that both conversations begin with as the prompt."""
    if isinstance(record["chosen"], str) and isinstance(record["rejected"], str):
        raise Bad(
            "prompt: missing, two plain strings do not say where the prompt ends; add a prompt field", "missing field"
        )
    return _shared_start(where, [_conversation(record[key], key, ends="assistant") for key in _SIDES], record)


def _build_hh(where: str, record: Record) -> Preference:
    return _shared_start(where, [_dialogue(record[key], key) for key in _SIDES], record)


def _build_message_pairs(where: str, record: Record) -> Preference:
    keys = ("chosen_messages", "rejected_messages")
    return _shared_start(where, [_conversation(record[key], key, ends="assistant") for key in keys], record)


_SIDES = ("chosen", "rejected")


def _shared_start(where: str, sides: Sequence[tuple[Message, ...]], record: Record) -> Preference:
    chosen, rejected = sides
    _differ(chosen, rejected, "chosen")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or len(chosen) != shared + 1 or len(rejected) != shared + 1:
        what = f"conversations part at turn {shared + 1} of {len(chosen)} and {len(rejected)}"
        remedy = "cut both after the first that differs" if 0 < shared < min(len(chosen), len(rejected)) else "drop it"
        raise Bad(f"chosen: {what}, a pair may differ in its last answer only; {remedy}", "prompts differ")
    return _pair(where, chosen[:shared], chosen[shared:], rejected[shared:], record)


def _pair(where: str, prompt: Content, chosen: Content, rejected: Content, record: Record) -> Preference:
    _differ(chosen, rejected, "chosen")
    return Preference(where, prompt, chosen, rejected, _margin(record))


def _build_preference_ids(where: str, record: Record) -> PreferenceIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids")
    chosen, rejected = _ids(record["chosen_ids"], "chosen_ids"), _ids(record["rejected_ids"], "rejected_ids")
    _differ(chosen, rejected, "chosen_ids")
    return PreferenceIds(where, prompt, chosen, rejected, _margin(record))


def _build_unpaired(where: str, record: Record) -> Unpaired:
    prompt = _prompt(record["prompt"], "prompt")
    return Unpaired(where, prompt, _answer(record["completion"], "completion", prompt), _label(record))


def _build_unpaired_alpaca(where: str, record: Record) -> Unpaired:
    answer = (Message("assistant", _text(record["output"], "output")),)
    return Unpaired(where, _alpaca(record), answer, _label(record))


def _build_unpaired_chat(where: str, record: Record) -> Unpaired:
    """Take the last turn as the answer that was judged."""
    messages = _conversation(record["messages"], "messages", ends="assistant")
    return Unpaired(where, messages[:-1], messages[-1:], _label(record))


def _build_unpaired_sharegpt(where: str, record: Record) -> Unpaired:
    messages = _sharegpt(record, ends="assistant")
    return Unpaired(where, messages[:-1], messages[-1:], _label(record))


def _build_unpaired_ids(where: str, record: Record) -> UnpairedIds:
    prompt = _ids(record["prompt_ids"], "prompt_ids")
    return UnpairedIds(where, prompt, _ids(record["completion_ids"], "completion_ids"), _label(record))


def _build_prompt(where: str, record: Record) -> Prompt:
    return Prompt(where, _prompt(record["prompt"], "prompt"), record.get("extra", {}))


def _build_prompt_chat(where: str, record: Record) -> Prompt:
    return Prompt(where, _conversation(record["messages"], "messages", ends="user"), record.get("extra", {}))


def _build_prompt_alpaca(where: str, record: Record) -> Prompt:
    return Prompt(where, _alpaca(record), record.get("extra", {}))


def _build_prompt_sharegpt(where: str, record: Record) -> Prompt:
    return Prompt(where, _sharegpt(record, ends="user"), record.get("extra", {}))


def _build_prompt_ids(where: str, record: Record) -> PromptIds:
    return PromptIds(where, _ids(record["prompt_ids"], "prompt_ids"), record.get("extra", {}))


_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


def _is_dialogue(record: Record) -> bool:
    return any(map(_begins_dialogue, (record[key] for key in _SIDES)))


def _begins_dialogue(value: Any) -> bool:
    return type(value) is str and _DIALOGUE.match(value) is not None


_ALPACA = ("input", "system", "history")
_SHAREGPT = ("system", "tools")

FORMATS: dict[Task, tuple[Format, ...]] = {
    "sft": (
        Format("prompt-completion", ("prompt", "completion"), _build_example, ("finish",)),
        Format("messages", ("messages",), _build_chat, ("prompt",)),
        Format("alpaca", ("instruction", "output"), _build_example_alpaca, _ALPACA),
        Format("sharegpt", ("conversations",), _build_chat_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids", "completion_ids"), _build_example_ids),
        Format("text", ("text",), _build_text, ("finish",)),
    ),
    "preference": (
        Format("preference", ("prompt", "chosen", "rejected"), _build_preference, ("margin", "messages")),
        Format("implicit", _SIDES, _build_implicit, ("margin",), lambda record: not _is_dialogue(record)),
        Format("hh-rlhf", _SIDES, _build_hh, ("margin",), _is_dialogue),
        Format("alpaca", ("instruction", *_SIDES), _build_preference_alpaca, (*_ALPACA, "margin")),
        Format("sharegpt", ("conversations", *_SIDES), _build_preference_sharegpt, (*_SHAREGPT, "margin")),
        Format("message-pairs", ("chosen_messages", "rejected_messages"), _build_message_pairs, ("margin",)),
        Format("token-ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _build_preference_ids, ("margin",)),
    ),
    "unpaired": (
        Format("prompt-completion", ("prompt", "completion", "label"), _build_unpaired),
        Format("messages", ("messages", "label"), _build_unpaired_chat),
        Format("alpaca", ("instruction", "output", "label"), _build_unpaired_alpaca, _ALPACA),
        Format("sharegpt", ("conversations", "label"), _build_unpaired_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids", "completion_ids", "label"), _build_unpaired_ids),
    ),
    "prompt": (
        Format("prompt", ("prompt",), _build_prompt),
        Format("messages", ("messages",), _build_prompt_chat),
        Format("alpaca", ("instruction",), _build_prompt_alpaca, _ALPACA),
        Format("sharegpt", ("conversations",), _build_prompt_sharegpt, _SHAREGPT),
        Format("token-ids", ("prompt_ids",), _build_prompt_ids),
    ),
    "text": (Format("text", ("text",), _build_text, ("finish",)),),
}

assert {one.name for formats in FORMATS.values() for one in formats} == set(get_args(FormatName))


# Fields.


def _text(value: Any, key: str) -> str:
    if type(value) is not str:
        raise Bad(f"{key}: {kind(value)} ({show(value)}), must be text; write it as a string", "wrong type")
    if not value or value.isspace():
        raise Bad(f"{key}: {'blank' if value else 'empty'}, must hold text; fill it in or drop the row", "empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise Bad(
                f"{key}: half a character ({half} at {error.start}), must be Unicode; fix the export", "encoding"
            ) from error
    return value


def _prompt(value: Any, key: str) -> Content:
    return _conversation(value, key, ends="user") if type(value) is list else _text(value, key)


def _answer(value: Any, key: str, prompt: Content) -> Content:
    """Check an answer: text to a text, and to a conversation its one next turn."""
    if isinstance(prompt, str):
        if type(value) is list:
            rule = "both must be text or both messages; make them alike"
            raise Bad(f"{key}: a list but the prompt is text, {rule}", "wrong type")
        return _text(value, key)
    if type(value) is str:
        rule = "both must be text or both messages; make them alike"
        raise Bad(f"{key}: text but the prompt is messages, {rule}", "wrong type")
    messages = _messages([value] if type(value) is dict else value, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        turns = ", ".join(message.role for message in messages)
        rule = "must be one assistant turn; move earlier turns into the prompt"
        raise Bad(f"{key}: has the turns {turns}, {rule}", "order of turns")
    return messages


def _alpaca(record: Record) -> tuple[Message, ...]:
    """Return system turn, history and instruction as a conversation that waits for its answer."""
    turns = _system(record)
    history = record.get("history") or []
    if type(history) is not list or not all(type(pair) is list and len(pair) == 2 for pair in history):
        raise Bad(f"history: {show(history)}, must be a list of [question, answer]; write it so", "wrong type")
    for index, (question, answer) in enumerate(history):
        turns.append(Message("user", _text(question, f"history[{index}][0]")))
        turns.append(Message("assistant", _text(answer, f"history[{index}][1]")))
    asked = _text(record["instruction"], "instruction")
    more = record.get("input")
    if more is not None and (type(more) is not str or (more and not more.isspace())):
        asked = f"{asked}\n\n{_text(more, 'input')}"
    return (*turns, Message("user", asked))


def _sharegpt(record: Record, *, ends: str) -> tuple[Message, ...]:
    if record.get("tools") not in (None, "", "[]", []):
        raise Bad("tools: tool definitions are not read, must be absent; drop the rows that have any", "tools")
    system = _system(record)
    messages = (*system, *_messages(record["conversations"], "conversations"))
    return _in_order(messages, "conversations", ends=ends, first=len(system), speaker="from")


def _system(record: Record) -> list[Message]:
    system = record.get("system")
    return [Message("system", _text(system, "system"))] if system not in (None, "") else []


def _dialogue(text: Any, key: str) -> tuple[Message, ...]:
    """Read `\\n\\nHuman: ...\\n\\nAssistant: ...` as turns (Bai et al. 2022, arXiv:2204.05862)."""
    text = _text(text, key)
    parts = _DIALOGUE.split(text)
    if parts[0].strip():
        raise Bad(
            f"{key}: begins with {show(parts[0])}, must begin with a blank line and Human:; fix or drop the row",
            "order of turns",
        )
    turns = [
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    for index, turn in enumerate(turns):
        if not turn.content:
            raise Bad(f"{key}: turn {index + 1} of {len(turns)} ({turn.role}) is empty; drop the row", "empty")
    return _in_order(tuple(turns), key, ends="assistant")


def _conversation(value: Any, key: str, *, ends: str) -> tuple[Message, ...]:
    return _in_order(_messages(value, key), key, ends=ends)


def _in_order(
    messages: tuple[Message, ...], key: str, *, ends: str, first: int = 0, speaker: str = "role"
) -> tuple[Message, ...]:
    """Check the order of turns: an optional system turn, then user and assistant in turn, `ends` last.

    `first` is the number of the turn that stands first in the field, and `speaker` what its role is called there.
    """
    start = messages[0].role == "system"
    for index, message in enumerate(messages):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if message.role != expected and not (index == 0 and start):
            what = f"{key}[{index - first}].{speaker}: {message.role} where {expected} was due"
            rule = "after an optional first system turn, user and assistant take turns"
            raise Bad(f"{what}, {rule}; reorder or join the turns", "order of turns")
    if messages[-1].role != ends:
        rule = "what is learnt is an answer" if ends == "assistant" else "a prompt waits for its answer"
        remedy = "drop the last turn" if len(messages) > 1 else f"add the {ends} turn"
        raise Bad(f"{key}: ends with {messages[-1].role}, must end with {ends} ({rule}); {remedy}", "order of turns")
    return messages


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if type(value) is not list:
        rule = "must be a list of {role, content}; write it so"
        raise Bad(f"{key}: {kind(value)} ({show(value)}), {rule}", "wrong type")
    if not value:
        raise Bad(f"{key}: empty, must hold at least one message; fill it in or drop the row", "empty")
    messages = []
    for index, message in enumerate(value):
        if type(message) is not dict:
            at = f"{key}[{index}]: {kind(message)} ({show(message)})"
            raise Bad(f"{at}, a message must be an object {{role, content}}; write it so", "wrong type")
        role, content = message.get("role"), message.get("content")
        # The common message takes no detour: two fields, both known, text that is not blank.
        if len(message) != 2 or type(role) is not str or role not in ROLES or type(content) is not str:
            role, content = _unusual(message, f"{key}[{index}]")
        elif not content or not content.isascii() or content.isspace():
            _text(content, f"{key}[{index}].content")
        messages.append(Message(role, content))
    return tuple(messages)


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""What ShareGPT's `from` may say."""
_TOOL_ROLES = ("tool", "function", "function_call", "observation")


def _unusual(message: Mapping[str, Any], at: str) -> tuple[str, str]:
    """Read a message of other fields or of parts, or say what is wrong with it."""
    given = {key: value for key, value in message.items() if value is not None}
    if {"from", "value"} & given.keys() and not {"role", "content"} & given.keys():
        names, roles = ("from", "value"), _SPEAKERS
    else:
        names, roles = ("role", "content"), {role: role for role in ROLES}
    for key in given:
        if key not in (*names, "loss_weight"):
            near = did_you_mean(key, names)
            rule = f"only {' and '.join(names)} are read{near or '; remove it'}"
            raise Bad(f"{at}.{key}: unknown field, {rule}", "unknown field")
    for key in names:
        if key not in given:
            raise Bad(f"{at}.{key}: missing, a message is {{{', '.join(names)}}}; add it", "missing field")
    speaker, content = (given[key] for key in names)
    role = roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise Bad(f"{at}.{names[0]}: {_no_role(speaker, roles)}", "unknown role")
    if "loss_weight" in given and given["loss_weight"] != (role == "assistant"):
        rule = "turns have no weights here: the assistant's are learnt, the others not; remove it or split the row"
        raise Bad(f"{at}.loss_weight: {show(given['loss_weight'])} on a turn of {role}, {rule}", "bad value")
    if type(content) is list:
        content = _joined(content, f"{at}.{names[1]}")
    return role, _text(content, f"{at}.{names[1]}")


def _no_role(speaker: Any, roles: Mapping[str, str]) -> str:
    what = f"unknown role ({show(speaker)})"
    if not isinstance(speaker, str):
        return f"{what}, must be one of {', '.join(roles)}"
    if speaker in _TOOL_ROLES:
        return f"{what}, tool calls are not read; drop the row"
    return what + (_ALIASES.get(speaker) or did_you_mean(speaker, roles) or f", must be one of {', '.join(roles)}")


_ALIASES = {"human": "; did you mean user?", "prompter": "; did you mean user?"} | dict.fromkeys(
    ("gpt", "bot", "model", "ai"), "; did you mean assistant?"
)


def _joined(parts: list[Any], at: str) -> str:
    """Return the text of a content that is written in parts."""
    if not parts:
        raise Bad(f"{at}: empty, must hold text; fill it in or drop the row", "empty")
    texts = []
    for index, part in enumerate(parts):
        if type(part) is not dict or part.get("type") != "text":
            shown = part.get("type") if type(part) is dict else part
            raise Bad(f"{at}[{index}]: {show(shown)}, only parts of type text are read; drop the row", "wrong type")
        text = part.get("value") if part.get("text") is None else part["text"]
        if type(text) is not str:
            raise Bad(f"{at}[{index}]: {kind(text)} ({show(text)}), must be text; write it as a string", "wrong type")
        texts.append(text)
    return "".join(texts)


def _same_prompt(given: Any, turns: Content, whose: str) -> None:
    """Hold a prompt column against the turns that a conversation begins with; it may repeat the last user turn."""
    messages = [part for part in turns if isinstance(part, Message)]
    if type(given) is list:
        agrees = _messages(given, "prompt") == tuple(messages)
    else:
        agrees = type(given) is str and given.strip() == messages[-1].content.strip()
    if not agrees:
        rule = f"is not what {'messages begin' if whose == 'messages' else f'{whose} begin'} with"
        raise Bad(
            f"prompt: {rule} ({show(messages[-1].content)}), must agree; fix it or drop the prompt column",
            "prompts differ",
        )


def _same_messages(record: Record, row: Preference) -> None:
    """Hold a messages column, which some pairs carry, against the prompt with its chosen answer."""
    if record.get("messages") is None:
        return
    prompt, chosen = row.prompt, row.chosen
    whole = (*prompt, *chosen) if isinstance(prompt, tuple) and isinstance(chosen, tuple) else None
    if _messages(record["messages"], "messages") != whole:
        rule = "must be the prompt and its chosen answer; fix it or drop the messages column"
        raise Bad(f"messages: is not what the pair says, {rule}", "prompts differ")


def _whole_conversation(value: Any) -> bool:
    if type(value) is not list or not value or type(value[0]) is not dict:
        return False
    speaker = value[0].get("role") or value[0].get("from")
    return speaker != "assistant" and not (isinstance(speaker, str) and _SPEAKERS.get(speaker) == "assistant")


def _ids(value: Any, key: str, *, empty: bool = False) -> Ids:
    if type(value) is not list:
        raise Bad(f"{key}: {kind(value)} ({show(value)}), must be a list of token ids; write it so", "wrong type")
    if not value and not empty:
        raise Bad(f"{key}: empty, must hold at least one token id; drop the row", "empty")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**31):
        index = next(i for i, item in enumerate(value) if type(item) is not int or not 0 <= item < 2**31)
        what = f"{key}[{index}]: {kind(value[index])} ({show(value[index])})"
        raise Bad(
            f"{what}, a token id is a whole number of at least 0; fix or drop the row",
            "bad value" if type(value[index]) is int else "wrong type",
        )
    return tuple(value)


def _label(record: Record) -> bool:
    value = record["label"]
    if type(value) not in (bool, int, float) or value not in (0, 1):
        number = type(value) in (int, float)
        raise Bad(
            f"label: {kind(value)} ({show(value)}), must be true or false; map what was good to true",
            "bad value" if number else "wrong type",
        )
    return bool(value)


def _margin(record: Record) -> float | None:
    value = record.get("margin")
    if value is None:
        return None
    number = type(value) in (int, float)
    if not number or not abs(value) <= 1e300:  # neither NaN nor a number that no float holds
        raise Bad(
            f"margin: {kind(value)} ({show(value)}), must be a finite number; fix it or leave it out",
            "bad value" if number else "wrong type",
        )
    return float(value)


def _finish(record: Record) -> str | None:
    value = record.get("finish")
    if value not in (None, "stop", "length"):
        raise Bad(
            f"finish: {show(value)}, must be stop (the answer ended) or length (it was cut off); fix or drop it",
            "bad value",
        )
    return value


def _differ(chosen: object, rejected: object, key: str) -> None:
    if chosen == rejected:
        other = key.replace("chosen", "rejected")
        raise Bad(f"{key}: equals {other}, a pair must differ; drop the row or fix the log", "equal sides")


def kind(value: Any) -> str:
    """Name the type of a JSON value."""
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def show(value: Any) -> str:
    """Return the value on one short line."""
    if isinstance(value, str | list | dict):
        value = value[:60] if isinstance(value, str | list) else dict(list(value.items())[:8])
    try:
        line = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"{kind(value)} too large to show"
    return line if len(line) <= 40 else line[:37] + "..."


def list_of(names: Any) -> str:
    """Return the names, sorted, at most eight of them."""
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:8]) + (", ..." if len(ordered) > 8 else "")


def known_fields(task: Task) -> set[str]:
    """Return every field that some format of a task has."""
    return {key for each in FORMATS[task] for key in each.fields}
