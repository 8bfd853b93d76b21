"""Files of peers become pipelines that train as they did, and no key of theirs is dropped in silence.

`peers/` holds files in the documented style of each peer, `peers/expected/` what is made of them and said of their keys.
`python tests/pipeline/test_import.py` writes the latter anew, to be read before it is committed.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.errors import ConfigError
from align_pipeline.pipeline.from_llamafactory import DEFAULTS as LLAMAFACTORY
from align_pipeline.pipeline.from_trl import DEFAULTS as TRL
from align_pipeline.pipeline.import_cli import translate
from align_pipeline.pipeline.yaml_file import read

PEERS = Path(__file__).with_name("peers")
FILES = sorted(path.name for path in PEERS.glob("*.yaml"))
assert len(FILES) >= 20, "no files of peers found"

CASES: dict[str, tuple[list[str], list[str]]] = {
    **{name.removesuffix(".yaml"): ([name], []) for name in FILES},
    "trl_dpo": (["trl_dpo.yaml"], ["dpo"]),
    "llamafactory_chain": (["llamafactory_sft_lora.yaml", "llamafactory_dpo.yaml"], []),
    "llamafactory_chain_ppo": (["llamafactory_rm.yaml", "llamafactory_ppo.yaml"], []),
    "trl_chain": (["trl_sft_mixture.yaml", "trl_dpo.yaml"], ["sft", "dpo"]),
}
"""Name -> files, and what `--stage` says of TRL's."""
REFUSED = {"axolotl_grpo", "llamafactory_dpo", "llamafactory_ppo", "trl_chain"}


@cache
def imported(name: str) -> tuple[str, list[str]]:
    files, stages = CASES[name]
    return translate([Path(file) for file in files], None, None, stages)


def outcome(name: str) -> str:
    """Return what the command prints, and what it says of keys above it."""
    try:
        text, said = imported(name)
    except ConfigError as error:
        return f"{error}\n"
    return "\n".join([*said, "---", text])


@pytest.fixture(autouse=True)
def among_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PEERS)


def loaded(text: str, folder: Path) -> Any:
    """Load a pipeline as `align plan` would, with stand-ins for the files that it names."""
    for name in re.findall(r"file:([\w./-]+)", text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "pipeline.yaml").write_text(text)
    return load(folder / "pipeline.yaml")


@pytest.mark.parametrize("name", CASES)
def test_a_file_becomes_what_is_expected_of_it(name: str):
    assert outcome(name) == (PEERS / "expected" / f"{name}.txt").read_text(encoding="utf-8")
    assert outcome(name).endswith("nothing was written\n") == (name in REFUSED)


# Worked out by hand from the files and the peers' documentation: stage -> field -> value.
EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "llamafactory_sft_lora": {
        "sft": {
            "model": "hub:meta-llama/Meta-Llama-3-8B-Instruct", "batch_size": 8, "epochs": 3, "learning_rate": 1e-4,
            "schedule": "cosine", "warmup": 0.1, "weight_decay": 0, "max_length": 2048, "held_out": 0.1, "seed": 42,
            "lora.r": 8, "lora.alpha": 16, "lora.target_modules": "all-linear", "evaluate_every": 500,
            "loss_on": "assistant", "how.micro_batch": 1, "how.checkpoint_every_steps": 500, "how.report_to": (),
        },
    },
    "llamafactory_sft_qlora": {
        "sft": {
            "quantize": "4bit", "lora.r": 64, "lora.alpha": 128, "lora.dropout": 0.05, "batch_size": 16,
            "max_steps": 600, "warmup": 0.05, "schedule": "constant", "packing": True, "seed": 7, "format": "sharegpt",
            "columns": {"conversations": "talk", "system": "rules"}, "train.neftune_noise_alpha": 5, "held_out": 0,
            "how.report_to": ("wandb", "tensorboard"), "how.train": {"run_name": "support"},
        },
    },
    "llamafactory_sft_full": {
        "sft": {
            "tuning": "full", "batch_size": 4, "loss_on": "all", "max_length": 2048, "max_grad_norm": 1e9,
            "early_stopping.patience": 2, "how.gradient_checkpointing": False,
            "columns": {"instruction": "question", "output": "answer"},
        },
    },
    "llamafactory_kto": {
        "kto": {
            "beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1.5, "kl_batch": 2, "batch_size": 8,
            "learning_rate": 5e-6, "columns": {"conversations": "messages"}, "max_length": 2048,
        },
    },
    "llamafactory_rm": {"reward": {"center_rewards": 0, "learning_rate": 1e-4, "held_out": 0.05, "format": "sharegpt"}},
    "llamafactory_pt": {
        "pretrain": {"tuning": "lora", "packing": True, "format": "text", "schedule": "linear", "warmup": 0, "epochs": 3},
    },
    "llamafactory_chain": {
        "dpo": {"policy": "stage:sft", "beta": 0.2, "label_smoothing": 0.1, "lora.r": 8, "lora.alpha": 16, "epochs": 1},
    },
    "llamafactory_chain_ppo": {
        "ppo": {
            "reward": "stage:reward", "batch_size": 64, "minibatches": 4, "epochs": 2, "max_new_tokens": 512,
            "temperature": 0.95, "kl_coef": 0.2, "value": "shared", "columns": {"instruction": "question"},
        },
    },
    "axolotl_lora": {
        "sft": {
            "batch_size": 4, "epochs": 1, "warmup": 0.1, "held_out": 0.1, "packing": True, "format": "alpaca",
            "train.optim": "adamw_8bit", "quantize": None, "how.logging_steps": 1,
        },
    },
    "axolotl_qlora": {
        "sft": {
            "quantize": "4bit", "loss_on": "all", "batch_size": 8, "train.adam_beta2": 0.95, "seed": 3,
            "columns": {"instruction": "question", "output": "answer", "system": "rules"}, "max_length": 8192,
        },
    },
    "axolotl_full": {
        "sft": {
            "tuning": "full", "evaluation": "file:data/test.jsonl", "held_out": 0, "weight_decay": 0.1,
            "max_grad_norm": 0.5, "data": {"alpaca": "hub:tatsu-lab/alpaca", "own": "file:data/own.jsonl"},
        },
    },
    "axolotl_dpo": {
        "dpo": {
            "beta": 0.05, "loss": "sigmoid", "epochs": 4, "format": "sharegpt", "train.use_weighting": True,
            "columns": {"conversations": "conversation"}, "lora.r": 32, "lora.alpha": 16,
        },
    },
    "axolotl_chat_template": {
        "sft": {"max_steps": 200, "warmup": 0.1, "schedule": "cosine", "lora.target_modules": ("q_proj", "v_proj"),
                "columns": {"talks": {"messages": "conversations"}}, "max_length": 1024},
    },
    "axolotl_reward": {"reward": {"tuning": "full", "center_rewards": 0.01, "columns": {"instruction": "input"}}},
    "axolotl_pretraining": {"pretrain": {"tuning": "full", "max_steps": 2000, "warmup": 0.005, "packing": True}},
    "trl_sft": {
        "sft": {"tuning": "full", "batch_size": 16, "epochs": 1, "learning_rate": 2e-5, "schedule": "linear",
                "max_length": 1024, "packing": True, "held_out": 0},
    },
    "trl_sft_mixture": {
        "sft": {"lora.dropout": 0.05, "batch_size": 8, "loss_on": "assistant", "warmup": 0.05, "held_out": 0.02},
    },
    "trl_dpo": {
        "dpo": {"loss": ("sigmoid", "sft"), "loss_weights": (1, 0.2), "learning_rate": 5e-7, "schedule": "linear",
                "epochs": 1, "policy": "file:out/sft", "tuning": "full"},
    },
    "trl_reward": {
        "reward": {"lora.target_modules": ("q_proj", "v_proj"), "center_rewards": 0.01, "learning_rate": 1e-4, "warmup": 0},
    },
    "trl_kto": {"kto": {"kl_batch": 16, "batch_size": 16, "undesirable_weight": 1.33, "beta": 0.1, "loss": "kto"}},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_it_trains_as_it_did(name: str, tmp_path: Path):
    pipeline = loaded(imported(name)[0], tmp_path)
    for stage, fields in EXPECTED[name].items():
        for field, value in fields.items():
            found: Any = pipeline.stages[stage]
            for part in field.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            assert found == pytest.approx(value) if isinstance(value, float) else found == value, field


def test_what_is_imported_is_every_file_that_is_not_refused():
    assert set(EXPECTED) == set(CASES) - REFUSED


@pytest.mark.parametrize("name", sorted(set(CASES) - REFUSED))
def test_each_key_is_carried_over_or_named(name: str, tmp_path: Path):
    text, said = imported(name)
    shown = {line for line in text.splitlines() if not line.startswith("#")}
    carried = " ".join(f"{line.strip().split(':')[0]} {line.partition('  # ')[2]}" for line in shown)
    for file in CASES[name][0]:
        values, lines = read(Path(file), [])
        named = {one.split(": ")[1].split(".")[0] for one in said if one.startswith(f"{file}:")}
        dropped = {key for key, value in values.items() if value is not None and key not in named}
        assert not {key for key in dropped if not re.search(rf"\b{key}\b", carried)}, file


@pytest.mark.parametrize("name", ["llamafactory_chain", "axolotl_dpo", "trl_kto"])
def test_a_key_that_nobody_knows_is_named_with_its_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files, stages = CASES[name]
    texts = [Path(file).read_text() for file in files]
    for file, text in zip(files, texts, strict=True):
        (tmp_path / file).write_text(text + "\nfine_tunning: 3\n")
    monkeypatch.chdir(tmp_path)
    said = translate([Path(file) for file in files], None, None, stages)[1]
    for file, text in zip(files, texts, strict=True):
        line = text.count("\n") + 2
        assert any(one.startswith(f"{file}:{line}: fine_tunning: not carried over; no key of ") for one in said)


# --- the peers' defaults, read from those that are installed ----------------------------------------------------------


def defaults(module: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the defaults of a dataclass's fields, from its source: importing it would import torch."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).parent.joinpath(*rest).with_suffix(".py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = statement.value
            given = [one.value for one in value.keywords if one.arg == "default"] if isinstance(value, ast.Call) else [value]
            if given and isinstance(given[0], ast.Constant):
                yield statement.target.id, given[0].value


def test_defaults_are_those_of_the_trainers():
    training = dict(defaults("transformers.training_args", "TrainingArguments"))
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "weight_decay",
                 "max_grad_norm", "seed"):  # fmt: skip
        assert training[name] == TRL[name] == LLAMAFACTORY[name], name
    assert training["learning_rate"] == LLAMAFACTORY["learning_rate"] and training["lr_scheduler_type"] == "linear"
    model = dict(defaults("trl.trainer.model_config", "ModelConfig"))
    assert {name: TRL[name] for name in ("lora_r", "lora_alpha", "lora_dropout")} == {
        name: model[name] for name in ("lora_r", "lora_alpha", "lora_dropout")
    }
    for kind, config in (("sft", "SFTConfig"), ("dpo", "DPOConfig"), ("reward", "RewardConfig"), ("kto", "KTOConfig")):
        own = dict(defaults(f"trl.trainer.{kind}_config", config))
        for name in ("max_length", "beta", "desirable_weight", "undesirable_weight", "label_smoothing"):
            assert TRL[name] == own.get(name, TRL[name]), f"{kind}: {name}"
        file = PEERS / f"trl_{kind}.yaml"
        text = translate([file], None, None, [kind])[0] if kind != "sft" else imported("trl_sft")[0]
        assert "learning_rate: " in text
        rate = re.sub(r"(?m)^learning_rate:.*\n", "", file.read_text())
        assert own["learning_rate"] == _rate(rate, kind)


def _rate(text: str, kind: str) -> float:
    """Return the learning rate that is written for a file of TRL that names none."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "none.yaml"
        file.write_text(text)
        return float(yaml.safe_load(translate([file], None, None, [kind])[0])["stages"][kind]["learning_rate"])


if __name__ == "__main__":
    import os

    os.chdir(PEERS)
    (PEERS / "expected").mkdir(exist_ok=True)
    for one in CASES:
        (PEERS / "expected" / f"{one}.txt").write_text(outcome(one), encoding="utf-8")
