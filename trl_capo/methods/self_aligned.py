"""Self-aligned reward (arXiv 2509.05489): an answer should be likelier with its question than without it.

    SAR_i = max((PPL(o_i) - PPL(o_i | q)) / PPL(o_i), -1)
    R'_i = R_i + alpha SAR_i,      A_i = R'_i - mean of the group

PPL is exp(-mean token log-prob) under the policy that sampled. An answer that repeats what any question could get
earns little, a short one that fits this question more. For right and wrong answers alike, it rewards confidence.

Source: the released code, with alpha 0.2 and GRPO without standard deviation.

Departure: without its question, an answer follows the last token of its prompt, because a model needs one to start
from. It costs one more pass over the completions, without gradient.

Degenerate case: groups of equal rewards have advantages too, unless their SAR is equal.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups, masked_mean
from trl_capo.trainer.repack import Batch


def self_alignment(mean_logps: Tensor, promptless_logps: Tensor) -> Tensor:
    """By how much the question lowers an answer's perplexity, relative to that without it, at least -1.

    Args:
        mean_logps: Mean token log-prob of each completion after its prompt, any shape.
        promptless_logps: The same without the prompt, same shape.

    Returns:
        In [-1, 1), same shape.

    Source: arXiv 2509.05489.

    Example:
        >>> import torch
        >>> self_alignment(torch.tensor([1.2, 2.0, 3.0]).log().neg(), torch.tensor([2.4, 2.0, 1.2]).log().neg())
        tensor([ 0.5000,  0.0000, -1.0000])
    """
    return (1 - (promptless_logps - mean_logps).exp()).clamp(min=-1)


@dataclass
class SelfAlignedConfig(GroupAdvantageConfig):
    """Configuration of `SelfAlignedTrainer`.

    Parameters:
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            `"none"` only subtracts the group's mean.
        alignment_weight (`float`, *optional*, defaults to `0.2`):
            Alpha, the weight of the self-aligned reward.
    """

    scale_rewards: str = field(default="none", metadata={"help": "Division of the rewards: none, group or batch."})
    alignment_weight: float = field(default=0.2, metadata={"help": "Weight of the self-aligned reward."})

    def __post_init__(self):
        if not math.isfinite(self.alignment_weight):
            raise UserError(f"alignment_weight must be finite, got {self.alignment_weight}.")
        super().__post_init__()


class SelfAlignedTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with the self-aligned reward added; takes a `SelfAlignedConfig`."""

    args: SelfAlignedConfig
    config_class = SelfAlignedConfig
    _tag_names = ["trl", "trl-capo", "self-aligned"]
    _name = "Self-aligned reward"
    _paper = {"title": "Self-Aligned Reward: Towards Effective and Efficient Reasoners", "id": "2509.05489"}

    @classmethod
    def needs_correct(cls, args: SelfAlignedConfig) -> bool:  # type: ignore[override]
        return False

    def _own_passes(self, output: Batch, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"promptless_logps": masked_mean(self._promptless_logps(output, rows), mask)}

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        bonus = self_alignment(groups.mean_logps, groups.extras["promptless_logps"])
        rewards = groups.rewards + self.args.alignment_weight * bonus
        return reward_only_advantages(rewards, valid=groups.valid, scale_rewards=self.args.scale_rewards)
