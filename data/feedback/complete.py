"""A dislike that has no counterpart is completed: with an answer that is better it becomes a pair.

Where answers come from, and what makes one better, is the caller's: nothing here knows models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.clean import hides, normal, without_reasoning
from align_pipeline.data.feedback.decide import user_cap
from align_pipeline.data.feedback.pii import scrub
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.feedback.tables import every, write_rows

Row = dict[str, Any]
Complete = Callable[[Iterable[Row]], Iterator[str | None]]
"""Gets the disliked unpaired rows as they were written, to be read as often as needed; gives for each of them, in
their order, the text of a better answer, or None."""

MODEL = "complete.policy"
"""What `fb_model_c` says of these rows: the setting that names their model. Its own name is no part of their key."""


@dataclass
class Completed:
    """What was added to the pairs."""

    rows: dict[str, int] = field(default_factory=dict)
    """pairs.train -> rows added."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by what became of them; empty where nobody asked for them."""


class Disliked:
    """The disliked unpaired rows of a folder, first those to train on."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.sided())

    def sided(self) -> Iterator[tuple[str, Row]]:
        """Yield each row with its side of the split."""
        for side in ("train", "test"):
            path = self._out / f"unpaired.{side}.jsonl"
            if path.is_file():
                with path.open("rb") as lines:
                    yield from ((side, row) for row in map(json.loads, lines) if not row["label"])


def complete_rows(database: Any, out: Path, scratch: Path, settings: Settings, complete: Complete | None) -> Completed:
    """Append a pair for each dislike that `complete` knows a better answer to; the unpaired row stays as well.

    Table `completed` holds them: which row, and the answer whose dislike it rests on.
    """
    spool, table = scratch / "completed.jsonl", scratch / "completed.parquet"
    offered = _spool(Disliked(out), spool, settings, complete) if complete else []
    made = [one for one in offered if one is not None]
    write_rows(made, table, {"row": "uint64", "dislike": "uint64"})
    database.execute(f"""
        CREATE TABLE completed AS SELECT made.row, prompt, answer, owner_1
        FROM read_parquet({every(table.parent, table.name)}) AS made JOIN unpaired ON unpaired.row = made.dislike
    """)
    if complete is None:
        return Completed()
    capped = user_cap(database, settings, "completed", ("owner_1",))
    counts = {"completed": len(made) - capped, "not_completed": len(offered) - len(made), "user_cap": capped}
    return Completed(_append(database, out, spool), counts)


def _spool(disliked: Disliked, spool: Path, settings: Settings, complete: Complete) -> list[tuple[int, int] | None]:
    """Write the pair of each dislike that has one; return its row and the dislike's."""
    offered: list[tuple[int, int] | None] = []
    encode = msgspec.json.Encoder().encode
    with spool.open("wb") as file:
        for (side, row), text in zip(disliked.sided(), complete(disliked), strict=True):
            if text is None or text == row["completion"][0]["content"]:
                offered.append(None)
                continue
            pair = _pair(row, text, settings)
            file.write(side.encode() + b" " + encode(pair) + b"\n")
            offered.append((int(pair["fb_row_id"], 16), int(row["fb_row_id"], 16)))
    return offered


def _append(database: Any, out: Path, spool: Path) -> dict[str, int]:
    """Append the pairs that no cap took to the file of their side; return how many each got."""
    kept = {f"{row:016x}" for (row,) in database.execute("SELECT row FROM completed").fetchall()}
    added: dict[str, int] = {}
    with spool.open("rb") as lines:
        for line in lines:
            side, _, pair = line.partition(b" ")
            if json.loads(pair)["fb_row_id"] in kept:
                name = f"pairs.{side.decode()}"
                with (out / f"{name}.jsonl").open("ab") as file:
                    file.write(pair)
                added[name] = added.get(name, 0) + 1
    return added


def _pair(row: Row, text: str, settings: Settings) -> Row:
    """Return a dislike and a better answer as a pair that is as sure as the dislike."""
    sure = confidence.comparisons(row["fb_down"], row["fb_up"])
    name = hashlib.sha256(f"{row['fb_row_id']},{text}".encode()).hexdigest()[:16]
    return {
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": text}],
        "rejected": row["completion"],
        **({"margin": round(confidence.margin(sure), 6)} if settings.margins else {}),
        "fb_row_id": name,
        "fb_source": "completed",
        "fb_confidence": round(sure, 6),
        "fb_weight": round(confidence.weight(sure), 6),
        "fb_up_c": 0,
        "fb_down_c": 0,
        "fb_up_r": row["fb_up"],
        "fb_down_r": row["fb_down"],
        "fb_model_c": MODEL,
        "fb_model_r": row["fb_model"],
        "fb_on_policy": False,
        "fb_ts_min": row["fb_ts_min"],
        "fb_ts_max": row["fb_ts_max"],
        "fb_users": row["fb_users"],
        "fb_prompt_group": row["fb_prompt_group"],
    }


def cleaned(text: str, row: Row, settings: Settings) -> str | None:
    """Return an answer to a row's prompt as a row may hold it, cleaned as answers of logs are.

    None where nothing is left of it, it hides something, or it is the disliked answer.
    """
    disliked = row["completion"][0]["content"]
    text = normal(without_reasoning(text) if settings.strip_reasoning else text)
    if settings.pii != "off":
        text = scrub([*(turn["content"] for turn in row["prompt"]), disliked, text])[0][-1]
    return None if not text or hides(text) or text == disliked else text
