"""Sample completions with transformers and keep the confidence of each.

The engine does its own decoding instead of calling `model.generate`:

- It reads a prompt once for all its samples, and finished rows leave the batch, which makes sampling faster.
- Log-probs come from the logits that chose the tokens: no second forward pass, no `(batch, length, vocab)` tensor.
- It uses plain temperature sampling, as in training. `generate` would silently apply the top-p, top-k and repetition
  penalty in the model's generation config.
- Sample n of prompt p draws its own random numbers from `(seed, p, n)`. Results do not depend on the batch size or on
  the number of samples. Models evaluated with one seed share random numbers, which makes differences less noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trl_capo.errors import UserError
from trl_capo.models.decoding import decode
from trl_capo.models.prompts import Prompt, check_lengths, tokenize


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Confidences that selectors may use besides the mean log-prob. Each averages one number over tokens; higher means
# more confident.
STATISTICS = ("self_certainty", "tail_confidence", "lowest_group_confidence")
TOP_K = 20  # tokens whose log-probs DeepConf averages
GROUP = 2048  # tokens in DeepConf's tail and in each of its groups


@dataclass(frozen=True)
class Samples:
    """N sampled completions for each of P prompts.

    Attributes:
        completions: Texts without special tokens, P lists of N.
        mean_logps: Mean log-prob per generated token, EOS included, under the model at temperature 1, shape (P, N),
            float64. Higher means more confident.
        lengths: Number of generated tokens, EOS included, shape (P, N), int64.
        truncated: Whether `max_new_tokens` was reached before an EOS, shape (P, N), bool.
        statistics: Additional confidences by name (`STATISTICS`), shape (P, N) each, float64; empty unless requested.
    """

    completions: list[list[str]]
    mean_logps: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    statistics: dict[str, np.ndarray] = field(default_factory=dict)


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
    first_prompt: int = 0,
    statistics: bool = False,
    progress: bool = True,
) -> Samples:
    """Sample `num_samples` completions of every prompt.

    The global random state is neither read nor changed, and the model keeps its mode (train or eval).

    Args:
        model: Decoder-only transformers model, on its device.
        tokenizer: Its tokenizer; a pad token is not needed.
        prompts: P prompts as in TRL datasets, plain strings or lists of messages (see `tokenize`).
        num_samples: Completions per prompt, N.
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits that are sampled from; the log-probs returned are those at temperature 1.
        batch_size: Completions decoded together. More is faster on a GPU, until memory runs out.
        seed: Seed of the samples.
        first_prompt: Number of the first prompt. If you sample prompts in parts and pass the number of each part's
            first prompt, the results are the same as for all prompts together.
        statistics: Also compute `STATISTICS`, as `token_statistics` and `sequence_statistics` define them.
        progress: Show a progress bar.

    Returns:
        The samples, in the order of `prompts`.
    """
    import torch
    from tqdm.auto import tqdm

    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"`{name}` must be at least 1, got {value}.")
    if not temperature > 0:
        raise UserError(f"`temperature` must be positive, got {temperature}. Use 0.01 for nearly greedy samples.")
    prompt_ids = tokenize(tokenizer, list(prompts))
    check_lengths(prompt_ids, max_new_tokens, model.config)
    eos_token_ids = _eos_token_ids(model, tokenizer)

    shape = (len(prompt_ids), num_samples)
    completions = np.empty(shape, dtype=object)
    mean_logps = np.empty(shape, dtype=np.float64)
    lengths = np.empty(shape, dtype=np.int64)
    truncated = np.empty(shape, dtype=bool)
    extra = {name: np.empty(shape, dtype=np.float64) for name in (STATISTICS if statistics else ())}

    # Prompts of equal length need no padding. Longest first: if memory is short, it runs out immediately.
    order = sorted(range(len(prompt_ids)), key=lambda p: -len(prompt_ids[p]))
    rows = np.array([(p, n) for p in order for n in range(num_samples)], dtype=np.int64).reshape(-1, 2)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(rows), desc="Sampling", unit="sample", disable=not progress) as bar:
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                streams = [[seed, first_prompt + p, n] for p, n in batch.tolist()]
                tokens, logps, by_token = _sample_batch(
                    model, prompt_ids, batch[:, 0], max_new_tokens, temperature, streams, eos_token_ids, statistics
                )

                is_eos = np.isin(tokens, eos_token_ids)
                ended = is_eos.any(axis=1)
                length = np.where(ended, is_eos.argmax(axis=1) + 1, max_new_tokens)
                generated = np.arange(max_new_tokens) < length[:, None]
                at = tuple(batch.T)
                lengths[at], truncated[at] = length, ~ended
                mean_logps[at] = np.where(generated, logps, 0).sum(axis=1) / length
                for name, values in sequence_statistics(by_token, length).items():
                    extra[name][at] = values
                ids = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
                completions[at] = tokenizer.batch_decode(ids, skip_special_tokens=True)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return Samples(completions.tolist(), mean_logps, lengths, truncated, extra)


def token_statistics(logits: torch.Tensor) -> torch.Tensor:
    """Two confidences of each next-token distribution.

        self-certainty (arXiv 2502.18581):  -(1/V) sum over the vocabulary of log(V p_v), i.e. KL(uniform || p)
        DeepConf (arXiv 2508.15260):        minus the mean log-prob of the 20 likeliest tokens

    Args:
        logits: At temperature 1, shape (B, V).

    Returns:
        Shape (B, 2); higher means more confident.

    Example:
        >>> import torch
        >>> certainty, confidence = token_statistics(torch.tensor([[3.0, 1.0]]).log())[0].tolist()  # p = 3/4, 1/4
        >>> round(certainty, 3), round(confidence, 3)  # -log(3/2 * 1/2) / 2 and -log(3/4 * 1/4) / 2
        (0.144, 0.837)
    """
    import torch

    logps = logits.log_softmax(-1)
    vocabulary = logps.shape[-1]
    self_certainty = -logps.mean(-1) - np.log(vocabulary)
    return torch.stack([self_certainty, -logps.topk(min(TOP_K, vocabulary)).values.mean(-1)], dim=-1)


def sequence_statistics(by_token: np.ndarray | None, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Aggregate token statistics into `STATISTICS` of completions.

    Args:
        by_token: `token_statistics` of each token, shape (B, T, 2). None gives an empty result.
        lengths: Number of tokens, shape (B,).

    Returns:
        `self_certainty` is the mean over the completion. `tail_confidence` is DeepConf's mean over the last 2048
        tokens, and `lowest_group_confidence` is its lowest mean over 2048 consecutive tokens; shorter completions use
        all their tokens. Shape (B,) each.

    Example:
        >>> sequence_statistics(np.array([[[1.0, 4.0], [3.0, 2.0]]]), np.array([2]))
        {'self_certainty': array([2.]), 'tail_confidence': array([3.]), 'lowest_group_confidence': array([3.])}
    """
    if by_token is None:
        return {}
    result = {name: np.empty(len(lengths)) for name in STATISTICS}
    for row, (values, length) in enumerate(zip(by_token, lengths, strict=True)):
        certainty, confidence = values[:length].T
        sums = np.concatenate(([0.0], np.cumsum(confidence)))
        window = min(GROUP, length)
        groups = (sums[window:] - sums[:-window]) / window
        result["self_certainty"][row] = certainty.mean()
        result["tail_confidence"][row] = groups[-1]
        result["lowest_group_confidence"][row] = groups.min()
    return result


def _sample_batch(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    prompt_of_row: np.ndarray,
    max_new_tokens: int,
    temperature: float,
    streams: list[list[int]],
    eos_token_ids: list[int],
    statistics: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Sample one batch.

    Args:
        prompt_of_row: Prompt of each row, shape (B,).
        streams: Seed of each row's random numbers.

    Returns:
        Token ids, int64, and their log-probs, float64, both with shape (B, max_new_tokens), and `token_statistics`
        with shape (B, max_new_tokens, 2) if requested. Values after a row's first EOS are meaningless.
    """
    import torch

    device = model.device
    eos = torch.tensor(eos_token_ids, device=device)
    # One number in [0, 1) per token, for inverse-CDF sampling. The factor keeps float32 from rounding it up to 1.
    drawn = np.stack([np.random.default_rng(stream).random(max_new_tokens) for stream in streams])
    uniforms = torch.tensor(drawn * (1 - 2**-22), dtype=torch.float32, device=device)
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logps = torch.zeros_like(uniforms)
    by_token = torch.zeros(*uniforms.shape, 2, device=device) if statistics else None

    def choose(t: int, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cdf = (logits / temperature).softmax(-1).cumsum(-1)
        token = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True)
        tokens[rows, t] = token[:, 0]
        logps[rows, t] = logits.log_softmax(-1).gather(1, token)[:, 0]
        if by_token is not None:
            by_token[rows, t] = token_statistics(logits)
        return token[:, 0], torch.isin(token[:, 0], eos)

    prompts, inverse = np.unique(prompt_of_row, return_inverse=True)
    decode(model, [prompt_ids[p] for p in prompts], inverse.tolist(), max_new_tokens, choose)
    found = None if by_token is None else by_token.cpu().numpy().astype(np.float64)
    return tokens.cpu().numpy(), logps.cpu().numpy().astype(np.float64), found


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a completion. The model may declare more than the tokenizer, e.g. an end-of-turn token."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*declared, tokenizer.eos_token_id] if token is not None})
