"""A generation as groups, as a method sees it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RolloutGroups:
    """One generation over all ranks, as groups: P prompts with G completions each. All tensors are detached.

    Attributes:
        rewards: Weighted sum of the reward functions, shape (P, G). NaN if no function could score it.
        rewards_per_func: Each reward function's output, unweighted, shape (P, G, K).
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean log-prob of the unmasked completion tokens (EOS included) under the policy that generated
            them, in nats, at the sampling temperature, shape (P, G). NaN without such a token, or where it was not
            computed; see `GroupAdvantageTrainer._rows_needing_logps`.
        lengths: Number of unmasked completion tokens, shape (P, G).
        valid: Scorable and with at least one unmasked token, shape (P, G), boolean. A fully masked (truncated) row
            would otherwise have a mean log-prob of 0, the highest confidence of all.
        kept: Completions that the mask keeps, shape (P, G), boolean; all True without a mask. The trainer applies it.
        ref_mean_logps: `mean_logps` under the reference; NaN where it was not computed, None without a reference.
        extras: Results of `_sequence_statistics`, each of shape (P, G); NaN where `mean_logps` was not computed.
    """

    rewards: Tensor
    rewards_per_func: Tensor
    correct: Tensor
    mean_logps: Tensor
    lengths: Tensor
    valid: Tensor
    kept: Tensor
    ref_mean_logps: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mixed(self) -> Tensor:
        """Groups with at least one correct and one wrong valid completion, shape (P, 1), boolean."""
        correct = ((self.correct == 1) & self.valid).any(dim=1, keepdim=True)
        wrong = ((self.correct == 0) & self.valid).any(dim=1, keepdim=True)
        return correct & wrong

    @property
    def varied(self) -> Tensor:
        """Groups whose scorable completions differ in their reward or in a function's, shape (P, 1), boolean."""
        functions = self.rewards_per_func.unbind(dim=2)
        return torch.cat([differ(rewards) for rewards in (self.rewards, *functions)], dim=1).any(dim=1, keepdim=True)


def differ(rewards: Tensor) -> Tensor:
    """Groups whose finite rewards are not all equal, shape (P, 1), boolean, from rewards of shape (P, G).

    Example:
        >>> differ(torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, torch.nan]])).squeeze(1)
        tensor([ True, False, False])
    """
    finite = rewards.isfinite()
    highest = rewards.masked_fill(~finite, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~finite, torch.inf).amin(dim=1, keepdim=True)
    return highest > lowest


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked positions of each row, shape (B,); NaN for a row without one.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [0, 0]]))
        tensor([2., nan])
    """
    return (values.float() * mask).sum(dim=1) / mask.sum(dim=1)
