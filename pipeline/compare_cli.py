"""`align compare A B`: two models on the same prompts, as an `evaluate` stage that no file holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_pipeline.pipeline.errors import ConfigError, InputError, near_or_all

if TYPE_CHECKING:
    from align_pipeline.pipeline.config import Pipeline
    from align_pipeline.pipeline.store import Artifact, Store

STAGE = "compare"
WHERE = "align compare"

NAMED = "FILE:STAGE, an artifact's key, hub:ORG/NAME or file:PATH."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"A model: {NAMED}", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The one that is compared with it.", show_default=False)],
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="What both answer; it should be new to them.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", help="A reward model, named as A and B are, or module:function."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of evaluate, as in --set samples_per_prompt=4."),
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
    force: Annotated[bool, typer.Option("--force", help="Compare anew; the old result is kept.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit with 4 when another run holds it.")] = False,
) -> None:
    """Compare two models on prompts: who wins, how surely, and where they differ most.

    Where A or B is FILE:STAGE, prompts, scorer and settings are those of the file's one evaluate stage, unless given.
    What was compared is kept like a stage's result: asked again, it answers at once; `align gc` keeps the last one.
    Exit codes: 0 compared, 2 the command is wrong, 3 data or an input is wrong, 4 locked (--no-wait).
    """
    from align_pipeline.pipeline.costs import costs_and_speeds
    from align_pipeline.pipeline.manifest import COMPARED, Manifest
    from align_pipeline.pipeline.plan import Planner
    from align_pipeline.pipeline.progress import Progress
    from align_pipeline.pipeline.runner import Runner
    from align_pipeline.pipeline.store import Store
    from align_pipeline.stages.comparison import A, B, compared

    where = Store(store)
    pipeline, given, bases = _pipeline(a, b, prompts, scorer, settings or [], where)
    manifest = Manifest(where, COMPARED, Path(COMPARED))
    planner = Planner(pipeline, where, manifest, force=[STAGE] if force else [], given=given, bases=bases)
    progress = Progress()
    again = _again(a, b, prompts, scorer, settings or [], store)
    try:
        made = Runner(planner, wait=not no_wait, again=again, progress=progress).run()
    finally:
        progress.close()
    stage = pipeline.stages[STAGE].model_dump()
    typer.echo()
    for name, asked in ((A, a), (B, b)):
        typer.echo(f"{name}: {asked}{_key_of(asked, stage['models'][name])}")
    typer.echo()
    measure = f"{again} --force" if stage["how"]["speed"] else None
    for line in (*compared(made[STAGE].path), "", *costs_and_speeds(where, made[STAGE], measure)):
        typer.echo(line)


def _key_of(asked: str, ref: str) -> str:
    return f"  ({ref.removeprefix('stage:')})" if ref.startswith("stage:") else ""


def _again(a: str, b: str, prompts: str | None, scorer: str | None, settings: list[str], store: Path) -> str:
    """Return the command that continues this one."""
    words = ["align", "compare", a, b]
    words += ["--prompts", prompts] if prompts else []
    words += ["--scorer", scorer] if scorer else []
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--store", str(store)] if store != Path("runs") else []
    return shlex.join(words)


def _pipeline(
    a: str, b: str, prompts: str | None, scorer: str | None, settings: list[str], store: Store
) -> tuple[Pipeline, dict[str, Artifact], set[str]]:
    """Return a pipeline of one evaluate stage, the artifacts that it reads by their keys, and models of their files."""
    from align_pipeline.pipeline.config import Pipeline, check_stage
    from align_pipeline.pipeline.manifest import COMPARED
    from align_pipeline.pipeline.stage import Launch
    from align_pipeline.pipeline.yaml_file import Place, override
    from align_pipeline.stages.comparison import A, B

    finder = _Finder(store)
    chosen = {name for name, value in (("prompts", prompts), ("scorer", scorer)) if value is not None}
    raw, like = finder.like([a, b], chosen)
    models = {name: finder.reference(text, name, ("model",)) for name, text in ((A, a), (B, b))}
    raw |= {"type": "evaluate", "models": dict(models), "baseline": A}
    if prompts is not None:
        raw["prompts"] = finder.reference(prompts, "--prompts", ("dataset",), bare=True)
    if scorer is not None:
        raw["scorer"] = finder.reference(scorer, "--scorer", ("reward_model",))
    fixed = {"type": "evaluate", "models": models, "baseline": A}
    places: dict[Place, str] = {(): WHERE}
    problems: list[str] = []
    for text in settings:
        override(raw, places, text, problems)
    problems += [
        f"{WHERE}: {name}: is what A and B say; remove the --set" for name in fixed if raw[name] != fixed[name]
    ]
    problems += [
        f"{WHERE}: --{name}: missing; give it, or name A or B as FILE:STAGE of a file with one evaluate stage"
        for name in ("prompts", "scorer")
        if name not in raw
    ]
    if problems:
        raise ConfigError(problems)
    folder = like.folder if like else Path.cwd()
    stage = check_stage(raw, folder / COMPARED, places, finder.found)
    launch = like.launch if like else Launch()
    return Pipeline(COMPARED, folder / COMPARED, launch, {STAGE: stage}, places), finder.found, finder.bases()


class _Finder:
    """Finds what the command names, and the pipeline whose evaluation it is like."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.found: dict[str, Artifact] = {}
        """Artifacts by key: what the stage's `stage:KEY` references mean."""
        self._pipelines: dict[Path, Pipeline] = {}

    def like(self, asked: list[str], chosen: set[str]) -> tuple[dict[str, Any], Pipeline | None]:
        """Return the settings of the one evaluate stage of the first file that has one, and that file's pipeline.

        Fields that were `chosen` on the command line are left out. Without such a file, the first that is named.
        """
        first = None
        for text in asked:
            file = _file_and_stage(text)[0]
            if file is None:
                continue
            pipeline = self._load(file)
            first = first or pipeline
            stages = {name: one for name, one in pipeline.stages.items() if one.type == "evaluate"}
            if len(stages) != 1:
                continue
            (name,) = stages
            hidden = {"models", "baseline", "require", *chosen}
            raw = stages[name].model_dump(mode="json", exclude_defaults=True, exclude=hidden)
            return {field: self._own(value, file) for field, value in raw.items()}, pipeline
        return {}, first

    def bases(self) -> set[str]:
        """Return the models on disk that the named files start from: where the base of an adapter lies now."""
        from align_pipeline.pipeline.plan import models_on_disk

        return {ref for pipeline in self._pipelines.values() for ref in models_on_disk(pipeline)}

    def _own(self, value: Any, file: Path) -> Any:
        """Return a setting with the stages of its file replaced by what they made."""
        if isinstance(value, Mapping):
            return {name: self._own(inner, file) for name, inner in value.items()}
        if isinstance(value, str) and value.startswith("stage:"):
            return self._keep(self._artifact(file, value.removeprefix("stage:")))
        return value

    def reference(self, text: str, place: str, kinds: tuple[str, ...], *, bare: bool = False) -> str:
        """Return what a word of the command line names, as a field of a stage is written."""
        from align_pipeline.pipeline.inputs import missing_file
        from align_pipeline.pipeline.stage import is_reference

        file, stage = _file_and_stage(text)
        if file is not None:
            return self._keep(self._artifact(file, stage), place, kinds)
        if text.startswith("file:") or (bare and Path(text).exists()):
            return f"file:{Path(text.removeprefix('file:')).expanduser().absolute()}"
        if text.startswith("stage:"):
            raise ConfigError([f"{WHERE}: {place}: {text!r}: of which file? Write FILE:{text.removeprefix('stage:')}"])
        name, colon, _ = text.rpartition(":")
        if colon and name.endswith((".yaml", ".yml")):
            raise ConfigError([f"{WHERE}: {place}: {missing_file(Path(name).absolute())}"])
        if is_reference(text):
            return text
        if bare and ("/" in text or "." in text):
            return f"file:{Path(text).expanduser().absolute()}"  # the check of the stage says that it is not there
        try:
            return self._keep(self.store.find(text), place, kinds)
        except InputError as error:
            raise InputError(f"{WHERE}: {place}: {error}; or write FILE:STAGE, hub:ORG/NAME or file:PATH") from None

    def _keep(self, artifact: Artifact, place: str = "", kinds: tuple[str, ...] = ()) -> str:
        if kinds and artifact.kind not in kinds:
            made, wanted = artifact.kind.replace("_", " "), " or ".join(kinds).replace("_", " ")
            raise InputError(f"{WHERE}: {place}: {artifact.key} is a {made}, a {wanted} is needed; name another one")
        self.found[artifact.key] = artifact
        return f"stage:{artifact.key}"

    def _artifact(self, file: Path, stage: str) -> Artifact:
        from align_pipeline.pipeline.manifest import artifact_of

        pipeline = self._load(file)
        if stage not in pipeline.stages:
            raise ConfigError([f"{file}: no stage {stage!r}{near_or_all(stage, pipeline.stages)}"])
        return artifact_of(self.store, pipeline.name, file, stage)[0]

    def _load(self, file: Path) -> Pipeline:
        from align_pipeline.pipeline.config import load

        if file not in self._pipelines:
            self._pipelines[file] = load(file)
        return self._pipelines[file]


def _file_and_stage(text: str) -> tuple[Path | None, str]:
    """Return the pipeline file and the stage that FILE:STAGE names; no file when it is something else."""
    name, colon, stage = text.rpartition(":")
    return (Path(name), stage) if colon and Path(name).is_file() else (None, "")
