"""A pipeline file: YAML in, typed stages out, and every problem at once with its line.

Nothing here imports torch, and nothing is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from align_pipeline.pipeline import gates, graph
from align_pipeline.pipeline.errors import ConfigError, did_you_mean, near_or_all
from align_pipeline.pipeline.inputs import file_path, find_function, missing_file
from align_pipeline.pipeline.stage import (
    Config,
    File,
    InputField,
    Launch,
    Model,
    Stage,
    input_field,
    model_in,
    named,
    references,
)
from align_pipeline.pipeline.trainer_fields import trainer_fields, type_problem
from align_pipeline.pipeline.yaml_file import Place, override, place_of, read
from align_pipeline.stages import STAGES
from align_pipeline.stages.models import Quantize, Tuning
from align_pipeline.stages.owned import HOW_ONLY
from align_pipeline.stages.training import Lora


class Top(Config):
    """The top level of a pipeline file, its stages aside."""

    name: str | None = None
    """The pipeline's name: what it makes is listed in `DIR/NAME/manifest.json`. Default: the file's name."""
    model: Model | None = None
    """The model that stages start from when they name none."""
    tuning: Tuning | None = None
    """`lora` (an adapter beside frozen weights) or `full`, for stages that say nothing else."""
    lora: Lora | None = None
    """The adapter's shape, for stages that say nothing else."""
    quantize: Quantize | None = None
    """`4bit` holds the frozen weights in four bits (QLoRA); needs CUDA and bitsandbytes."""
    chat_template: File | None = None
    """A Jinja file, for a tokenizer without a chat template."""
    seed: int | None = None
    """The seed of stages that name none."""
    launch: Launch = Launch()
    """The machine it runs on: nothing that changes a result."""


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline file."""

    name: str
    file: Path
    launch: Launch
    stages: Mapping[str, Stage]
    places: Mapping[Place, str]

    @property
    def folder(self) -> Path:
        """Where relative paths and Python functions are looked for."""
        return self.file.parent

    def place(self, *path: str | int) -> str:
        """Return `file:line: a.b.c` for a place in the file, as far as it is there."""
        return place_of(self.places, self.file, path)


def load(file: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file; `overrides` are `a.b.c=value` and win over the file.

    Raises ConfigError with every problem that was found.
    """
    problems: list[str] = []
    raw, lines = read(file, problems)
    places: dict[Place, str] = {path: f"{file}:{line}" for path, line in lines.items()}
    if not isinstance(raw, dict):
        raise ConfigError(problems or [f"{file}:1: holds no mapping; a pipeline file has `name:` and `stages:`"])
    for text in overrides:
        override(raw, places, text, problems)
    if "type" in raw and "stages" not in raw:
        raw, places = _single(raw, places)
    checker = _Checker(file.absolute(), places, problems)
    pipeline = checker.check(raw)
    if problems:
        raise ConfigError(sorted(set(problems), key=_line_order))
    return cast(Pipeline, pipeline)


def check_stage(raw: Mapping[str, Any], file: Path, places: Mapping[Place, str], given: Collection[str]) -> Stage:
    """Check the settings of one stage that no file holds; `given` are the stages that it may read.

    Relative paths start at the folder of `file`. Raises ConfigError with every problem that was found.
    """
    cls = STAGES[raw["type"]]
    problems: list[str] = []
    checker = _Checker(file, dict(places), problems)
    stage: Stage | None = checker._validated(cls, raw, ())
    for field, (ref, marked) in named(cls, raw).items():
        at = tuple(field.split("."))
        if not ref.startswith("stage:"):
            checker._reference(at, ref, marked, {}, raw["type"])
        elif ref.removeprefix("stage:") not in given:
            checker.say(at, f"{ref!r}: of which file? Name what it made, as FILE:STAGE or by its key")
    if problems:
        raise ConfigError(sorted(set(problems)))
    assert stage is not None
    return stage


def _single(raw: dict[str, Any], places: dict[Place, str]) -> tuple[dict[str, Any], dict[Place, str]]:
    """Make a file that is one stage into a pipeline of that stage."""
    name = str(raw["type"])
    pipeline: dict[str, Any] = {key: raw[key] for key in ("name", "launch") if key in raw}
    stage = {key: value for key, value in raw.items() if key not in pipeline}
    moved = {
        path if path[:1] in {("name",), ("launch",)} else ("stages", name, *path): at for path, at in places.items()
    }
    return {**pipeline, "stages": {name: stage}}, moved


class _Checker:
    """Collects problems instead of stopping at the first one."""

    def __init__(self, file: Path, places: dict[Place, str], problems: list[str]) -> None:
        self.file, self.places, self.problems = file, places, problems

    def say(self, path: Place, text: str) -> None:
        self.problems.append(f"{place_of(self.places, self.file, path)}: {text}")

    def check(self, raw: dict[str, Any]) -> Pipeline | None:
        written = raw.get("stages")
        top = self._validated(Top, {key: value for key, value in raw.items() if key != "stages"}, ())
        name = top.name if top and top.name else self.file.stem
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in {"store", "work", "locks", "cache"}:
            self.say(("name",), f"{name!r} cannot name a folder of the store; use letters, digits, - and _")
        if not isinstance(written, dict) or not written:
            self.say(("stages",), "missing; a pipeline has at least one stage, as `stages:` and below it `sft:`")
            return None
        if top:
            for field in ("model", "chat_template"):
                marked, ref = input_field(Top.model_fields[field]), getattr(top, field)
                if marked and ref:
                    self._reference((field,), ref, marked, {}, "")
        shared = {key: raw[key] for key in Top.model_fields if key in raw and key not in {"name", "launch"}}
        stages: dict[str, Stage] = {}
        for stage_name, settings in written.items():
            stage = self._stage(stage_name, settings, shared)
            if stage:
                stages[stage_name] = stage
        types = {name: STAGES.get(str(s.get("type"))) for name, s in written.items() if isinstance(s, dict)}
        for stage_name, settings in written.items():
            cls = types.get(stage_name)
            for field, (ref, marked) in (named(cls, settings) if cls else {}).items():
                self._reference(("stages", stage_name, *field.split(".")), ref, marked, types, stage_name)
        edges = _edges(written)
        self._cycle(edges)
        for stage_name, stage in stages.items():
            for gate, closed in gates.problems(stage_name, stage, edges, stages):
                self.say(("stages", stage_name, "require", gate), closed)
            for field, (ref, _) in references(stage).items():
                maker = stages.get(ref.removeprefix("stage:")) if ref.startswith("stage:") else None
                problem = stage.misfit(field, maker) if maker else None
                if problem:
                    self.say(("stages", stage_name, *field.split(".")), problem)
        launch = top.launch if top else Launch()
        return Pipeline(name, self.file, launch, stages, self.places)

    def _stage(self, name: str, settings: Any, shared: Mapping[str, Any]) -> Stage | None:
        path: Place = ("stages", name)
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            self.say(path, "a stage's name consists of letters, digits, - and _")
            return None
        if not isinstance(settings, dict):
            self.say(path, "must be a mapping that starts with `type:`")
            return None
        kind = settings.get("type")
        if not isinstance(kind, str) or kind not in STAGES:
            if kind is None:
                self.say(path, f"type: missing; choose {', '.join(STAGES)}")
            else:
                self.say((*path, "type"), f"{kind!r} is not a stage{near_or_all(str(kind), STAGES)}")
            return None
        cls = STAGES[kind]
        inherited = cls.inherit(settings, shared)
        raw, valid = self._train({**settings, **inherited}, cls, path)
        only_above = {name: value for name, value in inherited.items() if name not in settings}
        stage = self._validated(cls, raw, path, only_above)
        return stage if valid else None

    def _train(self, settings: dict[str, Any], cls: type[Stage], path: Place) -> tuple[dict[str, Any], bool]:
        """Check `train:` against the trainer's configuration; move what changes only speed or memory to `how`."""
        train = settings.get("train")
        if cls.trainer_config is None or not isinstance(train, dict):
            return settings, True
        fields = trainer_fields(*cls.trainer_config)
        before = len(self.problems)
        for field, value in train.items():
            at = (*path, "train", field)
            if field in cls.owned:
                self.say(at, _owned(cls.owned[field]))
            elif field not in fields:
                self.say(
                    at,
                    f"{cls.trainer_config[1]} has no such field{did_you_mean(field, fields.keys() - cls.owned.keys())}",
                )
            else:
                problem = type_problem(fields[field], value)
                if problem:
                    self.say(at, problem)
        kept = {field: value for field, value in train.items() if field not in HOW_ONLY}
        moved = {field: value for field, value in train.items() if field in HOW_ONLY}
        how = settings.get("how") or {}
        if isinstance(how, dict) and "train" in how:
            self.say((*path, "how", "train"), "is filled by align; write the fields under `train:` of the stage")
        if moved and isinstance(how, dict):
            settings = {**settings, "how": {**how, "train": moved}}
        return {**settings, "train": kept}, len(self.problems) == before

    def _validated(
        self, cls: type[Any], raw: Mapping[str, Any], path: Place, inherited: Mapping[str, Any] | None = None
    ) -> Any:
        """Validate strictly, as JSON would be: text is no number, and a list is a tuple."""
        try:
            return TypeAdapter(cls).validate_json(json.dumps(raw, allow_nan=True), strict=True)
        except ValidationError as error:
            problems = [(_location(problem), problem) for problem in error.errors(include_url=False)]
            for index, (location, problem) in enumerate(problems):
                if not _is_the_other_kind(index, problems):
                    self._explain(cls, problem, location, path, inherited or {})
        except ValueError as error:  # a value that JSON has no word for
            self.say(path, str(error))
        return None

    def _explain(
        self, cls: type[Any], problem: ErrorDetails, location: Place, path: Place, inherited: Mapping[str, Any]
    ) -> None:
        at: Place = location if location and location[0] in inherited else (*path, *location)
        field = str(location[-1]) if location else ""
        kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
        if kind == "extra_forbidden":
            self.say(at, f"unknown field{self._unknown(cls, location, path)}")
        elif kind == "missing":
            top = (
                f"; write it here, or once as `{field}:` at the top of the file"
                if path and field in Top.model_fields
                else ""
            )
            self.say(at, f"missing{top or '; this stage needs it'}")
        elif kind == "value_error":
            self.say(at, str(context.get("error", problem["msg"])))
        else:
            self.say(at, f"{rule_of(kind, problem['msg'], context)}, got {shown_value(value)}{_hint(kind, value)}")

    def _unknown(self, cls: type[Any], location: Place, path: Place) -> str:
        """Say what an unknown field may have been meant to be, here or elsewhere in the file."""
        word = str(location[-1])
        owner: Any = cls
        for part in location[:-1]:
            info = getattr(owner, "model_fields", {}).get(part)
            owner = model_in(info.annotation) if info else None
        known = [field for field in getattr(owner, "model_fields", {}) if field != "train" or owner is cls]
        near = did_you_mean(word, [*known, "stages"] if not path else known)
        if near:
            return near
        if path and len(location) == 1:
            if word in cls.owned:
                return f"; it {_owned(cls.owned[word])}"
            if cls.trainer_config and word in trainer_fields(*cls.trainer_config):
                return f"; a field of {cls.trainer_config[1]} goes below `train:`"
            if word in Top.model_fields:
                return f"; `{word}:` belongs at the top of the file"
        if not path:
            owners = [name for name, stage in STAGES.items() if word in stage.model_fields]
            if owners:
                return f"; it is a field of a stage ({', '.join(owners)})"
        return f"; known here: {', '.join(known)}"

    def _reference(
        self, path: Place, ref: str, marked: InputField, types: Mapping[str, type[Stage] | None], stage: str
    ) -> None:
        """Check what can be known of a reference before anything runs."""
        scheme, _, rest = ref.partition(":")
        problem: str | None = None
        if scheme == "stage":
            problem = _stage_problem(rest, marked, types, stage)
        elif scheme == "file":
            target = file_path(ref, self.file.parent)
            if max(map(len, target.parts)) > 255:
                problem = f"{ref[:40]}...: no file has so long a name"
            elif not marked.file:
                problem = f"{ref!r}: a file cannot be used here; write module:function"
            elif not target.exists():
                problem = missing_file(target)
        elif scheme == "hub":
            problem = None if marked.hub else f"{ref!r}: nothing on the hub can be used here"
        elif marked.function:
            _, problem = find_function(ref, self.file.parent)
        else:
            problem = f"{ref!r} names no input; write stage:NAME, hub:ORG/NAME[@REV] or file:PATH"
        if problem:
            self.say(path, problem)

    def _cycle(self, edges: Mapping[str, Sequence[str]]) -> None:
        """Find a cycle among the stages as written, so that other errors do not hide it."""
        cycle = graph.find_cycle(edges)
        if cycle:
            self.say(("stages", cycle[0]), f"a cycle: {' -> '.join(cycle)}; one of them must read something else")


def _stage_problem(name: str, marked: InputField, types: Mapping[str, type[Stage] | None], reader: str) -> str | None:
    """Return why `stage:NAME` cannot be read here; `reader` is empty at the top level of the file."""
    if not reader:
        return f"'stage:{name}': the top level starts from hub: or file:; name the stage where it is read"
    if not marked.kinds:
        return f"'stage:{name}': no stage makes this; name a file or a function"
    if name not in types:
        return f"no stage {name!r} in this file{near_or_all(name, types)}"
    maker = types[name]
    if maker is None or maker.produces in marked.kinds:
        return None
    fitting = [other for other, cls in types.items() if cls and cls.produces in marked.kinds and other != reader]
    wanted, made = " or ".join(marked.kinds).replace("_", " "), maker.produces.replace("_", " ")
    advice = f"use stage:{fitting[0]}" if fitting else f"add a stage that makes a {wanted}"
    return f"stage {name!r} makes a {made}, but a {wanted} is needed here; {advice}"


def _owned(ours: str) -> str:
    return f"is set by align; use {ours}" if ours else "is set by align and cannot be changed"


def _edges(written: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the stages that each stage names, as written: whatever else is wrong with it."""
    return {
        name: [text.removeprefix("stage:") for text in _texts(settings) if text.startswith("stage:")]
        for name, settings in written.items()
    }


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _location(problem: ErrorDetails) -> Place:
    """Return the keys that lead to a problem, without pydantic's own names for the branches of a union."""
    return tuple(part for part in problem["loc"] if not _is_union_branch(part))


def _is_the_other_kind(index: int, problems: Sequence[tuple[Place, ErrorDetails]]) -> bool:
    """Tell whether a problem only says that a field of two possible kinds is not of the one that was not meant."""
    location, problem = problems[index]
    if not problem["type"].endswith("_type"):
        return False
    return any(
        i < index or len(other) > len(location) or not found["type"].endswith("_type")
        for i, (other, found) in enumerate(problems)
        if i != index and other[: len(location)] == location
    )


def _is_union_branch(part: str | int) -> bool:
    """Tell pydantic's own names for the branches of a union, which are no keys of the file."""
    return isinstance(part, str) and bool(re.search(r"[\[\]()]|^(str|int|float|bool|none|dict|list)$", part))


def rule_of(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """Say a pydantic rule the way the rest of our messages speak."""
    bounds = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, bound = bounds[kind]
        return f"must be {words} {context[bound]:g}"
    types = {
        "int": "a whole number",
        "float": "a number",
        "string": "text",
        "bool": "true or false",
        "dict": "a mapping",
        "model": "a mapping",
        "tuple": "a list",
        "list": "a list",
    }
    for prefix, words in types.items():
        if kind.startswith(f"{prefix}_"):
            return f"must be {words}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "finite_number":
        return "must be a finite number"
    return message[0].lower() + message[1:]


def shown_value(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}" if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."


def _hint(kind: str, value: Any) -> str:
    if isinstance(value, str) and kind.startswith(("int", "float", "bool")):
        try:
            number = float(value)
        except ValueError:
            return ""
        return "; write it without quotes" if math.isfinite(number) and not kind.startswith("bool") else ""
    return ""


def _line_order(problem: str) -> tuple[int, str]:
    found = re.match(r"[^:]*:(\d+): ", problem)
    return (int(found.group(1)) if found else 0, problem)
