"""Models beside a baseline on the same held-out prompts: what they say, what a scorer thinks of it, what it cost.

Every model answers the same prompts with the same seeds. Means are over prompts, intervals are 95 % bootstrap intervals
over prompts, paired wherever two models are compared: a resample takes the same prompts for both.

KL is exact at each position, summed over the vocabulary and then over the answer's tokens, and averaged over the
model's own answers: the estimate that only reads the drawn token has the same mean and many times the variance.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align_pipeline.pipeline.errors import AlignError, DataError, did_you_mean
from align_pipeline.pipeline.stage import Dataset, Function, Inputs, Kind, Metrics, Model, Resolved, Scorer, Stage, Work
from align_pipeline.stages.scoring import Answers, Asked, Scores
from align_pipeline.stages.statistics import RESAMPLES, bootstrap, win_rate

if TYPE_CHECKING:
    import torch

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt ids, answer ids)."""

SIDE_BY_SIDE = 8
LOGIT_BYTES = 2**28
"""What the logits of one forward pass may take, in float32; one row always fits."""

OWN_METRICS = frozenset(("reward", "length", "eos_rate", "perplexity", "win_rate", "kl"))


class Evaluate(Stage):
    """Compare models with a baseline: reward, win rate, KL, length, perplexity and checks of one's own."""

    produces: ClassVar[Kind] = "report"

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
    samples_per_prompt: int = Field(1, ge=1)
    """Answers drawn for each prompt."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens after which an answer is cut off."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits, in sampling and in the KL; 0 takes the most likely token, with the KL of temperature 1."""
    seed: int = 0
    """Of the answers and of the bootstrap."""

    @model_validator(mode="after")
    def _names(self) -> Evaluate:
        for name in (*self.models, *self.checks):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"{name!r} cannot be part of a metric's name; use letters, digits, - and _")
        if self.baseline not in self.models:
            near = did_you_mean(self.baseline, self.models)
            raise ValueError(f"baseline {self.baseline!r} is none of models ({', '.join(self.models)}){near}")
        for name in self.checks:
            if name in OWN_METRICS or name.endswith(("_gain", "_low", "_high")):
                raise ValueError(f"checks: {name!r} is a metric of this stage's own; name the check otherwise")
        return self

    def look(self, inputs: Inputs) -> dict[str, list[str]]:
        from align_pipeline.stages import reading

        return reading.look(inputs, {"prompts": "prompt", "text": "text"})

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_tokenizer
        from align_pipeline.stages.reading import read_rows
        from align_pipeline.stages.scoring import ask, load_scorer

        sources = {name: inputs[f"models.{name}"] for name in self.models}
        tokenizer = self._tokenizer({name: load_tokenizer(source) for name, source in sources.items()})
        asked = ask(read_rows(inputs, "prompts", "prompt", work), tokenizer)
        documents = read_rows(inputs, "text", "text", work) if "text" in inputs else []
        # Before hours of sampling: a function that cannot be imported is found now.
        scorers = {"reward": load_scorer(inputs["scorer"], tokenizer, self.how.micro_batch)}
        scorers |= {name: load_scorer(inputs[f"checks.{name}"], tokenizer, None) for name in self.checks}

        answers, measured = self._measure(sources, tokenizer, asked, documents, work)
        scores = {
            model: {name: scorer.score(asked, answers[model]) for name, scorer in scorers.items()} for model in sources
        }
        metrics = self._metrics(answers, scores, measured)

        work.out.mkdir(parents=True, exist_ok=True)
        report = {
            "baseline": self.baseline,
            "models": list(self.models),
            "prompts": len(asked),
            "samples_per_prompt": self.samples_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "resamples": RESAMPLES,
            "text": measured[self.baseline].get("text"),
            "metrics": metrics,
        }
        (work.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        shown = side_by_side(asked, answers, scores, tokenizer)
        with (work.out / "samples.jsonl").open("w", encoding="utf-8") as file:
            for row in shown:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        (work.out / "report.md").write_text(markdown(report, shown), encoding="utf-8")
        return metrics

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

    def _measure(
        self,
        sources: Mapping[str, Resolved],
        tokenizer: Any,
        asked: Sequence[Asked],
        documents: Sequence[Any],
        work: Work,
    ) -> tuple[dict[str, Answers], dict[str, dict[str, Any]]]:
        """Return each model's answers, and its KL and perplexity; at most two models are held at a time.

        What one model gave is kept in scratch, so that a run which was killed does not ask it again.
        """
        from align_pipeline.stages.models import eos_ids, load_causal
        from align_pipeline.stages.rollout import HFSampler, Sampling, check_lengths, context
        from align_pipeline.stages.scoring import answer_all

        stop_ids = frozenset[int]().union(*(eos_ids(source, tokenizer) for source in sources.values()))
        sampling = Sampling(self.max_new_tokens, stop_ids, self.temperature, self.seed)
        total = len(sources) * len(asked)

        found: dict[str, tuple[Answers, dict[str, Any]]] = {}

        def measure(name: str, model: Any, baseline: Any) -> tuple[Answers, dict[str, Any]]:
            where = [question.where for question in asked]
            check_lengths([question.ids for question in asked], where, self.max_new_tokens, context(model))
            before = len(found) * len(asked)
            tokens_before = sum(len(answer.ids) for answers, _ in found.values() for row in answers for answer in row)
            answers = answer_all(
                HFSampler(model, tokenizer.pad_token_id, self.how.micro_batch),
                asked,
                self.samples_per_prompt,
                sampling,
                work.scratch / name / "answers.jsonl",
                lambda prompts, tokens: work.log(
                    step=before + prompts,
                    total=total,
                    samples=before + prompts,
                    tokens=tokens_before + tokens,
                    model=name,
                ),
            )
            done = work.scratch / name / "measured.json"
            if not done.exists():
                values: dict[str, Any] = {}
                if documents:
                    values["text"] = perplexity(
                        model, self._documents(documents, tokenizer, model), self.how.micro_batch
                    )
                if name != self.baseline:
                    rows = [(q.ids, answer.ids) for q, row in zip(asked, answers, strict=True) for answer in row]
                    values["kl"] = kl(model, baseline, rows, self.temperature or 1.0, self.how.micro_batch)
                written = done.with_suffix(".new")
                written.write_text(json.dumps(values), encoding="utf-8")
                written.replace(done)
            return answers, json.loads(done.read_text(encoding="utf-8"))

        baseline = load_causal(sources[self.baseline])
        found[self.baseline] = measure(self.baseline, baseline, baseline)
        for name in sources:
            if name != self.baseline:
                # No name holds the model, so that it is gone before the next one is loaded.
                found[name] = measure(name, load_causal(sources[name]), baseline)
        return {name: found[name][0] for name in sources}, {name: found[name][1] for name in sources}

    def _documents(self, rows: Sequence[Any], tokenizer: Any, model: Any) -> tuple[list[list[int]], int]:
        """Return the documents' ids, cut to the model's context, and how many were cut."""
        from align_pipeline.data.chat import encode_all
        from align_pipeline.stages.rollout import context

        encoded, stats = encode_all(rows, "text", tokenizer, max_length=context(model), loss_on="all")
        return [row["input_ids"] for row in encoded], stats.truncated

    def _metrics(
        self,
        answers: Mapping[str, Answers],
        scores: Mapping[str, Mapping[str, Scores]],
        measured: Mapping[str, Mapping[str, Any]],
    ) -> Metrics:
        """Return `<model>/<metric>`, in the order of `models`."""
        metrics: Metrics = {}
        prompts = len(answers[self.baseline])
        interval = bootstrap(prompts, self.seed)
        base = scores[self.baseline]
        for name in self.models:
            own = scores[name]
            rewards = per_prompt(own["reward"])
            low, high = interval(rewards)
            flat = [answer for row in answers[name] for answer in row]
            found = {
                "reward": fmean(rewards),
                "reward_low": low,
                "reward_high": high,
                "length": fmean(len(answer.ids) for answer in flat),
                "eos_rate": fmean(answer.finish == "stop" for answer in flat),
            }
            if "text" in measured[name]:
                found["perplexity"] = measured[name]["text"]["perplexity"]
            for check in self.checks:
                found[check] = fmean(per_prompt(own[check]))
            if name != self.baseline:
                wins = [win_rate(mine, theirs) for mine, theirs in zip(own["reward"], base["reward"], strict=True)]
                low, high = interval(wins)
                found |= {"win_rate": fmean(wins), "win_rate_low": low, "win_rate_high": high}
                found["kl"] = fmean(measured[name]["kl"])
                for check in self.checks:
                    mine, theirs = per_prompt(own[check]), per_prompt(base[check])
                    gains = [a - b for a, b in zip(mine, theirs, strict=True)]
                    low, high = interval(gains)
                    found |= {f"{check}_gain": fmean(gains), f"{check}_gain_low": low, f"{check}_gain_high": high}
            metrics |= {f"{name}/{metric}": float(value) for metric, value in found.items()}
        return metrics


# --- what is computed from scores -------------------------------------------------------------------------------------


def per_prompt(scores: Scores) -> list[float]:
    """Return the mean of each prompt's scores: prompts are what is resampled, as their answers are not independent."""
    return [fmean(row) for row in scores]


# --- what is computed from weights ------------------------------------------------------------------------------------


def perplexity(model: Any, documents: tuple[list[list[int]], int], micro_batch: int | None) -> dict[str, float]:
    """Return exp of the mean negative log-likelihood over all tokens that follow another one, and the counts."""
    from align_pipeline.stages.models import completion_log_probs

    rows, truncated = documents
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pairs = [(rows[i][:1], rows[i][1:]) for i in order if len(rows[i]) > 1]
    if not pairs:
        raise DataError(
            ["text: no document has two tokens, a perplexity needs one that can be predicted; check the file"]
        )
    found = completion_log_probs(model, pairs, micro_batch or 8)
    tokens = sum(len(row) for row in found)
    total = math.fsum(float(row.double().sum()) for row in found)
    return {
        "perplexity": math.exp(-total / tokens),
        "tokens": float(tokens),
        "documents": float(len(rows)),
        "truncated": float(truncated),
    }


def kl(model: Any, baseline: Any, rows: Rows, temperature: float, micro_batch: int | None) -> list[float]:
    """Return for each row sum over t of KL(model(. | prompt, answer[:t]) || baseline(. | same)), in nats."""
    import torch

    found = [0.0] * len(rows)
    for batch in batches(model, rows, micro_batch):
        with torch.inference_mode():
            own = _answer_logits(model, [rows[i] for i in batch])  # (b, C, V)
            other = _answer_logits(baseline, [rows[i] for i in batch])  # (b, C, V)
            for i, mine, theirs in zip(batch, own, other, strict=True):
                count = len(rows[i][1])
                # Left padding: an answer's tokens are the last ones of its row.
                found[i] = float(_row_kl(mine[-count:], theirs[-count:], temperature)) if count else 0.0
    return found


def batches(model: Any, rows: Rows, micro_batch: int | None) -> list[list[int]]:
    """Return row numbers in batches of like length: `micro_batch` rows, or as many as LOGIT_BYTES allows."""
    lengths = [(len(answer), len(prompt)) for prompt, answer in rows]
    width = 4 * model.config.get_text_config().vocab_size
    found: list[list[int]] = [[]]
    for i in sorted(range(len(rows)), key=lambda i: lengths[i]):
        # Sorted, so this row is the longest so far and pads the others to its length.
        most = micro_batch or max(1, LOGIT_BYTES // (width * (lengths[i][0] + 1)))
        if len(found[-1]) >= most:
            found.append([])
        found[-1].append(i)
    return found


def _answer_logits(model: Any, rows: Rows) -> torch.Tensor:
    """Return the logits that predict the answers' tokens, (b, C, V): left-padded, C the longest answer."""
    from align_pipeline.stages.rollout import left_pad

    longest = max(len(answer) for _, answer in rows)
    device = next(model.parameters()).device
    ids, mask = left_pad([[*prompt, *answer] for prompt, answer in rows], 0, device)  # (b, T)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1
    ).logits
    return logits[:, -longest - 1 : -1]


def _row_kl(mine: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the KL of two rows of logits, both (C, V), summed over positions; float32 for one row at a time."""
    own = (mine.float() / temperature).log_softmax(-1)
    other = (theirs.float() / temperature).log_softmax(-1)
    return (own.exp() * (own - other)).sum(-1).double().sum()


# --- what people read -------------------------------------------------------------------------------------------------


def side_by_side(
    asked: Sequence[Asked], answers: Mapping[str, Answers], scores: Mapping[str, Mapping[str, Scores]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Return for each prompt what every model answered, with ids and scores."""
    from align_pipeline.stages.scoring import text_of

    return [
        {
            "prompt": question.prompt,
            "prompt_ids": list(question.ids),
            "answers": {
                model: [
                    {
                        "text": text_of(answer, tokenizer),
                        "ids": list(answer.ids),
                        "finish": answer.finish,
                        "scores": {name: values[i][j] for name, values in scores[model].items()},
                    }
                    for j, answer in enumerate(answers[model][i])
                ]
                for model in answers
            },
        }
        for i, question in enumerate(asked)
    ]


def markdown(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    """Return the report for people: a table, a verdict for each model, and samples side by side."""
    metrics, baseline, models = report["metrics"], report["baseline"], report["models"]
    names = list(dict.fromkeys(key.partition("/")[2] for key in metrics))
    columns = [name for name in names if not re.search(r"_(low|high)$", name)]
    lines = [
        "# Evaluation",
        "",
        f"{report['prompts']} prompts, {report['samples_per_prompt']} answer(s) each, temperature "
        f"{report['temperature']}, at most {report['max_new_tokens']} tokens. In brackets: 95 % bootstrap "
        f"intervals over prompts ({report['resamples']} resamples). Win rate, KL (nats per answer) and gains are "
        f"against {baseline}.",
        "",
        "| model | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for model in models:
        cells = [_cell(metrics, f"{model}/{name}") for name in columns]
        lines.append(f"| {model}{' (baseline)' if model == baseline else ''} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [verdict(model, metrics, report) + "\n" for model in models if model != baseline]
    different = [row for row in shown if len({given[0]["text"] for given in row["answers"].values()}) > 1]
    same = len(shown) - len(different)
    lines += [
        "## Samples",
        "",
        f"The first {SIDE_BY_SIDE} prompts whose answers differ; {same} are answered alike.",
        "",
    ]
    for row in different[:SIDE_BY_SIDE]:
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        lines += [f"**{_one_line(asked)}**", ""]
        for model, given in row["answers"].items():
            scores = ", ".join(f"{name} {value:.3g}" for name, value in given[0]["scores"].items())
            cut = "" if given[0]["finish"] == "stop" else " [cut off]"
            lines.append(f"- {model} ({scores}): {_one_line(given[0]['text'])}{cut}")
        lines.append("")
    return "\n".join(lines)


def _cell(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    text = f"{metrics[key]:.3f}"
    if f"{key}_low" in metrics:
        text += f" [{metrics[f'{key}_low']:.3f}, {metrics[f'{key}_high']:.3f}]"
    return text


def verdict(model: str, metrics: Mapping[str, float], report: Mapping[str, Any]) -> str:
    """Return one sentence: better, worse, or not to be told apart on this many prompts."""
    baseline, prompts = report["baseline"], report["prompts"]
    rate, low, high = (metrics[f"{model}/win_rate{end}"] for end in ("", "_low", "_high"))
    figures = f"{rate:.1%} [{low:.1%}, {high:.1%}] of the comparisons on {prompts} prompts"
    if low > 0.5:
        said = f"{model} is better than {baseline} by the scorer: it wins {figures}"
    elif high < 0.5:
        said = f"{model} is worse than {baseline} by the scorer: it wins only {figures}"
    else:
        said = f"{model} and {baseline} cannot be told apart by the scorer: {model} wins {figures}"
    return said + f", at a KL of {metrics[f'{model}/kl']:.2f} nats per answer."


def _one_line(text: str, most: int = 400) -> str:
    """Return text that stays inside one line of Markdown."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= most else flat[: most - 3] + "..."
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", flat)
