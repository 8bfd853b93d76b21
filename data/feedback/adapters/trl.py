"""TRL's data sets, as texts or messages: `trl-preference` (chosen, rejected, [prompt]) and `trl-unpaired`.

trl-preference: chosen won. Where both are whole conversations, what they begin with alike is the prompt; texts of
`Human:` and `Assistant:` are conversations too. Other texts need a prompt: where it ends in them is not guessed.
trl-unpaired (prompt, completion, label): a label true is up and false is down; so are 1 and 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import Turn, diverged, preferred, rated, same, turns
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.fields import begins_dialogue, dialogue_turns, kind, show
from align_pipeline.data.sources import Bad, Record

PAIR = frozenset(("chosen", "rejected"))
UNPAIRED = frozenset(("prompt", "completion", "label"))
_OTHERS = frozenset(("event_type", "conversations", "messages", "instruction", "input"))
"""Fields that say more than these two data sets do: a record with one of them is of another product."""
_CAUSES = {"order of turns": "bad_role_order", "empty": "missing_response", "wrong type": "wrong_type"}
"""What causes are called in feedback."""


def is_pair(record: Record) -> bool:
    return record.keys() >= PAIR and not record.keys() & _OTHERS


def is_unpaired(record: Record) -> bool:
    return record.keys() >= UNPAIRED and not record.keys() & _OTHERS


def pair(record: Record) -> Iterator[Record]:
    (one, chosen), (other, rejected) = (_split(record, key) for key in ("chosen", "rejected"))
    if not same(one, other):
        raise diverged("rejected", "chosen")
    prompt = one or record.get("prompt")
    if prompt is None:
        raise Bad("prompt: missing, answers that are texts need one; add it, or drop the row", "missing_prompt")
    verdict = preferred({"response": chosen}, {"response": rejected})
    yield {"event_type": "comparison", "prompt": prompt, **verdict}


def unpaired(record: Record) -> Iterator[Record]:
    before, answer = _split(record, "completion")
    label = record.get("label")
    label = None if label is None else rated(label, "label", "zero_one")
    rating = {"event_type": "rating", "prompt": before or record.get("prompt"), "response": answer, "label": label}
    yield canonical(rating)


def _split(record: Record, key: str) -> tuple[list[Turn], Any]:
    """Return the turns before an answer, where they are written with it, and the answer."""
    value = record.get(key)
    if begins_dialogue(value) and "prompt" not in record:
        try:
            value = [{"role": turn.role, "content": turn.content} for turn in dialogue_turns(value, key)]
        except Bad as bad:
            raise Bad(bad.problem, _CAUSES.get(bad.cause, bad.cause)) from None
    if type(value) in (str, type(None)):
        return [], value
    found = turns(value)
    if found is None or found[-1]["role"] != "assistant":
        rule = "must be a text or messages that end with the assistant's"
        raise Bad(f"{key}: {kind(value)} ({show(value)}), {rule}; fix or drop it", "missing_response")
    return found[:-1], found[-1]["content"]


PREFERENCE_ADAPTER = Adapter("trl-preference", is_pair, "chosen, rejected", each(pair))
UNPAIRED_ADAPTER = Adapter("trl-unpaired", is_unpaired, ", ".join(sorted(UNPAIRED)), each(unpaired))
