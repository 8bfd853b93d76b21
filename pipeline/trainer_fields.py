"""The fields of TRL's and Transformers' trainer configurations, read from their source.

`train:` passes further fields through to such a dataclass. They are checked while the file is read, in milliseconds:
importing the dataclass would import torch. What is read is what is installed, so a new release needs no table here.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from align_pipeline.pipeline.errors import did_you_mean


@cache
def trainer_fields(module: str, name: str) -> Mapping[str, str]:
    """Return field -> annotation, inherited ones included, of a dataclass in an installed package.

    The module is read, not imported; base classes are followed through the imports of each module.
    """
    return dict(_fields(module, name))


def _fields(module: str, name: str) -> Iterator[tuple[str, str]]:
    path = _source(module)
    if path is None:
        return
    tree = _tree(path)
    classes = _classes(tree)
    imports: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin = _absolute(module, node)
            imports.update({alias.asname or alias.name: origin for alias in node.names})
    if name not in classes:
        if name in imports:
            yield from _fields(imports[name], name)
        return
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(module, base.id)
        elif isinstance(base, ast.Name) and base.id in imports:
            origin = imports[base.id]
            # `from transformers import TrainingArguments`: the package's front door is lazy, its module is not
            yield from _fields("transformers.training_args" if origin == "transformers" else origin, base.id)
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = ast.unparse(statement.annotation)
            if not annotation.startswith("ClassVar") and not statement.target.id.startswith("_"):
                yield statement.target.id, annotation


@cache
def optimizers() -> tuple[str, ...]:
    """Return the names that Transformers knows for `optim`, read from its enumeration; empty where there is none."""
    path = _source("transformers.training_args")
    names = _classes(_tree(path)).get("OptimizerNames") if path else None
    values = [one.value for one in (names.body if names else []) if isinstance(one, ast.Assign)]
    return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join([*package, node.module] if node.module else package)


def _source(module: str) -> Path | None:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


class _Names(dict[str, Any]):
    """What an annotation may name; enumerations of the library are written as text in YAML."""

    def __missing__(self, name: str) -> Any:
        return str if name in _Names.ENUMERATIONS else Any

    ENUMERATIONS = ("SchedulerType", "IntervalStrategy", "SaveStrategy", "OptimizerNames", "HubStrategy", "DebugOption")


def type_problem(annotation: str, value: Any) -> str | None:
    """Return what is wrong with a value for a field with this annotation; None when nothing is."""
    names = _Names(
        float=float,
        int=int,
        str=str,
        bool=bool,
        dict=dict,
        list=list,
        tuple=tuple,
        None_=None,
        Any=Any,
        Literal=Literal,
    )
    try:
        TypeAdapter(eval(annotation, {"__builtins__": {}}, names)).validate_python(value, strict=True)
    except ValidationError:
        return f"must be {annotation.replace(' | ', ' or ').replace('or None', 'or null')}, got {value!r}"
    if "OptimizerNames" in annotation and (known := optimizers()) and value not in known:
        near = did_you_mean(value, known) or "; choose adamw_torch, adafactor, sgd or another of its OptimizerNames"
        return f"must be an optimizer that Transformers knows, got {value!r}{near}"
    return None
