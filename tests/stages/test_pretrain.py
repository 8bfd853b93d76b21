"""Pretraining: a tokenizer, a new model, more training of an old one, and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import How, Resolved, Work
from align_pipeline.stages import training
from align_pipeline.stages.models import eos_ids, load_tokenizer
from align_pipeline.stages.pretrain import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    Architecture,
    Pretrain,
    new_model,
    train_tokenizer,
)
from tiny import adapter

NAMES = ("Ann", "Ben", "Clara", "Dan", "Eve", "Finn", "Grace", "Hugo", "Ivy", "Jack")
ITEMS = ("ring", "drum", "table", "kettle", "scarf", "clock")
DOCUMENTS = [f"{name} came to the shop. The {item} costs {len(item)} coins." for name in NAMES for item in ITEMS]


@pytest.fixture
def text(tmp_path: Path) -> Resolved:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS), "utf-8")
    return Resolved(ref="file:text.txt", digest="sha256:" + "d" * 64, path=str(path))


def stage(**fields: Any) -> Pretrain:
    given: dict[str, Any] = {
        "data": "file:text.txt",
        "architecture": {"hidden_size": 32, "heads": 2, "max_positions": 64, "initializer_range": 0.05},
        "tokenizer": {"vocab_size": 320},
        "batch_size": 16,
        "epochs": 6,
        "learning_rate": 1e-2,
        "held_out": 0.2,
    }
    return Pretrain(**{**given, **fields})


def test_a_new_model_learns_its_text(text: Resolved, work: Callable[..., Work]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = work()
    metrics = stage().run({"data": text}, here)
    assert metrics["rows"] + metrics["held_out_rows"] == len(DOCUMENTS)
    assert metrics["first_loss"] == pytest.approx(math.log(320), abs=0.3), "a new model guesses evenly"
    assert metrics["train_loss"] < 2.5 < metrics["first_loss"] - 2
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))

    model = AutoModelForCausalLM.from_pretrained(here.out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(here.out / "model")
    assert metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["vocabulary"] == len(tokenizer) == model.config.vocab_size == 320
    # The held-out loss again, from the files and by the definition.
    from align_pipeline.data.load import read, split

    train, held_out = split(read(Path(str(text.path)), "text"), 0.2)
    total = count = 0
    for row in held_out:
        ids = [*tokenizer(row.text)["input_ids"], tokenizer.eos_token_id]  # type: ignore[union-attr]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        total -= sum(logprobs[t, ids[t + 1]].item() for t in range(len(ids) - 1))
        count += len(ids) - 1
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["tokens"] == sum(len(tokenizer(row.text)["input_ids"]) + 1 for row in train)  # type: ignore[union-attr]

    made = Resolved(ref="stage:pretrain", digest="sha256:" + "1" * 64, path=str(here.out))
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert eos_ids(made, load_tokenizer(made)) == ends
    assert set(model.generation_config.eos_token_id) == ends
    assert tokenizer.pad_token_id not in ends
    assert tokenizer.chat_template == CHAT_TEMPLATE
    curve = [json.loads(line) for line in (here.out / "curve.jsonl").read_text("utf-8").splitlines()]
    assert len([point for point in curve if "loss" in point]) == metrics["steps"]


def test_a_killed_run_ends_with_the_same_weights(
    text: Resolved, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stage(how=How(checkpoint_every_steps=4))
    whole, killed = work("whole"), work("killed")
    expected = settings.run({"data": text}, whole)

    publish = training.publish_checkpoint

    def dies_after_the_second(saved: Path, *rest: Any, **named: Any) -> Path:
        made = publish(saved, *rest, **named)
        if saved.name == "checkpoint-8":
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(training, "publish_checkpoint", dies_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        settings.run({"data": text}, killed)
    monkeypatch.setattr(training, "publish_checkpoint", publish)
    assert settings.run({"data": text}, killed) == expected
    for file in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        assert (killed.out / "model" / file).read_bytes() == (whole.out / "model" / file).read_bytes()
    assert (killed.out / "curve.jsonl").read_bytes() == (whole.out / "curve.jsonl").read_bytes()


def test_another_seed_is_another_model_and_the_same_seed_the_same() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    first, same, other = (new_model(Architecture(), tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_existing_model_goes_on_with_its_own_tokenizer(
    text: Resolved, base: Resolved, work: Callable[..., Work], tuning: str
) -> None:
    from transformers import AutoTokenizer

    here = work()
    metrics = stage(
        architecture=None,
        tokenizer=None,
        model="file:base",
        learning_rate=3e-3,
        epochs=3,
        tuning=tuning,
        **adapter({"r": 4}, {"tuning": tuning}),
    ).run({"data": text, "model": base}, here)
    assert metrics["train_loss"] < metrics["first_loss"] - 0.5
    folder = here.out / ("model" if tuning == "full" else "adapter")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(base.path).get_vocab()


def test_a_long_document_becomes_several_rows_and_loses_nothing(tmp_path: Path, work: Callable[..., Work]) -> None:
    path = tmp_path / "long.jsonl"
    words = " ".join(DOCUMENTS)
    path.write_text(json.dumps({"text": words}) + "\n" + json.dumps({"text": "short"}) + "\n", "utf-8")
    source = Resolved(ref="file:long.jsonl", digest="sha256:" + "e" * 64, path=str(path))
    here = work()
    metrics = stage(held_out=0, max_steps=1).run({"data": source}, here)
    tokens = len(load_tokenizer(Resolved(ref="x", digest="x", path=str(here.out)))(words)["input_ids"]) + 1
    assert metrics["truncated"] == 0
    assert metrics["rows"] == math.ceil(tokens / 64) + 1
    assert metrics["tokens"] >= tokens


def test_packing_changes_no_loss(text: Resolved, work: Callable[..., Work]) -> None:
    """One step on all rows: packed or not, the first loss is the mean over the same tokens."""
    fields = {"max_steps": 1, "held_out": 0, "how": {"micro_batch": 60}, "batch_size": 60}
    plain = stage(**fields).run({"data": text}, work("plain"))
    packed = stage(**fields, packing=True).run({"data": text}, work("packed"))
    assert packed["first_loss"] == pytest.approx(plain["first_loss"], abs=1e-4)


def test_the_tokenizer_gives_back_every_text_and_keeps_markers_whole() -> None:
    markup = "<|im_start|>user\nHi<|im_end|>\n"
    tokenizer = train_tokenizer([*DOCUMENTS, markup * 50], 320)
    for sentence in (*DOCUMENTS[:5], "Grüße, 7 €\n\ttab  two", markup):
        assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = tokenizer(markup)["input_ids"]
    assert (ids[0], ids[-2]) == (start, end)
    assert "<|" not in tokenizer.get_vocab(), "merges must not be wasted on the markers' characters"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    again = train_tokenizer([*DOCUMENTS, markup * 50], 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_chat_template_is_chatml_with_marked_answers() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 320)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == asked
    marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(learnt) == "Hello<|im_end|>"


def test_a_new_model_inherits_nothing_that_belongs_to_adapters() -> None:
    top = {"model": "hub:a/b", "tuning": "lora", "lora": {"r": 8}, "chat_template": "file:t"}
    assert Pretrain.inherit({"architecture": {}}, top) == {"chat_template": "file:t"}
    assert Pretrain.inherit({}, top) == top


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": None, "tokenizer": None}, "nothing to train"),
        ({"model": "hub:a/b"}, "exclude each other"),
        ({"architecture": None, "model": "hub:a/b"}, "tokenizer is for a new model"),
        ({"tuning": "lora"}, "a new model is trained whole"),
        ({"architecture": {"hidden_size": 30, "heads": 4}}, "hidden_size 30 must be a multiple of heads 4"),
        ({"architecture": {"heads": 4, "kv_heads": 3}}, "heads 4 must be a multiple of kv_heads 3"),
        ({"tokenizer": {"vocab_size": 100}}, "greater than or equal to 260"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**fields)


def test_the_shape_is_what_was_asked_for() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    shape = Architecture(hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate_size=96)
    model = new_model(shape, tokenizer, seed=0)
    block = 64 * 128 * 2 + 2 * 64 * 64 + 3 * 64 * 96 + 2 * 64  # q and o, k and v, the three of the MLP, two norms
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * block + 300 * 64 + 64


def test_no_documents_is_an_error_of_the_data(tmp_path: Path, work: Callable[..., Work]) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n", "utf-8")
    source = Resolved(ref="file:empty.txt", digest="sha256:" + "0" * 64, path=str(path))
    with pytest.raises(DataError):
        stage().run({"data": source}, work())
