"""YAML, read by the rules of YAML 1.2's core schema and with the line of every place.

PyYAML's own rules give surprises: `1e-4` is text there, `no` is false, and of two equal keys the last one wins in
silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align_pipeline.pipeline.errors import ConfigError
from align_pipeline.pipeline.inputs import missing_file

Place = tuple[str | int, ...]
"""Where in the file: the keys from the top."""

MOST_VALUES = 20_000
"""Values of a file once its aliases are written out; ten lines of aliases can stand for billions."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema on top of PyYAML's parser."""

    merges = False
    """Whether `<<: *defaults` takes over the keys of another mapping, as YAML 1.1 has it."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def read(file: Path, problems: list[str], *, merges: bool = False) -> tuple[Any, dict[Place, int]]:
    """Return the file's value and the line of each place in it; duplicate keys become problems.

    With `merges`, merge keys are followed; else they are a problem too.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{missing_file(file.absolute())}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"]) from None
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(text)
        loader.merges = merges
        node = loader.get_single_node()
        if node and (problem := _too_large(node, {})):
            raise ConfigError([f"{file}:{problem}"])
        value = _construct(loader, node, (), lines, file, problems) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = '; quote a rule, as in "> 0.5"' if re.search(r"[:{,]\s*>=?\s*[\w.]", _line(text, line)) else ""
        raise ConfigError([f"{file}:{line}: not YAML: {error.problem or error.context}{hint}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}:1: not YAML: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise ConfigError([f"{file}:1: an alias holds itself, or the nesting is too deep"]) from None
    return value, lines


def _too_large(node: yaml.Node, sizes: dict[int, int]) -> str | None:
    """Name the innermost place that stands for too many values; `sizes` gets how many each node stands for."""
    if id(node) in sizes:
        return None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    for part in parts:
        if problem := _too_large(part, sizes):
            return problem
    sizes[id(node)] = size = 1 + sum(sizes[id(part)] for part in parts)
    if size <= MOST_VALUES:
        return None
    line = node.start_mark.line + 1
    return f"{line}: stands for {size:,} values with its aliases, more than {MOST_VALUES:,}; use fewer aliases here"


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1] if number <= len(lines) else ""


def _construct(
    loader: _Loader, node: yaml.Node, path: Place, lines: dict[Place, int], file: Path, problems: list[str]
) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in _merged(node) if loader.merges else node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            line = key_node.start_mark.line + 1
            if key == "<<":
                problems.append(f"{file}:{line}: {dotted((*path, key))}: merge keys are not read; write the fields out")
                continue
            if key in mapping:
                first = lines[(*path, key)]
                problems.append(
                    f"{file}:{line}: {dotted((*path, key))}: written twice, first in line {first}; delete one"
                )
                continue
            lines[(*path, key)] = line
            mapping[key] = _construct(loader, value_node, (*path, key), lines, file, problems)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), lines, file, problems) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{file}:{node.start_mark.line + 1}: {dotted(path)}: {' '.join(str(error).split())}")
        return None


def _merged(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return a mapping's keys and values, and those of the mappings that it merges: its own win, then the first."""
    pairs = [pair for pair in node.value if pair[0].value != "<<"]
    for key, value in node.value:
        others = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.value != "<<":
            continue
        if not all(isinstance(other, yaml.MappingNode) for other in others):
            pairs.append((key, value))
            continue
        for other in others:
            known = [own.value for own, _ in pairs]
            pairs += [pair for pair in _merged(other) if pair[0].value not in known]
    return pairs


def override(raw: dict[str, Any], places: dict[Place, str], text: str, problems: list[str]) -> None:
    """Write one `a.b.c=value` into the file's value."""
    name, equals, value = text.partition("=")
    place = f"--set {text}"
    keys = name.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"{place}: write --set stages.dpo.beta=0.2")
        return
    target = raw
    for key in keys[:-1]:
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            problems.append(f"{place}: {key} is no mapping, so nothing can be set inside it")
            return
        target = inner
    try:
        loader = _Loader(json.dumps(value) if value.lstrip().startswith(">") else value)  # a rule, no folded text
        node = loader.get_single_node()
        if node and (problem := _too_large(node, {})):
            problems.append(f"{place}:{problem}")
            return
        target[keys[-1]] = _construct(loader, node, (), {}, Path(place), problems) if node else None
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(f"{place}: not YAML: {' '.join(str(error).split())}")
        return
    for end in range(1, len(keys) + 1):
        places.setdefault(tuple(keys[:end]), place)
    places[tuple(keys)] = place


def dotted(path: Place) -> str:
    """Return `stages.dpo.beta`."""
    return ".".join(str(part) for part in path)


def place_of(places: Mapping[Place, str], file: Path, path: Place) -> str:
    """Return `file:line: a.b.c`, with the line of the nearest place above that is in the file."""
    nearest = next((places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in places), f"{file}:1")
    return f"{nearest}: {dotted(path)}" if path else nearest
