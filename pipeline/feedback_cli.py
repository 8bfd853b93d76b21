"""`align feedback LOGS... -o DIR`: the thumbs of a product as rows to train on."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline.errors import ConfigError, DataError

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
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.store import disk_errors

    chosen = _settings(format, column or [], label or [], settings or [])
    if out.exists() and not out.is_dir():
        raise ConfigError([f"--out {out}: is a file; name a folder"])
    paths = [(Path(log.removeprefix("file:")).expanduser(), log.removeprefix("file:")) for log in logs]
    making = out.absolute().with_name(f".{out.name}.making")
    with disk_errors(out):
        shutil.rmtree(making, ignore_errors=True)
        (making / "out").mkdir(parents=True)
        try:
            report = convert(
                paths,
                chosen,
                making / "out",
                scratch=making / "scratch",
                private=store.absolute() / "private",
                say=lambda line: typer.echo(line, err=True),
                step=_Shown().step,
            )
            _publish(making / "out", out)
            _remember(out, store.absolute() / "private")
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


def _publish(made: Path, out: Path) -> None:
    """Move finished files into place; what an earlier conversion left there goes, nothing else does."""
    from align_pipeline.data.feedback.lineage import FILES

    out.mkdir(parents=True, exist_ok=True)
    names = {*(f"{name}.jsonl" for name in FILES), "rejects.jsonl", "report.json", "report.md"}
    for name in sorted(names - {path.name for path in made.iterdir()}):
        (out / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir()):
        path.replace(out / path.name)


def _remember(out: Path, private: Path) -> None:
    """Write down where rows lie, so that a user can be forgotten there too."""
    path = private / "outputs"
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if str(out.absolute()) not in known:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{out.absolute()}\n")


def _next(report: dict[str, Any], out: Path) -> list[str]:
    """Return the lines of YAML that train on the rows."""
    found, rows, kto = [], report["rows"], report["kto"]
    for name, stages in (("pairs", "dpo, reward"), ("unpaired", "kto")):
        if rows.get(f"{name}.train"):
            evaluation = f", evaluation: file:{out}/{name}.test.jsonl" if rows.get(f"{name}.test") else ""
            weight = f", {kto['set']}: {kto['weight']}" if name == "unpaired" and kto["set"] else ""
            found.append(f"  {stages}: {{data: file:{out}/{name}.train.jsonl{evaluation}{weight}}}")
    return ["train on them with", *found] if found else []


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
