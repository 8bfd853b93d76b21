"""Memory and time that the plan foretells, beside numbers that come from elsewhere: model cards, autograd, workers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import memory_shapes
from align_pipeline.pipeline.config import load
from align_pipeline.pipeline.estimate import (
    FLOOR,
    GIB,
    LIKE_LLAMA,
    LOGITS_AT_ONCE,
    POSITIONS_AT_ONCE,
    PPO_TOKENS,
    ROWS_JUDGED,
    ROWS_SAMPLED,
    ROWS_SCORED,
    TOKENS_OF_VOCABULARY_AT_ONCE,
    Machine,
    Shape,
    Unknown,
    adapter_parameters,
    estimate,
    kept_per_token,
)
from align_pipeline.pipeline.files import file_sha256
from align_pipeline.pipeline.forecast import Forecaster, this_machine
from align_pipeline.pipeline.manifest import Manifest
from align_pipeline.pipeline.plan import Planner
from align_pipeline.pipeline.stage import Launch, Stage
from align_pipeline.pipeline.store import Store, configuration
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.kto import KTO
from align_pipeline.stages.ppo import PPO
from align_pipeline.stages.sample import Sample
from align_pipeline.stages.sft import SFT
from align_pipeline.stages.training import Lora
from harness import Align

# As they lie on the hub, without what does not matter here.
SMALL = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
LARGE = SMALL | {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
    "tie_word_embeddings": False,
}  # fmt: skip
CPU = Machine("CPU", 16 * GIB)
GPU = Machine("a GPU", 24 * GIB, gpu=True, bf16=True)
DATA = {"data": "file:x.jsonl", "model": "file:m"}
TOKENS = 33  # divides no size of a weight
PAIRS = {"data": "file:x.jsonl", "policy": "file:m"}


def parts(stage: Stage, shape: Shape, machine: Machine, **launch: Any) -> Mapping[str, float]:
    fields = {"model": shape, "policy": shape, "reward": shape, "models.a": shape, "models.b": shape}
    return estimate(stage, fields, machine, Launch(**launch)).parts


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model_cards():
    assert Shape.of(SMALL).parameters() == 596_049_920
    assert Shape.of(LARGE).parameters() == 8_190_735_360
    assert Shape.of(LARGE).parameters(head=False) == 8_190_735_360 - 151936 * 4096
    assert adapter_parameters(Shape.of(SMALL), SFT(**DATA)) == 10_092_544
    some = SFT(**DATA, lora=Lora(r=8, target_modules=("q_proj", "v_proj")))
    assert adapter_parameters(Shape.of(SMALL), some) == 28 * 8 * ((1024 + 2048) + (1024 + 1024))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"num_local_experts": 8}, "qwen3"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": None}, "config.json: hidden_size is null, and must be a whole number of 1 to 2147483647"),
        ({"num_attention_heads": "many"}, 'config.json: num_attention_heads is "many", and must'),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, and must"),
        (json.loads('{"hidden_size": 1e400}'), "hidden_size is Infinity, and must"),
        ({"hidden_size": 1e300}, "hidden_size is 1e+300, and must"),
        ({"intermediate_size": 10**300}, "intermediate_size is 1000"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2, and must"),
        ({"vocab_size": True}, "vocab_size is true, and must"),
        ({"vocab_size": {}}, "vocab_size is {}, and must"),
        ({"head_dim": None, "hidden_size": 8}, "hidden_size 8 is less than num_attention_heads 16"),
        ({"model_type": ["llama"]}, 'config.json: model_type is ["llama"], and must'),
        ({"head_dim": []}, "head_dim is [], and must"),
        ({"max_position_embeddings": "abc"}, 'max_position_embeddings is "abc", and must'),
    ],
)
def test_what_is_not_known_is_refused_with_its_reason(change: dict[str, Any], says: str):
    with pytest.raises(Unknown, match=re.escape(says)):
        Shape.of(SMALL | change)


def test_numbers_that_others_have_too_are_theirs():
    """Read from their source: they stand beside an import of torch or of TRL."""
    stages, trl = Path(__file__).parents[2] / "stages", Path(str(find_spec("trl").submodule_search_locations[0]))
    power = LOGITS_AT_ONCE[False].bit_length() - 1
    for file, line in (
        (stages / "logprobs.py", f"LOGITS_AT_ONCE = 2**{power}\n"),
        (stages / "logprobs.py", f"_ON_GPU = {LOGITS_AT_ONCE[True] // LOGITS_AT_ONCE[False]}\n"),
        (stages / "ppo_loop.py", f'TOKENS_AT_ONCE = {{"cpu": {PPO_TOKENS[False]}}}\n'),
        (stages / "ppo_loop.py", f"TOKENS_AT_ONCE.get(self.args.device.type, {PPO_TOKENS[True]})\n"),
        (stages / "models.py", f"rows: Sequence[Sequence[int]], micro_batch: int = {ROWS_SCORED}) -> list[float]:\n"),
        (stages / "models.py", f"    micro_batch: int = {ROWS_JUDGED},\n) -> list[torch.Tensor]:\n"),
        (stages / "rollout.py", f"return max(1, min({ROWS_SAMPLED}, int(CACHE_BYTES // "),
        (trl / "kernels" / "chunked_logprob.py", f"\nTOKEN_CHUNK_SIZE = {POSITIONS_AT_ONCE}\n"),
        (trl / "trainer" / "utils.py", f"\n_CHUNKED_LOGPROB_CHUNK_SIZE = {TOKENS_OF_VOCABULARY_AT_ONCE}\n"),
    ):
        assert line in file.read_text(encoding="utf-8"), (file.name, line)


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_the_families_that_are_known_have_the_parameters_that_transformers_makes(family: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
    more = {"num_hidden_layers": 3, "head_dim": 32, "vocab_size": 4000, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **shape, **more)
    with torch.device("meta"):
        made = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    written = config.to_dict()
    assert Shape.of(written).parameters() == pytest.approx(made, rel=1e-3)
    assert Shape.of({name: written[name] for name in written if name != "tie_word_embeddings"}) == Shape.of(written)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_block_keeps_is_what_autograd_keeps(family: str, tuning: str, mixed: bool, padded: bool):
    """The bytes that two layers more keep, so that embeddings and the last norm do not count."""
    found = [_kept(family, layers, tuning, mixed, padded) for layers in (1, 3)]
    config = _config(family, 1).to_dict()
    stage = SFT(**DATA, tuning=tuning, lora=Lora(r=8) if tuning == "lora" else Lora())
    expected = kept_per_token(Shape.of(config), stage, 2 if mixed else 4, TOKENS if padded else 0)
    assert (found[1] - found[0]) / 2 / (2 * TOKENS) == pytest.approx(expected, rel=0.01)


def _config(family: str, layers: int) -> Any:
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": layers, "vocab_size": 64, "head_dim": 16, "max_position_embeddings": 64}
    return getattr(transformers, f"{family}Config")(**shape, **more, pad_token_id=0)


def _kept(family: str, layers: int, tuning: str, mixed: bool, padded: bool) -> int:
    """Return the bytes that a forward pass over two rows keeps beside weights."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, f"{family}ForCausalLM")(_config(family, layers)).train()
    if tuning == "lora":
        frozen = model.to(torch.bfloat16 if mixed else torch.float32)
        model = get_peft_model(frozen, LoraConfig(r=8, target_modules="all-linear"))
        model.enable_input_require_grads()
    ids, mask = torch.ones(2, TOKENS, dtype=torch.long), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, -8:] = 0 if padded else 1
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: Any) -> Any:
        alive.append(tensor)  # so that no two share an address
        if tensor.numel() % TOKENS == 0:  # else a weight, which autocast copies
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inner = model.get_base_model() if tuning == "lora" else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one), autocast:
        inner.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(sizes.values())


# --- estimates --------------------------------------------------------------------------------------------------------


def test_whole_weights_take_sixteen_bytes_a_parameter_and_a_reference_four_more():
    shape, count = Shape.of(SMALL), 596_049_920
    whole = parts(DPO(**PAIRS, tuning="full"), shape, GPU)
    assert [whole[name] / count for name in ("weights", "gradients", "optimizer", "reference")] == [4, 4, 8, 4]
    small = parts(SFT(**DATA, tuning="full", train={"optim": "adamw_8bit"}), shape, GPU)
    assert small["optimizer"] / count == 2 and "reference" not in small
    shared = parts(DPO(**PAIRS, tuning="full"), shape, GPU, processes=2)
    assert shared["gradients"] / count == 8, "a copy of them in the buckets of data parallelism"


def test_an_adapter_takes_sixteen_bytes_and_its_base_two_or_half_of_one():
    shape, count, base = Shape.of(SMALL), 10_092_544, 596_049_920
    adapter = parts(KTO(**PAIRS, kl_batch=4), shape, GPU)
    assert [adapter[name] / count for name in ("adapter", "gradients", "optimizer", "reference")] == [4, 4, 8, 4]
    assert adapter["weights"] / base == 2
    assert parts(SFT(**DATA), shape, replace(GPU, bf16=False))["weights"] / base == 4, "an older GPU computes in fp32"
    linear = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    quantised = parts(SFT(**DATA, quantize="4bit"), shape, GPU)
    assert quantised["weights"] == pytest.approx(0.516 * linear + 2 * (base - linear), rel=1e-3)
    assert quantised["optimizer"] / count == 4, "TRL trains the adapters of a quantised base in bfloat16"


def test_checkpointing_keeps_a_hidden_state_a_layer_and_one_layer():
    shape, tokens = Shape.of(SMALL), 8 * 1024
    on = parts(SFT(**DATA), shape, GPU)["activations"]
    off = parts(SFT(**DATA, how={"gradient_checkpointing": False}), shape, GPU)["activations"]
    assert 28 * tokens * 2 * 1024 < on < 28 * tokens * 2 * 1024 + 0.1 * off
    assert off > 28 * tokens * 2 * (4 * 3072 + 4 * 2048 + 7 * 1024), "what linear layers and attention read"


def test_no_logits_of_a_whole_batch_are_ever_kept():
    shape = Shape.of(SMALL)
    on_gpu = [parts(DPO(**PAIRS, how={"micro_batch": size}), shape, GPU)["logits"] for size in (8, 32)]
    hidden = 3 * 16 * 1023 * 1024 * 4  # the gradient of the states that the head reads
    assert on_gpu[1] - on_gpu[0] == hidden and on_gpu[0] < 0.35 * GIB < 16 * 1023 * 151936 * 4 / 20
    on_cpu = parts(DPO(**PAIRS, how={"micro_batch": 1}), shape, CPU)["logits"]
    assert on_cpu == pytest.approx(8.25 * 4 * 2046 * 32768, rel=0.01), "torch folds a tile with eight of its size"


def test_ppo_holds_one_base_its_adapters_and_the_share_of_vllm():
    ppo = {"policy": "stage:sft", "reward": "stage:reward", "prompts": "file:p.jsonl"}
    shape, adapter = Shape.of(SMALL), 4 * 10_092_544
    found = parts(PPO(**ppo), shape, replace(GPU, vllm=True), vllm_memory=0.25)
    assert (found["vLLM"], found["weights"]) == (6 * GIB, 2 * 596_049_920)
    assert (found["reference"], found["reward"], found["value model"]) == (adapter, adapter, 4 * adapter)
    assert "value model" not in parts(PPO(**ppo, value="shared"), shape, GPU)
    other = estimate(
        PPO(**ppo, value="fresh"), {"policy": shape, "reward": replace(shape, base="hub:a/b")}, GPU, Launch()
    )
    assert other.parts["reward"] == 2 * 596_049_920, "a reward model on another base is a model of its own"
    assert "vLLM" not in parts(PPO(**ppo, sampler="transformers"), shape, replace(GPU, vllm=True))
    with pytest.raises(Unknown, match="vLLM"):
        parts(PPO(**ppo, sampler="vllm"), shape, CPU)


def test_evaluation_holds_two_models_and_a_cache_of_at_most_a_gibibyte():
    stage = Evaluate(models={"a": "file:a", "b": "file:b"}, baseline="a", scorer="m:f", prompts="file:p.jsonl")
    found = parts(stage, Shape.of(LARGE), GPU)
    assert found["weights of two models"] == 2 * 2 * 8_190_735_360
    assert 0.9 * GIB < found["KV cache"] <= GIB
    sample = Sample(policy="file:a", scorer="m:f", prompts="file:p.jsonl", how={"micro_batch": 16})
    assert parts(sample, Shape.of(LARGE), GPU)["KV cache"] == 16 * 512 * 2 * 36 * 8 * 128 * 2


def test_processes_share_the_memory_of_a_machine_and_have_a_gpu_each():
    one, two = (sum(parts(SFT(**DATA), Shape.of(SMALL), CPU, processes=n).values()) for n in (1, 2))
    assert 1.7 * one < two < 2.1 * one
    one, two = (sum(parts(SFT(**DATA), Shape.of(SMALL), GPU, processes=n).values()) for n in (1, 2))
    assert one <= two < 1.05 * one


def test_shares_of_a_model_are_small_while_it_learns_and_whole_at_its_end():
    shape, count, fsdp = Shape.of(SMALL), 596_049_920, {"processes": 4, "accelerate": "fsdp"}
    learning = parts(DPO(**PAIRS, tuning="full"), shape, GPU, **fsdp)
    assert [learning[name] / count for name in ("weights", "gradients", "optimizer", "reference")] == [1, 1, 2, 4]
    block, embeddings = 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072, 151936 * 1024
    assert learning["layers put together"] == pytest.approx(8 * (embeddings + 2 * block), rel=1e-3), "and gradients"
    brief = {"tuning": "full", "max_length": 16, "how": {"micro_batch": 1}}
    ending = parts(SFT(**DATA, **brief), shape, GPU, **fsdp)
    assert [ending[name] / count for name in ("weights", "shares of weights", "gradients", "optimizer")] == [4, 1, 1, 2]
    alone = parts(SFT(**DATA), shape, GPU, processes=1, accelerate="fsdp")
    assert alone == parts(SFT(**DATA), shape, GPU), "one process has nobody to share with"


# --- the plan ---------------------------------------------------------------------------------------------------------

PIPELINE = """
name: night
model: file:model
stages:
  sft:
    type: sft
    data: file:sft.jsonl
    max_length: 4096
  dpo:
    type: dpo
    policy: stage:sft
    data: file:pairs.jsonl
    max_length: 4096
    how:
      gradient_checkpointing: false
"""


ASKED = """
name: night
model: file:model
stages:
  sample:
    type: sample
    policy: file:model
    scorer: s:score
    prompts: file:sft.jsonl
  dpo:
    type: dpo
    policy: file:model
    data: stage:sample
  evaluate:
    type: evaluate
    models:
      a: stage:dpo
    baseline: a
    scorer: s:score
    prompts: file:sft.jsonl
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LARGE))
    (tmp_path / "sft.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path


def forecasts(project: Path, machine: Machine, *overrides: str) -> dict[str, tuple[str, str]]:
    pipeline = load(project / "p.yaml", overrides)
    store = Store(project / "runs")
    planner = Planner(pipeline, store, Manifest(store, pipeline.name, pipeline.file))
    forecaster = Forecaster(planner, machine)
    found = {step.name: forecaster.of(step) for step in planner.plan()}
    return {name: (one.takes, one.advice) for name, one in found.items() if one}


def test_a_plan_says_what_fits_and_the_least_change_that_makes_the_rest_fit(project: Path):
    large = forecasts(project, replace(GPU, memory=1000 * GIB))
    assert large["sft"][0].endswith(" of 1000.0 GiB, time unknown until it ran once here") and not large["sft"][1]
    found = forecasts(project, GPU)
    assert "of 24.0 GiB: too much; " in found["dpo"][0]
    largest, _, mends = found["dpo"][1].partition("; with ")
    settings, _, size = mends.partition(" it is ~")
    assert largest.endswith("of it is activations") and float(size.split()[0]) <= 0.9 * 24
    assert settings == "how.micro_batch: 2, how.gradient_checkpointing: true, quantize: 4bit"
    mended = forecasts(project, GPU, *(f"stages.dpo.{one.replace(': ', '=')}" for one in settings.split(", ")))
    assert mended["dpo"] == (f"~{size.split()[0]} GiB of 24.0 GiB, time unknown until it ran once here", "")


def test_the_page_shows_what_is_said(project: Path):
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    (project / "model" / "config.json").write_text(json.dumps(SMALL))
    found = forecasts(project, replace(GPU, memory=8 * GIB), "stages.sft.max_length=1024", "stages.dpo.max_length=2048")
    assert f"sft  run     never run      {found['sft'][0]}\n" in page
    assert f"dpo  waits   waits for sft  {found['dpo'][0]}\n     {found['dpo'][1]}\n" in page
    assert f"| {FLOOR / 2**20:.0f} MiB on a CPU" in page


def test_a_change_of_results_comes_last_and_what_does_not_help_is_said(project: Path):
    whole = forecasts(project, GPU, "tuning=full")["sft"]
    assert ": too much; " in whole[0] and "tuning: lora" in whole[1]
    hopeless = forecasts(project, replace(GPU, memory=2 * GIB))["sft"][1]
    assert "how.micro_batch: 1, quantize: 4bit, max_length: 256 it is still ~" in hopeless
    assert hopeless.endswith(" GiB: take a smaller model or more memory")


def test_processes_that_share_a_memory_are_lowered_before_a_result_is_changed(project: Path):
    (project / "model" / "config.json").write_text(json.dumps(SMALL))
    settings = ("launch.processes=4", "stages.sft.max_length=256")
    one = forecasts(project, replace(CPU, memory=1000 * GIB), *settings[1:])["sft"][0]
    small = replace(CPU, memory=round(1.5 * float(one.split()[0].strip("~")) * GIB))
    assert "; with launch.processes: 1 it is ~" in forecasts(project, small, *settings)["sft"][1]
    drawn = forecasts(project, small, *settings, "stages.sft.lora.dropout=0.1")["sft"][1]
    assert "launch.processes" not in drawn, "each draws its own dropout, so that one would be another run"


def test_a_model_that_a_stage_makes_has_the_shape_that_the_file_gives_it(project: Path):
    """And nothing is asked of the hub for a chain that begins with it."""
    text = PIPELINE.replace("model: file:model\n", "").replace(
        "stages:\n",
        "stages:\n  new:\n    type: pretrain\n    data: file:t.jsonl\n    architecture:\n      hidden_size: 512\n",
        1,
    )
    (project / "p.yaml").write_text(text.replace("type: sft\n", "type: sft\n    model: stage:new\n"))
    (project / "t.jsonl").write_text('{"text": "once"}\n')
    assert set(forecasts(project, CPU)) == {"new", "sft", "dpo"}
    planner = Planner(
        load(project / "p.yaml"), Store(project / "runs"), Manifest(Store(project / "runs"), "x", project)
    )
    shapes = {name: Forecaster(planner, CPU).shapes(stage) for name, stage in planner.pipeline.stages.items()}
    made = Shape(512, 2, 4, 4, 128, 1376, 1024, True, 256)
    assert shapes["new"]["model"] == made and shapes["dpo"]["policy"] == replace(made, base="stage:new")


def test_a_plan_without_a_configuration_says_why_and_goes_on(align: Align, project: Path):
    (project / "model" / "config.json").write_text('{"model_type": "mamba"}')
    planned = align("plan", "p.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "memory unknown: file:model: the layers of a mamba model are not known here" in planned.stdout
    (project / "model" / "config.json").write_text("{")
    assert "file:model: no config.json that can be read (JSONDecodeError); " in forecasts(project, CPU)["sft"][0]
    (project / "model" / "config.json").write_text("[]")
    assert forecasts(project, CPU)["dpo"][0].startswith("memory unknown: file:model: its config.json holds [], and")
    (project / "model" / "config.json").write_text(json.dumps(SMALL))
    uneven = forecasts(project, CPU, "stages.sft.batch_size=30", "launch.processes=4")["sft"][0]
    assert uneven.startswith("memory unknown: see below; time unknown"), "what cannot run is said once, by the plan"
    refused = align("plan", "p.yaml", "--set", "stages.sft.batch_size=30", "--set", "launch.processes=4")
    assert refused.returncode == 2 and (refused.stdout + refused.stderr).count("cannot be dealt") == 1


def test_a_model_on_the_hub_is_estimated_from_the_cache_and_without_one_not(
    align: Align, project: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "c" * 40
    cache = project / "hub" / "models--Org--Name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setitem(os.environ, "HF_HUB_CACHE", str(project / "hub"))
    (project / "p.yaml").write_text(PIPELINE.replace("file:model", "hub:Org/Name"))
    planned = align("plan", "p.yaml")
    assert planned.returncode == 0, planned.stderr
    reason = "memory unknown: hub:Org/Name: its config.json is not in the cache, and the hub gave none; time unknown"
    assert planned.stdout.count(reason) == 2
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "config.json").write_text(json.dumps(SMALL))
    first, *_ = align("plan", "p.yaml").stdout.splitlines()
    assert first.startswith("sft  run     never run      ~") and first.endswith("time unknown until it ran once here")


def test_time_is_that_of_the_last_run_here_scaled_by_the_work(project: Path):
    config = configuration(load(project / "p.yaml").stages["sft"]) | {"epochs": 2.0}
    rows = f"sha256:{file_sha256(project / 'sft.jsonl')}"
    record: dict[str, Any] = {
        "stage": "sft", "kind": "model", "version": 2, "digest": "sha256:1", "files": {}, "metrics": {},
        "resources": {"seconds": 7200.0},
        "config": config,
        "inputs": {
            "model": {"ref": "file:model", "digest": "sha256:2", "artifact": None},
            "data": {"ref": "file:sft.jsonl", "digest": rows, "artifact": None},
        },
        "made": {"host": os.uname().nodename, "gpu": "a GPU"},
    }  # fmt: skip
    artifact = project / "runs" / "store" / "sft-1" / "artifact.json"
    artifact.parent.mkdir(parents=True)
    (project / "runs" / "night").mkdir()
    entry = {"status": "done", "artifact": "sft-1", "metrics": {}, "seconds": 7200.0}
    (project / "runs" / "night" / "manifest.json").write_text(json.dumps({"stages": {"sft": entry}}))

    def time(machine: Machine = GPU, *overrides: str, **changes: Any) -> str:
        artifact.write_text(json.dumps(record | changes))
        return forecasts(project, replace(machine, memory=1000 * GIB), *overrides)["sft"][0].partition(", ")[2]

    assert time(GPU, "stages.sft.epochs=2") == "~2 h 00 min as its last run"
    assert time() == "~1 h 00 min as its last run (2 h 00 min)"
    unknown = "time unknown until it ran once here"
    assert time(CPU).endswith(unknown), "a run on a GPU says nothing about a CPU"
    assert time(made={"host": "elsewhere", "gpu": "a GPU"}) == unknown
    other = record["inputs"] | {"model": {"ref": "hub:a/b", "digest": "git:1", "artifact": None}}
    assert time(inputs=other) == unknown, "another model"
    assert (
        time(GPU, "stages.sft.learning_rate=1e-5", "stages.sft.epochs=4") == "~4 h 00 min as its last run (2 h 00 min)"
    )
    settings = "time unknown with these settings"
    assert time(GPU, "stages.sft.max_steps=3") == settings, "steps and epochs cannot be compared without the rows"
    for changed in (
        "quantize=4bit",
        "batch_size=8",
        "max_length=512",
        "held_out=0.2",
        "train={neftune_noise_alpha: 5}",
    ):
        assert time(GPU, f"stages.sft.{changed}") == settings, changed
    steps = {"config": config | {"max_steps": 10}}
    assert time(GPU, "stages.sft.max_steps=5", "stages.sft.batch_size=16", **steps).startswith(
        "~30 min 00 s as its last"
    )
    (project / "sft.jsonl").write_text('{"prompt": "q", "completion": "another"}\n')
    assert time() == "time unknown with other rows"


def test_rows_that_a_stage_will_make_anew_say_nothing_of_the_time(project: Path):
    (project / "s.py").write_text("def score(prompts, completions, **columns): ...")
    (project / "p.yaml").write_text(ASKED)
    stages, rows, found = load(project / "p.yaml").stages, f"sha256:{file_sha256(project / 'sft.jsonl')}", {}
    for name, inputs in {
        "sample": {"policy": "file:model", "scorer": "s:score", "prompts": "file:sft.jsonl"},
        "dpo": {"policy": "file:model", "data": "stage:sample"},
        "evaluate": {"models.a": "stage:dpo", "scorer": "s:score", "prompts": "file:sft.jsonl"},
    }.items():
        refs = {field: {"ref": ref, "digest": rows, "artifact": None} for field, ref in inputs.items()}
        for one in refs.values():
            maker = str(one["ref"]).removeprefix("stage:")
            one |= {"digest": f"sha256:{maker}", "artifact": f"{maker}-1"} if maker in stages else {}
        record = {
            "stage": name, "kind": "model", "version": 1, "digest": f"sha256:{name}", "files": {}, "metrics": {},
            "resources": {"seconds": 60.0},
            "config": configuration(stages[name]), "inputs": refs, "made": {"host": os.uname().nodename, "gpu": "one"},
        }  # fmt: skip
        folder = project / "runs" / "store" / f"{name}-1"
        folder.mkdir(parents=True)
        (folder / "artifact.json").write_text(json.dumps(record))
        found[name] = {"status": "done", "artifact": f"{name}-1", "metrics": {}, "seconds": 60.0}
    (project / "runs" / "night").mkdir()
    (project / "runs" / "night" / "manifest.json").write_text(json.dumps({"stages": found}))

    def times(*overrides: str) -> list[str]:
        found = forecasts(project, replace(GPU, memory=1000 * GIB), *overrides)
        return [found[name][0].partition(", ")[2] for name in ("sample", "dpo", "evaluate")]

    assert times("stages.sample.samples_per_prompt=2") == [
        "~30 s as its last run (1 min 00 s)", "time unknown with other rows", "~1 min 00 s as its last run",
    ]  # fmt: skip
    settings = "time unknown with these settings"
    changed = ("stages.evaluate.max_new_tokens=4800", "stages.sample.max_new_tokens=4800")
    assert times(*changed)[::2] == [settings, settings]
    assert times("stages.evaluate.samples_per_prompt=4")[2] == settings, "a part of what it does does not grow with it"


def test_a_stage_that_was_killed_goes_on_at_its_pace(project: Path):
    pipeline, store = load(project / "p.yaml"), Store(project / "runs")
    planner = Planner(pipeline, store, Manifest(store, pipeline.name, pipeline.file))
    key = planner.plan(["sft"])[0].key
    work = store.work_path(str(key))
    (work / "scratch").mkdir(parents=True)
    lines = [
        {"step": step, "total": 100, "at": 1000.0 + 6 * step, "pid": 1, "cpu_seconds": 1.0, "peak_memory_bytes": 1}
        for step in (0, 10, 20)
    ]
    (work / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert forecasts(project, GPU)["sft"][0].endswith("; ~8 min 00 s to go at its pace so far")


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, Machine("NVIDIA GeForce RTX 3090", 24576 * 2**20, gpu=True, bf16=True)),
        ("1", Machine("Tesla T4", 15360 * 2**20, gpu=True)),
        ("GPU-2", Machine("Tesla T4", 15360 * 2**20, gpu=True)),
        ("", None),
    ],
)
def test_the_gpu_is_the_first_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: Machine | None
):
    rows = "0, GPU-1, NVIDIA GeForce RTX 3090, 24576, 8.6\n1, GPU-2, Tesla T4, 15360, 7.5\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().name == "CPU", "this torch is built without CUDA"
    monkeypatch.setattr("align_pipeline.pipeline.forecast.metadata.version", lambda _: "2.13.0")
    machine = replace(this_machine(), vllm=False)
    assert machine == found if found else not machine.gpu


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_take_what_was_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Peak memory of two real workers; the whole table is made by tests/benchmarks/memory.py."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    size = memory_shapes.Size(256, 4, 8, 4, 768, 8192, 256)
    for name, (foretold, _, found) in memory_shapes.compared(tmp_path, size, ["sft-full", "dpo"]).items():
        assert foretold == pytest.approx(found, rel=0.15), name
