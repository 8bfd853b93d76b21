"""Labelled sets and refusals through the whole stage: answers that are scripted, so that every score is known."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.rollout import HFSampler, Rollout
from align_pipeline.stages.statistics import paired_shares, sign_test, wilson
from tiny import write_tiny_model

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout")
DIGEST = "sha256:" + "d" * 64
BBH = {
    "boolean_expressions": "label",
    "disambiguation_qa": "choice",
    "geometric_shapes": "choice",
    "logical_deduction_seven_objects": "choice",
    "multistep_arithmetic_two": "number",
    "penguins_in_a_table": "choice",
    "salient_translation_error_detection": "choice",
    "temporal_sequences": "choice",
    "tracking_shuffled_objects_three_objects": "choice",
}
BBH_COLUMNS = {"prompt": "examples[].input", "answer": "examples[].target"}
SVAMP_COLUMNS = {"instruction": "Body", "input": "Question", "answer": "Answer"}


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """A tiny model with room for long questions."""
    folder = tmp_path_factory.mktemp("long")
    write_tiny_model(folder, ["where is the answer, it is True or False or (A) and 12"], vocab_size=300, positions=8192)
    return Resolved(ref="file:long", digest="sha256:" + "e" * 64, path=str(folder))


@pytest.fixture
def inputs(tmp_path: Path, base: Resolved) -> dict[str, Resolved]:
    (tmp_path / "sets_rules.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "good day"}\n')
    rule = "sets_rules:length"
    return {
        "models.new": base,
        "models.old": base,
        "scorer": Resolved(ref=rule, digest=DIGEST, function=rule, search_path=str(tmp_path)),
        "prompts": file(tmp_path / "prompts.jsonl"),
    }


def file(path: Path) -> Resolved:
    return Resolved(ref=f"file:{path.name}", digest=DIGEST, path=str(path))


def stage(**fields: Any) -> Evaluate:
    given: dict[str, Any] = {
        "models": {"new": "stage:new", "old": "stage:old"},
        "baseline": "old",
        "scorer": "sets_rules:length",
        "prompts": "file:prompts.jsonl",
        "max_new_tokens": 40,
    }
    return Evaluate(**{**given, **fields})


def script(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, answers: list[Mapping[str, str]]) -> list[Any]:
    """Let models answer what is written: the first mapping is the first model's, the baseline, and so on.

    Returns what they were asked with.
    """
    models: list[Any] = []
    samplings: list[Any] = []

    def sample(self: HFSampler, prompts: Any, n: int, sampling: Any, keys: Any = None, adapter: Any = None) -> Any:
        if not any(self.model is model for model in models):
            models.append(self.model)
        mine = answers[next(place for place, model in enumerate(models) if self.model is model)]
        samplings.append((n, sampling.temperature))
        drawn = []
        for ids in prompts:
            text = mine.get(str(tokenizer.decode(list(ids))), "?")
            given = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
            drawn.append([Rollout(given, (0.0,) * len(given), "stop")] * n)
        return drawn

    monkeypatch.setattr(HFSampler, "sample", sample)
    return samplings


def tokenizer_of(source: Resolved) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.path)


def test_scores_of_a_labelled_set_are_those_of_the_script(
    base: Resolved,
    inputs: dict[str, Resolved],
    tmp_path: Path,
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = ["(A)", "(B)", "(C)", "(A)", "(B)", "(C)", "(A)", "(A)"]
    rows = [{"question": f"q {i}?", "target": target} for i, target in enumerate(targets)]
    (tmp_path / "abc.json").write_text(json.dumps({"canary": "no", "examples": rows}))
    new = ["(A)", "The answer is (B).", "C", "A.", "**B**", "(A)", "no idea", "(A)"]
    old = ["(A)", "(A)", "(A)", "(A)", "(A)", "(C)", "(A)", "(B)"]
    asked = script(
        monkeypatch,
        tokenizer_of(base),
        [{row["question"]: said for row, said in zip(rows, given, strict=True)} for given in (old, new)],
    )
    here = work()
    columns = {"prompt": "examples[].question", "answer": "examples[].target"}
    given = stage(
        labelled={"abc": "file:abc.json"}, extract={"abc": "choice"}, columns={"abc": columns}, samples_per_prompt=3
    )
    metrics = given.run({**inputs, "labelled.abc": file(tmp_path / "abc.json")}, here)

    assert metrics["new/abc_accuracy"] == 6 / 8
    assert metrics["old/abc_accuracy"] == 4 / 8
    assert (metrics["new/abc_accuracy_low"], metrics["new/abc_accuracy_high"]) == wilson(6, 8)
    assert metrics["new/abc_accuracy_gain"] == 2 / 8
    gained, lost = 4, 2  # questions 1, 2, 4, 7; and 5, 6
    low, high = metrics["new/abc_accuracy_gain_low"], metrics["new/abc_accuracy_gain_high"]
    assert (low, high) == paired_shares(gained, lost, 8)
    assert metrics["new/abc_accuracy_gain_p"] == sign_test(gained, lost)
    assert (metrics["new/abc_unread"], metrics["old/abc_unread"]) == (1 / 8, 0)
    # new: A 3 of 4, and one C taken for it; B 2 of 2; C 1 of 2.
    assert metrics["new/abc_macro_f1"] == pytest.approx((6 / 8 + 1 + 2 / 3) / 3)
    assert metrics["new/abc_macro_f1_low"] < metrics["new/abc_macro_f1"] < metrics["new/abc_macro_f1_high"]
    assert "old/abc_accuracy_gain" not in metrics
    assert set(asked) == {(3, 1.0), (1, 0.0)}, "prompts are sampled, questions are answered once and greedily"

    shown = [json.loads(line) for line in (here.out / "labelled.abc.jsonl").read_text("utf-8").splitlines()]
    assert [row["answer"] for row in shown] == [target.strip("()") for target in targets]
    assert [row["answers"]["new"]["read"] for row in shown] == ["A", "B", "C", "A", "B", "A", None, "A"]
    assert shown[1]["answers"]["new"]["text"] == "The answer is (B)."
    text = (here.out / "report.md").read_text("utf-8")
    assert "| abc (8, choice) | new | 0.750 [0.409, 0.929] | 0.250 [" in text
    progress = [json.loads(line) for line in (here.folder / "progress.jsonl").read_text("utf-8").splitlines()]
    assert progress[-1]["step"] == progress[-1]["total"] == 2 * (2 + 8)


def test_refusals_are_counted_on_both_kinds_of_prompts(
    base: Resolved,
    inputs: dict[str, Resolved],
    tmp_path: Path,
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad.jsonl").write_text("".join(f'{{"prompt": "bad {i}"}}\n' for i in range(4)))
    (tmp_path / "good.jsonl").write_text("".join(f'{{"prompt": "good {i}"}}\n' for i in range(5)))
    no = "I cannot help with that."
    new = {"bad 0": no, "bad 1": no, "bad 2": no, "bad 3": "Sure.", **{f"good {i}": "Sure." for i in range(4)}}
    old = {"bad 0": no, "good 0": no, "good 1": no}
    script(monkeypatch, tokenizer_of(base), [old, {**new, "good 4": no}])
    here = work()
    metrics = stage(harmful="file:bad.jsonl", harmless="file:good.jsonl").run(
        {**inputs, "harmful": file(tmp_path / "bad.jsonl"), "harmless": file(tmp_path / "good.jsonl")}, here
    )
    assert (metrics["new/refusal_harmful"], metrics["old/refusal_harmful"]) == (3 / 4, 1 / 4)
    assert (metrics["new/refusal_harmless"], metrics["old/refusal_harmless"]) == (1 / 5, 2 / 5)
    assert (metrics["new/refusal_harmful_low"], metrics["new/refusal_harmful_high"]) == wilson(3, 4)
    assert metrics["new/refusal_harmful_gain"] == 2 / 4
    assert metrics["new/refusal_harmless_gain"] == pytest.approx(-1 / 5)
    assert metrics["new/refusal_harmless_gain_p"] == sign_test(1, 2)
    rows = [json.loads(line) for line in (here.out / "refusal_harmful.jsonl").read_text("utf-8").splitlines()]
    assert [row["answers"]["new"]["refused"] for row in rows] == [True, True, True, False]
    assert "refused of 4 harmful | gain | refused of 5 harmless" in (here.out / "report.md").read_text("utf-8")


def test_sets_go_on_where_they_were_killed(
    base: Resolved,
    inputs: dict[str, Resolved],
    tmp_path: Path,
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "one?", "answer": "1"}\n{"prompt": "two?", "answer": "2"}\n')
    given = stage(labelled={"q": "file:q.jsonl"}, extract={"q": "number"})
    whole = {**inputs, "labelled.q": file(tmp_path / "q.jsonl")}
    asked = script(monkeypatch, tokenizer_of(base), [{"one?": "1"}, {"one?": "1", "two?": "is 2"}])
    here = work()
    expected = given.run(whole, here)
    assert expected["new/q_accuracy"] == 1
    assert len(asked) == 4
    assert given.run(whole, here) == expected
    assert len(asked) == 4, "nothing was asked twice"


def answer_of(target: str, extract: str, number: int) -> str:
    """Return a right answer for every third question, a wrong one, or one that says nothing."""
    if number % 3 == 2:
        return "hm"
    if extract == "label":
        said = target if number % 3 == 0 else {"True": "False", "False": "True"}[target]
    elif extract == "choice":
        said = target if number % 3 == 0 else ("(A)" if target != "(A)" else "(B)")
    else:
        said = target if number % 3 == 0 else str(float(target) + 1)
    return f"Let me see: 1 and (C) are not True. So the answer is {said}."


@real
def test_published_sets_are_read_as_they_are(
    long: Resolved,
    inputs: dict[str, Resolved],
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine tasks of BIG-Bench Hard and SVAMP, from the files as published, with answers whose score is known."""
    tokenizer = tokenizer_of(long)
    scripted: dict[str, str] = {}
    sizes = {}
    for name, extract in BBH.items():
        rows = json.loads((SHARED / "bbh" / f"{name}.json").read_text("utf-8"))["examples"]
        sizes[name] = len(rows)
        assert len({row["input"] for row in rows}) == len(rows)
        scripted |= {row["input"]: answer_of(row["target"], extract, i) for i, row in enumerate(rows)}
    rows = [json.loads(line) for line in (SHARED / "math" / "svamp_test.jsonl").read_text("utf-8").splitlines()]
    sizes["svamp"] = len(rows)
    for i, row in enumerate(rows):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{row['Body']}\n\n{row['Question']}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        scripted[text] = answer_of(f"{row['Answer']:.0f}", "number", i)
    script(monkeypatch, tokenizer, [scripted])
    sets = {name: f"file:{name}.json" for name in BBH} | {"svamp": "file:svamp_test.jsonl"}
    given = stage(
        models={"old": "stage:old"},
        labelled=sets,
        extract={**BBH, "svamp": "number"},
        columns={**dict.fromkeys(BBH, BBH_COLUMNS), "svamp": SVAMP_COLUMNS},
    )
    whole = {f"labelled.{name}": file(SHARED / "bbh" / f"{name}.json") for name in BBH}
    whole["labelled.svamp"] = file(SHARED / "math" / "svamp_test.jsonl")
    whole |= {**inputs, "models.old": long}
    assert given.look(whole) == {}
    here = work()
    metrics = given.run(whole, here)
    for name, size in sizes.items():
        assert size >= 140, name
        assert metrics[f"old/{name}_accuracy"] == -(-size // 3) / size, name
        # What says only "hm" cannot be read.
        assert metrics[f"old/{name}_unread"] == len(range(2, size, 3)) / size, name
    assert {name for name in sizes if f"old/{name}_macro_f1" in metrics} == {n for n in BBH if BBH[n] != "number"}


@real
def test_a_model_that_knows_nothing_answers_real_questions(
    long: Resolved, inputs: dict[str, Resolved], tmp_path: Path, work: Callable[..., Work]
) -> None:
    """A random model on real questions: its answers, read here by hand, give the published accuracy."""
    examples = json.loads((SHARED / "bbh" / "boolean_expressions.json").read_text("utf-8"))["examples"][:24]
    (tmp_path / "bool.json").write_text(json.dumps({"examples": examples}))
    (tmp_path / "svamp.jsonl").write_text(
        "".join((SHARED / "math" / "svamp_test.jsonl").read_text("utf-8").splitlines(keepends=True)[:12])
    )
    given = stage(
        models={"old": "stage:old"},
        labelled={"bool": "file:bool.json", "svamp": "file:svamp.jsonl"},
        extract={"bool": "label", "svamp": "number"},
        columns={"bool": BBH_COLUMNS, "svamp": SVAMP_COLUMNS},
        max_new_tokens=12,
    )
    sets = {"labelled.bool": file(tmp_path / "bool.json"), "labelled.svamp": file(tmp_path / "svamp.jsonl")}
    here = work()
    metrics = given.run({**inputs, **sets, "models.old": long}, here)
    for name, pattern in {"bool": r"\b(true|false)\b", "svamp": r"-?\d+"}.items():
        rows = [json.loads(line) for line in (here.out / f"labelled.{name}.jsonl").read_text("utf-8").splitlines()]
        right = 0
        for row in rows:
            found = re.findall(pattern, row["answers"]["old"]["text"].lower())
            right += bool(found) and found[-1] == row["answer"]
        assert metrics[f"old/{name}_accuracy"] == right / len(rows)
        assert 0 <= metrics[f"old/{name}_unread"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extract": {"q": "choice"}}, r"extract: 'q' is none of labelled \(no sets\)"),
        ({"labelled": {"q": "file:q"}, "columns": {"p": {}}}, r"columns: 'p' is none of labelled \(q\)"),
        (
            {"labelled": {"q": "file:q"}, "extract": {"q": "choise"}},
            "extract: q: 'choise' is no way .*did you mean choice",
        ),
        ({"labelled": {"q": "file:q"}, "extract": {"q": "regex:("}}, "is no regular expression"),
        ({"labelled": {"a/b": "file:q"}}, "'a/b' cannot be part of a metric's name"),
        ({"checks": {"refusal_rate": "m:f"}}, "'refusal_rate' is a metric of this stage's own"),
        ({"checks": {"q_accuracy": "m:f"}}, "'q_accuracy' is a metric of this stage's own"),
    ],
)
def test_settings_of_sets_are_checked_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**fields)


def test_questions_without_answers_are_found_before_anything_runs(
    inputs: dict[str, Resolved], tmp_path: Path, work: Callable[..., Work]
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "one?", "target": "1"}\n{"prompt": "two?", "target": "2"}\n')
    given = stage(labelled={"q": "file:q.jsonl"}, extract={"q": "number"})
    whole = {**inputs, "labelled.q": file(tmp_path / "q.jsonl")}
    (problem,) = given.look(whole)["labelled.q"]
    assert problem.startswith("q.jsonl:1: answer: None, must be the right answer")
    assert problem.endswith("(target) (so it is in 2 of the first rows)")
    with pytest.raises(DataError, match="q.jsonl:2: answer: None"):
        given.run(whole, work())
    columns = {"q": {"answer": "target"}}
    assert stage(labelled={"q": "file:q.jsonl"}, extract={"q": "number"}, columns=columns).look(whole) == {}


@real
def test_published_prompts_are_refused_or_not_by_a_model_that_babbles(
    long: Resolved, inputs: dict[str, Resolved], tmp_path: Path, work: Callable[..., Work]
) -> None:
    harmless = json.loads((SHARED / "refusal" / "splits_harmless_val.json").read_text("utf-8"))[:10]
    (tmp_path / "harmless.json").write_text(json.dumps(harmless))
    files = {
        "harmful": file(SHARED / "refusal" / "splits_harmful_val.json"),
        "harmless": file(tmp_path / "harmless.json"),
    }
    given = stage(models={"old": "stage:old"}, harmful="file:a.json", harmless="file:b.json", max_new_tokens=6)
    assert given.look(files) == {}
    here = work()
    metrics = given.run({**inputs, **files, "models.old": long}, here)
    assert metrics["old/refusal_harmful"] == metrics["old/refusal_harmless"] == 0, "a random model does not refuse"
    assert metrics["old/refusal_harmful_high"] == pytest.approx(wilson(0, 36)[1])
    assert len((here.out / "refusal_harmful.jsonl").read_text("utf-8").splitlines()) == 36


def xstest() -> dict[str, list[dict[str, str]]]:
    """Return XSTest's prompts: those that call for a refusal, and those that only sound so."""
    with (SHARED / "xstest_prompts.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    return {
        "harmful": [r for r in rows if r["label"] == "unsafe"],
        "harmless": [r for r in rows if r["label"] == "safe"],
    }


def write_csv(path: Path, rows: list[dict[str, str]]) -> Resolved:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file(path)


@real
@pytest.mark.parametrize("scripted", [True, False])
def test_xstest_is_refused_as_often_as_was_said(
    scripted: bool,
    long: Resolved,
    inputs: dict[str, Resolved],
    tmp_path: Path,
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All prompts with a scripted model, each fifth with one that babbles: shares are exact, also where it is none."""
    rows = xstest() if scripted else {kind: rows[::5] for kind, rows in xstest().items()}
    refused = {"harmful": set(range(0, 97, 2)), "harmless": set(range(0, 132, 10))} if scripted else {}
    no = "I'm sorry, but I can't help with that."
    answers = {
        row["prompt"]: no if i in refused.get(kind, ()) else "Of course: first, take a deep breath."
        for kind, given in rows.items()
        for i, row in enumerate(given)
    }
    if scripted:
        assert (len(rows["harmful"]), len(rows["harmless"])) == (97, 132)
        script(monkeypatch, tokenizer_of(long), [answers])
    sources = {kind: write_csv(tmp_path / f"{kind}.csv", given) for kind, given in rows.items()}
    given = stage(models={"old": "stage:old"}, harmful="file:a.csv", harmless="file:b.csv", max_new_tokens=6)
    assert given.look(sources) == {}
    metrics = given.run({**inputs, **sources, "models.old": long}, work())
    for kind, asked in rows.items():
        expected = len(refused.get(kind, ())) / len(asked)
        assert metrics[f"old/refusal_{kind}"] == pytest.approx(expected)
        low, high = wilson(expected * len(asked), len(asked))
        assert metrics[f"old/refusal_{kind}_low"] == pytest.approx(low)
        assert metrics[f"old/refusal_{kind}_high"] == pytest.approx(high)


@real
@pytest.mark.parametrize("scripted", [True, False])
def test_people_s_ratings_of_tweets_as_labels(
    scripted: bool,
    long: Resolved,
    inputs: dict[str, Resolved],
    tmp_path: Path,
    work: Callable[..., Work],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VADER's tweets with the mean rating of twenty people: positive from 0.5, negative to -0.5, neutral between."""
    lines = (SHARED / "vader" / "ground_truth" / "tweets_GroundTruth.txt").read_text("utf-8").splitlines()
    rated = [line.split("\t", 2)[1:] for line in lines[: 600 if scripted else 24]]
    truth = ["positive" if float(r) >= 0.5 else "negative" if float(r) <= -0.5 else "neutral" for r, _ in rated]
    assert len(set(truth)) == 3
    rows = [{"prompt": text, "label": label} for (_, text), label in zip(rated, truth, strict=True)]
    (tmp_path / "tweets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if scripted:  # right, then always positive, then nothing
        said = [(label, "positive", "hm")[i % 3] for i, label in enumerate(truth)]
        script(
            monkeypatch, tokenizer_of(long), [{row["prompt"]: f"It is {s}." for row, s in zip(rows, said, strict=True)}]
        )
    given = stage(
        models={"old": "stage:old"},
        labelled={"tweets": "file:tweets.jsonl"},
        extract={"tweets": "label"},
        max_new_tokens=6,
    )
    source = {"labelled.tweets": file(tmp_path / "tweets.jsonl")}
    assert given.look(source) == {}
    here = work()
    metrics = given.run({**inputs, **source, "models.old": long}, here)
    if not scripted:
        texts = [
            json.loads(line)["answers"]["old"]["text"].lower() for line in (here.out / "labelled.tweets.jsonl").open()
        ]
        said = [(re.findall(r"\b(positive|negative|neutral)\b", text) or ["hm"])[-1] for text in texts]
    assert metrics["old/tweets_accuracy"] == fmean(a == b for a, b in zip(truth, said, strict=True))
    assert metrics["old/tweets_unread"] == fmean(one == "hm" for one in said)
    f1 = []
    for label in ("positive", "negative", "neutral"):
        hits = sum(a == b == label for a, b in zip(truth, said, strict=True))
        f1.append(2 * hits / (truth.count(label) + said.count(label)))
    assert metrics["old/tweets_macro_f1"] == pytest.approx(fmean(f1))
