"""The unit of CAPO's tau, estimated from the first rollouts.

It is taken once and then frozen: a tau that followed the gaps would never let a settled pair saturate. A checkpoint
holds the gaps, so that a resumed run has the same unit.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class GapScale:
    """Median absolute gap in mean log-prob between right and wrong answers to the same prompt, in nats.

    Attributes:
        min_gaps: The median is frozen with the batch that brings the number of (correct, wrong) pairs to this.
        gaps: The gaps seen so far.
    """

    min_gaps: int = 256
    gaps: list[float] = field(default_factory=list)

    def update(self, correct: Tensor, mean_logps: Tensor, valid: Tensor) -> None:
        """Adds the pairs of a batch, all arguments of shape (P, G), unless the median is frozen."""
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
