"""Supervised fine-tuning: learn to answer as the examples do.

The loss is the mean negative log-likelihood over the answers' tokens, the end of turn included, so that the model
learns to stop. Left out: losses other than likelihood (`train: {loss_type: dft}` has one), and learning a new
vocabulary: embeddings are never resized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.errors import AlignError
from align_pipeline.pipeline.stage import Inputs, Kind, Metrics, Model, Work
from align_pipeline.stages import training
from align_pipeline.stages.owned import OWNED
from align_pipeline.stages.reading import first
from align_pipeline.stages.training import Training


class SFT(Training):
    """Supervised fine-tuning on conversations, prompts with answers, or token ids."""

    produces: ClassVar[Kind] = "model"
    starts_from: ClassVar[str] = "model"
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.sft_config", "SFTConfig")
    owned: ClassVar[Mapping[str, str]] = {
        **OWNED,
        "packing": "packing",
        "packing_strategy": "packing",
        "eval_packing": "packing",
        "padding_free": "packing",
        "completion_only_loss": "loss_on",
        "assistant_only_loss": "loss_on",
        "dataset_text_field": "columns",
        "dataset_kwargs": "",
        "shuffle_dataset": "seed",
    }

    version: ClassVar[int] = 3
    reads: ClassVar[Task] = "sft"
    held_out_metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    also_measured: ClassVar[tuple[str, ...]] = ("train_loss",)

    type: Literal["sft"] = "sft"
    model: Model
    """The model to start from; the pipeline's top-level `model` by default."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Learn the assistant's words alone, or every token."""
    packing: bool = False
    """Put short rows together into sequences of `max_length`, kept apart exactly; batch_size then counts sequences."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the model's own layers; the adapter's is `lora.dropout`."""

    @property
    def draws(self) -> bool:
        return super().draws or self.dropout > 0 or self.lora.dropout > 0

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_trainable, save_model

        source = inputs["model"]
        tokenizer = training.load_tokenizer(inputs, "model")
        rows = training.prepare(self, inputs, tokenizer, work, self.loss_on)
        model = load_trainable(
            source,
            tuning=self.tuning,
            lora=self.lora,
            quantize=self.quantize,
            seed=self.seed,
            dropout=self.dropout,
        )
        trainer = self.trainer(model, tokenizer, rows, work)
        curve = training.fit(trainer, self, work)
        if not trainer.is_world_process_zero():
            return {}
        save_model(model, tokenizer, work.out, source)
        return {**losses(model, rows), **training.facts(rows, trainer, curve)}

    def trainer(self, model: Any, tokenizer: Any, rows: training.Rows, work: Work) -> Any:
        return causal_trainer(self, model, tokenizer, rows, work, self.max_length if self.packing else None)


def causal_trainer(
    stage: training.Training, model: Any, tokenizer: Any, rows: training.Rows, work: Work, packed: int | None
) -> Any:
    """Return TRL's trainer on rows of `input_ids` and `labels`, which it takes as they are.

    `packed` is the length of the sequences that several rows share; None: one row a sequence.
    """
    import trl

    train, held_out = training.tables(rows)
    if packed is not None:
        train = trl.pack_dataset(train, packed, strategy="bfd")
        check_packing(model, first(rows.train, 2))
    args = training.arguments(
        stage,
        work,
        trl.SFTConfig,
        train,
        held_out,
        max_length=None,
        padding_free=packed is not None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = training.trainer_class(trl.SFTTrainer, stage, work)
    return trainer(model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)


def losses(model: Any, rows: training.Rows) -> Metrics:
    """Return `loss` and `perplexity` on the held-out rows, if there are any, and `train_loss`."""
    found: Metrics = {}
    if len(rows.held_out):
        found["loss"] = mean_loss(model, rows.held_out)
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    # Enough rows to see whether the training set was learnt; more would only cost time.
    return {**found, "train_loss": mean_loss(model, first(rows.train, 256))}


def mean_loss(model: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean negative log-likelihood per learnt token of encoded rows."""
    from align_pipeline.stages.models import token_log_probs

    wanted = [[label != -100 for label in row["labels"]] for row in rows]
    found = token_log_probs(model, [row["input_ids"] for row in rows], wanted)
    return -sum(float(part.double().sum()) for part in found) / sum(len(part) for part in found)


def check_packing(model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a model whose layers look across the borders of packed rows, by trying it on two."""
    import torch

    if len(rows) < 2:
        return
    first, second = (torch.tensor(row["input_ids"], device=model.device) for row in rows[:2])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        packed = model(input_ids=torch.cat([first, second])[None], position_ids=positions[None], use_cache=False).logits
        alone = model(input_ids=second[None], use_cache=False).logits
    model.train(was_training)
    difference = (packed[0, len(first) :].float() - alone[0].float()).abs().max().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    if not difference <= tolerance:
        raise AlignError(
            f"packing: this model's answer to a row changes by {difference:.2g} when another row is packed before it "
            "(its attention does not keep rows apart); set packing: false"
        )
