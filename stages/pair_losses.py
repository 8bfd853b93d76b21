"""Losses of single pairs: what a weight multiplies, and conservative DPO.

TRL's DPO trainer takes the mean of a loss before anybody can weigh its pairs, and its sigmoid loss ignores
`label_smoothing`. So where a stage asks for one of the two, the losses are computed here, pair by pair, from what TRL's
own forward passes found; everything else (references, metrics, checkpoints) stays TRL's.

A step minimises sum(w_i * loss_i) / (n * mean w): n is the pairs of the global batch, the mean goes over all pairs that
are trained on. So weights that are all alike change nothing, whatever they are; every step is an unbiased estimate of
the weighted mean sum(w * loss) / sum(w) over the rows, and a light pair moves little, even alone in its batch. Divided
by its own sum of weights instead, a batch of one would make every weight 1. What is logged is a step's weighted mean,
sum(w_i * loss_i) / sum(w_i), which is ln 2 at the start of DPO and can be compared from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_OF_A_PAIR = {
    "sft": "is a mean over the tokens of a batch",
    "aot": "sorts the pairs of a batch",
    "aot_unpaired": "sorts the answers of a batch",
}
"""TRL's losses that no single pair has, and why."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """Of each pair the log-ratios log policy(answer) - log reference(answer), and the tokens of both answers."""

    chosen: Any
    rejected: Any
    chosen_tokens: Any
    rejected_tokens: Any


def pair_losses(name: str, ratios: Ratios, *, beta: float, smoothing: float, tau: float) -> Any:
    """Return a loss of each pair, in TRL's words and with its constants; `tau` is DiscoPOP's temperature.

    With smoothing, sigmoid is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences & relationship to
    IPO", equation 3): -(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h), where h is beta times the difference of the
    log-ratios. Its gradient is 0 where sigmoid(h) = 1 - eps: what is wrong with probability eps is learnt no further.
    """
    import torch
    from torch.nn.functional import logsigmoid

    up, down = beta * ratios.chosen, beta * ratios.rejected
    h = up - down
    clean, flipped = -logsigmoid(h), -logsigmoid(-h)
    mean_up, mean_down = ratios.chosen / ratios.chosen_tokens, ratios.rejected / ratios.rejected_tokens
    match name:
        case "sigmoid":
            return (1 - smoothing) * clean + smoothing * flipped if smoothing else clean
        case "robust":
            return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
        case "hinge":
            return torch.relu(1 - h)
        case "ipo":
            return (mean_up - mean_down - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":
            return -logsigmoid(beta * (mean_up - mean_down))
        case "exo_pair":
            right = torch.sigmoid(h) * (-clean - math.log1p(-smoothing))
            return right + torch.sigmoid(-h) * (-flipped - math.log(smoothing))
        case "nca_pair":
            return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)
        case "bco_pair":
            return -logsigmoid(up) - logsigmoid(-down)
        case "sppo_hard":
            return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(up) + torch.sigmoid(down)
        case "apo_down":
            return torch.sigmoid(up) + 1 - torch.sigmoid(h)
        case "discopop":
            mix = torch.sigmoid(h / tau)
            return clean * (1 - mix) + torch.exp(-h) * mix
    raise ValueError(f"{name} is no loss of a pair")


def pair_loss_trainer(base: type[Any], train: Any, held_out: Any) -> type[Any]:
    """Return TRL's DPO trainer `base` with the losses of this file, for these tables.

    A column `weight` of the tables weighs the pairs; each table's weights are divided by their mean.
    """
    mean, held_out_mean = mean_weight(train), mean_weight(held_out)

    class PairLossTrainer(base):  # type: ignore[misc]
        _step_weight: float | None = None
        """The mean weight of the step's pairs, over all ranks."""

        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            # From here on each batch has the reference's log-probs beside it, see `compute_loss`.
            self.precompute_ref_logps = True
            if mean is not None:
                self.data_collator = _Weighed(self.data_collator, mean)

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*{*self._signature_columns, "weight"}]

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            import torch

            from align_pipeline.stages.dealing import ROWS

            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            if mean is not None and batches:
                counting = [batch["weight"] for batch in batches if batch[ROWS]]
                weights = [sum(float(one.sum()) for one in counting), float(sum(map(len, counting)))]
                sums = torch.tensor(weights, device=self.accelerator.device)
                total, pairs = self.accelerator.reduce(sums, "sum").tolist()
                self._step_weight = total / pairs
            return batches, items

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = dict(inputs)
            weights = inputs.pop("weight", None)
            if weights is not None and not self.model.training:
                weights = weights * (mean / held_out_mean)
            if "ref_chosen_logps" not in inputs:
                reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
            seen: list[Any] = []

            def watched(**given: Any) -> Any:
                seen.append(model(**given))
                return seen[-1]

            found = super().compute_loss(watched, inputs, return_outputs, num_items_in_batch)
            loss = self._weighed_loss(_ratios(seen[0].log_probs, inputs), weights)
            if self.aux_loss_enabled:
                loss = loss + self.router_aux_loss_coef * seen[0].aux_loss
            return (loss, found[1]) if return_outputs else loss

        def _weighed_loss(self, ratios: Ratios, weights: Any) -> Any:
            how = {"beta": self.beta, "smoothing": self.label_smoothing, "tau": self.args.discopop_tau}
            loss = 0.0
            for name, share in zip(self.loss_types, self.loss_weights, strict=True):
                each = pair_losses(name, ratios, **how)
                loss = loss + share * (each if weights is None else weights * each).mean()
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and self._step_weight:
                logs["loss"] /= self._step_weight
            super().log(logs, start_time)

    PairLossTrainer.__name__ = base.__name__
    return PairLossTrainer


def mean_weight(table: Any) -> float | None:
    """Return the mean of a table's weights; None for a table that has none."""
    if table is None or "weight" not in table.column_names:
        return None
    return math.fsum(table["weight"][:]) / len(table)


@dataclass(frozen=True)
class _Weighed:
    """A collator whose batches hold each pair's weight, divided by `mean`."""

    collate: Any
    mean: float

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        return {**self.collate(rows), "weight": torch.tensor([row["weight"] / self.mean for row in rows])}


def _ratios(log_probs: Any, inputs: Mapping[str, Any]) -> Ratios:
    """Return the log-ratios of a batch whose first half is chosen, from log-probs that are 0 outside the answers."""
    mask = inputs["completion_mask"]
    # Prompt-learning adapters put tokens of their own in front.
    chosen, rejected = log_probs[:, 1 - mask.size(1) :].sum(dim=1).chunk(2)
    chosen_tokens, rejected_tokens = mask.sum(dim=1).clamp(min=1).chunk(2)
    return Ratios(
        chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"], chosen_tokens, rejected_tokens
    )
