"""The files of a log: whose each is, and all of them as canonical events on lines that can be read from any place.

Canonical JSON lines are read where they lie. All else is first written so into a spool, each event with the address
that it came from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from align_pipeline.data.address import shown
from align_pipeline.data.feedback.adapter import SAYS_NOTHING, Adapter
from align_pipeline.data.feedback.adapters import ADAPTERS
from align_pipeline.data.feedback.settings import Settings
from align_pipeline.data.fields import list_of
from align_pipeline.data.gate import Gate, Reject
from align_pipeline.data.sources import READABLE, Bad, open_source, rows_suffix
from align_pipeline.pipeline.errors import ConfigError, InputError

FIRST_ROWS = 50
"""Records that are looked at to tell whose log a file is."""


@dataclass(frozen=True)
class Log:
    """A file, and what reads it."""

    path: Path
    name: str
    adapter: Adapter
    why: str
    """How it is known whose log this is."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for line, record in _records(self.path, self.name):
            yield f"{self.name}:{shown(line)}", record


def find_logs(paths: Sequence[tuple[Path, str]], settings: Settings) -> list[Log]:
    """Return the files of paths and folders, each with the adapter that reads it; nothing is guessed.

    Raises InputError for what cannot be read, ConfigError for a file of which nobody can say whose log it is.
    """
    files = [one for path, name in paths for one in _files(path, name)]
    logs: list[Log] = []
    problems: list[str] = []
    for path, name in files:
        try:
            logs.append(_log(path, name, files, settings))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return logs


def _files(path: Path, name: str) -> list[tuple[Path, str]]:
    if not path.is_dir():
        return [(path, name)]
    inside = [one for one in sorted(path.rglob("*")) if one.is_file() and rows_suffix(one) in READABLE]
    if not inside:
        raise InputError(f"{name}: a folder without logs; they end in {', '.join(READABLE)}, also .gz or .zst")
    return [(one, f"{name.rstrip('/')}/{one.relative_to(path)}") for one in inside]


def _log(path: Path, name: str, files: Sequence[tuple[Path, str]], settings: Settings) -> Log:
    if settings.columns:
        from align_pipeline.data.feedback.adapters.table import table

        adapter = table(settings.columns, settings.rating_scale, settings.labels)
        return Log(path, name, adapter, "columns are given")
    if settings.format:
        return Log(path, name, ADAPTERS[settings.format], "format is given")
    first = [record for _, record in islice(_records(path, name), FIRST_ROWS) if type(record) is dict]
    if not first:
        return Log(path, name, ADAPTERS["events"], "no record tells another")  # each is counted, or it is empty
    found = [one for one in ADAPTERS.values() if sum(map(one.recognise, first)) * 2 > len(first)]
    if len(found) == 1:
        return Log(path, name, found[0], f"records have {found[0].keys}")
    has = f"records have {list_of(first[0])}"
    if found:
        names = " and ".join(one.name for one in found)
        raise ConfigError([f"{name}: can be read as {names} ({has}); say which: --format {found[0].name}"])
    remedy = f"name it (--format {', '.join(ADAPTERS)}), or map its columns (--column prompt=NAME --column ...)"
    raise ConfigError([f"{name}: no log that is known ({has}); {remedy}"])


def _records(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from open_source(path, name, "text")
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{name}: {reason}; give the path of a log") from error


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
    nothing is counted in `silent`."""
    found = [Lines(log.path, log.name, log.adapter.name, False) for log in logs if _in_place(log)]
    groups: dict[str, list[Log]] = {}
    for log in logs:
        if not _in_place(log):
            groups.setdefault(log.adapter.name, []).append(log)
    for name, group in groups.items():
        path = folder / f"spool-{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, (where, event) in enumerate(group[0].adapter.convert(_Rows(group))):
                if number % 50_000 == 49_999:
                    step(f"events of {name} read", number + 1, 0)
                if isinstance(event, Bad) and event.cause in SAYS_NOTHING:
                    silent[event.cause] += 1
                elif isinstance(event, Bad):
                    gate.reject(Reject(where, event.cause, event.problem))
                else:
                    origin, _, line = where.rpartition(":")
                    file.write(json.dumps({**event, "origin": {"file": origin, "line": line}}) + "\n")
        found.append(Lines(path, name, name, True))
    return found


def _in_place(log: Log) -> bool:
    return log.adapter.name == "events" and log.path.suffix.lower() in (".jsonl", ".ndjson")


@dataclass(frozen=True)
class _Rows:
    """The records of several files, as often as they are asked for."""

    logs: Sequence[Log]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for log in self.logs:
            yield from log
