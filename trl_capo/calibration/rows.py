"""Check rows of right and wrong answers, and select those that take part in a metric.

The rules of `trl_capo.calibration.metrics` hold.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def paired_rows(
    correct: ArrayLike, confidence: ArrayLike, valid: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Correctness and confidence as checked float arrays, and a mask of the `valid` rows where both are numbers.

    Example:
        >>> correct, confidence, valid = paired_rows([1, 0, 1], [0.5, float("nan"), 0.1])
        >>> valid.tolist()
        [True, False, True]
    """
    correct, confidence = as_correct(correct), np.asarray(confidence, dtype=np.float64)
    if correct.shape != confidence.shape:
        raise ValueError(
            f"`correct` and `confidence` must have the same shape, got {correct.shape} and {confidence.shape}."
        )
    return correct, confidence, valid_rows(valid, correct, confidence)


def valid_rows(valid: ArrayLike | None, *arrays: NDArray[np.float64]) -> NDArray[np.bool_]:
    numbers = ~np.logical_or.reduce([np.isnan(array) for array in arrays])
    if valid is None:
        return numbers
    valid = np.asarray(valid, dtype=bool)
    if valid.shape != numbers.shape:
        raise ValueError(f"`valid` must have the shape of the rows it marks, {numbers.shape}, got {valid.shape}.")
    return valid & numbers


def as_correct(correct: ArrayLike) -> NDArray[np.float64]:
    correct = np.asarray(correct, dtype=np.float64)
    strange = correct[~((correct == 0) | (correct == 1) | np.isnan(correct))]
    if strange.size:
        raise ValueError(f"`correct` must hold 0, 1 or NaN, got {strange[0]}. Threshold graded rewards first.")
    return correct


def require_probabilities(values: NDArray[np.float64]) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        strange = values[(values < 0) | (values > 1)][0]
        raise ValueError(
            f"`probability` must lie in [0, 1], got {strange}. A mean log-prob is not a probability: map it with "
            "`trl_capo.calibration.posthoc` first."
        )


def require_groups(correct: NDArray[np.float64]) -> None:
    if correct.ndim != 2:
        raise ValueError(f"`correct` must have shape (P, G), prompts by completions, got {correct.shape}.")


def count_by_prompt(correct: ArrayLike, valid: ArrayLike | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    correct = as_correct(correct)
    require_groups(correct)
    valid = valid_rows(valid, correct)
    return np.count_nonzero(valid & (correct == 1), axis=1), np.count_nonzero(valid, axis=1)


def average_ties(correct: NDArray[np.float64], confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace each row's correctness with the mean over all rows with the same confidence. Rows must be sorted."""
    starts = np.flatnonzero(np.concatenate((np.ones(min(correct.size, 1), bool), confidence[1:] != confidence[:-1])))
    if starts.size == correct.size:
        return correct
    sizes = np.diff(starts, append=correct.size)
    return np.repeat(np.add.reduceat(correct, starts) / sizes, sizes)


def nanmean(values: ArrayLike) -> float:
    """Mean over all values that are not NaN, without numpy's warning if none is left."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else float("nan")
