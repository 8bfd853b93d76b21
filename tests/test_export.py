"""Exported folders, read by Transformers and PEFT alone in a process of its own, against sums made by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_pipeline.pipeline import export as command
from align_pipeline.pipeline.errors import AlignError
from harness import align, start
from tiny import write_tiny_model

SUMS = [(f"What is {a} and {b}?", f"{a + b}") for a in range(6) for b in range(6)]
PIPELINE = """\
name: shop
model: file:models/base
lora: {r: 4, alpha: 12}
stages:
  sft: {type: sft, data: file:sft.jsonl, batch_size: 8, max_steps: 8, learning_rate: 1e-2}
  reward: {type: reward, model: stage:sft, data: file:pairs.jsonl, batch_size: 8, max_steps: 4}
  merged: {type: merge, model: stage:sft}
"""
IDS = [list(range(5, 45)), list(range(44, 4, -1))]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SUMS]
    (folder / "sft.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pairs = [{"prompt": [c[0]], "chosen": [c[1]], "rejected": [{"role": "assistant", "content": "no"}]} for c in chats]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    write_tiny_model(folder / "models" / "base", [q + a for q, a in SUMS], vocab_size=300, positions=128)
    (folder / "models" / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
    (folder / "p.yaml").write_text(PIPELINE)
    align(folder, "run", "p.yaml")
    return folder


def exported(project: Path, what: str, *options: str) -> Path:
    """Export once under a name of its own; the command must be a success."""
    name = "-".join(["out", what, *options]).replace(":", "-").replace("/", "-")
    if not (project / name).exists():
        align(project, "export", what, "-o", name, *options)
    return project / name


def read_elsewhere(folder: Path, cls: str, body: str) -> Any:
    """Run code on a loaded model in a process that never sees align, and return what it prints as JSON."""
    library = "peft" if "Peft" in cls else "transformers"
    code = (
        f"import json, sys, torch\nfrom {library} import {cls}\nfrom transformers import AutoTokenizer\n"
        f"torch.set_num_threads(1)\nfolder, ids = {folder.name!r}, {IDS!r}\n"
        f"{body}\n"
        "assert not any(name.startswith('align') for name in sys.modules)\nprint(json.dumps(found))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.parent,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOGITS = "found = {cls}.from_pretrained(folder).eval()(torch.tensor(ids)).logits.tolist()"


def by_hand(project: Path, adapted: bool = True) -> Any:
    """Return the logits of W + alpha / r * B A, each matrix summed here."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(project / "models" / "base", dtype=torch.float32).eval()
    weights = load_file(project / "runs" / "shop" / "sft" / "adapter" / "adapter_model.safetensors")
    state = model.state_dict()
    names = [name for name in weights if name.endswith("lora_A.weight")]
    assert len(names) == 14
    for name in names:
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        state[target] += adapted * 12 / 4 * (weights[name.replace("lora_A", "lora_B")] @ weights[name])
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


@pytest.mark.parametrize(("form", "cls"), [("merged", "AutoModelForCausalLM"), ("adapter", "AutoPeftModelForCausalLM")])
def test_a_model_loads_without_align_and_answers_as_the_sum(project: Path, form: str, cls: str):
    import torch

    out = exported(project, "p.yaml:sft", "--format", form)
    found = torch.tensor(read_elsewhere(out, cls, LOGITS.format(cls=cls)))
    expected = by_hand(project)
    assert (found - expected).abs().max() < 1e-4 < (by_hand(project, adapted=False) - expected).abs().max() / 100
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    body = "found = AutoTokenizer.from_pretrained(folder).apply_chat_template(%r, tokenize=False)"
    chat = [{"role": "user", "content": "hi"}]
    assert read_elsewhere(out, "AutoModelForCausalLM", body % chat) == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_reward_model_is_a_sequence_classifier_that_gives_the_stored_scores(project: Path):
    stored = json.loads((project / "runs" / "shop" / "reward" / "reference_scores.json").read_text())
    assert len(stored["scores"]) >= 2 and len(set(stored["scores"])) > 1
    ask = (
        "tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel.eval()\n"
        f"rows = {stored['input_ids']!r}\n"
        "batch = tokenizer.pad({'input_ids': rows}, return_tensors='pt', padding_side='right')\n"
        "logits = model(**batch).logits\nfound = logits[:, 0].tolist() if logits.shape[1] == 1 else None"
    )
    cls = "AutoModelForSequenceClassification"
    merged = exported(project, "p.yaml:reward")
    found = read_elsewhere(merged, cls, f"model = {cls}.from_pretrained(folder)\n{ask}")
    assert found == pytest.approx(stored["scores"], abs=1e-5)
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    cls = "AutoPeftModelForSequenceClassification"
    load = f"model = {cls}.from_pretrained(folder, num_labels=1)\nmodel.config.pad_token_id = 0\n"
    adapter = exported(project, "p.yaml:reward", "--format", "adapter")
    assert read_elsewhere(adapter, cls, load + ask) == pytest.approx(stored["scores"], abs=1e-5)
    assert not list(merged.glob("*scores*")), "its rows are somebody's words"


def test_whole_weights_are_the_bytes_of_the_store(project: Path):
    out = exported(project, "p.yaml:merged")
    made = project / "runs" / "shop" / "merged" / "model" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == made.read_bytes()


def test_what_the_command_prints_and_keys(project: Path):
    key = json.loads((project / "runs" / "shop" / "manifest.json").read_text())["stages"]["sft"]["artifact"]
    printed = align(project, "export", key, "-o", "deep/by-key", "--format", "adapter", "--base", "org/tiny")
    assert "256 tokens of greedy answers to 8 prompts (sft.jsonl)" in printed
    assert "greedy agreement 100.00%" in printed
    settings = json.loads((project / "deep" / "by-key" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", None)
    assert [path.name for path in (project / "deep").iterdir()] == ["by-key"]


@pytest.mark.parametrize("options", [("p.yaml:sft",), ("p.yaml:sft", "--format", "adapter"), ("p.yaml:reward",)])
def test_the_card_tells_the_chain_and_nothing_of_this_machine(project: Path, options: tuple[str, ...]):
    from huggingface_hub import ModelCard

    out = exported(project, *options)
    card = (out / "README.md").read_text(encoding="utf-8")
    header = ModelCard(card).data.to_dict()
    assert header == yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert header["library_name"] == ("peft" if "adapter" in options else "transformers")
    assert header["pipeline_tag"] == ("text-classification" if "p.yaml:reward" in options else "text-generation")
    records = {
        name: json.loads((project / "runs/shop" / name / "artifact.json").read_text()) for name in ("sft", "reward")
    }
    chain = ["sft", "reward"] if "p.yaml:reward" in options else ["sft"]
    for number, name in enumerate(chain, 1):
        assert f"{number}. **{name}**" in card
        trained = int(records[name]["metrics"]["rows"])
        assert f"`{records[name]['inputs']['data']['digest']}`, 36 rows, {trained} trained on" in card
        assert f"`{records[name]['key']}`" in card
    assert "learning_rate 0.01" in card and f"loss {records['sft']['metrics']['loss']:.6g}" in card
    texts = [path.read_text("utf-8") for path in out.iterdir() if path.suffix != ".safetensors"]
    assert len(texts) >= 5
    for text in texts:
        assert str(project) not in text and str(Path.home()) + "/" not in text
        assert f'"{socket.gethostname()}"' not in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("p.yaml:sft", "--format", "gguf"), 2, "python convert_hf_to_gguf.py new --outtype auto"),
        (("p.yaml:sft", "--format", "gptq"), 2, "no such format; choose merged, adapter"),
        (("p.yaml:sft", "--base", "org/x"), 2, "names the base of an adapter; add --format adapter"),
        (("p.yaml:stf",), 2, "no stage 'stf'; did you mean sft?"),
        (("nothing-at-all",), 3, "names no artifact"),
        (("p.yaml:merged", "--format", "adapter"), 3, "it is whole weights and has no adapter; leave --format out"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(
    project: Path, arguments: tuple[str, ...], code: int, words: str
):
    process = start(project, "export", *arguments, "-o", "new", toys=False)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, words in err) == (code, True), err
    assert not (project / "new").exists() and not list(project.glob(".new*"))


def test_nothing_is_overwritten(project: Path):
    (project / "mine").mkdir()
    (project / "mine" / "notes.txt").write_text("mine")
    process = start(project, "export", "p.yaml:sft", "-o", "mine", toys=False)
    assert "it exists, and nothing is overwritten" in process.communicate(timeout=60)[1]
    assert [path.name for path in (project / "mine").iterdir()] == ["notes.txt"]


def test_weights_that_answer_otherwise_are_not_handed_over(project: Path, monkeypatch: pytest.MonkeyPatch):
    from align_pipeline.stages import merge

    monkeypatch.chdir(project)
    monkeypatch.setattr(merge, "summed", lambda model: model.unload())  # the base alone
    with pytest.raises(AlignError, match="differ by .* in their logits") as error:
        command.export("p.yaml:sft", Path("wrong"), store=Path("runs"), format="merged", base=None)
    assert error.value.exit_code == 1
    with pytest.raises(AlignError, match="differ by .* in the scores that its stage stored"):
        command.export("p.yaml:reward", Path("wrong"), store=Path("runs"), format="merged", base=None)
    assert not list(project.glob("*wrong*"))


def test_a_base_that_changed_is_refused(project: Path):
    file = project / "models" / "base" / "generation_config.json"
    text = file.read_text()
    file.write_text(text + "\n")
    try:
        process = start(project, "export", "p.yaml:sft", "-o", "new", toys=False)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 3 and "whose files have changed since" in err
    finally:
        file.write_text(text)


def test_an_adapter_of_a_hub_model_names_it_by_its_id_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plain PEFT finds the base in the hub's cache, as it would on the hub; the licence is that of the base's card."""
    commit = "7ae557604adf67be50417f59c2c2f167def9a775"
    repo = tmp_path / "hub" / "models--org--tiny"
    write_tiny_model(repo / "snapshots" / commit, [q + a for q, a in SUMS], vocab_size=300, positions=128)
    (repo / "snapshots" / commit / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setitem(os.environ, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = [{"prompt": q, "completion": f" {a}"} for q, a in SUMS]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.yaml").write_text(
        "name: hub\nmodel: hub:org/tiny\nlora: {r: 4}\nstages:\n"
        "  sft: {type: sft, data: file:sft.jsonl, batch_size: 8, max_steps: 2}\n"
    )
    align(tmp_path, "run", "p.yaml")
    out = exported(tmp_path, "p.yaml:sft", "--format", "adapter")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", commit)
    header = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("org/tiny", "adapter")
    assert (header["license"], header["license_name"]) == ("other", "tiny-1")
    body = "found = list(AutoPeftModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits.shape)"
    assert read_elsewhere(out, "AutoPeftModelForCausalLM", body)[:2] == [2, 40]
    merged = yaml.safe_load((exported(tmp_path, "p.yaml:sft") / "README.md").read_text().split("---")[1])
    assert merged["base_model_relation"] == "finetune"


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_loads_the_merged_folder_and_the_adapter(project: Path):
    """Greedy tokens are those of Transformers on the merged folder."""
    merged, adapter = exported(project, "p.yaml:sft"), exported(project, "p.yaml:sft", "--format", "adapter")
    ask = (
        "from vllm.lora.request import LoRARequest\n"
        "how = dict(dtype='float32', enforce_eager=True, max_model_len=64, distributed_executor_backend='uni')\n"
        "sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)\n"
        "prompts = [{'prompt_token_ids': row[:20]} for row in ids]\n"
        "%s\nfound = [list(one.outputs[0].token_ids) for one in done]"
    )
    whole = "done = LLM(folder, **how).generate(prompts, sampling)"
    lora = (
        "engine = LLM('models/base', enable_lora=True, max_lora_rank=8, **how)\n"
        "done = engine.generate(prompts, sampling, lora_request=LoRARequest('a', 1, folder))"
    )
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def ask_vllm(folder: Path, body: str) -> list[list[int]]:
        code = (
            f"import json\nfrom vllm import LLM, SamplingParams\nfolder, ids = {folder.name!r}, {IDS!r}\n{ask % body}"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\nprint(json.dumps(found))"],
            cwd=project,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    body = (
        "model = AutoModelForCausalLM.from_pretrained(folder)\nmodel.generation_config.eos_token_id = None\n"
        "found = [model.generate(torch.tensor([row[:20]]), do_sample=False, max_new_tokens=8)[0, 20:].tolist() "
        "for row in ids]"
    )
    expected = read_elsewhere(merged, "AutoModelForCausalLM", body)
    assert ask_vllm(merged, whole) == expected
    assert ask_vllm(adapter, lora) == expected
