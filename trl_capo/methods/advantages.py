"""Advantages of CAPO and GRPO, as pure functions of one batch of groups.

A group is the G completions of one prompt. Completion i has reward R_i and score s_i, its mean token log-prob under
the policy that sampled it (higher means more confident). CAPO descends the logistic loss of every pair,

    loss = sum over pairs with R_i > R_j of log(1 + exp(-(s_i - s_j)(R_i - R_j) / tau)),

whose derivative with respect to s_i is, up to the sign and the factor 1/tau, the advantage

    A_i = sum_j (R_i - R_j) sigmoid(-(s_i - s_j)(R_i - R_j) / tau).

Why: the weight of a pair is near 1 while the wrong answer has the higher confidence, and near 0 once the correct
answer leads by a few tau. The gradient goes to the pairs that make confidence misleading, not to those that are
settled. GRPO's advantage R_i - mean(R) is the same sum with the linear loss -t in place of the logistic one, which
never stops pushing.

Source: arXiv 2604.12632 for rewards 0/1. Departures: with rewards between 0 and 1, the difference in reward weights a
pair (on 0/1 this equals the paper's formula); normalisations other than "sum" and pairs across prompts are ours.

Degenerate cases: a group whose rewards are all equal has advantages 0. A completion that is not valid, or whose reward
or score is not finite, belongs to no pair and has advantage 0.
"""

import torch
from torch import Tensor


NORMALIZATIONS = ("sum", "group", "opposite_mean", "std")


def pairwise_logistic_advantages(
    rewards: Tensor,
    mean_logps: Tensor,
    tau: float,
    *,
    valid: Tensor | None = None,
    normalization: str = "sum",
    scale_by_tau: bool = False,
) -> Tensor:
    """CAPO's advantages: compares each completion with the members of its group that have a different reward.

    Args:
        rewards: Rewards in [0, 1], usually 0 or 1, shape (P, G): P prompts, G generations each. NaN = unscorable.
        mean_logps: Mean token log-prob of each completion, in nats, shape (P, G). Serves only as a weight, detached.
        tau: Temperature of the logistic loss in nats, > 0. Choose it on the scale of the gaps in `mean_logps`.
        valid: Boolean, shape (P, G). Completions that may take part; None for all.
        normalization: "sum" (the paper); "group", divided by the number of valid members (as tau grows, this tends to
            half of GRPO's reward minus mean); "opposite_mean", divided by the number of members with a different
            reward (does not sum to zero); "std", divided by the group's standard deviation of the sum + 1e-4.
        scale_by_tau: Multiply by 1 / tau, which makes "sum" the exact gradient of the logistic loss.

    Returns:
        Advantages, shape (P, G), float32 (float64 for float64 scores). With "sum", |A_i| <= number of members with a
        different reward. With "sum" and "group", every group sums to 0.

    Raises:
        ValueError: `tau` is not positive, `normalization` is unknown, or the shapes differ.

    Source: arXiv 2604.12632.

    Example:
        >>> rewards, mean_logps = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, -0.5]])
        >>> pairwise_logistic_advantages(rewards, mean_logps, tau=0.6)  # equal confidence: sigmoid(0)
        tensor([[ 0.5000, -0.5000]])
        >>> pairwise_logistic_advantages(rewards, torch.tensor([[-0.1, -9.0]]), tau=0.6).abs().max() < 1e-6  # settled
        tensor(True)
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    rewards, mean_logps, valid = _checked(rewards, mean_logps, tau, valid)
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1) & (rewards.unsqueeze(2) != rewards.unsqueeze(1))  # (P, G, G)
    weights = _pair_weights(
        rewards.unsqueeze(2), rewards.unsqueeze(1), mean_logps.unsqueeze(2), mean_logps.unsqueeze(1), tau
    )
    advantages = weights.masked_fill(~pairs, 0.0).sum(dim=2)
    if normalization == "group":
        advantages = advantages / valid.sum(dim=1, keepdim=True).clamp(min=1)
    elif normalization == "opposite_mean":
        advantages = advantages / pairs.sum(dim=2).clamp(min=1)
    elif normalization == "std":
        advantages = advantages / (_group_std(advantages, valid) + 1e-4)
    return advantages / tau if scale_by_tau else advantages


def cross_prompt_advantages(
    rewards: Tensor,
    mean_logps: Tensor,
    tau: float,
    *,
    valid: Tensor | None = None,
    scale_by_tau: bool = False,
    block_size: int = 256,
) -> Tensor:
    """The term that pairs across prompts add to CAPO's advantages.

        A_i = (1/P) sum over members j of the other groups of (R_i - R_j) sigmoid(-(s_i - s_j)(R_i - R_j) / tau)

    Pairs within a prompt teach which answer to trust; pairs across prompts teach which questions the model knows. Not
    in the paper. The term sums to zero over the batch, and is 0 for a single prompt. It is computed in blocks of rows,
    so memory grows with `block_size` x P x G, not with (P x G) squared.

    Args:
        rewards: Rewards in [0, 1], shape (P, G). NaN = unscorable.
        mean_logps: Mean token log-prob of each completion, in nats, shape (P, G).
        tau: Temperature of the logistic loss in nats, > 0.
        valid: Boolean, shape (P, G). Completions that may take part; None for all.
        scale_by_tau: Multiply by 1 / tau.
        block_size: Number of completions that are compared with the whole batch at a time.

    Returns:
        Advantages, shape (P, G). Add them to those of `pairwise_logistic_advantages`.

    Raises:
        ValueError: `tau` is not positive or the shapes differ.

    Example:
        >>> rewards, mean_logps = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.full((2, 2), -0.5)
        >>> cross_prompt_advantages(rewards, mean_logps, tau=0.6)  # 2 partners x sigmoid(0), averaged over 2 prompts
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])
    """
    rewards, mean_logps, valid = _checked(rewards, mean_logps, tau, valid)
    num_prompts, num_generations = rewards.shape
    prompts = torch.arange(num_prompts, device=rewards.device).repeat_interleave(num_generations)  # (N,)
    rows = (rewards.flatten(), mean_logps.flatten(), valid.flatten(), prompts)
    blocks = []
    for reward, score, ok, prompt in zip(*(row.split(block_size) for row in rows), strict=True):
        pairs = ok.unsqueeze(1) & rows[2] & (reward.unsqueeze(1) != rows[0]) & (prompt.unsqueeze(1) != prompts)
        weights = _pair_weights(reward.unsqueeze(1), rows[0], score.unsqueeze(1), rows[1], tau)
        blocks.append(weights.masked_fill(~pairs, 0.0).sum(dim=1))
    advantages = torch.cat(blocks).view_as(rewards) / max(num_prompts, 1)
    return advantages / tau if scale_by_tau else advantages


def soft_misranking(correct: Tensor, mean_logps: Tensor, tau: float, *, valid: Tensor | None = None) -> Tensor:
    """How strongly each group's confidence ranks wrong answers above right ones: one minus AUC, smoothed by tau.

        mean over (correct, wrong) pairs of sigmoid((s_wrong - s_correct) / tau)

    Args:
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean token log-prob of each completion, in nats, shape (P, G).
        tau: Temperature in nats, > 0. As tau tends to 0 the result tends to one minus AUC; as it grows, to one half.
        valid: Boolean, shape (P, G). Completions that may take part; None for all.

    Returns:
        Rate in [0, 1], shape (P,); NaN for a group without a (correct, wrong) pair.

    Raises:
        ValueError: `tau` is not positive or the shapes differ.

    Example:
        >>> soft_misranking(torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, -0.5]]), tau=0.6)
        tensor([0.5000])
    """
    advantages = pairwise_logistic_advantages(correct, mean_logps, tau, valid=valid)
    valid = torch.ones_like(correct, dtype=torch.bool) if valid is None else valid
    valid = valid & mean_logps.isfinite()
    right, wrong = (correct == 1) & valid, (correct == 0) & valid
    return advantages.masked_fill(~right, 0.0).sum(dim=1) / (right.sum(dim=1) * wrong.sum(dim=1))


def reward_only_advantages(
    rewards: Tensor, *, valid: Tensor | None = None, scale_rewards: str = "group", eps: float = 1e-4
) -> Tensor:
    """GRPO's advantages: reward minus group mean, optionally divided by a standard deviation.

    Args:
        rewards: Rewards, shape (P, G). NaN = unscorable.
        valid: Boolean, shape (P, G). Completions that may take part; None for all.
        scale_rewards: As in TRL: "group" divides by the group's standard deviation + eps, "batch" by the standard
            deviation of all rewards + eps, "none" does not divide.
        eps: Keeps the division finite; the default is TRL's.

    Returns:
        Advantages, shape (P, G), float32 (float64 for float64 rewards); 0 where not valid. Exactly 0 in groups of
        equal rewards, where the mean's rounding error divided by a tiny deviation would otherwise remain.

    Raises:
        ValueError: `scale_rewards` is unknown.

    Source: arXiv 2402.03300; without the division, arXiv 2503.20783.

    Example:
        >>> reward_only_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale_rewards="none")
        tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be one of group, batch, none, got {scale_rewards!r}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    valid = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    counts = valid.sum(dim=1, keepdim=True).clamp(min=1)
    mean = rewards.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True) / counts
    lowest = rewards.masked_fill(~valid, torch.inf).cummin(dim=1).values[:, -1:]  # amin refuses empty groups
    varied = ((rewards != lowest) & valid).any(dim=1, keepdim=True)
    advantages = (rewards - mean).masked_fill(~(valid & varied), 0.0)
    if scale_rewards == "group":
        advantages = advantages / (_group_std(rewards, valid) + eps)
    elif scale_rewards == "batch":
        advantages = advantages / (_group_std(rewards.reshape(1, -1), valid.reshape(1, -1)) + eps)
    return advantages


def _checked(rewards: Tensor, mean_logps: Tensor, tau: float, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs; convert them to at least float32 and zero what is not valid, so that no NaN can spread."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if rewards.shape != mean_logps.shape or rewards.dim() != 2:
        raise ValueError(
            f"rewards and mean_logps must share one shape (P, G), got {tuple(rewards.shape)} and "
            f"{tuple(mean_logps.shape)}"
        )
    if valid is not None and valid.shape != rewards.shape:
        raise ValueError(f"valid must have the shape of rewards, {tuple(rewards.shape)}, got {tuple(valid.shape)}")
    dtype = torch.promote_types(mean_logps.dtype, torch.float32)
    rewards, mean_logps = rewards.to(dtype), mean_logps.to(dtype)
    finite = torch.isfinite(rewards) & torch.isfinite(mean_logps)
    valid = finite if valid is None else valid & finite
    return rewards.masked_fill(~valid, 0.0), mean_logps.masked_fill(~valid, 0.0), valid


def _pair_weights(reward_i: Tensor, reward_j: Tensor, score_i: Tensor, score_j: Tensor, tau: float) -> Tensor:
    """(R_i - R_j) sigmoid(-(s_i - s_j)(R_i - R_j) / tau), with broadcasting."""
    reward_gap = reward_i - reward_j
    return reward_gap * torch.sigmoid((score_j - score_i) * reward_gap / tau)


def _group_std(values: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation (n - 1) over the valid members of each row, shape (P, 1); 0 with fewer than two."""
    counts = valid.sum(dim=1, keepdim=True)
    values = values.masked_fill(~valid, 0.0)
    mean = values.sum(dim=1, keepdim=True) / counts.clamp(min=1)
    squares = (values - mean).square().masked_fill(~valid, 0.0).sum(dim=1, keepdim=True)
    return (squares / (counts - 1).clamp(min=1)).sqrt()
