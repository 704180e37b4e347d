"""ProGRPO, advantage re-weighting by generative probabilities (arXiv 2602.05281): unsure answers gain, sure ones lose.

    A'_i = A_i + alpha (c(q) - c(o_i))
    c(o) = exp(mean log-prob of the 20% of its tokens with the lowest),      c(q) likewise for the prompt's own tokens

with GRPO's advantage A_i, in groups with at least one right answer. It keeps training from collapsing on one way to
answer. It pulls opposite to CAPO on right answers: a contrast, not a competitor in calibration.

Unverified, hence options: alpha (its value is not known); whether groups that are all right are re-weighted
(`arm_scope`: one summary of the paper implies it, two say only mixed ones); whether wrong answers are
(`arm_correct_only`: the printed formula says so, the abstract speaks of right ones); whether the share of low tokens
also holds for the prompt.

Degenerate cases: a group without a right answer keeps GRPO's advantages, as does one whose prompt has a single token.
Groups no longer sum to 0. It costs a pass over the prompts, each once for all its completions.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_capo.errors import UserError
from trl_capo.methods.advantages import reward_only_advantages
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups
from trl_capo.trainer.repack import Batch


SCOPES = ("any_correct", "mixed")


def low_token_confidence(logps: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """Geometric mean of the probabilities of each row's least likely tokens.

    Args:
        logps: Log-probs of tokens, shape (B, T).
        mask: Tokens that count, shape (B, T).
        share: Share of the tokens, in (0, 1]; at least one token, rounded up.

    Returns:
        In [0, 1], shape (B,); NaN for a row without tokens.

    Source: arXiv 2602.05281.

    Example:
        >>> logps = torch.tensor([[0.9, 0.5, 0.8, 0.4, 1.0]]).log()
        >>> low_token_confidence(logps, torch.ones(1, 5), share=0.4)  # sqrt(0.5 x 0.4)
        tensor([0.4472])
    """
    counts = (share * mask.sum(dim=1)).ceil()
    lowest = logps.masked_fill(mask == 0, torch.inf).sort(dim=1).values
    chosen = torch.arange(logps.size(1), device=logps.device) < counts.unsqueeze(1)
    return (lowest.masked_fill(~chosen, 0.0).sum(dim=1) / counts).exp()


@dataclass
class ProGRPOConfig(GroupAdvantageConfig):
    """Configuration of `ProGRPOTrainer`.

    Parameters:
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            The ratio is clipped above 1 + epsilon_high.
        arm_alpha (`float`, *optional*, defaults to `1.0`):
            Weight of the confidence term. To be tuned: the paper's is not known.
        arm_share (`float`, *optional*, defaults to `0.2`):
            Share of a text's tokens, the least likely ones, that make its confidence; in (0, 1].
        arm_scope (`str`, *optional*, defaults to `"any_correct"`):
            Groups that are re-weighted: with any right answer, or `"mixed"`.
        arm_correct_only (`bool`, *optional*, defaults to `False`):
            Re-weight only right answers.
    """

    epsilon_high: float | None = field(default=0.28, metadata={"help": "The ratio is clipped above 1 + epsilon_high."})
    arm_alpha: float = field(default=1.0, metadata={"help": "Weight of the confidence term."})
    arm_share: float = field(default=0.2, metadata={"help": "Share of a text's tokens that make its confidence."})
    arm_scope: str = field(
        default="any_correct", metadata={"help": "Groups that are re-weighted.", "choices": list(SCOPES)}
    )
    arm_correct_only: bool = field(default=False, metadata={"help": "Re-weight only right answers."})

    def __post_init__(self):
        if not math.isfinite(self.arm_alpha):
            raise UserError(f"arm_alpha must be finite, got {self.arm_alpha}.")
        if not 0 < self.arm_share <= 1:
            raise UserError(f"arm_share must be in (0, 1], got {self.arm_share}.")
        super().__post_init__()


class ProGRPOTrainer(GroupAdvantageTrainer):
    """`GRPOTrainer` with ProGRPO's advantages; takes a `ProGRPOConfig`."""

    args: ProGRPOConfig
    config_class = ProGRPOConfig
    _tag_names = ["trl", "trl-capo", "progrpo"]
    _name = "ProGRPO"
    _paper = {
        "title": "Back to Basics: Revisiting Exploration in Reinforcement Learning for LLM Reasoning via Generative "
        "Probabilities",
        "id": "2602.05281",
    }

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        right = (groups.correct == 1) & groups.valid
        groups_in_scope = groups.mixed if self.args.arm_scope == "mixed" else right.any(dim=1, keepdim=True)
        return groups.valid & groups_in_scope

    def _sequence_statistics(self, per_token_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"answer_confidence": low_token_confidence(per_token_logps, mask, self.args.arm_share)}

    def _own_passes(self, output: Batch, rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"prompt_confidence": low_token_confidence(*self._prompt_logps(output, rows), self.args.arm_share)}

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor:
        args = self.args
        advantages = reward_only_advantages(groups.rewards, valid=groups.valid, scale_rewards=args.scale_rewards)
        gain = groups.extras["prompt_confidence"] - groups.extras["answer_confidence"]
        rows = self._rows_needing_logps(groups) & gain.isfinite()
        if args.arm_correct_only:
            rows = rows & (groups.correct == 1)
        return torch.where(rows, advantages + args.arm_alpha * gain, advantages)
