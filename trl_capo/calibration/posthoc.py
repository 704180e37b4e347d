"""Map a confidence to a probability of being right: fit on one part of the questions, use on the others.

A mean log-prob ranks answers but does not say how often they are right. Platt scaling maps it with a two-parameter
logistic curve, isotonic regression with any rising step function. If higher confidence means more often right, neither
changes the ranking (isotonic regression may tie rows), so AUC stays the same, and ECE and Brier score become
meaningful. If higher confidence means less often right, Platt scaling reverses the ranking and isotonic regression
ties all rows.

Both come from scikit-learn (`pip install 'trl-capo[report]'`). Assumption: the questions used for fitting and for
prediction come from the same source. Degenerate case: nothing can be learnt from answers that are all right or all
wrong, so these are refused.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.metrics import paired_rows


def fit_platt(correct: ArrayLike, confidence: ArrayLike) -> Callable[[ArrayLike], NDArray[np.float64]]:
    """Platt scaling: sigmoid(a * confidence + b), with a and b fitted by maximum likelihood.

    Args:
        correct: Correctness, any shape, 0, 1 or NaN.
        confidence: Confidence, same shape.

    Returns:
        A function from confidences to probabilities in [0, 1], NaN where the confidence is NaN.

    Raises:
        ValueError: If all answers are right or all are wrong.

    Example:
        >>> probability = fit_platt([0, 0, 1, 0, 1, 1], [-3.0, -2.0, -1.5, -1.0, -0.5, 0.0])
        >>> bool(probability(-3.0) < 0.5 < probability(0.0))
        True
    """
    from sklearn.linear_model import LogisticRegression

    correct, confidence = _both_classes(correct, confidence)
    # Standardise, so that any scale works: the solver stops early on values around 0.01.
    center, scale = confidence.mean(), confidence.std() or 1.0
    model = LogisticRegression(C=np.inf).fit(((confidence - center) / scale)[:, None], correct)
    return _on_numbers(lambda values: model.predict_proba(((values - center) / scale)[:, None])[:, 1])


def fit_isotonic(correct: ArrayLike, confidence: ArrayLike) -> Callable[[ArrayLike], NDArray[np.float64]]:
    """Isotonic regression: the non-decreasing function of confidence that is closest to correctness.

    Args:
        correct: Correctness, any shape, 0, 1 or NaN.
        confidence: Confidence, same shape.

    Returns:
        A function from confidences to probabilities in [0, 1], NaN where the confidence is NaN. Outside the fitted
        range it stays at the last value.

    Raises:
        ValueError: If all answers are right or all are wrong.

    Example:
        >>> fit_isotonic([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])([0.0, 0.25, 0.4]).tolist()
        [0.0, 0.5, 1.0]
    """
    from sklearn.isotonic import IsotonicRegression

    correct, confidence = _both_classes(correct, confidence)
    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(confidence, correct)
    return _on_numbers(model.predict)


def _both_classes(correct: ArrayLike, confidence: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    correct, confidence, usable = paired_rows(correct, confidence)
    correct, confidence = correct[usable], confidence[usable]
    if len(np.unique(correct)) < 2:
        raise ValueError(
            "right and wrong answers are needed to fit a probability. Use more questions, or harder ones."
        )
    return correct, confidence


def _on_numbers(predict: Callable[[NDArray], NDArray]) -> Callable[[ArrayLike], NDArray[np.float64]]:
    def probability(confidence: ArrayLike) -> NDArray[np.float64]:
        confidence = np.asarray(confidence, dtype=np.float64)
        result, numbers = np.full(confidence.shape, np.nan), ~np.isnan(confidence)
        if numbers.any():
            result[numbers] = predict(confidence[numbers])
        return result

    return probability
