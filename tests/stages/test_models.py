"""Loading and saving: which weights, which head, which tokens, and equal bytes for equal weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align_pipeline.pipeline.errors import AlignError, InputError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import logprobs, models
from align_pipeline.stages.training import Lora

from .conftest import build_tokenizer, files, tensors

LORA = Lora(r=4)


def published(folder: Path, base: Resolved, kind: str = "model") -> Resolved:
    scores = folder / "reference_scores.json"
    return Resolved(
        ref="stage:made",
        digest="sha256:" + "a" * 64,
        path=str(folder),
        adapter=str(folder / "adapter"),
        base=base,
        reference_scores=str(scores) if scores.is_file() else None,
    )


def trained(base: Resolved, out: Path, seed: int = 1) -> Resolved:
    """Publish an adapter that changes the model, as a fresh one does not."""
    import torch

    model = models.load_trainable(base, tuning="lora", lora=LORA, seed=seed)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    models.save_model(model, models.load_tokenizer(base), out, base)
    return published(out, base)


def scorer(base: Resolved, out: Path) -> Resolved:
    import torch

    model = models.load_reward_trainable(base, tuning="lora", lora=LORA, seed=3)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "score.modules_to_save" in name:
            weight.data.normal_(0, 0.1)
    models.save_model(model, models.load_tokenizer(base), out, base)
    models.write_reference_scores(model, [[5, 6, 7, 2], [8, 9, 2], [10, 2]], out)
    return published(out, base)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_pad_is_kept_when_it_is_not_eos(base: Resolved) -> None:
    tokenizer = models.load_tokenizer(base, padding_side="left")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "left")


@pytest.mark.parametrize("pad", ["<|im_end|>", ""])
def test_pad_that_is_eos_or_missing_becomes_an_unused_special(base_folder: Path, tmp_path: Path, pad: str) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    build_tokenizer(tmp_path / "model", pad_token=pad)
    tokenizer = models.load_tokenizer(Resolved(ref="file:m", digest="sha256:0", path=str(tmp_path / "model")))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert len(tokenizer) == 300


def test_a_vocabulary_without_anything_to_pad_with_is_refused(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    build_tokenizer(tmp_path / "model", eos_token="<|endoftext|>", pad_token="")
    with pytest.raises(AlignError, match=r"no token to pad with.*set `pad_token` in its tokenizer_config\.json"):
        models.load_tokenizer(Resolved(ref="file:m", digest="sha256:0", path=str(tmp_path / "model")))


def test_a_stage_can_bring_its_own_chat_template(base: Resolved, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}<|endoftext|>")
    tokenizer = models.load_tokenizer(base, tmp_path / "template.jinja")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|endoftext|>"


def test_eos_ids_join_config_tokenizer_and_template(base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    build_tokenizer(folder, eos_token="<|endoftext|>", pad_token="<|im_start|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    source = Resolved(ref="file:m", digest="sha256:0", path=str(folder))
    tokenizer = models.load_tokenizer(source)
    assert models.eos_ids(source, tokenizer) == {7, 8, 0, 2}
    assert models.eos_ids(models.load_causal(source), tokenizer) == {7, 8, 0, 2}


# --- causal models ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_the_base_and_its_own_weights(base: Resolved, tmp_path: Path) -> None:
    source = trained(base, tmp_path)
    model = models.load_causal(source)
    rows = [([5, 6, 7], [8, 2])]
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    with_adapter = models.completion_log_probs(model, rows)[0]
    alone = models.completion_log_probs(models.load_causal(base), rows)[0]
    assert (with_adapter - alone).abs().max() > 0.01
    with model.disable_adapter():
        assert models.completion_log_probs(model, rows)[0].tolist() == pytest.approx(alone.tolist(), abs=1e-6)


def test_a_fresh_adapter_depends_on_the_seed_alone(base: Resolved, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = models.load_trainable(base, tuning="lora", lora=LORA, seed=seed)
        models.save_model(model, models.load_tokenizer(base), tmp_path / name, base)
        found.append(files(tmp_path / name))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_training_goes_on_from_the_adapter_that_came_in(base: Resolved, tmp_path: Path) -> None:
    import torch

    source = trained(base, tmp_path / "in")
    model = models.load_trainable(source, tuning="lora", lora=Lora(r=4, dropout=0.25))
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].lora_dropout == 0.25
    assert {name.split(".")[-2] for name, weight in model.named_parameters() if weight.requires_grad} == {"default"}
    models.save_model(model, models.load_tokenizer(source), tmp_path / "again", base)
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(r=8), r"lora\.r: its adapter has 4, this stage asks for 8; .* `merge` stage"),
        (Lora(r=4, alpha=8), r"lora\.alpha: its adapter has 32, this stage asks for 8"),
        (Lora(r=4, target_modules=("q_proj",)), r"lora\.target_modules"),
    ],
)
def test_another_rank_along_a_chain_is_refused(base: Resolved, tmp_path: Path, lora: Lora, message: str) -> None:
    with pytest.raises(AlignError, match=message):
        models.load_trainable(trained(base, tmp_path), tuning="lora", lora=lora)


def test_targets_are_compared_by_the_layers_they_mean(base: Resolved, tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    models.load_trainable(trained(base, tmp_path), tuning="lora", lora=Lora(r=4, target_modules=names))


def test_whole_weights_need_a_merged_input(base: Resolved, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="put a `merge` stage"):
        models.load_trainable(trained(base, tmp_path), tuning="full", lora=LORA)
    with pytest.raises(AlignError, match="write tuning: lora"):
        models.load_trainable(base, tuning="full", lora=LORA, quantize="4bit")


def test_four_bits_are_refused_without_a_gpu(base: Resolved) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(AlignError, match="quantize: 4bit needs a CUDA GPU"):
        models.load_trainable(base, tuning="lora", lora=LORA, quantize="4bit")


def test_an_adapter_of_another_base_is_refused(base: Resolved, tmp_path: Path) -> None:
    source = trained(base, tmp_path)
    other = base.model_copy(update={"digest": "sha256:" + "c" * 64})
    with pytest.raises(InputError, match=r"was trained on sha256:bbbb.*not on sha256:cccc"):
        models.load_causal(source.model_copy(update={"base": other}))


def test_log_probs_are_those_of_the_plain_forward_pass(base: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with softmax over whole logits, one row at a time without padding."""
    import torch

    model = models.load_causal(base)
    rows = [([5, 6, 7], [8, 9, 2]), ([10], [11]), ([12, 13], [14, 15, 16, 17, 2])]
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 2 * model.config.vocab_size)  # two positions at a time
    found = models.completion_log_probs(model, rows, micro_batch=2)
    for (prompt, completion), values in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
        expected = [
            logits[len(prompt) + i - 1].double().log_softmax(-1)[token].item() for i, token in enumerate(completion)
        ]
        assert values.tolist() == pytest.approx(expected, abs=1e-5)


# --- reward models ----------------------------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_padding(base: Resolved, tmp_path: Path) -> None:
    model = models.load_reward(scorer(base, tmp_path))
    rows = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 14, 15, 2], [16, 17, 0]]
    alone = [models.score(model, [row])[0] for row in rows]
    assert models.score(model, rows, micro_batch=4) == pytest.approx(alone, abs=1e-5)
    assert models.score(model, rows, micro_batch=3) == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.01


def test_a_score_is_what_the_classifier_returns(base: Resolved, tmp_path: Path) -> None:
    import torch

    model = models.load_reward(scorer(base, tmp_path))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7, 2]])).logits.item()
    assert models.score(model, [[5, 6, 7, 2]])[0] == pytest.approx(expected, abs=1e-6)


def test_the_head_survives_saving(base: Resolved, tmp_path: Path) -> None:
    source = scorer(base, tmp_path)
    stored = json.loads((tmp_path / "reference_scores.json").read_text())
    assert models.score(models.load_reward(source), stored["input_ids"]) == pytest.approx(stored["scores"], abs=1e-6)


def test_a_random_head_is_refused(base: Resolved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = scorer(base, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    (head,) = [name for name in weights if "score" in name]
    save_file({**weights, head: weights[head].roll(1)}, file, metadata={"format": "pt"})
    with pytest.raises(AlignError, match=r"reference row 0 scores .* its stage stored"):
        models.load_reward(source)
    save_file({name: weight for name, weight in weights.items() if name != head}, file, metadata={"format": "pt"})
    with pytest.raises(AlignError, match="no score head"):
        models.load_reward(source)


def test_a_policy_is_no_reward_model(base: Resolved) -> None:
    with pytest.raises(AlignError, match="no score head"):
        models.load_reward(base)


def test_the_reward_model_starts_from_the_policys_adapter(base: Resolved, tmp_path: Path) -> None:
    import torch

    source = trained(base, tmp_path)
    model = models.load_reward_trainable(source, tuning="lora", lora=LORA, seed=5)
    policy = models.load_causal(source)
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    with torch.no_grad():
        hidden = model.get_base_model().model(ids).last_hidden_state
        assert torch.equal(hidden, policy.get_base_model().model(ids).last_hidden_state)
    trainable = {name.split(".")[-2] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == {"default"}
    assert any("score.modules_to_save.default" in name for name, w in model.named_parameters() if w.requires_grad)


# --- writing ----------------------------------------------------------------------------------------------------------


WRITE = """
import sys
from pathlib import Path
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import logprobs, models
from align_pipeline.stages.training import Lora
base = Resolved(ref="file:base", digest="sha256:b", path=sys.argv[1])
lora = Lora(r=4, target_modules=("q_proj", "v_proj", "k_proj", "o_proj", "up_proj"))
for tuning in ("lora", "full"):
    model = models.load_trainable(base, tuning=tuning, lora=lora, seed=1)
    models.save_model(model, models.load_tokenizer(base), Path(sys.argv[2]), base)
"""


def test_equal_weights_give_equal_bytes_without_paths(base: Resolved, tmp_path: Path) -> None:
    """Two processes write: sets have another order in each, and each loads the base from another folder."""
    running = []
    for name in ("first", "second"):
        shutil.copytree(str(base.path), tmp_path / name / "base")
        command = [sys.executable, "-c", WRITE, str(tmp_path / name / "base"), str(tmp_path / name / "out")]
        environment = {"PYTHONHASHSEED": str(len(running) + 1), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (files(tmp_path / name / "out") for name in ("first", "second"))
    assert first == second
    assert {"adapter/adapter_model.safetensors", "model/model.safetensors", "model/tokenizer.json"} <= first.keys()
    assert {"README.md", "training_args.bin"}.isdisjoint(Path(name).name for name in first)
    here = str(tmp_path).encode()
    assert not [name for name, content in first.items() if here in content]
    settings = json.loads(first["adapter/adapter_config.json"])
    assert settings["base_model_name_or_path"] == "sha256:b"
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_only_the_default_adapter_is_written(base: Resolved, tmp_path: Path) -> None:
    model = models.load_trainable(base, tuning="lora", lora=LORA, seed=1)
    model.add_adapter("ref", model.peft_config["default"])
    folder = models.save_model(model, models.load_tokenizer(base), tmp_path, base)
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert len(tensors(folder)) == 2 * 7 * 2
