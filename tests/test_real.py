"""Real input: a real 260K-parameter story model, real stories, a real sentiment scorer; and plain TRL beside us.

The goal is "happy stories": continuations of held-out openings that VADER calls positive, at little divergence from the
model and without repeating itself. The pairs, plain TRL's models and ours are made on the same token ids, and judged by
one `evaluate` stage on the same prompts with the same seeds.
"""

import itertools
import json
import random
import re
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

from harness import align
from killing import run_and_kill
from tiny import write_tiny_model

SHARED = Path(__file__).parents[2] / "shared" / "data"
STORIES = SHARED / "models" / "stories260K"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout"),
]

PROMPT_TOKENS, NEW_TOKENS = 13, 96
SEEDS = (0, 1, 2)

SCORER = """\
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def gold(prompts, completions, **columns):
    return [analyzer.polarity_scores(text)["compound"] for text in completions]
"""


def openings() -> tuple[list[list[int]], list[list[int]]]:
    """Return (train, held out): `<s>` and the first 12 tokens of stories; no held-out text occurs in train."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    found: dict[str, list[int]] = {}
    everything = []
    for line in (SHARED / "tinystories" / "tinystories.jsonl").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"].strip())["input_ids"][:PROMPT_TOKENS]
        text = tokenizer.decode(ids[1:])
        if len(ids) == PROMPT_TOKENS and 0 not in ids and tokenizer(text)["input_ids"] == ids:
            found[text] = ids
            everything.append(text)
    unique = sorted(found)
    random.Random(0).shuffle(unique)
    held_out = set(unique[:256])
    return [found[text] for text in everything if text not in held_out], [found[text] for text in unique[:256]]


def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Return one continuation per prompt by Transformers' own generate, cut after the first end token."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[1, 2],
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    answers = []
    with torch.no_grad():
        for start in range(0, len(prompts), 256):
            ids = torch.tensor(prompts[start : start + 256])
            drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
            for row in drawn[:, PROMPT_TOKENS:].tolist():
                end = next((i for i, token in enumerate(row) if token in (1, 2)), len(row))
                answers.append(row[: end + 1])
    return answers


def preference_pairs(prompts: list[list[int]], count: int, seed: int) -> list[dict]:
    """Return pairs of the base model's own samples, ordered by VADER; differences below 0.02 are ties and left out."""
    from transformers import AutoTokenizer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    tokenizer, analyzer = AutoTokenizer.from_pretrained(STORIES), SentimentIntensityAnalyzer()
    asked = prompts * 4
    random.Random(seed).shuffle(asked)
    asked = asked[: int(count * 1.35)]
    answers = sample([ids for ids in asked for _ in range(2)], seed)
    gold = [analyzer.polarity_scores(tokenizer.decode([i for i in a if i not in (1, 2)]))["compound"] for a in answers]
    rows = []
    for i, ids in enumerate(asked):
        one, two = 2 * i, 2 * i + 1
        if abs(gold[one] - gold[two]) >= 0.02:
            better, worse = (one, two) if gold[one] > gold[two] else (two, one)
            rows.append({"prompt_ids": ids, "chosen_ids": answers[better], "rejected_ids": answers[worse]})
    assert len(rows) >= count, len(rows)
    return rows[:count]


def plain_trl_reward(train: list[dict], test: list[dict], out: Path) -> float:
    """Return the accuracy on `test` of TRL's RewardTrainer called plainly, with our stage's settings."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(STORIES, pad_token="<unk>")
    torch.manual_seed(0)  # of the fresh head, as our stage seeds it
    model = AutoModelForSequenceClassification.from_pretrained(STORIES, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    arguments = RewardConfig(
        output_dir=str(out), per_device_train_batch_size=16, num_train_epochs=2, learning_rate=1e-3, warmup_steps=0.04,
        lr_scheduler_type="cosine", bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0, max_length=256, center_rewards_coefficient=0.01,
    )  # fmt: skip
    whole = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in train]
    RewardTrainer(
        model=model, args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(whole)
    ).train()
    model.eval()
    right = 0
    with torch.no_grad():
        for row in test:
            scores = [
                model(torch.tensor([row["prompt_ids"] + row[side]])).logits.item()
                for side in ("chosen_ids", "rejected_ids")
            ]
            right += scores[0] > scores[1]
    return right / len(test)


def plain_trl_dpo(train: list[dict], seed: int, out: Path) -> None:
    """Save what TRL's DPOTrainer makes of the same ids with the same settings."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    def base():
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(STORIES, pad_token="<unk>")
    arguments = DPOConfig(
        output_dir=str(out / "trainer"), per_device_train_batch_size=16, num_train_epochs=1, learning_rate=3e-4,
        warmup_steps=0.08, lr_scheduler_type="cosine", beta=0.2, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=seed, max_length=256,
    )  # fmt: skip
    model = base()
    trainer = OnIds(
        model=model,
        ref_model=base(),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
    )
    trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def distinct_2(texts: list[str]) -> float:
    pairs = []
    for text in texts:
        words = re.findall(r"[A-Za-z']+", text.lower())
        pairs += list(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


HEAD = f"""\
name: happy-stories
tuning: full
model: file:{STORIES}
stages:
  reward:
    type: reward
    data: file:pairs.jsonl
    evaluation: file:fresh.jsonl
    learning_rate: 1e-3
    warmup: 0.04
    epochs: 2
    batch_size: 16
    how: {{micro_batch: 16}}
"""
DPO = f"""\
  dpoSEED:
    type: dpo
    policy: file:{STORIES}
    data: file:pairs.jsonl
    beta: 0.2
    learning_rate: 3e-4
    warmup: 0.08
    batch_size: 16
    held_out: 0
    seed: SEED
    how: {{micro_batch: 16}}
"""
EVALUATE = f"""\
  evaluate:
    type: evaluate
    baseline: base
    scorer: stage:reward
    checks: {{gold: "happy:gold"}}
    prompts: file:heldout.jsonl
    max_new_tokens: {NEW_TOKENS}
    samples_per_prompt: 2
    models:
      base: file:{STORIES}
"""


def happy_pipeline() -> str:
    models = "".join(f"      dpo{seed}: stage:dpo{seed}\n      trl{seed}: file:trl{seed}\n" for seed in SEEDS)
    return HEAD + "".join(DPO.replace("SEED", str(seed)) for seed in SEEDS) + EVALUATE + models


def test_happy_stories(tmp_path: Path, record_property):
    train_prompts, held_out = openings()
    train = preference_pairs(train_prompts, 2000, seed=7)
    fresh = preference_pairs(train_prompts, 3000, seed=1007)
    write_rows(tmp_path / "pairs.jsonl", train)
    write_rows(tmp_path / "fresh.jsonl", fresh)
    write_rows(tmp_path / "heldout.jsonl", [{"prompt_ids": ids} for ids in held_out])
    (tmp_path / "happy.py").write_text(SCORER)
    (tmp_path / "happy.yaml").write_text(happy_pipeline())
    trl_accuracy = plain_trl_reward(train, fresh, tmp_path / "trl-reward")
    for seed in SEEDS:
        plain_trl_dpo(train, seed, tmp_path / f"trl{seed}")

    align(tmp_path, "run", "happy.yaml")

    stages = json.loads((tmp_path / "runs" / "happy-stories" / "manifest.json").read_text())["stages"]
    accuracy = stages["reward"]["metrics"]["accuracy"]
    assert stages["reward"]["metrics"]["n"] == 3000
    metrics = stages["evaluate"]["metrics"]
    samples = [json.loads(line) for line in (tmp_path / "runs/happy-stories/evaluate/samples.jsonl").open()]
    figures = {}
    for name in ("base", *(f"{kind}{seed}" for kind in ("dpo", "trl") for seed in SEEDS)):
        answers = [row["answers"][name] for row in samples]
        gold = [fmean(answer["scores"]["gold"] for answer in drawn) for drawn in answers]
        figures[name] = {
            "gold": fmean(gold),
            "gold_se": stdev(gold) / len(gold) ** 0.5,
            "kl": metrics.get(f"{name}/kl", 0.0),
            "distinct_2": distinct_2([drawn[0]["text"] for drawn in answers]),
        }
        assert figures[name]["gold"] == pytest.approx(metrics[f"{name}/gold"])
    print(json.dumps({"reward": accuracy, "trl_reward": trl_accuracy, **figures}, indent=1))

    assert accuracy >= 0.68 and accuracy >= trl_accuracy - 0.02
    ours, theirs = ([figures[f"{kind}{seed}"] for seed in SEEDS] for kind in ("dpo", "trl"))
    assert median(one["gold"] for one in ours) >= 0.94
    assert median(one["kl"] for one in ours) <= 30
    assert median(one["distinct_2"] for one in ours) >= 0.45
    for one, other in zip(ours, theirs, strict=True):
        assert abs(one["gold"] - other["gold"]) <= 2 * (one["gold_se"] ** 2 + other["gold_se"] ** 2) ** 0.5
    assert abs(figures["base"]["gold"] - 0.52) < 0.06, "the base model's own stories"


def test_instructions_on_real_rows_resumed_once(tmp_path: Path):
    """GSM8K's questions and answers: the loss falls, and a run that was killed once ends with the same weights."""
    rows = [json.loads(line) for line in (SHARED / "sft" / "gsm8k_train.jsonl").open(encoding="utf-8")][:1000]
    write_rows(tmp_path / "gsm8k.jsonl", rows)
    write_tiny_model(tmp_path / "model", [row["question"] + "\n" + row["answer"] for row in rows])
    (tmp_path / "math.yaml").write_text(
        "type: sft\nmodel: file:model\ndata: file:gsm8k.jsonl\ncolumns: {prompt: question, completion: answer}\n"
        "tuning: full\nlearning_rate: 2e-3\nbatch_size: 16\nmax_length: 512\n"
        "how: {micro_batch: 4, checkpoint_every_steps: 10, logging_steps: 1}\n"
    )
    align(tmp_path, "run", "math.yaml", "--store", "calm")
    run_and_kill(tmp_path, "math.yaml", "step", at_step=27)
    align(tmp_path, "run", "math.yaml")
    calm, resumed = (json.loads((tmp_path / store / "math/manifest.json").read_text()) for store in ("calm", "runs"))
    assert calm["stages"]["sft"]["digest"] == resumed["stages"]["sft"]["digest"]
    assert calm["stages"]["sft"]["metrics"] == resumed["stages"]["sft"]["metrics"]
    record = json.loads((tmp_path / "runs/math/sft/artifact.json").read_text())
    assert record["resources"]["attempts"] == 2
    curve = [json.loads(line) for line in (tmp_path / "runs/math/sft/curve.jsonl").open()]
    losses = [point["loss"] for point in curve if "loss" in point]
    assert fmean(losses[-10:]) < losses[0] - 1.2, "nats per token"
