"""Anyone's table: its columns are named by a mapping, from our names to theirs.

prompt and response (with label or original_response), or prompt, chosen and rejected, must be mapped; what else is here
may be. A column may lie inside others: `data.prompt`, `responses.0`.

prompt             a text, or messages; as JSON where the table holds text only. Where no response is mapped, the
                   last turn of the prompt is the response
response           the answer, with label the one that was rated
label              a rating: on the scale, or one of the words that `labels` names
chosen, rejected   a comparison, chosen won
original_response  an edit: response is what was made of it
system             a system turn before the prompt
model              of the response; model_chosen and model_rejected of the pair
user_id, ts, conversation_id, event_id, consent

Scale: the given one, or the one that the ratings of the first 10,000 rows are on; where they leave it open, nothing is
read.
Columns that are not mapped are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

from align_pipeline.data.feedback.adapter import Adapter, Events, Rows, not_object
from align_pipeline.data.feedback.adapters.common import (
    compact,
    objects,
    parsed,
    preferred,
    system,
    turns,
    when,
    whole_number,
)
from align_pipeline.data.feedback.events import canonical
from align_pipeline.data.feedback.scale import Scale, find_scale, label
from align_pipeline.data.fields import list_of, show
from align_pipeline.data.sources import Bad, Record
from align_pipeline.pipeline.errors import ConfigError, did_you_mean

NAMES = (
    "prompt", "response", "label", "chosen", "rejected", "original_response", "system", "user_id", "ts",
    "conversation_id", "event_id", "model", "model_chosen", "model_rejected", "consent",
)  # fmt: skip
LOOKED_AT = 10_000
"""How many rows tell the scale and the columns."""
_MISSING = object()


def table(columns: Mapping[str, str], scale: Scale | None = None, labels: Mapping[str, int] | None = None) -> Adapter:
    """Return the adapter of a table; raise ConfigError for a mapping that says no event.

    `labels` says what words mean that are the table's own: 1, -1 or 0.
    """
    problems = [*_problems(columns), *_label_problems(labels or {})]
    if problems:
        raise ConfigError(problems)

    def convert(rows: Rows) -> Events:
        return _convert(rows, columns, scale, labels or {})

    def recognise(record: Record) -> bool:
        return all(_found(record, column) is not _MISSING for column in columns.values())

    return Adapter("table", recognise, ", ".join(columns.values()), convert)


def _problems(columns: Mapping[str, str]) -> list[str]:
    problems = [f"columns.{name}: no such field{_near(name, NAMES)}" for name in columns if name not in NAMES]
    given = columns.keys()
    kinds = {"label": "a rating", "chosen": "a comparison", "original_response": "an edit"}
    said = [name for name in kinds if name in given]
    if "prompt" not in given:
        problems.append("columns.prompt: missing, an answer needs what it answers; map it")
    if len(said) != 1:
        what = f"{' and '.join(said)} are mapped" if said else "nothing says what was thought of the answers"
        one = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        problems.append(f"columns: {what}; map one of {one}")
    if ("chosen" in given) != ("rejected" in given):
        problems.append("columns: a comparison needs chosen and rejected; map both")
    if "original_response" in given and "response" not in given:
        problems.append("columns.response: missing, an edit needs what was made of original_response; map it")
    return problems


def _label_problems(labels: Mapping[str, int]) -> list[str]:
    return [
        f"labels.{word}: {show(value)}, must be 1, -1 or 0"
        for word, value in labels.items()
        if type(value) is not int or value not in (1, -1, 0)
    ]


def _near(name: str, names: Any) -> str:
    return did_you_mean(name, names) or f"; choose {', '.join(names)}"


def _convert(rows: Rows, columns: Mapping[str, str], scale: Scale | None, labels: Mapping[str, int]) -> Events:
    seen, values = _look(rows, columns, labels)
    if scale is None and "label" in columns:
        try:
            scale, _ = find_scale(values)
        except ValueError as error:
            raise ConfigError([f"{columns['label']}: {error}"]) from None
    for where, record in rows:
        if type(record) is not dict:
            yield where, not_object(record)
            continue
        try:
            yield where, _event(_row(record, columns, seen), columns, scale, labels)
        except Bad as bad:
            yield where, bad


def _look(rows: Rows, columns: Mapping[str, str], labels: Mapping[str, int]) -> tuple[frozenset[str], Counter[Any]]:
    """Return the mapped columns that the first rows have, and their ratings that `labels` does not name."""
    seen: set[str] = set()
    values: Counter[Any] = Counter()
    for _, record in islice(objects(rows), LOOKED_AT):
        for name, column in columns.items():
            value = _found(record, column)
            if value is not _MISSING:
                seen.add(column)
                if name == "label" and type(value) in (str, int, float) and _word(value) not in labels:
                    values[value] += 1
    return frozenset(seen), values


def _found(record: Record, column: str) -> Any:
    """Return what stands in a column, which may lie inside others."""
    if column in record:
        return record[column]
    head, dot, rest = column, "", ""
    while True:
        head, dot, tail = head.rpartition(".")
        if not dot:
            return _MISSING
        rest = f"{tail}.{rest}" if rest else tail
        if head in record:
            inside = record[head]
            if type(inside) is list:
                inside = {str(index): one for index, one in enumerate(inside)}
            return _found(inside, rest) if type(inside) is dict else _MISSING


def _row(record: Record, columns: Mapping[str, str], seen: frozenset[str]) -> Record:
    """Return a row under our names; a column that only some rows have is empty in the others."""
    row = {}
    for name, column in columns.items():
        value = _found(record, column)
        if value is _MISSING:
            if column not in seen:
                near = did_you_mean(column, record) or f"; it has {list_of(record)}"
                raise Bad(f"{column}: no such column, {name} is mapped to it{near}", "missing_field")
            value = None
        row[name] = value
    return row


def _event(row: Record, columns: Mapping[str, str], scale: Scale | None, labels: Mapping[str, int]) -> Record:
    prompt, response = _messages(row["prompt"]), _answer(row.get("response"))
    if "response" not in row and "chosen" not in row:
        if type(prompt) is not list or prompt[-1]["role"] != "assistant":
            rule = "must be messages that end with the answer, as no response is mapped"
            raise Bad(f"{columns['prompt']}: {show(row['prompt'])}, {rule}; map it", "missing_response")
        prompt, response = prompt[:-1], prompt[-1]["content"]
    told = system(row.get("system"))
    if told:
        prompt = [*told, *([{"role": "user", "content": prompt}] if type(prompt) is not list else prompt)]
    about = {name: whole_number(row.get(name)) for name in ("user_id", "conversation_id", "event_id")}
    about |= {"prompt": prompt, "ts": when(row.get("ts")), "consent": _consent(row.get("consent"))}
    if "chosen" in row:
        best, worst = (
            canonical({"response": _answer(row[side]), "model": row.get(f"model_{side}")})
            for side in ("chosen", "rejected")
        )
        return canonical({**about, "event_type": "comparison", **preferred(best, worst)})
    about |= {"response": response, "model": row.get("model")}
    if "original_response" in row:
        original = _answer(row["original_response"])
        return canonical({**about, "event_type": "edit", "original_response": original})
    return canonical({**about, "event_type": "rating", "label": _label(row, columns["label"], scale, labels)})


def _label(row: Record, column: str, scale: Scale | None, labels: Mapping[str, int]) -> int:
    value = row["label"]
    if value is None:
        raise Bad(f"{column}: missing, a rating needs it; fill it in, or drop the row", "unknown_rating")
    if _word(value) in labels:
        return labels[_word(value)]
    try:
        return label(value, scale)
    except Bad as bad:
        raise Bad(f"{column}: {bad.problem.removeprefix('label: ')}", bad.cause) from None


def _word(value: Any) -> str:
    """Return a label as `labels` names it: texts as they are, others as JSON writes them."""
    return value if type(value) is str else compact(value) if type(value) in (bool, int, float) else ""


def _messages(value: Any) -> Any:
    """Return messages that a table holds as a list or as JSON; a text stays what it is."""
    return turns(parsed(value)) or value


def _answer(value: Any) -> Any:
    """Return an answer that a table may hold as one message, or as JSON of one."""
    given = parsed(value)
    found = turns([given] if type(given) is dict else given)
    return found[0]["content"] if found is not None and len(found) == 1 else value


def _consent(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.strip().lower(), value) if type(value) is str else value
