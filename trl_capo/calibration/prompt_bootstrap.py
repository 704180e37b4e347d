"""Uncertainty of one model's metric, or of the difference between two models: a bootstrap over the prompts alone.

These intervals do not include variation between training runs; for that see `trl_capo.calibration.bootstrap`.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.estimate import Estimate, interval


def prompt_interval(
    metric: Callable[[NDArray, NDArray], float],
    correct: ArrayLike,
    confidence: ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A metric of one model's samples with its interval. Prompts are resampled, each with all its samples.

    Samples of one prompt are similar, so resampling single samples would make intervals too narrow.

    Args:
        metric: Function of correctness and confidence, shape (P, G) each, e.g.
            `trl_capo.calibration.metrics.auc_within`.
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G).
        level: Share of the replicates inside the interval.
        num_resamples: Number of replicates.
        seed: Seed of the draws.

    Returns:
        The metric and its interval. With a single prompt, the ends are NaN.

    Example:
        >>> from trl_capo.calibration.metrics import auc_pooled
        >>> str(prompt_interval(auc_pooled, [[1, 0], [1, 0]], [[0.9, 0.1], [0.8, 0.2]]))
        '1.000 [1.000, 1.000]'
    """
    correct, confidence = _paired_samples(correct, confidence)
    draws = _draw_prompts(len(correct), num_resamples, seed)
    replicates = [metric(correct[prompts], confidence[prompts]) for prompts in draws]
    return _over_prompts(metric(correct, confidence), replicates, len(correct), level)


def prompt_difference(
    metric: Callable[[NDArray, NDArray], float],
    samples: tuple[ArrayLike, ArrayLike],
    baseline: tuple[ArrayLike, ArrayLike],
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Difference in a metric between two models on the same prompts, with its paired interval.

    Args:
        metric: As in `prompt_interval`.
        samples: Correctness and confidence of the model, shape (P, G) each.
        baseline: Correctness and confidence of the baseline, shape (P, G') each. Row p must be the same prompt.
        level: Share of the replicates inside the interval.
        num_resamples: Number of replicates.
        seed: Seed of the draws.

    Returns:
        The model's metric minus the baseline's, and the interval. With a single prompt, the ends are NaN.

    Example:
        >>> from trl_capo.calibration.metrics import auc_within
        >>> better, worse = ([[1, 0]] * 3, [[0.9, 0.1]] * 3), ([[1, 0]] * 3, [[0.1, 0.9]] * 3)
        >>> str(prompt_difference(auc_within, better, worse))
        '1.000 [1.000, 1.000]'
    """
    ours, theirs = _paired_samples(*samples), _paired_samples(*baseline)
    if len(ours[0]) != len(theirs[0]):
        raise ValueError(
            f"the two models answered {len(ours[0])} and {len(theirs[0])} prompts. Keep those that both answered, in "
            "the same order."
        )

    def difference(prompts: NDArray | slice) -> float:
        return metric(*(array[prompts] for array in ours)) - metric(*(array[prompts] for array in theirs))

    draws = _draw_prompts(len(ours[0]), num_resamples, seed)
    replicates = [difference(prompts) for prompts in draws]
    return _over_prompts(difference(slice(None)), replicates, len(ours[0]), level)


def _over_prompts(value: float, replicates: list[float], num_prompts: int, level: float) -> Estimate:
    if num_prompts == 1:  # resampling one prompt says nothing about other prompts
        return Estimate(value, float("nan"), float("nan"))
    return interval(value, replicates, level=level)


def _paired_samples(correct: ArrayLike, confidence: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    correct, confidence = np.asarray(correct, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if correct.shape != confidence.shape or correct.ndim != 2 or len(correct) == 0:
        raise ValueError(
            f"`correct` and `confidence` must have the same shape (P, G) with at least one prompt, got "
            f"{correct.shape} and {confidence.shape}."
        )
    return correct, confidence


def _draw_prompts(num_prompts: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return (rng.integers(num_prompts, size=num_prompts) for _ in range(num_resamples))
