"""`align import`: a training file of LLaMA-Factory, axolotl or TRL as a pipeline, and what of it was not kept."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align_pipeline.pipeline.errors import ConfigError, near_or_all

if TYPE_CHECKING:
    from align_pipeline.pipeline.imported import Draft, PeerFile

PEERS = ("llamafactory", "axolotl", "trl")
TRL_STAGES = ("sft", "dpo", "reward", "kto")


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Their files, in the order of training.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The pipeline file to write; printed when none is named."),
    ] = None,
    peer: Annotated[
        str | None, typer.Option("--from", metavar="PEER", help=f"Whose files they are: {', '.join(PEERS)}.")
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage", metavar="NAME", help=f"What a file of TRL is for, one for each: {', '.join(TRL_STAGES)}."
        ),
    ] = None,
) -> None:
    """Read a LLaMA-Factory, axolotl or TRL file and write a pipeline; name each key that it could not carry over.

    Defaults of theirs that differ from ours are written out. Several files are chained where one starts from what
    another writes.
    """
    from align_pipeline.pipeline.files import shown
    from align_pipeline.pipeline.store import disk_errors

    if output is not None:
        _check_output(output)
    text, remarks = translate(files, output, peer, stages or [])
    for remark in remarks:
        typer.echo(remark, err=True)
    if output is None:
        typer.echo(text, nl=False)
        return
    with disk_errors(output.absolute().parent):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as out:
            out.write(text)
    typer.echo(f"{shown(output.absolute())}  written")
    typer.echo(f"next: align plan {output}")


def _check_output(output: Path) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError([f"{output}: a pipeline file ends in .yaml or .yml; name it so"])
    if output.exists() or output.is_symlink():
        raise ConfigError([f"{output}: it exists, and nothing is overwritten; name another file"])


def translate(
    files: Sequence[Path], output: Path | None, peer: str | None, stages: Sequence[str]
) -> tuple[str, list[str]]:
    """Return the pipeline and what is said of the keys; raise ConfigError for files that cannot become stages."""
    from align_pipeline.pipeline import from_axolotl, from_llamafactory, from_trl
    from align_pipeline.pipeline.imported import PeerFile, keys_of, pipeline_text

    modules = {"llamafactory": from_llamafactory, "axolotl": from_axolotl, "trl": from_trl}
    if twice := [f"{path}: named twice; name each file once" for path in files if files.count(path) > 1]:
        raise ConfigError(twice[:1])
    keys = {path: keys_of(path) for path in files}
    whose = {
        path: _peer(path, keys[path][0], {name: one.TELLS for name, one in modules.items()}, peer) for path in files
    }
    wanted = _stages_of_trl(stages, [path for path in files if whose[path] == "trl"])
    base = output.absolute().parent if output else Path.cwd()
    opened: list[PeerFile] = []
    drafts: list[Draft] = []
    made: dict[str, Draft] = {}
    for path in keys:
        module = modules[whose[path]]
        file = PeerFile(path, keys[path], module.NAME, base, made, wanted.get(path))
        opened.append(file)
        draft = module.draft(file)
        if draft is None:
            break
        _add(file, draft, drafts, made)
    if refused := [text for file in opened for _, text in sorted(file.refused)]:
        raise ConfigError([*refused, "nothing was written"])
    remarks = [remark for file in opened for _, remark in sorted(file.remarks)]
    said = [f"  {remark}" for remark in remarks if ": not needed; " not in remark]
    names = ", ".join(f"{file.path} ({file.peer})" for file in opened)
    head = [f"Imported from {names}. Beside a field stands the key that it comes from.", *(["", *said] if said else [])]
    text = pipeline_text(_name(output or files[0]), head, drafts)
    _check(text, drafts, opened)
    return text, remarks


def _peer(path: Path, keys: Mapping[str, object], tells: Mapping[str, frozenset[str]], wanted: str | None) -> str:
    """Return whose file it is, by the keys that one peer alone has."""
    if wanted is not None:
        if wanted not in tells:
            raise ConfigError([f"--from {wanted}: no such peer{near_or_all(wanted, tells)}"])
        return wanted
    found = {name: sorted(own & keys.keys()) for name, own in tells.items() if own & keys.keys()}
    if len(found) == 1:
        return next(iter(found))
    why = "; ".join(f"{', '.join(own[:4])} of {name}" for name, own in found.items())
    what = f"it has keys of several: {why}" if found else "none of its keys is one that only one peer has"
    raise ConfigError([f"{path}: whose file is it? {what}; say so with --from {'|'.join(tells)}"])


def _stages_of_trl(stages: Sequence[str], files: Sequence[Path]) -> dict[Path, str]:
    """Return what each file of TRL is for, as far as `--stage` says."""
    for name in stages:
        if name not in TRL_STAGES:
            raise ConfigError([f"--stage {name}: no such command of trl{near_or_all(name, TRL_STAGES)}"])
    if stages and len(stages) != len(files):
        raise ConfigError([f"--stage: {len(stages)} for {len(files)} files of TRL; give one for each, in their order"])
    return dict(zip(files, stages, strict=False))


def _add(file: PeerFile, draft: Draft, drafts: list[Draft], made: dict[str, Draft]) -> None:
    """Name a stage, and remember which folder of the peer's it stands for."""
    from os.path import normpath

    same = sum(one.kind == draft.kind for one in drafts)
    draft.name = f"{draft.kind}-{same + 1}" if same else draft.kind
    start = draft.get(draft.starts_from)
    chained = any(str(value).startswith("stage:") for value, _ in draft.fields.values())
    if drafts and start and not chained:
        folders = ", ".join(f"{folder} ({one.name})" for folder, one in made.items())
        file.remarks.append(
            (
                0,
                f"{file.path}: starts from {start}, which no file before it writes; to chain them name as its model "
                f"or adapter {folders or 'their output_dir'}",
            )
        )
    drafts.append(draft)
    folder = file.values.get("output_dir")
    if isinstance(folder, str):
        made[normpath(folder)] = draft


def _name(path: Path) -> str:
    """Return a pipeline's name after a file."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._") or "imported"
    return f"{name}-imported" if name in ("store", "work", "locks", "cache") else name


def _check(text: str, drafts: Sequence[Draft], files: Sequence[PeerFile]) -> None:
    """Check a pipeline before anybody gets it, as `align plan` would; the files that it names may come later."""
    from align_pipeline.pipeline.config import load

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load(file, files_exist=False)
        except ConfigError as error:
            told = [_told(problem.replace(f"{folder}/", ""), drafts, files) for problem in error.problems]
            raise ConfigError([*told, "nothing was written"]) from None


def _told(problem: str, drafts: Sequence[Draft], files: Sequence[PeerFile]) -> str:
    """Return a problem of the pipeline as one of the key that the field was carried over from, where there is one."""
    place = re.sub(r"^[^:]*:\d+: ", "", problem)
    found = re.match(r"stages\.([\w-]+)(?:\.([\w.-]+))?: (.*)", place, re.DOTALL)
    for draft, file in zip(drafts, files, strict=True):
        if not found or found.group(1) != draft.name:
            continue
        _, field, rule = found.groups()
        if field is None and (named := re.match(r"[\w.]+", rule)):  # fields that exclude each other: the first is named
            field = named.group()
            rule = rule.removeprefix(f"{field}: ")
        for at, (_, origin) in draft.fields.items():
            path = ".".join(map(str, at))
            key = re.split(r"[:,\s]", origin or str(at[-1]))[0]
            if f"{field}.".startswith(f"{path}.") and (key,) in file.lines:
                return f"{file.path}:{file.lines[(key,)]}: {key}: refused; {rule}"
        return f"{file.path}: refused; the pipeline it would make: {place}"
    return f"{files[0].path}: refused; the pipeline it would make: {place}"
