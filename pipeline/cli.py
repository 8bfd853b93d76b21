"""The command line: run, plan, show and schema here, others in files of their own; errors become exit codes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline import (
    compare_cli,
    data_cli,
    doctor,
    export,
    feedback_cli,
    forget,
    gc,
    import_cli,
    init,
    report_bug,
    report_cli,
    verify,
)
from align_pipeline.pipeline.errors import AlignError, ConfigError, DataError, GateFailed, InputError

if TYPE_CHECKING:
    from align_pipeline.pipeline.plan import Planner
    from align_pipeline.pipeline.runner import Runner
    from align_pipeline.pipeline.store import Artifact, Store

app = typer.Typer(
    name="align",
    help="Turn a base language model into an aligned one, from a single YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(data_cli.app, name="data")
app.command()(feedback_cli.feedback)
app.command()(forget.forget)
app.command()(export.export)
app.command()(verify.verify)
app.command()(gc.gc)
app.command()(init.init)
app.command(name="import")(import_cli.import_)
app.command()(doctor.doctor)
app.command()(report_bug.report_bug)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file.", show_default=False)]
Stages = Annotated[
    list[str] | None,
    typer.Argument(metavar="[STAGE]...", help="Only these stages and what they need.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B.C=VALUE", help="Override a value of the file, as in stages.dpo.beta=0.2."),
]
Force = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run this stage anew; the old artifact is kept."),
]
StoreFolder = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")]
Update = Annotated[bool, typer.Option("--update", help="Ask the hub again for the commit of each hub: input.")]
Rehash = Annotated[bool, typer.Option("--rehash", help="Digest large files again, whatever their times say.")]


@app.command()
def run(
    file: File,
    stages: Stages = None,
    overrides: Overrides = None,
    force: Force = None,
    store: StoreFolder = Path("runs"),
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit with 4 when another run holds a stage.")] = False,
    update: Update = False,
    rehash: Rehash = False,
) -> None:
    """Run what is not up to date; what was killed goes on where it was.

    Exit codes: 0 done, 1 a stage or a gate failed, 2 the file is wrong, 3 data or an input is wrong,
    4 locked (--no-wait).
    """
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.named import known
    from align_pipeline.pipeline.progress import Progress
    from align_pipeline.pipeline.runner import Runner

    planner = _planner(file, overrides, force, store, update, rehash)
    progress = Progress()
    again = f"align run {shlex.join([str(file), *(stages or [])])}" + _flags(overrides, store)
    runner = Runner(planner, wait=not no_wait, again=again, progress=progress)
    targets = known(planner.pipeline, stages or [])
    try:
        runner.run(targets)
        progress.close()
        _print_reports(runner)
        typer.echo(f"manifest: {shown(planner.manifest.path)}")
    except GateFailed:
        progress.close()
        _print_reports(runner)  # what the gate was judged by
        raise
    finally:
        progress.close()
        report_cli.after_run(planner, targets)


@app.command()
def plan(
    file: File,
    stages: Stages = None,
    overrides: Overrides = None,
    force: Force = None,
    store: StoreFolder = Path("runs"),
    update: Update = False,
    rehash: Rehash = False,
) -> None:
    """Say for each stage whether it is cached, would run, resume, waits or is blocked, and why; change nothing.

    Stages that hold a model also say how much memory they take at most, how long they took here before, and which
    setting makes them fit.

    Exit codes: 0 said, 2 the file is wrong, 3 data or an input is wrong.
    """
    from align_pipeline.pipeline.forecast import Forecaster
    from align_pipeline.pipeline.named import known
    from align_pipeline.pipeline.store import disk_errors

    planner = _planner(file, overrides, force, store, update, rehash)
    with disk_errors(store):
        steps = planner.plan(known(planner.pipeline, stages or []))
        forecaster = Forecaster(planner)
        forecasts = [forecaster.of(step) for step in steps]
    wide = max(len(step.name) for step in steps)
    widest = max(len(step.status) for step in steps)
    short = [len(step.reason) for step, forecast in zip(steps, forecasts, strict=True) if forecast]
    column = max((length for length in short if length <= 40), default=0)  # long ones push what follows aside
    for step, forecast in zip(steps, forecasts, strict=True):
        busy = planner.store.busy(step.key) if step.key else None
        why = f"{step.reason}; running now: {busy}" if busy else step.reason
        takes = f"  {forecast.takes}" if forecast else ""
        typer.echo(f"{step.name:<{wide}}  {step.status:<{max(widest, 6)}}  {why:<{column if takes else 0}}{takes}")
        if forecast and forecast.advice:
            typer.echo(f"{'':<{wide}}  {forecast.advice}")
    if problems := planner.misfits(steps):
        raise ConfigError(problems)
    if problems := planner.look(steps):
        raise DataError(problems)


@app.command()
def show(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[FILE|FILE:STAGE|KEY]", help="A pipeline file, a stage of it, or an artifact's key."),
    ] = None,
    store: StoreFolder = Path("runs"),
) -> None:
    """Show status, lineage, metrics and resources of what was made.

    Exit codes: 0 shown, 2 the file is wrong, 3 there is no such result.
    """
    from align_pipeline.pipeline.store import Store

    where = Store(store)
    if what is None:
        manifests = sorted(where.root.glob("*/manifest.json"))
        if not manifests:
            raise InputError(
                f"{where.root} holds no pipeline; `align run FILE` makes one, --store DIR names another folder"
            )
        for path in manifests:
            _show_manifest(path)
        return
    if Path(what).is_file():
        from align_pipeline.pipeline.config import load
        from align_pipeline.pipeline.manifest import Manifest

        manifest = Manifest(where, load(Path(what), files_exist=False).name, Path(what))
        manifest.claim()
        path = manifest.path
        if not path.exists():
            raise InputError(f"{path} does not exist; `align run {what}` makes it")
        _show_manifest(path)
    else:
        from align_pipeline.pipeline.named import artifact_named, entry_named, file_and_stage, outdated

        entry = entry_named(where, what) if file_and_stage(what) else None
        if note := outdated(where, what):
            typer.echo(note)
        _show_artifact(where, artifact_named(where, what), entry)


app.command()(compare_cli.compare)
app.command()(report_cli.report)


@app.command()
def schema() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    from align_pipeline.pipeline.schema import schema as of_pipeline

    typer.echo(json.dumps(of_pipeline(), indent=1))


def _planner(
    file: Path, overrides: list[str] | None, force: list[str] | None, store: Path, update: bool, rehash: bool
) -> Planner:
    from align_pipeline.pipeline.config import load
    from align_pipeline.pipeline.manifest import Manifest
    from align_pipeline.pipeline.named import known
    from align_pipeline.pipeline.plan import Planner
    from align_pipeline.pipeline.store import Store

    pipeline = load(file, overrides or [])
    where = Store(store)
    manifest = Manifest(where, pipeline.name, file)
    if note := manifest.claim():
        typer.echo(note, err=True)
    forced = known(pipeline, force or [])
    return Planner(pipeline, where, manifest, force=forced, update=update, rehash=rehash)


def _flags(overrides: list[str] | None, store: Path) -> str:
    flags = [part for override in overrides or [] for part in ("--set", override)]
    flags += ["--store", str(store)] if store != Path("runs") else []
    return f" {shlex.join(flags)}" if flags else ""


def _show_manifest(path: Path) -> None:
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.manifest import read_manifest
    from align_pipeline.pipeline.progress import in_words, metrics_line

    manifest = read_manifest(path)
    file = shown(Path(manifest["config"])) if "config" in manifest else "damaged"
    typer.echo(f"{path.parent.name}  ({file}, {manifest.get('updated', 'run it again')})")
    stages = manifest["stages"]
    wide = max((len(name) for name in stages), default=0)
    widest = max((len(entry.get("artifact", "")) for entry in stages.values()), default=0)
    for name, entry in stages.items():
        if entry["status"] == "done":
            took, metrics = in_words(entry["seconds"]), metrics_line(entry["metrics"], 4)
            typer.echo(f"  {name:<{wide}}  done     {entry['artifact']:<{widest}}  {took:>12}  {metrics}")
        else:
            typer.echo(f"  {name:<{wide}}  {entry['status']:<7}  {entry['error']}")
            typer.echo(f"  {'':<{wide}}           continue: {entry['continue']}")
        for line in _gates(entry):
            typer.echo(f"  {'':<{wide}}           {line}")


def _gates(entry: Mapping[str, Any]) -> list[str]:
    """Return a line for each gate of a stage, as the last run judged it."""
    return [
        f"gate {'holds' if gate['passed'] else 'FAILED'}: {gate['gate']}: {gate['says']}"
        for gate in entry.get("gates", ())
    ]


def _show_artifact(store: Store, artifact: Artifact, entry: Mapping[str, Any] | None = None) -> None:
    from align_pipeline.pipeline.costs import costs_and_speeds
    from align_pipeline.pipeline.manifest import lineage

    record = artifact.record
    typer.echo(f"{artifact.key}  {artifact.kind}  {artifact.path}")
    typer.echo("made from:")
    for line in lineage(store, artifact)[1:]:
        typer.echo(line)
    for title in ("config", "metrics", "resources", "made"):
        typer.echo(f"{title}:")
        for name, value in record[title].items():
            if name != "speed":  # a table of its own
                typer.echo(f"  {name}: {f'{value:.6g}' if isinstance(value, float) else value}")
    for line in _gates(entry or {}):
        typer.echo(line)
    if artifact.kind == "report":
        typer.echo("\n".join(costs_and_speeds(store, artifact)))
    typer.echo("files:")
    for name, entry in record["files"].items():
        typer.echo(f"  {name}  {entry['bytes']:,} bytes  {entry['sha256'][:12]}")


def _print_reports(runner: Runner) -> None:
    """Print the reports of stages that made one: what a person wants to see at the end of a run."""
    from align_pipeline.pipeline.costs import costs_and_speeds

    for name, artifact in runner.artifacts.items():
        path = artifact.path / "report.md"
        if artifact.kind == "report" and path.exists():
            typer.echo("\n" + path.read_text(encoding="utf-8"))
            asked = getattr(runner.pipeline.stages[name].how, "speed", None)
            measure = f"{runner.again} --force {name}" if asked else None
            for line in costs_and_speeds(runner.store, artifact, measure):
                typer.echo(line)


def main() -> None:
    """Entry point: one clear message and an exit code for what a user can mend."""
    try:
        app()
    except AlignError as error:
        from align_pipeline.pipeline.files import clean

        sys.stdout.flush()
        print(clean(str(error)), file=sys.stderr)  # it may quote rows, and what a user's function said
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as `head` does
        sys.exit(1)


if __name__ == "__main__":
    main()
