"""The canonical form itself: every record is an event already.

Scale: 1 up, -1 down, 0 neutral.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import parsed, turns, whole_number
from align_pipeline.data.fields import show
from align_pipeline.data.sources import Bad, Record

_BEGINS_AS_MESSAGES = re.compile(r"""\s*(?:\[\s*\{|\{\s*["']role["'])""")


def events(record: Record) -> Iterator[Record | Bad]:
    yield record


def of_cells(record: Record) -> Record:
    """Return an event that a table of texts holds: what is no text is written in a cell as JSON.

    Raises Bad for a prompt that was meant to be a list and is none: as a text its brackets would be learnt.
    """
    event = dict(record)
    for key in event.keys() & {"event_id", "user_id", "conversation_id"}:
        event[key] = whole_number(event[key])
    if "prompt" in event:
        event["prompt"] = _prompt(event["prompt"])
    if "alternatives" in event:
        event["alternatives"] = parsed(event["alternatives"])
    return event


def _prompt(cell: Any) -> Any:
    if (messages := turns(parsed(cell))) is not None:
        return messages
    if type(cell) is str and _BEGINS_AS_MESSAGES.match(cell):
        rule = "begins as a list of messages and is no whole JSON list of them, each with role and content"
        raise Bad(f"prompt: {show(cell)}, {rule}; write it with json.dumps, or drop the event", "wrong_type")
    return cell


ADAPTER = Adapter("events", lambda record: "event_type" in record, "event_type", each(events))
