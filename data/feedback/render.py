"""Write rows: fetch the texts of the answers that were chosen, and say with each row what it rests on.

Rows are rendered in the order in which their texts lie in the logs, and put into their own order afterwards.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from align_pipeline.data.feedback import confidence
from align_pipeline.data.feedback.decide import let_go
from align_pipeline.data.feedback.events import Reading, read_answers, read_texts
from align_pipeline.data.feedback.keys import prompt_key
from align_pipeline.data.feedback.likeness import bands
from align_pipeline.data.feedback.lines import parse
from align_pipeline.data.feedback.pii import scrub
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.feedback.tables import write_columns, write_rows
from align_pipeline.data.json_text import Strict
from align_pipeline.data.rows import Message

BATCH = 2_000
"""Rows that one process renders at a time."""


class Pair(NamedTuple):
    """A pair to render: what the row says, and where the texts of its sides lie."""

    row: int
    prompt: int
    first_of_prompt: bool
    source: str
    p: float
    up_c: int
    down_c: int
    up_r: int
    down_r: int
    people: int
    ts_min: int | None
    ts_max: int | None
    chosen_model: str | None
    chosen_file: int
    chosen_start: int
    chosen_size: int
    chosen_at: int
    """Which of the event's answers it is."""
    rejected_model: str | None
    rejected_file: int
    rejected_start: int
    rejected_size: int
    rejected_at: int


class Single(NamedTuple):
    """An unpaired row to render, as a pair."""

    row: int
    prompt: int
    first_of_prompt: bool
    label: bool
    up: int
    down: int
    people: int
    ts_min: int | None
    ts_max: int | None
    answer_model: str | None
    answer_file: int
    answer_start: int
    answer_size: int
    answer_at: int


@dataclass(frozen=True)
class Batch:
    """Rows to render, as the database gives them: values of `Pair`, or of `Single`."""

    number: int
    kind: str
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
    for table, sides, row in (("pair", ("chosen", "rejected"), Pair), ("unpaired", ("answer",), Single)):
        needed = " UNION ".join(f"SELECT prompt, {side} AS answer FROM {table}" for side in sides)
        joins = " ".join(
            f"JOIN place AS p_{side} ON p_{side}.prompt = {table}.prompt AND p_{side}.answer = {table}.{side}"
            for side in sides
        )
        columns = ", ".join(
            f"p_{side}.model AS {side}_model, p_{side}.chars AS {side}_chars, "
            + ", ".join(f"p_{side}.place.{part} AS {side}_{part}" for part in ("file", "start", "size", "at"))
            for side in sides
        )
        database.execute(f"""
            CREATE OR REPLACE TABLE place AS
            WITH needed AS ({needed}), text AS (
                SELECT prompt, one AS answer, struct_pack(file, start, size, at := one_at) AS place, body,
                    one_model AS model, one_chars AS chars
                FROM statement
                UNION ALL
                SELECT prompt, two, struct_pack(file, start, size, at := two_at), body, two_model, two_chars
                FROM statement WHERE two IS NOT NULL)
            SELECT prompt, answer, arg_min(place, body) AS place, min(model) AS model, any_value(chars) AS chars
            FROM text SEMI JOIN needed USING (prompt, answer) GROUP BY ALL;
            CREATE OR REPLACE TABLE {table}_text AS SELECT {table}.*, {columns} FROM {table} {joins};
        """)
        let_go(database)
        first = sides[0]
        cursor = database.execute(f"""
            SELECT {", ".join(row._fields)} FROM (
                SELECT *, row_number() OVER (PARTITION BY prompt ORDER BY row) = 1 AS first_of_prompt
                FROM {table}_text)
            ORDER BY {first}_file, {first}_start, {first}_size, {first}_at, row
        """)
        number = 0
        while rows := cursor.fetchmany(BATCH):
            yield Batch(number, table, rows)
            number += 1


def render(batch: Batch, files: Sequence[Path], folder: Path, reading: Reading, settings: Settings) -> Rendered:
    """Write the rows of a batch, without the ends of their lines, and beside them where each lies and what its prompt
    is like."""
    done = Rendered()
    texts = _Texts(files, reading)
    lines: list[tuple[Any, ...]] = []
    names = _Names(settings.ignore_system)
    name = f"{batch.kind}-{batch.number:06}"
    encode = msgspec.json.Encoder().encode
    begin = 0
    rows: Iterator[Pair | Single] = map(Pair._make if batch.kind == "pair" else Single._make, batch.values)
    with (folder / f"{name}.jsonl").open("wb", buffering=2**20) as file:
        for row in rows:
            prompt, answers = texts.of(row)
            if row.first_of_prompt:
                names.add(row.prompt, prompt)
            if settings.pii != "off":
                prompt, answers, found = _scrubbed(prompt, answers)
                done.scrubbed += found
                done.rows_scrubbed += bool(found)
            if isinstance(row, Pair):
                if answers[0] == answers[1]:
                    done.equal += 1
                    continue
                label, record = True, _pair(row, prompt, answers, settings)
            else:
                label, record = row.label, _unpaired(row, prompt, answers[0], settings)
            line = encode(record)[:-1]
            file.write(line)
            lines.append((row.row, row.prompt, label, batch.kind, batch.number, begin, len(line)))
            begin += len(line)
    texts.close()
    done.rows = len(lines)
    write_rows(lines, folder / f"{name}.lines.parquet", LINES)
    write_columns(names.columns(), folder / f"{name}.names.parquet", NAMES)
    return done


LINES = {"row": "uint64", "prompt": "int64", "label": "bool_", "kind": "string", "batch": "int32", "start": "int64",
          "size": "int32"}  # fmt: skip
NAMES = {"prompt": "int64", "name": "int64"}


class _Texts:
    """Texts of rows, read again where they lie."""

    def __init__(self, files: Sequence[Path], reading: Reading) -> None:
        self._files = files
        self._reading = reading
        self._open: dict[int, int] = {}
        self._decode = msgspec.json.Decoder().decode

    def of(self, row: Pair | Single) -> tuple[tuple[Message, ...], list[str]]:
        """Return the prompt of a row, and its answers."""
        if isinstance(row, Single):
            event = self._event(row.answer_file, row.answer_start, row.answer_size)
            prompt, answers = read_texts(event, self._reading)
            return prompt, [answers[row.answer_at].text]
        event = self._event(row.chosen_file, row.chosen_start, row.chosen_size)
        prompt, answers = read_texts(event, self._reading)
        chosen = answers[row.chosen_at].text
        if (row.rejected_file, row.rejected_start) != (row.chosen_file, row.chosen_start):
            event = self._event(row.rejected_file, row.rejected_start, row.rejected_size)
            answers = read_answers(event, self._reading)
        return prompt, [chosen, answers[row.rejected_at].text]

    def _event(self, number: int, start: int, size: int) -> Any:
        """Return a line's value; what this faster reader refuses, half a character in a comment, was read before."""
        if number not in self._open:
            self._open[number] = os.open(self._files[number], os.O_RDONLY)
        raw = os.pread(self._open[number], size, start)
        try:
            return self._decode(raw)
        except msgspec.DecodeError:
            return parse(raw, Strict())

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)


class _Names:
    """Names of what prompts may not be parted from: their like, and the earlier turns of their conversations."""

    def __init__(self, ignore_system: bool) -> None:
        self._ignore_system = ignore_system
        self._prompts: list[int] = []
        self._names: list[int] = []
        self._waiting: list[tuple[int, str]] = []
        self._characters = 0

    def add(self, own: int, prompt: Sequence[Message]) -> None:
        """Name a prompt whose own name is given."""
        names = [own]
        for index, turn in enumerate(prompt[:-1]):
            if turn.role == "user":
                names.append(prompt_key(prompt[: index + 1], ignore_system=self._ignore_system))
        self._names += names
        self._prompts += [own] * len(names)
        said = prompt[0].content if len(prompt) == 1 else " ".join([t.content for t in prompt if t.role != "system"])
        self._waiting.append((own, said))
        self._characters += len(said)
        if self._characters > _LOOKED_AT_ONCE:
            self._look()

    def columns(self) -> tuple[list[int], list[int]]:
        """Return prompts and their names."""
        if self._waiting:
            self._look()
        return self._prompts, self._names

    def _look(self) -> None:
        """Find the like of the prompts that wait."""
        alike = bands([said for _, said in self._waiting])
        self._names += alike.ravel().tolist()
        self._prompts += [own for own, _ in self._waiting for _ in range(alike.shape[1])]
        self._waiting, self._characters = [], 0


_LOOKED_AT_ONCE = 2**17
"""Characters; each takes some 50 bytes of memory."""


def _scrubbed(prompt: tuple[Message, ...], texts: list[str]) -> tuple[tuple[Message, ...], list[str], Counter[str]]:
    given = [*(turn.content for turn in prompt), *texts]
    clean, found = scrub(given)
    if not found:
        return prompt, texts, found
    turns = tuple(Message(turn.role, text) for turn, text in zip(prompt, clean, strict=False))
    return turns, clean[len(prompt) :], found


@functools.lru_cache(100_000)
def _sure(p: float) -> dict[str, float]:
    return {"fb_confidence": round(p, 6), "fb_weight": round(confidence.weight(p), 6)}


def _answer(text: str) -> tuple[Message]:
    return (Message("assistant", text),)


def _pair(row: Pair, prompt: Sequence[Message], texts: Sequence[str], settings: Settings) -> dict[str, Any]:
    own = settings.policy_model
    return {
        "prompt": prompt,
        "chosen": _answer(texts[0]),
        "rejected": _answer(texts[1]),
        **({"margin": round(confidence.margin(row.p), 6)} if settings.margins else {}),
        "fb_row_id": f"{row.row:016x}",
        "fb_source": row.source,
        **_sure(row.p),
        "fb_up_c": row.up_c,
        "fb_down_c": row.down_c,
        "fb_up_r": row.up_r,
        "fb_down_r": row.down_r,
        "fb_model_c": row.chosen_model or "",
        "fb_model_r": row.rejected_model or "",
        "fb_on_policy": own is not None and row.chosen_model == row.rejected_model == own,
        **_common(row),
    }


def _unpaired(row: Single, prompt: Sequence[Message], text: str, settings: Settings) -> dict[str, Any]:
    own = settings.policy_model
    return {
        "prompt": prompt,
        "completion": _answer(text),
        "label": row.label,
        "fb_row_id": f"{row.row:016x}",
        "fb_source": "thumbs",
        **_sure(confidence.comparisons(max(row.up, row.down), min(row.up, row.down))),
        "fb_up": row.up,
        "fb_down": row.down,
        "fb_model": row.answer_model or "",
        "fb_on_policy": own is not None and row.answer_model == own,
        **_common(row),
    }


def _common(row: Pair | Single) -> dict[str, Any]:
    return {"fb_ts_min": _when(row.ts_min), "fb_ts_max": _when(row.ts_max), "fb_users": row.people}


def _when(micros: int | None) -> str:
    """Return a time in UTC; an empty text where it is not known: readers of rows take no column that is null first."""
    if micros is None:
        return ""
    day, second = divmod(micros // 1_000_000, 86_400)
    return f"{_date(day)}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"


@functools.lru_cache(10_000)
def _date(day: int) -> str:
    """Return the date of a day since 1970."""
    return date.fromordinal(_DAY_1970 + day).isoformat()


_DAY_1970 = date(1970, 1, 1).toordinal()
