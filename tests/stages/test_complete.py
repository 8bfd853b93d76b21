"""Disliked answers that the policy completes: the best of its answers, where the scorer prefers it by enough."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_pipeline.data.chat import encode_preference
from align_pipeline.data.feedback.complete import cleaned
from align_pipeline.data.load import read
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import complete as completing
from align_pipeline.stages.feedback import Feedback
from align_pipeline.stages.rollout import HFSampler, Sampling
from thumbs import FILES, rating

from .conftest import NAMES

RULES = '''
def letters(completions, **_):
    """Ten for each letter e."""
    return [10 * one[0]["content"].count("e") for one in completions]

def equal(completions, **_):
    return [1.0] * len(completions)

def disliked(completions, **_):
    """Nothing is better than what people disliked."""
    return [9.0 if one[0]["content"].startswith("no ") else 0.0 for one in completions]
'''
EVENTS = [
    *(rating(-1, f"no {one}", f"u{i}", f"where is {one}") for i, one in enumerate(NAMES)),
    *(rating(1, f"on the left: {one}", f"w{i}", f"{one} please") for i, one in enumerate(NAMES)),
]
SAMPLES, TOKENS = 6, 96


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete_rules")
    (folder / "complete_rules.py").write_text(RULES, "utf-8")
    return folder


def logs(folder: Path, events: Sequence[Any] = EVENTS) -> Resolved:
    path = folder / "log.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in events), "utf-8")
    return Resolved(ref="file:log.jsonl", digest="sha256:" + "d" * 64, path=str(path))


def function(folder: Path, name: str) -> Resolved:
    ref = f"complete_rules:{name}"
    return Resolved(ref=ref, digest="sha256:" + "f" * 64, function=ref, search_path=str(folder))


def stage(min_gap: float = 0.0, **fields: Any) -> Feedback:
    complete = {"policy": "stage:sft", "reward": "stage:reward", "samples": SAMPLES, "min_gap": min_gap}
    complete |= {"max_new_tokens": TOKENS, **fields.pop("complete", {})}
    return Feedback(**{"logs": "file:log.jsonl", "test": 0.3, "complete": complete, **fields})


def rows(work: Work) -> list[dict[str, Any]]:
    """Return the completed pairs."""
    paths = (work.out / f"pairs.{side}.jsonl" for side in ("train", "test"))
    lines = [line for path in paths if path.is_file() for line in path.read_text("utf-8").splitlines()]
    return [row for row in map(json.loads, lines) if row["fb_source"] == "completed"]


def dislikes(work: Work) -> list[dict[str, Any]]:
    found = []
    for side in ("train", "test"):
        lines = (work.out / f"unpaired.{side}.jsonl").read_text("utf-8").splitlines()
        found += [row for row in map(json.loads, lines) if not row["label"]]
    return found


def drawn(base: Resolved, work: Work) -> dict[str, list[str]]:
    """Return for each dislike what the policy says to it and comes to an end, by the sampler alone."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    sampling = Sampling(TOKENS, frozenset({tokenizer.eos_token_id}), 1.0, 0)
    found = {}
    for row in dislikes(work):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        (answers,) = HFSampler(model, tokenizer.pad_token_id).sample([ids], SAMPLES, sampling, keys=[row["fb_row_id"]])
        texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in answers if one.finish == "stop"]
        clean = (cleaned(text, row, Feedback(logs="file:x")) for text in texts)
        found[row["completion"][0]["content"]] = [text for text in clean if text]
    return found


def test_the_best_answer_is_taken_where_it_is_better_by_enough(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, "letters")}
    here = work()
    metrics = stage().run(inputs, here)
    said = drawn(base, here)
    scores = [10 * text.count("e") for texts in said.values() for text in set(texts)]
    assert len(said) == len(NAMES) and statistics.pstdev(scores) > 0
    for gap in (0.0, 0.5, 1.5):
        here = work(f"gap {gap}")
        stage(gap).run(inputs, here)
        least = gap * statistics.pstdev(scores)
        expected = {}
        for disliked, texts in said.items():
            better = [text for text in texts if 10 * (text.count("e") - disliked.count("e")) >= max(least, 1)]
            if better:
                expected[disliked] = max(better, key=lambda text: text.count("e"))
        found = {row["rejected"][0]["content"]: row["chosen"][0]["content"] for row in rows(here)}
        assert found == expected
        report = json.loads((here.out / "report.json").read_text("utf-8"))
        assert report["pairs"]["completed"] == len(expected) > 0
        assert report["pairs"]["not_completed"] == len(NAMES) - len(expected) > 0
    assert metrics["pairs_train"] + metrics["pairs_test"] > len(expected), "a larger gap is harder to reach"

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    for row in read(here.out, "preference"):
        encoded = encode_preference(row, tokenizer, max_length=None)
        assert encoded["chosen_ids"] != encoded["rejected_ids"]


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, "letters")}
    one, again, other, pieces = (work(name) for name in ("one", "again", "other", "pieces"))
    metrics = stage().run(inputs, one)
    assert stage().run(inputs, again) == metrics
    stage(seed=1).run(inputs, other)
    monkeypatch.setattr(completing, "ROWS_AT_ONCE", 5)
    assert stage().run(inputs, pieces) == metrics
    datasets = [json.loads((here.out / "report.json").read_text("utf-8"))["dataset"] for here in (one, again, pieces)]
    assert len(set(datasets)) == 1
    for name in FILES:
        assert (one.out / f"{name}.jsonl").read_bytes() == (again.out / f"{name}.jsonl").read_bytes()
    chosen = {row["rejected"][0]["content"]: row["chosen"] for row in rows(one)}
    assert any(chosen.get(row["rejected"][0]["content"], row["chosen"]) != row["chosen"] for row in rows(other))


def test_new_feedback_leaves_the_answers_to_older_rows_as_they_are(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = {"complete.policy": base, "complete.reward": function(rules, "letters")}
    before, after = work("before"), work("after")
    stage().run({"logs": logs(tmp_path, EVENTS[4:]), **inputs}, before)
    stage().run({"logs": logs(tmp_path), **inputs}, after)
    now = {row["rejected"][0]["content"]: row["chosen"] for row in rows(after)}
    for row in rows(before):
        assert now[row["rejected"][0]["content"]] == row["chosen"]


def test_a_killed_run_draws_no_answer_again(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completing, "ROWS_AT_ONCE", 5)
    inputs = {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, "letters")}
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
    assert stage().run(inputs, killed) == expected
    assert calls == [5, 5, 5, 2], "the first five prompts must not be answered again"
    for name in ("pairs.train", "pairs.test"):
        assert (killed.out / f"{name}.jsonl").read_bytes() == (whole.out / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["equal", "disliked"])
def test_nothing_that_is_not_preferred_is_taken(
    name: str, base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    here = work()
    metrics = stage().run(
        {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, name)}, here
    )
    assert rows(here) == [] and "pairs_train" not in metrics
    report = json.loads((here.out / "report.json").read_text("utf-8"))
    assert (report["pairs"]["completed"], report["pairs"]["not_completed"]) == (0, len(NAMES))


def test_an_answer_that_was_cut_off_or_is_the_disliked_one_is_never_taken(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align_pipeline.stages.rollout import Rollout

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    end = tokenizer.eos_token_id

    def four(self: HFSampler, prompts: Sequence[Any], *rest: Any, **named: Any) -> Any:
        found = []
        for prompt in prompts:
            name = tokenizer.decode(prompt).split("where is ")[1].split("<|im_end|>")[0]
            said = [("eeeeee", "length"), (f"no {name}", "stop"), ("", "stop"), ("ee eeee", "stop"), ("e" * 9, "stop")]
            ids = [tuple(tokenizer(text)["input_ids"]) for text, _ in said]
            ended = [(*one, end) if finish == "stop" else one for one, (_, finish) in zip(ids, said, strict=True)]
            drawn = [Rollout(one, (0.0,) * len(one), f) for one, (_, f) in zip(ended, said, strict=True)]
            found.append(drawn if name != "salt" else drawn[:3])
        return found

    monkeypatch.setattr(HFSampler, "sample", four)
    here = work()
    inputs = {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, "letters")}
    stage().run(inputs, here)
    assert {row["chosen"][0]["content"] for row in rows(here)} == {"e" * 9}
    assert {row["rejected"][0]["content"] for row in rows(here)} == {f"no {one}" for one in NAMES if one != "salt"}


def test_a_prompt_without_room_is_left_out_and_it_is_said(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    long = rating(-1, "no idea", "eve", "where is the end of this " * 30)
    events = [*EVENTS, long]
    here = work()
    stage().run(
        {"logs": logs(tmp_path, events), "complete.policy": base, "complete.reward": function(rules, "letters")}, here
    )
    assert "no idea" not in {row["rejected"][0]["content"] for row in rows(here)}
    said = (here.folder / "progress.jsonl").read_text("utf-8")
    assert "1 disliked answers are not completed: the prompt leaves no room for an answer" in said
    report = json.loads((here.out / "report.json").read_text("utf-8"))
    assert report["pairs"]["completed"] + report["pairs"]["not_completed"] == len(NAMES) + 1


def test_a_function_that_is_not_there_costs_no_sampling(
    base: Resolved, rules: Path, tmp_path: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFSampler, "sample", None)
    inputs = {"logs": logs(tmp_path), "complete.policy": base, "complete.reward": function(rules, "absent")}
    with pytest.raises(AlignError, match="complete_rules:absent: it cannot be imported"):
        stage().run(inputs, work())


def test_without_dislikes_no_model_is_loaded(
    rules: Path, tmp_path: Path, work: Callable[..., Work], base: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    liked = [one for one in EVENTS if one["label"] == 1]
    absent = Resolved(ref="stage:sft", digest="sha256:" + "a" * 64, path=str(tmp_path / "absent"))
    metrics = stage().run(
        {"logs": logs(tmp_path, liked), "complete.policy": absent, "complete.reward": function(rules, "letters")},
        work(),
    )
    assert metrics["unpaired_train"] + metrics["unpaired_test"] == len(NAMES)


def test_a_reward_model_compares_the_ids_that_a_trainer_would_see(
    base: Resolved, tmp_path: Path, work: Callable[..., Work]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "reward"
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.save_pretrained(folder)
    reward = Resolved(ref="file:reward", digest="sha256:" + "e" * 64, path=str(folder))
    here = work()
    # What the policy has room for and the reward model has not is not completed, and no error.
    events = [*EVENTS, rating(-1, "never " * 200, "eve", "where is what")]
    stage().run({"logs": logs(tmp_path, events), "complete.policy": base, "complete.reward": reward}, here)

    def score(row: dict[str, Any], text: str) -> float:
        whole = [*row["prompt"], {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(whole)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        with torch.no_grad():
            return float(model.eval()(torch.tensor([ids])).logits.item())

    found = {row["rejected"][0]["content"]: row["chosen"][0]["content"] for row in rows(here)}
    assert found
    said = drawn(base, here)
    for row in dislikes(here):
        disliked = row["completion"][0]["content"]
        if disliked.startswith("never"):
            assert disliked not in found
            continue
        scores = {text: score(row, text) for text in said[disliked]}
        better = {text: value for text, value in scores.items() if value > score(row, disliked)}
        assert found.get(disliked) == (max(better, key=better.__getitem__) if better else None)
