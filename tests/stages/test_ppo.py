"""PPO on known ground: its gradient is the exact one, and nothing that should not matter changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import envb
import envb_ppo
from align_pipeline.pipeline.errors import AlignError, DataError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import actors as actors_module
from align_pipeline.stages import models, ppo_loop, ppo_math, training
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.ppo_loop import Batch, PPOTrainer, drift, prompt_order, repetition
from align_pipeline.stages.reward import Reward
from align_pipeline.stages.rollout import Rollout

from .conftest import assert_same_tensors

BETA = 0.3
OUTCOMES = envb.OUTCOMES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return envb.base(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(base: Path) -> torch.Tensor:
    with torch.no_grad():
        return envb.logprobs(envb.load(base))


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """Return an adapter that is clearly not the base, as an SFT stage leaves it."""
    return _adapter(base, tmp_path_factory.mktemp("sft"), seed=5)


@pytest.fixture(scope="module")
def reward_model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    """Return a reward model of the pipeline's own stage, an adapter on the same base."""
    folder = tmp_path_factory.mktemp("reward")
    envb.write_utility_pairs(folder / "pairs.jsonl", 512)
    pairs = Resolved(ref="file:pairs.jsonl", digest="sha256:" + "d" * 64, path=str(folder / "pairs.jsonl"))
    made = envb_ppo.work(folder / "work" / "reward")
    policy = envb_ppo.inputs(folder, base)["policy"]
    stage = Reward(data="file:p", model="file:b", lora={"r": 8, "alpha": 16}, batch_size=64, learning_rate=3e-3)
    stage.run({"model": policy, "data": pairs}, made)
    return _resolved("stage:reward", made.out, policy, kind="reward_model")


def _adapter(base: Path, folder: Path, seed: int) -> Resolved:
    policy = envb_ppo.inputs(folder, base)["policy"]
    ppo = envb_ppo.stage()
    model = models.load_trainable(policy, tuning="lora", lora=ppo.lora)
    _disturb([p for p in model.parameters() if p.requires_grad], seed)
    tokenizer = models.load_tokenizer(policy)
    (folder / "out").mkdir()
    models.save_model(model, tokenizer, folder / "out", policy)
    return _resolved("stage:sft", folder / "out", policy)


def _resolved(ref: str, out: Path, base: Resolved, kind: Any = "model") -> Resolved:
    scores = out / "reference_scores.json"
    return Resolved(
        ref=ref,
        digest="sha256:" + ref[6:9].encode().hex() * 10,
        path=str(out),
        kind=kind,
        adapter=str(out / "adapter"),
        base=base,
        reference_scores=str(scores) if scores.exists() else None,
    )


def _disturb(parameters: list[torch.nn.Parameter], seed: int = 1, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def _trainer(
    folder: Path, base: Path, disturbed: bool = True, found: dict[str, Any] | None = None, **changes: Any
) -> Any:
    ppo = envb_ppo.stage(**{"value_warmup": 0, **changes})
    found = envb_ppo.inputs(folder, base, 1, **(found or {}))
    trainer = envb_ppo.trainer(ppo, found, envb_ppo.work(folder / "work" / "ppo"))
    if disturbed:
        _disturb(trainer.actors.policy_parameters())
    trainer.actors.train()
    return trainer


def _gradient(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    gradient = torch.cat([p.grad.flatten().double() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradient


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# --- T2: the first minibatch's gradient is the exact gradient of J ----------------------------------------------------


def _every_answer(trainer: PPOTrainer, policy: torch.Tensor) -> Batch:
    """Return all 400 answers to the first prompt as one batch, to be weighted by their probability."""
    answers = [Rollout(ids, (0.0,) * len(ids), "stop" if ids[-1] == envb.EOS else "length") for ids in OUTCOMES]
    return trainer._assess([trainer.prompts[0]] * len(answers), answers, {"reward": envb.REWARDS.tolist()})


def _exact_values(policy: torch.Tensor, reference: torch.Tensor, length: int) -> torch.Tensor:
    """Return E[reward to come] before each token of each outcome, (400, T), by listing what may follow."""
    values = torch.zeros(len(OUTCOMES), length)
    worth = envb.REWARDS - BETA * (policy - reference)  # of whole answers
    for row, ids in enumerate(OUTCOMES):
        for t in range(len(ids)):
            same = [i for i, other in enumerate(OUTCOMES) if other[:t] == ids[:t] and len(other) > t]
            chance = policy[same].exp()
            values[row, t] = float((chance * worth[same]).sum() / chance.sum())
    return values


def _spent(policy_tokens: torch.Tensor, reference_tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the KL reward that was already paid before each token, (400, T)."""
    paid = torch.where(mask, -BETA * (policy_tokens - reference_tokens), 0.0)
    return paid.cumsum(-1) - paid


@pytest.mark.parametrize(
    ("gae_lambda", "values"), [(1.0, "none"), (1.0, "any"), (1.0, "exact"), (0.95, "exact"), (0.0, "exact")]
)
def test_the_first_gradient_is_the_exact_gradient_of_the_objective(
    base: Path,
    reference: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gae_lambda: float,
    values: str,
) -> None:
    monkeypatch.setattr(ppo_math, "whiten", lambda numbers, mask, shift_mean=True: numbers)
    trainer = _trainer(tmp_path, base, gae_lambda=gae_lambda)
    policy = envb.logprobs(trainer.actors.model)[0]
    objective = (policy.exp() * (envb.REWARDS - BETA * (policy - reference[0]))).sum()
    (-objective).backward()
    exact = _gradient(trainer.actors.policy_parameters())

    batch = _every_answer(trainer, policy)
    if values == "any":
        # A baseline may be anything that does not know the token: here a number drawn for each prefix.
        for row, ids in enumerate(OUTCOMES):
            for t in range(len(ids)):
                batch.values[row, t] = hash((ids[:t], t)) % 1000 / 500 - 1
    elif values == "exact":
        whole = _exact_values(policy.detach(), reference[0], batch.mask.shape[1])
        batch.values = torch.where(batch.mask, whole - _spent(batch.old, batch.reference, batch.mask), 0.0)
    batch.estimate(trainer.stage)
    tokens = int(batch.mask.sum())
    batch.weights = torch.where(batch.mask, policy.detach().exp().float()[:, None] * tokens, 0.0)
    stats = trainer.minibatch_gradient(batch, list(range(len(OUTCOMES))))
    assert _error(_gradient(trainer.actors.policy_parameters()), exact) <= 1e-5
    assert stats["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert stats["clip_fraction"] == 0
    assert stats["approx_kl"] <= 1e-10


def _drawn(trainer: PPOTrainer, count: int = 64) -> Batch:
    """Return a batch as an iteration makes it, of answers of unequal length."""
    asked = [trainer.prompts[i % 4] for i in range(count)]
    answers, plain = trainer._answers(asked, list(range(count)))
    batch = trainer._assess(asked, answers, plain)
    batch.estimate(trainer.stage)
    assert {len(ids) for ids in batch.answers} == {1, 2, 3}
    return batch


def _both_gradients(trainer: PPOTrainer, batch: Batch) -> torch.Tensor:
    trainer.minibatch_gradient(batch, list(range(len(batch.answers))))
    return torch.cat([_gradient(trainer.actors.policy_parameters()), _gradient(trainer.actors.value_parameters())])


def _disturb_value(trainer: PPOTrainer) -> None:
    _disturb(trainer.actors.value_parameters(), seed=2)


@pytest.mark.parametrize("tokens", [5, 20, 80, 160, 100_000])
def test_micro_batches_do_not_change_the_gradient(base: Path, tmp_path: Path, tokens: int) -> None:
    trainer = _trainer(tmp_path, base)
    _disturb_value(trainer)
    batch = _drawn(trainer)
    whole = _both_gradients(trainer, batch)
    split = trainer.stage.model_copy(
        update={"how": trainer.stage.how.model_copy(update={"tokens_per_micro_batch": tokens})}
    )
    trainer.stage = split
    assert _error(_both_gradients(trainer, batch), whole) <= 1e-5


def test_what_stands_beyond_an_answer_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path, base)
    _disturb_value(trainer)
    batch = _drawn(trainer)
    plain = _both_gradients(trainer, batch)
    rows = ppo_loop.right_pad

    def with_junk(sequences: Any, device: Any, pad_id: int = 0) -> torch.Tensor:
        ids = rows(sequences, device, pad_id=5)
        return torch.cat([ids, torch.full((len(ids), 5), 6)], dim=1)

    monkeypatch.setattr(ppo_loop, "right_pad", with_junk)
    for name in ("old", "reference", "values", "sampler", "advantages", "returns", "weights"):
        getattr(batch, name)[~batch.mask] = 1e9
    assert _error(_both_gradients(trainer, batch), plain) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probs_are_those_of_left_padded_rows_with_a_mask(base: Path, tmp_path: Path, family: str) -> None:
    """Positions that are learnt (GPT-2) show an error that rotary ones hide."""
    folder = base
    if family == "gpt2":
        folder = tmp_path / "gpt2"
        from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

        torch.manual_seed(3)
        config = GPT2Config(vocab_size=8, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
        config.eos_token_id = config.bos_token_id = config.pad_token_id = envb.EOS
        GPT2LMHeadModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    trainer = _trainer(tmp_path / "run", folder, disturbed=False, tuning="full", lora={}, temperature=0.7)
    batch = _drawn(trainer)
    model = models.load_causal(envb_ppo.inputs(tmp_path, folder)["policy"]).eval()
    for row, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        ids = torch.tensor([[0] * 4 + [*prompt, *answer]])
        mask = torch.tensor([[0] * 4 + [1] * (len(prompt) + len(answer))])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0] / 0.7
        logprobs = logits.log_softmax(-1)
        start = 4 + len(prompt)
        expected = [float(logprobs[start + t - 1, token]) for t, token in enumerate(answer)]
        assert batch.old[row, : len(answer)].tolist() == pytest.approx(expected, abs=2e-6)
        assert batch.sampler[row, : len(answer)].tolist() == pytest.approx(expected, abs=2e-6)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert batch.entropy[row, : len(answer)].tolist() == pytest.approx(
            entropy[start - 1 : start - 1 + len(answer)].tolist(), abs=2e-6
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_one_base_have_the_gradients_of_two_models(
    base: Path, reward_model: Resolved, tmp_path: Path, checkpointing: bool
) -> None:
    trainer = _trainer(tmp_path, base, found={"reward": reward_model}, value="reward", reward="stage:reward")
    if checkpointing:
        trainer.actors.gradient_checkpointing_enable()
    batch = _drawn(trainer)
    trainer.minibatch_gradient(batch, list(range(len(batch.answers))))
    found = {name: p.grad.double() for name, p in trainer.actors.named_parameters() if p.grad is not None}

    expected = _gradients_of_two_models(trainer, batch, base, reward_model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name


def _gradients_of_two_models(
    trainer: PPOTrainer, batch: Batch, base: Path, reward_model: Resolved
) -> dict[str, torch.Tensor]:
    """Work both losses out on a policy and a value model that share nothing, row by row, through PEFT alone."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    policy = get_peft_model(envb.load(base), trainer.actors.model.peft_config["default"])
    own = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in trainer.actors.model.named_parameters():
            if ".default." in name:
                own[name].copy_(parameter)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    value = PeftModel.from_pretrained(plain, reward_model.adapter, is_trainable=True)
    loss = torch.zeros(())
    tokens = int(batch.mask.sum())
    for row, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        ids = torch.tensor([[*prompt, *answer]])
        logits = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        ratio = (logprobs - batch.old[row, : len(answer)]).exp()
        advantages = batch.advantages[row, : len(answer)]
        loss = loss - torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / tokens
        states = value.get_base_model().model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        found = value.get_base_model().score(states)[:, 0]
        errors = (found - batch.returns[row, : len(answer)]).square()
        loss = loss + trainer.stage.value_coef * 0.5 * errors.sum() / tokens
    loss.backward()
    gradients = {f"model.{n}": p.grad.double() for n, p in policy.named_parameters() if p.grad is not None}
    for name, parameter in value.named_parameters():
        if parameter.grad is None or (float(parameter.grad.norm()) == 0 and "score" in name):
            continue
        if "score" in name:
            gradients["value_head.weight"] = parameter.grad.double()
        else:
            gradients[f"model.{name.replace('.default.', '.value.')}"] = parameter.grad.double()
    return gradients


# --- who takes part ---------------------------------------------------------------------------------------------------


def test_the_reference_is_the_adapter_that_came_in_not_the_base(base: Path, sft: Resolved, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, base, disturbed=False, found={"policy": sft})
    batch = _drawn(trainer)
    assert torch.equal(batch.old, batch.reference), "the KL at the start is exactly 0"
    with_adapters_off = models.completion_log_probs(
        models.load_causal(sft.plain), list(zip(batch.prompts, batch.answers, strict=True))
    )
    assert max(float((a - batch.old[i, : len(a)]).abs().max()) for i, a in enumerate(with_adapters_off)) > 0.05
    _disturb(trainer.actors.policy_parameters(), seed=9)
    again = trainer._assess([trainer.prompts[i % 4] for i in range(64)], _as_rollouts(batch), {"reward": [0.0] * 64})
    assert torch.equal(again.reference, batch.reference), "the reference stays where it is"
    assert float((again.old - batch.old).abs().max()) > 0.05


def _as_rollouts(batch: Batch) -> list[Rollout]:
    return [
        Rollout(ids, tuple(batch.sampler[row, : len(ids)].tolist()), "stop") for row, ids in enumerate(batch.answers)
    ]


def test_the_reward_model_scores_as_it_does_alone_and_the_value_model_starts_as_it(
    base: Path, reward_model: Resolved, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path, base, found={"reward": reward_model}, value="reward", reward="stage:reward")
    asked = [trainer.prompts[i % 4] for i in range(64)]
    answers, plain = trainer._answers(asked, list(range(64)))
    rows = [[*one.ids, *answer.ids] for one, answer in zip(asked, answers, strict=True)]
    alone = models.load_reward(reward_model)
    assert plain["reward"] == pytest.approx(models.score(alone, rows), abs=1e-5)
    batch = trainer._assess(asked, answers, plain)
    prefixes = [[*p, *a[:-1]] for p, a in zip(batch.prompts, batch.answers, strict=True)]
    last = [float(batch.values[row, len(ids) - 1]) for row, ids in enumerate(batch.answers)]
    assert last == pytest.approx(models.score(alone, prefixes), abs=1e-5)
    assert {name.split(".")[-2] for name, p in trainer.actors.named_parameters() if p.requires_grad} == {
        "default",
        "value",
        "value_head",
    }


def test_a_damaged_reward_model_is_refused(base: Path, reward_model: Resolved, tmp_path: Path) -> None:
    stored = json.loads(Path(reward_model.reference_scores or "").read_text())
    wrong = tmp_path / "scores.json"
    wrong.write_text(json.dumps({**stored, "scores": [score + 0.1 for score in stored["scores"]]}))
    other = reward_model.model_copy(update={"reference_scores": str(wrong)})
    with pytest.raises(AlignError, match="reference row 0 scores"):
        _trainer(tmp_path, base, found={"reward": other}, value="reward", reward="stage:reward")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"digest": "sha256:" + "9" * 64}, "is an adapter of file:base, the policy's base is"),
        ({"adapter": None, "base": None}, "is whole weights"),
    ],
)
def test_a_value_model_never_starts_elsewhere_in_silence(
    base: Path, reward_model: Resolved, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    other = reward_model.model_copy(update=changes)
    if "digest" in changes:
        assert reward_model.base is not None
        other = reward_model.model_copy(update={"base": reward_model.base.model_copy(update=changes)})
    with pytest.raises(AlignError, match=f"{why}.*write value: fresh"):
        _trainer(tmp_path, base, found={"reward": other}, value="reward", reward="stage:reward")
    with pytest.raises(ValidationError, match="there is none, only functions; write value: fresh"):
        envb_ppo.stage(value="reward")


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("value", ["fresh", "shared"])
def test_each_kind_of_value_model_learns(
    base: Path, tmp_path: Path, reference: torch.Tensor, tuning: str, value: str
) -> None:
    rate = {"lora": 3e-3, "full": 5e-4}[tuning]
    lora = {"lora": {"r": 8, "alpha": 16}, "full": {}}[tuning]
    ppo = envb_ppo.stage(tuning=tuning, lora=lora, value=value, learning_rate=rate, episodes=10 * 256, value_warmup=1)
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    ppo.run(envb_ppo.inputs(tmp_path, base), made)
    start = envb.report(reference, reference, BETA)
    assert envb_ppo.reached(ppo, made, base).distance < 0.6 * start.distance
    points = [json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()]
    assert points[-1]["explained_variance"] > 0.05
    assert points[0]["explained_variance"] == pytest.approx(0, abs=1e-3), "a head of zeros knows nothing"


def test_several_rewards_are_a_weighted_sum(base: Path, tmp_path: Path) -> None:
    named = {"worth": "envb:reward", "nothing": "envb:zero"}
    found = {f"reward.{name}": envb_ppo.function(ref) for name, ref in named.items()}
    trainer = _trainer(
        tmp_path, base, found=found, reward=named, reward_weights={"worth": 2.0}, missing_eos_penalty=0.7
    )
    asked = [trainer.prompts[0]] * len(OUTCOMES)
    answers = [Rollout(ids, (0.0,) * len(ids), "stop" if ids[-1] == envb.EOS else "length") for ids in OUTCOMES]
    plain = {"worth": envb.REWARDS.tolist(), "nothing": [0.0] * len(OUTCOMES)}
    batch = trainer._assess(asked, answers, plain)
    expected = [2 * envb.worth(ids) - 0.7 * (ids[-1] != envb.EOS) for ids in OUTCOMES]
    assert batch.scores.tolist() == pytest.approx(expected, abs=1e-6)
    trainer.stage = trainer.stage.model_copy(update={"reward_clip": 0.25})
    clipped = trainer._assess(asked, answers, plain).scores
    assert clipped.tolist() == pytest.approx(
        [min(max(2 * envb.worth(ids), -0.25), 0.25) - 0.7 * (ids[-1] != envb.EOS) for ids in OUTCOMES], abs=1e-6
    )


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_ppo_reaches_the_best_policy(base: Path, tmp_path: Path, reference: torch.Tensor) -> None:
    """T3: from KL 0.76 to the best policy to at most 0.02, measured over all outcomes."""
    ppo = envb_ppo.stage()
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    ppo.run(envb_ppo.inputs(tmp_path, base), made)
    found = envb_ppo.reached(ppo, made, base)
    assert envb.report(reference, reference, BETA).distance > 0.6
    assert found.distance <= 0.02
    assert found.objective >= 0.97 * found.best
    assert found.identity_error <= 1e-4
    assert found.efficiency >= 0.985
    points = [json.loads(line) for line in (made.out / "curve.jsonl").read_text().splitlines()]
    assert points[0]["kl"] == 0 and points[0]["ratio_max"] == 1
    assert max(point["sampler_gap_max"] for point in points) <= 1e-4
    assert [point["episodes"] for point in points] == [256.0 * (i + 1) for i in range(80)]


def test_a_reward_of_nothing_leaves_the_policy_where_it_is(base: Path, tmp_path: Path) -> None:
    ppo = envb_ppo.stage(reward="envb:zero", episodes=20 * 256)
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    ppo.run(envb_ppo.inputs(tmp_path, base, reward=envb_ppo.function("envb:zero")), made)
    assert envb_ppo.reached(ppo, made, base).kl <= 0.005


def test_warming_the_value_model_up_leaves_the_policy_as_it_is(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, base, disturbed=False, episodes=3 * 256, value_warmup=2)
    before = [p.detach().clone() for p in trainer.actors.policy_parameters()]
    head = trainer.actors.value_head.weight.detach().clone()
    changed = []

    class Look(ppo_loop.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = trainer.actors.policy_parameters()
            changed.append(not all(torch.equal(a, b) for a, b in zip(before, now, strict=True)))

    trainer.add_callback(Look())
    trainer.train()
    assert changed == [False] * 32 + [True] * 16
    assert not torch.equal(head, trainer.actors.value_head.weight)


def test_target_kl_ends_the_passes_over_a_batch(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, base, episodes=2 * 256, target_kl=1e-5, learning_rate=1e-2)
    trainer.train()
    points = [entry for entry in trainer.state.log_history if "updates" in entry]
    assert [point["updates"] for point in points] == [4, 4], "one pass of four minibatches"


def test_an_epoch_has_every_row_once_and_each_epoch_its_own_order(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path, base, episodes=2 * 64, batch_size=64)
    seen: list[list[int]] = []
    real = PPOTrainer.minibatch_gradient
    monkeypatch.setattr(
        PPOTrainer,
        "minibatch_gradient",
        lambda self, batch, rows, policy=True: (seen.append(list(rows)), real(self, batch, rows, policy))[1],
    )
    trainer.train()
    epochs = [[row for rows in seen[i : i + 4] for row in rows] for i in range(0, len(seen), 4)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_prompts_are_asked_once_a_pass() -> None:
    order = prompt_order(range(30), prompts=10, seed=0)
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert order[13:17] == prompt_order(range(13, 17), prompts=10, seed=0), "a run that goes on asks the same"
    assert order != prompt_order(range(30), prompts=10, seed=1)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"tuning": "full", "lora": {}, "learning_rate": 5e-4}, {"value": "shared"}])
def test_a_run_that_was_killed_ends_with_the_same_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    how = {"checkpoint_every_steps": 8}
    ppo = envb_ppo.stage(
        episodes=4 * 64, batch_size=64, minibatches=2, value_warmup=1, evaluation_prompts=2, how=how, **changes
    )
    calm, stormy = (envb_ppo.work(tmp_path / "work" / name) for name in ("calm", "stormy"))
    found = envb_ppo.inputs(tmp_path, base)
    metrics = ppo.run(found, calm)
    real, count = PPOTrainer.minibatch_gradient, [0]

    def dies(self: PPOTrainer, *arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] in (13, 25):
            raise _Killed
        return real(self, *arguments, **named)

    monkeypatch.setattr(PPOTrainer, "minibatch_gradient", dies)
    for _ in range(2):
        with pytest.raises(_Killed):
            ppo.run(found, stormy)
    assert ppo.run(found, stormy) == metrics
    assert_same_tensors(calm.out, stormy.out)
    for name in ("curve.jsonl", "samples.jsonl"):
        assert (calm.out / name).read_text() == (stormy.out / name).read_text()


def test_the_best_evaluation_is_published(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that ruins the policy late: what is published is what was best on held-out prompts."""
    ppo = envb_ppo.stage(
        episodes=6 * 64, batch_size=64, minibatches=2, value_warmup=0, evaluation_prompts=4, evaluate_every=1
    )
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    real = PPOTrainer.evaluate
    worth = iter([0.0, 1.0, 3.0, 2.0, 1.0, 0.0, -1.0])

    def judged(self: PPOTrainer, *arguments: Any, **named: Any) -> dict[str, float]:
        log = self.log
        self.log = lambda logs, *rest: log({**logs, "eval_objective": next(worth)}, *rest)  # type: ignore[method-assign]
        try:
            return real(self, *arguments, **named)
        finally:
            self.log = log  # type: ignore[method-assign]

    monkeypatch.setattr(PPOTrainer, "evaluate", judged)
    metrics = ppo.run(envb_ppo.inputs(tmp_path, base), made)
    assert metrics["best_step"] == 2 * ppo.steps_at_once
    from safetensors.torch import load_file

    stored = load_file(made.scratch / f"checkpoint-{2 * ppo.steps_at_once}" / ppo_loop.WEIGHTS)
    published = load_file(made.out / "adapter" / "adapter_model.safetensors")
    name = next(iter(published))
    assert torch.equal(published[name], stored["model." + name.replace(".weight", ".default.weight")])


def test_what_is_reported_is_what_is_published_where_little_gains_do_not_count() -> None:
    """`min_delta` keeps an earlier evaluation: the metrics are its own, beside those of the start."""
    ppo = envb_ppo.stage(evaluation_prompts=4, early_stopping={"patience": 9, "min_delta": 0.2})
    keys = ("objective", "score", "kl", "length", "eos_rate", "repetition")
    worth = {0: 1.0, 16: 2.0, 32: 2.1}
    curve: list[dict[str, Any]] = [
        {"step": step, **{f"eval_{key}": value for key in keys}} for step, value in worth.items()
    ]
    point = dict.fromkeys(("score", "kl", "length", "eos_rate", "entropy", "episodes"), 0.0)
    found = ppo._metrics([*curve, {"step": 48, **point}])
    assert training.best_step(ppo, curve) == found["best_step"] == 16
    assert (found["start_objective"], found["held_out_objective"]) == (1.0, 2.0)
    assert found["iterations"] == 3, "those that ran"


def test_a_policy_that_got_worse_is_not_published_in_silence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo = envb_ppo.stage(episodes=64, batch_size=64, value_warmup=0, learning_rate=0.1, evaluation_prompts=4)
    made = envb_ppo.work(tmp_path / "work" / "ppo")
    metrics = ppo.run(envb_ppo.inputs(tmp_path, base), made)
    assert metrics["held_out_objective"] < metrics["start_objective"]
    assert "PPO made the policy worse; lower learning_rate" in capsys.readouterr().err


def test_an_engine_has_room_for_held_out_prompts_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    class Engine:
        needs_adapter = True

        def __init__(self, folder: Path, **settings: Any) -> None:
            made.update(settings)

    monkeypatch.setattr("align_pipeline.stages.rollout.VLLMSampler", Engine)
    other = tmp_path / "long.jsonl"
    other.write_text('{"prompt_ids": [3, 7, 1, 4, 6]}\n')
    longer = Resolved(ref="file:long.jsonl", digest="sha256:" + "d" * 64, path=str(other))
    _trainer(
        tmp_path, base, found={"evaluation": longer}, sampler="vllm", evaluation="file:long.jsonl", evaluation_prompts=4
    )
    assert made["max_length"] == 5 + envb.LENGTH


def test_early_stopping_without_held_out_prompts_is_refused(base: Path, tmp_path: Path) -> None:
    ppo = envb_ppo.stage(evaluation_prompts=1, early_stopping={"patience": 1})
    found = envb_ppo.inputs(tmp_path, base, 1)
    Path(found["prompts"].path or "").write_text('{"prompt_ids": [3, 7]}\n')
    with pytest.raises(AlignError, match="early_stopping: none of the 1 prompts could be held out"):
        ppo.run(found, envb_ppo.work(tmp_path / "work" / "ppo"))


# --- guards and bad input ---------------------------------------------------------------------------------------------

CALM = {"kl": 1.0, "length": 40.0, "repetition": 0.1, "score": 0.0}


@pytest.mark.parametrize(
    ("now", "sign"),
    [
        ({}, None),
        ({"kl": 81.0}, "kl_coef: the KL to the reference is 81.0 nats"),
        ({"repetition": 0.6}, "answers repeat themselves"),
        ({"length": 130.0, "score": 1.0}, "the reward pays for length"),
        ({"length": 130.0, "score": -1.0}, None),
        ({"length": 3.0, "kl": 0.5}, "learnt to say nothing"),
    ],
)
def test_signs_of_trouble(now: dict[str, float], sign: str | None) -> None:
    found = drift(CALM, {**CALM, **now}, 0.05)
    assert len(found) == (sign is not None)
    assert sign is None or sign in found[0]


def test_repetition_counts_pairs_that_stood_before() -> None:
    assert repetition((1, 2, 1, 2, 1)) == 0.5
    assert repetition((1,)) == repetition((1, 2, 3)) == 0.0


def test_a_guard_stops_the_run_or_warns(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppo_loop, "drift", lambda *_: ["reward: it is exploited"])
    stop = _trainer(tmp_path / "stop", base, episodes=64, batch_size=64)
    with pytest.raises(AlignError, match="it is exploited; to go on as it is, set how.guards: warn"):
        stop.train()
    warn = _trainer(tmp_path / "warn", base, episodes=64, batch_size=64, how={"guards": "warn"})
    warn.train()
    assert "warning: reward: it is exploited" in capsys.readouterr().err


def test_a_sampler_with_other_weights_stops_the_run(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, base, episodes=64, batch_size=64)
    other = models.load_causal(envb_ppo.inputs(tmp_path, base)["policy"])
    _disturb(list(other.parameters()), size=0.1)
    trainer.sampler.model = other
    with pytest.raises(AlignError, match="log-probs differ from the trainer's by"):
        trainer.train()


def test_broken_weights_stop_the_run_with_advice(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, base, episodes=64, batch_size=64)
    with torch.no_grad():
        trainer.actors.policy_parameters()[0].fill_(float("nan"))
    with pytest.raises(AlignError, match="learning_rate: .* nan"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"prompts.jsonl:\d+: bad_rewards:raises raised KeyError"),
        ("nan", r"prompts.jsonl:\d+: bad_rewards:nan returned nan"),
        ("none", r"prompts.jsonl:\d+: bad_rewards:none returned None"),
        ("short", r"bad_rewards:short returned 63 scores for 64 answers"),
    ],
)
def test_a_bad_reward_function_is_named_on_the_first_batch(base: Path, tmp_path: Path, name: str, message: str) -> None:
    module = tmp_path / "bad_rewards.py"
    module.write_text(
        "def raises(prompts, completions, completion_ids, **_):\n    return {}['score']\n"
        "def nan(prompts, completions, completion_ids, **_):\n    return [0.0, float('nan')] + [0.0] * 62\n"
        "def none(prompts, completions, completion_ids, **_):\n    return [None] * 64\n"
        "def short(prompts, completions, completion_ids, **_):\n    return [0.0] * 63\n"
    )
    ref = f"bad_rewards:{name}"
    function = Resolved(ref=ref, digest="sha256:" + "f" * 64, function=ref, search_path=str(tmp_path))
    trainer = _trainer(tmp_path, base, found={"reward": function}, reward=ref, episodes=64, batch_size=64)
    with pytest.raises(AlignError, match=message):
        trainer.train()


def test_prompts_are_checked_before_anything_is_loaded(base: Path, tmp_path: Path) -> None:
    ppo = envb_ppo.stage(max_new_tokens=60)
    found = envb_ppo.inputs(tmp_path, base, 1)
    tokenizer = training.load_tokenizer(found, "policy")
    Path(found["prompts"].path or "").write_text('{"prompt_ids": [3, 7]}\n{"prompt_ids": [3, 7, 1, 1, 1, 4]}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:2: prompt: 6 tokens \+ max_new_tokens 60 = 66"):
        ppo.read_prompts(found, tokenizer, envb_ppo.work(tmp_path / "work" / "ppo"))
    Path(found["prompts"].path or "").write_text("")
    with pytest.raises(DataError, match="prompts"):
        ppo.read_prompts(found, tokenizer, envb_ppo.work(tmp_path / "work" / "ppo"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "vllm", "tuning": "full", "lora": {}}, "set tuning: lora or sampler: transformers"),
        ({"sampler": "vllm", "lora": {"r": 1024}}, "lora.r: vLLM takes ranks up to 512, got 1024"),
        ({"lora": {"r": 8, "target_modules": ["q_proj", "lm_head"]}}, "lora.target_modules: lm_head"),
        ({"minibatches": 3}, "batch_size 256 must be a multiple of minibatches 3"),
        ({"value_warmup": 80}, "leaves none of the 80 iterations"),
        ({"reward": {}}, "reward: name at least one"),
        ({"reward": {"sd": "envb:reward"}}, "'sd' cannot name a reward"),
        ({"reward": {"a b": "envb:reward"}}, "'a b' cannot name a reward"),
        ({"seed": -1}, "seed"),
        ({"reward_weights": {"helpful": 1.0}}, "'helpful' is none of the rewards"),
        ({"early_stopping": {"patience": 2}}, "evaluation_prompts"),
        ({"evaluation": "file:other.jsonl"}, "evaluation: it is never answered with evaluation_prompts: 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        envb_ppo.stage(**changes)


def test_a_chain_that_cannot_work_is_refused_before_it_costs_anything() -> None:
    whole = Reward(data="file:p", model="file:b", tuning="full")
    ppo = envb_ppo.stage(value="reward", reward="stage:reward")
    assert "set value: fresh" in (ppo.misfit("reward", whole) or "")
    assert ppo.misfit("reward", Reward(data="file:p", model="file:b", lora={"r": 8})) is None
    assert envb_ppo.stage(reward="stage:reward").misfit("reward", whole) is None
    other = DPO(data="file:p", policy="file:b", lora={"r": 4})
    assert "lora.r: dpo trains an adapter with 4, this stage asks for 8" in (ppo.misfit("policy", other) or "")


@pytest.mark.parametrize(
    ("accuracy", "n", "passed"),
    # The lower bounds, by bisection of |p - p0| = z sqrt(p0 (1 - p0) / n): 0.5035 0.4995 0.5513 0.3005 0.5101 0.1637
    [(0.5525, 400, True), (0.55, 377, False), (0.6, 400, True), (0.6, 9, False), (1.0, 4, True), (0.2, 400, False)],
)
def test_a_reward_model_must_beat_a_coin_surely(accuracy: float, n: int, passed: bool) -> None:
    ppo = envb_ppo.stage(reward="stage:reward")
    reward = Reward(data="file:p", model="file:b")
    (found,) = ppo.before({"reward": (reward, {"accuracy": accuracy, "n": float(n)})})
    assert (found.gate, found.passed) == ("reward_above_chance", passed)
    assert f"stage:reward tells {accuracy:.1%} [" in found.says and f"of {n} held-out pairs" in found.says
    assert passed or "require: {reward_above_chance: off}" in found.remedy


def test_only_reward_models_of_the_pipeline_are_judged_and_each_of_several() -> None:
    ppo = envb_ppo.stage(reward={"one": "stage:a", "two": "stage:b"}, value="fresh")
    made = (Reward(data="file:p", model="file:b"), {"accuracy": 0.9, "n": 100.0})
    lost = (Reward(data="file:p", model="file:b"), {"train_accuracy": 0.9})
    policy = (DPO(data="file:p", policy="file:b"), {"accuracy": 0.1, "n": 100.0})
    found = ppo.before({"policy": policy, "reward.one": made, "reward.two": lost})
    assert [one.passed for one in found] == [True, False]
    assert "stage:b was judged on no held-out pairs" in found[1].says
    assert ppo.before({"policy": policy}) == []


def test_a_reward_model_that_will_not_be_judged_is_refused_before_it_is_trained() -> None:
    ppo, unjudged = envb_ppo.stage(reward="stage:reward"), Reward(data="file:p", model="file:b", held_out=0.0)
    assert "set held_out above 0" in (ppo.misfit("reward", unjudged) or "")
    off = envb_ppo.stage(reward="stage:reward", require={"reward_above_chance": "off"})
    assert off.misfit("reward", unjudged) is None
    assert ppo.misfit("reward", Reward(data="file:p", model="file:b", held_out=0.0, evaluation="file:e")) is None


def test_micro_batches_hold_their_tokens_and_every_row_once() -> None:
    lengths = [3, 9, 1, 4, 4, 2, 20]
    groups = actors_module.token_micro_batches(lengths, 10)
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert groups[0] == [6], "a row that is longer than the budget stands alone"
    assert all(max(lengths[row] for row in group) * len(group) <= 10 for group in groups[1:])
