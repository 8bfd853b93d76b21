"""Plain TRL trains on the files that feedback becomes: every row is kept and read as written, and a step is taken."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.data.feedback.convert import convert
from align_pipeline.data.feedback.settings import Settings
from thumbs import FILES, rating
from tiny import write_tiny_model

START = 1755000000
BATCH = 8
Rows = dict[str, list[dict[str, Any]]]


def asked(index: int) -> Any:
    """Return a prompt: a text, a conversation or one with a system turn."""
    last = f"Sort list {index}: {'bread milk '[index % 7 :]}Äpfel 🍏, please."
    if index % 3 == 0:
        return last
    earlier = [{"role": "user", "content": f"hello {index}"}, {"role": "assistant", "content": "Hello!\n\nYes?"}]
    system = [{"role": "system", "content": "Be brief."}] if index % 3 == 2 else []
    return [*system, *earlier, {"role": "user", "content": last}]


def thumbs() -> list[dict[str, Any]]:
    """Return votes, some without a time: prompts with two answers that make a pair, and prompts with three."""
    votes = []
    for index in range(60):
        paired = index % 2
        for answer, label in enumerate((1, -1) if paired else (1, 1, 1) if index % 4 else (-1, -1, 1)):
            text = f"answer {answer} to {index}" + " and so on" * ((index + answer) % 4)
            ts = None if index % 5 == 0 else START + 60 * index + answer
            votes.append(rating(label, text, f"u{(index * 3 + answer) % 17}", asked(index), ts=ts, model=f"m{answer}"))
    return votes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what the votes become, and a tiny model beside it."""
    folder = tmp_path_factory.mktemp("plain")
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(vote) + "\n" for vote in thumbs()), encoding="utf-8")
    (folder / "out").mkdir()
    settings = Settings(test=0.2, margins=True)
    places = {"scratch": folder / "scratch", "private": folder / "private", "place": "out"}
    convert([(log, log.name)], settings, folder / "out", **places)
    write_tiny_model(folder / "model", [log.read_text(encoding="utf-8")])
    return folder


@pytest.fixture(scope="module")
def written(folder: Path) -> Rows:
    """Return the rows of each file as they stand there."""
    texts = {name: (folder / "out" / f"{name}.jsonl").read_text(encoding="utf-8") for name in FILES}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def loaded(folder: Path, kind: str) -> Any:
    """Return the files of a kind as a user of TRL loads them."""
    from datasets import load_dataset

    files = {side: str(folder / "out" / f"{kind}.{side}.jsonl") for side in ("train", "test")}
    return load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))


def plain(folder: Path, out: Path, kind: str, name: str, size: int, model_class: Any, **more: Any) -> Any:
    """Return TRL's trainer of a name on the rows of a kind, for one step on `size` of them."""
    import torch
    import trl
    from transformers import AutoTokenizer

    rows = loaded(folder, kind)
    torch.manual_seed(0)
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(out),
        per_device_train_batch_size=size,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return getattr(trl, f"{name}Trainer")(
        model=model_class.from_pretrained(folder / "model", dtype=torch.float32, **more),
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def template(turns: list[dict[str, str]]) -> str:
    """Return what ChatML writes for messages."""
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def assert_read_as_written(trainer: Any, rows: Rows, kind: str, sides: tuple[str, ...]) -> None:
    """Fail unless TRL kept every row of both files, in order, and its ids spell prompts and answers as written."""
    decode = trainer.processing_class.decode
    for side, kept in (("train", trainer.train_dataset), ("test", trainer.eval_dataset)):
        assert len(kept) == len(rows[f"{kind}.{side}"]) > 0
        for mine, theirs in zip(rows[f"{kind}.{side}"], kept, strict=True):
            assert decode(theirs["prompt_ids"]) == template(mine["prompt"]) + "<|im_start|>assistant\n"
            for answer in sides:
                assert decode(theirs[f"{answer}_ids"]) == f"{mine[answer][0]['content']}<|im_end|>\n"


def test_dpo_trains_on_pairs(folder: Path, written: Rows, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    trainer = plain(folder, tmp_path, "pairs", "DPO", BATCH, AutoModelForCausalLM)
    assert_read_as_written(trainer, written, "pairs", ("chosen", "rejected"))
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_kto_trains_on_unpaired_rows_that_it_holds_against_other_prompts(folder: Path, written: Rows, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    trainer = plain(folder, tmp_path, "unpaired", "KTO", BATCH, AutoModelForCausalLM)
    assert_read_as_written(trainer, written, "unpaired", ("completion",))
    mine, theirs = written["unpaired.train"], trainer.train_dataset
    assert list(theirs["label"]) == [row["label"] for row in mine] and len({row["label"] for row in mine}) == 2
    assert all(one["prompt"] != other["prompt"] for one, other in pairwise(mine))
    own: dict[str, set[tuple[int, ...]]] = {}
    for row in theirs:
        own.setdefault(json.dumps(row["prompt"]), set()).add(tuple(row["completion_ids"]))
    assert max(map(len, own.values())) > 1, "no prompt has several answers, so nothing could be held against its like"
    for number, row in enumerate(theirs):
        alone = number == len(theirs) - 1 and number % BATCH == 0
        assert alone or tuple(row["KL_completion_ids"]) not in own[json.dumps(row["prompt"])]
    assert trainer.train().training_loss == pytest.approx(0.5, abs=1e-5)
    first = next(iter(trainer.get_train_dataloader()))
    assert first["label"].tolist() == [row["label"] for row in mine[:BATCH]], (
        "it is trained on in the order of the file"
    )


def test_the_reward_model_learns_pairs_by_their_margins(folder: Path, written: Rows, tmp_path: Path):
    import torch
    from transformers import AutoModelForSequenceClassification

    rows = written["pairs.train"]
    trainer = plain(folder, tmp_path, "pairs", "Reward", len(rows), AutoModelForSequenceClassification, num_labels=1)
    assert len(trainer.train_dataset) == len(rows) and len(trainer.eval_dataset) == len(written["pairs.test"])
    decode = trainer.processing_class.decode
    expected = []
    for mine, theirs in zip(rows, trainer.train_dataset, strict=True):
        scores = []
        for side in ("chosen", "rejected"):
            assert decode(theirs[f"{side}_ids"]) == template(mine["prompt"] + mine[side])
            with torch.no_grad():
                scores.append(trainer.model(torch.tensor([theirs[f"{side}_ids"]])).logits.item())
        expected.append(math.log1p(math.exp(-(scores[0] - scores[1] - mine["margin"]))))
    assert trainer.train().training_loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)
