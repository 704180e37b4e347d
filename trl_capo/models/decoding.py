"""Decode a batch with a decoder-only model: each prompt is read once, and finished rows leave the batch.

`model.generate` reads a prompt once for each of its samples, and computes rows that have finished until the last one
has. Which token comes next is up to the caller (`Choose`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from trl_capo.errors import UserError


if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

    # Called with the number of the step, the rows (b,) that are still in the batch, and their logits (b, V) in
    # float32. Returns each row's next token and whether the row ends with it, shape (b,) both.
    Choose = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Finished rows leave the batch once they make up this share of it. Removing them copies the cache of the others;
# keeping them wastes forward passes. On CPU, 1/8 and 1/4 are equally fast, and twice as fast as never removing.
_SHRINK_AT = 1 / 8


def decode(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    prompt_of_row: list[int],
    max_new_tokens: int,
    choose: Choose,
    goes_on: Callable[[bool], bool] = bool,
) -> int:
    """Decode one batch. Call it without gradient; the model keeps its mode (train or eval).

    Args:
        model: On its device.
        prompt_ids: Token ids of P prompts.
        prompt_of_row: The prompt of each of B rows.
        max_new_tokens: Most tokens of a row.
        choose: Chooses the next tokens. It also sees rows that have ended, until they leave the batch.
        goes_on: Given whether a row has not ended yet: whether there is another step.

    Returns:
        The number of steps until the last row ended.
    """
    import torch

    cache, logits, attended, positions = _read_prompts(model, prompt_ids, max_new_tokens)
    rows = torch.tensor(prompt_of_row, device=model.device)
    cache.batch_select_indices(rows)
    logits, attended, positions = (x[rows] for x in (logits, attended, positions))
    width = attended.shape[1] - max_new_tokens

    running = torch.arange(len(rows), device=model.device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    steps, unfinished = 0, True
    for t in range(max_new_tokens):
        steps += unfinished
        token, ended = choose(t, running, logits)
        finished |= ended
        n_finished = int(finished.sum())
        unfinished = n_finished < len(finished)
        if t + 1 == max_new_tokens or not goes_on(unfinished):
            break
        if n_finished >= _SHRINK_AT * len(finished):
            # One row stays for the steps that other processes need.
            stay = torch.nonzero(~finished)[:, 0] if unfinished else running.new_zeros(1)
            cache.batch_select_indices(stay)
            running, finished, token, attended, positions = (
                x[stay] for x in (running, finished, token, attended, positions)
            )
        seen = width + t
        logits = _next_logits(model, token[:, None], attended[:, : seen + 1], positions[:, seen, None], cache)
    return steps


def _read_prompts(
    model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the prompts of a batch, padded on the left.

    Returns:
        The cache, the logits of the first new token (float32), and the attention mask and positions up to the last
        new token.
    """
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompt_ids))
    input_ids = torch.zeros(len(prompt_ids), width, dtype=torch.long)
    attended = torch.ones(len(prompt_ids), width + max_new_tokens, dtype=torch.long)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attended[row, : width - len(ids)] = 0
    input_ids, attended = input_ids.to(model.device), attended.to(model.device)
    # Padding gets position 0: it is masked, but a negative position would be out of range.
    positions = (attended.cumsum(1) - 1).clamp(min=0)

    cache = DynamicCache(config=model.config)
    logits = _next_logits(model, input_ids, attended[:, :width], positions[:, :width], cache)
    if logits.isnan().any():
        raise UserError("`model` returns NaN logits. Check its weights, or load it in bfloat16 or float32.")
    return cache, logits, attended, positions


def _next_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attended: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    output = model(
        input_ids=input_ids,
        attention_mask=attended,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    return output.logits[:, -1].float()


def cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its cache: `cache`, or `past_key_values` before transformers renamed it."""
    base = getattr(model, "get_base_model", lambda: model)()  # below an adapter
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
