"""ConSPO, contrastive sequence-level policy optimization (arXiv 2605.12969): each right answer against all wrong ones.

    p_ij = softmax over {i and all wrong j of the group} of (s_i, s_j + margin) / tau,    i right
    A_i = 1 - p_ii    for right answers,        A_j = - sum over right i of p_ij    for wrong ones

where s is the mean token log-prob under the policy that sampled. This is the gradient of the group's InfoNCE loss,
sum over right i of -log p_ii, with respect to the scores, up to the sign and the factor 1/tau.

CAPO sums over pairs, so the advantage of a right answer may reach the number of wrong ones. Here it is at most 1, and
the most confident wrong answer takes most of the blame. With one wrong answer in the group and no margin, both are
equal.

A reconstruction: the exact loss, tau, and the margin's curriculum are not published in what we could read. The margin
is therefore 0 by default, and moves linearly to `margin_end` if that is set.

Degenerate case: a group without right or without wrong answers has advantages 0.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups


def contrastive_advantages(
    correct: Tensor, mean_logps: Tensor, tau: float, *, margin: float = 0.0, valid: Tensor | None = None
) -> Tensor:
    """ConSPO's advantages.

    Args:
        correct: 1 = right, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean token log-prob of each completion, in nats, shape (P, G).
        tau: Temperature in nats, > 0.
        margin: Added to the scores of wrong answers, in nats: right ones must lead by it.
        valid: Boolean, shape (P, G). Completions that may take part; None for all.

    Returns:
        Shape (P, G). Every group sums to 0.

    Source: arXiv 2605.12969; reconstructed.

    Example:
        >>> correct, logps = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-0.5, -0.5, -0.5]])
        >>> contrastive_advantages(correct, logps, tau=0.6)  # three equal scores: p = 1/3
        tensor([[ 0.6667, -0.3333, -0.3333]])
    """
    valid = torch.ones_like(correct, dtype=torch.bool) if valid is None else valid
    valid = valid & mean_logps.isfinite()
    right, wrong = (correct == 1) & valid, (correct == 0) & valid
    scores = mean_logps.masked_fill(~valid, 0.0) / tau
    rivals = (scores + margin / tau).masked_fill(~wrong, -torch.inf)  # (P, G)
    own = scores.unsqueeze(2)  # (P, G, 1)
    shares = torch.cat([own, rivals.unsqueeze(1).expand(-1, correct.shape[1], -1)], dim=2).softmax(dim=2)
    shares = shares.masked_fill(~right.unsqueeze(2), 0.0)  # (P, right i, i and wrong j)
    return (1 - shares[..., 0]).masked_fill(~right, 0.0) - shares[..., 1:].sum(dim=1)


@dataclass
class ConSPOConfig(GroupAdvantageConfig):
    """Configuration of `ConSPOTrainer`.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Mean over each sequence, whose gradient is that of the score.
        tau (`float`, *optional*, defaults to `0.6`):
            Temperature in nats, > 0. The paper's is not known; the default is CAPO's.
        margin (`float`, *optional*, defaults to `0.0`):
            Added to the scores of wrong answers, in nats.
        margin_end (`float`, *optional*):
            Margin at the end of training, reached linearly. None keeps it constant.
    """

    loss_type: str = field(default="grpo", metadata={"help": "Mean over each sequence."})
    tau: float = field(default=0.6, metadata={"help": "Temperature of the softmax over answers, in nats, > 0."})
    margin: float = field(default=0.0, metadata={"help": "Added to the scores of wrong answers, in nats."})
    margin_end: float | None = field(default=None, metadata={"help": "Margin at the end, reached linearly."})

    def __post_init__(self):
        if not (self.tau > 0 and math.isfinite(self.tau)):
            raise UserError(f"tau must be positive and finite, got {self.tau}.")
        for name, value in (("margin", self.margin), ("margin_end", self.margin_end)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} must be finite, got {value}.")
        super().__post_init__()


class ConSPOTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with ConSPO's advantages; takes a `ConSPOConfig`."""

    args: ConSPOConfig
    config_class = ConSPOConfig
    _tag_names = ["trl", "trl-capo", "conspo"]
    _name = "ConSPO"
    _paper = {
        "title": "Revisiting Reinforcement Learning with Verifiable Rewards from a Contrastive Perspective",
        "id": "2605.12969",
    }

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        return groups.mixed & groups.valid

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        margin, end = self.args.margin, self.args.margin_end
        if end is not None:
            margin += (end - margin) * self.state.global_step / max(1, self.state.max_steps)
        return contrastive_advantages(
            groups.correct, groups.mean_logps, self.args.tau, margin=margin, valid=groups.valid
        )
