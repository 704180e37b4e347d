"""Estimate how much GPU memory a run needs, without a GPU.

Exact: parameters, gradients, optimizer state and reference, counted on a model without storage ("meta") that is built
as the trainer builds it. First approximations: activations, the tiles of the head, and the layers that a sharded model
gathers. Not counted: the CUDA context (about half a GiB), fragmentation, NCCL's buffers.

Sharding follows accelerate's configuration: DDP keeps everything on each GPU, plus a second copy of the gradients in
its buckets; ZeRO-2 shards gradients and optimizer; ZeRO-3 and FSDP2 shard everything, reference included. DeepSpeed
under bf16 keeps weights and gradients in bfloat16 and float32 weights with the optimizer.
"""

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel


GIB = 2**30
SHARDING = ("none", "ddp", "zero2", "zero3", "fsdp2")
KNOWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        parameters: The policy's weights, including frozen ones.
        gradients: Gradients of trained weights, including DDP's buckets.
        optimizer: Optimizer state.
        reference: Weights of the reference model; 0 if it is the policy without its adapter, or not needed.
        activations: Activations that a micro-batch of the longest rows keeps for backward, and the head's tiles.
        gathered: The two layers that a sharded model gathers at a time.
        vllm: Memory of a colocated engine.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    gathered: int = 0
    vllm: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())


def optimizer_bytes(model: PreTrainedModel, optim: str) -> int:
    """Bytes of optimizer state for the trained weights, unsharded.

    Args:
        model: The model, perhaps on "meta".
        optim: transformers' name of the optimizer. All count as AdamW (two numbers per weight, one step per tensor),
            except `sgd` (no state).

    Example:
        >>> optimizer_bytes(nn.Linear(3, 2), "adamw_torch")  # 8 weights x 2 x 4 bytes, 2 tensors x 4 bytes
        72
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optim == "sgd":
        return 0
    return sum(2 * p.numel() * p.element_size() + 4 for p in trained)


def memory(
    model: PreTrainedModel,
    *,
    optim: str = "adamw_torch",
    reference: nn.Module | None = None,
    sharding: str = "none",
    num_processes: int = 1,
    deepspeed_bf16: bool = True,
    rows: int = 1,
    tokens: int = 1,
    compute_bytes: int = 2,
    gradient_checkpointing: bool = True,
    unfused_head: bool = False,
    vllm: int = 0,
) -> Memory:
    """Bytes on each GPU.

    Args:
        model: The policy as it is trained, with its adapter: a causal language model, perhaps on "meta".
        optim: transformers' name of the optimizer.
        reference: The reference model, perhaps on "meta"; None without one.
        sharding: One of `SHARDING`.
        num_processes: Number of GPUs.
        deepspeed_bf16: With ZeRO, whether it trains in bfloat16.
        rows: Rows in a micro-batch.
        tokens: Tokens in the longest row, prompt and completion.
        compute_bytes: Bytes of an activation: 2 under bf16.
        gradient_checkpointing: Whether only the inputs of layers are kept.
        unfused_head: Whether the loss reads all logits (SimKO).
        vllm: Bytes that a colocated engine uses.
    """
    if sharding not in SHARDING:
        raise ValueError(f"sharding must be one of {', '.join(SHARDING)}, got {sharding!r}.")
    shards_state = sharding in ("zero2", "zero3", "fsdp2")
    state_parts = num_processes if shards_state else 1
    weight_parts = num_processes if sharding in ("zero3", "fsdp2") else 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer = optimizer_bytes(model, optim)
    if sharding.startswith("zero") and deepspeed_bf16:
        numbers = sum(p.numel() for p in trained)
        weights = 2 * sum(p.numel() for p in model.parameters())
        gradients, optimizer = 2 * numbers, (4 if optim == "sgd" else 12) * numbers
        reference_bytes = 2 * sum(p.numel() for p in reference.parameters()) if reference else 0
    else:
        reference_bytes = sum(p.numel() * p.element_size() for p in reference.parameters()) if reference else 0
    # Autocast keeps the residual stream between layers in the precision of the embedding.
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    residual_bytes = 2 if sharding.startswith("zero") and deepspeed_bf16 else embedding.element_size()
    return Memory(
        parameters=-(-weights // weight_parts),
        gradients=-(-gradients // state_parts) * (2 if sharding == "ddp" else 1),
        optimizer=-(-optimizer // state_parts),
        reference=-(-reference_bytes // weight_parts),
        activations=activation_bytes(
            model.config, rows, tokens, compute_bytes, residual_bytes, gradient_checkpointing, unfused_head
        ),
        gathered=0 if weight_parts == 1 else 2 * compute_bytes * largest_layer(model),
        vllm=vllm,
    )


def activation_bytes(
    config,
    rows: int,
    tokens: int,
    compute_bytes: int,
    residual_bytes: int,
    checkpointing: bool,
    unfused_head: bool,
) -> int:
    """Estimate the peak memory that a forward pass keeps for the backward pass.

    For each token, a layer keeps its two inputs and their normalised copies, queries, keys, values, the attention
    output, and three times the width of the feed-forward layer. With checkpointing, all layers keep only their input,
    and one layer is recomputed. The head works in tiles of 4096 tokens x 32768 words in float32. If a method reads all
    logits, the logits, their log-probs and their gradient exist at the same time instead.

    Args:
        config: The model's configuration.
        rows: Rows in a micro-batch.
        tokens: Tokens in each row.
        compute_bytes: Bytes per number within a layer.
        residual_bytes: Bytes per number between layers.
        checkpointing: Whether gradient checkpointing is on.
        unfused_head: Whether all logits exist at once.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = 2 * head_size * getattr(config, "num_key_value_heads", heads)
    layer = 6 * config.hidden_size + 2 * heads * head_size + keys + 3 * config.intermediate_size
    layers, positions = config.num_hidden_layers, rows * tokens
    kept = residual_bytes * layers * config.hidden_size if checkpointing else compute_bytes * (layers - 1) * layer
    if unfused_head:
        head = 3 * 4 * positions * config.vocab_size
    else:
        head = 4 * min(positions, 4096) * min(config.vocab_size, 32768) + 4 * config.vocab_size * config.hidden_size
    return positions * (kept + compute_bytes * layer) + head


def largest_layer(model: PreTrainedModel) -> int:
    """Parameter count of the largest block, embedding or head: a sharded model gathers one of these at a time.

    Example:
        >>> largest_layer(nn.Sequential(nn.Linear(3, 2), nn.Linear(10, 10)))
        110
    """
    blocks = [child for child in model.modules() if isinstance(child, nn.ModuleList)]
    parts = [layer for block in blocks for layer in block] + [
        module for module in model.modules() if isinstance(module, nn.Embedding | nn.Linear)
    ]
    return max(sum(p.numel() for p in part.parameters()) for part in parts)
