"""CAPO's mask by reference perplexity (arXiv 2604.12632), an option of every method.

    kept_i = ppl_ref(o_i) <= high if o_i is right,    ppl_ref(o_i) >= low if it is wrong

A right answer that surprises the reference counts as a lucky guess, and a wrong answer that does not surprise it as a
near miss; both get advantage 0. Thresholds are fixed, or quantiles of the first completions, estimated once and then
frozen: thresholds that followed the policy's rollouts would chase it. Until they are estimated, nothing is masked.

Degenerate cases: a completion whose correctness or reference perplexity is unknown is not kept. A mask may leave a
group one-sided: the remaining completions keep the advantages that they had in the whole group.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trl_capo.calibration import metrics
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.groups import RolloutGroups
from trl_capo.trainer.state_values import finite_number, finite_numbers


def reference_perplexity_mask(correct: Tensor, ref_ppl: Tensor, low: float, high: float) -> Tensor:
    """The completions that CAPO learns from, chosen by their perplexity under a frozen reference.

    Args:
        correct: Correctness, shape (P, G): True or at least 0.5 = correct. NaN = unknown.
        ref_ppl: Perplexity under the reference, exp(-mean token log-prob), shape (P, G). NaN = unknown.
        low: Wrong completions below this are dropped; >= 1.
        high: Correct completions above this are dropped; >= 1.

    Returns:
        Boolean, shape (P, G): True = kept. Completions of unknown correctness or perplexity are not kept.

    Source: arXiv 2604.12632.

    Example:
        >>> correct, ref_ppl = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.2, 3.0, 1.2, 1.01]])
        >>> reference_perplexity_mask(correct, ref_ppl, low=1.05, high=2.5)
        tensor([[ True, False,  True, False]])
    """
    # Half precision would round the thresholds: 1.05 is 1.046875 in bfloat16.
    correct, ref_ppl = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (correct, ref_ppl))
    return ((correct >= 0.5) & (ref_ppl <= high)) | ((correct < 0.5) & (ref_ppl >= low))


class PerplexityMask:
    """The mask of a training run: its thresholds, decisions, metrics and state.

    The trainer calls `update` once per training generation and applies `kept` to the advantages that a method
    returns, so no method can forget either.

    Args:
        args: The configuration, with `ref_ppl_mask` and its related options.
    """

    def __init__(self, args: GroupAdvantageConfig):
        self.active = args.ref_ppl_mask
        self._fixed = (args.ref_ppl_low, args.ref_ppl_high)
        self._estimated = None
        if self.active and args.ref_ppl_quantiles is not None:
            self._estimated = PerplexityThresholds(
                (args.ref_ppl_quantiles[0], args.ref_ppl_quantiles[1]),
                args.ref_ppl_quantiles_by_class,
                args.ref_ppl_quantile_samples,
            )

    @property
    def thresholds(self) -> tuple[float, float]:
        """Low and high threshold; NaN without a mask or until they are estimated."""
        if not self.active:
            return math.nan, math.nan
        return self._fixed if self._estimated is None else self._estimated.low_high

    @property
    def estimating(self) -> bool:
        """Whether thresholds are still being estimated, which needs the perplexity of every valid completion."""
        return self._estimated is not None and not self._estimated.ready

    def update(self, groups: RolloutGroups) -> None:
        """Adds a training generation to the estimate, unless the thresholds are frozen."""
        if self._estimated is not None:
            self._estimated.update(groups.correct, _ref_ppl(groups), groups.valid)

    def kept(self, groups: RolloutGroups) -> Tensor:
        """Completions that may have an advantage, shape (P, G), boolean."""
        low, high = self.thresholds
        if math.isnan(low):
            return torch.ones_like(groups.valid)
        return reference_perplexity_mask(groups.correct, _ref_ppl(groups), low, high)

    def arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        """Arrays of a generation that the metrics need."""
        if not self.active or groups.ref_mean_logps is None:
            return {}
        return {"kept": groups.kept, "ref_mean_logps": groups.ref_mean_logps}

    def metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics over the logging window, from its `arrays`; empty without a mask."""
        if not self.active:
            return {}
        masked, ref_mean_logps = 1.0 - window["kept"], window["ref_mean_logps"]
        seen = window["in_mixed_group"].astype(bool) & np.isfinite(ref_mean_logps)
        correct, wrong = seen & (window["correct"] == 1), seen & (window["correct"] == 0)
        low, high = self.thresholds
        return {
            "capo/frac_masked_correct": metrics.nanmean(masked[correct]),
            "capo/frac_masked_wrong": metrics.nanmean(masked[wrong]),
            "capo/ref_ppl_correct": metrics.perplexity(ref_mean_logps[correct]),
            "capo/ref_ppl_wrong": metrics.perplexity(ref_mean_logps[wrong]),
            "capo/ref_ppl_low": low,
            "capo/ref_ppl_high": high,
            "capo/mask_active": float(not math.isnan(low)),
        }

    def state(self) -> dict:
        """State that must survive a restart, as JSON; empty without a mask."""
        if not self.active:
            return {}
        low, high = self.thresholds
        return {
            # Thresholds are for the reader; a restart restores the samples that they are estimated from.
            "ref_ppl_low": None if math.isnan(low) else low,
            "ref_ppl_high": None if math.isnan(high) else high,
            "ref_ppl_correct": self._estimated.correct if self._estimated else [],
            "ref_ppl_wrong": self._estimated.wrong if self._estimated else [],
        }

    def load_state(self, state: dict) -> None:
        """Restores what `state` returned.

        Raises:
            UserError: A value is not what `state` would have written.
        """
        if not self.active:
            return
        for key in ("ref_ppl_low", "ref_ppl_high"):
            finite_number(state, key, above=0)
        correct = finite_numbers(state, "ref_ppl_correct", minimum=0)
        wrong = finite_numbers(state, "ref_ppl_wrong", minimum=0)
        if self._estimated is not None:
            self._estimated.correct, self._estimated.wrong = correct, wrong


@dataclass
class PerplexityThresholds:
    """Thresholds of CAPO's mask: quantiles of the reference perplexity of the first completions.

    Attributes:
        quantiles: Low and high, in (0, 1).
        by_class: Low from wrong completions and high from correct ones, instead of both from all.
        num_samples: The thresholds freeze with the batch that brings the number of completions to this. With
            `by_class`, each class must supply at least a sixteenth: a quantile of two or three values is noise.
        correct: Reference perplexities of correct completions seen so far.
        wrong: The same for wrong completions.
    """

    quantiles: tuple[float, float]
    by_class: bool = False
    num_samples: int = 1024
    correct: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)

    def update(self, correct: Tensor, ref_ppl: Tensor, valid: Tensor) -> None:
        """Adds a batch of completions, all arguments of shape (P, G), unless the thresholds are frozen."""
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


def _ref_ppl(groups: RolloutGroups) -> Tensor:
    assert groups.ref_mean_logps is not None, "the trainer has a reference whenever the mask is active"
    return groups.ref_mean_logps.neg().exp()
