"""Turn rows into the token ids that trainers take, given a tokenizer and its chat template.

Plain text gets the tokenizer's own BOS and one end token; conversations get what the chat template says and no more.
A prompt and its answer are tokenised together and split where the prompt's own ids stop being a prefix, as TRL does,
so that the ids of training are those of one running text. Rows of token ids are taken exactly.
Left out: tools, images, and templates that need further arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from align_pipeline.data.rows import (
    Chat,
    Content,
    Example,
    ExampleIds,
    Message,
    Preference,
    PreferenceIds,
    Prompt,
    PromptIds,
    Row,
    Task,
    Text,
    Unpaired,
    UnpairedIds,
)
from align_pipeline.pipeline.errors import AlignError, DataError

IGNORED = -100
"""The label of a token that is read but not learnt."""

NO_END = -1
"""Stands for the end token of a turn where no row is a conversation."""

Encoded = dict[str, Any]
Loss = Literal["assistant", "all"]


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that is used here."""

    @property
    def chat_template(self) -> Any: ...
    @property
    def eos_token(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def bos_token_id(self) -> Any: ...
    @property
    def all_special_ids(self) -> Any: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def __call__(self, text: str, /, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], /, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Stats:
    """What `encode_all` made: sums over the sequences that a model reads (a pair is two)."""

    rows: int
    tokens: int
    """After cutting."""
    truncated: int
    """Rows whose answer was cut at `max_length`."""
    longest: int
    """Tokens in the longest sequence before cutting."""


def encode_all(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, *, max_length: int | None, loss_on: Loss = "assistant"
) -> tuple[list[Encoded], Stats]:
    """Encode every row for `task`; raise one DataError with the address of every row that cannot be."""
    end_id = check_template(tokenizer) if any(_conversational(row) for row in rows) else NO_END
    encode = _encoder(task, tokenizer, loss_on)
    encoded: list[Encoded] = []
    problems: list[str] = []
    tokens = truncated = longest = 0
    for row in rows:
        try:
            whole = encode(row, end_id)
            cut = whole if task == "prompt" else _cut(whole, row.where, max_length)
        except DataError as error:
            problems += error.problems
            continue
        before, after = _lengths(whole), _lengths(cut)
        truncated += before != after
        tokens += sum(after)
        longest = max(longest, *before)
        encoded.append(cut)
    with_margin = [isinstance(row, Preference | PreferenceIds) and row.margin is not None for row in rows]
    if any(with_margin) and not all(with_margin):
        where = rows[with_margin.index(False)].where
        problems.append(f"{where}: margin: missing, other rows have one; give every row a margin, or none")
    if problems:
        raise DataError(problems)
    return encoded, Stats(len(encoded), tokens, truncated, longest)


def encode_example(
    row: Row, tokenizer: Tokenizer, *, max_length: int | None, loss_on: Loss = "assistant"
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels`, equally long and at most `max_length`.

    Learnt are: of a Text everything; of an Example the answer; of a Chat the assistant turns; with `loss_on="all"`
    everything. Raises DataError when the prompt alone fills `max_length` or the template does not fit the row.
    """
    return _cut(_encoder("sft", tokenizer, loss_on)(row, _end_id(row, tokenizer)), row.where, max_length)


def encode_preference(row: Row, tokenizer: Tokenizer, *, max_length: int | None) -> Encoded:
    """Return `prompt_ids`, `chosen_ids`, `rejected_ids` and, where the row has one, `margin`.

    Prompt and answer together are at most `max_length` long; raises DataError as `encode_example` does.
    """
    return _cut(_preference(row, tokenizer, _end_id(row, tokenizer)), row.where, max_length)


def encode_unpaired(row: Row, tokenizer: Tokenizer, *, max_length: int | None) -> Encoded:
    """Return `prompt_ids`, `completion_ids` and `label`; lengths and errors as for `encode_preference`."""
    return _cut(_unpaired(row, tokenizer, _end_id(row, tokenizer)), row.where, max_length)


def encode_prompt(row: Row, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return `prompt_ids`, whole: of a conversation with the header of the answer that is due."""
    return _prompt(row, tokenizer)


def check_template(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends an assistant turn, which generation must stop at.

    Raises AlignError when there is no chat template, when nothing that a model could learn to stop at ends the turn, or
    when BOS comes twice.
    """
    probe = (Message("user", "Question"), Message("assistant", "Answer"))
    text = _apply(tokenizer, probe, "chat template", tokenize=False)
    _, found, tail = text.rpartition("Answer")
    if not found:
        raise AlignError(
            "chat template: does not print the assistant's content, must hold it; set another chat_template:"
        )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end_id = next((token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special), None)
    if end_id is None:
        raise AlignError(
            f"chat template: nothing ends an assistant turn ({tail!r} follows the answer), a special token must, or "
            "the model never learns to stop; print {{ eos_token }} after the content, in a file set as chat_template:"
        )
    ids = _render(tokenizer, probe, "chat template")
    bos = tokenizer.bos_token_id
    if bos is not None and bos != end_id and ids.count(bos) > 1:
        raise AlignError(
            f"chat template: {ids.count(bos)} BOS tokens in one exchange, must be one; remove {{{{ bos_token }}}} from "
            "all but the start of the template and set that file as chat_template:"
        )
    return int(end_id)


def _encoder(task: Task, tokenizer: Tokenizer, loss_on: Loss) -> Callable[[Row, int], Encoded]:
    if task == "preference":
        return lambda row, end_id: _preference(row, tokenizer, end_id)
    if task == "unpaired":
        return lambda row, end_id: _unpaired(row, tokenizer, end_id)
    if task == "prompt":
        return lambda row, end_id: _prompt(row, tokenizer)
    return lambda row, end_id: _example(row, tokenizer, loss_on, end_id)


# One row: rows become ids, uncut.


def _example(row: Row, tokenizer: Tokenizer, loss_on: Loss, end_id: int) -> Encoded:
    if isinstance(row, Text):
        ids = _tokenize(tokenizer, row.text if row.finish == "length" else _ended(tokenizer, row.text))
        return {"input_ids": ids, "labels": list(ids)}
    if isinstance(row, Chat):
        ids = _render(tokenizer, row.messages, row.where)
        learnt = _assistant_mask(row, ids, tokenizer, end_id)
        labels = [token if keep else IGNORED for token, keep in zip(ids, learnt, strict=True)]
        return {"input_ids": ids, "labels": list(ids) if loss_on == "all" else labels}
    if isinstance(row, Example):
        prompt, (completion,) = _split(row.where, row.prompt, [row.completion], tokenizer, end_id, row.finish)
    elif isinstance(row, ExampleIds):
        prompt, completion = list(row.prompt_ids), list(row.completion_ids)
    else:
        raise TypeError(f"{type(row).__name__} is no row of task sft")
    ids = prompt + completion
    return {"input_ids": ids, "labels": list(ids) if loss_on == "all" else [IGNORED] * len(prompt) + completion}


def _preference(row: Row, tokenizer: Tokenizer, end_id: int) -> Encoded:
    if isinstance(row, Preference):
        prompt, (chosen, rejected) = _split(row.where, row.prompt, [row.chosen, row.rejected], tokenizer, end_id)
        if chosen == rejected:
            rule = "a pair must differ"
            raise DataError([f"{row.where}: chosen: equals rejected as token ids, {rule}; drop the row or fix the log"])
    elif isinstance(row, PreferenceIds):
        prompt, chosen, rejected = list(row.prompt_ids), list(row.chosen_ids), list(row.rejected_ids)
    else:
        raise TypeError(f"{type(row).__name__} is no row of task preference")
    encoded: Encoded = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return encoded if row.margin is None else {**encoded, "margin": row.margin}


def _unpaired(row: Row, tokenizer: Tokenizer, end_id: int) -> Encoded:
    if isinstance(row, Unpaired):
        prompt, (completion,) = _split(row.where, row.prompt, [row.completion], tokenizer, end_id)
    elif isinstance(row, UnpairedIds):
        prompt, completion = list(row.prompt_ids), list(row.completion_ids)
    else:
        raise TypeError(f"{type(row).__name__} is no row of task unpaired")
    return {"prompt_ids": prompt, "completion_ids": completion, "label": row.label}


def _prompt(row: Row, tokenizer: Tokenizer) -> Encoded:
    if isinstance(row, PromptIds):
        return {"prompt_ids": list(row.prompt_ids)}
    if not isinstance(row, Prompt):
        raise TypeError(f"{type(row).__name__} is no row of task prompt")
    if isinstance(row.prompt, str):
        ids = _tokenize(tokenizer, row.prompt)
    else:
        ids = _render(tokenizer, row.prompt, row.where, add_generation_prompt=True)
    if not ids:
        raise DataError([f"{row.where}: prompt: no token is left of it, a model needs at least one; drop the row"])
    return {"prompt_ids": ids}


def _split(
    where: str,
    prompt: Content,
    answers: Sequence[Content],
    tokenizer: Tokenizer,
    end_id: int,
    finish: str | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Return the ids of the prompt that all answers share, and those of each answer."""
    if isinstance(prompt, str):
        texts = [prompt + answer for answer in answers if isinstance(answer, str)]
        prompt_ids = _tokenize(tokenizer, prompt)
        wholes = [_tokenize(tokenizer, text if finish == "length" else _ended(tokenizer, text)) for text in texts]
    else:
        turns = [prompt + answer for answer in answers if isinstance(answer, tuple)]
        prompt_ids = _render(tokenizer, prompt, where, add_generation_prompt=True)
        wholes = [_render(tokenizer, messages, where) for messages in turns]
    shared = min(_common(prompt_ids, whole) for whole in wholes)
    if not isinstance(prompt, str):
        for whole in wholes:
            _check_end(where, whole[shared:], end_id, turns=1)
        if finish == "length":  # the turn was cut off, so its end is not to be learnt
            wholes = [whole[: len(whole) - 1 - whole[::-1].index(end_id)] for whole in wholes]
    if not shared:
        rule = "at least one token must belong to the prompt alone"
        raise DataError([f"{where}: prompt: runs into its answer, {rule}; end the prompt with a space or a line break"])
    if not all(len(whole) > shared for whole in wholes):
        raise DataError([f"{where}: completion: no token is left of it, nothing to learn; drop the row"])
    return prompt_ids[:shared], [whole[shared:] for whole in wholes]


def _assistant_mask(row: Chat, ids: list[int], tokenizer: Tokenizer, end_id: int) -> list[bool]:
    """Return for each token whether it belongs to an assistant turn, its end token included.

    A turn lies between the conversation up to it (with the header of an answer) and the conversation with it. This
    needs a template that prints a turn the same whatever follows; of others, the {% generation %} marks are used.
    The last turn may begin before the end of its header, as the answer of an `Example` may.
    """
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    mask = [False] * len(ids)
    for index in turns:
        last = index == len(row.messages) - 1
        before = _render(tokenizer, row.messages[:index], row.where, add_generation_prompt=True)
        through = ids if last else _render(tokenizer, row.messages[: index + 1], row.where)
        start, stop = _common(before, ids), _common(through, ids)
        if (start < len(before) and not last) or end_id not in ids[start:stop]:
            mask = _marked(row, ids, tokenizer)
            break
        mask[start:stop] = [True] * (stop - start)
    _check_end(row.where, [token for token, keep in zip(ids, mask, strict=True) if keep], end_id, len(turns))
    return mask


def _marked(row: Chat, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Return what the template's own marks say is the assistant's."""
    if not re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        raise DataError(
            [
                f"{row.where}: messages: the chat template prints an earlier answer differently once another turn "
                "follows, so the answers cannot be told apart; set chat_template: to one with {% generation %} marks, "
                "or keep only the last answer as prompt and completion"
            ]
        )
    output = _apply(
        tokenizer, row.messages, row.where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    if list(output["input_ids"]) != ids:
        raise AlignError(
            "chat template: two renderings of one conversation differ, must not; set another chat_template:"
        )
    return [bool(mark) for mark in output["assistant_masks"]]


def _check_end(where: str, learnt: list[int], end_id: int, turns: int) -> None:
    if learnt.count(end_id) < turns:
        rule = "the model would never learn to stop"
        remedy = "set chat_template: to one that ends an assistant turn within that turn"
        raise DataError(
            [f"{where}: messages: an answer's end token is not among the tokens to learn, {rule}; {remedy}"]
        )


# Text and conversations to ids.


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text with the tokenizer's BOS, once, and without an end token that the text does not have."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    ends = 1 if tokenizer.eos_token and text.endswith(tokenizer.eos_token) else 0
    if eos is not None and len(ids) > ends and ids[-1 - ends :] == [eos] * (1 + ends):
        ids = ids[:-1]
    return ids


def _ended(tokenizer: Tokenizer, text: str) -> str:
    eos = tokenizer.eos_token
    if not eos:
        raise AlignError("tokenizer: no eos_token, text rows need one to end with; set it in tokenizer_config.json")
    return text if text.endswith(eos) else f"{text}{eos}"


def _render(tokenizer: Tokenizer, messages: Sequence[Message], where: str, **options: Any) -> list[int]:
    return list(_apply(tokenizer, messages, where, tokenize=True, return_dict=True, **options)["input_ids"])


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], where: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise AlignError(
            "tokenizer: no chat template, rows of messages need one; set chat_template: to a file of one, "
            "start from a chat model, or give prompt and completion as text"
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError as error:
        remedy = "change the row or set another chat_template:"
        raise DataError([f"{where}: messages: the chat template refuses them ({error}); {remedy}"]) from error


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading ids are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# Lengths.


def _cut(encoded: Encoded, where: str, max_length: int | None) -> Encoded:
    """Cut answers on the right; a row must keep something to learn."""
    if max_length is None:
        return encoded
    if "input_ids" in encoded:
        cut = {key: value[:max_length] for key, value in encoded.items()}
        prompt = next((i for i, label in enumerate(encoded["labels"]) if label != IGNORED), len(encoded["labels"]))
    else:
        prompt = len(encoded["prompt_ids"])
        keys = ("chosen_ids", "rejected_ids", "completion_ids")
        cut = {key: value[: max(0, max_length - prompt)] if key in keys else value for key, value in encoded.items()}
    if prompt >= max_length:
        what = f"{prompt} tokens before the first answer, at most {max_length - 1} leave room for one"
        raise DataError([f"{where}: prompt: {what}; raise max_length or shorten the prompt"])
    return cut


def _lengths(encoded: Mapping[str, Any]) -> list[int]:
    """Return the length of each sequence that a model reads for this row."""
    if "input_ids" in encoded:
        return [len(encoded["input_ids"])]
    prompt = len(encoded["prompt_ids"])
    answers = [key for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in encoded]
    return [prompt + len(encoded[key]) for key in answers] or [prompt]


def _conversational(row: Row) -> bool:
    return isinstance(row, Chat) or isinstance(getattr(row, "prompt", None), tuple)


def _end_id(row: Row, tokenizer: Tokenizer) -> int:
    return check_template(tokenizer) if _conversational(row) else NO_END
