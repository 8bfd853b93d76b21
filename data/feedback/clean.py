"""Texts of a log as they are trained on: what a product's page added is taken off, what hides is found."""

from __future__ import annotations

import re
import unicodedata

_DETAILS = re.compile(r'<details\s+type="(?:reasoning|tool_calls|code_interpreter)"[^>]*>.*?</details>\n*', re.S)
"""How Open WebUI keeps a thought or a tool call inside an answer."""
_THOUGHT = re.compile(r"\s*<(think|thinking|reasoning)>.*?</\1>", re.S)
"""A thought that an answer begins with."""
_THOUGHT_END = re.compile(
    r"(?:(?!<think>).)*?"
    r"(?:(?:(?<=\n)|(?<![\s\S]))[ \t]*</think>[ \t]*(?:\n|\Z)"  # on a line of its own
    r"|</think>[ \t]*\n[ \t]*\n)",  # or with a blank line after it
    re.S,
)
"""A thought whose begin stood in the prompt: some templates write it there. A tag that is spoken of ends none."""
_HIDDEN = re.compile(
    "[\u202d\u202e]"  # overrides of direction: what is read is not what stands there
    "|(?<!\U0001f3f4)(?<![\U000e0020-\U000e007f])[\U000e0001-\U000e007f]"  # tags, but for those of flags
    "|[\u200b\u200c\u200d\u2060\ufeff]{4}"  # a run of zero width: bits, not letters
)


def normal(text: str) -> str:
    """Return a text in NFC, with line feeds, without white space at its ends: equal texts are equal bytes."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def without_reasoning(text: str) -> str:
    """Return an answer without its thoughts and the cards of tool calls, which are no part of what was rated."""
    if "<" not in text:
        return text
    bare = _DETAILS.sub("", text) if "<details" in text else text
    begin = _THOUGHT.match(bare) or (_THOUGHT_END.match(bare) if "</think>" in bare else None)
    return bare[begin.end() :] if begin else bare


def hides(text: str) -> bool:
    """Tell whether a text holds characters that no reader sees and that carry something all the same."""
    return not text.isascii() and _HIDDEN.search(text) is not None
