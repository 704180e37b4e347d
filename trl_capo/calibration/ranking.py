"""Whether confidence ranks right answers above wrong ones: AUC within prompts, pooled, and per slot; group shares.

The rules of `trl_capo.calibration.metrics` hold.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.rows import count_by_prompt, nanmean, paired_rows, require_groups, valid_rows


def auc_within(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Probability that a right answer has higher confidence than a wrong answer to the same prompt.

        mean over mixed prompts of  [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    CAPO optimises this metric. A prompt is mixed if it has a right and a wrong valid row; other prompts are left out.

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G); higher means more confident.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better, 0.5 for a confidence that says nothing; NaN without a mixed prompt.

    Example:
        >>> auc_within([[1, 1, 0, 0], [1, 1, 1, 1]], [[-0.2, -0.5, -0.4, -0.1], [-0.3, -0.2, -0.1, -0.1]])
        0.25
    """
    return nanmean(auc_by_prompt(correct, confidence, valid=valid))


def auc_by_prompt(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> NDArray[np.float64]:
    """The AUC inside each prompt. `auc_within` is its mean, and a bootstrap over prompts resamples it.

        [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G); higher means more confident.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        Shape (P,); NaN for a prompt that is not mixed.

    Example:
        >>> auc_by_prompt([[1, 1, 0, 0], [1, 1, 1, 1]], [[-0.2, -0.5, -0.4, -0.1], [-0.3, -0.2, -0.1, -0.1]])
        array([0.25,  nan])
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    require_groups(correct)
    prompts = np.broadcast_to(np.arange(correct.shape[0])[:, None], correct.shape)
    return _auc_by_group(correct[valid], confidence[valid], prompts[valid], correct.shape[0])


def auc_pooled(correct: ArrayLike, confidence: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Area under the ROC curve over all rows of all prompts together.

        [#(right above wrong) + #ties / 2] / (n_right * n_wrong)

    It also rewards knowing which *questions* are hard, so it is usually higher than `auc_within`.

    Args:
        correct: Correctness, any shape.
        confidence: Confidence, same shape; higher means more confident.
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

    This is the other reading of the paper's AUC-mean: it never compares two answers to the same prompt.

    Args:
        correct: Correctness, shape (P, G).
        confidence: Confidence, shape (P, G); higher means more confident.
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; slots that are all right or all wrong are left out; NaN if none is left.

    Example:
        >>> auc_per_slot([[1, 0], [0, 1]], [[0.9, 0.6], [0.2, 0.6]])  # slot 0 in order, slot 1 tied
        0.75
    """
    correct, confidence, valid = paired_rows(correct, confidence, valid)
    require_groups(correct)
    slots = np.broadcast_to(np.arange(correct.shape[1]), correct.shape)
    return nanmean(_auc_by_group(correct[valid], confidence[valid], slots[valid], correct.shape[1]))


def accuracy(correct: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Accuracy mean@k: the share of right answers to a prompt, averaged over prompts.

        mean over prompts of  n_right / n_valid

    Every prompt has the same weight, however many of its rows are valid. Prompts without a valid row are left out.

    Args:
        correct: Correctness, shape (P, G).
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number in [0, 1], higher is better; NaN without a valid row.

    Example:
        >>> accuracy([[1, 0, 0, 0], [1, 1, float("nan"), 0]])  # mean of 1/4 and 2/3
        0.4583333333333333
    """
    n_right, n_valid = count_by_prompt(correct, valid)
    answered = n_valid > 0
    return nanmean(n_right[answered] / n_valid[answered])


def group_fractions(correct: ArrayLike, *, valid: ArrayLike | None = None) -> dict[str, float]:
    """Shares of mixed, always right and always wrong prompts. Only mixed prompts can teach a ranking.

    Args:
        correct: Correctness, shape (P, G).
        valid: Boolean, shape (P, G). Rows that may take part; defaults to all that hold numbers.

    Returns:
        `frac_mixed`, `frac_all_correct` and `frac_all_wrong`, each in [0, 1], over all P prompts. They sum to 1 unless
        a prompt has no valid row: such a prompt counts in P but in none of the three. NaN for P = 0.

    Example:
        >>> group_fractions([[1, 0], [1, 1], [0, 0], [0, 0]])
        {'frac_mixed': 0.25, 'frac_all_correct': 0.25, 'frac_all_wrong': 0.5}
    """
    n_right, n_valid = count_by_prompt(correct, valid)
    return {
        "frac_mixed": nanmean((n_right > 0) & (n_right < n_valid)),
        "frac_all_correct": nanmean((n_right > 0) & (n_right == n_valid)),
        "frac_all_wrong": nanmean((n_right == 0) & (n_valid > 0)),
    }


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
    n_right, n_valid = count_by_prompt(correct, valid)
    enough = n_valid >= k
    n_right, n_valid = n_right[enough], n_valid[enough]
    drawn = np.arange(k)
    # The probability that all k are wrong, drawn one by one without replacement.
    all_wrong = np.prod(np.maximum((n_valid - n_right)[:, None] - drawn, 0) / (n_valid[:, None] - drawn), axis=1)
    return nanmean(1 - all_wrong)


def perplexity(mean_logps: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Geometric mean of the completions' perplexities.

        exp(-mean(mean_logps))

    Each completion has the same weight, however long. Pass `valid=correct == 1` for the perplexity of right answers.

    Args:
        mean_logps: Mean log-prob per token of each completion, any shape.
        valid: Boolean, same shape. Rows that may take part; defaults to all that hold numbers.

    Returns:
        A number >= 1 for log-probs <= 0; lower means more confident. NaN without a valid row.

    Example:
        >>> perplexity([-np.log(2.0), -np.log(8.0)])  # the geometric mean of 2 and 8
        4.0
    """
    mean_logps = np.asarray(mean_logps, dtype=np.float64)
    return float(np.exp(-nanmean(mean_logps[valid_rows(valid, mean_logps)])))


def _auc_by_group(
    correct: NDArray[np.float64], confidence: NDArray[np.float64], groups: NDArray[np.int64], n_groups: int
) -> NDArray[np.float64]:
    """AUC of each group of rows, shape (n_groups,); NaN for a group that is all right, all wrong or empty.

    Uses one sort for all groups. Inside a group, each right row beats the wrong rows of all lower tie blocks and half
    of the wrong rows in its own block.
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
