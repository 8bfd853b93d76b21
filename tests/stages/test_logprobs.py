"""Chosen log-probs against log_softmax, gather and autograd on whole logits; and that no whole logits are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from align_pipeline.stages import logprobs
from align_pipeline.stages.logprobs import Scaling, chosen_log_probs

COUNT, WIDTH, VOCABULARY = 37, 16, 101
SCALINGS = [
    Scaling(),
    Scaling(factor=0.3),
    Scaling(cap=5.0),
    Scaling(temperature=0.7),
    Scaling(factor=1.7, cap=5.0),
    Scaling(factor=2.5, temperature=1.6),
    Scaling(cap=3.0, temperature=0.5),
    Scaling(factor=0.6, cap=4.0, temperature=1.3),
]


@pytest.fixture(params=[2**24, 7 * VOCABULARY + 5, 1], ids=["whole", "chunks of 7", "one by one"])
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the size of a chunk; seven does not divide the number of tokens."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", request.param)
    return int(request.param)


def problem(bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """Return states (N, H), targets (N,), a head, and what comes from above, (N,) with a zero in it."""
    torch.manual_seed(0)
    states = torch.randn(COUNT, WIDTH, dtype=dtype)
    targets = torch.randint(VOCABULARY, (COUNT,))
    above = torch.randn(COUNT)
    above[3] = 0
    return states, targets, nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype), above


def logits_by_definition(products: Tensor, scaling: Scaling) -> Tensor:
    logits = products * scaling.factor
    if scaling.cap is not None:
        logits = torch.tanh(logits / scaling.cap) * scaling.cap
    return logits / scaling.temperature


def by_definition(
    states: Tensor, targets: Tensor, head: nn.Linear, scaling: Scaling, above: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return log-probs, entropies, and the gradients of sum(above * log-probs), all in float64."""
    read = {"states": states, **dict(head.named_parameters())}
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in read.items()}
    products = nn.functional.linear(leaves["states"], leaves["weight"], leaves.get("bias"))
    logs = logits_by_definition(products, scaling).log_softmax(-1)
    chosen = logs.gather(-1, targets[:, None]).squeeze(-1)
    (chosen * above.double()).sum().backward()
    return chosen.detach(), -(logs.exp() * logs).sum(-1).detach(), {name: leaf.grad for name, leaf in leaves.items()}


def within(found: Tensor, expected: Tensor, bar: float) -> bool:
    """Tell whether numbers are right to `bar`, times their size where that is over 1: float32 rounds to 1e-7."""
    assert found.shape == expected.shape
    return bool(((found - expected).abs() <= bar * expected.abs().clamp(min=1)).all())


def relative(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_values_and_gradients_are_those_of_whole_logits(
    scaling: Scaling, trained: bool, bias: bool, in_chunks: int
) -> None:
    states, targets, head, above = problem(bias)
    expected, entropies, gradients = by_definition(states, targets, head, scaling, above)
    head.requires_grad_(trained)
    states.requires_grad_()
    found, entropy = chosen_log_probs(states, targets, head, scaling)
    assert found.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    (found * above).sum().backward()
    assert within(found, expected, 1e-6)
    assert within(entropy, entropies, 1e-6)
    assert relative(states.grad, gradients.pop("states")) <= 1e-5
    assert not states.grad[3].any(), "nothing came from above for this token"
    for name, parameter in head.named_parameters():
        if trained:
            assert relative(parameter.grad, gradients[name]) <= 1e-5, name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_head_in_float64_gets_what_float32_logits_allow(scaling: Scaling) -> None:
    """Logits are float32 whatever the head is, so 1e-6 is within reach and 1e-10 is not."""
    states, targets, head, above = problem(bias=True, dtype=torch.float64)
    expected, _, gradients = by_definition(states, targets, head, scaling, above)
    states.requires_grad_()
    found, _ = chosen_log_probs(states, targets, head, scaling)
    (found * above).sum().backward()
    assert within(found, expected, 1e-6)
    for name, tensor in {"states": states, **dict(head.named_parameters())}.items():
        assert tensor.grad.dtype == torch.float64
        assert relative(tensor.grad, gradients[name]) <= 1e-6, name


def test_states_get_gradients_in_the_dtype_they_came_in() -> None:
    states, targets, head, above = problem()
    expected, _, gradients = by_definition(states.bfloat16(), targets, head, Scaling(), above)
    states = states.bfloat16().requires_grad_()
    found, _ = chosen_log_probs(states, targets, head)
    (found * above).sum().backward()
    assert within(found, expected, 1e-6)
    assert states.grad.dtype == torch.bfloat16
    assert relative(states.grad, gradients["states"]) <= 2**-8


def test_a_head_that_is_also_the_embedding_gets_both_gradients(in_chunks: int) -> None:
    _, targets, head, above = problem()
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight = head.weight
    read = torch.randint(VOCABULARY, (COUNT,))

    found, _ = chosen_log_probs(embedding(read).tanh(), targets, head)
    (found * above).sum().backward()
    whole = head.weight.detach().double().requires_grad_()
    logs = (whole[read].tanh() @ whole.T).log_softmax(-1)
    (logs[torch.arange(COUNT), targets] * above.double()).sum().backward()
    assert relative(head.weight.grad, whole.grad) <= 1e-5


def test_a_trained_head_learns_from_frozen_states() -> None:
    states, targets, head, above = problem(bias=True)
    _, _, gradients = by_definition(states, targets, head, Scaling(), above)
    found, _ = chosen_log_probs(states, targets, head)
    (found * above).sum().backward()
    assert states.grad is None
    assert relative(head.weight.grad, gradients["weight"]) <= 1e-5
    assert relative(head.bias.grad, gradients["bias"]) <= 1e-5


def test_uniform_and_certain_distributions() -> None:
    """By hand: ln V nats where all logits are equal, none where one token is certain."""
    head = nn.Linear(1, 4, bias=False)
    head.weight.data = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    found, entropy = chosen_log_probs(torch.tensor([[0.0], [200.0], [200.0]]), torch.tensor([2, 0, 1]), head)
    ln4 = 1.3862943611198906
    assert found.tolist() == pytest.approx([-ln4, 0.0, -200.0], abs=1e-6)
    assert entropy.tolist() == pytest.approx([ln4, 0.0, 0.0], abs=1e-6)


def test_no_tokens_have_no_log_probs() -> None:
    head = nn.Linear(WIDTH, VOCABULARY)
    states = torch.zeros(0, WIDTH, requires_grad=True)
    found, entropy = chosen_log_probs(states, torch.zeros(0, dtype=torch.long), head)
    found.sum().backward()
    assert found.shape == entropy.shape == (0,)
    assert not head.weight.grad.any()


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def large(trained: bool) -> tuple[Tensor, Tensor, nn.Linear]:
    """Return a problem whose logits (300, 1000) are the largest thing by far."""
    torch.manual_seed(0)
    head = nn.Linear(8, 1000).requires_grad_(trained)
    return torch.randn(300, 8, requires_grad=True), torch.randint(1000, (300,)), head


def saved_elements(make: Callable[[], Tensor]) -> list[int]:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make().sum().backward()
    return sizes


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.6, 4.0, 1.3)], ids=str)
def test_no_logits_are_saved_for_the_backward_pass(trained: bool, scaling: Scaling) -> None:
    states, targets, head = large(trained)
    sizes = saved_elements(lambda: chosen_log_probs(states, targets, head, scaling)[0])
    assert sizes, "something is saved"
    assert max(sizes) <= max(300 * 8, 1000 * 8)
    naive = saved_elements(lambda: head(states).log_softmax(-1).gather(-1, targets[:, None]))
    assert max(naive) == 300 * 1000, "the hook should see logits where they are kept"


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.6, 4.0, 1.3)], ids=str)
def test_no_more_logits_than_a_chunk_are_ever_made(
    trained: bool, scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 20_500)  # 20 tokens
    states, targets, head = large(trained)
    with Largest() as largest:
        chosen_log_probs(states, targets, head, scaling)[0].sum().backward()
    assert largest.elements == 20 * 1000


def test_nothing_is_saved_where_no_gradient_is_asked_for() -> None:
    states, targets, head, _ = problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing), torch.no_grad():
        found, _ = chosen_log_probs(states, targets, head)
    assert not found.requires_grad
    assert not saved
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        chosen_log_probs(states, targets, head)
    assert saved, "the hook should see what is kept where gradients are asked for"


# --- the scalings of model families -----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("HyperCLOVAX", {"logits_scaling": 4.0}),
        ("RecurrentGemma", {"logits_soft_cap": 2.0, "block_types": ["attention"], "lru_width": 32}),
        (
            "FalconH1",
            {
                "lm_head_multiplier": 3.0,
                "mamba_d_ssm": 32,
                "mamba_n_heads": 4,
                "mamba_d_head": 8,
                "mamba_d_state": 8,
                "mamba_n_groups": 1,
            },
        ),
    ],
)
def test_the_scalings_are_those_of_the_model_itself(family: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SMALL | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(1, 50, (1, 12))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
        states = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        plain = model.get_output_embeddings()(states)
        found, _ = chosen_log_probs(states, ids[0, 1:], model.get_output_embeddings(), Scaling.of(config, 0.7))
    assert changes == {} or (plain - logits).abs().max() > 0.01, "this family should change its logits"
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    assert within(found, expected, 1e-5)
