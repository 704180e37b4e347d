"""Two constants of CAPO that may be estimated from the first rollouts: the unit of tau and the mask's thresholds.

Both are taken once, from the first values of the training, and then frozen: a tau that followed the gaps would never
let a settled pair saturate, and thresholds that followed the policy's rollouts would chase it. A checkpoint
holds the values, so that a resumed run has the same constants.
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


@dataclass
class PerplexityThresholds:
    """Quantiles of the reference perplexity of the first completions, as thresholds of CAPO's mask.

    Attributes:
        quantiles: Low and high, in (0, 1).
        by_class: Low from wrong completions and high from correct ones, instead of both from all.
        num_samples: The thresholds are frozen with the batch that brings the number of completions to this. By class,
            at least one of each sixteen must be of either class: a quantile of two or three values is noise.
        correct: Reference perplexities of correct completions seen so far.
        wrong: The same of wrong completions.
    """

    quantiles: tuple[float, float]
    by_class: bool = False
    num_samples: int = 1024
    correct: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)

    def update(self, correct: Tensor, ref_ppl: Tensor, valid: Tensor) -> None:
        """Adds the completions of a batch, all arguments of shape (P, G), unless the thresholds are frozen."""
        if self.ready:
            return
        valid = valid & ref_ppl.isfinite()
        self.correct.extend(ref_ppl[valid & (correct == 1)].tolist())
        self.wrong.extend(ref_ppl[valid & (correct == 0)].tolist())

    @property
    def ready(self) -> bool:
        """Whether the thresholds are frozen."""
        enough = len(self.correct) + len(self.wrong) >= self.num_samples
        rarer = min(len(self.correct), len(self.wrong))
        return enough and (not self.by_class or rarer >= max(1, self.num_samples // 16))

    @property
    def low_high(self) -> tuple[float, float]:
        """The thresholds; NaN until they are frozen.

        Example:
            >>> import torch
            >>> thresholds = PerplexityThresholds((0.5, 0.5), by_class=True, num_samples=2)
            >>> thresholds.update(torch.tensor([[1, 0]]), torch.tensor([[1.2, 1.1]]), torch.ones(1, 2).bool())
            >>> [round(threshold, 6) for threshold in thresholds.low_high]
            [1.1, 1.2]
        """
        if not self.ready:
            return float("nan"), float("nan")
        pooled = self.correct + self.wrong
        low, high = self.quantiles
        return (
            float(np.quantile(self.wrong if self.by_class else pooled, low)),
            float(np.quantile(self.correct if self.by_class else pooled, high)),
        )
