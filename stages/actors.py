"""Who takes part in PPO: policy, reference, value and reward, as adapters on one frozen base.

With LoRA the base is held once. The reference is a frozen copy of the adapter that the policy starts with, or the base
with its adapters off; the value model is an adapter of its own under a linear head, a copy of the reward model's by
default. With `tuning: full` each of them is whole weights.

An adapter is active while its role acts, and the backward pass belongs to the act: a recomputed activation (gradient
checkpointing) would otherwise be that of another adapter, without an error. This file and those that import it may
import torch at their top; a stage imports them inside `run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.stages import models
from align_pipeline.stages.logprobs import Scaling, chosen_log_probs
from align_pipeline.stages.models import ADAPTER
from align_pipeline.stages.scoring import Answers, Asked, Scorer, Scores, in_shape, load_scorer

Role = Literal["policy", "reference", "value"]
Ids = Sequence[int]


class Settings(Protocol):
    """What of a PPO stage decides who takes part."""

    tuning: models.Tuning
    lora: Any
    quantize: models.Quantize | None
    value: Literal["reward", "fresh", "shared"]
    temperature: float
    seed: int


class Actors(nn.Module):
    """Policy, reference and value, one of them acting at a time."""

    def __init__(self, model: Any, reference: Any, value: Any, value_head: nn.Linear, temperature: float) -> None:
        """`reference` and `value`: adapters of `model` by name, or models; None: adapters off, the policy's trunk."""
        super().__init__()
        self.model = model
        self.others = nn.ModuleDict(
            {
                role: other
                for role, other in (("reference", reference), ("value", value))
                if isinstance(other, nn.Module)
            }
        )
        self.value_head = value_head
        self.adapters: dict[Role, str | None] = {"policy": ADAPTER, "reference": reference, "value": value}
        self.shares_value = value is None
        base = _inner(model)
        self.head = base.get_output_embeddings()
        self.scaling = Scaling.of(base.config.get_text_config(), temperature)
        _no_dropout(self)
        self.freeze_all_but_trained()

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def freeze_all_but_trained(self) -> None:
        """Let gradients reach the policy, the value model and its head, and nothing else."""
        self.requires_grad_(False)
        self.value_head.requires_grad_(True)
        for parameter in (*self.policy_parameters(), *self.value_parameters()):
            parameter.requires_grad_(True)

    def policy_parameters(self) -> list[nn.Parameter]:
        return self._parameters_of("policy")

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only the value loss moves: none of a trunk that is the policy's."""
        trunk = [] if self.shares_value else self._parameters_of("value")
        return [*trunk, *self.value_head.parameters()]

    def _parameters_of(self, role: Role) -> list[nn.Parameter]:
        if role in self.others:
            return [p for name, p in self.others[role].named_parameters() if not name.startswith(("score", "lm_head"))]
        if not hasattr(self.model, "peft_config"):
            return list(self.model.parameters())
        name = self.adapters[role]
        return [p for key, p in self.model.named_parameters() if f".{name}." in key]

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        """Make a role's adapter the active one, and yield the trunk that gives its hidden states."""
        if role in self.others:
            yield _trunk(self.others[role])
            return
        if not hasattr(self.model, "peft_config"):
            yield _trunk(self.model)
            return
        name = ADAPTER if role == "value" and self.shares_value else self.adapters[role]
        try:
            with nullcontext() if name else self.model.disable_adapter():
                if name:
                    self.model.set_adapter(name)
                yield _trunk(self.model)
        finally:
            self.model.set_adapter(ADAPTER)
            self.freeze_all_but_trained()  # PEFT lets gradients reach the active adapter only

    def log_probs(self, states: Tensor, targets: Tensor, role: Role = "policy") -> tuple[Tensor, Tensor]:
        """Return a role's log-probs of tokens and its entropies at the run's temperature, both (N,)."""
        head = self.others[role].get_output_embeddings() if role in self.others else self.head
        return chosen_log_probs(states, targets, head, self.scaling)

    def values(self, states: Tensor) -> Tensor:
        """Return the value of each state (N, H), in float32."""
        with torch.autocast(states.device.type, enabled=False):
            return self.value_head(states.float()).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, *_: Any, **__: Any) -> None:
        raise TypeError("actors act one at a time: use acting()")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass; called by Trainer."""
        for model in (self.model, *self.others.values()):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# --- hidden states ----------------------------------------------------------------------------------------------------


def right_pad(rows: Sequence[Ids], device: Any, pad_id: int = 0) -> Tensor:
    """Return ids (B, L). What stands on the right of a row's end is never seen by it: attention is causal."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)


def hidden_states(trunk: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states (B, L, H) of right-padded ids; no mask is needed, so none slows attention down."""
    return trunk(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def before_answers(hidden: Tensor, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """Return the state before each answer token, (N, H), row after row: what predicts it and what values it."""
    rows = [row for row, answer in enumerate(answers) for _ in answer]
    columns = [len(prompt) - 1 + t for prompt, answer in zip(prompts, answers, strict=True) for t in range(len(answer))]
    return hidden[torch.tensor(rows, device=hidden.device), torch.tensor(columns, device=hidden.device)]


def token_micro_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Deal rows, longest first, into groups of at most `tokens` tokens with padding; a longer row stands alone."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# --- loading ----------------------------------------------------------------------------------------------------------


def load_actors(
    stage: Settings, policy: Resolved, rewards: dict[str, Resolved], tokenizer: Any, rows: int | None
) -> tuple[Actors, dict[str, Scorer]]:
    """Return the actors, and a scorer for each reward.

    A reward model that is an adapter on the policy's base joins it there; others are loaded on their own. Raises
    AlignError when the value model cannot start from the reward model and nothing else was asked for.
    """
    lora = stage.lora.model_copy(update={"dropout": 0.0})
    model = models.load_trainable(policy, tuning=stage.tuning, lora=lora, quantize=stage.quantize, seed=stage.seed)
    where = models.device()
    model = model if stage.quantize else model.to(where)
    reference: Any = None
    if stage.tuning == "full":
        reference = models.load_causal(policy, dtype=torch.float32)
    elif policy.adapter is not None:
        reference = "reference"
        models.graft(model, reference, policy)
    source = _value_source(stage, policy, rewards)
    value, head = _value(stage, model, policy, source)
    heads: dict[str, tuple[str, Tensor]] = {}
    for name, reward in rewards.items():
        if joins(stage.tuning, policy, reward):
            adapter = f"reward_{len(heads)}"
            heads[name] = (adapter, models.graft(model, adapter, reward))
    actors = Actors(model, reference, value, head.to(where), stage.temperature)
    check_head(actors, range(min(8, len(tokenizer))))
    scorers: dict[str, Scorer] = {}
    for name, reward in rewards.items():
        if name in heads:
            scorers[name] = AdapterScorer(actors, *heads[name], reward, rows)
        else:
            scorers[name] = load_scorer(reward, tokenizer, rows)
    return actors, scorers


def check_head(actors: Actors, ids: Ids) -> None:
    """Refuse a model that does more between its trunk and its logits than multiply, scale and cap them."""
    row = torch.tensor([list(ids)], device=actors.device)
    with torch.no_grad(), actors.acting("policy") as trunk:
        logits = _inner(actors.model)(input_ids=row).logits[0].float() / actors.scaling.temperature
        expected = logits.log_softmax(-1).gather(-1, row[0, :, None]).squeeze(-1)
        found, _ = actors.log_probs(hidden_states(trunk, row)[0], row[0])
    gap = float((found - expected).abs().max())
    if not gap <= (1e-3 if actors.model.dtype == torch.float32 else 0.25):
        raise AlignError(
            f"policy: {type(_inner(actors.model)).__name__} works its logits out in a way that PPO does not know: "
            f"log-probs differ by {gap:.3g} nats; use a model of another family, or the `dpo` stage"
        )


def joins(tuning: models.Tuning, policy: Resolved, reward: Resolved) -> bool:
    """Return whether a reward model is an adapter on the base that the policy is trained on."""
    return tuning == "lora" and reward.adapter is not None and reward.plain.digest == policy.plain.digest


def _value_source(stage: Settings, policy: Resolved, rewards: dict[str, Resolved]) -> Resolved | None:
    """Return the reward model that the value model starts from; None when it starts elsewhere."""
    if stage.value != "reward":
        return None
    (source,) = [reward for reward in rewards.values() if reward.function is None]  # the stage's fields see to it
    if stage.tuning == "lora" and not joins(stage.tuning, policy, source):
        mine, theirs = policy.plain, source.plain
        why = f"{source.ref} is whole weights"
        if source.adapter is not None:
            why = (
                f"{source.ref} is an adapter of {theirs.hub or theirs.ref}, the policy's base is {mine.hub or mine.ref}"
            )
        raise AlignError(
            f"value: reward starts the value model from the one reward model on the policy's base, and {why}; write "
            "value: fresh (it starts from the policy) or value: shared (a head on the policy)"
        )
    return source


def _value(stage: Settings, model: Any, policy: Resolved, source: Resolved | None) -> tuple[Any, nn.Linear]:
    """Return who the value model is (an adapter's name, a model, or None for the policy's trunk) and its head."""
    size = _inner(model).config.get_text_config().hidden_size
    head = nn.Linear(size, 1, bias=False, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    if stage.value == "shared":
        return None, head
    if stage.tuning == "full":
        if source is None:
            return models.load_causal(policy, dtype=torch.float32), head
        value = models.load_reward(source, dtype=torch.float32)
        inner = value.merge_and_unload() if hasattr(value, "peft_config") else value
        head.weight.data.copy_(inner.score.weight.float())
        return inner, head
    if source is not None:
        head.weight.data.copy_(models.graft(model, "value", source).float())
    elif policy.adapter is not None:
        models.graft(model, "value", policy)
    else:
        models.add_fresh_adapter(model, "value", stage.seed + 1)
    return "value", head


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trunk(model: Any) -> Any:
    inner = _inner(model)
    return getattr(inner, inner.base_model_prefix)


def _no_dropout(model: nn.Module) -> None:
    """Switch dropout off: a ratio of probabilities must be 1 where nothing was learnt."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


# --- the reward model on the shared base ------------------------------------------------------------------------------


class AdapterScorer:
    """A reward model whose adapter lies on the policy's base, proven to give the scores that its stage stored."""

    def __init__(self, actors: Actors, adapter: str, head: Tensor, source: Resolved, micro_batch: int | None) -> None:
        self.actors, self.adapter, self.source = actors, adapter, source
        self.head = head.to(actors.device)
        self.micro_batch = micro_batch or 16
        models.check_reference_scores(self.score_ids, actors.model.dtype, source)

    def score(self, asked: Sequence[Asked], answers: Answers) -> Scores:
        rows = [[*question.ids, *answer.ids] for question, row in zip(asked, answers, strict=True) for answer in row]
        return in_shape(self.score_ids(rows), answers)

    def score_ids(self, rows: Sequence[Ids]) -> list[float]:
        """Return one score a row of token ids, read at the row's last token."""
        scores = [0.0] * len(rows)
        budget = self.micro_batch * max(map(len, rows))
        model = self.actors.model
        model.set_adapter(self.adapter)
        try:
            with torch.no_grad():
                for group in token_micro_batches([len(row) for row in rows], budget):
                    hidden = hidden_states(_trunk(model), right_pad([rows[i] for i in group], self.actors.device))
                    last = hidden[range(len(group)), [len(rows[i]) - 1 for i in group]]  # (B, H)
                    found = last.to(self.head.dtype) @ self.head.squeeze(0)
                    for row, value in zip(group, found.float().tolist(), strict=True):
                        scores[row] = value
        finally:
            model.set_adapter(ADAPTER)
            self.actors.freeze_all_but_trained()
        return scores
