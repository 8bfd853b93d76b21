"""How much memory a stage takes at most: arithmetic from its settings and the shape of its model, and nothing else.

What is held for the whole of a training (weights, adapters, gradients, optimizer, reference) is counted from the
parameters; what is held at once between a forward pass and its backward from the tensors that autograd keeps of each
layer, which `tests/pipeline/test_estimate.py` reads from autograd itself. Rows count as long as the stage allows, every
batch as padded. Left out: mixtures of experts, models that are not built like a Llama, and what an allocator wastes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align_pipeline.pipeline.stage import Launch, Stage
from align_pipeline.stages.divergence import LOGIT_BYTES
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.feedback import Feedback
from align_pipeline.stages.kto import KTO
from align_pipeline.stages.merge import Merge
from align_pipeline.stages.ppo import PPO
from align_pipeline.stages.pretrain import NewTokenizer, Pretrain
from align_pipeline.stages.reward import Reward
from align_pipeline.stages.rollout import CACHE_BYTES
from align_pipeline.stages.sample import Sample
from align_pipeline.stages.training import Training, Tuned, micro_batch

GIB = 2**30
FLOOR = 476 * 2**20
"""Python, torch, Transformers, TRL and datasets in a process on a CPU, before it holds a model; see docs/memory.md."""
KEPT = "what glibc keeps"
GLIBC = {"full": 0.12, "lora": 0.28}
"""Share of what a process on a CPU holds that its allocator keeps beside it; see docs/memory.md."""
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in 4 bits with double quantisation (Dettmers et al. 2023, section 3)."""
OPTIMIZER = {"sgd": 0.0, "adamw_8bit": 0.5, "adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5}
"""Size of an optimizer's state as a multiple of the trained weights, where it is not Adam's 2."""
POSITIONS_AT_ONCE, TOKENS_OF_VOCABULARY_AT_ONCE = 4096, 32768
"""Tile of logits that TRL's fused head makes at once (trl.kernels.chunked_logprob, trl.trainer.utils)."""
LOGITS_AT_ONCE = {False: 2**22, True: 2**26}
"""Numbers in a chunk of logits that `stages/logprobs.py` makes at once, by whether there is a GPU."""
PPO_TOKENS = {False: 1024, True: 4096}
"""Tokens of PPO's micro-batches where nobody named a number, by whether there is a GPU."""
ROWS_JUDGED, ROWS_SCORED, ROWS_SAMPLED = 8, 16, 256
"""Rows of a forward pass after training and of a scorer, and the most that are sampled at once."""

LIKE_LLAMA = {
    "llama": False, "mistral": False, "qwen2": False, "qwen3": False, "granite": False, "smollm3": True,
    "gemma": True, "gemma2": True, "gemma3_text": True,
}  # fmt: skip
"""Families whose layers are a Llama's up to norms and biases -> whether they tie embeddings unless they say so."""
QK_NORMS = ("qwen3", "gemma3_text")


class Unknown(Exception):
    """Why there is no estimate."""


def _size(config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """Return a size that a config.json gives, or `otherwise` where it gives none; raise Unknown for what is none."""
    value = config.get(name)
    if value is None and otherwise is not None:
        return otherwise
    if type(value) is not int or not 0 < value < 2**31:
        raise Unknown(
            f"config.json: {name} is {json.dumps(value)[:40]}, and must be a whole number of 1 to {2**31 - 1}"
        )
    return value


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's configuration that its memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int | None = None
    qk_norm: bool = False
    base: str = ""
    """Where the weights lie; an adapter has those of its base."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read the content of a config.json; raise Unknown for a model that is not built like a Llama."""
        family = config.get("model_type")
        if not isinstance(family, str):
            raise Unknown(f"config.json: model_type is {json.dumps(family)[:40]}, and must be the name of a family")
        if family not in LIKE_LLAMA or any("expert" in name and value for name, value in config.items()):
            raise Unknown(f"the layers of a {family} model are not known here ({', '.join(LIKE_LLAMA)} are)")
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        if hidden < heads and config.get("head_dim") is None:
            raise Unknown(f"config.json: hidden_size {hidden} is less than num_attention_heads {heads}")
        return cls(
            hidden=hidden,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden // heads),
            intermediate=_size(config, "intermediate_size"),
            vocabulary=_size(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", LIKE_LLAMA[family])),
            positions=_size(config, "max_position_embeddings", 0) or None,
            qk_norm=family in QK_NORMS,
        )

    @classmethod
    def made_by(cls, stage: Stage) -> Shape | None:
        """Return the shape of a model that a stage makes from nothing, its vocabulary at most; None for all others."""
        if not isinstance(stage, Pretrain) or stage.architecture is None:
            return None
        shape, tokenizer = stage.architecture, stage.tokenizer or NewTokenizer()
        return cls(
            hidden=shape.hidden_size,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads or shape.heads,
            head_dim=shape.head_dim or shape.hidden_size // shape.heads,
            intermediate=shape.intermediate_size or -(-shape.hidden_size * 8 // 96) * 32,
            vocabulary=tokenizer.vocab_size,
            tied=shape.tie_embeddings,
            positions=shape.max_positions,
        )

    @property
    def query(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> numbers in and out."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def in_linears(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    def parameters(self, *, head: bool = True) -> int:
        """Count all weights but biases; a reward model has no language head."""
        embeddings = self.vocabulary * self.hidden * (2 if head and not self.tied else 1)
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.layers * self.head_dim if self.qk_norm else 0)
        return self.in_linears + embeddings + norms


@dataclass(frozen=True)
class Machine:
    """What a stage runs on."""

    name: str
    memory: int
    """Bytes: of the GPU, or of the machine without one."""
    gpu: bool = False
    bf16: bool = False
    vllm: bool = False
    """Whether vLLM is installed beside a GPU."""

    @property
    def number(self) -> int:
        """Bytes of a number that a frozen model computes in."""
        return 2 if self.bf16 else 4


Parts = dict[str, float]
"""What is held at a stage's peak -> bytes."""


@dataclass(frozen=True)
class Estimate:
    """What a stage holds at its peak, on each of its devices."""

    parts: Parts

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The largest part that is the stage's own."""
        return max((name for name in self.parts if name not in ("Python", KEPT)), key=self.parts.__getitem__)


Shapes = Mapping[str, Shape]
"""Input field -> the shape of the model that it names."""


def holds_models(stage: Stage) -> bool:
    """Return whether a stage has a model in memory at all."""
    return isinstance(stage, Tuned | Evaluate | Sample | Merge) or (
        isinstance(stage, Feedback) and bool(stage.complete)
    )


def estimate(stage: Stage, shapes: Shapes, machine: Machine, launch: Launch) -> Estimate:
    """Return what a stage holds at its peak; raise Unknown where nothing can be said."""
    phases = _phases(stage, shapes, machine, launch)
    peak = Estimate(max(phases, key=lambda parts: sum(parts.values())))
    if machine.gpu:
        return peak
    held = {"Python": FLOOR, **peak.parts}
    held[KEPT] = GLIBC[getattr(stage, "tuning", "lora")] * sum(held.values())
    processes = launch.processes if stage.distributed else 1  # of one memory
    return Estimate({name: size * processes for name, size in held.items()})


def _phases(stage: Stage, shapes: Shapes, machine: Machine, launch: Launch) -> list[Parts]:
    """Return what is held in each part of a stage: it needs the largest of them."""
    match stage:
        case PPO():
            return [*_ppo(stage, shapes, machine, launch)]
        case Training():
            return [*_training(stage, shapes, machine, launch)]
        case Evaluate():
            first, *others = (shapes[f"models.{name}"] for name in stage.models)
            both = max((one.parameters() for one in others), default=0) + first.parameters()
            rows = stage.how.micro_batch or max(1, LOGIT_BYTES // (4 * first.vocabulary * stage.max_new_tokens))
            logits = float(stage.max_new_tokens * first.vocabulary * (2 * rows * machine.number + 16))
            held = {"weights of two models" if others else "weights": float(both * machine.number)}
            answers = _answering(first, machine, ROWS_SAMPLED, stage.how.micro_batch, stage.max_new_tokens)
            scores = _scoring(shapes.get("scorer"), stage, stage.max_new_tokens, machine)
            return [held | answers, held | {"logits": logits}, *scores]
        case Sample():
            return _answers(shapes, "policy", "scorer", stage, stage.max_new_tokens, machine)
        case Merge():
            return [{"weights in float32": 4.0 * shapes["model"].parameters()}]
        case Feedback() if stage.complete is not None:
            return _answers(shapes, "complete.policy", "complete.reward", stage, stage.complete.max_new_tokens, machine)
    raise Unknown(f"not worked out for {stage.type}")


# --- training ---------------------------------------------------------------------------------------------------------


def _training(stage: Training, shapes: Shapes, machine: Machine, launch: Launch) -> Iterator[Parts]:
    """Yield what is held while a stage learns, and while it judges afterwards."""
    shape, head = shapes[stage.starts_from or "model"], not isinstance(stage, Reward)
    size = micro_batch(stage, launch.processes, stage.kl_batch if isinstance(stage, KTO) else None)
    length = min(stage.max_length, shape.positions or stage.max_length)
    rows = size * (2 if stage.reads == "preference" else 1)
    held = _held(stage, shape, machine, launch, head)
    if stage.reads in ("preference", "unpaired") and head:
        copy = shape.parameters() if stage.tuning == "full" else adapter_parameters(shape, stage)
        held["reference"] = 4.0 * copy
    alike = rows == 1 and not getattr(stage, "packing", False)
    kept, moment = _passes(stage, shape, machine, rows * length, 0 if alike else length)
    logits = _fused_head(stage, shape, machine, rows * (length - 1)) if head else 0.0
    sharing = _shared(shape, stage, machine, launch, held, head) if launch.shards else held
    # The head's backward is over before the layers' begins, while all that they kept is still there.
    yield sharing | {"activations": kept + max(0.0, moment - logits), "logits": logits}
    reading = _reading(shape, machine, length * (ROWS_JUDGED if head else ROWS_SCORED))
    if launch.shards:  # each process has whole weights again, beside its shares: more than while it loaded them
        held |= {name: held[name] / launch.processes for name in ("gradients", "optimizer")}
        held["shares of weights"] = sum(held.get(name, 0.0) for name in ("weights", "adapter")) / launch.processes
    yield held | {"activations": reading, "logits": _chunk(shape, machine, length) if head else 0.0}


def _shared(shape: Shape, stage: Training, machine: Machine, launch: Launch, held: Parts, head: bool) -> Parts:
    """Return what of `held` a process has while it learns under FSDP: shares, and what is put together at once.

    That is what lies outside of the blocks (embeddings, head) as long as a step takes, the block that works and the
    next one; with `tuning: full` their gradients too, before they are dealt. The reference stays whole.
    """
    dealt = ("weights", "adapter", "gradients", "optimizer")
    shares = {name: size / launch.processes if name in dealt else size for name, size in held.items()}
    block = shape.in_linears / shape.layers
    at_once = shape.parameters(head=head) - shape.in_linears + min(2, shape.layers) * block
    number = 8.0 if stage.tuning == "full" else machine.number
    return shares | {"layers put together": number * at_once}


def adapter_parameters(shape: Shape, stage: Tuned) -> int:
    """Count the weights of a stage's adapter."""
    chosen = _targets(shape, stage)
    return shape.layers * stage.lora.r * sum(rows + columns for rows, columns in chosen.values())


def _targets(shape: Shape, stage: Tuned) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a block whose inputs are needed to train them."""
    names = stage.lora.target_modules
    if stage.tuning == "full" or names == "all-linear":
        return shape.linears
    return {name: size for name, size in shape.linears.items() if name in names}


def _weights(stage: Tuned, shape: Shape, machine: Machine, head: bool) -> float:
    """Return the bytes of a stage's model without adapters."""
    total = shape.parameters(head=head)
    if stage.tuning == "full":
        return 4.0 * total
    if stage.quantize == "4bit":
        return NF4 * shape.in_linears + machine.number * (total - shape.in_linears)
    return float(machine.number * total)


def _held(stage: Tuned, shape: Shape, machine: Machine, launch: Launch, head: bool = True) -> Parts:
    """Return what is there from the second step on: weights, what is trained, and its gradients and optimizer."""
    trained, number = shape.parameters(head=head), 4.0
    held = {"weights": _weights(stage, shape, machine, head)}
    if stage.tuning == "lora":
        trained = adapter_parameters(shape, stage)
        number = 2.0 if stage.quantize and not isinstance(stage, PPO) else 4.0  # TRL's choice for QLoRA
        held["adapter"] = number * trained
    copied = launch.processes > 1 and not launch.shards and not isinstance(stage, PPO)
    buckets = 2 if copied else 1  # DDP's copy
    held["gradients"] = number * trained * buckets
    held["optimizer"] = number * trained * OPTIMIZER.get(str(stage.train.get("optim")), 2.0)
    return held


def checkpoints(stage: Stage, machine: Machine) -> bool:
    """Return whether activations are recomputed in the backward pass."""
    given = stage.how.gradient_checkpointing
    return machine.gpu if given is None else given


def _passes(stage: Tuned, shape: Shape, machine: Machine, tokens: int, padded: int) -> tuple[float, float]:
    """Return what a forward pass keeps for its backward, and what that then takes for a moment, both in bytes.

    `padded` is the length of padded rows, whose attention is given a mask; 0 for rows of one length.
    """
    layer = kept_per_token(shape, stage, machine.number, padded)
    moment = tokens * 4.0 * (3 * shape.intermediate + 2 * shape.hidden)
    if stage.quantize:
        moment += 2 * shape.hidden * shape.intermediate  # a layer's weights, as they are multiplied
    stream = 4 if stage.tuning == "full" else machine.number
    last = 4 * shape.hidden * (2 if stage.tuning == "full" else 1) + stream * shape.hidden
    if checkpoints(stage, machine):
        return tokens * (shape.layers * stream * shape.hidden + last), tokens * layer + moment
    copies = 2.0 * shape.in_linears if stage.tuning == "full" and machine.bf16 else 0.0  # autocast's, of the weights
    return tokens * (shape.layers * layer + last) + copies, moment


def kept_per_token(shape: Shape, stage: Tuned, number: int, padded: int) -> float:
    """Return the bytes that autograd keeps of one token in one block; `number` bytes hold one of its numbers.

    Norms are computed in float32 and keep their input, and their output too where their weight is trained. A linear
    layer keeps its input where it is trained; PEFT casts that to the adapter's float32, so that under autocast every
    adapter keeps a copy of its own. With a mask, keys and values are repeated for every head.
    """
    lora, mixed = stage.tuning == "lora", number == 2
    chosen = _targets(shape, stage)
    inputs = [
        [name in chosen for name in names] for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    ]
    copies = sum(sum(group) if mixed else any(group) for group in inputs)
    own_copy = mixed and lora and "o_proj" in chosen
    keys = shape.query if padded else shape.keys
    attention = 2 * shape.query + 2 * keys + shape.query * own_copy
    feed_forward = shape.intermediate * (3 + ("down_proj" in chosen))
    adapters = stage.lora.r * len(chosen) if lora else 0
    of_heads = shape.query + shape.keys if shape.qk_norm else 0
    in_float32 = 2 * shape.hidden * (1 if lora else 2) + of_heads + shape.heads + 2
    rest = attention + feed_forward + adapters + padded + (0 if lora else of_heads)
    return 4 * in_float32 + number * (copies * shape.hidden + rest)


def _fused_head(stage: Training, shape: Shape, machine: Machine, positions: int) -> float:
    """Return what TRL's head takes in its backward pass: never all logits, only a tile of them.

    On a GPU a kernel turns the tile into its gradient in place. Without one the same is done by torch, which has eight
    tiles in float32 and a mask at once.
    """
    rows, width = min(positions, POSITIONS_AT_ONCE), min(shape.vocabulary, TOKENS_OF_VOCABULARY_AT_ONCE)
    full = stage.tuning == "full"
    gradient = 4.0 * shape.hidden * (positions + (shape.vocabulary if full else 0))
    if not machine.gpu:
        return 8.25 * 4 * rows * width + gradient
    copy = machine.number * width * shape.hidden if full else 0
    return machine.number * rows * TOKENS_OF_VOCABULARY_AT_ONCE + copy + gradient


# --- PPO --------------------------------------------------------------------------------------------------------------


def _ppo(stage: PPO, shapes: Shapes, machine: Machine, launch: Launch) -> Iterator[Parts]:
    """Yield what is held while answers are drawn, scored and learnt from."""
    shape = shapes["policy"]
    held = _held(stage, shape, machine, launch)
    whole = 4.0 * shape.parameters()
    adapter = 4.0 * adapter_parameters(shape, stage) if stage.tuning == "lora" else 0.0
    held["reference"] = adapter if stage.tuning == "lora" else whole
    if stage.value != "shared":
        held["value model"] = 4 * (adapter or 4.0 * shape.parameters(head=stage.value == "fresh"))
    for field, reward in shapes.items():
        if field.partition(".")[0] == "reward":
            joins = stage.tuning == "lora" and reward == shape
            held[field] = adapter if joins else float(machine.number * reward.parameters(head=False))
    if stage.sampler == "vllm" and not machine.gpu:
        raise Unknown("what vLLM takes on a CPU is not worked out")
    if _asks_vllm(stage, machine):
        held["vLLM"] = launch.vllm_memory * machine.memory
    else:
        most = max(stage.batch_size, stage.evaluation_prompts)
        yield held | _answering(shape, machine, most, stage.how.micro_batch, stage.max_new_tokens)
    yield held | {"activations": _reading(shape, machine, 2 * stage.max_new_tokens * ROWS_SCORED)}
    tokens = max(stage.how.tokens_per_micro_batch or PPO_TOKENS[machine.gpu], 2 * stage.max_new_tokens)
    kept, moment = _passes(stage, shape, machine, tokens, 0)
    gradient = 4.0 * shape.vocabulary * shape.hidden if stage.tuning == "full" else 0.0
    yield held | {"activations": kept + moment, "logits": _chunk(shape, machine, tokens) + gradient}


def _asks_vllm(stage: PPO, machine: Machine) -> bool:
    return stage.sampler == "vllm" or (stage.sampler == "auto" and machine.vllm and stage.tuning == "lora")


def _chunk(shape: Shape, machine: Machine, positions: int) -> float:
    """Return what our own head takes: logits, what they are normalised by, probabilities and their products."""
    return 4.0 * 4 * min(LOGITS_AT_ONCE[machine.gpu], positions * shape.vocabulary)


# --- models that only answer ------------------------------------------------------------------------------------------


def _answers(shapes: Shapes, policy: str, scorer: str, stage: Stage, new: int, machine: Machine) -> list[Parts]:
    """Return what is held while a model answers, and then while its answers are scored."""
    held: Parts = {"weights": float(shapes[policy].parameters() * machine.number)}
    answers = _answering(shapes[policy], machine, ROWS_SAMPLED, stage.how.micro_batch, new)
    return [held | answers, *_scoring(shapes.get(scorer), stage, new, machine)]


def _answering(shape: Shape, machine: Machine, most: int, size: int | None, new: int) -> Parts:
    """Return what answering takes beside the weights, for prompts as long as the answers may be."""
    per_token = 2 * shape.layers * shape.keys * machine.number
    rows = min(most, size or max(1, min(ROWS_SAMPLED, CACHE_BYTES // (per_token * 2 * new))))
    reading = _reading(shape, machine, rows * new)
    drawing = rows * shape.vocabulary * 24  # log-probs in float32, probabilities and their sums in float64
    return {"KV cache": 2.0 * rows * new * per_token, "activations": max(reading, float(drawing))}


def _reading(shape: Shape, machine: Machine, tokens: int) -> float:
    """Return what a forward pass takes of which nothing is kept: what one layer has at once."""
    return float(tokens * machine.number * (3 * shape.intermediate + 2 * shape.query + 2 * shape.hidden))


def _scoring(shape: Shape | None, stage: Stage, new: int, machine: Machine) -> Iterator[Parts]:
    """Yield what a reward model takes; a function takes nothing that is known here."""
    if shape is not None:
        yield {
            "weights of the scorer": float(machine.number * shape.parameters(head=False)),
            "activations": _reading(shape, machine, 2 * new * (stage.how.micro_batch or ROWS_SCORED)),
        }


# --- what would make it fit -------------------------------------------------------------------------------------------


Settings = dict[str, Any]
"""Field -> value, as `how.micro_batch`."""


def remedies(stage: Stage, machine: Machine, launch: Launch) -> Iterator[tuple[str, Stage, Launch]]:
    """Yield settings that need less memory, in words, and stage and launch with them: those that cost least first."""
    for costs in _costly(stage, machine, launch):
        for smaller in _smaller(stage, machine, at_no_cost=not costs):
            settings = smaller | costs
            changed, launched = stage, launch
            for name, value in settings.items():
                if name == _PROCESSES:
                    launched = launch.model_copy(update={"processes": value})
                else:
                    changed = _with(changed, name, value)
            if settings:
                words = ", ".join(f"{name}: {str(value).lower()}" for name, value in settings.items())
                yield words, changed, launched


_PROCESSES = "launch.processes"


def _costly(stage: Stage, machine: Machine, launch: Launch) -> Iterator[Settings]:
    """Yield settings that cost time, and then those that change the result, each with all before it."""
    found: Settings = {}
    yield found
    if not isinstance(stage, Tuned):
        return
    if not machine.gpu and launch.processes > 1 and not stage.draws:  # they share one memory
        yield (found := found | {_PROCESSES: 1})
    if not checkpoints(stage, machine):
        yield (found := found | {"how.gradient_checkpointing": True})
    if isinstance(stage, PPO) and _asks_vllm(stage, machine):
        yield (found := found | {"sampler": "transformers"})
    if stage.tuning == "full":
        yield (found := found | {"tuning": "lora"})
    if machine.gpu and stage.quantize is None:
        yield (found := found | {"quantize": "4bit"})
    length = stage.max_length if isinstance(stage, Training) else 0
    while length > 256:
        length //= 2
        yield (found := found | {"max_length": length})


def _smaller(stage: Stage, machine: Machine, at_no_cost: bool) -> Iterator[Settings]:
    """Yield ever smaller forward passes, the stage's own first; at no cost only some, as small ones take longer."""
    name, size, least = "how.micro_batch", stage.how.micro_batch or ROWS_SAMPLED, 1
    if isinstance(stage, PPO):
        tokens = stage.how.tokens_per_micro_batch or PPO_TOKENS[machine.gpu]
        name, size, least = "how.tokens_per_micro_batch", tokens, 512
    elif isinstance(stage, KTO):
        name, size, least = "kl_batch", stage.kl_batch, stage.kl_batch if at_no_cost else 2  # it changes the result
    elif isinstance(stage, Training):
        size = micro_batch(stage, 1)
    smallest = max(least, size // 8 if at_no_cost and isinstance(stage, Tuned) else 1)
    yield {}
    while size % 2 == 0 and size // 2 >= smallest:
        size //= 2
        yield {name: size}


def _with(stage: Stage, name: str, value: Any) -> Stage:
    field, _, inner = name.partition(".")
    if inner:
        return _with(stage, field, getattr(stage, field).model_copy(update={inner: value}))
    return stage.model_copy(update={field: value})
