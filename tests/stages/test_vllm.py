"""The vLLM sampler: it says what Transformers says, with the adapter it was given, whatever befalls its engine."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.stages import rollout
from align_pipeline.stages.engine import Engine
from align_pipeline.stages.rollout import Adapter, HFSampler, Rollout, Sampling, VLLMSampler, check_swappable

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

STOP = 7
VOCABULARY = 64
RANK = 4


def build(folder: Path, head_dim: int = 32) -> Path:
    """Write a random Llama whose next token is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=5,  # not a stop id of these tests: the engine must not stop at it
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def adapted(base: Path, seed: int, **changes: Any) -> Any:
    """Return the base with a random adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        **changes,
    }
    return get_peft_model(LlamaForCausalLM.from_pretrained(str(base)), LoraConfig(**settings)).eval()


def loaded(base: Path, adapter: Adapter) -> HFSampler:
    """Return what Transformers and PEFT make of the published folder."""
    from peft import PeftModel

    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return HFSampler(PeftModel.from_pretrained(model, str(adapter.folder)).eval(), pad_id=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Adapter]:
    """Return a publisher: the same version is the same folder."""
    folder = tmp_path_factory.mktemp("adapters")

    def publish(version: int) -> Adapter:
        adapter = Adapter(version, folder / f"version-{version}")
        if not adapter.folder.is_dir():
            adapted(base, 100 + version).save_pretrained(str(adapter.folder))
        return adapter

    return publish


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    """The one engine that most tests share: a start takes 10 to 60 seconds."""
    log = tmp_path_factory.mktemp("log") / "engine.txt"
    with VLLMSampler(base, max_length=320, max_lora_rank=RANK, dtype="float32", log=log) as sampler:
        yield sampler
        pid = sampler.pid
    assert sampler.pid is None
    assert pid is None or not psutil.pid_exists(pid), "close() left a process behind"


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(8, VOCABULARY) for _ in range(draw.randrange(1, 20))] for _ in range(count)]


def ids_of(answers: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[answer.ids for answer in row] for row in answers]


def teacher_forced(model: Any, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> list[float]:
    """Return each id's log-prob by one forward pass over prompt and answer, in float64 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double() / temperature
    return [torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token].item() for t, token in enumerate(ids)]


def assert_true_logprobs(model: Any, asked: list[list[int]], answers: list[list[Rollout]], temperature: float) -> None:
    for prompt, row in zip(asked, answers, strict=True):
        for answer in row:
            expected = teacher_forced(model, prompt, answer.ids, temperature or 1.0)
            assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_greedy_is_what_transformers_says(base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter]) -> None:
    asked, greedy = prompts(12), Sampling(24, frozenset({STOP, 9, 11}), temperature=0)
    for adapter in (None, adapters(0)):
        model = LlamaForCausalLM.from_pretrained(str(base)).eval()
        sampler = HFSampler(model, 0) if adapter is None else loaded(base, adapter)
        expected, answers = sampler.sample(asked, 1, greedy), engine.sample(asked, 1, greedy, adapter=adapter)
        assert ids_of(answers) == ids_of(expected)
        assert [row[0].finish for row in answers] == [row[0].finish for row in expected]
        assert {row[0].finish for row in answers} == {"stop", "length"}, "both ends should occur here"
        assert_true_logprobs(sampler.model, asked, answers, 0)
    assert not HFSampler.needs_adapter
    assert engine.needs_adapter


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(
    base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter], temperature: float
) -> None:
    asked, sampling = prompts(8, seed=1), Sampling(24, frozenset({STOP}), temperature, seed=3)
    answers = engine.sample(asked, 3, sampling, adapter=adapters(0))
    assert_true_logprobs(loaded(base, adapters(0)).model, asked, answers, temperature)
    for answer in (answer for row in answers for answer in row):
        assert (answer.finish == "stop") == (answer.ids[-1] == STOP)
        assert STOP not in answer.ids[:-1]
        assert answer.finish == "stop" or len(answer.ids) == 24
    assert any(5 in answer.ids[:-1] for row in answers for answer in row), "the model's own eos should occur here"


def test_frequencies_are_the_softmax_of_the_logits(base: Path, engine: VLLMSampler) -> None:
    draws, model = 4000, LlamaForCausalLM.from_pretrained(str(base)).eval()
    answers = engine.sample([[20, 21, 22]], draws, Sampling(1, frozenset({STOP}), temperature=2.0, seed=11))[0]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[20, 21, 22]])).logits[0, -1].double() / 2.0, -1)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=VOCABULARY).double()
    common = expected * draws >= 5
    rest = torch.stack((counts[~common].sum(), expected[~common].sum() * draws))
    seen, share = counts[common], expected[common] * draws
    if rest[1] > 0:
        seen, share = torch.cat((seen, rest[:1])), torch.cat((share, rest[1:]))
    # The 0.999 quantile of chi-square with k degrees of freedom lies below k + 5 sqrt(2k) for every k from 7 to 64.
    assert len(seen) >= 8
    assert ((seen - share) ** 2 / share).sum() < len(seen) - 1 + 5 * (2 * (len(seen) - 1)) ** 0.5


def test_an_answer_depends_on_its_prompt_and_its_seed_alone(engine: VLLMSampler) -> None:
    asked, sampling = prompts(6, seed=2), Sampling(16, frozenset({STOP}), seed=5)
    together = engine.sample(asked, 4, sampling)
    assert ids_of(engine.sample(asked, 4, sampling)) == ids_of(together)
    assert ids_of(engine.sample(asked[::-1], 4, sampling)[::-1]) == ids_of(together)
    assert [ids_of(engine.sample([ids], 2, sampling))[0] for ids in asked] == [row[:2] for row in ids_of(together)]
    assert all(len(set(row)) > 1 for row in ids_of(together)), "the answers to one prompt should differ"
    assert ids_of(engine.sample(asked, 4, Sampling(16, frozenset({STOP}), seed=6))) != ids_of(together)
    twice = ids_of(engine.sample([asked[0]] * 2, 1, sampling, keys=[0, 1]))
    assert twice[0] != twice[1]


def test_each_of_ten_versions_is_the_one_that_answers(
    base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter]
) -> None:
    asked, greedy, seen = prompts(4, seed=3), Sampling(16, frozenset({STOP}), temperature=0), set()
    for version in (*range(1, 11), 1):  # and back to the first: its name was used before
        answers = engine.sample(asked, 1, greedy, adapter=adapters(version))
        sampler = loaded(base, adapters(version))
        assert ids_of(answers) == ids_of(sampler.sample(asked, 1, greedy))
        assert_true_logprobs(sampler.model, asked, answers, 0)
        seen.add(str(ids_of(answers)))
    assert len(seen) == 10, "no two versions should answer alike"
    assert ids_of(engine.sample(asked, 1, greedy)) not in [ids_of(answers)], "no adapter is the base"


def test_an_adapter_with_nans_never_reaches_the_engine(
    base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sampling = prompts(4, seed=4), Sampling(12, frozenset({STOP}), seed=1)
    before, pid = engine.sample(asked, 2, sampling, adapter=adapters(0)), engine.pid
    model = adapted(base, 50)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan
    model.save_pretrained(str(tmp_path / "nan"))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "ask", lambda *_: pytest.fail("the engine was asked"))
        with pytest.raises(AlignError, match=r"lora_B.weight: not finite.*lower learning_rate"):
            engine.sample(asked, 2, sampling, adapter=Adapter(90, tmp_path / "nan"))
    assert engine.sample(asked, 2, sampling, adapter=adapters(0)) == before
    assert engine.pid == pid


def test_an_engine_that_was_spoilt_by_nans_is_replaced(
    engine: VLLMSampler, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the answer is faked: to spoil the cache for good would take a second engine."""
    asked, sampling = prompts(2, seed=4), Sampling(4, frozenset({STOP}))
    pid, real, spoilt = engine.pid, Engine.ask, [True]

    def ask(self: Engine, message: Any, seconds: float) -> dict[str, Any]:
        answer = real(self, message, seconds)
        if "answers" in answer and spoilt.pop():
            answer["answers"][0][1][0] = float("nan")
            spoilt.append(False)
        return answer

    expected = engine.sample(asked, 1, sampling)
    monkeypatch.setattr(Engine, "ask", ask)
    assert engine.sample(asked, 1, sampling) == expected
    assert "log-probs that are not finite; new engine 1 of 2" in capfd.readouterr().err
    assert engine.pid != pid


def test_an_adapter_that_cannot_be_read_is_refused_on_both_sides(
    engine: VLLMSampler, adapters: Callable[[int], Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, greedy = prompts(3, seed=5), Sampling(8, frozenset({STOP}), temperature=0)
    before, pid = engine.sample(asked, 1, greedy, adapter=adapters(0)), engine.pid
    cut = shutil.copytree(adapters(1).folder, tmp_path / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(AlignError, match=r"cut: not a readable adapter .*publish it again"):
        engine.sample(asked, 1, greedy, adapter=Adapter(91, cut.parent))
    with pytest.raises(AlignError, match=r"nowhere: not a readable adapter"):
        engine.sample(asked, 1, greedy, adapter=Adapter(92, tmp_path / "nowhere"))
    monkeypatch.setattr(rollout, "check_adapter", lambda *_: None)
    for number in range(3):  # more often than it has room for adapters
        with pytest.raises(AlignError, match=r"cut: vLLM refused the adapter: .*sampler: transformers"):
            engine.sample(asked, 1, greedy, adapter=Adapter(93 + number, cut.parent))
        assert engine.sample(asked, 1, greedy, adapter=adapters(0)) == before
    assert engine.pid == pid


def test_an_adapter_of_another_model_is_refused_and_the_engine_survives(
    base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    asked, greedy = prompts(3, seed=5), Sampling(8, frozenset({STOP}), temperature=0)
    before, pid = engine.sample(asked, 1, greedy, adapter=adapters(0)), engine.pid
    foreign = shutil.copytree(adapters(1).folder, tmp_path / "foreign") / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query_key"): t for name, t in load_file(foreign).items()}, foreign)
    with pytest.raises(AlignError, match=r"foreign: vLLM refused the adapter: .*query_key"):
        engine.sample(asked, 1, greedy, adapter=Adapter(95, foreign.parent))
    assert engine.sample(asked, 1, greedy, adapter=adapters(0)) == before
    assert engine.pid == pid


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": 16}, "adapter_config.json: r: 16: the engine has room for rank 8; lower lora.r"),
        ({"use_dora": True}, "adapter_config.json: use_dora: True; train without it"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save: "),
        ({"bias": "all"}, "adapter_config.json: bias: all"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapter_config.json: target_modules: lm_head"),
        ({"alpha_pattern": {"q_proj": 64}}, "adapter_config.json: alpha_pattern: "),
    ],
)
def test_what_vllm_does_not_serve_is_named(
    base: Path, engine: VLLMSampler, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    adapted(base, 1, **changes).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AlignError) as refused:
        engine.sample([[8, 9]], 1, Sampling(4, frozenset({STOP})), adapter=Adapter(96, tmp_path / "adapter"))
    assert field in str(refused.value)
    assert "sampler: transformers" in str(refused.value)


def test_what_peft_writes_by_itself_is_swappable(adapters: Callable[[int], Adapter]) -> None:
    check_swappable(json.loads((adapters(0).folder / "adapter_config.json").read_text("utf-8")), max_lora_rank=RANK)


def test_what_cannot_be_asked_for_is_refused_without_an_engine(
    base: Path, adapters: Callable[[int], Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_length": 64, "dtype": "float32"}
    with pytest.raises(AlignError, match="lora.r: 513: vLLM serves ranks up to 512; lower lora.r"):
        VLLMSampler(base, max_lora_rank=513, **settings)
    with pytest.raises(AlignError, match="nowhere: no config.json in it"):
        VLLMSampler(tmp_path / "nowhere", max_lora_rank=8, **settings)
    sampler, sampling = VLLMSampler(base, max_lora_rank=9, **settings), Sampling(60, frozenset({STOP}))
    assert sampler.max_lora_rank == 16
    with pytest.raises(DataError, match=r"prompt 1: .*5 tokens \+ max_new_tokens 60 = 65, the model has 64"):
        sampler.sample([[8], [8] * 5], 1, sampling)
    with pytest.raises(AlignError, match="temperature: 0.001: vLLM draws at 0.01 or above"):
        sampler.sample([[8]], 1, Sampling(4, frozenset(), temperature=0.001))
    assert sampler.sample([], 1, sampling) == []
    with pytest.raises(ValueError, match="serves the base alone"):
        VLLMSampler(base, max_lora_rank=None, **settings).sample([[8]], 1, sampling, adapter=adapters(0))
    with pytest.raises(ValueError, match="live model"):
        HFSampler(None, 0).sample([[8]], 1, sampling, adapter=adapters(0))
    assert sampler.pid is None, "nothing of this needs an engine"
    monkeypatch.setattr(rollout, "find_spec", lambda _: None)
    with pytest.raises(AlignError, match=r"pip install 'align-pipeline\[vllm\]', or set sampler: transformers"):
        VLLMSampler(base, max_lora_rank=8, **settings)


def long_batch() -> tuple[list[list[int]], int, Sampling]:
    return prompts(100, seed=6), 4, Sampling(256, frozenset({STOP}), seed=8)


def undisturbed(engine: VLLMSampler, adapter: Adapter) -> tuple[list[list[Rollout]], float]:
    """Return the answers to the long batch, and in how many seconds they are half drawn."""
    engine.sample([[8]], 1, Sampling(1, frozenset()), adapter=adapter)  # started, and the adapter loaded
    started = time.monotonic()
    answers = engine.sample(*long_batch(), adapter=adapter)
    return answers, (time.monotonic() - started) / 2


@contextmanager
def signalled(pid: int | None, sign: signal.Signals, seconds: float) -> Iterator[None]:
    """Send a signal to the engine so many seconds from now."""
    assert pid is not None
    timer = threading.Timer(seconds, os.kill, (pid, sign))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_an_engine_that_is_killed_in_the_middle_changes_no_answer(
    base: Path, engine: VLLMSampler, adapters: Callable[[int], Adapter], capfd: pytest.CaptureFixture[str]
) -> None:
    expected, half = undisturbed(engine, adapters(3))
    pid = engine.pid
    with signalled(pid, signal.SIGKILL, half):
        answers = engine.sample(*long_batch(), adapter=adapters(3))
    assert "the engine was killed by SIGKILL; new engine 1 of 2, same batch" in capfd.readouterr().err
    assert ids_of(answers) == ids_of(expected)
    assert_true_logprobs(loaded(base, adapters(3)).model, long_batch()[0][:3], answers[:3], 1.0)
    assert engine.pid != pid


def test_an_engine_that_hangs_is_replaced_and_not_for_ever(
    engine: VLLMSampler,
    adapters: Callable[[int], Adapter],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, half = undisturbed(engine, adapters(4))
    pid = engine.pid
    monkeypatch.setattr(engine, "timeout_seconds", 8.0)
    with signalled(pid, signal.SIGSTOP, half):
        answers = engine.sample(*long_batch(), adapter=adapters(4))
    assert "the engine was silent for 8 s; new engine 1 of 2" in capfd.readouterr().err
    assert ids_of(answers) == ids_of(expected)
    assert not psutil.pid_exists(pid or 0), "the process that hung should be gone"

    monkeypatch.setattr(engine, "restarts", 0)
    with (
        pytest.raises(AlignError, match=r"failed 1 times in a row, at last because the engine was silent for 8 s"),
        signalled(engine.pid, signal.SIGSTOP, half),
    ):
        engine.sample(*long_batch(), adapter=adapters(4))
    assert engine.pid is None


def test_a_model_that_vllm_does_not_serve_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    folder = build(tmp_path / "small-heads", head_dim=16)
    sampler = VLLMSampler(folder, max_length=64, max_lora_rank=None, dtype="float32", log=tmp_path / "logs" / "log.txt")
    with pytest.raises(AlignError) as failed:
        sampler.sample([[8, 9]], 1, Sampling(4, frozenset({STOP})))
    assert "the engine did not start: " in str(failed.value)
    assert "needs sampler: transformers. The end of " in str(failed.value)
    assert "head" in str(failed.value).lower()
    assert sampler.pid is None


@pytest.mark.parametrize("end", ["it is killed", "it ends"])
def test_the_engine_does_not_outlive_its_parent(base: Path, end: str) -> None:
    script = f"""
import sys
from pathlib import Path
from align_pipeline.stages.rollout import Sampling, VLLMSampler
sampler = VLLMSampler(Path({str(base)!r}), max_length=64, max_lora_rank=None, dtype="float32")
print(sampler.sample([[8, 9]], 1, Sampling(4, frozenset(), temperature=0))[0][0].ids, sampler.pid, flush=True)
sys.stdin.read()  # and no close()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        process = psutil.Process(int(parent.stdout.readline().split()[-1]))
        children = [process, *process.children(recursive=True)]
        assert process.is_running()
        if end == "it is killed":
            process.suspend()  # the engine hangs: nothing that it does itself can end it
        else:
            parent.stdin.close()
            assert parent.wait(60) == 0
    finally:
        parent.kill()
        parent.wait(30)
    _, alive = psutil.wait_procs(children, timeout=10)
    for left in alive:
        left.kill()
    assert not alive
