"""The files of a log: whose each is, and all of them as canonical events on lines that can be read from any place.

Canonical JSON lines are read where they lie. All else is first written so into a spool, each event with the address
that it came from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

from align_pipeline.data import address
from align_pipeline.data.feedback.adapter import SAYS_NOTHING, Adapter, cause, whole
from align_pipeline.data.feedback.adapters import ADAPTERS
from align_pipeline.data.feedback.adapters.events import of_cells
from align_pipeline.data.feedback.lineage import FILES
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.fields import kind, list_of, show
from align_pipeline.data.gate import Gate, Reject
from align_pipeline.data.sources import READABLE, Bad, Record, open_source, rows_suffix
from align_pipeline.pipeline.errors import ConfigError, InputError

FIRST_ROWS = 50
"""Records that are looked at to tell whose log a file is."""
_NOTHING_TELLS = "no record tells another"
LOGS = tuple(suffix for suffix in READABLE if suffix != ".txt")
"""How the files of logs end; plain text is none."""
_SUFFIXES = f"logs end in {', '.join(LOGS)}, also .gz or .zst"
_LINES = (".jsonl", ".ndjson")
_OWN = frozenset((*(f"{name}.jsonl" for name in FILES), "rejects.jsonl", "report.json"))
"""What a conversion writes and what could be taken for a log."""


@dataclass(frozen=True)
class Log:
    """A file, and what reads it."""

    path: Path
    name: str
    adapter: Adapter
    why: str
    """How it is known whose log this is."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        cells = self.adapter.name == "events" and rows_suffix(self.path) in (".csv", ".tsv")
        for line, record in _records(self.path, self.name):
            try:
                event = of_cells(record) if cells and type(record) is dict else record
            except Bad as bad:
                event = bad
            yield f"{self.name}:{address.shown(line)}", event

    @property
    def cut_at_end(self) -> bool:
        """Whether the last line has no line feed, as one that somebody is still writing."""
        if self.path.suffix.lower() not in _LINES:
            return False
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - 1))
            return file.read(1) not in (b"", b"\n")


def find_logs(
    paths: Sequence[tuple[Path, str]], settings: Settings, say: Callable[[str], None] = lambda line: None
) -> list[Log]:
    """Return the files of paths and folders, each with the adapter that reads it; nothing is guessed.

    `say` is told which files of a folder are left out because they are nobody's log.
    Raises InputError for what cannot be read, ConfigError for a file of which nobody can say whose log it is.
    """
    logs: list[Log] = []
    problems: list[str] = []
    for path, name in paths:
        found: list[Log] = []
        strange: list[str] = []
        for file, called in _files(path, name):
            try:
                found.append(_log(file, called, settings, inside=path.is_dir()))
            except _Unknown as error:
                strange += error.problems
            except ConfigError as error:
                problems += error.problems
        if any(log.why != _NOTHING_TELLS for log in found):
            for problem in strange:
                say(f"{problem.partition(';')[0]}; left out")
        else:
            problems += strange
        logs += found
    if problems:
        raise ConfigError(problems)
    return logs


class _Unknown(ConfigError):
    """A file that no adapter knows."""


def _files(path: Path, name: str) -> list[tuple[Path, str]]:
    if name == "-" and not path.exists():
        raise ConfigError(["-: standard input is not read; save it (... > events.jsonl), and give that file"])
    if not path.is_dir():
        if rows_suffix(path) == ".txt" and path.exists():
            raise ConfigError([f"{name}: plain text is no log; {_SUFFIXES}"])
        return [(path, name)]
    inside = [one for one in sorted(path.rglob("*")) if one.is_file() and rows_suffix(one) in LOGS]
    seen = [one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    folders = {folder for one in seen for folder in one.parents if folder.is_relative_to(path)}
    stores = {folder for folder in folders if _is_store(folder)}
    seen = [one for one in seen if stores.isdisjoint(one.parents)]
    own = {folder for folder in {one.parent for one in seen} if _is_ours(folder)}
    logs = [one for one in seen if one.parent not in own or one.name not in _OWN]
    if own and not logs:
        raise InputError(f"{name}: holds what align feedback wrote, and no logs; give the folder of the logs")
    if not logs:
        raise InputError(f"{name}: a folder without logs; {_SUFFIXES}")
    return [(one, f"{name.rstrip('/')}/{one.relative_to(path)}") for one in logs]


def _is_store(folder: Path) -> bool:
    """Tell a store of ours, or its folder of whose words rows rest on: what lies there is no log."""
    return all((folder / name).is_dir() for name in ("store", "locks")) or (
        folder.name == "private" and (folder / "salt").is_file()
    )


def _is_ours(folder: Path) -> bool:
    """Tell whether a conversion wrote its rows into a folder."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return type(report) is dict and {"schema", "dataset"} <= report.keys()


def _log(path: Path, name: str, settings: Settings, *, inside: bool) -> Log:
    if settings.columns:
        from align_pipeline.data.feedback.adapters.table import table

        adapter = table(settings.columns, settings.rating_scale, settings.labels)
        return Log(path, name, adapter, "columns are given")
    if settings.format:
        return Log(path, name, ADAPTERS[settings.format], "format is given")
    looked = [record for _, record in islice(_records(path, name), FIRST_ROWS)]
    first: list[Record] = [record for record in looked if type(record) is dict]
    remedy = f"name it (--format {', '.join(ADAPTERS)}), or map its columns (--column prompt=NAME --column ...)"
    if not first:
        if looked and inside and rows_suffix(path) == ".json":  # a setting, or what a tool wrote
            raise _Unknown([f"{name}: no log that is known (no array of records); {remedy}"])
        return Log(path, name, ADAPTERS["events"], _NOTHING_TELLS)  # each is counted, or it is empty
    counts = {one.name: sum(map(one.recognise, first)) for one in ADAPTERS.values()}
    found = [one for one in ADAPTERS if counts[one] * 2 > len(first)]
    found = found or [one for one in ADAPTERS if counts[one]]
    if len(found) == 1 and counts[found[0]] * 2 > len(first):
        return Log(path, name, ADAPTERS[found[0]], f"records have {ADAPTERS[found[0]].keys}")
    has = f"records have {whole(list_of(first[0]))}"
    if len(found) > 1:
        rule = f"say which (--format {found[0]}), or give each kind a file"
        raise ConfigError([f"{name}: can be read as {' and '.join(found)} ({has}); {rule}"])
    raise _Unknown([f"{name}: no log that is known ({has}); {remedy}"])


def _records(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    plain = _plain if rows_suffix(path) == ".parquet" else lambda record: record
    try:
        for line, record in open_source(path, name, "text"):
            yield line, plain(record)
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{name}: {reason}; give the path of a log") from error


def _plain(value: Any) -> Any:
    """Return a value of Parquet as JSON has it: times and names as texts, decimals as numbers; all else as it is."""
    if type(value) is dict:
        return {key: _plain(one) for key, one in value.items()}
    if type(value) is list:
        return [_plain(one) for one in value]
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value) if isinstance(value, UUID) else value


# Lines of canonical events.


@dataclass(frozen=True)
class Lines:
    """A file of canonical events, one on each line."""

    path: Path
    name: str
    product: str
    """Whose log it is: ids are one where they are of one product."""
    spooled: bool
    """Each event carries its own address."""


def canonical_lines(
    logs: Sequence[Log], folder: Path, gate: Gate, silent: Counter[str], step: Callable[[str, int, int], None]
) -> list[Lines]:
    """Return the logs as canonical lines; what an adapter cannot bring into them goes to the gate, and what says
    nothing is counted in `silent`; so are, as `cut_at_end`, broken last lines that somebody was still writing, which
    go to the gate too."""
    found = [Lines(log.path, log.name, log.adapter.name, False) for log in logs if _in_place(log)]
    groups: dict[str, list[Log]] = {}
    for log in logs:
        if not _in_place(log):
            groups.setdefault(log.adapter.name, []).append(log)
    for name, group in groups.items():
        path = folder / f"spool-{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, (where, event) in enumerate(_events(group, silent)):
                if number % 50_000 == 49_999:
                    step(f"events of {name} read", number + 1, 0)
                origin, _, line = where.rpartition(":")
                try:
                    if isinstance(event, Bad):
                        raise event
                    file.write(_line({**event, "origin": {"file": origin, "line": line}}))
                except Bad as bad:
                    gate.reject(Reject(where, cause(bad), whole(bad.problem)))
        found.append(Lines(path, name, name, True))
    return found


def _events(group: Sequence[Log], silent: Counter[str]) -> Iterator[tuple[str, Record | Bad]]:
    """Yield what the adapter of some logs makes of them; what says nothing is counted only."""
    broken: dict[str, str] = {}
    for where, event in group[0].adapter.convert(_Rows(group)):
        if isinstance(event, Bad) and event.cause in SAYS_NOTHING:
            silent[event.cause] += 1
            continue
        if isinstance(event, Bad) and cause(event) == "bad_json":
            name, _, place = where.rpartition(":")
            broken[name] = place
        yield where, event
    for log in group:
        if log.name in broken and log.cut_at_end and broken[log.name] == str(_line_feeds(log.path) + 1):
            silent["cut_at_end"] += 1


def _line_feeds(path: Path) -> int:
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))


def _line(event: Record) -> str:
    """Return an event as a line; raise Bad for a field whose value no JSON holds."""
    try:
        return json.dumps(event) + "\n"
    except (TypeError, ValueError, RecursionError):
        key = next(key for key, value in event.items() if not _can_be_written(value))
        rule = "an event holds text, numbers, lists and objects; write it so, or leave it out"
        raise Bad(f"{key}: {kind(event[key])} ({show(event[key])}), {rule}", "wrong_type") from None


def _can_be_written(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _in_place(log: Log) -> bool:
    return log.adapter.name == "events" and log.path.suffix.lower() in _LINES


@dataclass(frozen=True)
class _Rows:
    """The records of several files, as often as they are asked for."""

    logs: Sequence[Log]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for log in self.logs:
            yield from log
