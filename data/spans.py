"""Find the assistant's turns in what a chat template prints, to the character and to the token.

A turn is what the model has to write: it begins where the header ends that the template prints when an answer is due,
and ends with the first end token after the answer's words. What the template prints in between, such as an empty
thought, is part of it; what it prints after the end token is not, since a model stops there.

The template is asked where the words go by having it print a conversation of the same roles with placeholders. If its
print of the real one is that print with the words put in, the places are known, whatever the words are. Where it is not
(a template that takes a thought out of an answer), one answer at a time is replaced by a placeholder: what stays the
same before and after it bounds the turn. Where that fails too, the template's {% generation %} marks are used, if it
has any, and else the row is refused. Marks come last because what they leave out, an end token say, is the template's
own choice; they are cut at the end token as well.
Left out: tools, images, and templates that need further arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from align_pipeline.data.rows import Message
from align_pipeline.data.sources import Bad
from align_pipeline.pipeline.errors import AlignError


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
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...
    def convert_ids_to_tokens(self, ids: int, /) -> Any: ...
    def __call__(self, text: str, /, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], /, **options: Any) -> Any: ...


Span = tuple[int, int]
"""From where, up to where, and no further."""

_MARK = "\ue000{}\ue001"
"""A placeholder: of Unicode's private use area, so that no template prints it by itself."""
_MARKS = re.compile("\ue000([0-9]+)\ue001")


def check_template(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends an assistant turn, which generation must stop at.

    Raises AlignError when there is no chat template, when nothing that a model could learn to stop at ends the turn, or
    when BOS comes twice.
    """
    probe = (Message("user", "Question"), Message("assistant", "Answer"))
    try:
        text = render(tokenizer, probe)
    except Bad as bad:
        raise AlignError(f"chat template: {bad.problem}") from bad
    _, found, tail = text.rpartition("Answer")
    if not found:
        raise AlignError(
            "chat template: does not print the assistant's content, must hold it; set another chat_template:"
        )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end_id = next((token for token in tokenize(tokenizer, tail) if token in special), None)
    if end_id is None:
        raise AlignError(
            f"chat template: nothing ends an assistant turn ({tail!r} follows the answer), a special token must, or "
            "the model never learns to stop; print {{ eos_token }} after the content, in a file set as chat_template:"
        )
    bos, ids = tokenizer.bos_token_id, tokenize(tokenizer, text)
    if bos is not None and bos != end_id and ids.count(bos) > 1:
        raise AlignError(
            f"chat template: {ids.count(bos)} BOS tokens in one exchange, must be one; remove {{{{ bos_token }}}} from "
            "all but the start of the template and set that file as chat_template:"
        )
    return int(end_id)


@dataclass(frozen=True, slots=True)
class _Around:
    """What a template prints around an assistant's words, in characters."""

    opening: int
    """Between the header, as it is printed when an answer is due, and the words."""
    ending: int
    """From the words to the end of the end token; 0 where there is none before the next words."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a template prints conversations of certain roles: `literals[0] words literals[1] words ...`."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    """The message whose words follow each literal but the last."""
    around: dict[int, _Around]

    def words(self, text: str, messages: Sequence[Message]) -> dict[int, Span] | None:
        """Return where each message's words stand; None unless the text is this shape with these words put in."""
        if not text.startswith(self.literals[0]):
            return None
        found, at = {}, len(self.literals[0])
        for index, following in zip(self.order, self.literals[1:], strict=True):
            content = messages[index].content
            # As templates print them: as they are, trimmed, or without the line breaks that they begin with.
            for words in (content, content.strip(), content.lstrip("\n")):
                if text.startswith(words, at) and text.startswith(following, at + len(words)):
                    break
            else:
                return None
            found[index] = (at, at + len(words))
            at += len(words) + len(following)
        return found if at == len(text) else None


class Template:
    """A tokenizer's chat template, checked once, with what was found out about it; it can be pickled and forked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end_id = check_template(tokenizer)
        self._end = str(tokenizer.convert_ids_to_tokens(self.end_id))
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {self._end}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}
        self._head: tuple[str, list[int]] = ("", [])

    def check_words(self, messages: Sequence[Message], key: str) -> None:
        """Refuse words in which the tokenizer would find a special token: they could end a turn or begin one."""
        for index, message in enumerate(messages):
            if found := self._special.search(message.content):
                raise Bad(
                    f"{key}[{index}].content: holds {found.group()!r} at {found.start()}, words must not hold a "
                    "special token, which a model reads as the end or the beginning of something; take it out",
                    "special token",
                )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation that waits for an answer, with the header of that answer."""
        return tokenize(self.tokenizer, render(self.tokenizer, messages, add_generation_prompt=True))

    def turns(
        self, messages: Sequence[Message], name: Callable[[int], str], *, last: bool = False
    ) -> tuple[list[int], list[Span]]:
        """Return a conversation's ids and where in them each assistant turn stands, from its header to its end token.

        `last`: only the last turn is asked for. `name` gives the name that an error calls a message by. The words must
        have passed `check_words`. Raises Bad where a turn cannot be told from what stands around it.
        """
        text = render(self.tokenizer, messages)
        ids = tokenize(self.tokenizer, text)
        all_turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        asked = all_turns[-1:] if last else all_turns
        places = self._places(text, messages, asked)
        if places is None:
            marked = self._marked(messages, ids, len(all_turns))
            return ids, marked[-1:] if last else marked
        return ids, self._tokens(text, ids, places, lambda turn: name(asked[turn]))

    # Characters.

    def _places(self, text: str, messages: Sequence[Message], asked: Sequence[int]) -> list[Span] | None:
        """Return where in the text each turn stands; None when that cannot be told."""
        shape = self._shape(tuple(message.role for message in messages))
        if shape is None or not shape.around.keys() >= set(asked):
            return None
        if not all(shape.around[index].ending for index in asked):
            raise _no_end()
        if words := shape.words(text, messages):
            around = [(words[index], shape.around[index]) for index in asked]
            return [(start - each.opening, stop + each.ending) for (start, stop), each in around]
        places = []
        for index in asked:
            place = self._by_replacing(text, messages, index, shape)
            if place is None:
                return None
            places.append(place)
        return places

    def _shape(self, roles: tuple[str, ...]) -> _Shape | None:
        if roles not in self._shapes:
            try:
                self._shapes[roles] = self._ask_for_shape(roles)
            except Bad:  # the template wants to know more of a conversation than its roles
                self._shapes[roles] = None
        return self._shapes[roles]

    def _ask_for_shape(self, roles: tuple[str, ...]) -> _Shape:
        """Have placeholders printed; turns that are not printed once, after what asks for them, are left out."""
        messages = [Message(role, _MARK.format(index)) for index, role in enumerate(roles)]
        text = render(self.tokenizer, messages)
        parts = _MARKS.split(text)
        literals, order = tuple(parts[::2]), tuple(map(int, parts[1::2]))
        around = {}
        for index, message in enumerate(messages):
            if message.role != "assistant" or order.count(index) != 1:
                continue
            place, start = order.index(index), self._start(text, messages, index)
            opening = len(text) if start is None else text.index(message.content) - start
            if 0 <= opening <= len(literals[place]):  # no other words stand between the header and these
                end = literals[place + 1].find(self._end)
                around[index] = _Around(opening, ending=0 if end < 0 else end + len(self._end))
        return _Shape(literals, order, around)

    def _start(self, text: str, messages: Sequence[Message], index: int) -> int | None:
        """Return where a turn begins in a conversation's text; None when what stands before it is printed otherwise.

        It begins where the text parts from the prompt, that is from what is printed when this answer is due: mostly at
        the prompt's end, but a prompt may open a thought that this answer does not have.
        """
        prompt = render(self.tokenizer, messages[:index], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        before = common(prompt, render(self.tokenizer, messages[:index]))
        start = common(prompt, text)
        return start if start >= before else None

    def _by_replacing(self, text: str, messages: Sequence[Message], index: int, shape: _Shape) -> Span | None:
        """Return where a turn stands, from what does not change when its words are replaced; None when that fails."""
        mark = next(mark for mark in map(_MARK.format, count()) if mark not in text)
        replaced = [*messages[:index], Message(messages[index].role, mark), *messages[index + 1 :]]
        _, found, after = render(self.tokenizer, replaced).partition(mark)
        start, stop = self._start(text, messages, index), len(text) - len(after)
        ending = shape.around[index].ending
        expected = shape.literals[shape.order.index(index) + 1][:ending]
        if not found or mark in after or not text.endswith(after) or not after.startswith(expected):
            return None
        if start is None or start > stop:
            return None
        return start, stop + ending

    # Tokens.

    def _tokens(self, text: str, ids: list[int], places: Sequence[Span], name: Callable[[int], str]) -> list[Span]:
        """Return the tokens of turns whose characters are known.

        Special tokens part a text, so what stands between an end token and an answer has the same ids alone as in the
        whole; where it has not, all that stands before the answer is tokenised.
        """
        ends = self._ends(text, ids)
        spans: list[Span] = []
        for turn, (start, stop) in enumerate(places):
            before = text.count(self._end, 0, start)
            known = ends[before - 1] if before else 0
            head = self._tokenize_head(text[text.rindex(self._end, 0, start) if before else 0 : start])
            first = known + len(head)
            if ids[known:first] != head:
                head = self._tokenize_head(text[:start])
                first = common(head, ids)
                if first < len(head) and (first <= known or not self._joins_any_answer()):
                    raise Bad(
                        f"{name(turn)}: begins with {text[start : start + 8]!r}, which the tokenizer joins with the "
                        "end of the turn's header, an answer must begin with a token of its own; strip it",
                        "runs into answer",
                    )
            spans.append((first, ends[before + text.count(self._end, start, stop) - 1] + 1))
        return spans

    def _ends(self, text: str, ids: list[int]) -> list[int]:
        """Return where in the ids the end tokens stand, as many as stand in the text."""
        ends: list[int] = []
        try:
            while True:
                ends.append(ids.index(self.end_id, ends[-1] + 1 if ends else 0))
        except ValueError:
            if len(ends) == text.count(self._end):
                return ends
        rule = f"but the tokenizer reads it {len(ends)} times"
        raise Bad(
            f"messages: {self._end!r} stands {text.count(self._end)} times in the conversation, {rule}; drop the row",
            "special token",
        )

    def _tokenize_head(self, text: str) -> list[int]:
        """Tokenise what stands before an answer, which is often what stood before the last one."""
        if text != self._head[0]:
            self._head = (text, tokenize(self.tokenizer, text))
        return self._head[1]

    def _joins_any_answer(self) -> bool:
        """Say whether header and answer share a token whatever the answer is: then the token is the answer's."""
        probe = (Message("user", "Question"), Message("assistant", "Answer"))
        header = self.prompt(probe[:1])
        return tokenize(self.tokenizer, render(self.tokenizer, probe))[: len(header)] != header

    # Marks.

    def _marked(self, messages: Sequence[Message], ids: list[int], turns: int) -> list[Span]:
        """Return what the template's own marks say is the assistant's, up to the end tokens."""
        if not re.search(r"\{%-?\s*generation\b", str(self.tokenizer.chat_template)):
            raise Bad(
                "messages: what the chat template prints around an answer changes with its words, so it cannot be told "
                "where it begins and ends; set chat_template: to one with {% generation %} marks, or keep only the "
                "last answer as prompt and completion",
                "template",
            )
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        output = _apply(self.tokenizer, messages, **options)
        if list(output["input_ids"]) != ids:
            raise AlignError(
                "chat template: two renderings of one conversation differ, must not; set another chat_template:"
            )
        spans = []
        mask = [*map(bool, output["assistant_masks"]), False]
        while True in mask:
            first = mask.index(True)
            stop = mask.index(False, first)
            if self.end_id not in ids[first:stop]:
                raise _no_end()
            spans.append((first, ids.index(self.end_id, first) + 1))
            mask[first:stop] = [False] * (stop - first)
        if len(spans) != turns:
            raise _no_end()
        return spans


def _no_end() -> Bad:
    rule = "the model would never learn to stop"
    remedy = "set chat_template: to one that ends an assistant turn within that turn"
    return Bad(f"messages: an answer's end token is not among the tokens to learn, {rule}; {remedy}", "end not learnt")


def render(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> str:
    """Return a conversation as the chat template prints it; raise Bad when it refuses to."""
    return str(_apply(tokenizer, messages, tokenize=False, **options))


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> Any:
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
        raise Bad(f"messages: the chat template refuses them ({error}); {remedy}", "template") from error


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which all special tokens are written out, as of a rendered conversation."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many leading items are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
