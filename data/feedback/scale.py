"""What a rating says: up, down or neither. `0` means three things in three products, so it is never guessed."""

from __future__ import annotations

import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any, Literal, get_args

from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad

Scale = Literal["pm1", "zero_one", "stars5", "unit"]
"""pm1: -1 down, 0 neutral, 1 up. zero_one: 0 down, 1 up. stars5: 1-2 down, 3 neutral, 4-5 up. unit: at most 0.3 down,
at least 0.7 up, between them neutral."""
SCALES: tuple[str, ...] = get_args(Scale)

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?", re.I)

# fmt: off
_UP = frozenset((
    "1", "true", "up", "thumbsup", "thumbs_up", "thumbs-up", "like", "liked", "upvote", "good", "positive", "yes", "👍",
))
_DOWN = frozenset((
    "-1", "false", "down", "thumbsdown", "thumbs_down", "thumbs-down", "dislike", "disliked", "downvote", "bad",
    "negative", "no", "👎",
))
# fmt: on
_SKIN = dict.fromkeys((*range(0x1F3FB, 0x1F400), 0xFE0F))
"""Colours of skin, and the mark that asks for a picture: a thumb is a thumb."""


def label(value: Any, scale: Scale | None = None) -> int:
    """Return 1, 0 or -1 for a rating on a scale; without one for words, booleans, 1 and -1.

    Raises Bad `ambiguous_zero` for a zero without a scale, `unknown_rating` for what the scale does not hold.
    """
    word = value.strip().lower().translate(_SKIN) if type(value) is str else value
    if type(word) is bool:
        return 1 if word else -1
    number = _number(word)
    if scale is None or number is None:
        if number == 0:
            raise Bad("label: 0, which is down, neutral or the worst star; say which: rating_scale", "ambiguous_zero")
        text = f"{number:g}" if number is not None else word if type(word) is str else ""
        if text in _UP or text in _DOWN:
            return 1 if text in _UP else -1
    elif (found := _on(number, scale)) is not None:
        return found
    on = f"on the scale {scale}" if scale else "a known rating"
    remedy = "name its scale (rating_scale) or drop it" if scale else "write 1, -1 or 0, or drop it"
    raise Bad(f"label: {kind(value)} ({show(value)}), is not {on} ({_holds(scale)}); {remedy}", "unknown_rating")


def _number(word: Any) -> float | None:
    if type(word) is str and not _NUMBER.fullmatch(word):
        return None
    if type(word) not in (str, int, float, Decimal):
        return None
    try:
        return float(word)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _on(number: float, scale: Scale) -> int | None:
    if scale == "pm1":
        return int(number) if number in (-1, 0, 1) else None
    if scale == "zero_one":
        return {0.0: -1, 1.0: 1}.get(number)
    if scale == "stars5":
        return (1 if number >= 4 else 0 if number == 3 else -1) if number in (1, 2, 3, 4, 5) else None
    return (1 if number >= 0.7 else -1 if number <= 0.3 else 0) if 0 <= number <= 1 else None


def _holds(scale: Scale | None) -> str:
    return {
        "pm1": "-1, 0, 1",
        "zero_one": "0, 1",
        "stars5": "1 to 5",
        "unit": "0 to 1",
        None: "1, -1, up, down, like, dislike, ...",
    }[scale]


def find_scale(values: Counter[Any]) -> tuple[Scale | None, str]:
    """Return the scale that ratings are on, and how that is known; None where words need none.

    Raises ValueError where the numbers leave it open.
    """
    numbers = {number for value in values if type(value) is not bool and (number := _number(value)) is not None}
    if not numbers:
        return None, "words"
    if numbers <= {-1.0, 0.0, 1.0}:
        if -1.0 in numbers:
            return "pm1", "there is a -1"
        if numbers == {0.0, 1.0}:
            return "zero_one", "there are only 0 and 1"
    elif numbers <= {1.0, 2.0, 3.0, 4.0, 5.0}:
        return "stars5", f"there is a {max(numbers):g}"
    shown = ", ".join(f"{number:g}" for number in sorted(numbers)[:6])
    raise ValueError(f"the ratings are {shown}, which tells no scale; pass rating_scale: one of {', '.join(SCALES)}")
