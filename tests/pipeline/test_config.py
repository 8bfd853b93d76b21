"""A pipeline file is right, or every problem is named with its line and a remedy: before torch, in half a second."""

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.errors import ConfigError
from align_pipeline.pipeline.schema import schema
from align_pipeline.pipeline.trainer_fields import trainer_fields, type_problem
from align_pipeline.stages import STAGES

GOOD = """\
name: support-bot
model: hub:Qwen/Qwen3-0.6B
lora:
  r: 16
stages:
  sft:
    type: sft
    data: file:sft.jsonl
  reward:
    type: reward
    model: stage:sft
    data: file:pairs.jsonl
  dpo:
    type: dpo
    policy: stage:sft
    data: file:pairs.jsonl
    beta: 0.2
  evaluate:
    type: evaluate
    models: {sft: stage:sft, dpo: stage:dpo}
    baseline: sft
    scorer: stage:reward
    prompts: file:prompts.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("sft.jsonl", "pairs.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "rewards.py").write_text("def score(prompts, completions, **columns):\n    return [0.0]\n")
    return tmp_path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """Return the problems of a file, its own path taken out."""
    file = folder / "p.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, f"{old!r} must occur once"
    return GOOD.replace(old, new)


def test_a_good_file(folder: Path):
    (folder / "p.yaml").write_text(GOOD)
    pipeline = load(folder / "p.yaml")
    assert pipeline.name == "support-bot" and list(pipeline.stages) == ["sft", "reward", "dpo", "evaluate"]
    assert pipeline.stages["sft"].model == "hub:Qwen/Qwen3-0.6B", "filled from the top level"
    assert pipeline.stages["dpo"].lora.r == 16 and pipeline.stages["dpo"].beta == 0.2


def test_numbers_are_read_as_yaml_1_2_says(folder: Path):
    for text, value in (("1e-4", 1e-4), ("2E-5", 2e-5), (".5", 0.5), ("1", 1.0)):
        (folder / "p.yaml").write_text(changed("beta: 0.2", f"learning_rate: {text}"))
        assert load(folder / "p.yaml").stages["dpo"].learning_rate == value
    (folder / "p.yaml").write_text(changed("name: support-bot", "name: no"))
    assert load(folder / "p.yaml").name == "no"


def test_overrides_win_and_make_what_is_missing(folder: Path):
    (folder / "p.yaml").write_text(GOOD)
    pipeline = load(folder / "p.yaml", ["stages.dpo.beta=0.3", "stages.dpo.how.logging_steps=1", "seed=7"])
    assert pipeline.stages["dpo"].beta == 0.3 and pipeline.stages["dpo"].how.logging_steps == 1
    assert {stage.seed for stage in pipeline.stages.values()} == {7}


def test_a_stage_that_changes_one_field_of_lora_keeps_the_others(folder: Path):
    (folder / "p.yaml").write_text(changed("r: 16", "r: 4").replace("    beta: 0.2", "    lora: {alpha: 8}"))
    with pytest.raises(ConfigError, match="lora.alpha"):
        load(folder / "p.yaml")
    (folder / "p.yaml").write_text("type: sft\nmodel: hub:a/b\ndata: file:sft.jsonl\nlora: {r: 4}\n")
    assert load(folder / "p.yaml", ["lora.alpha=8"]).stages["sft"].lora.model_dump()["r"] == 4


def test_train_fields_of_speed_move_to_how(folder: Path):
    (folder / "p.yaml").write_text(changed("beta: 0.2", "train: {adam_beta2: 0.95, torch_compile: false}"))
    dpo = load(folder / "p.yaml").stages["dpo"]
    assert dpo.train == {"adam_beta2": 0.95} and dpo.how.train == {"torch_compile": False}


# Each: what is wrong with GOOD, and what must be said (line, then a part of the text). Several lines: all at once.
WRONG = {
    "typo at the top": (changed("lora:", "lorra:"), ["3: lorra: unknown field; did you mean lora?"]),
    "typo of stages": (
        changed("stages:", "stage:"),
        ["5: stage: unknown field; did you mean stages?", "stages: missing"],
    ),
    "typo in a stage": (
        changed("    beta: 0.2", "    learning_rat: 0.1"),
        ["17: stages.dpo.learning_rat: unknown field; did you mean learning_rate?"],
    ),
    "typo inside lora": (changed("  r: 16", "  rr: 16"), ["4: lora.rr: unknown field; did you mean r?"]),
    "typo inside how": (
        changed("    beta: 0.2", "    how: {micro_bach: 4}"),
        ["17: stages.dpo.how.micro_bach: unknown field; did you mean micro_batch?"],
    ),
    "a stage's field at the top": (
        changed("lora:\n  r: 16", "beta: 0.1"),
        ["3: beta: unknown field; it is a field of a stage (dpo, kto)"],
    ),
    "a trainer's field in a stage": (
        changed("    beta: 0.2", "    adam_beta2: 0.95"),
        ["17: stages.dpo.adam_beta2: unknown field; a field of DPOConfig goes below `train:`"],
    ),
    "an owned field in a stage": (
        changed("    beta: 0.2", "    num_train_epochs: 2"),
        ["17: stages.dpo.num_train_epochs: unknown field; it is set by align; use epochs"],
    ),
    "an unknown field of train": (
        changed("    beta: 0.2", "    train: {adam_beta_2: 0.9}"),
        ["17: stages.dpo.train.adam_beta_2: DPOConfig has no such field; did you mean adam_beta2?"],
    ),
    "a wrong type in train": (
        changed("    beta: 0.2", "    train: {adam_beta2: high}"),
        ["17: stages.dpo.train.adam_beta2: must be float, got 'high'"],
    ),
    "an owned field of train": (
        changed("    beta: 0.2", "    train: {per_device_train_batch_size: 4}"),
        ["17: stages.dpo.train.per_device_train_batch_size: is set by align; use batch_size and how.micro_batch"],
    ),
    "a number as text": (
        changed("beta: 0.2", 'learning_rate: "1e-4"'),
        ["17: stages.dpo.learning_rate: must be a number, got '1e-4'; write it without quotes"],
    ),
    "text for a number": (changed("beta: 0.2", "beta: high"), ["17: stages.dpo.beta: must be a number, got 'high'"]),
    "a list for a number": (changed("beta: 0.2", "beta: [0.2]"), ["17: stages.dpo.beta: must be a number, got [0.2]"]),
    "a fraction for a count": (changed("r: 16", "r: 16.5"), ["4: lora.r: must be a whole number, got 16.5"]),
    "true for a number": (
        changed("beta: 0.2", "seed: true"),
        ["17: stages.dpo.seed: must be a whole number, got True"],
    ),
    "yes for true": (
        changed("data: file:sft.jsonl", "data: file:sft.jsonl\n    packing: yes"),
        ["9: stages.sft.packing: must be true or false, got 'yes'"],
    ),
    "out of bounds": (changed("r: 16", "r: 0"), ["4: lora.r: must be at least 1, got 0"]),
    "not positive": (changed("beta: 0.2", "beta: -1"), ["17: stages.dpo.beta: must be more than 0, got -1"]),
    "nothing for a value": (changed("beta: 0.2", "beta:"), ["17: stages.dpo.beta: must be a number, got nothing"]),
    "an unknown choice": (
        changed("beta: 0.2", "schedule: cosin"),
        ["17: stages.dpo.schedule: must be 'cosine', 'linear' or 'constant', got 'cosin'"],
    ),
    "an unknown tuning": (
        changed("lora:\n  r: 16", "tuning: qlora"),
        ["3: tuning: must be 'lora' or 'full', got 'qlora'"],
    ),
    "a mapping expected": (changed("lora:\n  r: 16", "lora: 16"), ["3: lora: must be a mapping, got 16"]),
    "an unknown stage type": (
        changed("type: dpo", "type: dpoo"),
        ["14: stages.dpo.type: 'dpoo' is not a stage; did you mean dpo?"],
    ),
    "no stage type": (
        changed("    type: dpo\n", ""),
        ["13: stages.dpo: type: missing; choose feedback, pretrain, sft"],
    ),
    "a stage without content": (
        changed("  evaluate:\n", "  empty:\n  evaluate:\n"),
        ["18: stages.empty: must be a mapping"],
    ),
    "a required field": (changed("    policy: stage:sft\n", ""), ["13: stages.dpo.policy: missing"]),
    "no model anywhere": (
        changed("model: hub:Qwen/Qwen3-0.6B\n", ""),
        ["5: stages.sft.model: missing; write it here, or once as `model:` at the top of the file"],
    ),
    "an unknown stage name": (
        changed("policy: stage:sft", "policy: stage:stf"),
        ["15: stages.dpo.policy: no stage 'stf' in this file; did you mean sft?"],
    ),
    "a wrong kind": (
        changed("scorer: stage:reward", "scorer: stage:sft"),
        ["22: stages.evaluate.scorer: stage 'sft' makes a model, but a reward model is needed here; use stage:reward"],
    ),
    "a scorer that no stage makes": (
        re.sub(r"  reward:\n.*?(?=  dpo:)", "", GOOD, flags=re.S).replace("scorer: stage:reward", "scorer: stage:dpo"),
        ["18: stages.evaluate.scorer: stage 'dpo' makes a model, but a reward model is needed here; add a stage that"],
    ),
    "a cycle": (
        changed("    type: sft\n", "    type: sft\n    model: stage:dpo\n"),
        ["6: stages.sft: a cycle: sft -> dpo -> sft; one of them must read something else"],
    ),
    "itself": (changed("policy: stage:sft", "policy: stage:dpo"), ["13: stages.dpo: a cycle: dpo -> dpo"]),
    "a missing file": (
        changed("file:sft.jsonl", "file:sft.json"),
        ["8: stages.sft.data: sft.json does not exist; did you mean sft.jsonl?"],
    ),
    "a missing folder": (
        changed("file:sft.jsonl", "file:no/sft.jsonl"),
        ["8: stages.sft.data: no/sft.jsonl does not exist"],
    ),
    "no scheme": (
        changed("data: file:sft.jsonl", "data: sft.jsonl"),
        ["8: stages.sft.data: 'sft.jsonl' names no input; write stage:NAME, hub:ORG/NAME[@REV] or file:PATH"],
    ),
    "a hub name without its organisation": (
        changed("hub:Qwen/Qwen3-0.6B", "hub:Qwen3"),
        ["2: model: 'hub:Qwen3' names no input"],
    ),
    "a stage at the top": (
        changed("model: hub:Qwen/Qwen3-0.6B", "model: stage:sft"),
        ["2: model: 'stage:sft': the top level"],
    ),
    "a function that is not there": (
        changed("scorer: stage:reward", "scorer: rewards:scor"),
        ["22: stages.evaluate.scorer: rewards.py defines no 'scor'; did you mean score?"],
    ),
    "a module that is not there": (
        changed("scorer: stage:reward", "scorer: rewrads:score"),
        ["22: stages.evaluate.scorer: no module 'rewrads'"],
    ),
    "a function where rows belong": (
        changed("data: file:sft.jsonl", "data: rewards:score"),
        ["8: stages.sft.data: 'rewards:score' names no input"],
    ),
    "a baseline that is no model": (changed("baseline: sft", "baseline: base"), ["stages.evaluate", "base"]),
    "a rank that differs along a chain": (
        changed("    beta: 0.2", "    lora: {r: 8}"),
        ["15: stages.dpo.policy: ", "r 8", "16", "merge"],
    ),
    "inputs inside a configuration": (
        GOOD
        + "  thumbs:\n    type: feedback\n    logs: file:pairs.jsonl\n    complete:\n      policy: stage:reward\n"
        + "      reward: stage:dpi\n",
        [
            "28: stages.thumbs.complete.policy: stage 'reward' makes a reward model, but a model is needed here",
            "29: stages.thumbs.complete.reward: no stage 'dpi' in this file; did you mean dpo?",
        ],
    ),
    "a field inside a configuration": (
        GOOD
        + "  thumbs:\n    type: feedback\n    logs: file:pairs.jsonl\n    complete:\n      policy: stage:sft\n"
        + "      reward: stage:reward\n      sample: 1\n",
        ["30: stages.thumbs.complete.sample: unknown field; did you mean samples?"],
    ),
    "a cycle through a configuration": (
        changed(
            "    type: reward\n    model: stage:sft\n    data: file:pairs.jsonl",
            "    type: reward\n    data: stage:thumbs",
        )
        + "  thumbs:\n    type: feedback\n    logs: file:pairs.jsonl\n"
        + "    complete: {policy: stage:sft, reward: stage:reward}\n",
        ["a cycle: reward -> thumbs -> reward"],
    ),
    "full tuning of an adapter": (changed("    beta: 0.2", "    tuning: full"), ["15: stages.dpo.policy: ", "merge"]),
    "an adapter's shape for whole weights": (
        changed("    beta: 0.2", "    tuning: full\n    lora: {r: 8}"),
        ["13: stages.dpo: tuning: full trains whole weights; remove lora"],
    ),
    "merging what has no adapter": (
        GOOD.replace("lora:\n  r: 16", "tuning: full") + "  merged:\n    type: merge\n    model: stage:sft\n",
        ["25: stages.merged.model: ", "no adapter"],
    ),
    "a batch that cannot be dealt": (
        changed("    beta: 0.2", "    batch_size: 10\n    how: {micro_batch: 4}"),
        ["13: stages.dpo: batch_size 10 must be a multiple of how.micro_batch 4"],
    ),
    "a duplicate key": (
        changed("    beta: 0.2", "    beta: 0.2\n    beta: 0.3"),
        ["18: stages.dpo.beta: written twice, first in line 17; delete one"],
    ),
    "a duplicate stage": (GOOD + "  sft:\n    type: sft\n", ["24: stages.sft: written twice, first in line 6"]),
    "a name that the store has taken": (
        changed("name: support-bot", "name: wandb"),
        ["1: name: 'wandb' cannot name a folder of the store"],
    ),
    "a name that is no folder": (changed("name: support-bot", "name: a/b"), ["1: name: 'a/b' cannot name a folder"]),
    "several at once": (
        changed("r: 16", "r: 0")
        .replace("beta: 0.2", "bta: 0.2")
        .replace("file:prompts", "file:promts")
        .replace("type: reward", "type: rward"),
        [
            "4: lora.r: must be at least 1, got 0",
            "10: stages.reward.type: 'rward' is not a stage; did you mean reward?",
            "17: stages.dpo.bta: unknown field; did you mean beta?",
            "23: stages.evaluate.prompts: promts.jsonl does not exist; did you mean prompts.jsonl?",
        ],
    ),
    "a type that is a list": (changed("type: dpo", "type: [dpo]"), ["14: stages.dpo.type: ['dpo'] is not a stage"]),
    "an optimizer that nobody knows": (
        changed("    beta: 0.2", "    beta: 0.2\n    train: {optim: muon}"),
        ["18: stages.dpo.train.optim: must be an optimizer that Transformers knows, got 'muon'; choose adamw_torch, "],
    ),
    "an optimizer with a typing error": (
        changed("    beta: 0.2", "    beta: 0.2\n    train: {optim: adamw_troch}"),
        ["stages.dpo.train.optim: must be an optimizer that Transformers knows, got 'adamw_troch'; did you mean ada"],
    ),
    "a logger that is no list": (
        changed("    beta: 0.2", "    how: {report_to: wandb}"),
        ["17: stages.dpo.how.report_to: must be a list, got 'wandb'; write [wandb]"],
    ),
    "all loggers": (
        changed("    beta: 0.2", "    how: {report_to: all}"),
        ["17: stages.dpo.how.report_to: must be a list, got 'all'; write [tensorboard, wandb, trackio]"],
    ),
    "no logger": (
        changed("    beta: 0.2", "    how: {report_to: none}"),
        ["17: stages.dpo.how.report_to: 'none' names no logger; leave it out"],
    ),
    "a list of no logger": (
        changed("    beta: 0.2", "    how: {report_to: [none]}"),
        ["17: stages.dpo.how.report_to: ['none'] names no logger; leave it out"],
    ),
    "a merge key": (changed("    beta: 0.2", "    <<: {beta: 0.2}"), ["17: stages.dpo.<<: merge keys are not read"]),
    "an alias of itself": (changed("    beta: 0.2", "    columns: &a {prompt: *a}"), ["1: an alias holds itself"]),
    "aliases of aliases": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)),
        ["5: stands for 31,111 values with its aliases, more than 20,000; use fewer aliases here"],
    ),
    "a control character": (changed("beta: 0.2", "beta: 0.2\x01"), ["1: not YAML"]),
    "not YAML": (changed("beta: 0.2", "beta: [0.2"), ["not YAML"]),
    "a tab": (changed("    beta: 0.2", "\tbeta: 0.2"), ["17: not YAML"]),
    "an empty file": ("", ["1: holds no mapping"]),
    "a list": ("- a\n- b\n", ["1: holds no mapping"]),
    "no stages": ("name: x\nstages: {}\n", ["2: stages: missing"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line_and_a_remedy(folder: Path, name: str):
    text, expected = WRONG[name]
    found = problems(folder, text)
    joined = "\n".join(found)
    for part in expected:
        assert part in joined, joined
    assert all(re.match(r"p\.yaml(:\d+)?: ", problem) for problem in found), joined


def test_aliases_of_aliases_are_refused_at_once(folder: Path):
    began = time.process_time()
    assert problems(folder, WRONG["aliases of aliases"][0])
    assert time.process_time() - began < 0.5


def test_what_a_stage_cannot_read_is_said_at_the_input_inside_a_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(STAGES["feedback"], "misfit", lambda self, field, maker: f"{field} of {maker.type} is none")
    text = GOOD + "  thumbs:\n    type: feedback\n    logs: file:pairs.jsonl\n    complete:\n      policy: stage:sft\n"
    assert problems(folder, text + "      reward: stage:reward\n") == [
        "p.yaml:28: stages.thumbs.complete.policy: complete.policy of sft is none",
        "p.yaml:29: stages.thumbs.complete.reward: complete.reward of reward is none",
    ]


def test_the_corpus_is_large():
    assert len(WRONG) >= 40


def test_nothing_else_is_reported(folder: Path):
    """One mistake is one line: no problem drags others along."""
    for name, (text, expected) in WRONG.items():
        if len(expected) == 1 and name not in {"no stage type", "a stage without content"}:
            assert len(problems(folder, text)) == 1, (name, problems(folder, text))


def cpu_seconds_of_children() -> float:
    """CPU seconds, not the wall's: other jobs share the cores of a test machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_wrong_file_answers_in_half_a_second_without_torch(folder: Path):
    text = WRONG["several at once"][0].replace("bta: 0.2", "bta: 0.2\n    train: {adam_beta_2: 0.9}")
    (folder / "p.yaml").write_text(text)
    code = (
        "import sys\nsys.argv = ['align', 'run', 'p.yaml']\n"
        "from align_pipeline.pipeline.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))\n"
    )
    seconds = []
    for _ in range(3):
        began = cpu_seconds_of_children()
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        seconds.append(cpu_seconds_of_children() - began)
        assert result.returncode == 2 and result.stdout.strip() == "[]", result
        assert len(result.stderr.splitlines()) == 5
    assert min(seconds) < 0.5, seconds


def test_overrides_are_checked_like_the_file(folder: Path):
    assert problems(folder, GOOD, "stages.dpo.bta=1") == [
        "--set stages.dpo.bta=1: stages.dpo.bta: unknown field; did you mean beta?"
    ]
    assert problems(folder, GOOD, "stages.dpo.beta") == ["--set stages.dpo.beta: write --set stages.dpo.beta=0.2"]
    assert "is no mapping" in problems(folder, GOOD, "name.x=1")[0]


def test_a_missing_file_is_named(tmp_path: Path):
    (tmp_path / "pipeline.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"pipelin.yaml does not exist; did you mean pipeline.yaml\?"):
        load(tmp_path / "pipelin.yaml")


@pytest.mark.parametrize(
    ("module", "name"),
    [(cls.trainer_config) for cls in STAGES.values() if cls.trainer_config],
)
def test_trainer_fields_are_those_of_the_dataclass(module: str, name: str):
    import dataclasses
    import importlib

    real = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
    assert set(trainer_fields(module, name)) == real


def test_types_of_trainer_fields():
    assert type_problem("float", 1) is None and type_problem("int | None", None) is None
    assert type_problem("dict | str | None", {"a": 1}) is None and type_problem("SchedulerType | str", "cosine") is None
    assert type_problem("int | None", "3") == "must be int or null, got '3'"
    assert type_problem("bool", 1) == "must be bool, got 1"
    assert type_problem("ParallelismConfig | None", {"x": 1}) is None, "what we cannot check, the trainer will"


def test_every_owned_field_and_its_remedy_exist():
    for cls in STAGES.values():
        if cls.trainer_config:
            assert set(cls.owned) <= set(trainer_fields(*cls.trainer_config)) | {
                "chat_template_path",
                "max_length",
                "eos_token",
                "pad_token",
                "truncation_mode",
                "model_init_kwargs",
                "trust_remote_code",
            }
            for ours in filter(None, cls.owned.values()):
                for word in ours.replace(" and ", " ").split():
                    head, _, rest = word.partition(".")
                    assert head in cls.model_fields or head == "launch", (cls, ours)
                    if head == "how":
                        assert rest in cls.model_fields["how"].annotation.model_fields


def test_the_schema_describes_every_field():
    definitions = schema()["$defs"]
    assert {"Pipeline", "Lora", "How", "Launch"} <= set(definitions)
    for title, definition in definitions.items():
        for name, value in definition["properties"].items():
            toy = title.startswith("Toy") or (title, name) == ("Pipeline", "stages")
            assert toy or value.get("description"), f"{title}.{name}: no docstring"
    for cls in STAGES.values():
        assert set(definitions[cls.__name__]["properties"]) == set(cls.model_fields)
