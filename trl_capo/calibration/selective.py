"""Selective answering with a threshold on confidence: precision against coverage, and areas under such curves.

The rules of `trl_capo.calibration.metrics` hold.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.rows import average_ties, nanmean, paired_rows


def precision_coverage(
    correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy among the n most confident rows, for every n from 1 to N.

        coverage_n = n / N,    precision_n = #right among the n most confident / n

    Tie rule: rows with equal confidence enter in random order, and the precision is its expectation over that order.
    So each row in a tie block counts with the block's average correctness.

    Rows with NaN appear in neither numerator nor denominator. To count a question without an answer as the last one
    covered, give it confidence `-inf` and correctness 0.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        Coverage, ascending in (0, 1], and precision in [0, 1], both with shape (N,); empty without a valid row.

    Example:
        >>> coverage, precision = precision_coverage([1, 1, 0, 0], [0.9, 0.5, 0.5, 0.1])
        >>> coverage.tolist(), precision.tolist()
        ([0.25, 0.5, 0.75, 1.0], [1.0, 0.75, 0.6666666666666666, 0.5])
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    correct, confidence = correct[valid], confidence[valid]
    order = np.argsort(-confidence)
    correct, confidence = correct[order], confidence[order]
    answered = np.arange(1, correct.size + 1)
    if correct.size == 0:
        return answered.astype(np.float64), answered.astype(np.float64)

    return answered / correct.size, np.cumsum(average_ties(correct, confidence)) / answered


def deferral_curve(
    correct: ArrayLike, confidence: ArrayLike, fallback_correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy if the m least confident questions go to another model, for every m from 0 to N.

        share_m = m / N,    accuracy_m = (#right among the N - m most confident + #fallback right among the rest) / N

    Ties as in `precision_coverage`: rows with equal confidence are deferred in random order, in expectation.

    Args:
        correct: Whether the model is right, one row per question, any shape.
        confidence: The model's confidence, same shape; higher means more confident.
        fallback_correct: Whether the other model is right on the same question, same shape.

    Returns:
        Deferred share, from 0 to 1, and accuracy, both with shape (N + 1,), over rows without NaN; empty if there are
        no such rows.

    Example:
        >>> share, accuracy = deferral_curve([1, 0], [0.9, 0.1], [0, 1])
        >>> share.tolist(), accuracy.tolist()
        ([0.0, 0.5, 1.0], [0.5, 1.0, 0.5])
    """
    correct, confidence, valid = paired_rows(correct, confidence)
    fallback, _, of_fallback = paired_rows(fallback_correct, confidence)
    valid &= of_fallback
    correct, confidence, fallback = correct[valid], confidence[valid], fallback[valid]
    if correct.size == 0:
        return np.empty(0), np.empty(0)
    order = np.argsort(-confidence)
    own, other = (
        np.concatenate(([0.0], np.cumsum(average_ties(values[order], confidence[order]))))
        for values in (correct, fallback)
    )
    deferred = np.arange(correct.size + 1)
    return deferred / correct.size, ((own + other[-1] - other) / correct.size)[::-1]


def precision_at_coverage(
    correct: ArrayLike, confidence: ArrayLike, coverage: float, *, valid: ArrayLike | None = None
) -> float:
    """Accuracy among the most confident share of the rows.

        precision_n  at the smallest n with  n / N >= coverage        (`precision_coverage` states the tie rule)

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        coverage: Share of rows to answer, in (0, 1].
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; equal to the overall accuracy at coverage 1; NaN without a valid row.

    Example:
        >>> precision_at_coverage([1, 1, 0, 0], [0.9, 0.8, 0.5, 0.1], 0.5)
        1.0
    """
    if not 0 < coverage <= 1:
        raise ValueError(
            f"`coverage` must lie in (0, 1], got {coverage}. Use 0.8 for the most confident 80% of the rows."
        )
    _, precision = precision_coverage(correct, confidence, valid=valid)
    if precision.size == 0:
        return float("nan")
    # 0.7 * 10 is a little more than 7 in floating point; without the slack the ceiling would answer 8 rows.
    answered = int(np.ceil(coverage * precision.size * (1 - 1e-12)))
    return float(precision[answered - 1])


def coverage_at_precision(
    correct: ArrayLike, confidence: ArrayLike, precision: float, *, valid: ArrayLike | None = None
) -> float:
    """The largest share of rows that a single threshold on confidence can answer at a given precision.

        max n / N  over thresholds t with  n = #(confidence >= t)  and  #right among them / n >= precision

    A threshold cannot split a tie: either all rows with equal confidence are answered or none. The threshold is chosen
    and measured on the same rows. For a threshold to use on other rows, see `trl_capo.calibration.abstention`.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        precision: Required precision, in (0, 1].
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; 0 if no threshold reaches the precision; NaN without a valid row.

    Example:
        >>> coverage_at_precision([1, 1, 0, 1], [0.9, 0.8, 0.7, 0.6], 0.75)
        1.0
        >>> coverage_at_precision([1, 1, 0, 0], [0.9, 0.5, 0.5, 0.1], 0.8)
        0.25
    """
    if not 0 < precision <= 1:
        raise ValueError(f"`precision` must lie in (0, 1], got {precision}. Use 0.9 to be right nine times in ten.")
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    correct, confidence = correct[valid], confidence[valid]
    if correct.size == 0:
        return float("nan")
    order = np.argsort(-confidence)
    correct, confidence = correct[order], confidence[order]
    ends = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True))
    precise = np.cumsum(correct)[ends] >= precision * (ends + 1) * (1 - 1e-12)
    return float((ends[precise].max() + 1) / correct.size) if precise.any() else 0.0


def aurc(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Area under the risk-coverage curve: the error rate among the n most confident rows, averaged over n.

        mean over n of  1 - precision_n                               (`precision_coverage` states the tie rule)

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better; a constant confidence scores the overall error rate; NaN without a valid
        row.

    Example:
        >>> round(aurc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]), 6)  # error rates 0, 1/2, 1/3, 1/2
        0.333333
    """
    _, precision = precision_coverage(correct, confidence, valid=valid)
    return nanmean(1 - precision)


def excess_aurc(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """AURC minus the AURC of an oracle that ranks every right row above every wrong one.

        aurc - mean over n of  max(0, n - #right) / n

    AURC mixes how often the model errs with how well its confidence shows it. Excess AURC measures the second part
    alone.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better, 0 for a perfect ranking; NaN without a valid row.

    Example:
        >>> round(excess_aurc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]), 6)  # 1/3 less the oracle's (0 + 0 + 1/3 + 1/2) / 4
        0.125
    """
    return aurc(correct, confidence, valid=valid) - _oracle_aurc(correct, confidence, valid)


def prediction_rejection_ratio(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """PRR: the share of an oracle's gain over a random order that this confidence achieves.

        (error rate - aurc) / (error rate - aurc of the oracle)

    The error rate is the AURC of a random order. This is the form used for language models (arXiv 2406.15627), which
    measures the quality of the rows that are kept.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        1 for a perfect ranking, 0 for an uninformative one, negative for a misleading one; NaN if all rows are right
        or all are wrong.

    Example:
        >>> round(prediction_rejection_ratio([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]), 6)  # (1/2 - 1/3) / (1/2 - 5/24)
        0.571429
    """
    rows, confidences, usable = paired_rows(correct, confidence, valid)
    error_rate = nanmean(1 - rows[usable])
    gain = error_rate - _oracle_aurc(rows, confidences, usable)
    return (error_rate - aurc(rows, confidences, valid=usable)) / gain if gain > 0 else float("nan")


def _oracle_aurc(correct: ArrayLike, confidence: ArrayLike, valid: ArrayLike | None) -> float:
    correct, _, valid = paired_rows(correct, confidence, valid)
    answered = np.arange(1, np.count_nonzero(valid) + 1)
    return nanmean(np.maximum(0, answered - correct[valid].sum()) / answered)
