"""`align report-bug`: what a maintainer needs to know of a crash, and nothing that was told in confidence.

The text is built from what is known to be harmless, not by hunting for secrets: of settings it takes numbers, switches
and texts that are one of a field's choices; of inputs the kind, and the name where that lies on the hub; of the
traceback the type of each error and those frames that lie in Python, in this package or in a library that it needs. All
else is left out, or its length is said. Messages are left out too, because they quote data. What is left is searched
once more for the names of this machine and for what looks like a key.
"""

from __future__ import annotations

import builtins
import getpass
import itertools
import json
import linecache
import os
import platform
import re
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from align_pipeline.pipeline.errors import ERRORS, ConfigError, InputError
from align_pipeline.pipeline.files import shown

if TYPE_CHECKING:
    from align_pipeline.pipeline.stage import Config, Launch, Resolved, Stage
    from align_pipeline.pipeline.store import Store

LIBRARIES = frozenset(
    "accelerate bitsandbytes click datasets duckdb httpx huggingface_hub jinja2 msgspec numpy peft pyarrow pydantic "
    "pydantic_core rapidfuzz rensa rich safetensors tokenizers torch trackio transformers triton trl typer vllm wandb "
    "yaml".split()
)
"""Installed packages whose files, functions and errors may be named: everybody can read them."""
SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".jinja"))
SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
TRACEBACKS = 4
"""Of one attempt, the last ones."""


def report_bug(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE[:STAGE]|KEY",
            help="A stage that failed, or its key; the latest of the file, or of all, when left out.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it to this file instead of the screen.")
    ] = None,
    with_message: Annotated[
        bool,
        typer.Option(
            "--with-message",
            help="Add the errors' messages, with quotes, paths, numbers and what looks like a secret masked. Names of "
            "people and plain words of your data stay: read the text before you send it.",
        ),
    ] = False,
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds everything.")] = Path(
        "runs"
    ),
) -> None:
    """Print one text for an issue: versions, settings and traceback of a crash, without secrets, paths or rows."""
    if out is not None and out.exists():
        raise ConfigError([f"--out {out}: it exists, and nothing is overwritten; name another file"])
    from align_pipeline.pipeline.doctor import seen_by_torch
    from align_pipeline.pipeline.store import Store

    failure = find_failure(Store(store), what)

    text = report(failure, seen_by_torch(), with_message=with_message)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    typer.echo(f"{shown(out.absolute())}: read it, then paste it into an issue")


@dataclass(frozen=True)
class Failure:
    """A stage that did not finish, from its work directory."""

    work: Path
    stage: Stage
    inputs: Mapping[str, Resolved]
    launch: Launch


def find_failure(store: Store, what: str | None) -> Failure | None:
    """Return the stage that is named, or the latest that did not finish; None where nothing is named and none failed.

    Raises InputError when the named one has not failed.
    """
    from align_pipeline.pipeline.worker import read_job

    jobs = sorted((store.root / "work").glob("*/job.json"), key=lambda path: path.stat().st_mtime)
    if what is not None:
        key = _key(store, what)
        jobs = [path for path in jobs if path.parent.name == key] or [
            path for path in jobs if path.parent.name.startswith(key)
        ]
        if len(jobs) != 1:
            rule = "is the start of several keys" if jobs else "is no unfinished stage"
            raise InputError(
                f"{what!r} {rule} in {store.root / 'work'}; name one that failed, as FILE:STAGE or by its key"
            )
    if not jobs:
        return None
    stage, inputs, work = read_job(jobs[-1].parent)
    return Failure(work.folder, stage, inputs, work.launch)


def _key(store: Store, what: str) -> str:
    """Return the key that a word of the command line names; of a file alone its latest failure."""
    from align_pipeline.pipeline.config import load
    from align_pipeline.pipeline.manifest import Manifest
    from align_pipeline.pipeline.named import file_and_stage, known

    parts = file_and_stage(what)
    if parts is None and not Path(what).is_file():
        return what
    file, name = parts or (Path(what), None)
    pipeline = load(file)
    stages = Manifest(store, pipeline.name, file).stages
    if name is None:
        works = [store.root / str(entry["work"]) for entry in stages.values() if entry["status"] == "failed"]
        jobs = [job for work in works if (job := work / "job.json").is_file()]
        if not jobs:
            raise InputError(f"{what}: no stage of it failed in {store.root}; name the folder of its run with --store")
        return max(jobs, key=lambda path: path.stat().st_mtime).parent.name
    known(pipeline, [name])
    entry = stages.get(name)
    if entry is None or entry["status"] != "failed" or not entry["work"].removeprefix("work/"):
        state = entry["status"] if entry else "never run"
        raise InputError(f"{what}: {state}, and a report is made of a stage that failed")
    return str(entry["work"]).removeprefix("work/")


# --- the text ---------------------------------------------------------------------------------------------------------


def report(failure: Failure | None, machine: Mapping[str, Any], *, with_message: bool = False) -> str:
    """Return the text, in Markdown; `machine` is what torch sees of it."""
    crashes = list(tracebacks(_last_attempt(failure.work), with_message)) if failure else []
    title = "align"
    if failure is not None:
        title = f"{type(failure.stage).__name__}: {crashes[-1].error if crashes else 'no traceback'}"
    lines = [f"# {title}", "", "What happened, and what should have happened: ...", "", "## Machine", ""]
    lines += [f"- {line}" for line in versions(machine)]
    if failure is None:
        lines += ["", "No stage is unfinished in this store. If `align` itself ended with a traceback, add it here."]
    else:
        lines += ["", "## Stage", "", *(f"- {line}" for line in facts(failure)), ""]
        lines += ["```json", json.dumps(settings(failure), indent=1), "```", "", "## Traceback", "", "```"]
        for crash in crashes[-TRACEBACKS:]:
            lines += crash.lines
        if not crashes:
            lines.append(f"none: {_ended(failure.work, with_message)}")
        lines.append("```")
        lines += ["", "Settings are those that differ from the defaults. Texts, names, paths and rows are left out."]
        if not with_message:
            lines.append("So are the messages of errors, which may quote rows: --with-message adds them.")
    return _scrubbed("\n".join(lines) + "\n")


def _ended(work: Path, with_message: bool) -> str:
    """Say how an attempt without a traceback ended."""
    try:
        left = json.loads((work / "error.json").read_text(encoding="utf-8"))
        kind, message = left["error"], str(left["message"])
    except (OSError, ValueError, KeyError, TypeError):
        kind, message = None, ""
    if kind in ERRORS:
        said = f"\n{kind}: {_masked(message)}" if with_message else ""
        return f"the stage ended with {kind}, which says what to mend and is no crash{said}"
    return "the process was ended, or crashed outside of Python"


def versions(machine: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `align doctor` says of versions and devices, but for where things lie and what mends them."""
    from align_pipeline.pipeline import doctor

    yield f"python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    if "error" in machine:
        yield "torch cannot be imported"
    looked = [*doctor.packages(), *doctor.memory(), *([] if "error" in machine else doctor.after_torch(machine))]
    for check in looked:
        yield f"{check.name}: {check.text}{'' if check.status == 'ok' else f' ({check.status})'}"


def facts(failure: Failure) -> Iterator[str]:
    """Yield how far a stage came, and what it read."""
    from align_pipeline.pipeline.progress import read_progress

    so_far = read_progress(failure.work)
    yield f"type {failure.stage.type}, version {failure.stage.version}"
    yield f"step {so_far.step} of {so_far.total}, attempt {so_far.attempts}, {so_far.seconds:.0f} s in all"
    yield f"peak memory {so_far.peak_memory_bytes / 2**20:,.0f} MiB"
    if so_far.peak_device_memory_bytes is not None:
        yield f"peak device memory {so_far.peak_device_memory_bytes / 2**20:,.0f} MiB on {so_far.gpu}"
    for field, one in failure.inputs.items():
        name, _, inside = field.partition(".")
        yield f"`{name}{'.…' if inside else ''}`: {_described(one)}"


def _described(one: Resolved) -> str:
    """Say what an input is, and its name only where everybody can look it up."""
    if one.base is not None:
        return f"{_origin(one)}, an adapter{_rank(one)} on {_described(one.base)}"
    return f"{_origin(one)}{_shape(one)}"


def _origin(one: Resolved) -> str:
    if one.artifact is not None:
        return f"made by a stage of type {one.artifact.rpartition('-')[0]}"
    if one.hub is not None:
        return f"hub:{one.hub}@{one.revision}"
    if one.function is not None:
        return "a function"
    path = Path(one.path or "")
    if path.is_dir():
        return "a folder"
    return f"a {path.suffix} file" if path.suffix in SUFFIXES else "a file"


def _rank(one: Resolved) -> str:
    """Say the rank of an adapter, where its folder is known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if one.adapter is not None:
            settings = json.loads(Path(one.adapter, "adapter_config.json").read_text(encoding="utf-8"))
            return f" of rank {int(settings['r'])}"
    return ""


def _shape(one: Resolved) -> str:
    """Say the architecture of a model on disk."""
    for folder in ("", "model") if one.path else ():
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((Path(one.path or "") / folder / "config.json").read_text(encoding="utf-8"))
            kind = found.get("model_type")
            numbers = [f"{name} {found[name]}" for name in SHAPE if isinstance(found.get(name), int)]
            if isinstance(kind, str) and re.fullmatch(r"[a-z][a-z0-9_]{1,31}", kind):
                return f" ({', '.join([kind, *numbers])})"
    return ""


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(failure: Failure) -> dict[str, Any]:
    """Return what differs from the defaults, free of everything that is the user's own."""
    stage = failure.stage.model_dump(mode="json", exclude_defaults=True, exclude={"type", "require"})
    launch = failure.launch.model_dump(mode="json", exclude_defaults=True)
    return {**_told(type(failure.stage), stage), **({"launch": _told(type(failure.launch), launch)} if launch else {})}


def _told(cls: type[Config], given: Mapping[str, Any]) -> dict[str, Any]:
    from align_pipeline.pipeline.stage import input_field, model_in

    told: dict[str, Any] = {}
    for name, value in given.items():
        info = cls.model_fields[name]
        inner = model_in(info.annotation)
        if input_field(info) is not None:
            continue  # said above
        if inner is not None and isinstance(value, Mapping) and value.keys() <= inner.model_fields.keys():
            told[name] = _told(inner, value)
        else:
            told[name] = _harmless(value, frozenset(_choices(info.annotation)), keys=name == "train")
    return told


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the values that a type lists."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield argument
        else:
            yield from _choices(argument)


def _harmless(value: Any, choices: frozenset[Any], *, keys: bool = False) -> Any:
    """Return numbers, switches and choices as they are, and of every other text its length.

    `keys` says that the keys of a mapping are fields of a trainer, and no words of the user's.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        if keys:
            return {name: one if _is_word(name, one) else _harmless(one, choices) for name, one in value.items()}
        return {f"name {number}": _harmless(one, choices) for number, one in enumerate(value.values(), 1)}
    if isinstance(value, list | tuple):
        return [_harmless(one, choices) for one in value]
    return value if value in choices else f"<text of {len(str(value))} characters>"


def _is_word(field: str, value: Any) -> bool:
    """Tell a word of the trainer's own, such as an optimizer, from a text of the user's."""
    known = field in ("optim", "lr_scheduler_type")
    return known and isinstance(value, str) and re.fullmatch(r"[a-z0-9_]{1,32}", value) is not None


# --- tracebacks -------------------------------------------------------------------------------------------------------

_RANK = re.compile(r"^\[rank\d+\]:\s?")
_FRAME = re.compile(r'^\s+File "(?P<path>[^"]+)", line (?P<line>\d+)(?:, in (?P<name>[\w.<>]+))?')
_ERROR = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_WORKER_SAYS = "StageFailed: "
_STARTS = "Traceback (most recent call last):"
_JOINS = ("During handling of the above exception", "The above exception was the direct cause")


@dataclass(frozen=True)
class Crash:
    """One traceback, as it may be shown."""

    error: str
    """The type of the exception."""
    lines: list[str]


def _last_attempt(work: Path) -> list[str]:
    """Return the lines of the log since the worker was last started."""
    try:
        lines = (work / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    attempt = [_RANK.sub("", line) for line in lines[starts[-1] if starts else 0 :]]
    ends = [number for number, line in enumerate(attempt) if line.startswith(_WORKER_SAYS)]
    return attempt[: ends[0]] if ends else attempt  # what follows is what a launcher makes of it


def tracebacks(log: list[str], with_message: bool) -> Iterator[Crash]:
    """Yield the tracebacks of a log; frames of other people's code are counted, not named."""
    heads = [number for number, line in enumerate(log) if line.strip() == _STARTS]
    for head, following in itertools.pairwise([*heads, len(log)]):
        shown_lines, end = [_STARTS], head + 1
        while end < following and (log[end].startswith(" ") or not log[end].strip()):
            if frame := _FRAME.match(log[end]):
                shown_lines += _frame(frame["path"], int(frame["line"]), frame["name"])
            end += 1
        error = _ERROR.match(log[end]) if end < following else None
        if error is None:
            continue
        name, message = _error(error["type"]), _message([error["message"] or "", *log[end + 1 : following]])
        said = f": {_masked(message)}" if with_message else f": <message of {len(message)} characters>"
        joined = next((f"\n{line}\n" for line in log[end + 1 : following] if line.startswith(_JOINS)), "")
        yield Crash(name, [*shown_lines, f"{name}{said if message else ''}", *joined.splitlines()])


def _frame(path: str, line: int, name: str | None) -> list[str]:
    """Return a frame, with its source where that is ours."""
    known = _known(path)
    if known is None:
        return ["  File <other code>"]
    source = linecache.getline(path, line).strip() if known.startswith("align_pipeline/") else ""
    return [f'  File "{known}", line {line}{f", in {name}" if name else ""}', *([f"    {source}"] if source else [])]


def _known(path: str) -> str | None:
    """Return the path of a file in Python, in a library or in this package, from there on; None for any other."""
    if re.fullmatch(r"<frozen [\w.]+>", path):
        return path
    file = Path(path)
    if not file.is_file():
        return None
    for part in ("site-packages", "dist-packages"):
        if part in file.parts:
            inside = file.parts[len(file.parts) - file.parts[::-1].index(part) :]
            is_ours = inside[0] == "align_pipeline"
            return "/".join(inside) if is_ours or inside[0].removesuffix(".py") in LIBRARIES else None
    ours = Path(__file__).parents[1]
    if file.is_relative_to(ours) and file.relative_to(ours).parts[0] in ("pipeline", "stages", "data"):
        return f"align_pipeline/{file.relative_to(ours).as_posix()}"
    library = sysconfig.get_path("stdlib")
    return f"python/{file.relative_to(library).as_posix()}" if file.is_relative_to(library) else None


def _error(name: str) -> str:
    """Return the name of an exception of Python, of a library or of this package."""
    package = name.partition(".")[0]
    if isinstance(getattr(builtins, name, None), type) or package in LIBRARIES or package == "align_pipeline":
        return name
    known = sys.stdlib_module_names
    return name if "." in name and package in known else "<exception of other code>"


def _message(lines: list[str]) -> str:
    """Return the lines that belong to an exception's message: up to the next traceback."""
    message: list[str] = []
    for line in lines:
        if line.startswith(_JOINS):
            break
        message.append(line)
    return "\n".join(message).strip()


# --- the last look ----------------------------------------------------------------------------------------------------

_KEYS = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[a-z]-|AKIA|AIza|ya29\.|glpat-|pypi-)[\w.-]{6,}|\beyJ[\w-]{8,}\.[\w.-]+"
    r"|\b\w+://[^\s/@]+@\S*|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]+"
)
"""Tokens of well-known services, signed ones, addresses with a password, and those of people."""
_PRIVATE = re.compile(
    r"(?P<field>(?<![\w-])['\"`]?[\w-]*(?i:password|passphrase|passwd|pwd|pw|secret|token|key|auth|authorization)['\"`]?\s*[:=])[^\n]*"
    rf"|{_KEYS.pattern}"
    r"""|'[^']*'|"[^"]*"|`[^`]*`"""
    r"""|(?<![\w.~+=-])(?:\w:)?[\w.~+=-]*[/\\~][^\s'"]+"""  # paths, URLs, and secrets of base64
    r"|(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])|\d{1,3}(?:\.\d{1,3}){3}"  # IP addresses
    r"|(?<![\w+=-])(?=[\w-]*[^\W\d])(?=[\w-]*[\d+=])[\w+=-]{16,}"  # letters with digits
    r"|\+?\(?\d(?:[ ().-]{0,2}\d){6,}|\d+(?:-\d+)+|\d{4,}"  # numbers of people, cards and telephones
)
"""What in a message is a secret's value, quoted, a place, or may name somebody; what is wrongly masked does no harm."""
QUOTES = "'\"`"


def _masked(message: str) -> str:
    """Replace what a message quotes, and what in it looks private, by its length."""

    def masked(found: re.Match[str]) -> str:
        field = found["field"] or ""
        return f"{field}{' ' if field else ''}<text of {len(found[0][len(field) :].strip(QUOTES + ' '))} characters>"

    return _PRIVATE.sub(masked, message)


def _scrubbed(text: str) -> str:
    """Take out what should not have come in: names of this machine, values of its environment, keys, addresses."""
    text = _KEYS.sub("<left out>", text)
    private = {str(Path.home()), str(Path.cwd()), *(value for value in os.environ.values() if len(value) >= 8)}
    for value in sorted(private, key=len, reverse=True):
        text = text.replace(value, "<left out>") if len(value) > 1 else text
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with suppress(OSError, KeyError):
        names.add(getpass.getuser())
    for name in names:
        if len(name) > 1:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<left out>", text)
    return text
