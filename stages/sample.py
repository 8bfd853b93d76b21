"""Answers of a model, ordered by a scorer: on-policy preference pairs, or the best answers for more fine-tuning.

`pairs` are the rows that DPO wants most: both answers are the policy's own, so what they teach is what it does
(on-policy preference data: arXiv:2404.14367). `best` is rejection sampling (Llama 2, arXiv:2307.09288, section 3.2.3).
Rows are token ids, exactly as they were drawn; `samples.jsonl` beside them is for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

from pydantic import Field

from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Dataset, Inputs, Kind, Metrics, Model, Scorer, Stage, Work
from align_pipeline.stages.scoring import Answers, Asked, Scores


class Sample(Stage):
    """Sample answers to prompts and write preference pairs, or the best answer to each prompt."""

    produces: ClassVar[Kind] = "dataset"

    type: Literal["sample"] = "sample"
    policy: Model
    """The model that answers."""
    prompts: Dataset
    """What it answers."""
    scorer: Scorer
    """What orders the answers: a reward model, or `module:function` in TRL's reward-function signature."""
    write: Literal["pairs", "best"] = "pairs"
    """`pairs`: the best answer over the worst, as preference rows. `best`: the best answer, as rows for `sft`."""
    samples_per_prompt: int = Field(4, ge=2)
    """Answers drawn for each prompt."""
    min_gap: float = Field(0.0, ge=0)
    """Pairs whose scores differ by less are dropped; equal scores always are."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens after which an answer is cut off."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits: below 1 answers are more alike."""
    seed: int = 0
    """Another seed, other answers."""

    def measures(self) -> Mapping[str, str]:
        written = {"pairs": ("pairs", "ties", "close", "mean_gap"), "best": ("rows", "best_score")}
        lacks = {name: f"it belongs to write: {kind}" for kind, names in written.items() for name in names}
        here = ("prompts", "mean_score", "mean_length", "eos_rate", *written[self.write])
        return {**lacks, **dict.fromkeys(here, "")}

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        from align_pipeline.stages import reading

        return reading.look(inputs, {"prompts": "prompt"})

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import device, eos_ids, load_causal, load_tokenizer
        from align_pipeline.stages.reading import read_rows
        from align_pipeline.stages.rollout import HFSampler, Sampling, check_lengths, context
        from align_pipeline.stages.scoring import answer_all, ask, load_scorer

        tokenizer = load_tokenizer(inputs["policy"], padding_side="left")
        asked = ask(read_rows(inputs, "prompts", "prompt", work), tokenizer)
        # Before hours of sampling: a function that cannot be imported is found now.
        scorer = load_scorer(inputs["scorer"], tokenizer, self.how.micro_batch)
        model = load_causal(inputs["policy"], device=device())
        check_lengths(
            [question.ids for question in asked],
            [question.where for question in asked],
            self.max_new_tokens,
            context(model),
        )
        answers = answer_all(
            HFSampler(model, tokenizer.pad_token_id, self.how.micro_batch),
            asked,
            self.samples_per_prompt,
            Sampling(self.max_new_tokens, eos_ids(model, tokenizer), self.temperature, self.seed),
            work.scratch / "answers.jsonl",
            lambda done, tokens: work.log(step=done, total=len(asked), samples=done, tokens=tokens),
        )
        del model  # its memory is the reward model's now
        scores = scorer.score(asked, answers)

        lengths = [len(answer.ids) for row in answers for answer in row]
        metrics = {
            "prompts": float(len(asked)),
            "mean_score": fmean(score for row in scores for score in row),
            "mean_length": fmean(lengths),
            "eos_rate": fmean(answer.finish == "stop" for row in answers for answer in row),
        }
        if self.write == "pairs":
            pairing = pair(asked, answers, scores, self.min_gap)
            rows = pairing.rows
            metrics |= {"pairs": float(len(rows)), "ties": float(pairing.ties), "close": float(pairing.close)}
            if not rows:
                raise DataError(
                    [
                        f"prompts: no pair from {len(asked)} prompts x {self.samples_per_prompt} answers: "
                        f"{pairing.ties} prompts have equal scores or equal answers, {pairing.close} a gap below "
                        f"min_gap {self.min_gap}; raise samples_per_prompt or temperature, lower min_gap, or mend "
                        "the scorer"
                    ]
                )
            metrics["mean_gap"] = fmean(pairing.gaps)
        else:
            rows = list(best(asked, answers, scores))
            metrics |= {"rows": float(len(rows)), "best_score": fmean(map(max, scores))}
        work.out.mkdir(parents=True, exist_ok=True)
        _write(work.out / "rows.jsonl", rows)
        _write(work.out / "samples.jsonl", people(asked, answers, scores, tokenizer))
        return metrics


@dataclass(frozen=True, slots=True)
class Pairing:
    """Preference rows, and what became of the prompts that gave none."""

    rows: list[dict[str, Any]]
    gaps: list[float]
    """For each row by how much its answers' scores differ."""
    ties: int
    """Prompts whose answers have one score, or whose best and worst answer are the same ids."""
    close: int
    """Prompts whose best and worst score differ by less than `min_gap`."""


def pair(asked: Sequence[Asked], answers: Answers, scores: Scores, min_gap: float) -> Pairing:
    """Return the best answer over the worst for each prompt; of equal scores the first drawn counts."""
    rows: list[dict[str, Any]] = []
    gaps: list[float] = []
    ties = close = 0
    for question, row, values in zip(asked, answers, scores, strict=True):
        high, low = values.index(max(values)), values.index(min(values))
        gap = values[high] - values[low]
        if gap == 0 or row[high].ids == row[low].ids:
            ties += 1
        elif gap < min_gap:
            close += 1
        else:
            rows.append(
                {
                    "prompt_ids": list(question.ids),
                    "chosen_ids": list(row[high].ids),
                    "rejected_ids": list(row[low].ids),
                    "score_chosen": values[high],
                    "score_rejected": values[low],
                }
            )
            gaps.append(gap)
    return Pairing(rows, gaps, ties, close)


def best(asked: Sequence[Asked], answers: Answers, scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield the best answer to each prompt; of equal scores the first drawn."""
    for question, row, values in zip(asked, answers, scores, strict=True):
        yield {"prompt_ids": list(question.ids), "completion_ids": list(row[values.index(max(values))].ids)}


def people(asked: Sequence[Asked], answers: Answers, scores: Scores, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield for each prompt its answers as text, the best first."""
    from align_pipeline.stages.scoring import text_of

    for question, row, values in zip(asked, answers, scores, strict=True):
        order = sorted(range(len(row)), key=lambda i: -values[i])
        shown = [
            {"text": text_of(row[i], tokenizer), "score": values[i], "finish": row[i].finish, "tokens": len(row[i].ids)}
            for i in order
        ]
        yield {"prompt": question.prompt, "answers": shown}


def _write(file: Any, rows: Any) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
