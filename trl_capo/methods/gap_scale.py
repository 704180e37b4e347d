"""The unit of CAPO's tau, estimated from the first rollouts.

It is estimated once and then frozen, because with a tau that followed the gaps, a settled pair would never saturate.
Checkpoints contain the gaps, so that a resumed run has the same unit.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class GapScale:
    """Median absolute gap in mean log-prob between right and wrong answers to the same prompt, in nats.

    Attributes:
        min_gaps: Number of (correct, wrong) pairs. The batch that reaches it is the last one to count.
        gaps: The gaps seen so far.
    """

    min_gaps: int = 256
    gaps: list[float] = field(default_factory=list)

    def update(self, correct: Tensor, mean_logps: Tensor, valid: Tensor) -> None:
        """Adds the pairs of a batch unless the median is frozen. All arguments have shape (P, G)."""
        if len(self.gaps) >= self.min_gaps:
            return
        valid = valid & mean_logps.isfinite()
        right, wrong = (correct == 1) & valid, (correct == 0) & valid
        pairs = right.unsqueeze(2) & wrong.unsqueeze(1)  # (P, G, G)
        gaps = (mean_logps.unsqueeze(2) - mean_logps.unsqueeze(1)).abs()[pairs]
        self.gaps.extend(gaps.tolist())

    @property
    def median(self) -> float:
        """The median so far; NaN before the first pair.

        Example:
            >>> import torch
            >>> scale = GapScale()
            >>> scale.update(torch.tensor([[1, 0, 0]]), torch.tensor([[-1.0, -1.5, -3.0]]), torch.ones(1, 3).bool())
            >>> scale.median  # gaps 0.5 and 2.0
            1.25
        """
        return float(np.median(self.gaps)) if self.gaps else float("nan")
