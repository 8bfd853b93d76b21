"""The JSON schema of pipeline files, for editors: what the classes declare, with the docstrings of their fields."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, TypeAdapter, create_model

from align_pipeline.pipeline.config import Top
from align_pipeline.pipeline.stage import Config, model_in
from align_pipeline.stages import STAGES


def schema() -> dict[str, Any]:
    """Return the schema of a file that is a pipeline, or one stage alone.

    Fields that the top level of a file can supply are not required of a stage.
    """
    variants: list[Any] = []
    for cls in STAGES.values():
        fields: dict[str, Any] = {"type": (cls.model_fields["type"].annotation, ...)}
        for name in Top.model_fields.keys() & cls.model_fields.keys():
            if cls.model_fields[name].is_required():
                fields[name] = (cls.model_fields[name].rebuild_annotation(), None)
        variants.append(create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, **fields))
    stage: Any = Annotated[Union[tuple(variants)], Field(discriminator="type")]  # noqa: UP007 - built from a table
    pipeline: Any = create_model("Pipeline", __base__=Top, __doc__=Top.__doc__, stages=(dict[str, stage], ...))
    whole = TypeAdapter[Any](Union[pipeline, stage]).json_schema()  # noqa: UP007
    for one in _with_inner([Top, *STAGES.values()]):
        definition = whole["$defs"].get("Pipeline" if one is Top else one.__name__, {})
        for name, text in field_docstrings(one).items():
            if name in definition.get("properties", {}):
                definition["properties"][name]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A pipeline of align", **whole}


def _with_inner(classes: Iterable[type[Config]]) -> set[type[Config]]:
    """Return configuration classes and those that their fields hold."""
    found: set[type[Config]] = set()
    for cls in classes:
        inner = [model_in(info.annotation) for info in cls.model_fields.values()]
        found |= {cls} | _with_inner(one for one in inner if one is not None)
    return found


def field_docstrings(cls: type[BaseModel]) -> dict[str, str]:
    """Return field -> the docstring below it, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in itertools.pairwise(body.body):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
                found[field.target.id] = inspect.cleandoc(text)
    return found
