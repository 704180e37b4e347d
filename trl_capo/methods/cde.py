"""CDE, curiosity-driven exploration (arXiv 2509.09675), actor bonus: less confident completions get more reward.

    r'_i = r_i + omega min(|r_i| / kappa, alpha B_i),    B_i = -s_i, the mean negative log-prob of a token

followed by GRPO's normalisation of r'. If kappa > omega, the cap keeps the sign of every reward. Omega decays during
training. Of two wrong answers, the more confident one is punished more, which improves calibration. Of two right
answers, the more confident one is rewarded less, which harms it.

Assumes rewards of +1 and -1: with 0 and 1, a wrong answer would have |r| = 0 and no bonus. Rewards are therefore
mapped by 2r - 1, unless `signed_rewards` says that they are signed already. A sum of several rewards fits neither form
and is refused. The critic's bonus needs a value model and is not implemented.

The paper finds a staircase best but does not give its steps. Its text fits two stairs (`bonus_stairs=2`: omega, then
nothing from the middle of training) better than the default of four, which our comparison used. Neither is verified.

Degenerate case: unlike in GRPO, a group of equal rewards has advantages, because its bonuses differ. Without any bonus
they are 0.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups


SCHEDULES = ("constant", "linear", "cosine", "staircase")


def curious_rewards(
    rewards: Tensor, mean_logps: Tensor, omega: float, kappa: float = 3.0, alpha: float = 1.0
) -> Tensor:
    """Rewards with the actor's bonus.

    Args:
        rewards: Signed rewards, shape (P, G).
        mean_logps: Mean token log-prob under the policy that sampled, shape (P, G).
        omega: Weight of the bonus, at least 0.
        kappa: The bonus is at most |reward| / kappa. If kappa > omega, no reward changes its sign.
        alpha: Weight of the surprise within the cap.

    Returns:
        Shape (P, G).

    Source: arXiv 2509.09675.

    Example:
        >>> import torch
        >>> curious_rewards(torch.tensor([[1.0, -1.0]]), torch.tensor([[-0.25, -0.5]]), omega=1.0, kappa=4.0)
        tensor([[ 1.2500, -0.7500]])
    """
    return rewards + omega * (alpha * -mean_logps).minimum(rewards.abs() / kappa)


def bonus_weight(progress: float, schedule: str, first: float, last: float, num_stairs: int = 4) -> float:
    """Omega at a point in training.

    Args:
        progress: Share of the optimizer steps that are done, in [0, 1].
        schedule: One of `SCHEDULES`.
        first: Omega at the start.
        last: Omega at the end; with "staircase", on the last stair.
        num_stairs: Number of stairs, of equal length; at least 2.

    Example:
        >>> [bonus_weight(p, "staircase", 1.0, 0.0, num_stairs=3) for p in (0.0, 0.3, 0.5, 0.9)]
        [1.0, 1.0, 0.5, 0.0]
    """
    share = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "staircase": min(math.floor(progress * num_stairs), num_stairs - 1) / (num_stairs - 1),
    }[schedule]
    return first + share * (last - first)


@dataclass
class CDEConfig(GroupAdvantageConfig):
    """Configuration of `CDETrainer`.

    Parameters:
        bonus_weight (`float`, *optional*, defaults to `1.0`):
            Omega at the start.
        bonus_weight_end (`float`, *optional*, defaults to `0.0`):
            Omega at the end.
        bonus_schedule (`str`, *optional*, defaults to `"staircase"`):
            `"constant"`, `"linear"`, `"cosine"` or `"staircase"`.
        bonus_stairs (`int`, *optional*, defaults to `4`):
            Number of stairs. The paper gives no number; its text fits 2 better.
        bonus_cap (`float`, *optional*, defaults to `3.0`):
            Kappa: the bonus is at most |reward| / kappa, before it is multiplied by omega.
        bonus_scale (`float`, *optional*, defaults to `1.0`):
            Alpha, the weight of the mean negative log-prob.
        signed_rewards (`bool`, *optional*, defaults to `False`):
            The rewards are already +1 and -1. If False, r becomes 2r - 1. Required with several reward functions.
    """

    bonus_weight: float = field(default=1.0, metadata={"help": "Weight of the bonus at the start (omega)."})
    bonus_weight_end: float = field(default=0.0, metadata={"help": "Weight of the bonus at the end."})
    bonus_schedule: str = field(default="staircase", metadata={"help": "How the weight decays.", "choices": SCHEDULES})
    bonus_stairs: int = field(default=4, metadata={"help": "Number of stairs of the staircase."})
    bonus_cap: float = field(default=3.0, metadata={"help": "The bonus is at most |reward| / bonus_cap (kappa)."})
    bonus_scale: float = field(default=1.0, metadata={"help": "Weight of the mean negative log-prob (alpha)."})
    signed_rewards: bool = field(default=False, metadata={"help": "Rewards are +1 and -1. If not, r becomes 2r - 1."})

    def __post_init__(self):
        if self.bonus_stairs < 2:
            raise UserError(f"bonus_stairs must be at least 2, got {self.bonus_stairs}.")
        if self.bonus_scale < 0:
            raise UserError(f"bonus_scale must be at least 0, got {self.bonus_scale}.")
        weights = (self.bonus_weight, self.bonus_weight_end)
        if min(weights) < 0 or max(weights) >= self.bonus_cap:
            raise UserError(
                f"bonus_weight and bonus_weight_end must be >= 0 and less than bonus_cap={self.bonus_cap}, or a bonus "
                f"can outweigh its reward; got {self.bonus_weight} and {self.bonus_weight_end}."
            )
        super().__post_init__()


class CDETrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with CDE's actor bonus; takes a `CDEConfig`."""

    args: CDEConfig
    config_class = CDEConfig
    _tag_names = ["trl", "trl-capo", "cde"]
    _name = "CDE"
    _replaces_advantages = True
    _paper = {"title": "CDE: Curiosity-Driven Exploration for Efficient RL in LLMs", "id": "2509.09675"}

    def _setup_method(self) -> None:
        if len(self.reward_funcs) > 1 and not self.args.signed_rewards:
            raise UserError(
                "CDE maps rewards of 0 and 1 to -1 and 1, which does not work for a sum of several rewards. Keep one "
                "reward function, or make the sums positive for right answers and negative for wrong ones and set "
                "signed_rewards=True."
            )

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        args = self.args
        omega = bonus_weight(
            self.state.global_step / max(1, self.state.max_steps),
            args.bonus_schedule,
            args.bonus_weight,
            args.bonus_weight_end,
            args.bonus_stairs,
        )
        rewards = groups.rewards if args.signed_rewards else 2 * groups.rewards - 1
        rewards = curious_rewards(rewards, groups.mean_logps, omega, args.bonus_cap, args.bonus_scale)
        return reward_only_advantages(rewards, valid=groups.valid, scale_rewards=args.scale_rewards)

    def _rows_with_advantage(self, groups: RolloutGroups) -> Tensor:
        return groups.valid
