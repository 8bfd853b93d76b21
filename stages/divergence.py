"""What is computed from weights: how well a model predicts text, and how far it is from another one.

KL is exact at each position, summed over the vocabulary and then over the answer's tokens, and averaged over the
model's own answers: the estimate that only reads the drawn token has the same mean and many times the variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt ids, answer ids)."""

LOGIT_BYTES = 2**28
"""What the logits of one forward pass may take, in float32; one row always fits."""


def document_nats(model: Any, documents: Sequence[list[int]], micro_batch: int | None) -> list[float]:
    """Return for each document the negative log-likelihood of all its tokens that follow another one, in nats."""
    from align_pipeline.stages.models import completion_log_probs

    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    found = completion_log_probs(model, [(documents[i][:1], documents[i][1:]) for i in order], micro_batch or 8)
    nats = [0.0] * len(documents)
    for i, row in zip(order, found, strict=True):
        nats[i] = -float(row.double().sum())
    return nats


def kl(model: Any, baseline: Any, rows: Rows, temperature: float, micro_batch: int | None) -> list[float]:
    """Return for each row sum over t of KL(model(. | prompt, answer[:t]) || baseline(. | same)), in nats."""
    import torch

    found = [0.0] * len(rows)
    for batch in batches(model, rows, micro_batch):
        with torch.inference_mode():
            own = _answer_logits(model, [rows[i] for i in batch])  # (b, C, V)
            other = _answer_logits(baseline, [rows[i] for i in batch])  # (b, C, V)
            for i, mine, theirs in zip(batch, own, other, strict=True):
                count = len(rows[i][1])
                # Left padding: an answer's tokens are the last ones of its row.
                found[i] = float(_row_kl(mine[-count:], theirs[-count:], temperature)) if count else 0.0
    return found


def batches(model: Any, rows: Rows, micro_batch: int | None) -> list[list[int]]:
    """Return row numbers in batches of like length: `micro_batch` rows, or as many as LOGIT_BYTES allows."""
    lengths = [(len(answer), len(prompt)) for prompt, answer in rows]
    width = 4 * model.config.get_text_config().vocab_size
    found: list[list[int]] = [[]]
    for i in sorted(range(len(rows)), key=lambda i: lengths[i]):
        # Sorted, so this row is the longest so far and pads the others to its length.
        most = micro_batch or max(1, LOGIT_BYTES // (width * (lengths[i][0] + 1)))
        if len(found[-1]) >= most:
            found.append([])
        found[-1].append(i)
    return found


def _answer_logits(model: Any, rows: Rows) -> torch.Tensor:
    """Return the logits that predict the answers' tokens, (b, C, V): left-padded, C the longest answer."""
    from align_pipeline.stages.rollout import left_pad

    longest = max(len(answer) for _, answer in rows)
    device = next(model.parameters()).device
    ids, mask = left_pad([[*prompt, *answer] for prompt, answer in rows], 0, device)  # (b, T)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1
    ).logits
    return logits[:, -longest - 1 : -1]


def _row_kl(mine: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the KL of two rows of logits, both (C, V), summed over positions; float32 for one row at a time."""
    own = (mine.float() / temperature).log_softmax(-1)
    other = (theirs.float() / temperature).log_softmax(-1)
    return (own.exp() * (own - other)).sum(-1).double().sum()
