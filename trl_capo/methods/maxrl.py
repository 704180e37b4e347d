"""MaxRL (arXiv 2602.02710): GRPO divided by the group's mean instead of its standard deviation.

    A_i = (R_i - mean R) / mean R

on right (1) and wrong (0) answers. A prompt that is solved once in G answers weighs G times as much as one that is
always solved: the limit of optimising pass@1, pass@2, ..., which is maximum likelihood.

It ignores how confident an answer was: a baseline that costs nothing.

Source: the released code in prime-rl. There R is the reward; here it is the label of `correctness_reward`, because a
mean of other rewards may be negative.

Degenerate case: a group without right answers has advantages 0, as has one without wrong ones.
"""

import torch
from torch import Tensor

from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.groups import RolloutGroups


def mean_scaled_advantages(correct: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """MaxRL's advantages.

    Args:
        correct: 1 = right, 0 = wrong, NaN = unknown, shape (P, G).
        valid: Boolean, shape (P, G). Completions that may take part; None for all.

    Returns:
        Shape (P, G); 0 where not valid. Every group sums to 0.

    Source: arXiv 2602.02710.

    Example:
        >>> mean_scaled_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        tensor([[ 3., -1., -1., -1.],
                [ 0.,  0.,  0.,  0.]])
    """
    valid = correct.isfinite() if valid is None else valid & correct.isfinite()
    labels = correct.masked_fill(~valid, 0.0)
    mean = labels.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(valid & (mean > 0), labels / mean - 1, 0.0)


class MaxRLTrainer(GRPO):
    """`GRPOTrainer` with MaxRL's advantages; takes a `GroupAdvantageConfig`."""

    _tag_names = ["trl", "trl-capo", "maxrl"]
    _name = "MaxRL"
    _paper = {"title": "Maximum Likelihood Reinforcement Learning", "id": "2602.02710"}

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        return mean_scaled_advantages(groups.correct, valid=groups.valid)
