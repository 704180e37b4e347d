"""C2GSPG (arXiv 2509.23129): confidence as a calibrated probability, the closest absolute rival of CAPO's ranking.

    C_i = exp(s_i), s_i = mean token log-prob
    A_i = (R_i - mean R) / (1 - C_i)  +  beta (R_i - C_i) / (1 - C_i)

The second term is the gradient, with respect to s_i and up to the sign, of beta times the binary cross-entropy between
C_i and the label: confidence should be the probability of being right. The first one pushes sure answers harder, in
either direction. CAPO asks only that right answers are surer than wrong ones.

Source: the logic of two public re-implementations, with beta 0.01 and 0.1; `bce_weight` is the first one's. We could
not read the authors' code. For rewards that are not 0 or 1 they add a normalisation and a clipping, left out here.

Departures: the method is plain REINFORCE, and its loss is differentiated at the current policy. Here both terms are
advantages at the policy that sampled, which gives the same gradient in the first optimizer step of a generation. With
several, TRL's ratio and clipping apply. R is the label of `correctness_reward`.

Degenerate cases: as C tends to 1, both terms grow without bound, so 1 - C is at least `min_doubt`. A group that is all
right or all wrong keeps the second term.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups


def calibrated_advantages(
    correct: Tensor,
    mean_logps: Tensor,
    *,
    bce_weight: float = 0.01,
    min_doubt: float = 1e-6,
    valid: Tensor | None = None,
) -> Tensor:
    """C2GSPG's advantages.

    Args:
        correct: 1 = right, 0 = wrong, NaN = unknown, shape (P, G).
        mean_logps: Mean token log-prob of each completion, in nats, shape (P, G).
        bce_weight: Beta, the weight of the cross-entropy, at least 0.
        min_doubt: Lower bound of 1 - C, in (0, 1).
        valid: Boolean, shape (P, G). Completions that may take part; None for all.

    Returns:
        Shape (P, G); 0 where not valid.

    Source: arXiv 2509.23129.

    Example:
        >>> correct, logps = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75]]).log()
        >>> calibrated_advantages(correct, logps, bce_weight=0.0)  # 0.5 / 0.5 and -0.5 / 0.25
        tensor([[ 1.0000, -2.0000]])
        >>> calibrated_advantages(correct, logps, bce_weight=1.0)  # + 0.5 / 0.5 and - 0.75 / 0.25
        tensor([[ 2.0000, -5.0000]])
    """
    valid = correct.isfinite() if valid is None else valid & correct.isfinite()
    valid = valid & mean_logps.isfinite()
    confidence = mean_logps.masked_fill(~valid, -torch.inf).exp()
    doubt = (-torch.expm1(mean_logps.masked_fill(~valid, -torch.inf))).clamp(min=min_doubt)
    centred = reward_only_advantages(correct, valid=valid, scale_rewards="none")
    return ((centred + bce_weight * (correct - confidence)) / doubt).masked_fill(~valid, 0.0)


@dataclass
class C2GSPGConfig(GroupAdvantageConfig):
    """Configuration of `C2GSPGTrainer`.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Mean over each sequence, whose gradient is that of the mean log-prob.
        bce_weight (`float`, *optional*, defaults to `0.01`):
            Beta, the weight of the cross-entropy between confidence and label. 0.1 in another implementation.
        min_doubt (`float`, *optional*, defaults to `1e-6`):
            Lower bound of 1 - C, in (0, 1). Raise it if sure answers dominate the gradient.
    """

    loss_type: str = field(default="grpo", metadata={"help": "Mean over each sequence."})
    bce_weight: float = field(default=0.01, metadata={"help": "Weight of the cross-entropy of confidence and label."})
    min_doubt: float = field(default=1e-6, metadata={"help": "Lower bound of 1 - confidence, in (0, 1)."})

    def __post_init__(self):
        if not 0 <= self.bce_weight < float("inf"):
            raise UserError(f"bce_weight must be at least 0 and finite, got {self.bce_weight}.")
        if not 0 < self.min_doubt < 1:
            raise UserError(f"min_doubt must be in (0, 1), got {self.min_doubt}.")
        super().__post_init__()


class C2GSPGTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with C2GSPG's advantages; takes a `C2GSPGConfig`."""

    args: C2GSPGConfig
    config_class = C2GSPGConfig
    _tag_names = ["trl", "trl-capo", "c2gspg"]
    _name = "C2GSPG"
    _paper = {
        "title": "C2GSPG: Confidence-calibrated Group Sequence Policy Gradient towards Self-aware Reasoning",
        "id": "2509.23129",
    }

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        return groups.valid if self.args.bce_weight else groups.mixed & groups.valid

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        return calibrated_advantages(
            groups.correct,
            groups.mean_logps,
            bce_weight=self.args.bce_weight,
            min_doubt=self.args.min_doubt,
            valid=groups.valid,
        )
