"""What is kept of events to decide about them: names, times and places, no texts.

Each event leaves one row of the index or several (a comparison of three answers says two things), with the place of its
line, where the texts are found again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align_pipeline.data.feedback.events import BOTH_BAD, TIE, Dropped, Event
from align_pipeline.data.feedback.keys import answer_key, body_key, name_key, prompt_key, user_hash

SAYS = {"VOTE": 0, "BETTER": 1, "EDIT": 2, "DEMONSTRATION": 3, "REGENERATE": 4, "TIED": 5}
VOTE, BETTER, EDIT, DEMONSTRATION, REGENERATE, TIED = SAYS.values()
"""What a row of the index says: a vote on answer 1, that answer 1 beats answer 2 (and how that is known), a tie."""
RETRACTED = 2
"""The label of a vote that was taken back."""

Place = tuple[int, int, int, int, int]
"""The number of an event, its file, where its line begins, the bytes and the number of the line."""


@dataclass(frozen=True)
class Marker:
    """Makes rows of the index of an event."""

    secret: bytes
    forgotten: frozenset[str]
    """Hashes of users whose events are left out."""
    ignore_system: bool = False
    admin_weight: int = 1
    source: str = ""
    """Apart from it, equal event ids are one event."""

    def rows(self, event: Event, place: Place) -> list[tuple[Any, ...]]:
        """Return what an event says, a row for each thing."""
        user, who = (None, None) if event.user is None else hashed(event.user, self.secret)
        if user in self.forgotten:
            raise Dropped("tombstoned")
        asked, answers = event.prompt, event.answers
        prompt = prompt_key(asked, ignore_system=self.ignore_system) if asked else None
        names = [answer_key(prompt, answer.text) for answer in answers]
        # Which of two events counts may hang on what they say, so the body holds no salted name.
        body = body_key(
            event.type, prompt_key(asked) if asked and self.ignore_system else prompt, names, event.label,
            event.winner, event.at, event.user, event.response_id, [answer.model for answer in answers], event.actor,
            event.conversation, event.unfinished,
        )  # fmt: skip
        head = (
            *place,
            name_key(self.source, event.id) if event.id is not None else body,
            body,
            event.at,
            who,
            self.admin_weight if event.actor == "admin" else 1,
            None if event.conversation is None else name_key(self.source, event.conversation),
            None if event.response_id is None else name_key(self.source, event.response_id),
            prompt,
            sum([len(turn.content) for turn in asked]),
        )
        if len(answers) == 1 and event.type == "rating":
            return [(*head, 0, VOTE, event.label, names[0], 0, answers[0].model, len(answers[0].text), *NO_SECOND)]
        return [(*head, part, *said) for part, said in enumerate(_said(event, names))]


NO_SECOND = (None, None, None, 0, None, None)


@functools.lru_cache(100_000)
def hashed(user: str, secret: bytes) -> tuple[str, int]:
    """Return the name that stands for a user, also as the number that the index holds."""
    name = user_hash(user, secret)
    return name, int.from_bytes(bytes.fromhex(name), "big", signed=True)


def _said(event: Event, names: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Yield each thing that an event says, of one answer or of two."""
    for says, label, one, other in _statements(event):
        if not names:
            yield says, label, None, one, None, 0, *NO_SECOND
            continue
        first = event.answers[one]
        what = (says, label, names[one], one, first.model, len(first.text))
        if other is None:
            yield *what, *NO_SECOND
            continue
        second = event.answers[other]
        yield (
            *what, names[other], other, second.model, len(second.text),
            None if first.position is None or second.position is None else first.position < second.position,
            similarity(first.text, second.text) if says == EDIT else None,
        )  # fmt: skip


def _statements(event: Event) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield (what is said, label, place of answer 1, place of answer 2)."""
    if event.type == "rating":
        yield VOTE, event.label, 0, None
    elif event.type == "retract":
        yield VOTE, RETRACTED, 0, None
    elif event.type == "comparison" and event.winner == TIE:
        yield TIED, 0, 0, 1
    elif event.type == "comparison" and event.winner == BOTH_BAD:
        yield from ((VOTE, -1, place, None) for place in range(len(event.answers)))
    elif event.type == "comparison":
        yield from ((BETTER, 0, event.winner, other) for other in range(len(event.answers)) if other != event.winner)
    elif len(event.answers) == 1:  # a demonstration of which no earlier answer is known
        yield VOTE, 1, 0, None
    else:
        says = {"edit": EDIT, "demonstration": DEMONSTRATION, "regenerate": REGENERATE}[event.type]
        yield says, 0, 0, 1


def similarity(one: str, other: str) -> float:
    """Return how much of two texts is alike, from 0 to 1: 1 - insertions and deletions / characters (Indel ratio)."""
    from rapidfuzz.distance import Indel

    if max(len(one), len(other)) > 50_000:  # by words: the time grows with the product of the lengths
        return float(Indel.normalized_similarity(one.split(), other.split()))
    return float(Indel.normalized_similarity(one, other))


INDEX = {
    "event": "int64", "file": "int32", "start": "int64", "size": "int32", "line": "int32", "id": "int64",
    "body": "int64", "ts": "int64", "who": "int64", "weight": "int32", "conversation": "int64",
    "response_id": "int64", "prompt": "int64", "prompt_chars": "int32", "part": "int32", "says": "int32",
    "label": "int32", "one": "int64", "one_at": "int32", "one_model": "string", "one_chars": "int32", "two": "int64",
    "two_at": "int32", "two_model": "string", "two_chars": "int32", "left_won": "bool_", "similarity": "float64",
}  # fmt: skip
"""The columns of the index: where an event lies, who said it when, what it says and about which answers."""
