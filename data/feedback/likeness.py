"""Prompts that are nearly the same, and groups of what must not be parted between training and test."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

BANDS, ROWS = 8, 8
"""Two texts share a band with probability 1 - (1 - s^8)^8 for a Jaccard similarity s of their 3-grams: 0.96 at 0.85,
0.77 at 0.8, 0.13 at 0.6 (Leskovec et al., Mining of Massive Datasets, section 3.4.2)."""
LOOKED_AT = 2**18
"""Characters of a text that are looked at: what begins alike for so long is alike."""
_FACTOR, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""An odd number to build powers of, and those of splitmix64."""


def bands(texts: Sequence[str]) -> Any:
    """Return names of texts, (texts, 8) as int64, of which two texts share at least one where their 3-grams of words
    are nearly the same.

    Of text without spaces, as Chinese is written, 3-grams of characters are taken. Case does not count. No text may be
    blank.
    """
    import numpy as np

    grams, begins = _grams([text[:LOOKED_AT].lower() for text in texts])
    least = np.empty((BANDS * ROWS, len(texts)), np.uint64)
    shuffled = np.empty_like(grams)
    for number, factor in enumerate(_mixed(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)) | np.uint64(1)):
        np.minimum.reduceat(np.multiply(grams, factor, out=shuffled), begins, out=least[number])
    names = np.repeat(np.arange(BANDS, dtype=np.uint64)[:, None], len(texts), axis=1)
    for row in range(ROWS):
        names = _mixed(names * np.uint64(_FACTOR) + least[row::ROWS])
    return names.T.view(np.int64)


def _grams(texts: Sequence[str]) -> tuple[Any, Any]:
    """Return the hashes of the 3-grams of all texts, one text's after the other's, and where each text's begin."""
    import numpy as np

    lengths = np.array([len(text) for text in texts])
    codes = np.frombuffer(" ".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    last = np.cumsum(lengths + 1) - 1  # the blank behind each text
    inside = ~_blanks()[np.minimum(codes, _blanks().size - 1)]
    before = np.concatenate(([False], inside[:-1]))
    begins, ends = inside & ~before, ~inside & before  # of words; a word ends before the end of its text
    unspaced = np.diff(np.cumsum(begins)[last], prepend=0) * 20 < lengths
    if unspaced.any():
        here = np.repeat(unspaced, lengths + 1)
        character = here.copy()
        character[last] = False
        begins = np.where(here, character, begins)
        ends = np.where(here, np.concatenate(([False], character[:-1])), ends)
    units = _units(codes, np.flatnonzero(begins), np.flatnonzero(ends))
    stops = np.cumsum(begins)[last]
    counts = np.diff(stops, prepend=0)
    padded = np.concatenate((units, np.zeros(2, np.uint64)))
    grams = _joined(padded[:-2], padded[1:-1], padded[2:])
    few = (counts > 0) & (counts < 3)  # what has no three units is one gram itself
    first = (stops - counts)[few]
    grams[first] = _joined(units[first], np.where(counts[few] > 1, padded[first + 1], 0), np.uint64(0))
    begun = np.ones(len(units), bool)
    for back in (1, 2):  # the last two units of a text begin no gram
        begun[(stops - back)[counts > back]] = False
    return grams[begun], (np.cumsum(begun) - 1)[stops - counts]


def _joined(one: Any, two: Any, three: Any) -> Any:
    """Return the hashes of three units each."""
    import numpy as np

    return _mixed(_mixed(one * np.uint64(_MIX_1) + two) * np.uint64(_MIX_2) + three)


def _units(codes: Any, begins: Any, ends: Any) -> Any:
    """Return a hash of each stretch of characters: a polynomial of them modulo 2^64, the first one's power being 0."""
    import numpy as np

    powers, inverses = _powers(codes.size)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(powers[: codes.size] * (codes + np.uint64(1)))))
    return _mixed((sums[ends] - sums[begins]) * inverses[begins])


def _mixed(numbers: Any) -> Any:
    """Return numbers of 64 bits whose every bit hangs on every bit of the given ones (the end of splitmix64)."""
    import numpy as np

    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(_MIX_1)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(_MIX_2)
    return numbers ^ (numbers >> np.uint64(31))


@functools.lru_cache(1)
def _blanks() -> Any:
    """Return of every character that may be white space whether it is, and of the one behind them that it is not."""
    import numpy as np

    return np.array([chr(code).isspace() for code in range(0x3002)])


_kept: Any = (None, None)


def _powers(count: int) -> Any:
    """Return the powers of a factor modulo 2^64, at least so many, and those of its inverse."""
    import numpy as np

    global _kept
    if _kept[0] is None or _kept[0].size < count:
        size = max(count, 2**18)
        powers, inverses = (np.full(size, number, np.uint64) for number in (_FACTOR, pow(_FACTOR, -1, 2**64)))
        powers[0] = inverses[0] = 1
        _kept = np.cumprod(powers), np.cumprod(inverses)
    return _kept


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
