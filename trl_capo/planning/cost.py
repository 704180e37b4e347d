"""What training costs: tokens, floating-point operations, seconds and money of a step, before it is run.

    forward of n tokens in rows of T:   2 N n + 4 L d n T        (attention: 4 L d T a token, not halved for causality)
    forward and backward:               3 times that; with gradient checkpointing 4 times

with N weights that take part in a product (embeddings are only looked up), L layers and d = heads x size of a head. A
step generates, passes without gradient (log-probs of the old policy, reference) and trains:

    FLOPs = generated + passes x share x forward + (3 or 4) x share x forward

`share` is what the fast step leaves of the rows' tokens (`docs/fast_step.md`).

Assumptions: dense decoders. Softmax, norms and optimizer are left out. Checkpointing does the whole forward again;
torch spares the head and the last product of each layer. The utilisation, FLOPs done over what the hardware could
do, is the user's to give, and most of the uncertainty. Memory is the business of `trl-capo train --dry-run`.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: what its cost depends on.

    Attributes:
        weights: Weights that take part in a matrix product, the head among them, embeddings that are looked up not.
        layers: Number of layers.
        attention_width: Attention heads times the size of a head.
    """

    weights: int
    layers: int
    attention_width: int


def shape_of(config) -> ModelShape:
    """Shape of a model from its transformers configuration (Qwen2, Llama and others with a gated MLP).

    Example:
        >>> from transformers import Qwen2Config
        >>> shape_of(Qwen2Config(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                      num_key_value_heads=1, vocab_size=32))
        ModelShape(weights=1408, layers=2, attention_width=8)
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    attention = 2 * config.hidden_size * (width + config.num_key_value_heads * head_dim)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return ModelShape(weights, config.num_hidden_layers, width)


# From published configurations: Qwen2.5 and Qwen2.5-Math, Llama 3.1.
QWEN_1_5B = ModelShape(weights=1_543_569_408, layers=28, attention_width=1536)
QWEN_7B = ModelShape(weights=7_070_285_824, layers=28, attention_width=3584)
LLAMA_8B = ModelShape(weights=7_504_658_432, layers=32, attention_width=4096)


def forward_flops(shape: ModelShape, rows: float, length: float) -> float:
    """FLOPs of one forward pass over `rows` rows of `length` tokens, padding included, with full attention.

    Example:
        >>> forward_flops(ModelShape(weights=100, layers=2, attention_width=8), rows=3, length=5)
        7800.0
    """
    return float(2 * shape.weights * rows * length + 4 * shape.layers * shape.attention_width * rows * length**2)


def training_flops(shape: ModelShape, rows: float, length: float, gradient_checkpointing: bool = False) -> float:
    """FLOPs of forward and backward over rows; with gradient checkpointing the forward is done twice.

    Example:
        >>> training_flops(ModelShape(weights=100, layers=2, attention_width=8), rows=3, length=5)
        23400.0
    """
    return (4 if gradient_checkpointing else 3) * forward_flops(shape, rows, length)


def generation_flops(shape: ModelShape, rows: float, prompt_length: float, completion_length: float) -> float:
    """FLOPs of generating with a cache of keys and values: every token passes once and attends to those before it.

    Example:
        >>> shape = ModelShape(weights=100, layers=2, attention_width=8)
        >>> generation_flops(shape, rows=1, prompt_length=1, completion_length=2)
        984.0
    """
    length = prompt_length + completion_length
    attended = length * (length + 1) / 2
    return float(rows * (2 * shape.weights * length + 4 * shape.layers * shape.attention_width * attended))


@dataclass(frozen=True)
class StepCost:
    """What one generation and its updates cost.

    Attributes:
        generated_tokens: Completion tokens.
        passed_tokens: Tokens through passes without gradient, padding included.
        trained_tokens: Tokens through forward and backward, padding included.
        generation: FLOPs of generating.
        passes: FLOPs of the passes without gradient.
        training: FLOPs of the loss.
    """

    generated_tokens: float
    passed_tokens: float
    trained_tokens: float
    generation: float
    passes: float
    training: float

    @property
    def flops(self) -> float:
        return self.generation + self.passes + self.training


def step_cost(
    shape: ModelShape,
    *,
    rows: int,
    prompt_length: float,
    completion_length: float,
    padded_length: float | None = None,
    passes: float = 2.0,
    share: float = 1.0,
    gradient_checkpointing: bool = True,
) -> StepCost:
    """Cost of one generation, with all updates that are made on it (a row is trained on once).

    Args:
        shape: The model.
        rows: Completions of a generation, over all processes.
        prompt_length: Mean prompt, tokens.
        completion_length: Mean completion, tokens.
        padded_length: Tokens to which the trainer pads prompt and completion together; by default no padding.
        passes: Passes without gradient: old policy and reference, 2 in CAPO with two updates a generation; 0 to 2.
        share: Share of the padded tokens that the trainer computes, in (0, 1]: 1 is TRL's; for the fast step's see
            `docs/fast_step.md` (0.16 in its measurement, with half the groups all right or all wrong).
        gradient_checkpointing: Whether activations are computed again.

    Example:
        >>> shape = ModelShape(weights=100, layers=2, attention_width=8)
        >>> step = step_cost(shape, rows=3, prompt_length=2, completion_length=3, gradient_checkpointing=False)
        >>> step.generated_tokens, step.passed_tokens, step.trained_tokens, step.passes, step.training
        (9, 30.0, 15.0, 15600.0, 23400.0)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}.")
    length = prompt_length + completion_length if padded_length is None else padded_length
    kept = rows * share
    return StepCost(
        generated_tokens=rows * completion_length,
        passed_tokens=passes * kept * length,
        trained_tokens=kept * length,
        generation=generation_flops(shape, rows, prompt_length, completion_length),
        passes=passes * forward_flops(shape, kept, length),
        training=training_flops(shape, kept, length, gradient_checkpointing),
    )


def seconds(flops: float, *, flops_per_second: float, utilisation: float, devices: int = 1) -> float:
    """Time for a number of FLOPs.

    Args:
        flops: FLOPs.
        flops_per_second: Of one device at its best, by its vendor: 312e12 of an A100, 989e12 of an H100, in bfloat16.
        utilisation: Share of that which is reached, in (0, 1]. Measure yours; generation, which waits for memory,
            reaches far less than training.
        devices: How many work at once.

    Example:
        >>> seconds(6e15, flops_per_second=300e12, utilisation=0.5, devices=8)
        5.0
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must lie in (0, 1], got {utilisation}.")
    return flops / (flops_per_second * utilisation * devices)


def step_seconds(
    cost: StepCost,
    *,
    flops_per_second: float,
    training_utilisation: float,
    generation_utilisation: float,
    devices: int,
) -> float:
    """Time of a step that generates and trains one after the other on the same devices (vLLM colocate)."""
    rate = functools.partial(seconds, flops_per_second=flops_per_second, devices=devices)
    training = rate(cost.passes + cost.training, utilisation=training_utilisation)
    return rate(cost.generation, utilisation=generation_utilisation) + training


def dollars(step_time: float, *, steps: int, devices: int, dollars_an_hour: float) -> float:
    """Price of a run.

    Args:
        step_time: Seconds a step.
        steps: How many.
        devices: Rented devices, idle ones among them.
        dollars_an_hour: Of one device.

    Example:
        >>> dollars(144.0, steps=600, devices=8, dollars_an_hour=2.0)
        384.0
    """
    return step_time * steps / 3600 * devices * dollars_an_hour
