"""Sample completions with transformers, keeping the confidence of each.

The engine decodes by itself instead of calling `model.generate`:

- A prompt is read once for all its samples, and finished rows leave the batch, which makes it faster.
- Log-probs come from the logits that chose the tokens: no second forward, and no `(batch, length, vocab)` tensor.
- Plain temperature sampling, as in training. `generate` would apply the top-p, top-k and repetition penalty of the
  model's generation config without a word.
- Sample n of prompt p draws its own random numbers from `(seed, p, n)`. Results do not depend on the batch size or on
  the number of samples, and models evaluated with one seed share their luck, which makes differences less noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Finished rows leave the batch once they are this share of it. Leaving copies the cache of those who stay, staying
# costs forwards for nothing. On CPU 1/8 and 1/4 are equally fast, and twice as fast as never.
_SHRINK_AT = 1 / 8

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Samples:
    """N sampled completions for each of P prompts.

    Attributes:
        completions: Texts without special tokens, P lists of N.
        mean_logps: Mean log-prob per generated token, EOS included, under the model at temperature 1, shape (P, N),
            float64. Higher is surer.
        lengths: Number of generated tokens, EOS included, shape (P, N), int64.
        truncated: Whether `max_new_tokens` was reached before an EOS, shape (P, N), bool.
    """

    completions: list[list[str]]
    mean_logps: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 16,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Samples:
    """Sample `num_samples` completions of every prompt.

    The global random state is neither read nor changed, and the model is left in the mode (train or eval) it came in.

    Args:
        model: Decoder-only transformers model, on its device.
        tokenizer: Its tokenizer; a pad token is not needed.
        prompts: P prompts as in TRL datasets, plain strings or lists of messages (these need a chat template).
        num_samples: Completions per prompt, N.
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits that are sampled from; the log-probs returned are those at temperature 1.
        batch_size: Completions decoded together. More is faster on a GPU, until memory runs out.
        seed: Seed of the samples.
        progress: Show a progress bar.

    Returns:
        The samples, in the order of `prompts`.
    """
    import torch
    from tqdm.auto import tqdm

    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}. Use 0.01 for nearly greedy samples.")
    prompt_ids = _tokenize(tokenizer, list(prompts))
    _check_lengths(prompt_ids, max_new_tokens, model)
    eos_token_ids = _eos_token_ids(model, tokenizer)

    shape = (len(prompt_ids), num_samples)
    completions = np.empty(shape, dtype=object)
    mean_logps = np.empty(shape, dtype=np.float64)
    lengths = np.empty(shape, dtype=np.int64)
    truncated = np.empty(shape, dtype=bool)

    # Prompts of one length need no padding. Longest first: if memory is short, it runs out at once.
    order = sorted(range(len(prompt_ids)), key=lambda p: -len(prompt_ids[p]))
    rows = np.array([(p, n) for p in order for n in range(num_samples)], dtype=np.int64).reshape(-1, 2)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(rows), desc="Sampling", unit="sample", disable=not progress) as bar:
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                tokens, logps = _decode(model, prompt_ids, batch, max_new_tokens, temperature, seed, eos_token_ids)

                is_eos = np.isin(tokens, eos_token_ids)
                ended = is_eos.any(axis=1)
                length = np.where(ended, is_eos.argmax(axis=1) + 1, max_new_tokens)
                generated = np.arange(max_new_tokens) < length[:, None]
                at = tuple(batch.T)
                lengths[at], truncated[at] = length, ~ended
                mean_logps[at] = np.where(generated, logps, 0).sum(axis=1) / length
                ids = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
                completions[at] = tokenizer.batch_decode(ids, skip_special_tokens=True)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return Samples(completions.tolist(), mean_logps, lengths, truncated)


def _decode(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    rows: np.ndarray,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_token_ids: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Decode one batch.

    Args:
        rows: Prompt and sample number of each row, shape (B, 2).

    Returns:
        Token ids, int64, and their log-probs, float64, both of shape (B, max_new_tokens). What follows a row's first
        EOS is meaningless.
    """
    import torch

    device = model.device
    eos = torch.tensor(eos_token_ids, device=device)
    # One number in [0, 1) per token, for inverse-CDF sampling. The factor keeps float32 from rounding it up to 1.
    uniforms = np.stack([np.random.default_rng([seed, p, n]).random(max_new_tokens) for p, n in rows])
    uniforms = torch.tensor(uniforms * (1 - 2**-22), dtype=torch.float32, device=device)
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logps = torch.zeros_like(uniforms)

    prompts, prompt_of_row = np.unique(rows[:, 0], return_inverse=True)
    cache, logits, attended, positions = _read_prompts(model, [prompt_ids[p] for p in prompts], max_new_tokens)
    prompt_of_row = torch.tensor(prompt_of_row, device=device)
    cache.batch_select_indices(prompt_of_row)
    logits, attended, positions = (x[prompt_of_row] for x in (logits, attended, positions))
    width = attended.shape[1] - max_new_tokens

    running = torch.arange(len(rows), device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        cdf = (logits / temperature).softmax(-1).cumsum(-1)
        token = torch.searchsorted(cdf, uniforms[running, t, None] * cdf[:, -1:], right=True)
        tokens[running, t] = token[:, 0]
        logps[running, t] = logits.log_softmax(-1).gather(1, token)[:, 0]

        finished |= torch.isin(token[:, 0], eos)
        n_finished = int(finished.sum())
        if n_finished == len(finished) or t + 1 == max_new_tokens:
            break
        if n_finished >= _SHRINK_AT * len(finished):
            stay = torch.nonzero(~finished)[:, 0]
            cache.batch_select_indices(stay)
            running, finished, token, attended, positions = (
                x[stay] for x in (running, finished, token, attended, positions)
            )
        logits = _next_logits(model, token, attended[:, : width + t + 1], positions[:, width + t, None], cache)
    return tokens.cpu().numpy(), logps.cpu().numpy().astype(np.float64)


def _read_prompts(
    model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the prompts of a batch, padded on the left.

    Returns:
        Cache; logits of the first new token, float32; attention mask and positions up to the last new token.
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
        raise ValueError("`model` returns NaN logits. Check its weights, or load it in bfloat16 or float32.")
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
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def _check_lengths(prompt_ids: list[list[int]], max_new_tokens: int, model: PreTrainedModel) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for p, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"`prompts[{p}]` has no tokens. Remove it, or use a tokenizer that adds a BOS token.")
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"`prompts[{p}]` has {len(ids)} tokens; with `max_new_tokens={max_new_tokens}` that exceeds the "
                f"model's context of {context}. Drop the prompt or lower `max_new_tokens`."
            )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the model may declare more than the tokenizer, e.g. an end-of-turn token."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*declared, tokenizer.eos_token_id] if token is not None})
