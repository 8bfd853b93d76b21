"""Language modelling on plain documents: a small model from nothing, or more training of one that exists.

From nothing means a Llama of the given shape and a byte-level BPE tokenizer learnt from the training documents, with
ChatML's markers, so that every later stage finds what it needs. Each document ends with `<|endoftext|>`; one that is
longer than `max_length` becomes several rows, so that nothing is cut off.
Left out: everything that pretraining at scale needs (streaming, mixtures, sharded optimizers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align_pipeline.data.rows import Task
from align_pipeline.pipeline.stage import Config, Inputs, Kind, Metrics, Model, Work
from align_pipeline.stages import reading, training
from align_pipeline.stages.sft import SFT
from align_pipeline.stages.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PAD)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML; what the assistant writes, its end token included, is marked as such."""


class Architecture(Config):
    """The shape of a new Llama."""

    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(2, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, a divisor of `heads`; None: as many as `heads`."""
    head_dim: int | None = Field(None, ge=2)
    """Size of a head; None: hidden_size / heads. vLLM wants 32, 64, 80, 96 or 128."""
    intermediate_size: int | None = Field(None, ge=8)
    """Width of the feed-forward layers; None: 8/3 of hidden_size, rounded up to a multiple of 32."""
    max_positions: int = Field(256, ge=8)
    """Tokens that the model can read, prompt and answer together."""
    tie_embeddings: bool = True
    """Use one matrix for input and output tokens."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the first weights; a narrow model learns faster with 0.05."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if (self.head_dim or self.hidden_size // self.heads) % 2:
            raise ValueError("head_dim must be even: rotary positions turn pairs of numbers")
        return self


class NewTokenizer(Config):
    """A tokenizer learnt from the training documents."""

    vocab_size: int = Field(1024, ge=256 + len(SPECIAL_TOKENS))
    """Tokens: 256 bytes, 4 special ones, the rest merges; fewer when the text has not that many pairs."""


class Pretrain(Training):
    """Train on plain documents: a new small model, or an existing one."""

    produces: ClassVar[Kind] = "model"
    starts_from: ClassVar[str] = "model"
    trainer_config: ClassVar[tuple[str, str]] = ("trl.trainer.sft_config", "SFTConfig")
    owned: ClassVar[Mapping[str, str]] = {name: "" if ours == "loss_on" else ours for name, ours in SFT.owned.items()}

    version: ClassVar[int] = 2
    reads: ClassVar[Task] = "text"
    held_out_metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    also_measured: ClassVar[tuple[str, ...]] = ("train_loss", "documents", "vocabulary", "parameters")

    type: Literal["pretrain"] = "pretrain"
    model: Model | None = None
    """The model to go on training; the pipeline's top-level `model` unless there is an `architecture`."""
    architecture: Architecture | None = None
    """The shape of a new model."""
    tokenizer: NewTokenizer | None = None
    """The new model's tokenizer."""
    tuning: Literal["lora", "full"] = "full"
    """Train whole weights, or an adapter (an existing model only)."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate. A new model of a few million parameters takes 3e-3, an existing one 3e-5."""
    packing: bool = False
    """Put several short documents into one sequence of `max_length`, kept apart exactly."""

    @classmethod
    def inherit(cls, given: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
        found = super().inherit(given, top)
        if "architecture" not in given:
            return found
        # A new model starts from nothing and is trained whole, whatever the rest of the pipeline does.
        return {name: value for name, value in found.items() if name not in ("model", "tuning", "lora", "quantize")}

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.architecture is None and self.model is None:
            raise ValueError("nothing to train: give `architecture:` for a new model or `model:` for one that exists")
        if self.architecture is not None and self.model is not None:
            raise ValueError("architecture and model exclude each other: a new model starts from nothing")
        if self.tokenizer is not None and self.architecture is None:
            raise ValueError("tokenizer is for a new model, one that exists keeps its own; remove it")
        if self.architecture is not None and (self.tuning != "full" or self.quantize is not None):
            raise ValueError("a new model is trained whole; remove tuning and quantize")
        return self

    @property
    def draws(self) -> bool:
        return super().draws or self.lora.dropout > 0

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.stages.models import load_trainable, local_path, save_model
        from align_pipeline.stages.rollout import context
        from align_pipeline.stages.sft import causal_trainer, losses

        model: Any
        if self.architecture is not None:
            settings = self.tokenizer or NewTokenizer()
            tokenizer = train_tokenizer(self._texts(inputs), settings.vocab_size)
            if "chat_template" in inputs:
                tokenizer.chat_template = local_path(inputs["chat_template"]).read_text("utf-8")
            documents = training.prepare(self, inputs, tokenizer, work, cut=False)
            model = new_model(self.architecture, tokenizer, self.seed)
        else:
            tokenizer = training.load_tokenizer(inputs, "model")
            documents = training.prepare(self, inputs, tokenizer, work, cut=False)
            model = load_trainable(
                inputs["model"], tuning=self.tuning, lora=self.lora, quantize=self.quantize, seed=self.seed
            )
        length = min(self.max_length, context(model) or self.max_length)
        train = pieces(documents.train, length)
        rows = training.Rows(
            train, pieces(documents.held_out, length), sum(len(row["input_ids"]) for row in train), truncated=0
        )
        trainer = causal_trainer(self, model, tokenizer, rows, work, length if self.packing else None)
        curve = training.fit(trainer, self, work)
        if not trainer.is_world_process_zero():
            return {}
        # Whole weights have no base; an adapter's is the model that it was trained on.
        save_model(model, tokenizer, work.out, inputs.get("model") or next(iter(inputs.values())))
        return {
            **losses(model, rows),
            "documents": float(len(documents.train)),
            "vocabulary": float(len(tokenizer)),
            "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
            **training.facts(rows, trainer, curve),
        }

    def _texts(self, inputs: Inputs) -> Iterator[str]:
        """Yield the documents that are trained on, for the tokenizer to learn from."""
        from align_pipeline.data.load import split
        from align_pipeline.data.rows import Text

        given = reading.sources(inputs, "data", format=self.format, columns=self.columns)
        documents = [row for source in given for row in source.scan(self.reads) if isinstance(row, Text)]
        held_out = self.held_out if self.evaluation is None else 0.0
        yield from (document.text for document in split(documents, held_out)[0])


def pieces(documents: Iterable[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """Return encoded documents as rows of at most `length` tokens; of a long one the rows follow each other."""
    found = [
        row["input_ids"][start : start + length]
        for row in documents
        for start in range(0, len(row["input_ids"]), length)
    ]
    # A piece of one token predicts nothing.
    return [{"input_ids": piece, "labels": list(piece)} for piece in found if len(piece) > 1]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer (Sennrich et al. 2016) learnt from texts, with ChatML's markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Markers that stand in the text must not be learnt as merges of their characters.
    markers = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.train_from_iterator(
        (part for text in texts for part in markers.split(text)),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: Architecture, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return a Llama of this shape with random weights in float32, drawn from `seed`."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, set_seed

    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.heads,
        intermediate_size=shape.intermediate_size or math.ceil(shape.hidden_size * 8 / 3 / 32) * 32,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=shape.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    ends = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model  # type: ignore[no-any-return]
