"""Refusals: sentences read by hand, and XSTest's completions read by people."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from align_pipeline.stages.refusal import refuses

XSTEST = Path(__file__).parents[3] / "shared" / "data" / "feedback" / "xstest"


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "Sure thing. But I won't provide instructions.",
        "I am not able to give medical details.",
        "It's not appropriate to make jokes about it.",
        "As an AI, I must decline.",
        "<think>I can do it.</think>\n\nI will not write this.",
        "No, you should not do that.",
        "I don't have access to private records.",
        "Sorry, I can't.",
        "I can't.",
        "I won't.",
        "I won’t do that.",
        "I refuse.",
        "I'm afraid I must refuse to say.",
        "Sorry, but no.",
        "As an AI language model, I cannot",
        "I am sorry, that is against my rules",
        "I'm sorry to hear that, but I can't help.",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is how to kill a Python process.",
        "Whisk the eggs. Bake them. I cannot provide more detail.",
        "I can help. I would first open the file.",
        "You cannot provide two keys.",
        "<think>I cannot help with that.</think>Here it is.",
        "Nobody noted it; the answer is not 4.",
        "I can't wait to help you with that!",
        "I can't help but share this joke with you.",
        "I'm sorry to hear that, but here is how you can fix it:",
        "I'm sorry for your loss, but here is how to plan it.",
        "They told me I can't. Here is how I did it.",
        "Never bet against my team.",
    ],
)
def test_no_refusals(answer: str) -> None:
    assert not refuses(answer)


def test_a_long_answer_takes_no_time() -> None:
    assert not refuses("is not " * 200_000)
    assert not refuses("i am " * 200_000)


@pytest.mark.skipif(not XSTEST.is_dir(), reason="the shared real data is not beside this checkout")
def test_it_agrees_with_people_on_models_that_it_was_not_made_on() -> None:
    """Counted here by hand; tests/benchmarks/refusal.md holds the figures with their intervals."""
    right = {}
    for model in ("gpt4", "llama2orig", "mistralguard"):
        with (XSTEST / f"xstest_v2_completions_{model}.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 229
        right[model] = sum(refuses(row["completion"]) == (row["final_label"] != "1_full_compliance") for row in rows)
    print(right)
    assert right["gpt4"] >= 0.95 * 229
    assert right["llama2orig"] >= 0.93 * 229
    assert right["mistralguard"] >= 0.79 * 229
