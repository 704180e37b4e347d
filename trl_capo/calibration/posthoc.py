"""From a confidence to a probability of being right, learnt on one part of the questions and used on the others.

A mean log-prob ranks answers; it does not say how often they are right. Platt scaling puts it through a logistic curve
with two parameters, isotonic regression through any rising step function. Where surer means more often right, neither
changes the order of what it ranks (isotonic may tie), so AUC stays; ECE and Brier score become meaningful. Where it
means less often right, Platt scaling turns the order round and isotonic regression ties all.

Both are scikit-learn's (`pip install 'trl-capo[report]'`). Assumption: the questions it is used on come from where the
ones it was fitted on came from. Degenerate case: fitted on answers that are all right or all wrong there is nothing to
learn, which is refused.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.metrics import paired_rows


def fit_platt(correct: ArrayLike, confidence: ArrayLike) -> Callable[[ArrayLike], NDArray[np.float64]]:
    """Platt scaling: sigmoid(a * confidence + b) with a and b of highest likelihood.

    Args:
        correct: Correctness, any shape, 0, 1 or NaN.
        confidence: Confidence, same shape.

    Returns:
        A function from confidences to probabilities in [0, 1], NaN where the confidence is.

    Raises:
        ValueError: If all answers are right or all are wrong.

    Example:
        >>> probability = fit_platt([0, 0, 1, 0, 1, 1], [-3.0, -2.0, -1.5, -1.0, -0.5, 0.0])
        >>> bool(probability(-3.0) < 0.5 < probability(0.0))
        True
    """
    from sklearn.linear_model import LogisticRegression

    correct, confidence = _both_classes(correct, confidence)
    # Confidences of any scale: the solver stops early on numbers of 0.01.
    center, scale = confidence.mean(), confidence.std() or 1.0
    model = LogisticRegression(C=np.inf).fit(((confidence - center) / scale)[:, None], correct)
    return _on_numbers(lambda values: model.predict_proba(((values - center) / scale)[:, None])[:, 1])


def fit_isotonic(correct: ArrayLike, confidence: ArrayLike) -> Callable[[ArrayLike], NDArray[np.float64]]:
    """Isotonic regression: the non-decreasing function of confidence that is nearest to correctness.

    Args:
        correct: Correctness, any shape, 0, 1 or NaN.
        confidence: Confidence, same shape.

    Returns:
        A function from confidences to probabilities in [0, 1], NaN where the confidence is; beyond the confidences it
        was fitted on it stays at the last value.

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
