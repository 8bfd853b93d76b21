"""The writing system of a text: what can be told of its language without a model of languages."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter

SYSTEMS = (
    "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Telugu", "Thai", "Georgian",
    "Armenian", "Ethiopic", "Khmer", "Hangul", "Kana", "Han", "other",
)  # fmt: skip
LOOKED_AT = 200
"""Characters at the beginning of a text."""
_CALLED = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
"""First word of a letter's name in Unicode -> its system, where that is not the word itself."""


def writing(text: str) -> int:
    """Return the place in SYSTEMS of what most letters at the beginning of a text belong to; -1 without letters.

    Japanese mixes Kana and Han: a text with Kana is taken for Kana.
    """
    head = text[:LOOKED_AT]
    if head.isascii():
        return 0 if any(map(str.isalpha, head)) else -1
    found = Counter(_system(letter) for letter in head if letter.isalpha())
    if not found:
        return -1
    name = "Kana" if found["Kana"] else found.most_common(1)[0][0]
    return SYSTEMS.index(name)


@functools.lru_cache(4096)
def _system(letter: str) -> str:
    word = unicodedata.name(letter, "other").partition(" ")[0].partition("-")[0]
    name = _CALLED.get(word, word.capitalize())
    return name if name in SYSTEMS else "other"
