"""The rows that stages train on: one frozen class for each kind, each knowing where it was read.

Text and its twin of token ids are separate classes: ids are taken exactly, text goes through the tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

Task = Literal["sft", "preference", "unpaired", "prompt", "text"]
"""What a file is read for; it decides which formats are looked for."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Content: TypeAlias = str | tuple[Message, ...]
"""Plain text, or turns that a chat template renders."""

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A document, trained on whole; `finish="length"` says that it was cut off and gets no end token."""

    where: str
    text: str
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an assistant turn; the assistant turns are what is learnt."""

    where: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer to learn; `finish="length"` says that the answer was cut off and gets no end token."""

    where: str
    prompt: Content
    completion: Content
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class ExampleIds:
    """An `Example` as token ids, an end token included where there is one."""

    where: str
    prompt_ids: Ids
    completion_ids: Ids


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt and which is better; `margin` is by how much, `weight` how much the pair counts."""

    where: str
    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class PreferenceIds:
    """A `Preference` as token ids."""

    where: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One answer and whether it was liked."""

    where: str
    prompt: Content
    completion: Content
    label: bool


@dataclass(frozen=True, slots=True)
class UnpairedIds:
    """An `Unpaired` as token ids."""

    where: str
    prompt_ids: Ids
    completion_ids: Ids
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer; `extra` holds the file's other columns, for reward functions."""

    where: str
    prompt: Content
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class PromptIds:
    """A `Prompt` as token ids."""

    where: str
    prompt_ids: Ids
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


Row: TypeAlias = (
    Text | Chat | Example | ExampleIds | Preference | PreferenceIds | Unpaired | UnpairedIds | Prompt | PromptIds
)


def record(row: Row) -> dict[str, Any]:
    """Return the row as the plain mapping that `load.read` reads back, without `where`; `extra` becomes columns."""
    plain: dict[str, Any] = {}
    for item in fields(row):
        value = getattr(row, item.name)
        if item.name == "extra":
            plain = {**value, **plain}  # a column never replaces the prompt
        elif item.name != "where" and value is not None:
            plain[item.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [{"role": part.role, "content": part.content} if isinstance(part, Message) else part for part in value]


def prompt_key(row: Row) -> Content | Ids:
    """Return what the row asks: its prompt; of a conversation the turns before the first answer; of a text the text."""
    if isinstance(row, Text):
        return row.text
    if isinstance(row, Chat):
        first = next(i for i, message in enumerate(row.messages) if message.role == "assistant")
        return row.messages[:first]
    if isinstance(row, ExampleIds | PreferenceIds | UnpairedIds | PromptIds):
        return row.prompt_ids
    return row.prompt


def content_hash(row: Row) -> int:
    """Return 64 bits, signed, that depend on what a row says, not on where it stands, its `weight` or its `extra`."""
    digest = hashlib.blake2b(type(row).__name__.encode(), digest_size=8)
    for name in _CONTENT[type(row)]:
        value = getattr(row, name)
        parts = [part for turn in value for part in (turn.role, turn.content)] if _is_turns(value) else [str(value)]
        for part in parts:
            digest.update(b"\x00%d\x00" % len(part))
            digest.update(part.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big", signed=True)


def _is_turns(value: Any) -> bool:
    return type(value) is tuple and bool(value) and type(value[0]) is Message


_CONTENT = {
    cls: tuple(item.name for item in fields(cls) if item.name not in ("where", "weight", "extra"))
    for cls in get_args(Row)
}


def characters(content: Content | Ids) -> int:
    """Return how long a prompt or an answer is: in characters, or in ids."""
    if isinstance(content, str):
        return len(content)
    return sum(len(part.content) if isinstance(part, Message) else 1 for part in content)
