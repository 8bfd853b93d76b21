"""Models beside a baseline on the same held-out prompts: what they say, what a scorer thinks of it, what it cost.

Every model answers the same prompts with the same seeds. Means are over prompts, intervals are 95 % bootstrap intervals
over prompts, paired wherever two models are compared: a resample takes the same prompts for both.

Beside the prompts there may be sets of questions whose right answers are known, and harmful and harmless prompts that
a model should and should not refuse. These are answered once, with the most likely tokens, and their shares have
Wilson's intervals. The files that each part is in: `statistics.py`, `divergence.py` (KL and perplexity), `labelled.py`,
`refusal.py`, `judge.py`, `speed.py`, `evaluate_report.py`.

Speed is measured where `how.speed` says so, and is no part of the result: it stands in `resources` of artifact.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align_pipeline.pipeline.errors import AlignError, DataError, did_you_mean
from align_pipeline.pipeline.files import write_json
from align_pipeline.pipeline.stage import (
    Dataset,
    Function,
    How,
    Inputs,
    Kind,
    Metrics,
    Model,
    Resolved,
    Scorer,
    Stage,
    Work,
)
from align_pipeline.stages.divergence import document_nats, kl
from align_pipeline.stages.evaluate_report import markdown, side_by_side
from align_pipeline.stages.judge import Court, Judge, Judged, Pair, as_text, in_rows, judge_metrics
from align_pipeline.stages.labelled import OURS, Known, known, labelled_metrics, problem_of, said
from align_pipeline.stages.scoring import Answers, Asked, Scores, in_shape
from align_pipeline.stages.speed import engine_for, problem_with, speeds
from align_pipeline.stages.statistics import (
    RESAMPLES,
    bootstrap,
    detectable,
    distinct_n,
    distinct_without,
    jackknife,
    length_controlled,
    mean_metrics,
    perplexity_metrics,
    share_metrics,
    sign_flip_test,
    win_rate,
    with_interval,
)

OWN_METRICS = frozenset(
    (
        "reward",
        "length",
        "eos_rate",
        "perplexity",
        "win_rate",
        "win_rate_p",
        "win_rate_detectable",
        "length_controlled_win_rate",
        "distinct_2",
        "kl",
        "perplexity_ratio",
        "perplexity_ratio_p",
    )
)
AVERAGED = ("reward", "length", "eos_rate")
"""Metrics that are means over prompts of what each answer has."""
OWN_BEGINNINGS = ("judge_", "refusal_")
OWN_ENDS = ("_gain", "_gain_p", "_low", "_high", "_accuracy", "_macro_f1", "_unread")
REFUSALS = ("harmful", "harmless")


@dataclass(frozen=True)
class Set:
    """Prompts that are answered once, with the most likely tokens."""

    name: str
    asked: Sequence[Asked]
    known: Sequence[Known] = ()
    """The right answers; none for prompts to refuse."""


@dataclass(frozen=True)
class Documents:
    """Texts that perplexity is measured on."""

    ids: Sequence[list[int]]
    """Of those that have two tokens or more: the first one cannot be predicted."""
    read: int
    truncated: int

    @property
    def tokens(self) -> list[int]:
        """How many tokens of each are predicted."""
        return [len(ids) - 1 for ids in self.ids]

    def counts(self) -> dict[str, int]:
        """Return what the report says of them."""
        return {"tokens": sum(self.tokens), "documents": self.read, "truncated": self.truncated}


class EvaluateHow(How):
    """How an evaluation is run, and whether it measures how fast models answer."""

    speed: Literal["auto", "vllm", "transformers"] | None = None
    """Measure the time to the first token, and tokens and requests a second of each model, alone and 16 at once, with
    vLLM or Transformers; `auto`: with vLLM where it is installed beside a GPU. What is cached is not measured again:
    `--force` does."""


class Evaluate(Stage):
    """Compare models with a baseline: reward, win rate, KL, length, perplexity and checks of one's own."""

    produces: ClassVar[Kind] = "report"
    version: ClassVar[int] = 3

    type: Literal["evaluate"] = "evaluate"
    models: dict[str, Model] = Field(min_length=1)
    """What is compared, under the names that the metrics carry."""
    baseline: str
    """The name of the model that the others are compared with."""
    scorer: Scorer
    """What `reward` and `win_rate` are read from: a reward model, or `module:function`."""
    checks: dict[str, Function] = Field({})
    """Further functions by the name of their metric: their mean for each model, and the gain over the baseline."""
    prompts: Dataset
    """What the models answer; none of it should have been trained on."""
    text: Dataset | None = None
    """Documents for the perplexity per token, each with its end token."""
    labelled: dict[str, Dataset] = Field({})
    """Questions with right answers by the name of the set: rows of a prompt, an `answer` and perhaps `choices`."""
    extract: dict[str, str] = Field({})
    """How a set's answers are read: `text` (the default), `label`, `choice`, `number`, or `regex:PATTERN`."""
    columns: dict[str, dict[str, str]] = Field({})
    """For a set of `labelled` its file's columns: `{prompt: input, answer: target}`; `examples[].input` in a list."""
    harmful: Dataset | None = None
    """Prompts that should be refused: `refusal_harmful` is the share that is."""
    harmless: Dataset | None = None
    """Prompts that should not be refused: `refusal_harmless` is the share that is."""
    judge: Judge | None = None
    """A language model that compares each model's answers with the baseline's, both ways round."""
    samples_per_prompt: int = Field(1, ge=1)
    """Answers drawn for each prompt."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens after which an answer is cut off."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits, in sampling and in the KL; 0 takes the most likely token, with the KL of temperature 1."""
    seed: int = 0
    """Of the answers and of the bootstrap."""
    how: EvaluateHow = EvaluateHow()
    """How it is run: nothing that changes the result."""

    @model_validator(mode="after")
    def _names(self) -> Evaluate:
        for name in (*self.models, *self.checks, *self.labelled):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"{name!r} cannot be part of a metric's name; use letters, digits, - and _")
        if self.baseline not in self.models:
            near = did_you_mean(self.baseline, self.models)
            raise ValueError(f"baseline {self.baseline!r} is none of models ({', '.join(self.models)}){near}")
        for name in self.checks:
            if name in OWN_METRICS or name.startswith(OWN_BEGINNINGS) or name.endswith(OWN_ENDS):
                raise ValueError(f"checks: {name!r} is a metric of this stage's own; name the check otherwise")
        return self

    def metric_owner(self, name: str) -> str | None:
        return self.models.get(name)

    def measures(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for name in self.models:
            own = "it compares with the baseline, which this is" if name == self.baseline else ""
            for metrics, reason in ((self._of_each(), ""), (self._against_baseline(), own)):
                found |= {f"{name}/{metric}": reason or without for metric, without in metrics.items()}
        return found

    def _of_each(self) -> dict[str, str]:
        """Return the metrics of a model alone, each with why it is not measured."""
        found = dict.fromkeys(_with_interval(*AVERAGED, *self.checks, "distinct_2"), "")
        found |= dict.fromkeys(_with_interval("perplexity"), self._no_text())
        for share, missing in self._shares().items():
            found |= dict.fromkeys(_with_interval(share), missing)
        for name in self.labelled:
            sorts = "" if self._extract(name) in ("choice", "label") else "it is measured on choices and labels"
            found |= dict.fromkeys(_with_interval(f"{name}_unread"), "")
            found |= dict.fromkeys(_with_interval(f"{name}_macro_f1"), sorts)
        return found

    def _against_baseline(self) -> dict[str, str]:
        """Return the metrics of a model beside the baseline, each with why it is not measured."""
        rates = ("win_rate", "length_controlled_win_rate")
        means = [f"{name}_gain" for name in (*AVERAGED, *self.checks)]
        found = dict.fromkeys(("win_rate_p", "win_rate_detectable", *(f"{name}_p" for name in means)), "")
        found |= dict.fromkeys(_with_interval("kl", *rates, *means, "distinct_2_gain"), "")
        found |= dict.fromkeys((*_with_interval("perplexity_ratio"), "perplexity_ratio_p"), self._no_text())
        for share, missing in self._shares().items():
            found |= dict.fromkeys((*_with_interval(f"{share}_gain"), f"{share}_gain_p"), missing)
        judged = "" if self.judge else "a judge measures it; name one in judge"
        names = _with_interval(*(f"judge_{rate}" for rate in rates))
        return found | dict.fromkeys((*names, "judge_win_rate_p", *JUDGE_COUNTS), judged)

    def _no_text(self) -> str:
        return "" if self.text else "it is measured on documents; name them in text"

    def _shares(self) -> dict[str, str]:
        """Return the shares that are counted, each with why it is not."""
        found = {f"{name}_accuracy": "" for name in self.labelled}
        for name in REFUSALS:
            found[f"refusal_{name}"] = "" if getattr(self, name) else f"it is measured on prompts; name them in {name}"
        return found

    @model_validator(mode="after")
    def _sets(self) -> Evaluate:
        for field in ("extract", "columns"):
            for name in getattr(self, field):
                if name not in self.labelled:
                    known_sets = f"none of labelled ({', '.join(self.labelled) or 'no sets'})"
                    raise ValueError(f"{field}: {name!r} is {known_sets}{did_you_mean(name, self.labelled)}")
        for name, extract in self.extract.items():
            if problem := problem_of(extract):
                raise ValueError(f"extract: {name}: {problem}")
        if self.judge and len(self.models) < 2:
            raise ValueError("judge: it compares models with the baseline, and there is no other; name a second model")
        return self

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        from align_pipeline.stages import reading
        from align_pipeline.stages.labelled import first_problems

        tasks = {"prompts": "prompt", "text": "text", "harmful": "prompt", "harmless": "prompt", "labelled": "prompt"}
        found = reading.look(inputs, tasks, columns=self._prompt_columns())  # type: ignore[arg-type]
        for name in self.labelled:
            key = f"labelled.{name}"
            if key in inputs and key not in found:
                (source,) = reading.sources({key: inputs[key]}, "labelled", columns=self._prompt_columns())
                if problems := first_problems(source.scan("prompt"), self._extract(name), self._own_columns(name)):
                    found[key] = problems
        if self.judge and (problem := self.judge.key_problem()):
            found["judge.key_variable"] = [problem]
        if problem := problem_with(self.how.speed):
            found["how.speed"] = [problem]
        return found

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_tokenizer
        from align_pipeline.stages.reading import read_rows
        from align_pipeline.stages.scoring import ask, load_scorer

        sources = {name: inputs[f"models.{name}"] for name in self.models}
        tokenizer = self._tokenizer({name: load_tokenizer(source) for name, source in sources.items()})
        asked = ask(read_rows(inputs, "prompts", "prompt", work), tokenizer)
        documents = self._documents(inputs, sources.values(), tokenizer, work)
        sets = self._read_sets(inputs, tokenizer, work)
        # Before hours of sampling: a function that cannot be imported is found now, and a key that is not set.
        scorers = {"reward": load_scorer(inputs["scorer"], tokenizer, self.how.micro_batch)}
        scorers |= {name: load_scorer(inputs[f"checks.{name}"], tokenizer, None) for name in self.checks}
        court = Court(self.judge, work.cache) if self.judge else None

        answers, measured = self._measure(sources, tokenizer, asked, sets, documents, work)
        if self.how.speed:  # while no other model is held
            prompts, engine = [question.ids for question in asked], engine_for(self.how.speed)
            work.report_resources("speed", speeds(engine, sources, prompts, tokenizer.pad_token_id, work))
        main = {name: found[""] for name, found in answers.items()}
        scores = {
            model: {name: scorer.score(asked, main[model]) for name, scorer in scorers.items()} for model in sources
        }
        metrics = self._metrics(main, scores, measured, documents)
        work.out.mkdir(parents=True, exist_ok=True)
        for one in sets:
            found, rows = self._of_set(one, {name: given[one.name] for name, given in answers.items()}, tokenizer)
            metrics |= found
            _write(work.out / f"{one.name}.jsonl", rows)
        if court:
            found, rows = self._judged(court, asked, main, tokenizer, work)
            metrics |= found
            _write(work.out / "judge.jsonl", rows)

        report = {
            "baseline": self.baseline,
            "models": list(self.models),
            "prompts": len(asked),
            "samples_per_prompt": self.samples_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "resamples": RESAMPLES,
            "text": documents.counts() if documents else None,
            "checks": list(self.checks),
            "labelled": {name: self._extract(name) for name in self.labelled},
            "sets": {one.name: len(one.asked) for one in sets},
            "judge": self.judge.model if self.judge else None,
            "metrics": metrics,
        }
        (work.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        shown = side_by_side(asked, main, scores, tokenizer)
        _write(work.out / "samples.jsonl", shown)
        (work.out / "report.md").write_text(markdown(report, shown), encoding="utf-8")
        return metrics

    # --- what is read -------------------------------------------------------------------------------------------------

    def _extract(self, name: str) -> str:
        return self.extract.get(name, "text")

    def _own_columns(self, name: str) -> dict[str, str]:
        """Return the columns of the right answer and of the choices."""
        named = self.columns.get(name, {})
        return {ours: theirs.rpartition("[].")[2] for ours, theirs in named.items() if ours in OURS}

    def _prompt_columns(self) -> dict[str, dict[str, str]]:
        """Return for each set the columns of its prompts."""
        return {
            name: {ours: theirs for ours, theirs in self.columns.get(name, {}).items() if ours not in OURS}
            for name in self.labelled
        }

    def _read_sets(self, inputs: Inputs, tokenizer: Any, work: Work) -> list[Set]:
        from align_pipeline.stages.reading import read_rows
        from align_pipeline.stages.scoring import ask

        found = []
        for name in self.labelled:
            key = f"labelled.{name}"
            rows = read_rows(
                {key: inputs[key]}, "labelled", "prompt", work, columns=self._prompt_columns(), report_as=key
            )
            questions = known(rows, self._extract(name), self._own_columns(name))
            found.append(Set(key, ask([question.row for question in questions], tokenizer), questions))
        for name in REFUSALS:
            if name in inputs:
                found.append(Set(f"refusal_{name}", ask(read_rows(inputs, name, "prompt", work), tokenizer)))
        return found

    def _documents(self, inputs: Inputs, models: Iterable[Resolved], tokenizer: Any, work: Work) -> Documents | None:
        """Return the documents of `text`, cut to what the smallest context of all models holds."""
        from align_pipeline.data.chat import encode_all
        from align_pipeline.stages.models import context
        from align_pipeline.stages.reading import read_rows

        if "text" not in inputs:
            return None
        limit = min((size for source in models if (size := context(source))), default=None)
        rows = read_rows(inputs, "text", "text", work)
        encoded, stats = encode_all(rows, "text", tokenizer, max_length=limit, loss_on="all")
        whole = [row["input_ids"] for row in encoded]
        found = Documents([ids for ids in whole if len(ids) > 1], len(whole), stats.truncated)
        if not found.ids:
            raise DataError(
                ["text: no document has two tokens, a perplexity needs one that can be predicted; check the file"]
            )
        return found

    def _tokenizer(self, tokenizers: Mapping[str, Any]) -> Any:
        """Return the one that encodes the prompts: the baseline's, or the first with a chat template if it has none."""
        from align_pipeline.stages.scoring import vocabulary_differs

        first = tokenizers[self.baseline]
        for name, tokenizer in tokenizers.items():
            difference = vocabulary_differs(first, tokenizer)
            if difference:
                raise AlignError(
                    f"models: {name}: its tokenizer is not that of {self.baseline} ({difference}), KL and token counts "
                    "would compare unlike things; compare models of one family"
                )
        if not first.chat_template:
            return next((tokenizer for tokenizer in tokenizers.values() if tokenizer.chat_template), first)
        return first

    # --- what is asked ------------------------------------------------------------------------------------------------

    def _measure(
        self,
        sources: Mapping[str, Resolved],
        tokenizer: Any,
        asked: Sequence[Asked],
        sets: Sequence[Set],
        documents: Documents | None,
        work: Work,
    ) -> tuple[dict[str, dict[str, Answers]], dict[str, dict[str, Any]]]:
        """Return each model's answers to the prompts ("") and the sets, and its KL and perplexity.

        At most two models are held at a time. What one model gave is kept in scratch, so that a run which was killed
        does not ask it again.
        """
        from align_pipeline.stages.models import eos_ids, load_causal
        from align_pipeline.stages.rollout import HFSampler, Sampling, check_lengths, context
        from align_pipeline.stages.scoring import answer_all

        stop_ids = frozenset[int]().union(*(eos_ids(source, tokenizer) for source in sources.values()))
        drawn = Sampling(self.max_new_tokens, stop_ids, self.temperature, self.seed)
        likeliest = Sampling(self.max_new_tokens, stop_ids, 0.0, self.seed)
        every = [Set("", asked), *sets]
        done_prompts = done_tokens = 0
        total = len(sources) * sum(len(one.asked) for one in every)

        def progress(name: str) -> Callable[[int, int], None]:
            prompts_before, tokens_before = done_prompts, done_tokens

            def say(prompts: int, tokens: int) -> None:
                step = prompts_before + prompts
                work.log(step=step, total=total, samples=step, tokens=tokens_before + tokens, model=name)

            return say

        def measure(name: str, model: Any, baseline: Any) -> tuple[dict[str, Answers], dict[str, Any]]:
            nonlocal done_prompts, done_tokens
            for one in every:
                where = [question.where for question in one.asked]
                check_lengths([q.ids for q in one.asked], where, self.max_new_tokens, context(model))
            answers: dict[str, Answers] = {}
            for one in every:
                answers[one.name] = answer_all(
                    HFSampler(model, tokenizer.pad_token_id, self.how.micro_batch),
                    one.asked,
                    1 if one.name else self.samples_per_prompt,
                    likeliest if one.name else drawn,
                    work.scratch / name / f"answers{one.name and '-'}{one.name}.jsonl",
                    progress(name),
                )
                done_prompts += len(one.asked)
                done_tokens += sum(len(answer.ids) for row in answers[one.name] for answer in row)
            done = work.scratch / name / "measured.json"
            if not done.exists():
                values: dict[str, Any] = {}
                if documents:
                    values["nats"] = document_nats(model, documents.ids, self.how.micro_batch)
                if name != self.baseline:
                    rows = [(q.ids, answer.ids) for q, row in zip(asked, answers[""], strict=True) for answer in row]
                    values["kl"] = kl(model, baseline, rows, self.temperature or 1.0, self.how.micro_batch)
                write_json(done, values)
            return answers, json.loads(done.read_text(encoding="utf-8"))

        found: dict[str, tuple[dict[str, Answers], dict[str, Any]]] = {}
        baseline = load_causal(sources[self.baseline])
        found[self.baseline] = measure(self.baseline, baseline, baseline)
        for name in sources:
            if name != self.baseline:
                # No name holds the model, so that it is gone before the next one is loaded.
                found[name] = measure(name, load_causal(sources[name]), baseline)
        return {name: found[name][0] for name in sources}, {name: found[name][1] for name in sources}

    # --- what is counted ----------------------------------------------------------------------------------------------

    def _metrics(
        self,
        answers: Mapping[str, Answers],
        scores: Mapping[str, Mapping[str, Scores]],
        measured: Mapping[str, Mapping[str, Any]],
        documents: Documents | None,
    ) -> Metrics:
        """Return `<model>/<metric>`, in the order of `models`."""
        metrics: Metrics = {}
        interval = bootstrap(len(answers[self.baseline]), self.seed)
        averaged = {name: self._averaged(answers[name], scores[name]) for name in self.models}
        base = averaged[self.baseline]
        for name in self.models:
            alone = name == self.baseline
            found: Metrics = {}
            for metric, values in averaged[name].items():
                found |= mean_metrics(metric, values, None if alone else base[metric], interval, self.seed)
            if documents:
                theirs = None if alone else measured[self.baseline]["nats"]
                found |= perplexity_metrics(measured[name]["nats"], documents.tokens, theirs, self.seed)
            if not alone:
                pairs = zip(scores[name]["reward"], scores[self.baseline]["reward"], strict=True)
                wins = [win_rate(mine, theirs) for mine, theirs in pairs]
                found |= with_interval("win_rate", fmean(wins), interval(wins))
                costs = per_prompt(in_shape(measured[name]["kl"], answers[name]))
                found |= with_interval("kl", fmean(costs), interval(costs))
                found |= self._compared(wins, averaged[name]["length"], base["length"])
            found |= self._variety(answers[name], None if alone else answers[self.baseline])
            metrics |= {f"{name}/{metric}": float(value) for metric, value in found.items()}
        return metrics

    def _averaged(self, answers: Answers, scores: Mapping[str, Scores]) -> dict[str, list[float]]:
        """Return for each prompt the means of its answers."""
        return {
            "reward": per_prompt(scores["reward"]),
            "length": mean_lengths(answers),
            "eos_rate": [fmean(answer.finish == "stop" for answer in row) for row in answers],
            **{check: per_prompt(scores[check]) for check in self.checks},
        }

    def _variety(self, answers: Answers, base: Answers | None) -> dict[str, float]:
        """Return the distinct bigrams of all answers, and how many more they are than the baseline's."""
        whole, without = _distinct(answers)
        found = with_interval("distinct_2", whole, jackknife(whole, without))
        if base is not None:
            theirs, theirs_without = _distinct(base)
            gains = [mine - other for mine, other in zip(without, theirs_without, strict=True)]
            found |= with_interval("distinct_2_gain", whole - theirs, jackknife(whole - theirs, gains))
        return found

    def _compared(self, wins: Sequence[float], mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
        """Return what a win rate is worth: chance, what could have been found, and what length had to do with it."""
        longer = [a - b for a, b in zip(mine, theirs, strict=True)]
        rate, low, high = length_controlled(wins, longer, self.seed)
        smallest = detectable(wins)
        return {
            "win_rate_p": sign_flip_test([win - 0.5 for win in wins], self.seed),
            **({} if smallest is None else {"win_rate_detectable": smallest}),
            **with_interval("length_controlled_win_rate", rate, (low, high)),
        }

    def _of_set(self, one: Set, answers: Mapping[str, Answers], tokenizer: Any) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return the metrics of a set and what each model said to each prompt of it."""
        from align_pipeline.stages.refusal import refuses
        from align_pipeline.stages.scoring import text_of

        texts = {name: [text_of(row[0], tokenizer) for row in given] for name, given in answers.items()}
        rows: list[dict[str, Any]] = [{"prompt": question.prompt} for question in one.asked]
        metrics: Metrics = {}
        if one.known:
            name = one.name.removeprefix("labelled.")
            extract, labels = self._extract(name), {question.label for question in one.known}
            read = {
                model: [said(text, extract, labels, q.options) for text, q in zip(given, one.known, strict=True)]
                for model, given in texts.items()
            }
            truth = [question.label for question in one.known]
            for model in self.models:
                base = read[self.baseline] if model != self.baseline else None
                found = labelled_metrics(name, truth, read[model], base, extract, self.seed)
                metrics |= {f"{model}/{metric}": value for metric, value in found.items()}
            for i, row in enumerate(rows):
                row["answer"] = truth[i]
                row["answers"] = {model: {"text": texts[model][i], "read": read[model][i]} for model in self.models}
        else:
            refused = {model: [refuses(text) for text in given] for model, given in texts.items()}
            for model in self.models:
                base_refused = refused[self.baseline] if model != self.baseline else None
                found = share_metrics(one.name, refused[model], base_refused)
                metrics |= {f"{model}/{metric}": value for metric, value in found.items()}
            for i, row in enumerate(rows):
                row["answers"] = {
                    model: {"text": texts[model][i], "refused": refused[model][i]} for model in self.models
                }
        return metrics, rows

    def _judged(
        self, court: Court, asked: Sequence[Asked], answers: Mapping[str, Answers], tokenizer: Any, work: Work
    ) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return the judge's metrics and every verdict: the n-th answer of a model against the n-th of the baseline."""
        from align_pipeline.stages.scoring import text_of

        others = [name for name in self.models if name != self.baseline]
        base = [[text_of(answer, tokenizer) for answer in row] for row in answers[self.baseline]]
        pairs = {
            name: [
                Pair(as_text(question.prompt), text_of(answer, tokenizer), theirs)
                for question, row, against in zip(asked, answers[name], base, strict=True)
                for answer, theirs in zip(row, against, strict=True)
            ]
            for name in others
        }
        flat = [pair for name in others for pair in pairs[name]]
        judged = court.all(
            flat, lambda done, **note: work.log(step=done, total=len(flat), model=court.judge.model, **note)
        )
        note = (
            f"judge: {court.requests:,} requests ({court.retries:,} again), {court.cached:,} verdicts were kept before"
        )
        work.log(step=len(flat), total=len(flat), note=note)
        metrics: Metrics = {}
        verdicts: list[dict[str, Any]] = []
        per_model = in_rows(judged, [len(pairs[name]) for name in others])
        for name, given in zip(others, per_model, strict=True):
            rows: list[list[Judged]] = in_rows(given, [len(row) for row in answers[name]])
            lengths = (mean_lengths(answers[name]), mean_lengths(answers[self.baseline]))
            longer = [mine - theirs for mine, theirs in zip(*lengths, strict=True)]
            metrics |= {f"{name}/{metric}": value for metric, value in judge_metrics(rows, longer, self.seed).items()}
            for number, row in enumerate(rows):
                for one in row:
                    said_of = [{"verdict": v.place, "reply": v.reply} for v in one.verdicts]
                    verdicts.append({"model": name, "prompt": number, "score": one.score, "orders": said_of})
        return metrics, verdicts


def per_prompt(scores: Scores) -> list[float]:
    """Return the mean of each prompt's scores: prompts are what is resampled, as their answers are not independent."""
    return [fmean(row) for row in scores]


def mean_lengths(answers: Answers) -> list[float]:
    """Return for each prompt how many tokens its answers have."""
    return [fmean(len(answer.ids) for answer in row) for row in answers]


def _distinct(answers: Answers) -> tuple[float, list[float]]:
    """Return the distinct bigrams of all answers, and of those to all prompts but each."""
    ids = [[answer.ids for answer in row] for row in answers]
    return distinct_n(list(chain.from_iterable(ids)), 2), distinct_without(ids, 2)


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _with_interval(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


JUDGE_COUNTS = (
    "judge_consistency", "judge_prompts", "judge_verdicts", "judge_malformed", "judge_prompt_tokens",
    "judge_completion_tokens",
)  # fmt: skip
