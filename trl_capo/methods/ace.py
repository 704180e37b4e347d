"""ACE, asymmetric confidence-aware error penalty (arXiv 2602.21420): wrong answers that training made likelier.

    c_i = log pi(o_i) - log pi_ref(o_i)    of the whole answer
    A'_i = A_i (1 + alpha softplus(c_i))   for wrong answers,      A'_i = A_i for the others

with GRPO's advantage A_i. An error that the policy has become fond of is punished harder. CAPO compares answers with
each other, ACE compares the policy with its past.

Unverified: alpha (1 by default), the "1 +", and the softplus are as its readers report them. A log-ratio of a whole
answer grows with its length and can reach tens, so `ace_length_normalize` takes its mean over tokens and `ace_max`
bounds it. Because softplus(0) is 0.69, an error that training did not touch is amplified too.

Degenerate cases: groups whose rewards are all equal have advantages 0. Groups no longer sum to 0.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups, differ


def amplified_errors(
    advantages: Tensor, wrong: Tensor, log_ratios: Tensor, alpha: float = 1.0, longest: float = math.inf
) -> Tensor:
    """Advantages in which wrong answers weigh more, the more the policy has moved towards them.

    Args:
        advantages: GRPO's, shape (P, G).
        wrong: Boolean, shape (P, G). Only those with a negative advantage change.
        log_ratios: Log-prob under the policy minus that under the reference, shape (P, G); only read where wrong.
        alpha: Weight of the amplification, at least 0.
        longest: Upper bound of the log-ratios.

    Returns:
        Shape (P, G).

    Source: arXiv 2602.21420.

    Example:
        >>> amplified_errors(torch.tensor([[1.0, -1.0]]), torch.tensor([[False, True]]), torch.tensor([[9.0, 0.0]]))
        tensor([[ 1.0000, -1.6931]])
    """
    factors = 1 + alpha * torch.nn.functional.softplus(log_ratios.clamp(max=longest))
    return torch.where(wrong & (advantages < 0), advantages * factors, advantages)


@dataclass
class ACEConfig(GroupAdvantageConfig):
    """Configuration of `ACETrainer`.

    Parameters:
        ace_alpha (`float`, *optional*, defaults to `1.0`):
            Weight of the amplification, at least 0. The paper's is not known.
        ace_length_normalize (`bool`, *optional*, defaults to `False`):
            Divide log-ratios by the number of tokens.
        ace_max (`float`, *optional*):
            Upper bound of the log-ratios, after that. None leaves them unbounded (paper).
    """

    ace_alpha: float = field(default=1.0, metadata={"help": "How much likelier errors are amplified."})
    ace_length_normalize: bool = field(default=False, metadata={"help": "Divide log-ratios by the number of tokens."})
    ace_max: float | None = field(default=None, metadata={"help": "Upper bound of the log-ratios."})

    def __post_init__(self):
        if not 0 <= self.ace_alpha < math.inf:
            raise UserError(f"ace_alpha must be at least 0 and finite, got {self.ace_alpha}.")
        if self.ace_max is not None and not math.isfinite(self.ace_max):
            raise UserError(f"ace_max must be finite, got {self.ace_max}. Leave it out for no bound.")
        super().__post_init__()


class ACETrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with ACE's penalty; takes an `ACEConfig`. Loads a reference model."""

    args: ACEConfig
    config_class = ACEConfig
    _tag_names = ["trl", "trl-capo", "ace"]
    _name = "ACE"
    _paper = {
        "title": "Overconfident Errors Need Stronger Correction: Asymmetric Confidence Penalties for Reinforcement "
        "Learning",
        "id": "2602.21420",
    }

    @staticmethod
    def needs_ref(args: ACEConfig) -> bool:  # type: ignore[override]
        return True

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        return groups.mixed & groups.valid | self._rows_needing_ref(groups)  # the metrics read the first

    def _rows_needing_ref(self, groups: RolloutGroups) -> Tensor:
        return groups.valid & (groups.correct == 0) & differ(groups.rewards)

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        args = self.args
        advantages = reward_only_advantages(groups.rewards, valid=groups.valid, scale_rewards=args.scale_rewards)
        assert groups.ref_mean_logps is not None  # see `needs_ref`
        log_ratios = groups.mean_logps - groups.ref_mean_logps
        if not args.ace_length_normalize:
            log_ratios = log_ratios * groups.lengths
        longest = math.inf if args.ace_max is None else args.ace_max
        return amplified_errors(advantages, self._rows_needing_ref(groups), log_ratios, args.ace_alpha, longest)
