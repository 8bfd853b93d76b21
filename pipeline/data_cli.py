"""`align data check|show`: look at rows as the stages read them, before anything is trained."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from align_pipeline.pipeline.errors import AlignError, ConfigError, DataError, InputError, near_or_all

if TYPE_CHECKING:
    from align_pipeline.data.chat import Encoder
    from align_pipeline.data.gate import Gate
    from align_pipeline.data.load import Scan
    from align_pipeline.data.report import Part
    from align_pipeline.data.rows import Task
    from align_pipeline.pipeline.stage import Resolved

app = typer.Typer(help="Look at rows before anything is trained on them.", no_args_is_help=True)

TASKS = ("sft", "preference", "unpaired", "prompt", "text")

Files = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Files, folders, hub:ORG/NAME or keys of artifacts.")
]
One = Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder, hub:ORG/NAME or the key of an artifact.")]
For = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help=f"{', '.join(TASKS)}; without it the rows tell.")
]
Format = Annotated[str | None, typer.Option("--format", help="The rows' format, where they do not tell it themselves.")]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="A name in the file for a name that is expected."),
]
WeightColumn = Annotated[
    str | None, typer.Option("--weight-column", metavar="NAME", help="The column that weighs pairs, as in `dpo`.")
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="A folder, hub:ORG/NAME or an artifact's key: count its tokens."),
]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Tokens per row, as in a stage.")]
StoreFolder = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds artifacts.")]


@app.command()
def check(
    files: Files,
    task: For = None,
    format: Format = None,
    column: Column = None,
    weight_column: WeightColumn = None,
    model: ModelName = None,
    max_length: MaxLength = 1024,
    store: StoreFolder = Path("runs"),
) -> None:
    """Check every row as a training stage would, and report what is wrong by cause, each with its address.

    Exit codes: 0 every row can be used, 2 the command is wrong, 3 some rows or files cannot be used.
    """
    from align_pipeline.data.gate import Gate
    from align_pipeline.data.report import lines, summary

    tokenizer, vocabulary = _tokenizer(model, store)
    bad = False
    for file in files:
        gate = Gate()
        try:
            scan = _scan(file, task, format, column, weight_column, store)
            encoder = _encoder(scan, tokenizer, max_length, vocabulary) if tokenizer else None
            part, problem = _measured(scan, gate, encoder)
        except ConfigError:
            raise
        except AlignError as error:  # the other files are worth a look all the same
            bad = True
            named = isinstance(error, DataError | InputError)
            typer.echo(f"{error}" if named else f"{file}: {error}", err=True)
            continue
        for line in lines(summary(scan.task, [part], "tokens" if tokenizer else "characters")):
            typer.echo(line)
        if task is None and scan.task == "prompt":
            typer.echo("  as prompts, which wait for an answer; --task names another use")
        if problem:
            typer.echo(f"  {problem}")
        if not gate.rows and not gate.bad:
            typer.echo("  no rows, at least one is needed; check how the file was written")
        bad = bad or gate.bad > 0 or not gate.rows or problem is not None
    if bad:
        raise typer.Exit(3)


@app.command()
def show(
    file: One,
    model: Annotated[str, typer.Option("--model", metavar="M", help="A folder, hub:ORG/NAME or an artifact's key.")],
    rows: Annotated[int, typer.Option("-n", min=0, help="How many rows to show.")] = 3,
    task: For = None,
    format: Format = None,
    column: Column = None,
    weight_column: WeightColumn = None,
    max_length: MaxLength = 1024,
    store: StoreFolder = Path("runs"),
) -> None:
    """Show rows as a model sees them, what is learnt marked, and how long all rows are.

    What is learnt is green in a terminal and stands between the brackets of mathematics in a pipe.
    """
    from align_pipeline.data.gate import Gate
    from align_pipeline.data.load import no_rows
    from align_pipeline.data.show import brackets, histogram, shown
    from align_pipeline.data.sources import Bad

    tokenizer, vocabulary = _tokenizer(model, store)
    scan = _scan(file, task, format, column, weight_column, store)
    encoder = _encoder(scan, tokenizer, max_length, vocabulary)
    mark = (lambda text: typer.style(text, fg="green")) if sys.stdout.isatty() else brackets
    left = rows

    def looked_at(found: Iterator[Any]) -> Iterator[Any]:
        nonlocal left
        for row in found:
            if left:
                left -= 1
                typer.echo(f"{row.where}  read as {scan.format.name if scan.format else scan.task}")
                try:
                    for line in shown(encoder(row)[0], tokenizer, mark):
                        typer.echo(line)
                except Bad as bad:
                    typer.echo(f"cannot be used: {bad.problem}")
                typer.echo()
            yield row

    gate = Gate()
    part, _ = _measured(scan, gate, encoder, looked_at)
    if not gate.rows and not gate.bad:
        raise DataError([no_rows(scan.name)])
    cut = f"cut at {encoder.max_length:,}" if encoder.max_length else "none is cut"
    typer.echo(f"tokens of {len(part.lengths):,} row{'s' * (len(part.lengths) != 1)}, {cut}:")
    for line in histogram(part.lengths):
        typer.echo(line)
    if gate.bad:
        typer.echo(f"{gate.bad:,} row{'s' * (gate.bad != 1)} cannot be used; `align data check` tells which")
        raise typer.Exit(3)


def _encoder(scan: Scan, tokenizer: Any, max_length: int, vocabulary: int | None) -> Encoder:
    """Return what encodes rows as a stage does: `pretrain` cuts no document, it makes several rows of a long one."""
    from align_pipeline.data.chat import Encoder

    cut_at = None if scan.task in ("text", "prompt") else max_length
    return Encoder(scan.task, tokenizer, max_length=cut_at, vocabulary=vocabulary)


def _measured(scan: Scan, gate: Gate, encoder: Encoder | None, through: Any = iter) -> tuple[Part, str | None]:
    """Read all rows through the gate; return their columns, in tokens where there is an encoder, and what is wrong
    with all of them together."""
    from align_pipeline.data.chat import NO_MARGIN
    from align_pipeline.data.report import Part

    part = Part(scan.name)
    margins: dict[bool, str] = {}

    def looked_at(rows: Iterator[Any]) -> Iterator[Any]:
        for row in rows:
            if hasattr(row, "margin"):
                margins.setdefault(row.margin is not None, row.where)
            yield row

    rows = looked_at(through(gate.take(scan)))
    if encoder is None:
        for row in rows:
            part.add(row)
    else:
        from align_pipeline.stages.reading import MARKS, encoded

        part.cut = array("q")
        columns: dict[str, Any] = {mark: getattr(part, ours) for mark, ours in MARKS.items() if ours}
        for batch, rejects in encoded(rows, encoder, scan.task):
            for name, values in columns.items():
                values.extend(batch.column(name).to_pylist())
            gate.take_back(rejects)
    part.format = scan.format.name if scan.format else ""
    part.rejected(gate)
    return part, f"{margins[False]}: {NO_MARGIN}" if len(margins) == 2 else None


def _scan(
    file: str, task: str | None, format: str | None, column: list[str] | None, weight: str | None, store: Path
) -> Scan:
    from align_pipeline.data.formats import FORMATS, FormatName
    from align_pipeline.data.load import find_task, scan, scan_hub, twice_mapped

    if task is not None and task not in TASKS:
        raise ConfigError([f"--task {task}: no such task{near_or_all(task, TASKS)}"])
    formats = [one for name in TASKS if task in (None, name) for one in FORMATS[name]]  # type: ignore[index]
    if format is not None and format not in (names := {one.name for one in formats}):
        of_task = f"format of task {task}" if task and format in get_args(FormatName) else "such format"
        raise ConfigError([f"--format {format}: no {of_task}{near_or_all(format, sorted(names))}"])
    known = sorted({field for one in formats for field in one.fields})
    columns: dict[str, str] = {}
    for pair in column or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError([f"--column {pair}: must be OURS=THEIRS, as in --column prompt=question"])
        if ours in columns:
            raise ConfigError([f"--column {pair}: {ours} is {columns[ours]} already; name one column for it"])
        if ours not in known:
            of_task = f" of rows for {task}" if task else ""
            raise ConfigError([f"--column {pair}: {ours} is no field{of_task}{near_or_all(ours, known)}"])
        columns[ours] = theirs
    if problem := twice_mapped(columns):
        raise ConfigError([f"--column: {problem}"])
    if weight is not None and task not in (None, "preference"):
        raise ConfigError([f"--weight-column {weight}: weighs pairs, not rows of task {task}; remove one"])
    source = _find(file, "dataset", store)

    def of(wanted: Task) -> Scan:
        how: dict[str, Any] = {"format": format, "columns": columns}
        if wanted == "preference":
            how["weight"] = weight
        if source.path is None and source.hub is not None:
            return scan_hub(source.hub, source.revision, wanted, **how)
        return scan(Path(str(source.path)), wanted, file.removeprefix("file:"), **how)

    return of(task) if task else find_task(of)  # type: ignore[arg-type]


def _tokenizer(model: str | None, store: Path) -> tuple[Any, int | None]:
    """Return a model's tokenizer, and how many ids its embedding takes."""
    if model is None:
        return None, None
    from align_pipeline.stages.models import load_tokenizer, vocabulary

    try:
        source = _find(model, "model", store)
        return load_tokenizer(source), vocabulary(source)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--model {model}: no tokenizer can be loaded from it ({first})") from error


def _find(text: str, repo_type: str, store: Path) -> Resolved:
    """Find what a word of the command line names: a path, a hub repository or an artifact."""
    from align_pipeline.pipeline.inputs import Hub, missing_file
    from align_pipeline.pipeline.stage import Resolved
    from align_pipeline.pipeline.store import Store

    if text.startswith("hub:"):
        return Hub(store / "hub.json").resolve(text, repo_type)
    path = Path(text.removeprefix("file:")).expanduser()
    if path.exists():
        return Resolved(ref=f"file:{text.removeprefix('file:')}", digest="", path=str(path.absolute()))
    try:
        artifact = Store(store).find(text)
        return artifact.resolved(text, Store(store).base_as_recorded(artifact))
    except AlignError:
        missing = missing_file(path.absolute()).removesuffix("; paths start at the folder of the pipeline file")
        raise InputError(f"{missing}; nor is it the key of an artifact in {store}") from None
