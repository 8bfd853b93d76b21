"""Prompts that are nearly the same: which 3-grams they are judged by, and how surely their like is found."""

import random
from typing import Any

import pytest

from align_pipeline.data.feedback import likeness
from align_pipeline.data.feedback.likeness import BANDS, ROWS, bands

WORDS = ["a", "b", "ab", "ba", "Über", "日本語テキスト", "x\u3000y", "é", "\u200b", "q" * 30, "😀", "ß"]


def grams_of(text: str) -> list[tuple[str, ...]]:
    """Return the 3-grams of words of a text, or of characters where it has no spaces, as one would by hand."""
    text = text.lower()
    words = text.split()
    units = list(text) if len(words) * 20 < len(text) else words
    return [tuple(units[at : at + 3]) for at in range(max(1, len(units) - 2))]


def test_equal_grams_have_equal_hashes_and_others_have_others():
    draw = random.Random(0)
    texts = [
        draw.choice([" ", "\n", "  ", "\u00a0", ""]).join(draw.choice(WORDS) for _ in range(draw.randint(1, 9))).strip()
        for _ in range(2_000)
    ]
    hashes, begins = likeness._grams([text.lower() for text in texts])
    hash_of: dict[tuple[str, ...], int] = {}
    for text, begin, end in zip(texts, begins.tolist(), [*begins[1:].tolist(), len(hashes)], strict=True):
        expected = grams_of(text)
        assert len(expected) == end - begin, text
        for gram, found in zip(expected, hashes[begin:end].tolist(), strict=True):
            assert hash_of.setdefault(gram, found) == found, gram
    assert len(set(hash_of.values())) == len(hash_of) > 2_000


@pytest.mark.parametrize("share", [0.6, 0.8, 0.85])
def test_like_texts_share_a_name_as_often_as_the_banding_says(share: float):
    count, length = 2_000, 80
    common = round(2 * (length - 2) * share / (1 + share)) + 2  # words, so that the 3-grams' Jaccard is `share`
    similarity = (common - 2) / (2 * (length - 2) - (common - 2))

    def texts(own: str) -> list[str]:
        return [
            " ".join([*(f"w{i}x{j}" for j in range(common)), *(f"{own}{i}x{j}" for j in range(length - common))])
            for i in range(count)
        ]

    found = (bands(texts("a")) == bands(texts("b"))).any(axis=1).mean()
    expected = 1 - (1 - similarity**ROWS) ** BANDS
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_what_is_looked_at_together_and_how_long_it_is_change_no_name():
    texts: list[Any] = [f"{word} and {other} are alike, {word}!" for word in WORDS for other in WORDS]
    texts.append("long " * 100_000)
    together = bands(texts)
    assert (bands(texts[:1]) == together[:1]).all()
    assert (bands(texts[::-1]) == together[::-1]).all()
    assert len({tuple(row) for row in together.tolist()}) == len(texts)
