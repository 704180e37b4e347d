"""Choose one answer out of N samples on many questions: which answers are equivalent, and whether the choice is right.

The selectors are in `trl_capo.calibration.votes`. You can also import all of them from here.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.votes import (
    SELECTORS,
    Selection,
    best_of_n,
    borda_vote,
    majority_vote,
    perplexity_consistency,
    reasoning_pruned_perplexity_consistency,
    weighted_vote,
)


__all__ = [
    "SELECTORS",
    "Selection",
    "accuracy_by_count",
    "best_of_n",
    "borda_vote",
    "choose_all",
    "class_grade",
    "equivalence_classes",
    "majority_vote",
    "perplexity_consistency",
    "reasoning_pruned_perplexity_consistency",
    "weighted_vote",
]


def equivalence_classes(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[str | None]:
    """Canonical answers: answers that are equal, directly or through others, get the name of the first one.

    Args:
        answers: Extracted answers, length N; `None` if nothing was extracted.
        equal: Whether two different answers mean the same, e.g. in `trl_capo.evaluation.grade.canonical_answers`. It
            is not called for answers that are already in one class.

    Returns:
        One canonical answer for each answer.

    Example:
        >>> equivalence_classes(["0.5", "1/2", None, "2"], lambda a, b: {a, b} == {"0.5", "1/2"})
        ['0.5', '0.5', None, '2']
    """
    parent: dict[str, str] = {answer: answer for answer in answers if answer is not None}
    position = {answer: i for i, answer in enumerate(parent)}

    def root(answer: str) -> str:
        while parent[answer] != answer:
            answer = parent[answer]
        return answer

    for a, b in itertools.combinations(parent, 2):
        first, second = sorted((root(a), root(b)), key=lambda answer: position[answer])
        if first != second and equal(a, b):
            parent[second] = first
    return [None if answer is None else root(answer) for answer in answers]


def choose_all(
    select: Callable[[Sequence, NDArray], Selection],
    answers: Sequence[Sequence[Hashable | None]],
    confidence: ArrayLike,
    correct: ArrayLike,
) -> tuple[list[Selection], NDArray[np.float64]]:
    """A selector's decision on every question, and whether it is right.

    Args:
        select: Takes N answers and N confidences, returns a `Selection`.
        answers: Canonical answers, P lists of N.
        confidence: Shape (P, N).
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, N).

    Returns:
        P selections, and the correctness of the chosen answers, shape (P,), see `class_grade`. If no sample has an
        answer, this counts as wrong, or as NaN if the correctness of every sample is unknown.

    Example:
        >>> answers, logps = [["7", "8"], [None, None]], [[-0.2, -0.1], [-0.1, -0.1]]
        >>> choices, right = choose_all(best_of_n, answers, logps, [[0, 1], [0, 0]])
        >>> choices[0].answer, right.tolist()
        ('8', [1.0, 0.0])
    """
    rows = list(zip(answers, np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float), strict=True))
    choices = [select(row, values) for row, values, _ in rows]
    right = np.zeros(len(rows))
    for p, (choice, (row, values, labels)) in enumerate(zip(choices, rows, strict=True)):
        if choice.answer is not None:
            chosen = np.array([answer == choice.answer for answer in row], dtype=bool)
            right[p] = class_grade(labels[chosen], values[chosen])
        elif np.isnan(labels).all():
            right[p] = np.nan
    return choices, right


def class_grade(correct: NDArray, confidence: NDArray) -> float:
    """Correctness of equivalent answers, whatever their order.

    math-verify's equality is not transitive (`x=5`, `5`, `y=5`), so equivalent answers may have different grades. Then
    the majority grade counts. If right and wrong are equally common, the grade of the most confident answer counts,
    and if these tie as well, the result is wrong.

    Args:
        correct: 1, 0, or NaN if unknown, shape (K,).
        confidence: Shape (K,); higher means more confident, NaN is the least confident.

    Returns:
        1, 0, or NaN if all are unknown.

    Example:
        >>> class_grade(np.array([0.0, 1.0, 1.0]), np.zeros(3))
        1.0
    """
    known = ~np.isnan(correct)
    if not known.any():
        return math.nan
    right, confidence = correct[known] > 0.5, np.where(np.isnan(confidence[known]), -np.inf, confidence[known])
    margin = float(right.sum()) - float((~right).sum())
    if margin == 0:
        margin = float(confidence[right].max() > confidence[~right].max()) - 0.5
    return float(margin > 0)


def accuracy_by_count(
    select: Callable[[Sequence, NDArray], Selection],
    answers: Sequence[Sequence[Hashable | None]],
    confidence: ArrayLike,
    correct: ArrayLike,
    counts: Sequence[int],
    *,
    num_draws: int = 20,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Accuracy of a selector against the number of samples, from subsets of the given samples.

    Args:
        select: Takes N answers and N confidences, returns a `Selection`.
        answers: Canonical answers, P lists of N.
        confidence: Shape (P, N).
        correct: Correctness, shape (P, N). `class_grade` grades the chosen answer; having no answer is wrong.
        counts: Numbers of samples, each at most N. Below N, `num_draws` random subsets are averaged.
        num_draws: Number of random subsets for each prompt.
        seed: Seed of the subsets, which are the same for every selector and model.

    Returns:
        Shape (P, len(counts)).

    Example:
        >>> accuracy_by_count(
        ...     lambda a, s: majority_vote(a, s), [["7", "7", "8"]], [[-0.1, -0.2, -0.3]], [[1, 1, 0]], [3]
        ... ).tolist()
        [[1.0]]
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    num_prompts, num_samples = confidence.shape
    if max(counts) > num_samples or min(counts) < 1:
        raise ValueError(f"`counts` must lie between 1 and the {num_samples} samples, got {list(counts)}.")
    result = np.zeros((num_prompts, len(counts)))
    for p in range(num_prompts):
        rng = np.random.default_rng([seed, p])
        orders = rng.permuted(np.tile(np.arange(num_samples), (num_draws, 1)), axis=1)
        for k, count in enumerate(counts):
            subsets = orders[:, :count] if count < num_samples else np.arange(num_samples)[None]
            chosen = [[answers[p][i] for i in subset] for subset in subsets]
            hits = choose_all(select, chosen, confidence[p, subsets], correct[p, subsets])[1]
            result[p, k] = np.mean(hits)
    return result
