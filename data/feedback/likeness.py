"""Prompts that are nearly the same, and groups of what must not be parted between training and test."""

from __future__ import annotations

from collections.abc import Iterator

from rensa import RMinHash

BANDS, ROWS = 8, 8
"""Two texts share a band with probability 1 - (1 - s^8)^8 for a Jaccard similarity s of their 3-grams: 0.96 at 0.85,
0.77 at 0.8, 0.13 at 0.6 (Leskovec et al., Mining of Massive Datasets, section 3.4.2)."""


def bands(text: str) -> tuple[int, ...]:
    """Return names of which two texts share at least one where their 3-grams of words are nearly the same.

    Of text without spaces, as Chinese is written, 3-grams of characters are taken. Case does not count.
    """
    text = text.lower()
    words = text.split()
    if len(words) * 20 < len(text):
        grams = [text[at : at + 3] for at in range(max(1, len(text) - 2))]
    else:
        grams = list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [" ".join(words)]
    hashes = RMinHash(num_perm=BANDS * ROWS, seed=1)
    hashes.update(grams)
    digest = hashes.digest()
    return tuple(map(hash, zip(range(BANDS), *[iter(digest)] * ROWS, strict=True)))  # of (band, its eight numbers)


class Groups:
    """Things that were found to belong together: a forest whose roots are the least of their group."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, one: int) -> int:
        """Return the least thing that `one` belongs together with."""
        parent = self._parent.setdefault(one, one)
        while parent != self._parent[parent]:
            self._parent[one] = parent = self._parent[self._parent[parent]]
        return parent

    def join(self, one: int, other: int) -> None:
        """Put two things, and all that belongs to either, into one group."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def members(self) -> Iterator[tuple[int, int]]:
        """Yield each thing and its root."""
        yield from ((one, self.root(one)) for one in list(self._parent))
