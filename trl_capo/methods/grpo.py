"""GRPO (arXiv 2402.03300) through the seam: TRL's own advantages, with calibration metrics and the optional mask.

    A_i = (R_i - mean R) / (std R + 1e-4)    as TRL computes it; `scale_rewards` and the rest are TRL's options

With `ref_ppl_mask=True`, completions that the mask drops have advantage 0 but still count in their group's mean.

Degenerate case: a group of equal rewards has advantages 0.
"""

from torch import Tensor
from trl import GRPOTrainer

from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
from trl_capo.trainer.groups import RolloutGroups


class GRPO(GroupAdvantageTrainer):
    """TRL's GRPO, faster, resumable and with calibration metrics; takes a `GroupAdvantageConfig` or a `GRPOConfig`."""

    _name = "GRPO"
    _paper = GRPOTrainer._paper

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        return groups.mixed & groups.valid  # only the metrics read them
