"""PPO whose answers come from a real vLLM: it reaches the same bar, and no engine with other weights goes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import envb
import envb_ppo
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.stages import ppo_loop, training
from align_pipeline.stages.ppo_loop import PPOTrainer
from align_pipeline.stages.rollout import Adapter, VLLMSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return envb.base(tmp_path_factory)


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return one engine for all tests of this file."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with VLLMSampler(base, max_length=32, max_lora_rank=8, dtype="float32", log=log) as sampler:
        yield sampler


def _trainer(folder: Path, base: Path, engine: Any, **changes: Any) -> tuple[Any, Any]:
    """Return a trainer that samples from the shared engine, and its stage."""
    ppo = envb_ppo.stage(**{"sampler": "vllm", "value_warmup": 0, **changes})
    trainer = envb_ppo.trainer(ppo, envb_ppo.inputs(folder, base), envb_ppo.work(folder / "work" / "ppo"))
    trainer.sampler = engine
    return trainer, ppo


def test_ppo_reaches_the_best_policy_through_vllm(
    base: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = []
    probe = PPOTrainer._probe

    def counted(self: PPOTrainer, adapter: Adapter) -> None:
        probe(self, adapter)
        probes.append(adapter.version)

    monkeypatch.setattr(PPOTrainer, "_probe", counted)
    trainer, ppo = _trainer(tmp_path, base, engine, value_warmup=5)
    curve = training.fit(trainer, ppo, trainer.work)
    from align_pipeline.stages.models import save_model

    save_model(
        trainer.actors.model, trainer.processing_class, trainer.work.out, envb_ppo.inputs(tmp_path, base)["policy"]
    )
    found = envb_ppo.reached(ppo, trainer.work, base)
    print(found)
    assert found.distance <= 0.02
    assert found.efficiency >= 0.985
    assert probes == list(range(1, 81)), "a probe after every swap"
    assert max(point["sampler_gap_max"] for point in curve) <= 1e-4


def test_the_stage_starts_its_own_engine_and_ends_it(base: Path, tmp_path: Path) -> None:
    ppo = envb_ppo.stage(
        sampler="vllm", episodes=2 * 64, batch_size=64, value_warmup=0, evaluation_prompts=2, evaluate_every=1
    )
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    metrics = ppo.run(envb_ppo.inputs(tmp_path, base), made)
    assert metrics["episodes"] == 128
    assert (made.out / "adapter" / "adapter_model.safetensors").exists()
    import psutil

    left = [child for child in psutil.Process().children(recursive=True) if "engine" in " ".join(child.cmdline())]
    assert len(left) <= 1, "only the engine that the tests share"


def _stale(real: Any, start: Adapter) -> Any:
    """Return `sample` of an engine that goes on answering with the first version."""
    return lambda prompts, n, sampling, keys=None, adapter=None: real(prompts, n, sampling, keys, start)


@pytest.mark.parametrize("fault", ["stale", "wrong", "nan"])
def test_an_engine_with_other_weights_stops_the_run(
    base: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    trainer, _ = _trainer(tmp_path, base, engine, episodes=4 * 64, batch_size=64)
    publish = ppo_loop.models.publish_adapter
    versions = []

    def sabotaged(model: Any, folder: Path) -> None:
        """Put something else where the second version is expected."""
        publish(model, folder)
        versions.append(folder)
        if len(versions) == 1:
            shutil.copytree(folder, tmp_path / "first")
            return
        file = folder / "adapter_model.safetensors"
        if fault == "stale":
            shutil.copy(tmp_path / "first" / file.name, file)
            return
        from safetensors.torch import load_file, save_file

        weights = load_file(file)
        for name, weight in weights.items():
            weights[name] = weight + 0.05 * torch.randn(weight.shape) if fault == "wrong" else weight * float("nan")
        save_file(weights, file)

    monkeypatch.setattr(ppo_loop.models, "publish_adapter", sabotaged)
    message = "not finite" if fault == "nan" else "version 2 was loaded, its log-probs differ"
    with pytest.raises(AlignError, match=message):
        trainer.train()
    assert len(versions) == 2


def test_a_nan_in_the_policy_never_reaches_the_engine(base: Path, engine: Any, tmp_path: Path) -> None:
    trainer, _ = _trainer(tmp_path, base, engine, episodes=64, batch_size=64)
    with torch.no_grad():
        trainer.actors.policy_parameters()[0].fill_(float("nan"))
    with pytest.raises(AlignError, match="is not finite; lower learning_rate"):
        trainer.train()
    healthy, ppo = _trainer(tmp_path / "healthy", base, engine, episodes=64, batch_size=64)
    training.fit(healthy, ppo, healthy.work)


def test_a_killed_engine_changes_nothing(
    base: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle of a rollout: restarted, the adapter added again, the batch redone."""
    settings = {"episodes": 3 * 256, "minibatches": 1, "epochs": 2}
    calm, ppo = _trainer(tmp_path / "calm", base, engine, **settings)
    expected = training.fit(calm, ppo, calm.work)
    stormy, ppo = _trainer(tmp_path / "stormy", base, engine, **settings)
    real, killed = engine.sample, []

    def sample(prompts: Any, n: int, sampling: Any, keys: Any = None, adapter: Any = None) -> Any:
        if len(prompts) > 100 and len(killed) < 2 and adapter.version > 1:
            pid = engine.pid
            killed.append(pid)
            threading.Timer(0.02, os.kill, (pid, signal.SIGKILL)).start()
        return real(prompts, n, sampling, keys, adapter)

    monkeypatch.setattr(engine, "sample", sample)
    found = training.fit(stormy, ppo, stormy.work)
    assert len(set(killed)) == 2
    assert found == expected
    for one, other in zip(calm.actors.policy_parameters(), stormy.actors.policy_parameters(), strict=True):
        assert torch.equal(one, other)
    print(capfd.readouterr().err[-2000:], file=sys.stderr)


def test_a_run_that_was_killed_goes_on_through_a_new_engine(base: Path, engine: Any, tmp_path: Path) -> None:
    settings = {"episodes": 4 * 64, "batch_size": 64, "how": {"checkpoint_every_steps": 16}}
    calm, ppo = _trainer(tmp_path / "calm", base, engine, **settings)
    expected = training.fit(calm, ppo, calm.work)
    first, ppo = _trainer(tmp_path / "stormy", base, engine, **settings)

    class Die(ppo_loop.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 37:
                raise KeyboardInterrupt

    first.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        training.fit(first, ppo, first.work)
    second, ppo = _trainer(tmp_path / "stormy", base, engine, **settings)
    assert training.fit(second, ppo, second.work) == expected
    lines = (second.work.out / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [16, 32, 48, 64]
