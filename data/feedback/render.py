"""Write rows: fetch the texts of the answers that were chosen, and say with each row what it rests on.

Rows are rendered in the order in which their texts lie in the logs, and put into their own order afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.events import Reading, read_texts
from align_pipeline.data.feedback.index import parse
from align_pipeline.data.feedback.keys import prompt_key
from align_pipeline.data.feedback.likeness import bands
from align_pipeline.data.feedback.pii import scrub
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.feedback.tables import write_columns, write_rows
from align_pipeline.data.json_text import Strict
from align_pipeline.data.rows import Message

BATCH = 2_000
"""Rows that one process renders at a time."""

Place = tuple[int, int, int, int]
"""Where a text lies: file, first byte, bytes, and which of the event's answers it is."""


@dataclass(frozen=True)
class Batch:
    """Rows to render, as the database gives them."""

    number: int
    kind: str
    columns: list[str]
    values: list[tuple[Any, ...]]


@dataclass
class Rendered:
    """What became of the rows of a batch."""

    rows: int = 0
    equal: int = 0
    """Pairs whose sides were made equal by taking personal data out."""
    scrubbed: Counter[str] = field(default_factory=Counter)
    rows_scrubbed: int = 0


def batches(database: Any) -> Iterator[Batch]:
    """Yield the rows of both tables in batches, ordered by where their texts lie."""
    for table, sides in (("pair", ("chosen", "rejected")), ("unpaired", ("answer",))):
        needed = " UNION ".join(f"SELECT prompt, {side} AS answer FROM {table}" for side in sides)
        joins = " ".join(
            f"JOIN place AS p_{side} ON p_{side}.prompt = {table}.prompt AND p_{side}.answer = {table}.{side}"
            for side in sides
        )
        columns = ", ".join(
            f"p_{side}.place AS {side}_place, p_{side}.model AS {side}_model, p_{side}.chars AS {side}_chars"
            for side in sides
        )
        database.execute(f"""
            CREATE OR REPLACE TABLE place AS
            WITH needed AS ({needed}), text AS (
                SELECT prompt, one AS answer, struct_pack(file, start, size, answer := one_at) AS place, body,
                    one_model AS model, one_chars AS chars
                FROM statement
                UNION ALL
                SELECT prompt, two, struct_pack(file, start, size, answer := two_at), body, two_model, two_chars
                FROM statement WHERE two IS NOT NULL)
            SELECT prompt, answer, arg_min(place, body) AS place, min(model) AS model, any_value(chars) AS chars
            FROM text SEMI JOIN needed USING (prompt, answer) GROUP BY ALL;
            CREATE OR REPLACE TABLE {table}_text AS SELECT {table}.*, {columns} FROM {table} {joins};
        """)
        cursor = database.execute(f"""
            SELECT *, row_number() OVER (PARTITION BY prompt ORDER BY row) = 1 AS first_of_prompt
            FROM {table}_text ORDER BY {sides[0]}_place, row
        """)
        names = [column[0] for column in cursor.description]
        number = 0
        while rows := cursor.fetchmany(BATCH):
            yield Batch(number, table, names, rows)
            number += 1


def render(batch: Batch, files: Sequence[Path], folder: Path, reading: Reading, settings: Settings) -> Rendered:
    """Write the rows of a batch, without the ends of their lines, and beside them where each lies and what its prompt
    is like."""
    done = Rendered()
    events = _Events(files, reading)
    pair = batch.kind == "pair"
    lines: list[tuple[Any, ...]] = []
    prompts: list[int] = []
    names: list[int] = []
    name = f"{batch.kind}-{batch.number:06}"
    encode = msgspec.json.Encoder().encode
    begin = 0
    with (folder / f"{name}.jsonl").open("wb") as file:
        for values in batch.values:
            row = dict(zip(batch.columns, values, strict=True))
            prompt, text = events.at(row["chosen_place" if pair else "answer_place"])
            texts = [text]
            if pair:
                texts.append(events.at(row["rejected_place"])[1])
            if row["first_of_prompt"]:
                shared = _names(row["prompt"], prompt, settings)
                names += shared
                prompts += [row["prompt"]] * len(shared)
            if settings.pii != "off":
                prompt, texts, found = _scrubbed(prompt, texts)
                done.scrubbed += found
                done.rows_scrubbed += bool(found)
            if pair and texts[0] == texts[1]:
                done.equal += 1
                continue
            record = _pair(row, prompt, texts, settings) if pair else _unpaired(row, prompt, texts[0], settings)
            line = encode(record).removesuffix(b"}")
            file.write(line)
            label = True if pair else row["label"]
            lines.append((row["row"], row["prompt"], label, batch.kind, batch.number, begin, len(line)))
            begin += len(line)
    events.close()
    done.rows = len(lines)
    write_rows(lines, folder / f"{name}.lines.parquet", LINES)
    write_columns((prompts, names), folder / f"{name}.names.parquet", NAMES)
    return done


LINES = {"row": "uint64", "prompt": "int64", "label": "bool_", "kind": "string", "batch": "int32", "start": "int64",
          "size": "int32"}  # fmt: skip
NAMES = {"prompt": "int64", "name": "int64"}


class _Events:
    """Events at places of files, read again."""

    def __init__(self, files: Sequence[Path], reading: Reading) -> None:
        self._files = files
        self._reading = reading
        self._open: dict[int, Any] = {}
        self._decode = msgspec.json.Decoder().decode

    def at(self, place: Any) -> tuple[tuple[Message, ...], str]:
        """Return the prompt of the event at a place, and the text of the answer there."""
        number, at, size, answer = place.values() if isinstance(place, dict) else place
        if number not in self._open:
            self._open[number] = self._files[number].open("rb")
        file = self._open[number]
        file.seek(at)
        prompt, answers = read_texts(self._record(file.read(size)), self._reading)
        return prompt, answers[answer].text

    def _record(self, raw: bytes) -> Any:
        """Return a line's value; what this faster reader refuses, half a character in a comment, was read before."""
        try:
            return self._decode(raw)
        except msgspec.DecodeError:
            return parse(raw, Strict())

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def _names(own: int, prompt: Sequence[Message], settings: Settings) -> tuple[int, ...]:
    """Return the names of what a prompt may not be parted from: its like, and the earlier turns of its conversation."""
    begun = [
        prompt_key(prompt[: index + 1], ignore_system=settings.ignore_system)
        for index, turn in enumerate(prompt[:-1])
        if turn.role == "user"
    ]
    said = " ".join(turn.content for turn in prompt if turn.role != "system")
    return (own, *begun, *bands(said))


def _scrubbed(prompt: tuple[Message, ...], texts: list[str]) -> tuple[tuple[Message, ...], list[str], Counter[str]]:
    given = [*(turn.content for turn in prompt), *texts]
    clean, found = scrub(given)
    if not found:
        return prompt, texts, found
    turns = tuple(Message(turn.role, text) for turn, text in zip(prompt, clean, strict=False))
    return turns, clean[len(prompt) :], found


def _turns(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _pair(row: dict[str, Any], prompt: Sequence[Message], texts: Sequence[str], settings: Settings) -> dict[str, Any]:
    sure = row["p"]
    own = settings.policy_model
    record: dict[str, Any] = {
        "prompt": _turns(prompt),
        "chosen": _answer(texts[0]),
        "rejected": _answer(texts[1]),
    }
    if settings.margins:
        record["margin"] = round(confidence.margin(sure), 6)
    return record | {
        "fb_row_id": f"{row['row']:016x}",
        "fb_source": row["source"],
        "fb_confidence": round(sure, 6),
        "fb_weight": round(confidence.weight(sure), 6),
        "fb_up_c": row["up_c"],
        "fb_down_c": row["down_c"],
        "fb_up_r": row["up_r"],
        "fb_down_r": row["down_r"],
        "fb_model_c": row["chosen_model"] or "",
        "fb_model_r": row["rejected_model"] or "",
        "fb_on_policy": own is not None and row["chosen_model"] == row["rejected_model"] == own,
        **_common(row),
    }


def _unpaired(row: dict[str, Any], prompt: Sequence[Message], text: str, settings: Settings) -> dict[str, Any]:
    sure = confidence.comparisons(max(row["up"], row["down"]), min(row["up"], row["down"]))
    own = settings.policy_model
    return {
        "prompt": _turns(prompt),
        "completion": _answer(text),
        "label": row["label"],
        "fb_row_id": f"{row['row']:016x}",
        "fb_source": "thumbs",
        "fb_confidence": round(sure, 6),
        "fb_weight": round(confidence.weight(sure), 6),
        "fb_up": row["up"],
        "fb_down": row["down"],
        "fb_model": row["answer_model"] or "",
        "fb_on_policy": own is not None and row["answer_model"] == own,
        **_common(row),
    }


def _common(row: dict[str, Any]) -> dict[str, Any]:
    return {"fb_ts_min": _when(row["ts_min"]), "fb_ts_max": _when(row["ts_max"]), "fb_users": row["people"]}


def _when(micros: int | None) -> str:
    """Return a time in UTC; an empty text where it is not known: readers of rows take no column that is null first."""
    return "" if micros is None else f"{datetime.fromtimestamp(micros // 1_000_000, UTC):%Y-%m-%dT%H:%M:%SZ}"
