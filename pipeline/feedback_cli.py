"""`align feedback LOGS... -o DIR`: the thumbs of a product as rows to train on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline.errors import AlignError, ConfigError, DataError, Interrupted
from align_pipeline.pipeline.files import shown

if TYPE_CHECKING:
    from align_pipeline.data.feedback.settings import Settings

SHOW_EVERY_SECONDS = 5.0


def feedback(
    logs: Annotated[list[str], typer.Argument(metavar="LOGS...", help="Logs, or folders of logs.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder that the rows are written to.")],
    format: Annotated[
        str | None, typer.Option("--format", metavar="PRODUCT", help="Whose logs they are, where they do not tell it.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="OURS=THEIRS", help="For a table of your own: its name for a name of ours."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="WORD=1|-1|0", help="With --column: what a word in the label's column means."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the stage, as in --set min_confidence=0.8."),
    ] = None,
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", help="The folder that keeps whose words each row rests on.")
    ] = Path("runs"),
) -> None:
    """Turn feedback logs into preference pairs and unpaired rows, and say what was found.

    Exit codes: 0 rows were written, 2 the command is wrong or it is not clear whose log a file is, 3 a log cannot be
    read, too many events are invalid (the rows are written all the same), or there are none to write.
    """
    from align_pipeline.data.feedback.convert import convert
    from align_pipeline.data.feedback.report import lines, problems
    from align_pipeline.pipeline.store import disk_errors

    chosen = _settings(format, column or [], label or [], settings or [])
    paths = [(Path(log.removeprefix("file:")).expanduser(), log.removeprefix("file:")) for log in logs]
    out = out.resolve()
    _may_be_written(out, [path for path, _ in paths])
    making = _making(out)
    try:
        with disk_errors(store), _interruptible():
            report = convert(
                paths,
                chosen,
                making / "out",
                scratch=making / "scratch",
                private=store.absolute() / "private",
                place=str(out),
                say=lambda line: typer.echo(line, err=True),
                step=_Shown().step,
            )
        with _writing(out):
            _publish(making, out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    for line in lines(report):
        typer.echo(line)
    for line in _next(report, out):
        typer.echo(line)
    typer.echo(f"report: {shown(out / 'report.md')}")
    if wrong := problems(report, chosen.max_invalid_share):
        raise DataError(wrong)


class _Shown:
    """Says how far the work is, now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def step(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last < SHOW_EVERY_SECONDS:
            return
        self._last = time.monotonic()
        print(f"{what}: {done:,}{f' of {total:,} ({done / total:.0%})' if total else ''}", file=sys.stderr, flush=True)


def _names() -> set[str]:
    """Return the names of the files that a conversion may write."""
    from align_pipeline.data.feedback.lineage import FILES

    return {*(f"{name}.jsonl" for name in FILES), "rejects.jsonl", "report.json", "report.md"}


def _may_be_written(out: Path, logs: Sequence[Path]) -> None:
    """Refuse to write over a log, or over files that no conversion made."""
    if out.exists() and not out.is_dir():
        raise ConfigError([f"--out {shown(out)}: is a file; name a folder"])
    there = sorted(name for name in _names() if (out / name).exists())
    for path in (out / name for name in there):
        if any(log.exists() and path.samefile(log) for log in logs):
            raise ConfigError([f"--out {shown(out)}: {path.name} in it is one of the logs; name another folder"])
    try:
        made = there and "dataset" in json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = False
    if there and not made:
        what = f"holds {there[0]}, which no conversion wrote"
        raise ConfigError([f"--out {shown(out)}: {what}; name another folder, or move it away"])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say in one line that Ctrl-C was pressed or the process was told to end; DuckDB says so in its own way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    except RuntimeError as error:
        if "interrupted" not in str(error).lower():
            raise
        raise Interrupted("interrupted; nothing was written") from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say in one line why a folder cannot be written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise AlignError(f"--out {shown(out)}: cannot be written ({why}); mend that, or name another folder") from error


def _making(out: Path) -> Path:
    """Make the folder beside `out` where rows are made, and clear away those of conversions that were killed."""
    prefix = f".{out.name}.making-"
    with _writing(out):
        for left in out.parent.glob(f"{prefix}*") if out.parent.is_dir() else ():
            if not Path(f"/proc/{left.name.removeprefix(prefix)}").exists():
                shutil.rmtree(left, ignore_errors=True)
        making = out.parent / f"{prefix}{os.getpid()}"
        (making / "out").mkdir(parents=True)
    return making


def _publish(making: Path, out: Path) -> None:
    """Put finished files into place: the folder at once where nothing else lies in it, else file by file with the
    report last; of what was there only an earlier conversion's files go."""
    made = making / "out"
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there <= _names() and not Path.cwd().is_relative_to(out) and not os.path.ismount(out):
        if out.exists():
            shutil.copymode(out, made)
            out.rename(making / "before")  # for a moment there is no folder, but never one of two conversions
        made.rename(out)
        return
    (out / "report.json").unlink(missing_ok=True)
    for name in sorted(_names() - {path.name for path in made.iterdir()}):
        (out / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == "report.json"):
        path.replace(out / path.name)


def _next(report: dict[str, Any], out: Path) -> list[str]:
    """Return the lines of YAML that train on the rows."""
    found, rows, kto = [], report["rows"], report["kto"]
    for name, stage in (("pairs", "dpo"), ("unpaired", "kto")):
        if rows.get(f"{name}.train"):
            fields = {"type": stage, "policy": "stage:sft", "data": _quoted(out / f"{name}.train.jsonl")}
            if rows.get(f"{name}.test"):
                fields["evaluation"] = _quoted(out / f"{name}.test.jsonl")
            if name == "unpaired" and kto["set"]:
                fields[kto["set"]] = kto["weight"]
            found.append(f"  {stage}: {{{', '.join(f'{key}: {value}' for key, value in fields.items())}}}")
    return ["train on them with", *found] if found else []


def _quoted(path: Path) -> str:
    """Return a file as a pipeline names it; in quotes where YAML would read the path as something else."""
    ref = f"file:{shown(path)}"
    return ref if re.fullmatch(r"[\w./:-]+", ref) else json.dumps(ref)


def _settings(format: str | None, columns: list[str], labels: list[str], given: list[str]) -> Settings:
    """Return the settings that the command line names; ConfigError holds all that is wrong with them."""
    from pydantic import TypeAdapter, ValidationError

    from align_pipeline.data.feedback.settings import Settings
    from align_pipeline.pipeline.config import rule_of, shown_value
    from align_pipeline.pipeline.errors import did_you_mean
    from align_pipeline.pipeline.yaml_file import override

    raw: dict[str, Any] = {}
    found: list[str] = []
    for text in given:
        override(raw, {}, text, found)
    if format is not None:
        raw["format"] = format
    for option, texts, name in (("--column", columns, "columns"), ("--label", labels, "labels")):
        for text in texts:
            ours, equals, theirs = text.rpartition("=") if name == "labels" else text.partition("=")
            if not (ours and equals and theirs):
                example = "prompt=question" if name == "columns" else "helpful=1"
                found.append(f"{option} {text}: must be a name, = and what it stands for, as in {option} {example}")
                continue
            value: Any = int(theirs) if name == "labels" and theirs.lstrip("+-").isdigit() else theirs
            raw.setdefault(name, {})[ours] = value
    if found:
        raise ConfigError(found)
    try:
        return TypeAdapter(Settings).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            at = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = ", ".join(Settings.model_fields)
                near = did_you_mean(at, Settings.model_fields) or f"; known: {known}"
                found.append(f"{at}: unknown setting{near}")
            elif problem["type"] == "value_error":
                found.append(f"{at}: {problem['ctx']['error']}")
            else:
                rule = rule_of(problem["type"], problem["msg"], problem.get("ctx", {}))
                found.append(f"{at}: {rule}, got {shown_value(problem['input'])}")
        raise ConfigError(found) from None
