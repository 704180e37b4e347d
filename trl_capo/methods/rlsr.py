"""RLSR, reinforcement learning for selection reward (arXiv 2607.03528): every answer at its place in the risk curve.

    R'_i = +w_r for a right answer, -w_r for a wrong one,      w_r = 1/r + 1/(r + 1) + ... + 1/n

where r is the rank of the answer's confidence among the n answers of the whole batch, the surest first. Then
A_i = R'_i - mean of the group. The area under the risk-coverage curve is the mean over the wrong answers' w_r, so this
reward lowers it; the sign + also rewards being right. The weights average 1.

CAPO compares the answers to one prompt, RLSR all answers of a batch. So it also teaches which questions the model
knows, and it needs large batches (1,536 answers in the paper).

Unverified: which confidence is ranked (there probably a stated one, here the mean token log-prob) and how ties are
broken (here they share the mean of their weights).

Degenerate case: none. A group that is all right or all wrong has advantages too, unless its weights are equal.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups


def rank_weights(confidence: Tensor) -> Tensor:
    """Weight of each answer's error in the area under the risk-coverage curve, times n.

    Args:
        confidence: Shape (n,); higher means surer. Ties share the mean of their weights.

    Returns:
        Shape (n,), with mean 1.

    Source: derived from the definition of AURC; used by arXiv 2607.03528.

    Example:
        >>> rank_weights(torch.tensor([-0.1, -0.4, -0.2, -0.3]))
        tensor([2.0833, 0.2500, 1.0833, 0.5833])
    """
    n = len(confidence)
    harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64, device=confidence.device)).flip(0).cumsum(0).flip(0)
    _, place, counts = confidence.neg().unique(return_inverse=True, return_counts=True)
    order = confidence.argsort(descending=True, stable=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=confidence.device)
    sums.index_add_(0, place[order], harmonic)
    return (sums / counts)[place].to(torch.promote_types(confidence.dtype, torch.float32))


def selection_rewards(correct: Tensor, mean_logps: Tensor, valid: Tensor) -> Tensor:
    """RLSR's rewards.

    Args:
        correct: 1 = right, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean token log-prob of each completion, shape (P, G).
        valid: Boolean, shape (P, G). Completions that may take part.

    Returns:
        Shape (P, G); NaN where not valid or unknown.

    Source: arXiv 2607.03528.

    Example:
        >>> correct, logps = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.1, -0.2]])
        >>> selection_rewards(correct, logps, torch.ones(1, 2, dtype=torch.bool))
        tensor([[ 1.5000, -0.5000]])
    """
    valid = valid & correct.isfinite() & mean_logps.isfinite()
    rewards = torch.full_like(mean_logps, torch.nan)
    rewards[valid] = rank_weights(mean_logps[valid]) * (2 * correct[valid] - 1)
    return rewards


@dataclass
class RLSRConfig(GroupAdvantageConfig):
    """Configuration of `RLSRTrainer`.

    Parameters:
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            `"none"` only subtracts the group's mean, which keeps the size of the weights.
    """

    scale_rewards: str = field(default="none", metadata={"help": "Division of the rewards: none, group or batch."})


class RLSRTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with RLSR's rewards; takes an `RLSRConfig`."""

    args: RLSRConfig
    config_class = RLSRConfig
    _tag_names = ["trl", "trl-capo", "rlsr"]
    _name = "RLSR"
    _paper = {"title": "Reinforcement Learning for Selection Reward", "id": "2607.03528"}

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        rewards = selection_rewards(groups.correct, groups.mean_logps, groups.valid)
        return reward_only_advantages(rewards, valid=groups.valid, scale_rewards=self.args.scale_rewards)
