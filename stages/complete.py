"""Better answers to disliked ones: sampled from a policy, and taken where a reward model prefers them.

For `feedback`: a thumbs-down alone says what is bad and not what is better, so dpo and reward cannot learn from it.
Answers are compared as a row would hold them: as text, cleaned as those of logs are, that the chat template prints. The
policy is gone before the reward model is loaded, and no more than ROWS_AT_ONCE rows are held at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align_pipeline.data.feedback.settings import Settings
from align_pipeline.pipeline.stage import Config, Inputs, Model, Scorer, Work

if TYPE_CHECKING:
    from align_pipeline.data.feedback.complete import Row
    from align_pipeline.data.rows import Message
    from align_pipeline.stages import scoring
    from align_pipeline.stages.rollout import Rollout
    from align_pipeline.stages.scoring import Asked

    Batch = Sequence[tuple[Row, Asked | None]]
    """Disliked rows and their prompts as the policy gets them; None for one that it cannot answer."""
    Scored = tuple[float, list[float], list[str]]
    """The disliked answer's score, those of the answers that may stand in a row, and their texts."""

ROWS_AT_ONCE = 1024


class Complete(Config):
    """Where answers that are better than a disliked one come from."""

    policy: Model
    """The model that answers."""
    reward: Scorer
    """What compares answers: a reward model, or `module:function` in TRL's reward-function signature."""
    samples: int = Field(8, ge=2)
    """Answers drawn for each disliked one."""
    min_gap: float = Field(1.0, ge=0)
    """By how much the best must be preferred, in standard deviations of the drawn answers' scores; never at a tie."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens after which an answer is cut off; such an answer is not taken."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits: below 1 answers are more alike."""


@dataclass
class Completer:
    """Answers the disliked rows of a conversion; what it drew stays in scratch, for a run that is killed."""

    complete: Complete
    settings: Settings
    inputs: Inputs
    work: Work
    micro_batch: int | None

    def __call__(self, disliked: Iterable[Row]) -> Iterator[str | None]:
        """Yield for each row the text of a better answer, or None."""
        from align_pipeline.stages.models import load_tokenizer
        from align_pipeline.stages.scoring import load_scorer

        total = sum(1 for _ in disliked)
        if not total:
            return
        tokenizer = load_tokenizer(self.inputs["complete.policy"], padding_side="left")
        # Before hours of sampling: a function that cannot be imported is found now.
        scorer = load_scorer(self.inputs["complete.reward"], tokenizer, self.micro_batch)
        room = self._draw(disliked, total, tokenizer)
        yield from self._best(disliked, total, room, tokenizer, scorer)

    def _draw(self, disliked: Iterable[Row], total: int, tokenizer: Any) -> int | None:
        """Draw answers to all prompts and keep them; return how many tokens a prompt may have."""
        from align_pipeline.stages.models import device, eos_ids, load_causal
        from align_pipeline.stages.rollout import HFSampler, Sampling, context
        from align_pipeline.stages.scoring import answer_all

        model = load_causal(self.inputs["complete.policy"], device=device())
        sampler = HFSampler(model, tokenizer.pad_token_id, self.micro_batch)
        given = self.complete
        stops = eos_ids(model, tokenizer)
        sampling = Sampling(given.max_new_tokens, stops, given.temperature, self.settings.seed)
        limit = context(model)
        room = None if limit is None else limit - given.max_new_tokens
        done = answered = 0
        for batch in _batches(disliked, tokenizer, room):
            asked = [question for _, question in batch if question]
            answer_all(sampler, asked, given.samples, sampling, self._kept(asked), lambda *_: None, _names(asked))
            done, answered = done + len(batch), answered + len(asked)
            self.work.log(step=done, total=total, samples=answered)
        if answered < done:
            why = "the prompt leaves no room for an answer, or the chat template does not print it"
            self.work.log(
                step=done, total=total, warning=f"{done - answered} disliked answers are not completed: {why}"
            )
        return room

    def _kept(self, asked: Sequence[Asked]) -> Path:
        """Return the file of the answers to these prompts, named after them: other rows never find it."""
        content = json.dumps([[question.where, question.ids] for question in asked])
        return self.work.scratch / "completed" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.jsonl"

    def _best(
        self, disliked: Iterable[Row], total: int, room: int | None, tokenizer: Any, scorer: scoring.Scorer
    ) -> Iterator[str | None]:
        """Yield the best answer to each row where it is preferred by enough."""
        from align_pipeline.stages.scoring import read_kept

        best = self.work.scratch / "completed" / "best.jsonl"
        scores: list[float] = []
        done = 0
        with best.open("w", encoding="utf-8") as file:
            for batch in _batches(disliked, tokenizer, room):
                asked = [question for _, question in batch if question]
                drawn = iter(read_kept(self._kept(asked), len(asked)))
                answers = [next(drawn) if question else [] for _, question in batch]
                for own, others, texts in self._scored(batch, answers, tokenizer, scorer):
                    scores += others
                    top = max(range(len(others)), key=others.__getitem__) if others else None
                    found = None if top is None else (others[top] - own, texts[top])
                    file.write(json.dumps(found) + "\n")
                done += len(batch)
                self.work.log(step=done, total=total)
        least = self.complete.min_gap * _deviation(scores)
        with best.open(encoding="utf-8") as file:
            for line in file:
                gap, text = json.loads(line) or (0.0, None)
                yield text if gap > 0 and gap >= least else None

    def _scored(
        self, batch: Batch, answers: scoring.Answers, tokenizer: Any, scorer: scoring.Scorer
    ) -> Iterator[Scored]:
        """Yield for each row the score of its disliked answer and those of the drawn ones that may stand in a row."""
        from align_pipeline.data.chat import Encoder

        encoder = Encoder("unpaired", tokenizer, max_length=None)
        limit = scorer.limit
        shown: list[tuple[Asked, Rollout]] = []
        texts: list[list[str]] = []
        for (row, question), drawn in zip(batch, answers, strict=True):
            texts.append([])
            own = _shown(row, row["completion"][0]["content"], encoder, limit) if question else None
            if own is None:
                continue
            others = {
                text: one for text in self._texts(row, drawn, tokenizer) if (one := _shown(row, text, encoder, limit))
            }
            fitting = {text: one for text, one in others.items() if one[1].ids != own[1].ids}
            if fitting:
                texts[-1] = list(fitting)
                shown += [own, *fitting.values()]
        values = scorer.score([question for question, _ in shown], [[answer] for _, answer in shown]) if shown else []
        flat = iter(value for row in values for value in row)
        for found in texts:
            yield (next(flat), [next(flat) for _ in found], found) if found else (0.0, [], [])

    def _texts(self, row: Row, drawn: Sequence[Rollout], tokenizer: Any) -> Iterator[str]:
        """Yield what the answers that came to their end say, as a row may hold it."""
        from align_pipeline.data.feedback.complete import cleaned
        from align_pipeline.stages.scoring import text_of

        for answer in drawn:
            if answer.finish == "stop" and (text := cleaned(text_of(answer, tokenizer), row, self.settings)):
                yield text


def _batches(disliked: Iterable[Row], tokenizer: Any, room: int | None) -> Iterator[Batch]:
    """Yield rows and their prompts, ROWS_AT_ONCE at a time."""
    from align_pipeline.data.chat import Encoder

    encoder = Encoder("prompt", tokenizer, max_length=None)
    rows = iter(disliked)
    while batch := [(row, _asked(row, encoder, room)) for row in islice(rows, ROWS_AT_ONCE)]:
        yield batch


def _asked(row: Row, encoder: Any, room: int | None) -> Asked | None:
    """Return a row's prompt as the policy gets it; None where it has no room, or the template does not print it."""
    from align_pipeline.data.rows import Prompt
    from align_pipeline.data.sources import Bad
    from align_pipeline.stages.scoring import Asked

    try:
        ids = encoder.whole(Prompt(row["fb_row_id"], _turns(row["prompt"])))["prompt_ids"]
    except Bad:
        return None
    return None if room is not None and len(ids) > room else Asked(row["fb_row_id"], row["prompt"], tuple(ids), {})


def _shown(row: Row, text: str, encoder: Any, limit: int | None) -> tuple[Asked, Rollout] | None:
    """Return an answer to a row's prompt as a trainer would see it; None where it cannot, or is too long to score."""
    from align_pipeline.data.rows import Message, Unpaired
    from align_pipeline.data.sources import Bad
    from align_pipeline.stages.rollout import Rollout
    from align_pipeline.stages.scoring import Asked

    answer = (Message("assistant", text),)
    try:
        ids = encoder.whole(Unpaired(row["fb_row_id"], _turns(row["prompt"]), answer, label=True))
    except Bad:
        return None
    prompt, completion = tuple(ids["prompt_ids"]), tuple(ids["completion_ids"])
    if limit is not None and len(prompt) + len(completion) > limit:
        return None
    return Asked(row["fb_row_id"], row["prompt"], prompt, {}), Rollout(completion, (0.0,) * len(completion), "stop")


def _turns(prompt: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    from align_pipeline.data.rows import Message

    return tuple(Message(turn["role"], turn["content"]) for turn in prompt)


def _names(asked: Sequence[Asked]) -> list[int | str]:
    """Return what names prompts in the seeds of their answers: their rows, so that new feedback changes no others."""
    return [question.where for question in asked]


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 of nothing."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
