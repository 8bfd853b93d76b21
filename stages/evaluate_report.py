"""What people read of an evaluation: tables, a verdict for each model, and answers side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align_pipeline.stages.scoring import Answers, Asked, Scores

SIDE_BY_SIDE = 8
FIRST = ("reward", "length", "eos_rate", "perplexity")
COMPARED = ("win_rate", "kl")
"""Columns of the first table, before and after those of the checks."""
COUNTS = re.compile(r"judge_(prompts|verdicts|malformed|prompt_tokens|completion_tokens)$")


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
    lines = ["# Evaluation", "", *first_table(report), ""]
    lines += [verdict(model, metrics, report) + "\n" for model in models if model != baseline]
    lines += [*right_answers(report), *refusals(report), *judged(report)]
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
    return "\n".join([*lines, *in_detail(report)])


def first_table(report: Mapping[str, Any]) -> list[str]:
    """Return how it was measured, and a row for each model."""
    metrics, baseline, models = report["metrics"], report["baseline"], report["models"]
    found = {key.partition("/")[2] for key in metrics}
    gains = [f"{check}_gain" for check in report["checks"]]
    columns = [name for name in (*FIRST, *report["checks"], *COMPARED, *gains) if name in found]
    lines = [
        f"{report['prompts']} prompts, {report['samples_per_prompt']} answer(s) each, temperature "
        f"{report['temperature']}, at most {report['max_new_tokens']} tokens. In brackets: 95 % bootstrap "
        f"intervals over prompts ({report['resamples']} resamples){_documents(report)}. Win rate, KL (nats per answer) "
        f"and gains are against {baseline}.",
        "",
        "| model | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for model in models:
        cells = [_cell(metrics, f"{model}/{name}") for name in columns]
        lines.append(f"| {model}{' (baseline)' if model == baseline else ''} | " + " | ".join(cells) + " |")
    return lines


def _documents(report: Mapping[str, Any]) -> str:
    return f", of the perplexity over {report['text']['documents']} documents" if report["text"] else ""


def right_answers(report: Mapping[str, Any]) -> list[str]:
    """Return the table of the labelled sets."""
    if not report["labelled"]:
        return []
    rows = []
    for name, extract in report["labelled"].items():
        names = [f"{name}_{end}" for end in ("accuracy", "accuracy_gain", "accuracy_gain_p", "macro_f1", "unread")]
        size = report["sets"][f"labelled.{name}"]
        rows += [[f"{name} ({size}, {_one_line(extract)})", *row] for row in _rows(report, names)]
    head = ["set (questions, how answers are read)", "model", "accuracy", "gain", "p of the gain", "macro-F1", "unread"]
    said = "Answered once with the most likely tokens. Intervals of Wilson, and of Bonett and Price; p is McNemar's."
    return ["## Right answers", "", said, "", *_table(head, rows)]


def refusals(report: Mapping[str, Any]) -> list[str]:
    """Return the table of what is refused."""
    names = [name for name in ("refusal_harmful", "refusal_harmless") if name in report["sets"]]
    if not names:
        return []
    head = ["model"]
    for name in names:
        head += [f"refused of {report['sets'][name]} {name.removeprefix('refusal_')}", "gain"]
    rows = _rows(report, [f"{name}{end}" for name in names for end in ("", "_gain")])
    said = "By how an answer begins, see `stages/refusal.py`; what is refused in part counts as refused."
    return ["## Refusals", "", said, "", *_table(head, rows)]


def judged(report: Mapping[str, Any]) -> list[str]:
    """Return the table of the judge's verdicts."""
    if not report["judge"]:
        return []
    rates = ("win_rate", "win_rate_p", "length_controlled_win_rate", "consistency")
    counts = ("prompts", "verdicts", "malformed", "prompt_tokens", "completion_tokens")
    names = [f"judge_{end}" for end in (*rates, *counts)]
    head = ["model", "win rate", "p", "win rate at equal length", "both orders agree"]
    head += ["prompts", "verdicts", "malformed", "tokens read", "tokens said"]
    said = f"{_one_line(report['judge'])} compared answers with those of {report['baseline']}, in both orders."
    return ["## Judge", "", said, "", *_table(head, [row for row in _rows(report, names) if any(row[1:])])]


def in_detail(report: Mapping[str, Any]) -> list[str]:
    """Return what win rates are worth, how varied answers are, and what changed on the same prompts."""
    names = ["win_rate_p", "win_rate_detectable", "length_controlled_win_rate", "distinct_2"]
    head = ["model", "p of the win rate", "least difference found", "win rate at equal length", "distinct bigrams"]
    said = (
        "p: how often random signs give a win rate as far from a half. The least difference from a half that this many "
        "prompts find four times in five. Win rate at equal length: Dubois et al. 2024. Distinct bigrams: the interval "
        "is a jackknife's."
    )
    rows = _rows(report, names)
    for row in rows:
        if row[1] and not row[2]:
            row[2] = "cannot be seen at this size"
    return ["## In detail", "", said, "", *_table(head, rows), *_paired(report)]


def _paired(report: Mapping[str, Any]) -> list[str]:
    """Return the table of what each model gained over the baseline on the same prompts and documents."""
    metrics, baseline = report["metrics"], report["baseline"]
    means = ("reward", "length", "eos_rate", *report["checks"], "distinct_2")
    rows = [
        [model, shown, _cell(metrics, f"{model}/{name}"), _cell(metrics, f"{model}/{name}_p")]
        for model in report["models"]
        for shown, name in (*((one, f"{one}_gain") for one in means), ("perplexity, times", "perplexity_ratio"))
        if model != baseline and f"{model}/{name}" in metrics
    ]
    said = f"Gains over {baseline}, prompt by prompt; p: how often random signs give one as large."
    return [said, "", *_table(["model", "metric", "gain", "p"], rows)] if rows else []


def _rows(report: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    metrics = report["metrics"]
    return [[model, *(_cell(metrics, f"{model}/{name}") for name in names)] for model in report["models"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def _cell(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    text = f"{metrics[key]:,.0f}" if COUNTS.search(key) else f"{metrics[key]:.3f}"
    if key.endswith("_p") and metrics[key] < 0.001:
        return "<0.001"
    if f"{key}_low" in metrics:
        text += f" [{metrics[f'{key}_low']:.3f}, {metrics[f'{key}_high']:.3f}]"
    return text


def verdict(model: str, metrics: Mapping[str, float], report: Mapping[str, Any]) -> str:
    """Return one sentence: better, worse, or not to be told apart on this many prompts."""
    baseline, prompts = report["baseline"], report["prompts"]
    rate, low, high = (metrics[f"{model}/win_rate{end}"] for end in ("", "_low", "_high"))
    figures = f"{rate:.1%} [{low:.1%}, {high:.1%}] of the comparisons on {prompts} prompts"
    sure = metrics[f"{model}/win_rate_p"] < 0.05  # of very few prompts the bootstrap alone would be too sure
    if low > 0.5 and sure:
        said = f"{model} is better than {baseline} by the scorer: it wins {figures}"
    elif high < 0.5 and sure:
        said = f"{model} is worse than {baseline} by the scorer: it wins only {figures}"
    else:
        said = f"{model} and {baseline} cannot be told apart by the scorer: {model} wins {figures}"
    return said + f", at a KL of {metrics[f'{model}/kl']:.2f} nats per answer."


def _one_line(text: str, most: int = 400) -> str:
    """Return text that stays inside one line of Markdown."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= most else flat[: most - 3] + "..."
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", flat)
