"""CAPO's mask by a reference's perplexity (arXiv 2604.12632), an option of every method on the seam.

    kept_i = ppl_ref(o_i) <= high if o_i is right,    ppl_ref(o_i) >= low if it is wrong

A right answer that surprises the reference is taken for a lucky guess, a wrong one that does not for a near miss; both
get advantage 0. Off by default except in CAPO. Where thresholds are quantiles, they are those of the first completions
(`trl_capo.methods.estimates`), and until these are there nothing is masked.

Degenerate cases: a completion without a reward or a token is not kept. A mask may leave a group one-sided: what is
left keeps the advantage that it had among all.
"""

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trl_capo.calibration import metrics
from trl_capo.methods.advantages import reference_perplexity_mask, reward_only_advantages
from trl_capo.methods.estimates import PerplexityThresholds
from trl_capo.trainer.config import GroupAdvantageConfig
from trl_capo.trainer.group_advantage import GroupAdvantageTrainer, RolloutGroups
from trl_capo.trainer.state_values import finite_number, finite_numbers


@dataclass
class ReferenceMaskConfig(GroupAdvantageConfig):
    """Configuration of `ReferenceMaskTrainer`: `GroupAdvantageConfig` and the mask.

    Parameters:
        ref_ppl_mask (`bool`, *optional*, defaults to `False`):
            Drop correct completions that the reference finds surprising and wrong ones that it finds likely. If
            `False` and `beta=0`, no reference model is loaded.
        ref_ppl_low (`float`, *optional*, defaults to `1.05`):
            Wrong completions with a lower reference perplexity are dropped.
        ref_ppl_high (`float`, *optional*, defaults to `2.5`):
            Correct completions with a higher reference perplexity are dropped.
        ref_ppl_quantiles (`list[float]`, *optional*):
            Two quantiles in (0, 1), e.g. `0.25 0.75`. The thresholds are then these quantiles of the reference
            perplexity of the first completions of the training, estimated once and frozen; until then nothing is
            masked.
        ref_ppl_quantiles_by_class (`bool`, *optional*, defaults to `False`):
            Take the low threshold from wrong completions and the high one from correct completions, instead of both
            from all. Low may then exceed high.
        ref_ppl_quantile_samples (`int`, *optional*, defaults to `1024`):
            Number of completions from which the quantiles are taken.
    """

    ref_ppl_mask: bool = field(
        default=False,
        metadata={
            "help": "Drop correct completions that the reference finds surprising and wrong ones that it finds "
            "likely. If False and beta=0, no reference model is loaded."
        },
    )
    ref_ppl_low: float = field(
        default=1.05, metadata={"help": "Wrong completions with a lower reference perplexity are dropped."}
    )
    ref_ppl_high: float = field(
        default=2.5, metadata={"help": "Correct completions with a higher reference perplexity are dropped."}
    )
    ref_ppl_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "Two quantiles in (0, 1), e.g. `0.25 0.75`, of the reference perplexity of the first completions, "
            "that replace the fixed thresholds."
        },
    )
    ref_ppl_quantiles_by_class: bool = field(
        default=False,
        metadata={"help": "Low threshold from wrong completions, high one from correct ones, not both from all."},
    )
    ref_ppl_quantile_samples: int = field(
        default=1024, metadata={"help": "Number of completions from which the quantiles are taken."}
    )

    def __post_init__(self):
        for name in ("ref_ppl_low", "ref_ppl_high"):
            threshold = getattr(self, name)
            if not (threshold >= 1 and math.isfinite(threshold)):
                raise ValueError(f"{name} must be a finite perplexity of at least 1, got {threshold}.")
        quantiles = self.ref_ppl_quantiles
        if quantiles is not None and (len(quantiles) != 2 or not all(0 < quantile < 1 for quantile in quantiles)):
            raise ValueError(f"ref_ppl_quantiles must be two numbers in (0, 1), low and high, got {quantiles}.")
        if self.ref_ppl_quantile_samples < 2:
            raise ValueError(f"ref_ppl_quantile_samples must be at least 2, got {self.ref_ppl_quantile_samples}.")
        if self.ref_ppl_quantiles_by_class and quantiles is None:
            raise ValueError("ref_ppl_quantiles_by_class=True needs ref_ppl_quantiles, e.g. [0.25, 0.75].")
        if self.sync_ref_model and not self.ref_ppl_mask and self.beta == 0:
            raise ValueError(
                "sync_ref_model=True has no reference to update: set ref_ppl_mask=True or a beta above 0, or leave "
                "sync_ref_model off."
            )
        super().__post_init__()
        self._warn_about_the_mask()

    def _warn_about_the_mask(self) -> None:
        """Settings that run but do not mean what the paper's numbers mean."""
        low, high = self.ref_ppl_quantiles or (self.ref_ppl_low, self.ref_ppl_high)
        if self.ref_ppl_mask and not self.ref_ppl_quantiles_by_class and low >= high:
            names = "ref_ppl_quantiles" if self.ref_ppl_quantiles else "ref_ppl_low and ref_ppl_high"
            warnings.warn(
                f"{names} are {low} and {high}: with low >= high every completion between them is dropped, correct or "
                "not.",
                UserWarning,
                stacklevel=4,
            )
        if self.ref_ppl_mask and self.ref_ppl_quantiles is None and self.temperature != 1:
            warnings.warn(
                f"temperature={self.temperature}: log-probs are those of the tempered distribution, so the absolute "
                "thresholds ref_ppl_low and ref_ppl_high do not mean what they mean at temperature 1. Use "
                "ref_ppl_quantiles.",
                UserWarning,
                stacklevel=4,
            )


class ReferenceMaskTrainer(GroupAdvantageTrainer):
    """GRPO, with the mask if `ref_ppl_mask` is set; takes a `ReferenceMaskConfig`.

    A method derives from it and lets `_masked(advantages, groups)` end its `_compute_advantages`.
    """

    config_class = ReferenceMaskConfig
    _name, _paper = GroupAdvantageTrainer._name, GroupAdvantageTrainer._paper  # still GRPO

    def _setup_method(self) -> None:
        config = self.args
        self._estimated_thresholds = None
        if config.ref_ppl_mask and config.ref_ppl_quantiles is not None:
            self._estimated_thresholds = PerplexityThresholds(
                tuple(config.ref_ppl_quantiles), config.ref_ppl_quantiles_by_class, config.ref_ppl_quantile_samples
            )
        if config.multi_objective_aggregation != "sum_then_normalize" and (config.ref_ppl_mask or not self._is_grpo):
            raise ValueError(
                f"multi_objective_aggregation={config.multi_objective_aggregation!r} turns rewards into advantages in "
                f"TRL's way, where {'the mask needs' if self._is_grpo else f'{self._name} has'} its own: set it to "
                "'sum_then_normalize'."
            )

    @staticmethod
    def needs_ref(args: ReferenceMaskConfig) -> bool:
        return args.ref_ppl_mask

    @classmethod
    def needs_correct(cls, args: ReferenceMaskConfig) -> bool:
        return args.ref_ppl_mask or cls._compute_advantages is not ReferenceMaskTrainer._compute_advantages

    @property
    def ref_ppl_thresholds(self) -> tuple[float, float]:
        """Low and high threshold of the mask; NaN without a mask and until they are estimated."""
        if not self.args.ref_ppl_mask:
            return math.nan, math.nan
        if self._estimated_thresholds is None:
            return self.args.ref_ppl_low, self.args.ref_ppl_high
        return self._estimated_thresholds.low_high

    def _compute_advantages(self, groups: RolloutGroups) -> Tensor | None:
        if not self.args.ref_ppl_mask:
            return None  # TRL's
        # Of all rewards, as TRL has it: a truncated completion counts in the mean, though it has no loss.
        return self._masked(reward_only_advantages(groups.rewards, scale_rewards=self.scale_rewards), groups)

    @property
    def _is_grpo(self) -> bool:
        return type(self)._compute_advantages is ReferenceMaskTrainer._compute_advantages

    def _rows_needing_logps(self, groups: RolloutGroups) -> Tensor:
        # GRPO reads none: those of mixed groups are for the metrics.
        return groups.mixed & groups.valid if self._is_grpo else groups.valid

    def _rows_needing_ref(self, groups: RolloutGroups) -> Tensor:
        estimating = self._estimated_thresholds is not None and not self._estimated_thresholds.ready
        return groups.valid if estimating and self.model.training else self._rows_to_mask(groups)

    def _rows_to_mask(self, groups: RolloutGroups) -> Tensor:
        """Completions that may have an advantage to lose, shape (P, G), boolean."""
        scorable = groups.rewards.isfinite()
        highest = groups.rewards.masked_fill(~scorable, -torch.inf).amax(dim=1, keepdim=True)
        lowest = groups.rewards.masked_fill(~scorable, torch.inf).amin(dim=1, keepdim=True)
        return groups.valid & (highest > lowest)

    def _masked(self, advantages: Tensor, groups: RolloutGroups) -> Tensor:
        """Advantages (P, G), 0 where the mask drops the completion; first learns the thresholds from this batch."""
        self._update_thresholds(groups, groups.valid)
        return advantages.masked_fill(~self._kept(groups), 0.0)

    def _update_thresholds(self, groups: RolloutGroups, valid: Tensor) -> None:
        if self._estimated_thresholds is not None and self.model.training:
            self._estimated_thresholds.update(groups.correct, groups.ref_mean_logps.neg().exp(), valid)

    def _kept(self, groups: RolloutGroups) -> Tensor:
        low, high = self.ref_ppl_thresholds
        if math.isnan(low):
            return torch.ones_like(groups.valid)
        return reference_perplexity_mask(groups.correct, groups.ref_mean_logps.neg().exp(), low, high)

    def _calibration_arrays(self, groups: RolloutGroups) -> dict[str, Tensor]:
        arrays = super()._calibration_arrays(groups)
        if not self.args.ref_ppl_mask:
            return arrays
        return {**arrays, "kept": self._kept(groups), "ref_mean_logps": groups.ref_mean_logps}

    def _calibration_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        logged = super()._calibration_metrics(window)
        if not self.args.ref_ppl_mask:
            return logged
        masked, ref_mean_logps = 1.0 - window["kept"], window["ref_mean_logps"]
        seen = window["in_mixed_group"].astype(bool) & np.isfinite(ref_mean_logps)
        correct, wrong = seen & (window["correct"] == 1), seen & (window["correct"] == 0)
        low, high = self.ref_ppl_thresholds
        return {
            **logged,
            "capo/frac_masked_correct": metrics.nanmean(masked[correct]),
            "capo/frac_masked_wrong": metrics.nanmean(masked[wrong]),
            "capo/ref_ppl_correct": metrics.perplexity(ref_mean_logps[correct]),
            "capo/ref_ppl_wrong": metrics.perplexity(ref_mean_logps[wrong]),
            "capo/ref_ppl_low": low,
            "capo/ref_ppl_high": high,
            "capo/mask_active": float(not math.isnan(low)),
        }

    def _method_state(self) -> dict:
        if not self.args.ref_ppl_mask:
            return {}
        low, high = self.ref_ppl_thresholds
        estimated = self._estimated_thresholds
        return {
            # For the reader; what is restored are the samples from which they were estimated.
            "ref_ppl_low": None if math.isnan(low) else low,
            "ref_ppl_high": None if math.isnan(high) else high,
            "ref_ppl_correct": estimated.correct if estimated else [],
            "ref_ppl_wrong": estimated.wrong if estimated else [],
        }

    def _load_method_state(self, state: dict) -> None:
        for key in ("ref_ppl_low", "ref_ppl_high"):
            finite_number(state, key, above=0)
        correct = finite_numbers(state, "ref_ppl_correct", minimum=0)
        wrong = finite_numbers(state, "ref_ppl_wrong", minimum=0)
        if self._estimated_thresholds is not None:
            self._estimated_thresholds.correct, self._estimated_thresholds.wrong = correct, wrong
