"""Evaluation: every number against one that is worked out another way."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import divergence, evaluate, evaluate_report
from align_pipeline.stages.divergence import batches, document_nats, kl
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.rollout import HFSampler

RULES = """
def letters(completions, **_):
    return [text.count("e") for text in completions]

def mean_id(completion_ids, **_):
    return [sum(ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(scope="session")
def other(base: Resolved, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """The base with its weights shaken."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(str(base.path), folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return Resolved(ref="file:other", digest="sha256:" + "c" * 64, path=str(folder))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "evaluate_rules.py").write_text(RULES, "utf-8")
    names = ("bread", "milk", "red apples", "the shelf", "nine", "six")
    prompts = [{"prompt": f"where is {name}? "} for name in names]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), "utf-8")
    (folder / "text.txt").write_text(
        "the shop opens at nine\nbread and milk\nred apples are on the left shelf\n", "utf-8"
    )
    return folder


def inputs_of(files: Path, **models: Resolved) -> dict[str, Resolved]:
    digest = "sha256:" + "d" * 64
    found = {f"models.{name}": source for name, source in models.items()}
    for field, name in {"scorer": "evaluate_rules:letters", "checks.mean_id": "evaluate_rules:mean_id"}.items():
        found[field] = Resolved(ref=name, digest=digest, function=name, search_path=str(files))
    found["prompts"] = Resolved(ref="file:prompts.jsonl", digest=digest, path=str(files / "prompts.jsonl"))
    found["text"] = Resolved(ref="file:text.txt", digest=digest, path=str(files / "text.txt"))
    return found


def stage(**fields: Any) -> Evaluate:
    given: dict[str, Any] = {
        "models": {"new": "stage:new", "old": "stage:old"},
        "baseline": "old",
        "scorer": "evaluate_rules:letters",
        "checks": {"mean_id": "evaluate_rules:mean_id"},
        "prompts": "file:prompts.jsonl",
        "text": "file:text.txt",
        "samples_per_prompt": 3,
        "max_new_tokens": 10,
        "seed": 4,
    }
    return Evaluate(**{**given, **fields})


def load(source: Resolved) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()


def full_kl(model: Any, baseline: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> float:
    """Return the KL by the definition, one row, in float64."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        p = torch.softmax(model(ids).logits[0].double() / temperature, -1)
        q = torch.softmax(baseline(ids).logits[0].double() / temperature, -1)
    steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float((p[t] * (p[t] / q[t]).log()).sum()) for t in steps)


def resampled(values: list[float], over: list[int] | None = None) -> tuple[float, float]:
    """Return the middle 95 % of the means (or ratios) of 2,000 draws with the stage's seed."""
    import numpy as np

    taken = np.random.default_rng(4).integers(len(values), size=(2000, len(values)), dtype=np.int32)
    sums = [sum(values[i] for i in row) / (sum(over[i] for i in row) if over else len(row)) for row in taken]
    low, high = np.quantile(sums, [0.025, 0.975])
    return float(low), float(high)


def flipped(differences: list[float]) -> float:
    """Return how often signs give a sum as far from 0, of all signs."""
    sums = [
        abs(sum(sign * one for sign, one in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return fmean(one >= sums[0] - 1e-9 for one in sums)


def ends(metrics: dict[str, float], name: str) -> tuple[float, float]:
    return metrics[f"{name}_low"], metrics[f"{name}_high"]


def test_the_numbers_of_a_run(base: Resolved, other: Resolved, files: Path, work: Callable[..., Work]) -> None:
    import torch
    from transformers import AutoTokenizer

    here = work()
    metrics = stage().run(inputs_of(files, new=other, old=base), here)
    tokenizer, old, new = AutoTokenizer.from_pretrained(base.path), load(base), load(other)
    rows = [json.loads(line) for line in (here.out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [
        json.loads(line)["prompt"] for line in (files / "prompts.jsonl").read_text("utf-8").splitlines()
    ]
    nats: dict[str, list[float]] = {}
    for name, model in {"old": old, "new": new}.items():
        answers = [answer for row in rows for answer in row["answers"][name]]
        assert len(answers) == 18
        scores = [tokenizer.decode(answer["ids"], skip_special_tokens=True).count("e") for answer in answers]
        assert metrics[f"{name}/reward"] == pytest.approx(fmean(scores))
        assert metrics[f"{name}/length"] == pytest.approx(fmean(len(answer["ids"]) for answer in answers))
        assert metrics[f"{name}/mean_id"] == pytest.approx(fmean(fmean(answer["ids"]) for answer in answers))
        ended = [answer["ids"][-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id) for answer in answers]
        assert metrics[f"{name}/eos_rate"] == pytest.approx(fmean(ended))
        assert metrics[f"{name}/reward_low"] <= metrics[f"{name}/reward"] <= metrics[f"{name}/reward_high"]
        nats[name], tokens = [], []
        for line in (files / "text.txt").read_text("utf-8").splitlines():
            ids = [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            nats[name].append(-sum(float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)))
            tokens.append(len(ids) - 1)
        assert metrics[f"{name}/perplexity"] == pytest.approx(math.exp(sum(nats[name]) / sum(tokens)), rel=1e-5)
        low, high = resampled(nats[name], tokens)
        expected = (math.exp(low), math.exp(high))
        assert ends(metrics, f"{name}/perplexity") == pytest.approx(expected, rel=1e-5)
    more = [mine - theirs for mine, theirs in zip(nats["new"], nats["old"], strict=True)]
    ratio = metrics["new/perplexity"] / metrics["old/perplexity"]
    assert metrics["new/perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    expected = tuple(math.exp(end) for end in resampled(more, tokens))
    assert ends(metrics, "new/perplexity_ratio") == pytest.approx(expected, rel=1e-5)
    assert metrics["new/perplexity_ratio_p"] == flipped(more)

    costs = [
        fmean(full_kl(new, old, row["prompt_ids"], answer["ids"]) for answer in row["answers"]["new"]) for row in rows
    ]
    assert metrics["new/kl"] == pytest.approx(fmean(costs), rel=1e-4)
    assert ends(metrics, "new/kl") == pytest.approx(resampled(costs), rel=1e-4)
    assert fmean(costs) > 0.05, "the two models should differ"
    wins = [
        (a["scores"]["reward"] > b["scores"]["reward"]) + 0.5 * (a["scores"]["reward"] == b["scores"]["reward"])
        for row in rows
        for a in row["answers"]["new"]
        for b in row["answers"]["old"]
    ]
    assert metrics["new/win_rate"] == pytest.approx(fmean(wins))
    gain = metrics["new/mean_id"] - metrics["old/mean_id"]
    assert abs(gain) > 1, "the two models should differ"
    assert metrics["new/mean_id_gain"] == pytest.approx(gain)
    assert metrics["new/mean_id_gain_low"] < gain < metrics["new/mean_id_gain_high"]
    assert not {"old/win_rate", "old/kl", "old/mean_id_gain", "old/win_rate_p"} & metrics.keys()
    own = [[a["scores"]["reward"] for a in row["answers"]["new"]] for row in rows]
    base_scores = [[a["scores"]["reward"] for a in row["answers"]["old"]] for row in rows]
    per_row = [
        fmean((a > b) + (a == b) / 2 for a in mine for b in theirs)
        for mine, theirs in zip(own, base_scores, strict=True)
    ]
    assert metrics["new/win_rate_p"] == flipped([win - 0.5 for win in per_row])
    assert ends(metrics, "new/win_rate") == pytest.approx(resampled(per_row))
    assert "new/win_rate_detectable" not in metrics, "six prompts show nothing, whatever they say"
    gains = [fmean(mine) - fmean(theirs) for mine, theirs in zip(own, base_scores, strict=True)]
    assert metrics["new/reward_gain"] == pytest.approx(fmean(gains))
    assert ends(metrics, "new/reward_gain") == pytest.approx(resampled(gains))
    assert metrics["new/reward_gain_p"] == flipped(gains)
    ended_by_row = [fmean(a["finish"] == "stop" for a in row["answers"]["new"]) for row in rows]
    assert ends(metrics, "new/eos_rate") == pytest.approx(resampled(ended_by_row))
    low, rate, high = (metrics[f"new/length_controlled_win_rate{end}"] for end in ("_low", "", "_high"))
    assert low <= rate <= high
    bigrams = [tuple(pair) for row in rows for a in row["answers"]["new"] for pair in itertools.pairwise(a["ids"])]
    assert metrics["new/distinct_2"] == len(set(bigrams)) / len(bigrams)
    assert ends(metrics, "new/distinct_2_gain") != ends(metrics, "new/distinct_2")
    gain = metrics["new/distinct_2"] - metrics["old/distinct_2"]
    assert metrics["new/distinct_2_gain"] == pytest.approx(gain)
    assert fmean(ends(metrics, "new/distinct_2_gain")) == pytest.approx(gain)

    report = json.loads((here.out / "report.json").read_text("utf-8"))
    assert report["metrics"] == metrics
    assert (report["prompts"], report["text"]["documents"], report["text"]["truncated"]) == (6, 3, 0)
    text = (here.out / "report.md").read_text("utf-8")
    assert "| old (baseline) |" in text
    assert "new and old cannot be told apart by the scorer" in text
    assert "of the comparisons on 6 prompts" in text
    assert "cannot be seen at this size" in text
    progress = [json.loads(line) for line in (here.folder / "progress.jsonl").read_text("utf-8").splitlines()]
    assert progress[-1]["step"] == progress[-1]["total"] == 12
    assert progress[-1]["samples"] == 12
    drawn = [answer for row in rows for given in row["answers"].values() for answer in given]
    assert progress[-1]["tokens"] == sum(len(answer["ids"]) for answer in drawn)


def test_a_model_against_itself_is_even(base: Resolved, files: Path, work: Callable[..., Work]) -> None:
    metrics = stage().run(inputs_of(files, new=base, old=base), work())
    assert metrics["new/reward"] == metrics["old/reward"], "equal models draw equal answers from equal seeds"
    assert metrics["new/win_rate"] == pytest.approx(0.5)
    assert metrics["new/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["new/mean_id_gain_low"] == metrics["new/mean_id_gain_high"] == 0


def test_one_prompt_and_one_document_prove_nothing(
    base: Resolved, other: Resolved, files: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    inputs = inputs_of(files, new=other, old=base)
    for field, name, text in (("prompts", "one.jsonl", '{"prompt": "milk?"}\n'), ("text", "one.txt", "the shop\n")):
        (tmp_path / name).write_text(text)
        inputs[field] = Resolved(ref=f"file:{name}", digest="sha256:" + "6" * 64, path=str(tmp_path / name))
    here = work()
    metrics = stage(samples_per_prompt=1).run(inputs, here)
    assert metrics["new/win_rate_p"] == metrics["new/reward_gain_p"] == metrics["new/perplexity_ratio_p"] == 1
    assert "new/win_rate_detectable" not in metrics
    assert "new and old cannot be told apart by the scorer" in (here.out / "report.md").read_text("utf-8")


def test_documents_are_cut_alike_for_models_of_unequal_context(
    base: Resolved, files: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    """The same weights with room for 20 positions and for 256 are equally perplexed."""
    short = tmp_path / "short"
    shutil.copytree(str(base.path), short)
    config = json.loads((short / "config.json").read_text("utf-8"))
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}), "utf-8")
    (tmp_path / "long.txt").write_text(
        "the shop opens at nine and closes at six; bread, milk\n" * 2 + "milk\n", "utf-8"
    )
    (tmp_path / "few.jsonl").write_text('{"prompt": "m"}\n', "utf-8")
    inputs = inputs_of(files, new=Resolved(ref="file:short", digest="sha256:" + "5" * 64, path=str(short)), old=base)
    for field, name in (("text", "long.txt"), ("prompts", "few.jsonl")):
        inputs[field] = Resolved(ref=f"file:{name}", digest="sha256:" + "6" * 64, path=str(tmp_path / name))
    here = work()
    metrics = stage().run(inputs, here)
    assert metrics["new/perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    counts = json.loads((here.out / "report.json").read_text("utf-8"))["text"]
    assert (counts["documents"], counts["truncated"]) == (3, 2) and counts["tokens"] < 2 * 19 + 10


def test_a_killed_run_asks_no_model_twice(
    base: Resolved, other: Resolved, files: Path, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(files, new=other, old=base)
    whole, killed = work("whole"), work("killed")
    expected = stage().run(inputs, whole)
    asked: list[int] = []
    sample, exact = HFSampler.sample, evaluate.kl

    def counted(self: HFSampler, prompts: Any, *rest: Any, **named: Any) -> Any:
        asked.append(len(prompts))
        return sample(self, prompts, *rest, **named)

    def killed_in_kl(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HFSampler, "sample", counted)
    monkeypatch.setattr(evaluate, "kl", killed_in_kl)
    with pytest.raises(KeyboardInterrupt):
        stage().run(inputs, killed)
    monkeypatch.setattr(evaluate, "kl", exact)
    assert stage().run(inputs, killed) == expected
    assert asked == [6, 6], "one call for each model, before the kill; none after it"
    for file in ("report.json", "report.md", "samples.jsonl"):
        assert (killed.out / file).read_bytes() == (whole.out / file).read_bytes()


def test_kl_does_not_depend_on_batches(base: Resolved, other: Resolved) -> None:
    draw = random.Random(0)
    rows = [
        ([draw.randrange(4, 250) for _ in range(draw.randrange(1, 9))], [7] * draw.randrange(1, 9)) for _ in range(7)
    ]
    old, new = load(base), load(other)
    for temperature in (1.0, 0.5):
        expected = [full_kl(new, old, prompt, answer, temperature) for prompt, answer in rows]
        for micro_batch in (1, 3, None):
            assert kl(new, old, rows, temperature, micro_batch) == pytest.approx(expected, rel=1e-4)


def test_kl_is_the_mean_of_the_sampled_log_ratios(base: Resolved, other: Resolved) -> None:
    """The chain rule: the expected sum of log p/q over answers is the KL of the whole answers' distributions."""
    import torch

    from align_pipeline.stages.rollout import Sampling

    old, new = load(base), load(other)
    prompt, count = [9, 10, 11], 3000
    answers = HFSampler(new, 0).sample([prompt], count, Sampling(3, frozenset({5}), seed=2))[0]
    exact = kl(new, old, [(prompt, answer.ids) for answer in answers], 1.0, 64)
    ratios: list[float] = []
    for length in (1, 2, 3):
        alike = [answer for answer in answers if len(answer.ids) == length]
        drawn = torch.tensor([answer.ids for answer in alike], dtype=torch.long).reshape(-1, length)
        with torch.no_grad():
            logits = old(torch.cat((torch.tensor([prompt] * len(alike)).reshape(-1, 3), drawn), 1)).logits
        logprobs = torch.log_softmax(logits[:, len(prompt) - 1 : -1], -1).gather(-1, drawn[..., None])
        theirs = logprobs.sum((1, 2)).tolist()
        ratios += [sum(answer.logprobs) - other for answer, other in zip(alike, theirs, strict=True)]
    mean = fmean(ratios)
    error = math.sqrt(fmean((ratio - mean) ** 2 for ratio in ratios) / count)
    assert abs(mean - fmean(exact)) < 3.3 * error
    assert error < 0.1 * fmean(exact), "the test must be able to see a wrong KL"


def test_perplexity_of_a_uniform_model_is_its_vocabulary(base: Resolved) -> None:
    import torch

    model = load(base)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    nats = document_nats(model, [[1, 2, 3], [4, 5]], None)
    assert nats == pytest.approx([2 * math.log(model.config.vocab_size), math.log(model.config.vocab_size)], rel=1e-5)


def test_batches_hold_every_row_once_within_the_budget(base: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base)
    rows = [([1] * 3, [2] * length) for length in (9, 1, 5, 2, 9, 4)]
    monkeypatch.setattr(divergence, "LOGIT_BYTES", 4 * model.config.vocab_size * 12)
    made = batches(model, rows, None)
    assert sorted(i for batch in made for i in batch) == list(range(6))
    for batch in made:
        assert len(batch) == 1 or len(batch) * (max(len(rows[i][1]) for i in batch) + 1) <= 12
    assert max(map(len, made)) > 1


def test_conversations_are_asked_with_the_template_of_whoever_has_one(
    base: Resolved, other: Resolved, files: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    from transformers import AutoTokenizer

    plain = tmp_path / "plain"
    shutil.copytree(str(base.path), plain)
    (plain / "chat_template.jinja").unlink()
    untaught = Resolved(ref="file:plain", digest="sha256:" + "9" * 64, path=str(plain))
    rows = tmp_path / "chat.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "bread?"}]}) + "\n", "utf-8")
    inputs = inputs_of(files, new=other, old=untaught)
    inputs["prompts"] = Resolved(ref="file:chat.jsonl", digest="sha256:" + "8" * 64, path=str(rows))
    here = work()
    stage(samples_per_prompt=1).run(inputs, here)
    shown = json.loads((here.out / "samples.jsonl").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    expected = tokenizer("<|im_start|>user\nbread?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert shown["prompt_ids"] == expected
    assert shown["prompt"] == [{"role": "user", "content": "bread?"}]


def test_models_of_other_tokenizers_are_refused(
    base: Resolved, files: Path, tmp_path: Path, work: Callable[..., Work]
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "foreign"
    shutil.copytree(str(base.path), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    foreign = Resolved(ref="file:foreign", digest="sha256:" + "7" * 64, path=str(folder))
    with pytest.raises(AlignError, match="models: new: its tokenizer is not that of old"):
        stage().run(inputs_of(files, new=foreign, old=base), work())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baseline": "odl"}, "baseline 'odl' is none of models .*did you mean old"),
        ({"models": {"a/b": "stage:a", "old": "stage:old"}}, "'a/b' cannot be part of a metric's name"),
        ({"checks": {"kl": "m:f"}}, "checks: 'kl' is a metric of this stage's own"),
    ],
)
def test_names_are_checked_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**fields)


def test_user_text_stays_inside_its_line_of_the_report() -> None:
    assert evaluate_report._one_line("a\n# b | <script>") == r"a \# b \| \<script\>"
    assert len(evaluate_report._one_line("x" * 1000)) == 400


def test_the_cells_of_the_report() -> None:
    metrics = {"a/win_rate_p": 0.0001, "a/b_p": 0.25, "a/judge_prompt_tokens": 123456.0, "a/x": 0.5, "a/x_low": 0.25}
    metrics["a/x_high"] = 0.75
    cells = [
        evaluate_report._cell(metrics, f"a/{name}") for name in ("win_rate_p", "b_p", "judge_prompt_tokens", "x", "y")
    ]
    assert cells == ["<0.001", "0.250", "123,456", "0.500 [0.250, 0.750]", ""]
