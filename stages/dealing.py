"""Rows dealt to processes, so that neither their number nor the rows of a forward pass change what is learnt.

One optimizer step is one call of `training_step`: its rows are dealt to the processes, and each takes its share in as
many forward passes as it needs. Every row of a step weighs the same (with a likelihood: every token), wherever it lies;
Trainer and TRL take means of the means of unequal shares, and fill up a last, smaller step with rows from the front.

TRL gathers numbers of every pass over the processes, so all of them make the same passes. Where rows do not divide
evenly, those left over get a pass of their own, and a process without one repeats another's, which then weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

ROWS = "rows"
"""Of a pass, how many of its rows count: all, or none."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of one process: the numbers of its rows, and whether they only keep it in step with others."""

    rows: tuple[int, ...]
    idle: bool = False


def deal(rows: Sequence[int], size: int, rank: int, ranks: int) -> list[Pass]:
    """Return what one process takes of a step: as many passes of as many rows as every other one, `size` at most."""
    each, left = divmod(len(rows), ranks)
    passes = []
    for start in range(0, each, size):
        together = rows[start * ranks : min(start + size, each) * ranks]  # what all processes take at the same time
        share = len(together) // ranks
        passes.append(Pass(tuple(together[rank * share : (rank + 1) * share])))
    if left:
        passes.append(Pass((rows[each * ranks + min(rank, left - 1)],), idle=rank >= left))
    return passes


def deal_to_judge(rows: Sequence[int], size: int, rank: int, ranks: int, last: int) -> Iterator[Pass]:
    """Yield the passes of one process over held-out rows; those left over are read by all, `last` at most at a time."""
    whole = len(rows) - len(rows) % (size * ranks)
    for start in range(rank * size, whole, size * ranks):
        yield Pass(tuple(rows[start : start + size]))
    for start in range(whole, len(rows), last):
        yield Pass(tuple(rows[start : start + last]), idle=rank > 0)


@dataclass
class Steps:
    """The batch sampler of a process: for each optimizer step of an epoch, its passes."""

    count: int
    batch_size: int
    size: int
    rank: int
    ranks: int
    seed: int | None
    """Of the order of the rows, drawn anew for each epoch; None for the order in which they stand."""
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[list[Pass]]:
        order = list(range(self.count))
        if self.seed is not None:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.count, self.batch_size):
            yield deal(order[start : start + self.batch_size], self.size, self.rank, self.ranks)


@dataclass(frozen=True)
class _Passes:
    """A table from which passes are taken whole."""

    table: Any
    collate: Any

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, one: Pass) -> dict[str, Any]:
        batch = dict(self.collate([self.table[row] for row in one.rows]))
        if one.idle and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return {**batch, ROWS: 0 if one.idle else len(one.rows)}


class _Loader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def dealt_trainer(base: type[Any], batch_size: int, *, together: bool = False) -> type[Any]:
    """Return a TRL trainer that takes our token ids as they are, and `batch_size` rows a step, dealt out as above.

    `together`: what all processes read at the same time belongs together (KTO's KL term), so held-out rows that are
    left over are read in one pass.
    """

    class DealtTrainer(base):  # type: ignore[misc]
        _rows_in_step: float = 0.0
        """Over all processes."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            args = self.args
            size = args.per_device_train_batch_size
            seed = None if args.train_sampling_strategy == "sequential" else args.data_seed
            steps = Steps(len(self.train_dataset), batch_size, size, args.process_index, args.world_size, seed)
            return self._loader(self.train_dataset, steps, "Training")

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            args, table = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
            size, ranks = args.per_device_eval_batch_size, args.world_size
            last = size * ranks if together else size
            passes = deal_to_judge(range(len(table)), size, args.process_index, ranks, last)
            return self._loader(table, [[one] for one in passes], "Evaluation")

        def _loader(self, table: Any, passes: Any, description: str) -> Any:
            from transformers.trainer_utils import seed_worker

            args = self.args
            return _Loader(
                _Passes(self._remove_unused_columns(table, description), self.data_collator),  # type: ignore[arg-type]
                batch_sampler=passes,
                collate_fn=list,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                persistent_workers=args.dataloader_persistent_workers,
                multiprocessing_context=args.dataloader_multiprocessing_context,
                prefetch_factor=args.dataloader_prefetch_factor,
                in_order=args.dataloader_in_order,
                worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            )

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            passes = next(epoch_iterator)
            batches, items = super().get_batch_samples(iter(passes), len(passes), device)
            return [batches], items

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            """Take the gradient of all passes of a step."""
            self.current_gradient_accumulation_steps = len(inputs)
            idle = sum(_tokens(one) for one in inputs if not one[ROWS])
            sums = torch.tensor([sum(one[ROWS] for one in inputs), idle], device=self.accelerator.device)
            self._rows_in_step, idle = self.accelerator.reduce(sums.double(), "sum").tolist()
            self._total_train_tokens -= int(idle)
            loss = torch.zeros((), device=self.accelerator.device)
            for number, one in enumerate(inputs, 1):
                with nullcontext() if number == len(inputs) else self.accelerator.no_sync(model):
                    loss = loss + super().training_step(model, one, num_items_in_batch)
            return loss

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            rows = inputs.pop(ROWS)
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs or not self.model.training or "labels" in inputs:
                return loss  # TRL divides a likelihood by the tokens of the step
            # Trainer divides by the number of passes afterwards, and the processes' gradients are averaged.
            passes, ranks = self.current_gradient_accumulation_steps, self.args.world_size
            return loss * (rows * passes * ranks / self._rows_in_step)

        def evaluation_loop(
            self,
            dataloader: Any,
            description: str,
            prediction_loss_only: bool | None = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> Any:
            """Return the mean loss of the held-out rows; of a likelihood, that of their tokens."""
            from transformers.trainer_utils import EvalLoopOutput

            model = self._wrap_model(self.model, training=False)
            model.eval()
            found = []
            for (one,) in dataloader:
                loss, _, _ = self.prediction_step(model, one, prediction_loss_only=True)
                weight = int((one["labels"][..., 1:] != -100).sum()) if "labels" in one else one[ROWS]
                found.append(torch.stack([loss.double(), torch.tensor(float(weight), device=loss.device)]))
            losses, weights = self.accelerator.gather(torch.stack(found)).T
            mean = float((losses * weights).sum() / weights.sum())
            return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, len(dataloader.dataset))

        def floating_point_ops(self, inputs: Any) -> Any:
            return sum(super(DealtTrainer, self).floating_point_ops(one) for one in inputs)

        def _track_num_input_tokens(self, inputs: Any) -> None:
            for one in inputs:
                super()._track_num_input_tokens(one)

    DealtTrainer.__name__ = base.__name__
    return DealtTrainer


def _tokens(batch: Mapping[str, Any]) -> int:
    """Return what TRL counts as the tokens of a batch; sequences that are packed have no mask."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else int(batch["position_ids"].size(1))
