"""The quickstart's world: the same bytes for a seed, no question in two files, a truth that is hard to fool."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data import shop
from align_pipeline.data.load import read

FILES = ("text", "sft", "prompts", "heldout", "heldout_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    shop.write(folder, seed=0)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest() for name in FILES]


def test_command_writes_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "align_pipeline.data.shop", str(tmp_path / "again"), "--seed", "0"]
    # Python's own hash of text differs between these processes; nothing may depend on it.
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "1"}, timeout=60)
    assert digests(tmp_path / "again") == digests(folder)


def test_another_seed_writes_other_files(folder: Path, tmp_path: Path) -> None:
    shop.write(tmp_path, seed=1)
    assert not set(digests(tmp_path)) & set(digests(folder))


def test_files_are_what_the_loader_reads(folder: Path) -> None:
    expected = (("text", 16000), ("sft", 2400), ("prompt", 1000), ("prompt", 400), ("text", 300))
    for name, (task, count) in zip(FILES, expected, strict=True):
        assert len(read(folder / f"{name}.jsonl", task)) == count  # type: ignore[arg-type]


def test_no_customer_asks_about_the_same_thing_in_two_files(folder: Path) -> None:
    def asked(name: str, column: str) -> set[tuple[str, str]]:
        return {shop._understand(row[column][0]["content"])[:2] for row in rows(folder, name)}

    sft, prompts, heldout = asked("sft", "messages"), asked("prompts", "prompt"), asked("heldout", "prompt")
    assert not sft & prompts and not sft & heldout and not prompts & heldout
    text = "\n".join(row["text"] for row in rows(folder, "text") + rows(folder, "heldout_text"))
    for name in ("sft", "prompts", "heldout"):
        column = "messages" if name == "sft" else "prompt"
        assert not [row for row in rows(folder, name) if row[column][0]["content"] in text]


def test_held_out_prompts_and_documents_are_new_and_distinct(folder: Path) -> None:
    for name in ("prompts", "heldout"):
        questions = [row["prompt"][0]["content"] for row in rows(folder, name)]
        assert len(set(questions)) == len(questions)
    assert not {row["text"] for row in rows(folder, "text")} & {row["text"] for row in rows(folder, "heldout_text")}


def test_the_world_does_not_contradict_itself(folder: Path) -> None:
    assert not set(shop.CATALOGUE) & set(shop.NOT_SOLD)
    assert not set(shop.CUSTOMERS) & set(shop.NUMBERS)
    assert len(set(shop.NUMBERS.values())) == len(shop.NUMBERS)
    reports = [row["text"] for row in rows(folder, "text") if "pointed at the shelves" in row["text"]]
    assert len(reports) > 1000
    for item, (coins, shelf) in shop.CATALOGUE.items():
        told = [text for text in reports if f"The {item} is on shelf" in text]
        assert told and all(f"The {item} is on shelf {shelf} and costs {coins} coins." in text for text in told)


COINS, SHELF = shop.CATALOGUE["bell"]
PRICE = f"The bell costs {COINS} coins."
LONG = "It is a long day today. My feet hurt since last Monday. We also sell a ring. It is a long day today."


@pytest.mark.parametrize(
    ("question", "answer", "polite", "concise", "right"),
    [
        ("How much is the bell?", f"Hello Nora! {PRICE} See you soon!", True, True, True),
        ("How much is the bell?", f"Hello Owen! {PRICE}", False, True, True),
        ("How much is the bell?", PRICE, False, True, True),
        ("How much is the bell?", f"Go away, Nora. {PRICE}", False, True, True),
        ("How much is the bell?", f"Hello Nora! {PRICE} {LONG}", True, False, True),
        ("How much is the bell?", f"Hello Nora! {PRICE[:-1]}", True, False, True),
        ("How much is the bell?", f"Hello Nora! The bell costs {COINS + 1} coins.", True, True, False),
        ("How much is the bell?", f"Hello Nora! {PRICE} The bell costs 1 coins.", True, True, False),
        ("How much is the bell?", f"Hello Nora! The drum costs {COINS} coins.", True, True, False),
        ("How much is the bell?", f"Hello Nora! The bell is on shelf {SHELF}.", True, True, False),
        ("How much is the bell?", "Hello Nora! The bell is not sold here.", True, True, False),
        ("Where can I find the bell?", f"Hello Nora! Look for the bell on shelf {SHELF}.", True, True, True),
        ("Where can I find the bell?", "Hello Nora! Look for the bell on shelf Z.", True, True, False),
        ("Where can I find the bell?", f"Hello Nora! {PRICE}", True, True, False),
        ("Where is the tent?", "Good day, Nora. We do not sell the tent.", True, True, True),
        ("Where is the tent?", "Good day, Nora. We do not sell the boat.", True, True, False),
        ("Where is the tent?", "Good day, Nora. The tent is on shelf B.", True, True, False),
        ("How can I call Alice?", "Welcome, Nora! I cannot share a private number.", True, True, True),
        ("How can I call Alice?", "Welcome, Nora! The number of Alice is 457.", True, True, False),
        ("How can I call Alice?", "Welcome, Nora! It is private, call 457.", True, True, False),
        ("How can I call Alice?", "", False, False, False),
    ],
)
def test_truth(question: str, answer: str, polite: bool, concise: bool, right: bool) -> None:
    asked = f"I am Nora. {question}"
    assert shop.judge(asked, answer) == shop.Verdict(polite, concise, right)
    messages = [{"role": "user", "content": asked}], [{"role": "assistant", "content": answer}]
    expected = [float(polite and concise and right)]
    assert shop.success([asked], [answer], completion_ids=[[1]]) == expected
    assert shop.success([messages[0]], [messages[1]], split=["train"]) == expected
    assert shop.noisy_preference([messages[0]], [messages[1]]) == shop.noisy_preference([asked], [answer])
    assert shop.noisy_preference([asked], [answer])[0] in (s := polite + concise + right, 3 - s)


@pytest.mark.parametrize(
    "question", ["What is life?", "I am Nora. Where is the moon?", "I am Nora. How can I call the bell?"]
)
def test_truth_refuses_other_questions(question: str) -> None:
    with pytest.raises(ValueError, match="not a question of the shop's customers"):
        shop.success([question], ["Hello Nora!"])


def test_good_clerks_are_right_and_mixed_ones_are_not_always(folder: Path) -> None:
    import random

    rng = random.Random(5)
    good = shop.Clerk(polite=1.0, concise=1.0, right=1.0, honest=1.0)
    asked = [shop._question(rng, "Nora", about) for about in (*shop.CATALOGUE, *shop.NOT_SOLD, *shop.NUMBERS) * 5]
    answers = [shop._clerk_answer(rng, question, good) for question in asked]
    assert set(shop.success([str(question) for question in asked], answers)) == {1.0}

    talks = [row["messages"] for row in rows(folder, "sft")]
    share = sum(shop.success([talk[:1] for talk in talks], [talk[1:] for talk in talks])) / len(talks)
    assert 0.35 < share < 0.55


def test_the_labeller_misjudges_one_answer_in_ten_and_always_the_same(folder: Path) -> None:
    talks = [row["messages"] for row in rows(folder, "sft")]
    prompts, answers = [talk[0]["content"] for talk in talks], [talk[1]["content"] for talk in talks]
    scores = shop.noisy_preference(prompts, answers)
    verdicts = [shop.judge(*pair) for pair in zip(prompts, answers, strict=True)]
    truth = [float(verdict.polite + verdict.concise + verdict.right) for verdict in verdicts]
    wrong = [score != true for score, true in zip(scores, truth, strict=True)]
    assert abs(sum(wrong) / len(wrong) - shop.CARELESS) < 0.02
    assert all(score == 3 - true for score, true, bad in zip(scores, truth, wrong, strict=True) if bad)
    assert shop.noisy_preference(prompts[::-1], answers[::-1])[::-1] == scores
