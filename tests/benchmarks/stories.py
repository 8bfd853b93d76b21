"""Happy stories: prompts, the gold that judges, and what a policy is like on held-out openings (see test_real.py)."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, STOPS = 13, 96, (1, 2)


def write_prompts(data: Path, file: Path) -> None:
    """Write the openings to train on: `<s>` and twelve tokens, none of their texts held out."""
    train, _ = openings(data)
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in train))


@functools.cache
def openings(data: Path) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = _tokenizer(data)
    found: dict[str, list[int]] = {}
    everything = []
    for line in (data / "tinystories" / "tinystories.jsonl").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"].strip())["input_ids"][:PROMPT_TOKENS]
        text = tokenizer.decode(ids[1:])
        if len(ids) == PROMPT_TOKENS and 0 not in ids and tokenizer(text)["input_ids"] == ids:
            found[text] = ids
            everything.append(text)
    unique = sorted(found)
    random.Random(0).shuffle(unique)
    held_out = set(unique[:256])
    return [found[text] for text in everything if text not in held_out], [found[text] for text in unique[:256]]


@functools.cache
def _tokenizer(data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data / "models" / "stories260K")


def _cut(ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in STOPS), len(ids))]


def gold_of(data: Path, answers: list[list[int]]) -> float:
    """Return VADER's mean compound of continuations."""
    return sum(golds_of(data, answers)) / len(answers)


def golds_of(data: Path, answers: list[list[int]]) -> list[float]:
    """Return VADER's compound of each continuation."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text_of(data, ids))["compound"] for ids in answers]


def text_of(data: Path, ids: list[int]) -> str:
    """Return what ids say up to the end token."""
    return str(_tokenizer(data).decode(_cut(ids)))


def evaluate(data: Path, policy: Path, seeds: int = 2) -> dict[str, float]:
    """Return gold, KL to the base (nats a story, exact at each position) and distinct-2, means over sampling seeds."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    _, held_out = openings(data)
    model, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (policy, data / "models" / "stories260K")
    )
    rows = []
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        with torch.no_grad():
            answers = sample(model, held_out)
            rows.append((gold_of(data, answers), kl_of(model, base, held_out, answers), _distinct2(data, answers)))
    means = [round(sum(column) / len(rows), 4) for column in zip(*rows, strict=True)]
    return dict(zip(("gold", "kl", "distinct2"), means, strict=True))


def sample(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return one continuation of each prompt, with its end token where it has one."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor(prompts)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(STOPS),
        pad_token_id=0,
    )
    drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [row[: len(_cut(row)) + 1] for row in drawn[:, ids.shape[1] :].tolist()]


def kl_of(model: Any, base: Any, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Return the mean over continuations of the KL from a model to its base, in nats, exact at each position."""
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        import torch

        ids = torch.tensor([prompt + answer])
        ours, theirs = (one(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in (model, base))
        total += float((ours.exp() * (ours - theirs)).sum())
    return total / len(prompts)


def _distinct2(data: Path, answers: list[list[int]]) -> float:
    pairs = []
    for ids in answers:
        words = re.findall(r"[A-Za-z']+", _tokenizer(data).decode(_cut(ids)).lower())
        pairs += list(itertools.pairwise(words))
    return len(set(pairs)) / max(1, len(pairs))


def best_of_n(data: Path, reward: Path, counts: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Return what the best of n answers by a reward model are like; their KL is at most ln n - (n - 1)/n."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _, held_out = openings(data)
    base = AutoModelForCausalLM.from_pretrained(data / "models" / "stories260K", dtype=torch.float32).eval()
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    torch.manual_seed(1000)
    drawn, scores = [], []
    with torch.no_grad():
        for _ in range(max(counts)):
            answers = sample(base, held_out)
            drawn.append(answers)
            rows = [prompt + answer for prompt, answer in zip(held_out, answers, strict=True)]
            scores.append([scorer(input_ids=torch.tensor([row])).logits.item() for row in rows])
    found = {}
    for n in counts:
        best = [max(range(n), key=lambda k: scores[k][i]) for i in range(len(held_out))]
        chosen = [drawn[k][i] for i, k in enumerate(best)]
        kl = round(math.log(n) - (n - 1) / n, 3)
        found[n] = {
            "gold": round(gold_of(data, chosen), 4),
            "kl": kl,
            "distinct2": round(_distinct2(data, chosen), 4),
        }
    return found
