"""The numbers of one model on one set of prompts, from its graded samples: how good, and how trustworthy."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration import metrics
from trl_capo.calibration.selection import choose_all, majority_vote, perplexity_consistency


def summarize(
    correct: ArrayLike, mean_logps: ArrayLike, answers: Sequence[Sequence[Hashable | None]]
) -> dict[str, float]:
    """Accuracy, calibration and what selection makes of the same samples.

    Args:
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, N): P prompts, N samples each.
        mean_logps: Mean token log-prob of each sample, in nats, shape (P, N). Higher is surer.
        answers: Canonical answers, P lists of N; None where nothing was extracted.

    Returns:
        `accuracy` (mean@N), `auc_within`, `auc_pooled`, `majority` and `perplexity_consistency` (accuracy of the
        answer chosen from N samples, identical texts counted as often as they were sampled), `precision_at_50` and
        `precision_at_80` (accuracy of the surest 50% and 80% of all samples), `ppl_correct` and `ppl_wrong` (geometric
        mean perplexity). Undefined = NaN.

    Example:
        >>> summary = summarize([[1, 0, 0]], [[-0.1, -1.0, -2.0]], [["4", "5", "5"]])
        >>> summary["auc_within"], summary["majority"], summary["perplexity_consistency"]
        (1.0, 0.0, 1.0)
    """
    correct, mean_logps = np.asarray(correct, dtype=float), np.asarray(mean_logps, dtype=float)
    return {
        "accuracy": metrics.accuracy(correct),
        "auc_within": metrics.auc_within(correct, mean_logps),
        "auc_pooled": metrics.auc_pooled(correct, mean_logps),
        "majority": metrics.nanmean(choose_all(majority_vote, answers, mean_logps, correct)[1]),
        "perplexity_consistency": metrics.nanmean(choose_all(perplexity_consistency, answers, mean_logps, correct)[1]),
        "precision_at_50": metrics.precision_at_coverage(correct, mean_logps, 0.5),
        "precision_at_80": metrics.precision_at_coverage(correct, mean_logps, 0.8),
        "ppl_correct": metrics.perplexity(mean_logps, valid=correct == 1),
        "ppl_wrong": metrics.perplexity(mean_logps, valid=correct == 0),
    }
