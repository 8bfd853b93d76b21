"""Real parts, small: a Llama that trains in seconds, a chat tokenizer, rows, and the work directory of a stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline.files import file_sha256
from align_pipeline.pipeline.stage import Resolved, Work
from align_pipeline.stages import STAGES

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the shop opens at nine and closes at six; bread, milk and red apples are on the left shelf"


def build_tokenizer(folder: Path, **special: str) -> Any:
    """Write a byte-level BPE tokenizer of 300 tokens that speaks ChatML."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    raw.train_from_iterator([WORDS] * 4, vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, **{name: token for name, token in named.items() if token}
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def build_model(folder: Path, seed: int = 0, **changes: Any) -> None:
    """Write a random Llama of two layers beside its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **changes,
    )
    # Logits of a fresh model are nearly flat; wider weights make differences between models visible.
    config.initializer_range = 0.1
    LlamaForCausalLM(config).save_pretrained(str(folder))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are bit-equal from run to run on one thread only."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_model(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Resolved:
    return Resolved(ref="file:base", digest="sha256:" + "b" * 64, path=str(base_folder))


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Work]:
    """Return a maker of work directories; the same name gives the same directory, as for a run that goes on."""

    def make(name: str = "work") -> Work:
        made = Work(tmp_path / "work" / name)
        made.out.mkdir(parents=True, exist_ok=True)
        made.scratch.mkdir(parents=True, exist_ok=True)
        return made

    return make


@pytest.fixture(autouse=True)
def measured_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a real stage measures what `measures` says, and nothing that it says is not measured."""

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, inputs: Any, work: Work) -> Any:
            metrics = run(self, inputs, work)
            declared = self.measures()
            assert declared, f"{self.type} declares no metrics"
            assert not {name: declared.get(name, "unknown") for name in metrics if declared.get(name) != ""}
            return metrics

        return call

    for cls in STAGES.values():
        monkeypatch.setattr(cls, "run", checked(cls.run))


def adapter_of(work: Work, base: Resolved, kind: str = "model") -> Resolved:
    """Return what a stage published, as an input of the next one."""
    scores = work.out / "reference_scores.json"
    return Resolved(
        ref=f"stage:{work.folder.name}",
        digest="sha256:" + "a" * 64,
        path=str(work.out),
        kind=kind,  # type: ignore[arg-type]
        adapter=str(work.out / "adapter"),
        base=base,
        reference_scores=str(scores) if scores.is_file() else None,
    )


@pytest.fixture
def adapted(base: Resolved, tmp_path: Path) -> Callable[..., Resolved]:
    """Return a maker of random adapters on the base, whose files are in the dtype asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(dtype: Any, std: float = 0.05) -> Resolved:
        whole = tmp_path / "whole"
        AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).save_pretrained(whole)
        AutoTokenizer.from_pretrained(base.path).save_pretrained(whole)
        plain = Resolved(ref="file:whole", digest="sha256:" + "1" * 64, path=str(whole))
        model: Any = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return Resolved(
            ref="stage:sft", digest="sha256:" + "2" * 64, path=str(tmp_path), adapter=str(folder), base=plain
        )

    return make


def rows_file(folder: Path, rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> Resolved:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Resolved(ref=f"file:{name}", digest=f"sha256:{file_sha256(path)}", path=str(path))


NAMES = ("bread", "milk", "apples", "tea", "salt", "rice", "soap", "jam", "nuts", "eggs", "figs", "oats")


def chats(count: int = 12) -> list[dict[str, Any]]:
    """Return conversations whose answers can be learnt by heart."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"where is {name}"},
                {"role": "assistant", "content": f"shelf {index % 3}" + " left" * (index % 2)},
            ]
        }
        for index, name in enumerate(NAMES[:count])
    ]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Return preference pairs: the polite answer is better."""
    return [
        {
            "prompt": [{"role": "user", "content": f"where is {name}"}],
            "chosen": [{"role": "assistant", "content": f"please see shelf {index % 3}"}],
            "rejected": [{"role": "assistant", "content": "no" + " idea" * (index % 3)}],
        }
        for index, name in enumerate(NAMES[:count])
    ]


def unpaired(count: int = 12) -> list[dict[str, Any]]:
    """Return single answers with thumbs."""
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if index % 2 else "rejected"], "label": bool(index % 2)}
        for index, pair in enumerate(pairs(count))
    ]


def tensors(folder: Path) -> dict[str, Any]:
    """Return every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    found = {
        f"{file.name}/{name}": t
        for file in sorted(folder.rglob("*.safetensors"))
        for name, t in load_file(file).items()
    }
    assert found, f"no weights in {folder}"
    return found


def assert_same_tensors(left: Path, right: Path) -> None:
    """Fail unless two folders hold bit-equal weights."""
    import torch

    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
