"""OpenAI's preference format: input, preferred_output and non_preferred_output, as its fine-tuning takes them.

Scale: the preferred output won.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import inner, preferred, turns
from align_pipeline.data.fields import kind, show
from align_pipeline.data.sources import Bad, Record

KEYS = frozenset(("input", "preferred_output", "non_preferred_output"))


def events(record: Record) -> Iterator[Record]:
    given = inner(record, "input")
    prompt = turns(given.get("messages"))
    if prompt is None:
        what = f"input.messages: {show(given.get('messages'))}, must be a list of {{role, content}}"
        raise Bad(f"{what}; fix or drop it", "missing_prompt")
    best, worst = ({"response": _answer(record, key)} for key in ("preferred_output", "non_preferred_output"))
    yield {"event_type": "comparison", "prompt": prompt, **preferred(best, worst)}


def _answer(record: Record, key: str) -> Any:
    value = record.get(key)
    found = turns(value)
    if found is None or len(found) != 1 or found[0]["role"] != "assistant":
        rule = "must be a list of one assistant message"
        raise Bad(f"{key}: {kind(value)} ({show(value)}), {rule}; fix or drop it", "missing_response")
    return found[0]["content"]


ADAPTER = Adapter("openai-dpo", lambda record: record.keys() >= KEYS, ", ".join(sorted(KEYS)), each(events))
