"""What the importers of peers' files share: a file, key by key, and the stage that it becomes.

A key is carried over, or said to be needless here, or said to be lost and why. What an importer took is marked, so that
whatever is left can be said at the end, and nothing is dropped in silence. What cannot become a stage is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_pipeline.pipeline.errors import ConfigError
from align_pipeline.pipeline.stage import Stage, is_reference
from align_pipeline.pipeline.yaml_file import Place, dotted, read
from align_pipeline.stages import STAGES

DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt|arrow)(\.(gz|zst))?$", re.IGNORECASE)

OUTPUTS = ("saves", "out", "output", "outputs", "results", "runs", "checkpoints", "models", "data")
"""Folders that people write to: a path that begins so is nobody's repository on the hub."""

OFF: tuple[Any, ...] = (False, "", [], {}, "no", "none", "off", "disabled", "false")
"""Values of a key that switch off what it names."""


Keys = tuple[dict[str, Any], dict[Place, int]]
"""What a YAML file says at its top level, and the line of each place."""


@dataclass
class Draft:
    """A stage as the pipeline will have it: its fields, and beside each the key that it was carried over from."""

    kind: str
    name: str
    fields: dict[Place, tuple[Any, str]] = field(default_factory=dict)

    @property
    def cls(self) -> type[Stage]:
        return STAGES[self.kind]

    @property
    def starts_from(self) -> str:
        """The field that names the model to start from: `model` or `policy`."""
        return self.cls.starts_from or "model"

    def put(self, at: str | Place, value: Any, origin: str = "") -> None:
        self.fields[(at,) if isinstance(at, str) else at] = (value, origin)

    def get(self, *at: str) -> Any:
        return self.fields.get(at, (None, ""))[0]


@dataclass(frozen=True)
class Source:
    """Rows as the stage will read them."""

    name: str
    ref: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class PeerFile:
    """A peer's file, its keys taken one by one."""

    def __init__(
        self, path: Path, keys: Keys, peer: str, base: Path, made: Mapping[str, Draft], command: str | None = None
    ) -> None:
        """`base` is the folder of the pipeline to be written, `made` what earlier files make, by folder.

        `command` is what the user says that the file is for, where it does not say it itself.
        """
        self.path, self.peer, self.base, self.made, self.command = path, peer, base, made, command
        self.values, self.lines = keys
        self.names: dict[str, str] = {}
        self.defaults: Mapping[str, Any] = {}
        self.refused: list[tuple[int, str]] = []
        self.remarks: list[tuple[int, str]] = []
        self.switches: set[str] = set()
        self._taken: set[str] = set()

    def speaks(self, names: Mapping[str, str], defaults: Mapping[str, Any], old: Mapping[str, str]) -> None:
        """Say how the peer calls what Transformers calls otherwise, what its defaults are, and older names of keys."""
        self.names, self.defaults = dict(names), defaults
        for before, now in old.items():
            if self.values.get(before) is not None and not self.given(now):
                self.names[now] = before

    # What a key says. Keys go by their names in Transformers, or else by the peer's own.

    def key(self, name: str) -> str:
        return self.names.get(name, name)

    def given(self, name: str) -> bool:
        return self.values.get(self.key(name)) is not None

    def origin(self, name: str) -> str:
        """Return the comment that says where a value comes from."""
        return self.key(name) if self.given(name) else f"default of {self.peer}"

    def value(self, name: str) -> Any:
        """Take a key: what it says, or the peer's default."""
        self._taken.add(self.key(name))
        found = self.values.get(self.key(name))
        return self.defaults.get(name) if found is None else found

    def number(self, name: str, least: float | None = None) -> float | None:
        value = self.value(name)
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
            value = float(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(name, f"must be a number, got {value!r}")
            return self.defaults.get(name)
        if value is not None and least is not None and value < least:
            self.refuse(name, f"must be at least {least:g}, got {value!r}")
            return self.defaults.get(name)
        return value

    def whole(self, name: str, least: int | None = None) -> int | None:
        value = self.number(name, least)
        if value is not None and value != int(value):
            self.refuse(name, f"must be a whole number, got {value!r}")
            return self.defaults.get(name)
        return None if value is None else int(value)

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if isinstance(value, str):  # the peers read YAML 1.1, where yes and on are true
            value = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
                value.lower(), value
            )
        if value is not None and not isinstance(value, bool):
            self.refuse(name, f"must be true or false, got {value!r}")
        return value is True

    def on(self, name: str) -> bool:
        """Tell whether a switch is on; one that is off is left, to be said at the end."""
        self.switches.add(self.key(name))
        return self.given(name) and self.values[self.key(name)] not in OFF and self.flag(name)

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, f"must be text, got {value!r}")
            return None
        return value

    def words(self, name: str) -> list[str]:
        """Take a list, which may be written with commas between."""
        value = self.value(name)
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        if value is not None and not (isinstance(value, str | list) and all(isinstance(part, str) for part in parts)):
            self.refuse(name, f"must be a list of names, got {value!r}")
            return []
        return [part.strip() for part in parts if part.strip()]

    # What is said of a key.

    def lost(self, name: str | Place, why: str) -> None:
        self._say(self.remarks, name, f"not carried over; {why}")

    def needless(self, name: str | Place, why: str) -> None:
        self._say(self.remarks, name, f"not needed; {why}")

    def but(self, name: str | Place, what: str) -> None:
        self._say(self.remarks, name, f"carried over as {what}")

    def unsaid(self, name: str, what: str) -> None:
        """Say what is done about a key that is not there."""
        self._say(self.remarks, name, f"not given; {what}")

    def settled(self, name: str) -> bool:
        return self.key(name) in self._taken

    def refuse(self, name: str | Place, why: str) -> None:
        self._say(self.refused, name, f"refused; {why}")

    def _say(self, where: list[tuple[int, str]], name: str | Place, what: str) -> None:
        place: Place = (self.key(name),) if isinstance(name, str) else name
        self._taken.update(map(str, place[:1]))
        line = next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), 0)
        at = f"{self.path}:{line}" if line else f"{self.path}"
        where.append((line, f"{at}: {dotted(place)}: {what}" if place else f"{at}: {what}"))

    def left(self) -> Iterator[str]:
        """Yield the keys that say something and were not taken yet."""
        for name, value in self.values.items():
            if value is not None and name not in self._taken:
                yield name

    # What a path names.

    def where(self, path: str) -> Path | None:
        """Return where a path lies: from here, or beside the file."""
        folders = (Path.cwd(), self.path.absolute().parent)
        return next((there for folder in folders if (there := folder / Path(path).expanduser()).exists()), None)

    def found(self, path: str) -> str:
        """Return a path as the pipeline will name it; where nothing lies yet, it is one from here."""
        return path if path.startswith(("/", "~")) else os.path.relpath(self.where(path) or path, self.base)

    def reference(self, name: str | Place, path: str, revision: str | None = None) -> str | None:
        """Return `file:` or `hub:` for a path or a repository; refuse what is neither."""
        if (
            self.where(path)
            or path.startswith(("/", "~", "."))
            or path.split("/")[0] in OUTPUTS
            or DATA_FILE.search(path)
        ):
            return f"file:{self.found(path)}"
        ref = f"hub:{path}" + (f"@{revision}" if revision and revision != "main" else "")
        if is_reference(ref):
            return ref
        self.refuse(name, f"{path!r} is no folder here, nor ORG/NAME on the hub; write one of the two")
        return None

    def maker(self, path: Any) -> Draft | None:
        """Return the stage of an earlier file of the command that writes to this folder."""
        return self.made.get(os.path.normpath(path)) if isinstance(path, str) else None


def keys_of(path: Path) -> Keys:
    """Read a YAML file; raise ConfigError for one that holds no keys, or one of them twice."""
    problems: list[str] = []
    values, lines = read(path, problems, merges=True)
    if problems:
        raise ConfigError(problems)
    if not isinstance(values, dict) or not values:
        raise ConfigError([f"{path}: holds no keys; name the YAML file that the peer's command is given"])
    return values, lines


# --- the text of a pipeline -------------------------------------------------------------------------------------------


def pipeline_text(title: str, head: Sequence[str], stages: Sequence[Draft]) -> str:
    """Return the pipeline file: each field of a stage, and beside it the key that it was carried over from."""
    lines = [*(f"# {_one_line(line)}".rstrip() for line in head), f"name: {_scalar(title)}", "stages:"]
    for stage in stages:
        lines.append(f"  {stage.name}:")
        names = dict.fromkeys(str(at[0]) for at in stage.fields)
        for name in sorted(names, key=lambda name: name in ("train", "how")):
            lines += _field(stage, name)
    return "\n".join(lines) + "\n"


def _field(stage: Draft, name: str) -> Iterator[str]:
    """Yield the lines of a field, those inside it below."""
    if (name,) in stage.fields:
        value, origin = stage.fields[(name,)]
        yield from _lines("    ", name, value, origin)
        return
    yield f"    {name}:"
    for at, (value, origin) in stage.fields.items():
        if at[0] == name:
            yield from _lines("      ", str(at[1]), value, origin)


def _lines(indent: str, name: str, value: Any, origin: str) -> Iterator[str]:
    comment = f"  # {_one_line(origin)}" if origin and origin != name else ""
    if isinstance(value, Mapping) and value:
        yield f"{indent}{_scalar(name)}:{comment}"
        for key, inner in value.items():
            yield from _lines(indent + "  ", str(key), inner, "")
    else:
        yield f"{indent}{_scalar(name)}: {_scalar(value)}{comment}"


def _one_line(text: str) -> str:
    """Return a text that no line of a peer's file can lead out of a comment."""
    return re.sub(r"[\r\n\x85\u2028\u2029]+", " ", text)


def _scalar(value: Any) -> str:
    """Return a value as YAML 1.2 reads it back; lists and texts that need quotes as JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./@+-]*(:[\w./@+-]+)*", value)
    if plain and value.lower() not in ("true", "false", "null", "yes", "no", "on", "off", "y", "n"):
        return str(value)
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
