"""Prompts, their answers and their scores: what `sample` and `evaluate` share.

A scorer is a reward model, which reads the answers' token ids as they were drawn (text that is tokenised again loses
its end token), or a Python function in TRL's reward-function signature, which reads their text.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from align_pipeline.data.rows import Content, Prompt, PromptIds, Row
from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages.rollout import Rollout, Sampler, Sampling

PROMPTS_AT_ONCE = 256
"""Prompts that are answered before their answers are kept: what a kill can cost."""

Answers: TypeAlias = list[list[Rollout]]
"""For each prompt its answers."""
Scores: TypeAlias = list[list[float]]
"""For each prompt the scores of its answers."""


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as its file wrote it and as a model gets it."""

    where: str
    prompt: str | list[dict[str, str]]
    """Text, or messages; the text of the ids where the row has only ids."""
    ids: tuple[int, ...]
    columns: dict[str, Any]
    """The row's other columns, for reward functions."""


def ask(rows: Sequence[Row], tokenizer: Any) -> list[Asked]:
    """Encode prompts; raise DataError when there are none."""
    from align_pipeline.data.chat import encode_all

    if not rows:
        raise DataError(["prompts: no rows, there must be at least one to answer; check the file"])
    encoded, _ = encode_all(rows, "prompt", tokenizer, max_length=None)
    asked = []
    for row, ids in zip(rows, encoded, strict=True):
        assert isinstance(row, Prompt | PromptIds)
        prompt = as_written(row.prompt) if isinstance(row, Prompt) else str(tokenizer.decode(ids["prompt_ids"]))
        asked.append(Asked(row.where, prompt, tuple(ids["prompt_ids"]), dict(row.extra)))
    return asked


def as_written(content: Content) -> str | list[dict[str, str]]:
    """Return text as it is, and messages as TRL writes them."""
    if isinstance(content, str):
        return content
    return [{"role": message.role, "content": message.content} for message in content]


def vocabulary_differs(one: Any, other: Any) -> str | None:
    """Say how the token ids of two tokenizers differ in meaning; None when they mean the same."""
    first, second = one.get_vocab(), other.get_vocab()
    if first == second:
        return None
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} tokens"
    token = min(token for token in first if second.get(token) != first[token])
    return f"{token!r} is {first[token]} in one and {second.get(token)} in the other"


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_all(
    sampler: Sampler,
    asked: Sequence[Asked],
    n: int,
    sampling: Sampling,
    kept: Path,
    report: Callable[[int, int], None],
    keys: Sequence[int | str] | None = None,
) -> Answers:
    """Return `n` answers to each prompt, keeping them in the file `kept` and going on from what it holds.

    `keys` name the prompts in the seeds of their answers. None: their row numbers, so that every model that is asked
    the same prompts draws with the same seeds.
    `report` is called with the numbers of prompts and tokens done.
    """
    answers = read_kept(kept, len(asked))
    tokens = sum(len(answer.ids) for row in answers for answer in row)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file:
        while len(answers) < len(asked):
            chunk = range(len(answers), min(len(answers) + PROMPTS_AT_ONCE, len(asked)))
            names = list(chunk) if keys is None else keys[chunk.start : chunk.stop]
            drawn = sampler.sample([asked[i].ids for i in chunk], n, sampling, keys=names)
            for row in drawn:
                plain = [{"ids": answer.ids, "logprobs": answer.logprobs, "finish": answer.finish} for answer in row]
                file.write(json.dumps(plain, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
            answers += drawn
            tokens += sum(len(answer.ids) for row in drawn for answer in row)
            report(len(answers), tokens)
    return answers


def read_kept(file: Path, total: int) -> Answers:
    """Return the answers of whole chunks and cut the rest off: batches are then those of a run that was not killed."""
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    whole = len([line for line in lines if line.endswith(b"\n")])
    whole = whole if whole == total else whole // PROMPTS_AT_ONCE * PROMPTS_AT_ONCE
    with file.open("r+b") as handle:
        handle.truncate(sum(map(len, lines[:whole])))
    return [
        [Rollout(tuple(answer["ids"]), tuple(answer["logprobs"]), answer["finish"]) for answer in json.loads(line)]
        for line in lines[:whole]
    ]


def text_of(answer: Rollout, tokenizer: Any) -> str:
    """Return what an answer says, without special tokens."""
    return str(tokenizer.decode(list(answer.ids), skip_special_tokens=True))


# --- scores -----------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Whatever gives each answer a number, the higher the better."""

    @property
    def limit(self) -> int | None:
        """Tokens of a prompt and its answer that it reads; None for any number."""
        ...

    def score(self, asked: Sequence[Asked], answers: Answers) -> Scores:
        """Return one finite number for each answer, in the shape of `answers`."""
        ...


def load_scorer(source: Resolved, tokenizer: Any, micro_batch: int | None) -> Scorer:
    """Return the function or the reward model that an input names; `tokenizer` is that of the answers."""
    if source.function is not None:
        return FunctionScorer(source.function, load_function(source), tokenizer)
    from align_pipeline.stages.models import load_reward, load_tokenizer

    difference = vocabulary_differs(load_tokenizer(source), tokenizer)
    if difference:
        raise AlignError(
            f"scorer: {source.ref}: its tokenizer is not the models' ({difference}), a reward model reads their token "
            "ids; name a reward model of the same family, or a function"
        )
    return ModelScorer(source.ref, lambda: load_reward(source), micro_batch)


class ModelScorer:
    """A reward model on the ids of prompt and answer; its weights are loaded when the first answers come."""

    def __init__(self, name: str, load: Callable[[], Any], micro_batch: int | None = None) -> None:
        self.name = name
        self.load = load
        self.model: Any = None
        self.micro_batch = micro_batch or 16

    @property
    def limit(self) -> int | None:
        from align_pipeline.stages.rollout import context

        if self.model is None:
            self.model = self.load()
        return context(self.model)

    def score(self, asked: Sequence[Asked], answers: Answers) -> Scores:
        from align_pipeline.stages.models import score

        limit = self.limit
        pairs = [(question, answer) for question, row in zip(asked, answers, strict=True) for answer in row]
        for question, answer in pairs:
            length = len(question.ids) + len(answer.ids)
            if limit is not None and length > limit:
                raise AlignError(
                    f"{question.where}: prompt and answer have {length} tokens, {self.name} reads {limit}; shorten the "
                    "prompt or lower max_new_tokens"
                )
        # Rows of one length share a batch; the sort is stable, so the batches are always the same.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].ids) + len(pairs[i][1].ids))
        found = score(self.model, [(*pairs[i][0].ids, *pairs[i][1].ids) for i in order], self.micro_batch)
        flat = [0.0] * len(pairs)
        for i, value in zip(order, found, strict=True):
            if not math.isfinite(value):
                raise AlignError(
                    f"{pairs[i][0].where}: {self.name} gave {value}, scores are finite; its weights are damaged, or it "
                    "overflows in this dtype"
                )
            flat[i] = value
        return in_shape(flat, answers)


def in_shape(flat: Sequence[float], answers: Answers) -> Scores:
    """Return one number for each answer, prompt after prompt, in the shape of the answers."""
    values = iter(flat)
    return [[next(values) for _ in row] for row in answers]


def load_function(source: Resolved) -> Callable[..., Any]:
    """Import `module:function`, from the pipeline file's folder first."""
    module, _, name = (source.function or "").partition(":")
    if source.search_path and source.search_path not in sys.path:
        sys.path.insert(0, source.search_path)
        importlib.invalidate_caches()
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise AlignError(
            f"{source.ref}: it cannot be imported ({type(error).__name__}: {error}); try "
            f"`python -c 'from {module} import {name}'` in {source.search_path}"
        ) from error
    if not callable(found):
        raise AlignError(f"{source.ref}: it is a {type(found).__name__}, a scorer is a function; name the function")
    return found  # type: ignore[no-any-return]


class FunctionScorer:
    """A Python function in TRL's reward-function signature: `f(prompts, completions, completion_ids, **columns)`.

    Every argument is a list with one element for each answer; the function returns one number for each. Answers to
    prompts that are messages are messages too. It may get arguments that it has no use for, so it takes `**kwargs`.
    """

    limit: int | None = None

    def __init__(self, name: str, function: Callable[..., Any], tokenizer: Any) -> None:
        self.name = name
        self.function = function
        self.tokenizer = tokenizer

    def score(self, asked: Sequence[Asked], answers: Answers) -> Scores:
        pairs = [(question, answer) for question, row in zip(asked, answers, strict=True) for answer in row]
        columns = sorted({name for question in asked for name in question.columns})
        flat = self._checked(pairs, self._call(pairs, columns))
        return in_shape(flat, answers)

    def _arguments(self, pairs: Sequence[tuple[Asked, Rollout]], columns: Sequence[str]) -> dict[str, list[Any]]:
        completions: list[Any] = []
        for question, answer in pairs:
            text = text_of(answer, self.tokenizer)
            chat = not isinstance(question.prompt, str)
            completions.append([{"role": "assistant", "content": text}] if chat else text)
        return {
            **{name: [question.columns.get(name) for question, _ in pairs] for name in columns},
            "prompts": [question.prompt for question, _ in pairs],
            "completions": completions,
            "completion_ids": [list(answer.ids) for _, answer in pairs],
        }

    def _call(self, pairs: Sequence[tuple[Asked, Rollout]], columns: Sequence[str]) -> Any:
        try:
            return self.function(**self._arguments(pairs, columns))
        except Exception as error:
            where = self._culprit(pairs, columns)
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise AlignError(
                f"{where}: {self.name} raised {type(error).__name__}: {error} "
                f"({Path(last.filename).name}:{last.lineno}); call it on that row as "
                "f(prompts=[...], completions=[...], completion_ids=[...], **columns) and mend it"
            ) from error

    def _culprit(self, pairs: Sequence[tuple[Asked, Rollout]], columns: Sequence[str]) -> str:
        """Return the first row on which the function raises alone, else where its rows begin and end."""
        for question, answer in pairs:
            try:
                self.function(**self._arguments([(question, answer)], columns))
            except Exception:
                return question.where
        return f"{pairs[0][0].where} to {pairs[-1][0].where}"

    def _checked(self, pairs: Sequence[tuple[Asked, Rollout]], result: Any) -> list[float]:
        result = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(result, list | tuple):
            raise AlignError(f"{self.name} returned a {type(result).__name__}, a scorer returns a list of numbers")
        if len(result) != len(pairs):
            raise AlignError(
                f"{self.name} returned {len(result)} scores for {len(pairs)} answers ({pairs[0][0].where} to "
                f"{pairs[-1][0].where}), a scorer returns one for each"
            )
        found = []
        for (question, _), value in zip(pairs, result, strict=True):
            number = value.item() if hasattr(value, "item") else value
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise AlignError(
                    f"{question.where}: {self.name} returned {number!r}, a score is a finite number; return a number "
                    "for every answer"
                )
            found.append(float(number))
        return found
