"""Metrics over whole logging windows, not means over batches: the mean of batch AUCs is not the AUC of the set."""

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from trl_capo.calibration import metrics


if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object


class CalibrationLogging(Base):
    """A mixin for TRL's trainers that keeps the rows of a logging window and computes metrics over all of them.

    A trainer calls `_remember(arrays)` for each generation. `log` computes `_window_metrics` over the window's
    rows, in training and in evaluation, and logs an undefined metric (NaN) as None, as TRL does.
    """

    model: PreTrainedModel
    _num_eval_prompts: int | None = None
    _eval_prefix = "eval"

    @property
    def _window(self) -> dict[str, dict[str, list[np.ndarray]]]:
        return self.__dict__.setdefault("_windows", {"train": defaultdict(list), "eval": defaultdict(list)})

    def _remember(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds a generation to the window; each array starts with the prompt axis."""
        window = self._window["train" if self.model.training else "eval"]
        for name, array in arrays.items():
            window[name].append(array)

    def _window_metrics(self, window: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics over the logging window, whose arrays are concatenated along the prompts."""
        return calibration_metrics(window)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        # With several ranks, the last batch is filled up with the first prompts, which must not count twice.
        self._num_eval_prompts = len(dataloader.dataset) if isinstance(dataloader.dataset, Dataset) else None
        self._eval_prefix = metric_key_prefix
        self._window["eval"].clear()  # `predict` runs this loop without logging
        return super().evaluation_loop(dataloader, *args, **kwargs | {"metric_key_prefix": metric_key_prefix})

    def log(self, logs: dict, start_time: float | None = None) -> None:
        training = self.model.training
        window = self._window["train" if training else "eval"]
        if window:
            num_prompts = None if training else self._num_eval_prompts
            rows = {name: np.concatenate(arrays)[:num_prompts] for name, arrays in window.items()}
            prefix = "" if training else f"{self._eval_prefix}_"
            for name, value in self._window_metrics(rows).items():
                logs[prefix + name] = None if math.isnan(value) else value
            window.clear()
        if not training and self._eval_prefix.startswith("eval_"):
            # TRL's metrics do not say which evaluation set they belong to: log them under the set's name too.
            set_name = self._eval_prefix.removeprefix("eval_")
            own = self._metrics["eval"]
            own.update({f"{set_name}_{name}": values for name, values in own.items()})
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics, trial):
        # An undefined metric is logged as None, which cannot be compared. NaN can, and is never the best.
        defined = {name: math.nan if value is None else value for name, value in metrics.items()}
        return super()._determine_best_metric(defined, trial)


def calibration_metrics(window: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics that every method logs.

    Args:
        window: `correct` (1, 0 or NaN), `mean_logps` (NaN = not scored), `valid` and `in_mixed_group`, each of shape
            (P, G) with P the prompts of the window.
    """
    correct, mean_logps = window["correct"], window["mean_logps"]
    valid = window["valid"].astype(bool) & ~np.isnan(correct)
    in_mixed_group = window["in_mixed_group"].astype(bool)
    scored = valid & np.isfinite(mean_logps)
    fractions = metrics.group_fractions(correct, valid=valid)
    return {
        "capo/auc_within": metrics.auc_within(correct, mean_logps, valid=scored),
        "capo/auc_pooled": metrics.auc_pooled(correct, mean_logps, valid=scored),
        **{f"capo/{name}": value for name, value in fractions.items()},
        "capo/frac_unscorable": 1.0 - float(valid.mean()),
        "capo/ppl_correct": metrics.perplexity(mean_logps[in_mixed_group & (correct == 1)]),
        "capo/ppl_wrong": metrics.perplexity(mean_logps[in_mixed_group & (correct == 0)]),
    }
