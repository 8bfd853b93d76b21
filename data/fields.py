"""The values in a row's fields: a check returns what is meant, or raises `Bad` with field, value, rule and remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align_pipeline.data.rows import ROLES, Content, Ids, Message, Preference
from align_pipeline.data.sources import Bad, Record
from align_pipeline.pipeline.errors import did_you_mean

_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


def begins_dialogue(value: Any) -> bool:
    return type(value) is str and _DIALOGUE.match(value) is not None


def check_text(value: Any, key: str) -> str:
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


def check_prompt(value: Any, key: str) -> Content:
    return check_conversation(value, key, ends="user") if type(value) is list else check_text(value, key)


def check_answer(value: Any, key: str, prompt: Content) -> Content:
    """Check an answer: text to a text, and to a conversation its one next turn."""
    if isinstance(prompt, str):
        if type(value) is list:
            rule = "both must be text or both messages; make them alike"
            raise Bad(f"{key}: a list but the prompt is text, {rule}", "wrong type")
        return check_text(value, key)
    if type(value) is str:
        rule = "both must be text or both messages; make them alike"
        raise Bad(f"{key}: text but the prompt is messages, {rule}", "wrong type")
    messages = check_messages([value] if type(value) is dict else value, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        turns = ", ".join(message.role for message in messages)
        rule = "must be one assistant turn; move earlier turns into the prompt"
        raise Bad(f"{key}: has the turns {turns}, {rule}", "order of turns")
    return messages


def alpaca_turns(record: Record) -> tuple[Message, ...]:
    """Return system turn, history and instruction as a conversation that waits for its answer."""
    turns = _system(record)
    history = record.get("history") or []
    if type(history) is not list or not all(type(pair) is list and len(pair) == 2 for pair in history):
        raise Bad(f"history: {show(history)}, must be a list of [question, answer]; write it so", "wrong type")
    for index, (question, answer) in enumerate(history):
        turns.append(Message("user", check_text(question, f"history[{index}][0]")))
        turns.append(Message("assistant", check_text(answer, f"history[{index}][1]")))
    asked = check_text(record["instruction"], "instruction")
    more = record.get("input")
    if more is not None and (type(more) is not str or (more and not more.isspace())):
        asked = f"{asked}\n\n{check_text(more, 'input')}"
    return (*turns, Message("user", asked))


def sharegpt_turns(record: Record, *, ends: str) -> tuple[Message, ...]:
    if record.get("tools") not in (None, "", "[]", []):
        raise Bad("tools: tool definitions are not read, must be absent; drop the rows that have any", "tools")
    system = _system(record)
    messages = (*system, *check_messages(record["conversations"], "conversations"))
    return _in_order(messages, "conversations", ends=ends, first=len(system), speaker="from")


def _system(record: Record) -> list[Message]:
    system = record.get("system")
    return [Message("system", check_text(system, "system"))] if system not in (None, "") else []


def dialogue_turns(text: Any, key: str) -> tuple[Message, ...]:
    """Read `\\n\\nHuman: ...\\n\\nAssistant: ...` as turns (Bai et al. 2022, arXiv:2204.05862)."""
    text = check_text(text, key)
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


def check_conversation(value: Any, key: str, *, ends: str) -> tuple[Message, ...]:
    return _in_order(check_messages(value, key), key, ends=ends)


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


def check_messages(value: Any, key: str) -> tuple[Message, ...]:
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
            check_text(content, f"{key}[{index}].content")
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
    return role, check_text(content, f"{at}.{names[1]}")


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


def check_same_prompt(given: Any, turns: Content, whose: str) -> None:
    """Hold a prompt column against the turns that a conversation begins with; it may repeat the last user turn."""
    messages = [part for part in turns if isinstance(part, Message)]
    if type(given) is list:
        agrees = check_messages(given, "prompt") == tuple(messages)
    else:
        agrees = type(given) is str and given.strip() == messages[-1].content.strip()
    if not agrees:
        rule = f"is not what {'messages begin' if whose == 'messages' else f'{whose} begin'} with"
        raise Bad(
            f"prompt: {rule} ({show(messages[-1].content)}), must agree; fix it or drop the prompt column",
            "prompts differ",
        )


def check_same_messages(record: Record, row: Preference) -> None:
    """Hold a messages column, which some pairs carry, against the prompt with its chosen answer."""
    if record.get("messages") is None:
        return
    prompt, chosen = row.prompt, row.chosen
    whole = (*prompt, *chosen) if isinstance(prompt, tuple) and isinstance(chosen, tuple) else None
    if check_messages(record["messages"], "messages") != whole:
        rule = "must be the prompt and its chosen answer; fix it or drop the messages column"
        raise Bad(f"messages: is not what the pair says, {rule}", "prompts differ")


def is_whole_conversation(value: Any) -> bool:
    if type(value) is not list or not value or type(value[0]) is not dict:
        return False
    speaker = value[0].get("role") or value[0].get("from")
    return speaker != "assistant" and not (isinstance(speaker, str) and _SPEAKERS.get(speaker) == "assistant")


def check_ids(value: Any, key: str, *, empty: bool = False) -> Ids:
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


def check_label(record: Record) -> bool:
    value = record["label"]
    if type(value) not in (bool, int, float) or value not in (0, 1):
        number = type(value) in (int, float)
        raise Bad(
            f"label: {kind(value)} ({show(value)}), must be true or false; map what was good to true",
            "bad value" if number else "wrong type",
        )
    return bool(value)


def check_margin(record: Record) -> float | None:
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


def check_weight(value: Any, key: str) -> float:
    """Check how much a pair counts, as the column `key` says."""
    number = type(value) in (int, float)
    if not number or not 0 <= value <= 1e30:  # nor NaN
        what = "missing or null" if value is None else f"{kind(value)} ({show(value)})"
        raise Bad(
            f"{key}: {what}, a weight is a number from 0 to 1e30; fix it or drop the row",
            "bad value" if number else "missing field" if value is None else "wrong type",
        )
    return float(value)


def check_finish(record: Record) -> str | None:
    value = record.get("finish")
    if value not in (None, "stop", "length"):
        raise Bad(
            f"finish: {show(value)}, must be stop (the answer ended) or length (it was cut off); fix or drop it",
            "bad value",
        )
    return value


def check_differ(chosen: object, rejected: object, key: str) -> None:
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
