"""Sampling pairs and best answers, and what scorers may return."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.load import read
from align_pipeline.data.rows import ExampleIds, PreferenceIds
from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import scoring
from align_pipeline.stages.rollout import HFSampler, Rollout, Sampling
from align_pipeline.stages.sample import Sample, best, pair
from align_pipeline.stages.scoring import Asked, FunctionScorer, answer_all, load_function

RULES = '''
def letters(prompts, completions, completion_ids, bonus=None, **_):
    """Count the letter e; `bonus` is a column of the prompts."""
    bonus = bonus or [0] * len(completions)
    return [text.count("e") + extra for text, extra in zip(completions, bonus, strict=True)]

def equal(completions, **_):
    return [1.0] * len(completions)

def short(completions, **_):
    return [1.0]

def hollow(completions, **_):
    return [1.0, None] * (len(completions) // 2)

def nan(completions, **_):
    return [float("nan")] * len(completions)

def words(completions, **_):
    return ["good"] * len(completions)

def one(completions, **_):
    return 1.0

def picky(prompts, completions, **_):
    for prompt in prompts:
        if "milk" in prompt:
            raise KeyError("milk")
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "sample_rules.py").write_text(RULES, "utf-8")
    return folder


def function(folder: Path, name: str) -> Resolved:
    ref = f"sample_rules:{name}"
    return Resolved(ref=ref, digest="sha256:" + "f" * 64, function=ref, search_path=str(folder))


def prompts_file(folder: Path, count: int = 10) -> Resolved:
    path = folder / "prompts.jsonl"
    names = ["bread", "milk", "red apples", "the shelf", "nine", "six", "left", "open", "close", "tea"]
    path.write_text("".join(json.dumps({"prompt": f"where is {name}? "}) + "\n" for name in names[:count]), "utf-8")
    return Resolved(ref="file:prompts.jsonl", digest="sha256:" + "d" * 64, path=str(path))


def stage(**fields: Any) -> Sample:
    given = {"policy": "stage:sft", "prompts": "file:prompts.jsonl", "scorer": "sample_rules:letters"}
    return Sample(**{**given, "max_new_tokens": 12, "samples_per_prompt": 4, **fields})


def test_pairs_are_the_policys_own_best_over_worst(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = {"policy": base, "prompts": prompts_file(tmp_path), "scorer": function(rules, "letters")}
    here = work()
    metrics = stage().run(inputs, here)

    rows = read(here.out, "preference")
    people = [json.loads(line) for line in (here.out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert rows
    assert all(isinstance(row, PreferenceIds) and row.chosen_ids != row.rejected_ids for row in rows)
    assert len(people) == metrics["prompts"] == 10
    gaps = []
    for shown in people:
        scores = [answer["text"].count("e") for answer in shown["answers"]]
        assert scores == [answer["score"] for answer in shown["answers"]] == sorted(scores, reverse=True)
        gaps += [scores[0] - scores[-1]] if scores[0] > scores[-1] else []
    assert metrics["pairs"] == len(rows) == len(gaps)
    assert metrics["ties"] == 10 - len(gaps)
    assert metrics["mean_gap"] == pytest.approx(sum(gaps) / len(gaps))
    answers = [answer for shown in people for answer in shown["answers"]]
    assert metrics["mean_score"] == pytest.approx(sum(answer["score"] for answer in answers) / 40)
    assert metrics["mean_length"] == pytest.approx(sum(answer["tokens"] for answer in answers) / 40)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    for row in rows:
        assert isinstance(row, PreferenceIds)
        chosen, rejected = (
            tokenizer.decode(list(ids), skip_special_tokens=True).count("e")
            for ids in (row.chosen_ids, row.rejected_ids)
        )
        assert chosen > rejected


def test_best_answers_are_rows_for_fine_tuning(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = {"policy": base, "prompts": prompts_file(tmp_path), "scorer": function(rules, "letters")}
    here = work()
    metrics = stage(write="best").run(inputs, here)
    rows = read(here.out, "sft")
    people = [json.loads(line) for line in (here.out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == metrics["rows"] == 10
    assert all(isinstance(row, ExampleIds) for row in rows)
    assert metrics["best_score"] == pytest.approx(sum(shown["answers"][0]["score"] for shown in people) / 10)
    assert metrics["best_score"] > metrics["mean_score"]


def test_a_killed_run_goes_on_and_ends_the_same(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PROMPTS_AT_ONCE", 4)
    inputs = {"policy": base, "prompts": prompts_file(tmp_path), "scorer": function(rules, "letters")}
    whole, killed = work("whole"), work("killed")
    expected = stage().run(inputs, whole)

    calls: list[int] = []
    sample = HFSampler.sample

    def dies_at_the_second(self: HFSampler, prompts: Sequence[Any], *rest: Any, **named: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, prompts, *rest, **named)

    monkeypatch.setattr(HFSampler, "sample", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        stage().run(inputs, killed)
    kept = killed.scratch / "answers.jsonl"
    with kept.open("a", encoding="utf-8") as file:  # half of a batch, as a kill inside the write leaves it
        file.write(kept.read_text("utf-8").splitlines()[0] + '\n[{"ids": [5, ')
    assert stage().run(inputs, killed) == expected
    assert calls == [4, 4, 4, 2], "the first four prompts must not be answered again"
    for name in ("rows.jsonl", "samples.jsonl"):
        assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_without_a_pair_there_is_nothing_to_write(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = {"policy": base, "prompts": prompts_file(tmp_path), "scorer": function(rules, "equal")}
    with pytest.raises(DataError, match=r"no pair from 10 prompts x 4 answers: 10 prompts have equal scores") as caught:
        stage().run(inputs, work())
    assert caught.value.exit_code == 3


def test_a_reward_model_reads_the_ids_that_were_drawn(
    base: Resolved, tmp_path: Path, work: Callable[..., Work]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "reward"
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base.path).save_pretrained(folder)
    reward = Resolved(ref="file:reward", digest="sha256:" + "e" * 64, path=str(folder))
    here = work()
    stage(scorer="file:reward", samples_per_prompt=2).run(
        {"policy": base, "prompts": prompts_file(tmp_path), "scorer": reward}, here
    )
    rows = [json.loads(line) for line in (here.out / "rows.jsonl").read_text("utf-8").splitlines()]
    assert rows
    for row in rows:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                alone = model.eval()(torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])).logits.item()
            assert row[f"score_{side}"] == pytest.approx(alone, abs=1e-4)


def asked(*texts: str) -> list[Asked]:
    return [Asked(f"p.jsonl:{i + 1}", text, (5, i), {}) for i, text in enumerate(texts)]


def rollout(*ids: int) -> Rollout:
    return Rollout(ids, (0.0,) * len(ids), "stop")


def test_ties_and_small_gaps_are_dropped_and_counted() -> None:
    a, b, c = rollout(1), rollout(2), rollout(3)
    questions = asked("one", "two", "three", "four")
    pairing = pair(questions, [[a, b, c], [a, b], [a, a], [a, b]], [[0, 2, 1], [1, 1], [0, 1], [0.0, 0.4]], min_gap=0.5)
    assert [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in pairing.rows] == [([5, 0], [2], [1])]
    assert (pairing.gaps, pairing.ties, pairing.close) == ([2], 2, 1)
    assert [row["completion_ids"] for row in best(questions[:2], [[a, b, c], [a, b]], [[0, 2, 1], [1, 1]])] == [
        [2],
        [1],
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"sample_rules:short returned 1 scores for 4 answers \(p.jsonl:1 to p.jsonl:2\)"),
        ("hollow", r"p.jsonl:1: sample_rules:hollow returned None"),
        ("nan", r"p.jsonl:1: sample_rules:nan returned nan"),
        ("words", r"p.jsonl:1: sample_rules:words returned 'good'"),
        ("one", r"sample_rules:one returned a float, a scorer returns a list"),
        ("picky", r"p.jsonl:2: sample_rules:picky raised KeyError: 'milk'"),
        ("absent", r"sample_rules:absent: it cannot be imported \(AttributeError"),
    ],
)
def test_what_a_function_returns_is_checked(name: str, message: str, base: Resolved, rules: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(AlignError, match=message):
        scorer = FunctionScorer(
            f"sample_rules:{name}", load_function(function(rules, name)), AutoTokenizer.from_pretrained(base.path)
        )
        answers = [[rollout(9), rollout(10)], [rollout(11), rollout(12)]]
        scorer.score(asked("bread", "milk"), answers)


def test_a_function_gets_text_messages_ids_and_columns(base: Resolved) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[int]:
        seen.update(arguments)
        return [1, 2, 3]

    end = tokenizer.eos_token_id
    ids = tokenizer("red apples")["input_ids"]
    chat = [{"role": "user", "content": "where?"}]
    questions = [Asked("p:1", "where? ", (5,), {"shelf": "left"}), Asked("p:2", chat, (6,), {})]
    answers = [[rollout(*ids, end), rollout(*ids)], [rollout(*ids, end)]]
    assert FunctionScorer("spy", spy, tokenizer).score(questions, answers) == [[1.0, 2.0], [3.0]]
    assert seen == {
        "prompts": ["where? ", "where? ", chat],
        "completions": ["red apples", "red apples", [{"role": "assistant", "content": "red apples"}]],
        "completion_ids": [[*ids, end], ids, [*ids, end]],
        "shelf": ["left", "left", None],
    }


def test_the_key_of_a_prompt_is_its_row(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Fake:
        def sample(self, prompt_ids: Any, n: int, sampling: Any, keys: Any = None) -> Any:
            seen.extend(keys)
            return [[rollout(7)] * n for _ in prompt_ids]

    answer_all(Fake(), asked("a", "b", "c"), 1, Sampling(4, frozenset()), tmp_path / "kept.jsonl", lambda *_: None)
    assert seen == [0, 1, 2]
