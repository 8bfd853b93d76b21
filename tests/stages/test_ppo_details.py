"""What PPO can get wrong without an error: mostly mutations (tests/mutations.py) that no other fast test notices."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import envb
import envb_ppo
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import models, training
from align_pipeline.stages.ppo_loop import Batch, PPOTrainer
from align_pipeline.stages.rollout import Adapter, HFSampler, Rollout, Sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return envb.base(tmp_path_factory)


@pytest.fixture(scope="module")
def reward_model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """Return a reward model that was never trained: its scores mean nothing and are far apart."""
    folder = tmp_path_factory.mktemp("reward")
    policy = envb_ppo.inputs(folder, base)["policy"]
    model = models.load_reward_trainable(policy, tuning="lora", lora=envb_ppo.stage().lora, seed=3)
    disturb([p for p in model.parameters() if p.requires_grad], seed=3, size=0.2)
    models.save_model(model, models.load_tokenizer(policy), folder / "out", policy)
    models.write_reference_scores(model, [[3, 7, 1, 2], [5, 1, 2], [1, 4, 6, 6, 5]], folder / "out")
    return Resolved(
        ref="stage:reward",
        digest="sha256:" + "c" * 64,
        path=str(folder / "out"),
        kind="reward_model",
        adapter=str(folder / "out" / "adapter"),
        base=policy,
        reference_scores=str(folder / "out" / "reference_scores.json"),
    )


def disturb(parameters: Sequence[torch.nn.Parameter], seed: int = 1, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def trainer_of(folder: Path, base: Path, found: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return a trainer in the mode that it trains in, with small batches unless `changes` say otherwise."""
    small = {"value_warmup": 0, "batch_size": 32, "minibatches": 2, "epochs": 1, "episodes": 64}
    ppo = envb_ppo.stage(**{**small, **changes})
    trainer = envb_ppo.trainer(
        ppo, envb_ppo.inputs(folder, base, 1, **(found or {})), envb_ppo.work(folder / "work" / "ppo")
    )
    trainer.actors.train()
    return trainer


def drawn(trainer: PPOTrainer, count: int = 32) -> Batch:
    asked = [trainer.prompts[i % 4] for i in range(count)]
    answers, plain = trainer._answers(asked, list(range(count)))
    batch = trainer._assess(asked, answers, plain)
    batch.estimate(trainer.stage)
    assert {len(ids) for ids in batch.answers} == {1, 2, 3}
    return batch


def read_again(trainer: PPOTrainer, batch: Batch) -> Batch:
    """Return what the models, as they are now, think of the same answers."""
    asked = [trainer.prompts[i % 4] for i in range(len(batch.answers))]
    rows = zip(batch.answers, batch.sampler.tolist(), strict=True)
    answers = [Rollout(ids, tuple(row[: len(ids)]), "stop") for ids, row in rows]
    return trainer._assess(asked, answers, {"reward": batch.scores.tolist()})


# --- a batch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_estimates_are_those_of_the_papers(whiten_rewards: bool) -> None:
    """Rewards, advantages, returns and weights of three answers, worked out token by token."""
    gamma, lam, beta, cap = 0.9, 0.7, 0.3, 1.2
    stage = envb_ppo.stage(gamma=gamma, gae_lambda=lam, kl_coef=beta, importance_cap=cap, whiten_rewards=whiten_rewards)
    lengths = (3, 2, 1)
    draw = torch.Generator().manual_seed(0)
    old, reference, sampler, values = torch.randn(4, 3, 3, generator=draw, dtype=torch.float64)
    mask = torch.arange(3)[None, :] < torch.tensor(lengths)[:, None]
    scores = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    batch = Batch([(1,)] * 3, [(5,) * n for n in lengths], scores, mask, sampler, old, reference, old, values)
    batch.estimate(stage)

    rewards = [[-beta * float(old[i, t] - reference[i, t]) for t in range(n)] for i, n in enumerate(lengths)]
    for i, row in enumerate(rewards):
        row[-1] += float(scores[i])
    if whiten_rewards:
        every = [reward for row in rewards for reward in row]
        mean, deviation = statistics.fmean(every), statistics.stdev(every)
        rewards = [[(reward - mean) / deviation + mean for reward in row] for row in rewards]
    advantages = []
    for i, row in enumerate(rewards):
        ahead = [*values[i, 1 : len(row)].tolist(), 0.0]
        errors = [reward + gamma * ahead[t] - float(values[i, t]) for t, reward in enumerate(row)]
        advantages.append(
            [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(row))) for t in range(len(row))]
        )
    every = [advantage for row in advantages for advantage in row]
    mean, deviation = statistics.fmean(every), statistics.stdev(every)
    for i, row in enumerate(advantages):
        for t, advantage in enumerate(row):
            assert float(batch.returns[i, t]) == pytest.approx(advantage + float(values[i, t]), abs=1e-6)
            assert float(batch.advantages[i, t]) == pytest.approx((advantage - mean) / deviation, abs=1e-6)
            weight = min(math.exp(float(old[i, t] - sampler[i, t])), cap)
            assert float(batch.weights[i, t]) == pytest.approx(weight, abs=1e-6)


def test_a_later_minibatch_has_the_gradient_of_both_clipped_losses(base: Path, tmp_path: Path) -> None:
    """Some of a batch's rows, in any order, after policy and value have moved and with a sampler that was a bit off."""
    coef, clip, value_clip = 0.3, 0.1, 0.05
    how = {"tokens_per_micro_batch": 16}
    trainer = trainer_of(tmp_path, base, value_coef=coef, clip=clip, value_clip=value_clip, how=how)
    actors = trainer.actors
    disturb([*actors.policy_parameters(), *actors.value_parameters()])
    batch = drawn(trainer)
    batch.sampler += 0.3 * torch.randn(batch.sampler.shape, generator=torch.Generator().manual_seed(3))
    batch.estimate(trainer.stage)
    batch.returns = batch.values + torch.randn(batch.values.shape, generator=torch.Generator().manual_seed(4))
    disturb([*actors.policy_parameters(), *actors.value_parameters()], seed=2, size=0.02)
    rows = [29, 4, 17, 0, 8, 23, 11, 30, 2, 19, 26, 5]
    stats = trainer.minibatch_gradient(batch, rows)
    found = [[p.grad.clone() for p in of] for of in (actors.policy_parameters(), actors.value_parameters())]

    logprobs, values, at = [], [], []
    for row in rows:
        prompt, answer = batch.prompts[row], batch.answers[row]
        at += [(row, t) for t in range(len(answer))]
        ids, before = torch.tensor([[*prompt, *answer]]), slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        actors.model.set_adapter("default")
        every = actors.model(input_ids=ids).logits[0, before].log_softmax(-1)
        logprobs += [every[t, token] for t, token in enumerate(answer)]
        actors.model.set_adapter("value")
        states = actors.model.get_base_model().model(input_ids=ids).last_hidden_state[0, before]
        values += list(states @ actors.value_head.weight[0])
    new, seen = torch.stack(logprobs), torch.stack(values)

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[place] for place in at])

    ratio = (new - of(batch.old)).exp()
    gain = torch.minimum(ratio * of(batch.advantages), ratio.clamp(1 - clip, 1 + clip) * of(batch.advantages))
    policy_loss = -(of(batch.weights) * gain).sum() / len(at)
    near = torch.minimum(torch.maximum(seen, of(batch.values) - value_clip), of(batch.values) + value_clip)
    errors = torch.maximum((seen - of(batch.returns)) ** 2, (near - of(batch.returns)) ** 2)
    assert (errors > (seen - of(batch.returns)) ** 2).any() and (gain < ratio * of(batch.advantages)).any()
    value_loss = 0.5 * errors.sum() / len(at)
    expected = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "loss": policy_loss + coef * value_loss,
        "clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
        "value_clip_fraction": ((seen - of(batch.values)).abs() > value_clip).float().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "ratio_max": ratio.max(),
    }
    assert stats == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-5)
    assert 0.05 < stats["clip_fraction"] < 0.95 and 0.05 < stats["value_clip_fraction"] < 0.95
    actors.freeze_all_but_trained()
    for gradients, loss, parameters in zip(
        found, (policy_loss, coef * value_loss), (actors.policy_parameters(), actors.value_parameters()), strict=True
    ):
        exact = torch.autograd.grad(loss, parameters)
        distance = sum(float((a - b).square().sum()) for a, b in zip(gradients, exact, strict=True)) ** 0.5
        assert distance <= 1e-5 * sum(float(one.square().sum()) for one in exact) ** 0.5


def test_a_shared_value_head_warms_up_alone(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, base, value="shared")
    disturb([*trainer.actors.policy_parameters(), *trainer.actors.value_parameters()])
    batch = drawn(trainer)
    trainer.minibatch_gradient(batch, list(range(32)), policy=False)
    assert not any(p.grad is not None and p.grad.any() for p in trainer.actors.policy_parameters())
    alone = trainer.actors.value_head.weight.grad.clone()
    assert alone.any()
    trainer.actors.value_head.weight.grad = None
    trainer.minibatch_gradient(batch, list(range(32)))
    assert torch.allclose(trainer.actors.value_head.weight.grad, alone)
    assert all(p.grad is not None and p.grad.any() for p in trainer.actors.policy_parameters())


# --- who takes part ---------------------------------------------------------------------------------------------------


def gpt2(folder: Path, base: Path) -> Path:
    """Write a random GPT-2, whose layers have dropout of their own, beside the tokenizer of the base."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=8, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = envb.EOS
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_reference_and_value_stay_where_they_are_when_the_policy_moves(base: Path, tmp_path: Path, tuning: str) -> None:
    """In training mode, from models and adapters that have dropout: every reading of the same answers is the same."""
    lora = {"r": 8, "alpha": 16, "dropout": 0.5} if tuning == "lora" else {}
    folder = gpt2(tmp_path / "gpt2", base) if tuning == "full" else base
    trainer = trainer_of(tmp_path, folder, tuning=tuning, lora=lora)
    batch = drawn(trainer)
    assert torch.equal(batch.old, batch.reference), "the policy starts as its reference"
    assert not batch.values.any(), "a fresh value model expects nothing"
    disturb(trainer.actors.policy_parameters())
    disturb([trainer.actors.value_head.weight])
    moved = read_again(trainer, batch)
    assert torch.equal(moved.reference, batch.reference)
    assert float((moved.old - batch.old).abs().max()) > 0.05
    again = read_again(trainer, batch)
    for name in ("old", "reference", "values"):
        assert torch.equal(getattr(again, name), getattr(moved, name)), name
    disturb(trainer.actors.policy_parameters(), seed=5)
    assert torch.equal(read_again(trainer, batch).values, moved.values)
    assert moved.values.any()


def test_a_reward_model_on_the_same_base_leaves_the_sampler_the_policy(
    base: Path, reward_model: Resolved, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, base, found={"reward": reward_model}, value="reward", reward="stage:reward")
    assert trainer.scorers["reward"].__class__.__name__ == "AdapterScorer"
    trainer.train()
    points = [entry for entry in trainer.state.log_history if "sampler_gap_max" in entry]
    assert len(points) == 2
    assert max(point["sampler_gap_max"] for point in points) <= 1e-4
    assert points[0]["kl"] == 0


def test_whole_weights_of_a_value_model_start_as_the_reward_model(
    base: Path, reward_model: Resolved, tmp_path: Path
) -> None:
    found = {"reward": reward_model}
    trainer = trainer_of(tmp_path, base, found=found, value="reward", reward="stage:reward", tuning="full", lora={})
    batch = drawn(trainer)
    last = [float(batch.values[row, len(ids) - 1]) for row, ids in enumerate(batch.answers)]
    before = [[*prompt, *answer[:-1]] for prompt, answer in zip(batch.prompts, batch.answers, strict=True)]
    assert last == pytest.approx(models.score(models.load_reward(reward_model), before), abs=1e-5)
    assert statistics.pstdev(last) > 0.01


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_each_gradient_is_clipped_to_its_own_norm(base: Path, tmp_path: Path) -> None:
    limit = 1e-3
    trainer = trainer_of(tmp_path, base, max_grad_norm=limit)
    norms = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
            for parameters in (trainer.actors.policy_parameters(), trainer.actors.value_parameters()):
                norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))

    trainer.add_callback(Look())
    trainer.train()
    assert norms == pytest.approx([limit] * 8, rel=1e-2)
    points = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(point[name] for point in points for name in ("grad_norm", "value_grad_norm")) > 10 * limit


def test_a_run_depends_on_its_counters_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own random state is another one in each of these runs."""
    keys: list[Any] = []
    weights = []
    for seed in (1, 2):
        trainer = trainer_of(tmp_path / str(seed), base, episodes=3 * 32)
        real = trainer.sampler.sample

        def spied(*arguments: Any, real: Any = real, seed: int = seed) -> Any:
            keys.append(list(arguments[3]))
            torch.manual_seed(seed)
            return real(*arguments)

        monkeypatch.setattr(trainer.sampler, "sample", spied)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.actors.policy_parameters()])
    assert [key for names in keys[:3] for key in names] == list(range(96)), "an answer's seed is its episode's number"
    assert keys[3:] == keys[:3]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_evaluation_is_repeatable_and_its_objective_is_score_less_kl(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, base, evaluation_prompts=4, missing_eos_penalty=0.7)
    trainer.held_out = trainer.prompts * 6
    disturb(trainer.actors.policy_parameters())
    first = trainer.evaluate()
    trainer.state.global_step = 2
    assert trainer.evaluate() == first
    asked = [list(one.ids) for one in trainer.held_out]
    keys = [f"evaluation {i}" for i in range(len(asked))]
    answers = [row[0] for row in HFSampler(trainer.actors.model, 0).sample(asked, 1, trainer.sampling, keys)]
    rows = list(zip(asked, [answer.ids for answer in answers], strict=True))
    policy = [float(one.sum()) for one in models.completion_log_probs(trainer.actors.model, rows)]
    with trainer.actors.model.disable_adapter():
        reference = [float(one.sum()) for one in models.completion_log_probs(trainer.actors.model, rows)]
    kl = statistics.fmean(a - b for a, b in zip(policy, reference, strict=True))
    scores = [envb.worth(answer.ids) for answer in answers]
    cut = statistics.fmean(answer.finish == "length" for answer in answers)
    assert 0 < cut < 1
    assert abs(kl) > 0.01
    assert first["eval_score"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert first["eval_kl"] == pytest.approx(kl, abs=1e-5)
    expected = statistics.fmean(scores) - 0.7 * cut - trainer.stage.kl_coef * kl
    assert first["eval_objective"] == pytest.approx(expected, abs=1e-5)


def test_the_best_evaluation_has_the_highest_objective() -> None:
    history = [{"step": 8 * i, "eval_objective": worth} for i, worth in enumerate((9.0, 1.0, 3.0, 2.0, -1.0))]
    assert training.best_step(envb_ppo.stage(evaluation_prompts=4), history) == 16, "the start is not among them"


def test_held_out_prompts_are_not_trained_on(base: Path, tmp_path: Path) -> None:
    found = envb_ppo.inputs(tmp_path, base)
    rows = [{"prompt_ids": [a, b]} for a in range(1, 8) for b in range(1, 8)]
    Path(found["prompts"].path or "").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo = envb_ppo.stage(evaluation_prompts=6)
    prompts, held_out = ppo.read_prompts(
        found, training.load_tokenizer(found, "policy"), envb_ppo.work(tmp_path / "work" / "ppo")
    )
    ours, theirs = ({one.ids for one in asked} for asked in (prompts, held_out))
    assert 0 < len(theirs) <= 6
    assert not ours & theirs
    assert len(ours | theirs) == len(rows)


# --- samplers that are given an adapter -------------------------------------------------------------------------------


class FromFolder:
    """Stands in for an engine: it knows the policy from the published folder alone."""

    needs_adapter = True

    def __init__(self, base: Path, stale: bool = False) -> None:
        self.base, self.stale = base, stale
        self.versions: list[int] = []
        self.model: Any = None

    def sample(
        self, prompt_ids: Any, n: int, sampling: Sampling, keys: Any = None, adapter: Adapter | None = None
    ) -> Any:
        from peft import PeftModel

        assert adapter is not None
        assert (adapter.folder / "adapter_config.json").is_file(), "a version that is asked for is there"
        if not (self.stale and self.versions):
            self.model = PeftModel.from_pretrained(envb.load(self.base), str(adapter.folder)).eval()
        self.versions.append(adapter.version)
        return HFSampler(self.model, envb.PAD).sample(prompt_ids, n, sampling, keys)


def test_a_sampler_gets_each_version_of_the_policy_once_it_is_there(base: Path, tmp_path: Path) -> None:
    live, given = trainer_of(tmp_path / "live", base), trainer_of(tmp_path / "given", base)
    given.sampler = FromFolder(base)
    given.held_out = given.prompts
    live.train()
    given.train()
    assert given.sampler.versions == [1, 1, 1, 2, 2], "a probe, an evaluation and a batch; a probe and a batch"
    points = [entry for entry in given.state.log_history if "sampler_gap_max" in entry]
    assert max(point["sampler_gap_max"] for point in points) <= 1e-4
    pairs = zip(live.actors.policy_parameters(), given.actors.policy_parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert [folder.name for folder in (given.work.scratch / "adapters").iterdir()] == ["version-2-0"]


def test_a_sampler_that_kept_the_old_adapter_is_found_out_before_it_answers(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, base)
    trainer.sampler = FromFolder(base, stale=True)
    with pytest.raises(AlignError, match="after the adapter of version 2 was loaded, its log-probs differ"):
        trainer.train()
    assert trainer.sampler.versions == [1, 1, 2]


def test_a_broken_adapter_is_not_published(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, base)
    with torch.no_grad():
        trainer.actors.policy_parameters()[-1][0, 0] = float("nan")
    with pytest.raises(AlignError, match="learning_rate: .* is not finite"):
        models.publish_adapter(trainer.actors.model, tmp_path / "adapters" / "version-1")
    assert not (tmp_path / "adapters" / "version-1").exists()
