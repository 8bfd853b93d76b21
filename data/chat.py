"""Turn rows into the token ids that trainers take, given a tokenizer and its chat template.

Plain text gets the tokenizer's own BOS and one end token; conversations get what the chat template says and no more.
A plain prompt may be a rendered template, so special tokens that are written in it are those tokens; the tokens that
end an answer may stand at the end of a plain one only.
What is learnt of a conversation are the assistant's turns up to their end token, where a model that answers stops; what
a template prints after the last end token is left out of the row (`spans.py` finds the turns).
A prompt and its answer are tokenised together and split where the prompt's own ids stop being a prefix, as TRL does,
so that the ids of training are those of one running text. Rows of token ids are taken exactly.
Left out: tools, images, and templates that need further arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

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
from align_pipeline.data.sources import Bad
from align_pipeline.data.spans import Span, Template, common
from align_pipeline.data.spans import Tokenizer as Tokenizer
from align_pipeline.data.spans import check_template as check_template
from align_pipeline.pipeline.errors import AlignError, DataError

IGNORED = -100
"""The label of a token that is read but not learnt."""

Encoded = dict[str, Any]
Loss = Literal["assistant", "all"]


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


class Encoder:
    """Encode rows for one task, one at a time; it can be pickled, and used in forked processes.

    The chat template is checked at the first conversation, so that rows of text need none; what is wrong with it is an
    AlignError.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        *,
        max_length: int | None,
        loss_on: Loss = "assistant",
        vocabulary: int | None = None,
    ) -> None:
        """`vocabulary`: how many ids the model's embedding takes, by default as many as the tokenizer knows."""
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        self.vocabulary = vocabulary or len(tokenizer)
        self._knows_more = self.vocabulary < len(tokenizer)
        self._template: Template | None = None
        self._ending: re.Pattern[str] | None = None

    def __call__(self, row: Row) -> tuple[Encoded, int]:
        """Return what `encode_example` or its like returns, and how many tokens were cut off at `max_length`.

        Raises Bad for a row that cannot be used.
        """
        whole = self.whole(row)
        cut = self.cut(whole)
        return cut, sum(lengths(whole)) - sum(lengths(cut))

    def whole(self, row: Row) -> Encoded:
        """Return a row's ids before anything is cut off."""
        if isinstance(row, ExampleIds | PreferenceIds | UnpairedIds | PromptIds):
            _check_known(row, self.vocabulary)
        encode = {"preference": self._preference, "unpaired": self._unpaired, "prompt": self._prompt}
        encoded = encode.get(self.task, self._example)(row)
        if self._knows_more:
            self._check_tokens(encoded)
        return encoded

    def _check_tokens(self, encoded: Encoded) -> None:
        """Refuse text that holds a token which was added to the tokenizer and not to the model."""
        for key in ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"):
            for one in encoded.get(key, ()):
                if one >= self.vocabulary:
                    what = f"text holds {self.tokenizer.convert_ids_to_tokens(one)!r} (id {one})"
                    rule = f"the model's vocabulary has {self.vocabulary} ids (0 to {self.vocabulary - 1})"
                    remedy = "take it out, or use the tokenizer that belongs to the model"
                    raise Bad(f"{what}, {rule}; {remedy}", "bad value")

    def cut(self, whole: Encoded) -> Encoded:
        """Cut what is longer than `max_length`; prompts to answer are left whole."""
        if self.task == "prompt" or self.max_length is None:
            return whole
        cut = _cut(whole, self.max_length)
        if self.task == "preference" and cut["chosen_ids"] == cut["rejected_ids"]:
            what = f"equals rejected up to max_length ({self.max_length} tokens)"
            raise Bad(f"chosen: {what}, a pair must differ; raise max_length or drop the row", "equal sides")
        return cut

    @property
    def template(self) -> Template:
        if self._template is None:
            self._template = Template(self.tokenizer)
        return self._template

    @property
    def ending(self) -> re.Pattern[str]:
        """The tokens that end an answer: the tokenizer's own, and that of its chat template where that has one."""
        if self._ending is None:
            ends = {str(self.tokenizer.eos_token)} if self.tokenizer.eos_token else set()
            if self.tokenizer.chat_template:
                with suppress(AlignError):  # a template that cannot be used is no matter of plain text
                    ends.add(str(self.tokenizer.convert_ids_to_tokens(self.template.end_id)))
            self._ending = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")
        return self._ending

    def _example(self, row: Row) -> Encoded:
        if isinstance(row, Text):
            ids = _tokenize(self.tokenizer, row.text if row.finish == "length" else _ended(self.tokenizer, row.text))
            return {"input_ids": ids, "labels": list(ids)}
        if isinstance(row, Chat):
            self.template.check_words(row.messages, "messages")
            ids, turns = self.template.turns(row.messages, "messages[{}].content".format)
            return self._learn(ids, turns)
        if isinstance(row, Example) and isinstance(row.prompt, tuple):
            ids, (start, stop) = self._answered(row.prompt, row.completion, "completion")
            if row.finish == "length":  # the turn was cut off, so its end is not to be learnt
                ids, stop = ids[: stop - 1], stop - 1
            _check_sides(start, [stop])
            return self._learn(ids, [(start, stop)])
        if isinstance(row, Example):
            prompt, (completion,) = self._split(row.prompt, {"completion": row.completion}, row.finish)
        elif isinstance(row, ExampleIds):
            prompt, completion = list(row.prompt_ids), list(row.completion_ids)
        else:
            raise TypeError(f"{type(row).__name__} is no row of task {self.task}")
        ids, every = prompt + completion, self.loss_on == "all"
        return {"input_ids": ids, "labels": list(ids) if every else [IGNORED] * len(prompt) + completion}

    def _learn(self, ids: list[int], turns: Sequence[Span]) -> Encoded:
        """Return a conversation with these turns to learn, up to the last one's end."""
        if self.loss_on == "all":
            return {"input_ids": ids, "labels": list(ids)}
        ids = ids[: turns[-1][1]]
        labels = [IGNORED] * len(ids)
        for start, stop in turns:
            labels[start:stop] = ids[start:stop]
        return {"input_ids": ids, "labels": labels}

    def _preference(self, row: Row) -> Encoded:
        if isinstance(row, Preference):
            sides = {"chosen": row.chosen, "rejected": row.rejected}
            prompt, (chosen, rejected) = self._split(row.prompt, sides)
            if chosen == rejected:
                rule = "a pair must differ"
                raise Bad(f"chosen: equals rejected as token ids, {rule}; drop the row or fix the log", "equal sides")
        elif isinstance(row, PreferenceIds):
            prompt, chosen, rejected = list(row.prompt_ids), list(row.chosen_ids), list(row.rejected_ids)
        else:
            raise TypeError(f"{type(row).__name__} is no row of task preference")
        encoded: Encoded = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        known = {"margin": row.margin, "weight": row.weight}
        return encoded | {name: value for name, value in known.items() if value is not None}

    def _unpaired(self, row: Row) -> Encoded:
        if isinstance(row, Unpaired):
            prompt, (completion,) = self._split(row.prompt, {"completion": row.completion})
        elif isinstance(row, UnpairedIds):
            prompt, completion = list(row.prompt_ids), list(row.completion_ids)
        else:
            raise TypeError(f"{type(row).__name__} is no row of task unpaired")
        return {"prompt_ids": prompt, "completion_ids": completion, "label": row.label}

    def _prompt(self, row: Row) -> Encoded:
        if isinstance(row, PromptIds):
            return {"prompt_ids": list(row.prompt_ids)}
        if not isinstance(row, Prompt):
            raise TypeError(f"{type(row).__name__} is no row of task prompt")
        if isinstance(row.prompt, str):
            ids = _tokenize(self.tokenizer, row.prompt)
        else:
            self.template.check_words(row.prompt, "prompt")
            ids = self.template.prompt(row.prompt)
        if not ids:
            raise Bad("prompt: no token is left of it, a model needs at least one; drop the row", "empty")
        return {"prompt_ids": ids}

    def _split(
        self, prompt: Content, answers: Mapping[str, Content], finish: str | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Return the ids of the prompt that all answers share, and those of each answer with its end token."""
        if isinstance(prompt, str):
            texts = [self._finished(answer, key, finish) for key, answer in answers.items() if isinstance(answer, str)]
            head = _tokenize(self.tokenizer, prompt)
            wholes = [_tokenize(self.tokenizer, prompt + text) for text in texts]
            starts = [common(head, whole) for whole in wholes]
        else:
            found = [self._answered(prompt, answer, key) for key, answer in answers.items()]
            wholes = [ids[:stop] for ids, (_, stop) in found]
            starts = [start for _, (start, _) in found]
        shared = min(starts)
        _check_sides(shared, map(len, wholes))
        if any(whole[:shared] != wholes[0][:shared] for whole in wholes):
            rule = "the answers to one prompt must"
            raise Bad(
                f"prompt: the chat template prints it differently before chosen and rejected, {rule} follow the same "
                "one; set another chat_template:",
                "template",
            )
        return wholes[0][:shared], [whole[shared:] for whole in wholes]

    def _finished(self, answer: str, key: str, finish: str | None) -> str:
        """Return a plain answer with the one token that ends it; without one when it was cut off."""
        end = self.ending.search(answer)
        if end is None:
            return answer if finish == "length" else _ended(self.tokenizer, answer)
        rest = answer[end.end() :]
        if rest and not rest.isspace():
            raise Bad(
                f"{key}: holds {end.group()!r} at {end.start()}, which ends an answer and may stand at its end only; "
                "take it out, or what follows it",
                "special token",
            )
        return answer[: end.end()]

    def _answered(self, prompt: tuple[Message, ...], answer: Content, key: str) -> tuple[list[int], Span]:
        """Return the ids of a conversation with its last turn, the answer, and where that stands."""
        assert isinstance(answer, tuple)
        self.template.check_words(prompt, "prompt")
        self.template.check_words(answer, key)
        ids, turns = self.template.turns((*prompt, *answer), lambda index: f"{key}[0].content", last=True)
        return ids, turns[-1]


def _check_known(row: ExampleIds | PreferenceIds | UnpairedIds | PromptIds, vocabulary: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    for key in ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"):
        ids = getattr(row, key, ())
        if ids and max(ids) >= vocabulary:
            index = next(i for i, one in enumerate(ids) if one >= vocabulary)
            rule = f"the vocabulary has {vocabulary} ids (0 to {vocabulary - 1})"
            remedy = "encode the row with this model's tokenizer, or drop it"
            raise Bad(f"{key}[{index}]: {ids[index]}, {rule}; {remedy}", "bad value")


def _check_sides(shared: int, lengths: Iterable[int]) -> None:
    """Hold that a prompt and each of its answers have a token of their own."""
    if not shared:
        rule = "at least one token must belong to the prompt alone"
        remedy = "end the prompt with a space or a line break"
        raise Bad(f"prompt: runs into its answer, {rule}; {remedy}", "runs into answer")
    if not all(length > shared for length in lengths):
        raise Bad("completion: no token is left of it, nothing to learn; drop the row", "nothing to learn")


def encode_all(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, *, max_length: int | None, loss_on: Loss = "assistant"
) -> tuple[list[Encoded], Stats]:
    """Encode every row for `task`; raise one DataError with the address of every row that cannot be."""
    encoder = Encoder(task, tokenizer, max_length=max_length, loss_on=loss_on)
    encoded: list[Encoded] = []
    problems: list[str] = []
    tokens = truncated = longest = 0
    for row in rows:
        try:
            whole = encoder.whole(row)
            cut = encoder.cut(whole)
        except Bad as bad:
            problems.append(f"{row.where}: {bad.problem}")
            continue
        before, after = lengths(whole), lengths(cut)
        truncated += before != after
        tokens += sum(after)
        longest = max(longest, *before)
        encoded.append(cut)
    if missing := without_margin(rows):
        problems.append(f"{missing.where}: {NO_MARGIN}")
    if problems:
        raise DataError(problems)
    return encoded, Stats(len(encoded), tokens, truncated, longest)


NO_MARGIN = "margin: missing, other rows have one; give every row a margin, or none"


def without_margin(rows: Iterable[Row]) -> Row | None:
    """Return the first row that has no margin where another has one; margins are given to all rows or to none."""
    first: Row | None = None
    some = False
    for row in rows:
        if isinstance(row, Preference | PreferenceIds) and row.margin is not None:
            some = True
        elif first is None:
            first = row
        if some and first is not None:
            return first
    return None


def encode_example(
    row: Row, tokenizer: Tokenizer, *, max_length: int | None, loss_on: Loss = "assistant"
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels`, equally long and at most `max_length`.

    Learnt are: of a Text everything; of an Example the answer; of a Chat the assistant turns; with `loss_on="all"`
    everything. Raises DataError when the prompt alone fills `max_length` or the template does not fit the row.
    """
    return _one(row, Encoder("sft", tokenizer, max_length=max_length, loss_on=loss_on))


def encode_preference(row: Row, tokenizer: Tokenizer, *, max_length: int | None) -> Encoded:
    """Return `prompt_ids`, `chosen_ids`, `rejected_ids` and, where the row has them, `margin` and `weight`.

    Prompt and answer together are at most `max_length` long; raises DataError as `encode_example` does.
    """
    return _one(row, Encoder("preference", tokenizer, max_length=max_length))


def encode_unpaired(row: Row, tokenizer: Tokenizer, *, max_length: int | None) -> Encoded:
    """Return `prompt_ids`, `completion_ids` and `label`; lengths and errors as for `encode_preference`."""
    return _one(row, Encoder("unpaired", tokenizer, max_length=max_length))


def encode_prompt(row: Row, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return `prompt_ids`, whole: of a conversation with the header of the answer that is due."""
    return _one(row, Encoder("prompt", tokenizer, max_length=None))


def _one(row: Row, encoder: Encoder) -> Encoded:
    try:
        return encoder(row)[0]
    except Bad as bad:
        raise DataError([f"{row.where}: {bad.problem}"]) from bad


# Plain text to ids.


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


# Lengths.


def _cut(encoded: Encoded, max_length: int) -> Encoded:
    """Cut answers on the right; a row must keep something to learn."""
    if "input_ids" in encoded:
        cut = {key: value[:max_length] for key, value in encoded.items()}
        prompt = next((i for i, label in enumerate(encoded["labels"]) if label != IGNORED), len(encoded["labels"]))
    else:
        prompt = len(encoded["prompt_ids"])
        keys = ("chosen_ids", "rejected_ids", "completion_ids")
        cut = {key: value[: max(0, max_length - prompt)] if key in keys else value for key, value in encoded.items()}
    if prompt >= max_length:
        what = f"{prompt} tokens before the first answer, at most {max_length - 1} leave room for one"
        raise Bad(f"prompt: {what}; raise max_length or shorten the prompt", "no room")
    return cut


def lengths(encoded: Mapping[str, Any]) -> list[int]:
    """Return the length of each sequence that a model reads for this row."""
    if "input_ids" in encoded:
        return [len(encoded["input_ids"])]
    prompt = len(encoded["prompt_ids"])
    answers = [key for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in encoded]
    return [prompt + len(encoded[key]) for key in answers] or [prompt]
