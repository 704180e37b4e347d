"""Calibration metrics of sampled answers.

Every function takes plain arrays. `correct` holds 0, 1 or NaN (booleans welcome); `confidence` is any score where
higher means surer, so pass a mean log-prob, never a perplexity. Arrays are (P, G), P prompts with G completions each,
where a metric looks inside a prompt, and of any shape where it pools all rows.

Rules that hold everywhere:

- A row takes part if its correctness and its confidence are numbers and `valid`, when given, is true for it.
- Ties count one half, or their average over all orders of the tied rows, never the order in which they came.
- What is undefined is NaN, never 0.5: a prompt answered always right ranks nothing, it does not rank by chance.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auc_within(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Probability that of two answers to the same prompt, one right and one wrong, the right one is surer.

        mean over mixed prompts of  [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    The metric that CAPO optimises. A prompt is mixed if it has a right and a wrong valid row; others are left out.

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G), higher is surer.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better, 0.5 for a confidence that says nothing; NaN without a mixed prompt.

    Example:
        >>> auc_within([[1, 1, 0, 0], [1, 1, 1, 1]], [[-0.2, -0.5, -0.4, -0.1], [-0.3, -0.2, -0.1, -0.1]])
        0.25
    """
    return nanmean(auc_by_prompt(correct, confidence, valid=valid))


def auc_by_prompt(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> NDArray[np.float64]:
    """The AUC inside each prompt, of which `auc_within` is the mean: what a bootstrap over prompts resamples.

        [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G), higher is surer.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        Shape (P,); NaN for a prompt that is not mixed.

    Example:
        >>> auc_by_prompt([[1, 1, 0, 0], [1, 1, 1, 1]], [[-0.2, -0.5, -0.4, -0.1], [-0.3, -0.2, -0.1, -0.1]])
        array([0.25,  nan])
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    _require_groups(correct)
    prompts = np.broadcast_to(np.arange(correct.shape[0])[:, None], correct.shape)
    return _auc_by_group(correct[valid], confidence[valid], prompts[valid], correct.shape[0])


def auc_pooled(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Area under the ROC curve over all rows of all prompts together.

        [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    Also rewards knowing which *questions* are hard, so it is usually higher than `auc_within`.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better, 0.5 for a confidence that says nothing; NaN if all rows are right or all
        are wrong.

    Example:
        >>> auc_pooled([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1])  # 3 pairs in order, 1 tied
        0.875
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    one_group = np.zeros(np.count_nonzero(valid), dtype=np.int64)
    return float(_auc_by_group(correct[valid], confidence[valid], one_group, 1)[0])


def auc_per_slot(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """AUC across prompts of the k-th sample of every prompt, averaged over k.

        mean over slots k of  AUC of rows (., k)

    The other reading of the paper's AUC-mean: no two answers to the same prompt are compared.

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G), higher is surer.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; slots that are all right or all wrong are left out; NaN if none is left.

    Example:
        >>> auc_per_slot([[1, 0], [0, 1]], [[0.9, 0.6], [0.2, 0.6]])  # slot 0 in order, slot 1 tied
        0.75
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    _require_groups(correct)
    slots = np.broadcast_to(np.arange(correct.shape[1]), correct.shape)
    return nanmean(_auc_by_group(correct[valid], confidence[valid], slots[valid], correct.shape[1]))


def accuracy(correct: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Accuracy mean@k: the share of right answers of a prompt, averaged over prompts.

        mean over prompts of  n_right / n_valid

    Every prompt weighs the same, however many of its rows are valid; prompts without a valid row are left out.

    Args:
        correct: Correctness, shape (P, G).
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; NaN without a valid row.

    Example:
        >>> accuracy([[1, 0, 0, 0], [1, 1, float("nan"), 0]])  # mean of 1/4 and 2/3
        0.4583333333333333
    """
    n_right, n_valid = _count_by_prompt(correct, valid)
    answered = n_valid > 0
    return nanmean(n_right[answered] / n_valid[answered])


def group_fractions(correct: ArrayLike, *, valid: ArrayLike | None = None) -> dict[str, float]:
    """How many prompts can teach a ranking: share of mixed, always right and always wrong prompts.

    Args:
        correct: Correctness, shape (P, G).
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        `frac_mixed`, `frac_all_correct` and `frac_all_wrong`, each in [0, 1], over all P prompts. They sum to 1 unless
        a prompt has no valid row: such a prompt is counted in P but in none of the three. NaN for P = 0.

    Example:
        >>> group_fractions([[1, 0], [1, 1], [0, 0], [0, 0]])
        {'frac_mixed': 0.25, 'frac_all_correct': 0.25, 'frac_all_wrong': 0.5}
    """
    n_right, n_valid = _count_by_prompt(correct, valid)
    return {
        "frac_mixed": nanmean((n_right > 0) & (n_right < n_valid)),
        "frac_all_correct": nanmean((n_right > 0) & (n_right == n_valid)),
        "frac_all_wrong": nanmean((n_right == 0) & (n_valid > 0)),
    }


def precision_coverage(
    correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy among the n most confident rows, for every n from 1 to N.

        coverage_n = n / N,    precision_n = #right among the n most confident / n

    Tie rule: rows of equal confidence enter in random order and the precision is its expectation over that order, i.e.
    each row of a tie block counts as the block's average correctness.

    Rows that hold NaN are in neither numerator nor denominator. To count a question without an answer as the last to
    be covered, give it confidence `-inf` and correctness 0.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        Coverage, ascending in (0, 1], and precision in [0, 1], both of shape (N,); empty without a valid row.

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

    return answered / correct.size, np.cumsum(_average_ties(correct, confidence)) / answered


def deferral_curve(
    correct: ArrayLike, confidence: ArrayLike, fallback_correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy when the least confident questions go to another model, for every number of them.

        share_m = m / N,    accuracy_m = (#right among the N - m surest + #fallback right among the others) / N

    Ties as in `precision_coverage`: rows of equal confidence are deferred in random order, in expectation.

    Args:
        correct: Whether the model is right, one row a question, any shape.
        confidence: Its confidence, same shape, higher is surer.
        fallback_correct: Whether the other model is right on the same question, same shape.

    Returns:
        Share deferred, from 0 to 1, and accuracy, both of shape (N + 1,), over rows without NaN; empty without one.

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
        np.concatenate(([0.0], np.cumsum(_average_ties(values[order], confidence[order]))))
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
        confidence: Confidence, same shape, higher is surer.
        coverage: Share of rows to answer, in (0, 1].
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; equal to the overall accuracy at coverage 1; NaN without a valid row.

    Example:
        >>> precision_at_coverage([1, 1, 0, 0], [0.9, 0.8, 0.5, 0.1], 0.5)
        1.0
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"`coverage` must lie in (0, 1], got {coverage}. Use 0.8 for the surest 80% of the rows.")
    _, precision = precision_coverage(correct, confidence, valid=valid)
    if precision.size == 0:
        return float("nan")
    # 0.7 * 10 is a little more than 7 in floating point; without the slack the ceiling would answer 8 rows.
    answered = int(np.ceil(coverage * precision.size * (1 - 1e-12)))
    return float(precision[answered - 1])


def aurc(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Area under the risk-coverage curve: the error rate among the n most confident rows, averaged over n.

        mean over n of  1 - precision_n                               (`precision_coverage` states the tie rule)

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
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
    """AURC beyond that of an oracle whose confidence puts every right row before every wrong one.

        aurc - mean over n of  max(0, n - #right) / n

    AURC mixes how often the model errs with how well it knows; this is the second part alone.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better, 0 for a perfect ranking; NaN without a valid row.

    Example:
        >>> round(excess_aurc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]), 6)  # 1/3 less the oracle's (0 + 0 + 1/3 + 1/2) / 4
        0.125
    """
    return aurc(correct, confidence, valid=valid) - _oracle_aurc(correct, confidence, valid)


def prediction_rejection_ratio(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """PRR: how much of what an oracle's order gains over a random one, this confidence gains.

        (error rate - aurc) / (error rate - aurc of the oracle)

    The error rate is the AURC of a random order. This is the form used for language models (arXiv 2406.15627), on the
    quality of what is kept.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        1 for a perfect ranking, 0 for one that says nothing, negative for a misleading one; NaN if all rows are right
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


def coverage_at_precision(
    correct: ArrayLike, confidence: ArrayLike, precision: float, *, valid: ArrayLike | None = None
) -> float:
    """The largest share of rows that one threshold on confidence can answer at a precision.

        max n / N  over thresholds t with  n = #(confidence >= t)  and  #right among them / n >= precision

    A threshold cannot cut through a tie, so all rows of equal confidence are answered or none. Chosen and measured on
    the same rows: for a threshold to use on others see `trl_capo.calibration.abstention`.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape, higher is surer.
        precision: What is asked for, in (0, 1].
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better, 0 if no threshold is that precise; NaN without a valid row.

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


def pass_at_k(correct: ArrayLike, k: int, *, valid: ArrayLike | None = None) -> float:
    """Probability that at least one of k samples of a prompt is right, averaged over prompts (arXiv 2107.03374).

        mean over prompts of  1 - C(n_valid - n_right, k) / C(n_valid, k)

    Unbiased: the mean over all choices of k of a prompt's valid samples.

    Args:
        correct: Correctness, shape (P, G).
        k: Number of samples, at least 1.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; prompts with fewer than k valid rows are left out; NaN if none is left.

    Example:
        >>> pass_at_k([[1, 0, 0, 0], [1, 1, 0, 0]], 2)  # 1 - 3/6 and 1 - 1/6
        0.6666666666666667
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    n_right, n_valid = _count_by_prompt(correct, valid)
    enough = n_valid >= k
    n_right, n_valid = n_right[enough], n_valid[enough]
    drawn = np.arange(k)
    # The chance that all k are wrong, drawn one after the other without replacement.
    all_wrong = np.prod(np.maximum((n_valid - n_right)[:, None] - drawn, 0) / (n_valid[:, None] - drawn), axis=1)
    return nanmean(1 - all_wrong)


def brier_score(correct: ArrayLike, probability: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Mean squared distance of a stated probability from what happened.

        mean of  (probability - correct)^2

    Args:
        correct: Correctness, any shape.
        probability: Probability of being right, same shape, in [0, 1]. `exp(mean_logp)` lies there but is no such
            probability; map it first (`trl_capo.calibration.posthoc`).
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], *lower* is better; 0.25 for saying 0.5 always; NaN without a valid row.

    Example:
        >>> brier_score([1, 0], [0.5, 1.0])
        0.625
    """
    correct, probability, valid = paired_rows(correct, probability, valid)
    _require_probabilities(probability[valid])
    return nanmean((probability[valid] - correct[valid]) ** 2)


def calibration_bins(
    correct: ArrayLike,
    probability: ArrayLike,
    *,
    num_bins: int = 10,
    equal_mass: bool = False,
    valid: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows, mean probability and accuracy of each bin: what a reliability diagram draws.

    Bins of equal width are [0, 1/M), ..., [1 - 1/M, 1]. Bins of equal mass cut the rows, sorted by probability, at
    the multiples of N/M; rows of equal probability that a cut parts count with their average correctness.

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
    _require_probabilities(probability)
    if equal_mass:
        order = np.argsort(probability)
        correct, probability = _average_ties(correct[order], probability[order]), probability[order]
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
    """ECE: distance of stated probability from accuracy, bin by bin.

        sum over bins of  n_bin / N * |mean probability - accuracy|        (`calibration_bins` states the bins)

    Args:
        correct: Correctness, any shape.
        probability: Probability of being right, same shape, in [0, 1].
        num_bins: Number of bins; 10 and 20 are in use.
        equal_mass: As many rows in every bin, instead of equal width.
        overconfident_only: Only the bins whose probability exceeds their accuracy: how much the model overstates.
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


def perplexity(mean_logps: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Geometric mean of the completions' perplexities.

        exp(-mean(mean_logps))

    Each completion weighs the same, however long. Pass `valid=correct == 1` for the perplexity of right answers.

    Args:
        mean_logps: Mean log-prob per token of each completion, any shape.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number >= 1 for log-probs <= 0, lower is surer; NaN without a valid row.

    Example:
        >>> perplexity([-np.log(2.0), -np.log(8.0)])  # the geometric mean of 2 and 8
        4.0
    """
    mean_logps = np.asarray(mean_logps, dtype=np.float64)
    return float(np.exp(-nanmean(mean_logps[_valid_rows(valid, mean_logps)])))


def _average_ties(correct: NDArray[np.float64], confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """In sorted rows, the mean correctness of the rows of the same confidence in place of each row's own."""
    starts = np.flatnonzero(np.concatenate((np.ones(min(correct.size, 1), bool), confidence[1:] != confidence[:-1])))
    if starts.size == correct.size:
        return correct
    sizes = np.diff(starts, append=correct.size)
    return np.repeat(np.add.reduceat(correct, starts) / sizes, sizes)


def _auc_by_group(
    correct: NDArray[np.float64], confidence: NDArray[np.float64], groups: NDArray[np.int64], n_groups: int
) -> NDArray[np.float64]:
    """AUC of each group of rows, shape (n_groups,); NaN for a group that is all right, all wrong or empty.

    One sort for all groups. Inside a group each right row beats the wrong rows of all lower tie blocks and half of
    those in its own.
    """
    order = np.lexsort((confidence, groups))
    correct, confidence, groups = correct[order], confidence[order], groups[order]
    changes = (confidence[1:] != confidence[:-1]) | (groups[1:] != groups[:-1])
    starts = np.flatnonzero(np.concatenate((np.ones(min(correct.size, 1), dtype=bool), changes)))
    if starts.size == 0:
        return np.full(n_groups, np.nan)

    right = np.add.reduceat(correct, starts)
    wrong = np.diff(starts, append=correct.size) - right
    group = groups[starts]
    n_right = np.bincount(group, right, n_groups)
    n_wrong = np.bincount(group, wrong, n_groups)
    wrong_in_earlier_groups = np.cumsum(n_wrong) - n_wrong
    wrong_below = np.cumsum(wrong) - wrong - wrong_in_earlier_groups[group]
    won = np.bincount(group, right * (wrong_below + wrong / 2), n_groups)
    with np.errstate(invalid="ignore"):
        return won / (n_right * n_wrong)


def _count_by_prompt(correct: ArrayLike, valid: ArrayLike | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    correct = _as_correct(correct)
    _require_groups(correct)
    valid = _valid_rows(valid, correct)
    return np.count_nonzero(valid & (correct == 1), axis=1), np.count_nonzero(valid, axis=1)


def paired_rows(
    correct: ArrayLike, confidence: ArrayLike, valid: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Correctness and confidence as checked float arrays, and which rows take part: `valid` numbers on both sides.

    Example:
        >>> correct, confidence, valid = paired_rows([1, 0, 1], [0.5, float("nan"), 0.1])
        >>> valid.tolist()
        [True, False, True]
    """
    correct, confidence = _as_correct(correct), np.asarray(confidence, dtype=np.float64)
    if correct.shape != confidence.shape:
        raise ValueError(
            f"`correct` and `confidence` must have the same shape, got {correct.shape} and {confidence.shape}."
        )
    return correct, confidence, _valid_rows(valid, correct, confidence)


def _valid_rows(valid: ArrayLike | None, *arrays: NDArray[np.float64]) -> NDArray[np.bool_]:
    numbers = ~np.logical_or.reduce([np.isnan(array) for array in arrays])
    if valid is None:
        return numbers
    valid = np.asarray(valid, dtype=bool)
    if valid.shape != numbers.shape:
        raise ValueError(f"`valid` must have the shape of the rows it marks, {numbers.shape}, got {valid.shape}.")
    return valid & numbers


def _as_correct(correct: ArrayLike) -> NDArray[np.float64]:
    correct = np.asarray(correct, dtype=np.float64)
    strange = correct[~((correct == 0) | (correct == 1) | np.isnan(correct))]
    if strange.size:
        raise ValueError(f"`correct` must hold 0, 1 or NaN, got {strange[0]}. Threshold graded rewards first.")
    return correct


def _require_probabilities(values: NDArray[np.float64]) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        strange = values[(values < 0) | (values > 1)][0]
        raise ValueError(
            f"`probability` must lie in [0, 1], got {strange}. A mean log-prob is no probability: map it with "
            "`trl_capo.calibration.posthoc` first."
        )


def _require_groups(correct: NDArray[np.float64]) -> None:
    if correct.ndim != 2:
        raise ValueError(f"`correct` must have shape (P, G), prompts by completions, got {correct.shape}.")


def nanmean(values: ArrayLike) -> float:
    """Mean over what is not NaN, without numpy's warning when nothing is left."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
