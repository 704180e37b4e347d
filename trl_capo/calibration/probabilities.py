"""Confidence that is a probability of being right: Brier score, reliability bins, expected calibration error.

The rules of `trl_capo.calibration.metrics` hold.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.rows import average_ties, nanmean, paired_rows, require_probabilities


def brier_score(correct: ArrayLike, probability: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Mean squared distance of a stated probability from what happened.

        mean of  (probability - correct)^2

    Args:
        correct: Correctness, any shape.
        probability: Probability of being right, same shape, in [0, 1]. `exp(mean_logp)` lies in this range but is not
            such a probability; map it first (`trl_capo.calibration.posthoc`).
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better; 0.25 if every probability is 0.5; NaN without a valid row.

    Example:
        >>> brier_score([1, 0], [0.5, 1.0])
        0.625
    """
    correct, probability, valid = paired_rows(correct, probability, valid)
    require_probabilities(probability[valid])
    return nanmean((probability[valid] - correct[valid]) ** 2)


def calibration_bins(
    correct: ArrayLike,
    probability: ArrayLike,
    *,
    num_bins: int = 10,
    equal_mass: bool = False,
    valid: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows, mean probability and accuracy of each bin, as in a reliability diagram.

    Bins with equal width are [0, 1/M), ..., [1 - 1/M, 1]. Bins with equal mass cut the rows, sorted by probability, at
    the multiples of N/M. If a cut separates rows with equal probability, each counts with their average correctness.

    Args:
        correct: Correctness, any shape.
        probability: Probability of being right, same shape, in [0, 1].
        num_bins: M, at least 1.
        equal_mass: As many rows in every bin, instead of equal width.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        Number of rows, mean probability and accuracy of each bin, shape (M,) each; NaN for an empty bin.

    Example:
        >>> count, stated, right = calibration_bins([1, 0, 1], [0.25, 0.25, 1.0], num_bins=2)
        >>> count.tolist(), stated.tolist(), right.tolist()
        ([2, 1], [0.25, 1.0], [0.5, 1.0])
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}.")
    correct, probability, valid = paired_rows(correct, probability, valid)
    correct, probability = correct[valid], probability[valid]
    require_probabilities(probability)
    if equal_mass:
        order = np.argsort(probability)
        correct, probability = average_ties(correct[order], probability[order]), probability[order]
        bins = np.arange(correct.size) * num_bins // max(correct.size, 1)
    else:
        edges = np.arange(num_bins) / num_bins
        bins = np.searchsorted(edges, probability, side="right") - 1
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(bins, probability, num_bins) / count, np.bincount(bins, correct, num_bins) / count


def expected_calibration_error(
    correct: ArrayLike,
    probability: ArrayLike,
    *,
    num_bins: int = 10,
    equal_mass: bool = False,
    overconfident_only: bool = False,
    valid: ArrayLike | None = None,
) -> float:
    """ECE: the distance between stated probability and accuracy, averaged over bins.

        sum over bins of  n_bin / N * |mean probability - accuracy|        (`calibration_bins` states the bins)

    Args:
        correct: Correctness, any shape.
        probability: Probability of being right, same shape, in [0, 1].
        num_bins: Number of bins; 10 and 20 are common.
        equal_mass: As many rows in every bin, instead of equal width.
        overconfident_only: Sum only bins whose probability exceeds their accuracy: how much the model overstates.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better; NaN without a valid row.

    Example:
        >>> expected_calibration_error([1, 0, 1, 1], [0.75, 0.75, 0.25, 0.25])  # .75 and .25 are right 1/2 and 1
        0.5
        >>> expected_calibration_error([1, 0, 1, 1], [0.75, 0.75, 0.25, 0.25], overconfident_only=True)
        0.125
    """
    count, stated, right = calibration_bins(
        correct, probability, num_bins=num_bins, equal_mass=equal_mass, valid=valid
    )
    filled = count > 0
    if not filled.any():
        return float("nan")
    gap = stated[filled] - right[filled]
    gap = np.maximum(gap, 0) if overconfident_only else np.abs(gap)
    return float(np.sum(count[filled] * gap) / count.sum())
