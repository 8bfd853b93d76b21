"""`align export`: a trained model as a folder that Transformers, PEFT and vLLM load, checked and with its card."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from align_pipeline.pipeline.errors import AlignError, ConfigError, InputError, near_or_all
from align_pipeline.pipeline.files import flush, shown

if TYPE_CHECKING:
    from align_pipeline.pipeline.inputs import Digests
    from align_pipeline.pipeline.stage import Resolved
    from align_pipeline.pipeline.store import Artifact, Store
    from align_pipeline.stages.export import Form, Proof

FORMATS = ("merged", "adapter")


def export(
    what: Annotated[str, typer.Argument(metavar="FILE:STAGE|KEY", help="A stage of a pipeline, or an artifact's key.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; it must not exist.")],
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="merged (whole weights) or adapter (for PEFT).")
    ] = "merged",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="With adapter: what to call its base, a hub id or a path."),
    ] = None,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Write a model as Transformers, PEFT and vLLM load it, proven to answer as it was trained, with a model card.

    Exit codes: 0 written, 1 the written weights answer otherwise (nothing is kept) or the disk is full, 2 the command
    is wrong, 3 there is no such model, or its files are not what was published.
    """
    form = _form(format, what, out, base, store)
    from align_pipeline.pipeline.manifest import ancestors
    from align_pipeline.pipeline.named import (
        artifact_named,
        entry_named,
        file_and_stage,
        model_named,
        outdated,
        pipeline_of,
    )
    from align_pipeline.pipeline.store import Store, disk_errors
    from align_pipeline.pipeline.worker import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

    where = Store(store)
    artifact = artifact_named(where, what)
    if artifact.kind not in ("model", "reward_model"):
        raise InputError(f"{what}: it is a {artifact.kind}, and models are exported; name the stage of a model")
    pipeline = pipeline_of(where, what, artifact)
    source = model_named(where, what, artifact, pipeline)
    where.check([source])
    if note := outdated(where, what):
        typer.echo(note, err=True)
    for gate in entry_named(where, what).get("gates", ()) if file_and_stage(what) else ():
        if not gate["passed"]:
            typer.echo(f"warning: a gate of it failed: {gate['gate']}: {gate['says']}", err=True)
    chain = ancestors(where, artifact)
    rows = _rows(where, chain, pipeline.folder if pipeline else None) if artifact.kind == "model" else None
    with disk_errors(out.absolute().parent):
        proof = _write(source, artifact, chain, form, base, rows, out)
    for line in proof:
        typer.echo(line)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{shown(out)}: {_in_words(artifact, form)}, {total:,} bytes, with README.md")


def _form(format: str, what: str, out: Path, base: str | None, store: Path) -> Form:
    """Check the command line before anything is loaded."""
    if format == "gguf":
        raise ConfigError(
            [
                "--format gguf: not written here: llama.cpp's own converter knows every architecture's layout and "
                "changes with it. Make one from the merged folder, in a checkout of "
                "https://github.com/ggml-org/llama.cpp:",
                f"  align export {shlex.quote(what)} -o {shlex.quote(str(out))}",
                f"  python convert_hf_to_gguf.py {shlex.quote(str(out))} --outtype auto --outfile model.gguf",
                "then compare the ids that its llama-tokenize gives a few texts with those of the tokenizer: words can "
                "be split otherwise there, without a word of the converter",
            ]
        )
    if format not in FORMATS:
        raise ConfigError([f"--format {format}: no such format{near_or_all(format, FORMATS)}"])
    if base is not None and format != "adapter":
        raise ConfigError([f"--base {base}: names the base of an adapter; add --format adapter, or leave it out"])
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError([f"--out {out}: it exists, and nothing is overwritten; name another folder or remove it"])
    if out.resolve().is_relative_to(store.resolve()):
        raise ConfigError([f"--out {out}: lies in the store, where only stages write; name a folder outside of it"])
    return "merged" if format == "merged" else "adapter"


def _write(
    source: Resolved,
    artifact: Artifact,
    chain: list[Artifact],
    form: Form,
    base_name: str | None,
    rows: _Rows | None,
    out: Path,
) -> list[str]:
    """Write into a folder beside `out` and rename it, so that `out` is there whole or not at all."""
    from align_pipeline.pipeline.card import card
    from align_pipeline.stages import export as stage

    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".exporting", dir=out.absolute().parent))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError([f"--out {out}: cannot be made ({error.filename}: {why}); name another folder"]) from error
    making.chmod(0o755)  # mkdtemp's are for their owner's eyes only
    try:
        if form == "adapter":
            base_name = base_name or _base_name(source)
        prompts, named = _prompts(source, rows) if artifact.kind == "model" else ([], "")
        said = list(_said(stage.export(source, form, making, base_name, prompts), named))
        if form == "adapter":
            said.append(f"the adapter calls its base {base_name}")
        base = source.base
        (making / "README.md").write_text(card(out.name, artifact, chain, base, form, said), encoding="utf-8")
        for path in sorted(making.rglob("*")):
            flush(path)
        try:
            making.rename(out)  # in the place of an empty folder, as was checked
        except OSError as error:
            raise ConfigError([f"--out {out}: somebody else has written into it meanwhile; name another"]) from error
        flush(out.absolute().parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return said


def _base_name(source: Resolved) -> str | None:
    """Return what PEFT finds the base by: its hub id, else its path as seen from the folder of this command."""
    base = source.plain
    if base.hub or not base.path:
        return base.hub
    path = os.path.relpath(base.path)
    return path if path.startswith(".") else f"./{path}"  # `tiny` alone would be asked of the hub


def _said(proof: Proof, named: str) -> Iterator[str]:
    """Say in words how near the written folder is to the model."""
    if proof.agreement is None:
        yield (
            f"{proof.prompts} stored scores, loaded again in a sequence classifier: largest difference "
            f"{proof.difference:.2g} (bound {proof.bound:.2g} for {proof.dtype})"
        )
        return
    yield (
        f"{proof.tokens:,} tokens of greedy answers to {proof.prompts} prompts ({named}), loaded again: largest "
        f"difference of logits {proof.difference:.2g} (bound {proof.bound:.2g} for {proof.dtype}), greedy agreement "
        f"{proof.agreement:.2%} (bound {proof.least_agreement:.0%})"
    )


def _in_words(artifact: Artifact, form: Form) -> str:
    kind = artifact.kind.replace("_", " ")
    return f"{kind} (adapter)" if form == "adapter" else kind


# --- prompts ----------------------------------------------------------------------------------------------------------

_Rows: TypeAlias = "tuple[str, Mapping[str, Resolved], str, Mapping[str, Any]]"
"""Task, inputs, field and settings of a stage whose rows can still be read."""


def _rows(store: Store, chain: list[Artifact], folder: Path | None) -> _Rows | None:
    """Return the rows of the latest stage of a chain whose files are as they were."""
    from align_pipeline.pipeline.inputs import Digests

    digests = Digests(store.root / "digests.json")
    for artifact in reversed(chain):
        for field, report in (artifact.record.get("data") or {}).items():
            if not isinstance(report, Mapping) or "task" not in report:
                continue
            name, one = next(
                (key, one) for key, one in artifact.record["inputs"].items() if key.partition(".")[0] == field
            )
            found = _unchanged(store, one, folder, digests)
            if found is not None:
                return str(report["task"]), {name: found}, field, artifact.record["config"]
    return None


def _unchanged(store: Store, one: Mapping[str, Any], folder: Path | None, digests: Digests) -> Resolved | None:
    """Return an input of a record as it was; None when it has changed, has gone, or lies on the hub."""
    from align_pipeline.pipeline.inputs import file_path
    from align_pipeline.pipeline.stage import Resolved

    ref, digest = str(one["ref"]), str(one["digest"])
    made = store.made(one.get("artifact"), digest)
    if made is not None:
        return made.resolved(ref, None)
    if folder is None or not ref.startswith("file:"):
        return None
    path = file_path(ref, folder)
    return Resolved(ref=ref, digest=digest, path=str(path)) if path.exists() and digests.of(path) == digest else None


def _prompts(source: Resolved, rows: _Rows | None) -> tuple[list[list[int]], str]:
    """Return prompts to answer and what they are: those of the rows, else questions of our own."""
    from align_pipeline.stages.export import prompts_of

    if rows is not None:
        task, inputs, field, config = rows
        try:
            if prompts := prompts_of(source, task, inputs, field, config):
                return prompts, next(iter(inputs.values())).ref.rpartition("/")[2].removeprefix("file:")
        except AlignError as error:
            typer.echo(f"warning: the rows cannot be read ({str(error).splitlines()[0]}); asking questions of our own")
    return prompts_of(source), "questions of our own"
