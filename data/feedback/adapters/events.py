"""The canonical form itself: every record is an event already.

Scale: 1 up, -1 down, 0 neutral.
"""

from __future__ import annotations

from collections.abc import Iterator

from align_pipeline.data.feedback.adapter import Adapter, each
from align_pipeline.data.feedback.adapters.common import parsed, turns, whole_number
from align_pipeline.data.sources import Bad, Record


def events(record: Record) -> Iterator[Record | Bad]:
    yield record


def of_cells(record: Record) -> Record:
    """Return an event that a table of texts holds: what is no text is written in a cell as JSON."""
    event = dict(record)
    for key in event.keys() & {"event_id", "user_id", "conversation_id"}:
        event[key] = whole_number(event[key])
    if "prompt" in event:
        event["prompt"] = turns(parsed(event["prompt"])) or event["prompt"]
    if "alternatives" in event:
        event["alternatives"] = parsed(event["alternatives"])
    return event


ADAPTER = Adapter("events", lambda record: "event_type" in record, "event_type", each(events))
