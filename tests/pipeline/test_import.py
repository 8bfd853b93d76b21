"""Files of peers become pipelines that train as they did, and no key of theirs is dropped in silence.

`peers/` holds files in the documented style of each peer, `peers/expected/` what becomes of them and is said of keys.
`python tests/pipeline/test_import.py` writes the latter anew, to be read before it is committed.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_pipeline.data.load import read as read_rows
from align_pipeline.pipeline import from_axolotl, from_llamafactory, from_trl
from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.errors import ConfigError
from align_pipeline.pipeline.import_cli import _told, translate
from align_pipeline.pipeline.imported import Draft, PeerFile
from align_pipeline.pipeline.yaml_file import read
from harness import Align

PEERS = Path(__file__).with_name("peers")
SHARED = Path(__file__).parents[3] / "shared" / "data"
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
        "pretrain": {"tuning": "lora", "packing": True, "format": "text", "schedule": "linear", "epochs": 3},
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
        "reward": {"lora.target_modules": ("q_proj", "v_proj"), "center_rewards": 0.01, "learning_rate": 1e-4},
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
        values, _ = read(Path(file), [])
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
            given = (
                [one.value for one in value.keywords if one.arg == "default"]
                if isinstance(value, ast.Call)
                else [value]
            )
            if given and isinstance(given[0], ast.Constant):
                yield statement.target.id, given[0].value


def test_defaults_are_those_of_the_trainers(tmp_path: Path):
    training = dict(defaults("transformers.training_args", "TrainingArguments"))
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "weight_decay",
                 "max_grad_norm", "seed", "lr_scheduler_type"):  # fmt: skip
        assert training[name] == from_trl.DEFAULTS[name] == from_llamafactory.DEFAULTS[name], name
    assert training["learning_rate"] == from_llamafactory.DEFAULTS["learning_rate"]
    model = dict(defaults("trl.trainer.model_config", "ModelConfig"))
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        assert from_trl.DEFAULTS[name] == model[name], name
    for kind, config in (("sft", "SFTConfig"), ("dpo", "DPOConfig"), ("reward", "RewardConfig"), ("kto", "KTOConfig")):
        own = dict(defaults(f"trl.trainer.{kind}_config", config))
        for name in ("max_length", "beta", "desirable_weight", "undesirable_weight", "label_smoothing"):
            assert from_trl.DEFAULTS[name] == own.get(name, from_trl.DEFAULTS[name]), f"{kind}: {name}"
        (tmp_path / "bare.yaml").write_text("model_name_or_path: a/b\ndataset_name: c/d\n")
        text, _ = translate([tmp_path / "bare.yaml"], None, None, [kind])
        assert yaml.safe_load(text)["stages"][kind]["learning_rate"] in (
            own["learning_rate"],
            str(own["learning_rate"]),
        )


# --- from a user's seat -----------------------------------------------------------------------------------------------


def test_what_is_written_is_planned_and_never_written_over(align: Align, tmp_path: Path):
    """The file lies in a folder of its own, its rows beside the folder where the command is typed."""
    model, data = tmp_path / "base", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    (model / "config.json").write_text("{}")
    (data / "dataset_info.json").write_text(
        '{"ours": {"file_name": "ours.json", "columns": {"prompt": "ask", "response": "say"}}}'
    )
    (data / "ours.json").write_text('[{"ask": "Where is my lamp?", "say": "On its way."}]')
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sft.yaml").write_text("model_name_or_path: base\nfinetuning_type: lora\ndataset: ours\n")
    done = align("import", "theirs/sft.yaml", "-o", "mine/support.yaml")
    assert (done.returncode, done.stdout) == (0, "mine/support.yaml  written\nnext: align plan mine/support.yaml\n")
    assert done.stderr.startswith("theirs/sft.yaml: per_device_train_batch_size: not given; batch_size: 8, ")
    assert done.stderr.count("\n") == 1
    text = (tmp_path / "mine" / "support.yaml").read_text()
    assert "name: support\n" in text and "data: file:../data/ours.json  # dataset\n" in text
    assert "model: file:../base  # model_name_or_path\n" in text
    plan = align("plan", "mine/support.yaml")
    assert (plan.returncode, plan.stdout.split()[:2]) == (0, ["sft", "run"]), plan.stderr
    again = align("import", "theirs/sft.yaml", "-o", "mine/support.yaml")
    assert again.returncode == 2
    assert again.stderr == "mine/support.yaml: it exists, and nothing is overwritten; name another file\n"


BASE = "model_name_or_path: a/b\nfinetuning_type: lora\ndataset: identity\n"
TRL_BASE = "model_name_or_path: a/b\ndataset_name: c/d\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("foo: 1\n", "mine.yaml: whose file is it? none of its keys is one that only one peer has; say so with -"),
        ("base_model: a/b\nlora_rank: 8\n", "mine.yaml: whose file is it? it has keys of several: lora_rank of l"),
        (BASE + "stage: dop\n", "mine.yaml:4: stage: refused; dop: no such stage; did you mean dpo?"),
        (BASE + "learning_rate: fast\n", "mine.yaml:4: learning_rate: refused; must be a number, got 'fast'"),
        (BASE + "num_train_epochs: 0\n", "mine.yaml:4: num_train_epochs: refused; must be more than 0, got 0"),
        (BASE + "stage: dpo\npref_loss: orpo\n", "mine.yaml:5: pref_loss: refused; orpo: no such loss here; sigm"),
        (BASE + "export_dir: merged\n", "mine.yaml:4: export_dir: refused; this file merges an adapter; import the "),
        (BASE + "finetuning_type: freeze\n", "mine.yaml:4: finetuning_type: written twice, first in line 2; dele"),
        (BASE.replace("lora", "freeze"), "mine.yaml:2: finetuning_type: refused; freeze: no such tuning here; wr"),
        (BASE.replace("identity", "pictures"), "mine.yaml:3: dataset: refused; pictures: rows with images are no"),
        (BASE.replace("identity", "identiti"), "mine.yaml:3: dataset: refused; identiti: not in data/dataset_inf"),
        (BASE.replace("a/b", "gpt2"), "mine.yaml:1: model_name_or_path: refused; 'gpt2' is no folder here, nor O"),
        (BASE.replace("identity", "dpo_en_demo") + "stage: dpo\npref_loss: hinge\ndpo_label_smoothing: 0.1\n",
         "mine.yaml:6: dpo_label_smoothing: refused; hinge has none; set loss: sigmoid, "),
        (BASE + "stage: dpo\n", "mine.yaml:3: dataset: refused; identity: dataset_info.json does not say that it"),
        (BASE.replace("identity", "dpo_en_demo"), "mine.yaml:3: dataset: refused; dpo_en_demo: dataset_info.json says"),
        (TRL_BASE + "loss_type: [sigmoid, bco_pair, sft]\nlabel_smoothing: 0.1\n",
         "mine.yaml:4: label_smoothing: refused; label_smoothing of sigmoid: sft is a mean over the tokens of a batch"),
        (TRL_BASE + "beta: 1\n", "mine.yaml: refused; a file of `trl dpo|kto`, which its keys do not tell; say w"),
        (TRL_BASE + "num_generations: 8\n", "mine.yaml:3: num_generations: refused; a key of grpo or rloo; no st"),
        ("base_model: a/b\ndatasets: [{path: c/d}]\n", "mine.yaml: learning_rate: refused; missing; axolotl need"),
        ("base_model: a/b\ndatasets:\n  - path: s3://c/d\n", "mine.yaml:3: datasets.0.path: refused; s3://c/d: d"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused_with_its_place(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text((PEERS / "data" / "dataset_info.json").read_text())
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        translate([Path("mine.yaml")], None, None, [])
    assert error.value.exit_code == 2 and any(one.startswith(problem) for one in error.value.problems)
    assert not any("pipeline.yaml" in one for one in error.value.problems), "a file that nobody wrote"


def test_an_adapter_goes_on_being_trained_with_the_shape_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trl = "model_name_or_path: {start}\ndataset_name: c/d\nuse_peft: true\nlora_r: {rank}\noutput_dir: {out}\n"
    Path("sft.yaml").write_text(trl.format(start="a/b", rank=8, out="out/sft"))
    Path("dpo.yaml").write_text(trl.format(start="./out/sft/", rank=16, out="out/dpo"))
    text, said = translate([Path("sft.yaml"), Path("dpo.yaml")], None, None, ["sft", "dpo"])
    stages = loaded(text, tmp_path).stages
    assert (
        stages["dpo"].policy == "stage:sft" and stages["dpo"].lora == stages["sft"].lora and stages["dpo"].lora.r == 8
    )
    assert "dpo.yaml:4: lora_r: not carried over; the adapter of sft goes on being trained, with 8" in said
    Path("dpo.yaml").write_text(trl.format(start="a/b", rank=16, out="out/dpo"))
    text, said = translate([Path("sft.yaml"), Path("dpo.yaml")], None, None, ["sft", "dpo"])
    assert "policy: hub:a/b" in text
    assert any(one.startswith("dpo.yaml: starts from hub:a/b, which no file before it writes;") for one in said)


def test_a_problem_that_no_key_made_names_the_peers_file_all_the_same():
    file = PeerFile(Path("mine.yaml"), ({}, {}), "TRL", Path(), {})
    problem = "pipeline.yaml:9: stages.dpo.beta: must be more than 0, got 0"
    wanted = "mine.yaml: refused; the pipeline it would make: stages.dpo.beta: must be more than 0, got 0"
    assert _told(problem, [Draft("dpo", "dpo")], [file]) == wanted


def told(text: str, folder: Path, stage: list[str] | None = None) -> list[str]:
    """Return what is said of the keys of a file, or why it is refused."""
    (folder / "mine.yaml").write_text(text)
    try:
        return translate([Path("mine.yaml")], None, None, stage or [])[1]
    except ConfigError as error:
        return list(error.problems)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text((PEERS / "data" / "dataset_info.json").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


AXOLOTL_BASE = "base_model: a/b\nlearning_rate: 1e-4\ndatasets: "


def test_what_is_said_of_a_key_is_true_of_it(elsewhere: Path):
    assert told(AXOLOTL_BASE + "{path: c/d}\n", elsewhere)[0] == (
        "mine.yaml:3: datasets: refused; must be a list of mappings; write `- ` before `path:`"
    )
    weights = "not carried over; `data_weights` says how often rows of each source are seen"
    assert f"mine.yaml:3: datasets.0.weight: {weights}" in told(AXOLOTL_BASE + "[{path: c/d, weight: 0.3}]", elsewhere)
    trl = "model_name_or_path: a/b\ndatasets: [{path: c/d, weight: 0.3}]\nhub_token: secret\nuse_peft: false\n"
    said = told(trl, elsewhere, ["sft"])
    assert "mine.yaml:2: datasets.0.weight: " + weights.replace("; ", "; no key of a dataset of TRL; ") in said
    assert "mine.yaml:3: hub_token: not carried over; log in with `hf auth login`" in said
    text = TRL_BASE + "completion_only_loss: false\nassistant_only_loss: true\n"
    told(text, elsewhere)
    assert "    loss_on: assistant  # assistant_only_loss\n" in translate([Path("mine.yaml")], None, None, [])[0]


def test_renamed_tags_of_one_dataset_are_one_line(elsewhere: Path):
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "system_tag": "system"}
    entry = {"file_name": "a.json", "formatting": "sharegpt", "tags": tags}
    (elsewhere / "data" / "dataset_info.json").write_text(json.dumps({"identity": entry}))
    (said,) = (one for one in told(BASE, elsewhere) if "tags" in one)
    wanted = (
        "mine.yaml:3: dataset: not carried over; identity: tags role_tag who, content_tag says, user_tag customer; "
    )
    assert said.startswith(wanted)


def test_merge_keys_are_read_as_the_peers_read_them(elsewhere: Path):
    told(
        "a: &a {lora_r: 8, lora_alpha: 4}\nb: &b {lora_r: 9, warmup_ratio: 0.2}\n<<: [*a, *b]\nlora_alpha: 64\n"
        "adapter: lora\nbase_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: c/d}]\n", elsewhere,
    )  # fmt: skip
    text, said = translate([Path("mine.yaml")], None, None, [])
    sft = loaded(text, elsewhere).stages["sft"]
    assert (sft.lora.r, sft.lora.alpha, sft.warmup) == (8, 64, 0.2)
    assert "mine.yaml:1: a: not carried over; no key of axolotl that align knows" in said
    assert told("<<: 3\n" + AXOLOTL_BASE + "[]\n", elsewhere) == [
        "mine.yaml:1: <<: merge keys are not read; write the fields out"
    ]


def test_sharded_training_names_its_counterpart(elsewhere: Path):
    axolotl = "base_model: a/b\ndatasets: [{path: c/d}]\nlearning_rate: 1e-4\n"
    for text, key in ((BASE, "fsdp"), (BASE, "fsdp_config"), (BASE, "deepspeed"), (axolotl, "deepspeed")):
        said = told(f"{text}{key}: ds_z3_config.json\n", elsewhere)
        assert any(
            one.startswith(f"mine.yaml:4: {key}: not carried over; for one machine write launch: {{") for one in said
        )
        assert any("accelerate: fsdp}" in one for one in said)


def test_a_reward_model_that_keeps_no_rows_is_let_through_to_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "finetuning_type: lora\nmodel_name_or_path: a/b\ndataset: rows\n"
    monkeypatch.chdir(tmp_path)
    Path("rm.yaml").write_text(text + "stage: rm\noutput_dir: saves/rm\n")
    Path("ppo.yaml").write_text(text + "stage: ppo\nreward_model: saves/rm\nmax_steps: 100\nppo_buffer_size: 2\n")
    pipeline, said = translate([Path("rm.yaml"), Path("ppo.yaml")], None, None, [])
    ppo = loaded(pipeline, tmp_path).stages["ppo"]
    assert ppo.require == {"reward_above_chance": "off"} and (ppo.batch_size, ppo.episodes) == (16, 1600)
    assert any("require.reward_above_chance: off is written" in one for one in said)


DEMOS = {
    "llamafactory_sft_lora": ("sft", "sft/lf_alpaca_en_demo.json"),
    "llamafactory_rm": ("reward", "pref/lf_dpo_en_demo.json"),
    "llamafactory_kto": ("kto", "pref/lf_kto_en_demo.json"),
    "llamafactory_pt": ("pretrain", "text/lf_c4_demo.jsonl"),
}
"""LLaMA-Factory's own demonstration rows: file of a peer -> stage and rows."""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not beside this checkout")
@pytest.mark.parametrize("name", DEMOS)
def test_real_rows_of_llamafactory_are_read_as_it_describes_them(name: str, tmp_path: Path):
    stage, file = DEMOS[name]
    fields = loaded(imported(name)[0], tmp_path).stages[stage]
    text = (SHARED / file).read_text(encoding="utf-8")
    rows = read_rows(SHARED / file, fields.reads, format=fields.format, columns=fields.columns)
    assert len(rows) == (text.count("\n") if file.endswith(".jsonl") else len(json.loads(text))) > 100


def test_no_key_tells_of_two_peers():
    told = [from_llamafactory.TELLS, from_axolotl.TELLS, from_trl.TELLS]
    assert len(frozenset().union(*told)) == sum(map(len, told))


def test_a_text_of_a_file_leads_out_of_no_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text(BASE + 'val_size: 0.1\neval_strategy: "a\\nseed: 1"\n')
    monkeypatch.chdir(tmp_path)
    text, (_, _, said) = translate([Path("mine.yaml")], None, None, [])
    assert said.startswith("mine.yaml:5: eval_strategy: not carried over; a\nseed: 1: evaluated at the end")
    assert "#   mine.yaml:5: eval_strategy: not carried over; a seed: 1: evaluated at the end" in text


def test_rows_to_evaluate_on_are_read_as_the_others_or_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text((PEERS / "data" / "dataset_info.json").read_text())
    monkeypatch.chdir(tmp_path)
    for held, said in (("alpaca_en_demo", False), ("support_talks", True)):
        (tmp_path / "mine.yaml").write_text(BASE + f"eval_dataset: {held}\n")
        text, remarks = translate([Path("mine.yaml")], None, None, [])
        assert "    evaluation: file:data/" in text
        assert any("eval_dataset: not carried over; its own format and columns" in one for one in remarks) == said


# --- docs/import.md ---------------------------------------------------------------------------------------------------


def table() -> Iterator[str]:
    """Yield the lines of the table of files in docs/import.md."""
    for name in CASES:
        lines = outcome(name).partition("---\n")
        files = " and ".join(f"`{file.removesuffix('.yaml')}`" for file in CASES[name][0])
        if name in REFUSED:
            (place, *_) = (line.split(": ") for line in lines[0].splitlines() if ": refused; " in line)
            yield f"| {files} | refused: `{place[1]}` | | | |"
            continue
        stages = ", ".join(re.findall(r"(?m)^    type: (\w+)", lines[2]))
        counts = [sum(f": {what}" in line for line in lines[0].splitlines()) for what in SAID]
        yield f"| {files} | {stages} | {counts[0]} | {counts[1]} | {counts[2] + counts[3]} |"


SAID = ("not needed; ", "not carried over; ", "carried over as ", "not given; ")


def test_the_documentation_says_what_becomes_of_each_file():
    text = (PEERS.parents[2] / "docs" / "import.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[-len(CASES) :] == list(table())
    shown = text.split("```console\n$ align import axolotl_dpo.yaml\n")[1].split("```")[0]
    pipeline, said = imported("axolotl_dpo")
    assert shown == "\n".join([*said, pipeline])


if __name__ == "__main__":
    import os

    os.chdir(PEERS)
    (PEERS / "expected").mkdir(exist_ok=True)
    for one in CASES:
        (PEERS / "expected" / f"{one}.txt").write_text(outcome(one), encoding="utf-8")
