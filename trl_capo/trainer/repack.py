"""Fewer and shorter rows for the same gradient.

TRL pads every row of a generation to the longest prompt and completion and trains on all rows. This module re-cuts a
batch once its advantages are known, in three ways, each exact where `what_is_exact` allows it:

    trim    a micro-batch to its own longest prompt and completion,
    sort    the rows of one optimizer step by length, and cut them into micro-batches of about equal tokens,
    prune   rows that have no gradient: advantage 0, or no token in the loss.

Assumptions: positions are relative (RoPE), so left padding does not change log-probs; the loss is a sum over rows or
tokens. Rows move only within one optimizer step, so the mini-batches stay those of TRL's own shuffle. Every
micro-batch keeps at least one row, and none is ever skipped: sharded models communicate in each of them.

Degenerate case: no row has a gradient. Each micro-batch is then one short row with gradient 0, and the optimizer still
steps (moments, weight decay), as with TRL.

Source: length-sorted micro-batches and filtering of zero-advantage rows are common practice in RL frameworks; the
conditions below are those of TRL 1.16's loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


Batch = dict[str, Tensor]  # tensors of B rows, or without dimensions; `repack` adds a number, `loss_scale`

# How TRL's loss types weigh the rows of a micro-batch. Any other type depends on which rows share a micro-batch: bnpo
# divides by its token count.
SUMS_OVER_TOKENS = ("dapo", "cispo", "vespo")
MEANS_OVER_ROWS = ("grpo", "sapo", "luspo", "dr_grpo")

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Repacking:
    """Which of the three ways apply, and why the others do not. Sorting needs trimming, and pruning also sorts."""

    trim: bool = True
    sort: bool = True
    prune: bool = True
    reason: str = ""


def what_is_exact(
    *,
    loss_type: str,
    beta: float,
    top_entropy_quantile: float,
    entropy_bonus: bool,
    aux_loss: bool,
    is_vlm: bool,
    padding_matters: bool,
) -> Repacking:
    """Everything that leaves the gradient of TRL's loss unchanged.

    Example:
        >>> what_is_exact(loss_type="grpo", beta=0.1, top_entropy_quantile=1.0, entropy_bonus=False, aux_loss=False,
        ...               is_vlm=False, padding_matters=False)
        Repacking(trim=True, sort=True, prune=False, reason='rows without advantage still carry the KL term')
    """
    if is_vlm:
        return Repacking(False, False, False, "a vision-language batch does not have one row of images per completion")
    if padding_matters:
        return Repacking(False, False, False, "the model's positions depend on padding")
    for shares_micro_batch, what in (
        (top_entropy_quantile < 1.0, "top_entropy_quantile"),
        (entropy_bonus, "the entropy bonus"),
        (aux_loss, "the experts' auxiliary loss"),
        (loss_type not in SUMS_OVER_TOKENS + MEANS_OVER_ROWS, f"loss_type={loss_type!r}"),
    ):
        if shares_micro_batch:
            return Repacking(True, False, False, f"{what} depends on which rows share a micro-batch")
    if beta != 0.0:
        return Repacking(True, True, False, "rows without advantage still carry the KL term")
    return Repacking()


def positions_depend_on_padding(model: PreTrainedModel) -> bool:
    """Whether padding may change the log-probs of other tokens.

    False only for models known to be safe: rotary positions that do not scale with the width of the batch, and only
    full or sliding attention. Learned positions (GPT-2), chunks and temperatures by position (Llama 4) and recurrent
    states are not safe.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layer_kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    has_rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return (
        not has_rotary
        or any(setting.get("rope_type", "default") not in STATIC_ROPE_TYPES for setting in (rope, *_nested(rope)))
        or any("llama_4_scaling_beta" in setting for setting in (rope, *_nested(rope)))
        or bool(getattr(config, "attn_temperature_tuning", False))
        or not layer_kinds <= {"full_attention", "sliding_attention", "attention"}
    )


def row_sizes(batch: Batch) -> Tensor:
    """Tokens of each row's prompt and completion, shape (B, 2)."""
    return torch.stack([batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1)], dim=1)


def has_gradient(batch: Batch) -> Tensor:
    """Rows with a nonzero advantage and a token in the loss, shape (B,), boolean. Advantages are (B,) or (B, T)."""
    nonzero = batch["advantages"] != 0
    loss_mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    return nonzero.view(len(nonzero), -1).any(dim=1) & (loss_mask.sum(dim=1) > 0)


def take(batch: Batch, rows: Tensor) -> Batch:
    """The rows with these indices; entries that are not per row are kept."""
    return {key: value[rows] if value.ndim > 0 else value for key, value in batch.items()}


def trim(batch: Batch, pad_to_multiple_of: int | None = None) -> Batch:
    """The batch without columns that are padding in every row: left of the prompts, right of the completions.

    Example:
        >>> batch = {
        ...     "prompt_ids": torch.tensor([[0, 5, 6]]), "prompt_mask": torch.tensor([[0, 1, 1]]),
        ...     "completion_ids": torch.tensor([[7, 8, 0, 0]]), "completion_mask": torch.tensor([[1, 1, 0, 0]]),
        ... }
        >>> trim(batch)["prompt_ids"], trim(batch)["completion_ids"]
        (tensor([[5, 6]]), tensor([[7, 8]]))
    """
    prompt_width, width = batch["prompt_mask"].size(1), batch["completion_mask"].size(1)
    # Counted by columns, not by sums: a tool or an environment may leave a hole in a completion's mask.
    num_prompt = prompt_width - _first_column(batch["prompt_mask"])
    num_completion = width - _first_column(batch["completion_mask"].flip(1))
    # At least one column of each: TRL scores the first token from the column before it.
    num_prompt = _round_up(max(num_prompt, 1), pad_to_multiple_of, prompt_width)
    num_completion = _round_up(max(num_completion, 1), pad_to_multiple_of, width)

    trimmed = {}
    for key, value in batch.items():
        if value.ndim < 2:
            trimmed[key] = value
        elif key in ("prompt_ids", "prompt_mask"):
            trimmed[key] = value[:, prompt_width - num_prompt :]
        else:  # (B, T) tensors of the completion; (B, 1) tensors are not cut
            trimmed[key] = value[:, :num_completion] if value.size(1) == width else value
    return trimmed


def choose_rows(batch: Batch, keep: Tensor, num_rows: int) -> Tensor:
    """Indices of the rows to keep, filled up to `num_rows` with the shortest others; longest row first."""
    lengths = row_sizes(batch).sum(dim=1)
    chosen = lengths.masked_fill(keep, -1).argsort(stable=True)[:num_rows]
    return chosen[lengths[chosen].argsort(descending=True, stable=True)]


def even_cuts(sizes: list[tuple[int, int]], num_parts: int) -> list[int]:
    """Cuts rows into consecutive parts so that the largest part has as few padded tokens as possible.

    Args:
        sizes: Tokens of each row's prompt and completion; at least `num_parts` rows, ideally in descending order.
        num_parts: Number of parts.

    Returns:
        Number of rows in each part, at least 1. A part is as wide as its longest prompt plus its longest completion.

    Raises:
        ValueError: There are fewer rows than parts.

    Example:
        >>> even_cuts([(2, 10), (2, 4), (1, 4), (2, 2), (2, 2), (2, 1)], 3)  # 12 padded tokens each
        [1, 2, 3]
    """
    if num_parts > len(sizes):
        raise ValueError(f"{len(sizes)} rows cannot be cut into {num_parts} parts.")
    low, high = max(sum(size) for size in sizes), _padded_tokens(sizes)
    while low < high:  # the smallest budget that needs at most `num_parts` parts
        budget = (low + high) // 2
        low, high = (low, budget) if len(_fill(sizes, budget)) <= num_parts else (budget + 1, high)
    parts = _fill(sizes, low)
    while len(parts) < num_parts:  # one long row may leave parts over: halve the largest that can be halved
        largest = max((part for part in parts if len(part) > 1), key=_padded_tokens)
        i, half = parts.index(largest), len(largest) // 2
        parts[i : i + 1] = [largest[:half], largest[half:]]
    return [len(part) for part in parts]


def repack(
    rows: Batch,
    chosen: Tensor,
    cuts: list[int],
    rows_of_trl: int,
    loss_type: str,
    pad_to_multiple_of: int | None = None,
) -> list[Batch]:
    """Cuts one optimizer step's rows into micro-batches with the same summed gradient.

    Args:
        rows: All rows of the step, on this rank and from one generation.
        chosen: Indices of the rows to train on, longest first; see `choose_rows`.
        cuts: Number of chosen rows in each micro-batch; see `even_cuts`.
        rows_of_trl: Number of rows in each of TRL's own micro-batches.
        loss_type: TRL's option. If the loss averages over rows, each batch gets a factor for its loss, `loss_scale`.
        pad_to_multiple_of: Widths are rounded up to a multiple of this.

    Returns:
        One batch per cut.
    """
    batches = []
    for part in chosen.split(cuts):
        batch = trim(take(rows, part), pad_to_multiple_of)
        if loss_type in MEANS_OVER_ROWS:
            batch["loss_scale"] = len(part) / rows_of_trl  # type: ignore[assignment]
        batches.append(batch)
    return batches


def concatenate(batches: list[Batch]) -> Batch:
    """The rows of several batches of equal width; entries that are not per row come from the first batch."""
    return {
        key: torch.cat([batch[key] for batch in batches]) if value.ndim > 0 else value
        for key, value in batches[0].items()
    }


def _padded_tokens(sizes: list[tuple[int, int]]) -> int:
    return len(sizes) * (max(prompt for prompt, _ in sizes) + max(completion for _, completion in sizes))


def _fill(sizes: list[tuple[int, int]], budget: int) -> list[list[tuple[int, int]]]:
    """Each part takes rows while they fit into `budget` padded tokens, and at least one row."""
    parts, start, prompt, completion = [], 0, 0, 0
    for i, size in enumerate(sizes):
        prompt, completion = max(prompt, size[0]), max(completion, size[1])
        if i > start and (i + 1 - start) * (prompt + completion) > budget:
            parts.append(sizes[start:i])
            start, prompt, completion = i, *size
    return [*parts, sizes[start:]]


def _nested(settings: dict) -> list[dict]:
    return [value for value in settings.values() if isinstance(value, dict)]


def _first_column(mask: Tensor) -> int:
    """The first column that is not all zero; the number of columns if all are."""
    columns = mask.any(dim=0)
    return int(columns.long().argmax()) if columns.any() else mask.size(1)


def _round_up(width: int, multiple: int | None, limit: int) -> int:
    return width if multiple is None else min(-(-width // multiple) * multiple, limit)
