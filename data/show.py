"""Rows as a model sees them: the text of its tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align_pipeline.data.chat import IGNORED, Tokenizer

Mark = Callable[[str], str]
"""Makes the learnt part of a text visible."""


def brackets(text: str) -> str:
    return f"⟦{text}⟧"


def shown(encoded: Mapping[str, Any], tokenizer: Tokenizer, mark: Mark = brackets) -> Iterator[str]:
    """Yield an encoded row in lines: what is learnt is marked, in a pair on either side."""
    if "input_ids" in encoded:
        ids, labels = encoded["input_ids"], encoded["labels"]
        yield _counts(len(ids), sum(label != IGNORED for label in labels))
        yield _spans(ids, [label != IGNORED for label in labels], tokenizer, mark)
        return
    prompt = list(encoded["prompt_ids"])
    sides = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in encoded]
    if not sides:
        yield f"{len(prompt):,} tokens"
        yield _text(prompt, tokenizer)
    for name in sides:
        answer = list(encoded[name])
        side = name.removesuffix("_ids")
        if "label" in encoded:
            side = "liked" if encoded["label"] else "disliked"
        yield f"{side}: {_counts(len(prompt) + len(answer), len(answer))}"
        yield _spans(prompt + answer, [False] * len(prompt) + [True] * len(answer), tokenizer, mark)


def _counts(tokens: int, learnt: int) -> str:
    return f"{tokens:,} tokens, {learnt:,} of them learnt"


def _spans(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Tokenizer, mark: Mark) -> str:
    """Return the text with its learnt spans marked; a span begins where the text of the tokens before it ends."""
    parts = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            before, through = _text(ids[:start], tokenizer), _text(ids[:end], tokenizer)
            # On its own, a span may lose the space that it begins with.
            text = through[len(before) :] if through.startswith(before) else _text(ids[start:end], tokenizer)
            parts.append(mark(text) if learnt[start] else text)
            start = end
    return "".join(parts)


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def histogram(lengths: Sequence[int], width: int = 40) -> Iterator[str]:
    """Yield how many rows are how long, one line for each power of two."""
    counts: dict[int, int] = {}
    for length in lengths:
        power = max(0, int(length) - 1).bit_length()
        counts[power] = counts.get(power, 0) + 1
    most = max(counts.values(), default=1)
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        count = counts.get(power, 0)
        bar = "█" * -(-count * width // most)
        yield f"{f'up to {2**power:,}':>16}  {count:>9,}  {bar}".rstrip()
