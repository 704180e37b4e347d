"""Estimate the cost of training before it runs: tokens, floating-point operations, seconds and money per step.

    forward of n tokens in rows of T:   2 N n + 4 L d n T        (attention: 4 L d T a token, not halved for causality)
    forward and backward:               3 times that; with gradient checkpointing 4 times

with N weights that take part in a product (embeddings are only looked up), L layers and d = heads x head size. A step
generates, runs passes without gradient (log-probs of the old policy, reference) and trains:

    FLOPs = generated + passes x share x forward + (3 or 4) x share x forward

`share` is the share of the rows' tokens that the fast step computes (`docs/fast_step.md`).

Assumptions: dense decoders. Softmax, norms and optimizer are left out. Checkpointing repeats the whole forward pass;
torch actually skips the head and the last product of each layer. You supply the utilisation, i.e. achieved FLOPs over
the hardware's maximum; it causes most of the uncertainty. For memory, use `trl-capo train --dry-run`.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The properties of a dense decoder that determine its cost.

    Attributes:
        weights: Weights that take part in a matrix product. This includes the head but not looked-up embeddings.
        layers: Number of layers.
        attention_width: Number of attention heads times head size.
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
    """FLOPs of forward and backward over rows. With gradient checkpointing, the forward pass runs twice.

    Example:
        >>> training_flops(ModelShape(weights=100, layers=2, attention_width=8), rows=3, length=5)
        23400.0
    """
    return (4 if gradient_checkpointing else 3) * forward_flops(shape, rows, length)


def generation_flops(shape: ModelShape, rows: float, prompt_length: float, completion_length: float) -> float:
    """FLOPs of generating with a key-value cache: every token passes once and attends to all earlier tokens.

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
    """The cost of one generation and its updates.

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
    """Cost of one generation and all its updates (a row is trained on once).

    Args:
        shape: The model.
        rows: Completions in a generation, over all processes.
        prompt_length: Mean prompt length, in tokens.
        completion_length: Mean completion length, in tokens.
        padded_length: Length to which the trainer pads prompt and completion together, in tokens. Default: no padding.
        passes: Number of passes without gradient, 0 to 2: old policy and reference. CAPO with two updates per
            generation has 2.
        share: Share of the padded tokens that the trainer computes, in (0, 1]. TRL's share is 1. For the fast step,
            see `docs/fast_step.md` (0.16 in its measurement, with half the groups all right or all wrong).
        gradient_checkpointing: Whether activations are recomputed.

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
        flops_per_second: The vendor's peak rate of one device: 312e12 for an A100, 989e12 for an H100, in bfloat16.
        utilisation: Achieved share of the peak rate, in (0, 1]. Measure yours. Generation waits for memory, so it
            achieves far less than training.
        devices: Number of devices that work in parallel.

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
    """Time of a step that first generates and then trains, on the same devices (vLLM colocate)."""
    rate = functools.partial(seconds, flops_per_second=flops_per_second, devices=devices)
    training = rate(cost.passes + cost.training, utilisation=training_utilisation)
    return rate(cost.generation, utilisation=generation_utilisation) + training


def dollars(step_time: float, *, steps: int, devices: int, dollars_an_hour: float) -> float:
    """Price of a run.

    Args:
        step_time: Seconds per step.
        steps: Number of steps.
        devices: Number of rented devices, including idle ones.
        dollars_an_hour: Price of one device per hour.

    Example:
        >>> dollars(144.0, steps=600, devices=8, dollars_an_hour=2.0)
        384.0
    """
    return step_time * steps / 3600 * devices * dollars_an_hour
