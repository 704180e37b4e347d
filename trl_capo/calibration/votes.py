"""Selectors: N samples of one question vote for an answer, with tie-breaking and a confidence.

All selectors have the same signature: the N answers to one question and N numbers in, a `Selection` out. They differ
only in the weight of a sample's vote:

    score(a) = sum over samples i with answer a of w_i,     answer = argmax_a score(a),
    confidence = score(answer) / sum_a score(a)

Answers must be canonical: two samples agree if their answers are equal. `None` means that nothing could be extracted;
such a sample has no vote.

Departures: the released code of Perplexity Consistency lets tied answers share a win; here one answer wins.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Selection:
    """A selector's decision on one question.

    Attributes:
        scores: Score of every answer with a vote, in order of first appearance.
        answer: The answer with the highest score; `None` if no sample had a vote.
        confidence: The answer's share of the total score, in [0, 1]; higher means more confident. NaN if no sample had
            a vote or the scores sum to 0.
    """

    scores: dict[Hashable, float]
    answer: Hashable | None
    confidence: float


def weighted_vote(
    answers: Sequence[Hashable | None], weights: ArrayLike, *, mean_logps: ArrayLike | None = None
) -> Selection:
    """Vote in which sample i counts `weights[i]`.

    A tie goes to the answer with the sample of highest mean log-prob. Without `mean_logps`, or if these tie as well,
    it goes to the answer that appeared first.

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        weights: Weight of each vote, shape (N,), at least 0. A sample whose weight is NaN has no vote.
        mean_logps: Mean log-prob per token of each sample, shape (N,). Used only to break ties; NaN loses.

    Returns:
        The scores, the chosen answer and its confidence.

    Example:
        >>> weighted_vote(["7", "8", "7", None], [0.25, 0.75, 0.25, 1.0])
        Selection(scores={'7': 0.5, '8': 0.75}, answer='8', confidence=0.6)
    """
    weights = _per_sample("weights", weights, answers)
    if np.any(weights < 0):
        raise ValueError(f"`weights` must be at least 0, got {weights.min()}. Exponentiate log-probs before voting.")
    tie_break = np.zeros(len(answers)) if mean_logps is None else _per_sample("mean_logps", mean_logps, answers)
    tie_break = np.where(np.isnan(tie_break), -np.inf, tie_break)

    votes: dict[Hashable, list[float]] = {}
    best: dict[Hashable, float] = {}
    for answer, weight, logp in zip(answers, weights.tolist(), tie_break.tolist(), strict=True):
        if answer is None or math.isnan(weight):
            continue
        votes.setdefault(answer, []).append(weight)
        best[answer] = max(best.get(answer, -math.inf), logp)

    # `fsum` rounds once, so two answers with the same votes in another order tie instead of differing in the last bit.
    scores = {answer: math.fsum(weights) for answer, weights in votes.items()}
    total = math.fsum(scores.values())
    # `max` keeps the first of equals, and dictionaries keep the order of first appearance.
    winner = max(scores, key=lambda answer: (scores[answer], best[answer]), default=None)
    return Selection(scores, winner, scores[winner] / total if total > 0 else math.nan)


def majority_vote(answers: Sequence[Hashable | None], mean_logps: ArrayLike | None = None) -> Selection:
    """Self-consistency: every sample counts 1.

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        mean_logps: Mean log-prob per token of each sample, shape (N,). Used only to break ties (see `weighted_vote`).

    Returns:
        The vote counts, the chosen answer and its share of the votes.

    Example:
        >>> majority_vote(["7", "8", "7", None, "9"])
        Selection(scores={'7': 2.0, '8': 1.0, '9': 1.0}, answer='7', confidence=0.5)
    """
    return weighted_vote(answers, np.ones(len(answers)), mean_logps=mean_logps)


def perplexity_consistency(
    answers: Sequence[Hashable | None], mean_logps: ArrayLike, *, completions: Sequence[str] | None = None
) -> Selection:
    """Perplexity Consistency (arXiv 2510.15444): every sample counts the inverse of its perplexity, exp(mean_logp).

    With `completions`, a text that was sampled several times counts once, through its first sample with a log-prob, as
    in the released code: a text's probability should count, not how often it was drawn. Without `completions`, this is
    self-consistency weighted by exp(mean_logp).

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        mean_logps: Mean log-prob per token of each sample, shape (N,). A sample whose value is NaN has no vote.
        completions: The sampled texts, length N. Identical ones are merged.

    Returns:
        The scores, the chosen answer and its confidence.

    Example:
        >>> logps = np.log([0.5, 0.75, 0.5])
        >>> perplexity_consistency(["7", "8", "7"], logps).answer
        '7'
        >>> perplexity_consistency(["7", "8", "7"], logps, completions=["3+4=7", "3+4=8", "3+4=7"]).answer
        '8'
    """
    mean_logps = _per_sample("mean_logps", mean_logps, answers)
    if completions is not None:
        mean_logps = _of_texts(mean_logps, completions, answers)
        mean_logps = np.where(_first_occurrence(completions), mean_logps, np.nan)
    weights = np.exp(mean_logps)
    return weighted_vote(answers, weights, mean_logps=mean_logps)


def best_of_n(answers: Sequence[Hashable | None], confidence: ArrayLike) -> Selection:
    """The answer of the most confident sample, with that sample's confidence.

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        confidence: Confidence of each sample, e.g. mean log-prob, shape (N,); higher means more confident. A sample
            with NaN cannot be chosen.

    Returns:
        For each answer, the highest confidence of its samples as the score; the chosen answer and its score. If
        answers tie, the first is chosen.

    Example:
        >>> best_of_n(["7", "8", "7", None], [-0.5, -0.25, -1.0, -0.125])
        Selection(scores={'7': -0.5, '8': -0.25}, answer='8', confidence=-0.25)
    """
    confidence = _per_sample("confidence", confidence, answers)
    scores: dict[Hashable, float] = {}
    for answer, value in zip(answers, confidence.tolist(), strict=True):
        if answer is not None and not math.isnan(value):
            scores[answer] = max(scores.get(answer, -math.inf), value)
    winner = max(scores, key=lambda answer: scores[answer], default=None)
    return Selection(scores, winner, scores[winner] if scores else math.nan)


def reasoning_pruned_perplexity_consistency(
    answers: Sequence[Hashable | None], mean_logps: ArrayLike, *, completions: Sequence[str] | None = None
) -> Selection:
    """RPC (arXiv 2510.15444): Perplexity Consistency without the improbable samples.

    A mixture of two Weibull distributions is fitted to the probabilities p = exp(mean_logp). A sample is dropped if it
    more likely belongs to the component with the smaller mean and its p is below the mean of all samples.

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        mean_logps: Mean log-prob per token of each sample, shape (N,). A sample whose value is NaN has no vote.
        completions: The sampled texts, length N. Identical ones are merged (see `perplexity_consistency`).

    Returns:
        The scores, the chosen answer and its confidence. With fewer than two different probabilities, no sample is
        dropped.

    Example:
        >>> answers = ["7"] * 5 + ["8"] * 3
        >>> logps = np.log([0.1, 0.11, 0.12, 0.1, 0.11, 0.9, 0.92, 0.91])
        >>> perplexity_consistency(answers, logps).scores["7"] > 0.5
        True
        >>> reasoning_pruned_perplexity_consistency(answers, logps).scores  # the improbable five have gone
        {'8': 2.73}
    """
    mean_logps = _per_sample("mean_logps", mean_logps, answers)
    if completions is not None:  # otherwise one copy of a text might be kept and another dropped
        mean_logps = _of_texts(mean_logps, completions, answers)
    kept = np.where(_improbable(np.exp(mean_logps)), np.nan, mean_logps)
    return perplexity_consistency(answers, kept, completions=completions)


def _improbable(probabilities: np.ndarray) -> np.ndarray:
    """Which samples reasoning pruning drops, shape (N,)."""
    from scipy.optimize import minimize
    from scipy.stats import weibull_min

    numbers = probabilities[~np.isnan(probabilities)]
    if len(np.unique(numbers)) < 2:
        return np.zeros(len(probabilities), bool)

    def components(parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
        weight, shape_1, scale_1, shape_2, scale_2 = parameters
        return np.array(
            [
                weight * weibull_min.pdf(values, shape_1, scale=scale_1),
                (1 - weight) * weibull_min.pdf(values, shape_2, scale=scale_2),
            ]
        )

    def loss(parameters: np.ndarray) -> float:
        return -np.log(components(parameters, numbers).sum(axis=0) + 1e-300).sum()

    start = [0.5, 1.0, 1.0, 1.5, 2.0]
    bounds = [(0.2, 0.8), *[(0.01, None)] * 4]
    fitted = minimize(loss, start, bounds=bounds, method="L-BFGS-B").x
    means = [weibull_min.mean(fitted[1], scale=fitted[2]), weibull_min.mean(fitted[3], scale=fitted[4])]
    density = components(fitted, np.nan_to_num(probabilities))
    good, bad = density if means[0] >= means[1] else density[::-1]
    return (good < bad) & (probabilities < numbers.mean())


def borda_vote(answers: Sequence[Hashable | None], confidence: ArrayLike, *, power: float = 0.5) -> Selection:
    """Borda vote (arXiv 2502.18581, there with self-certainty): the rank of a sample's confidence weights its vote.

        weight of the r-th most confident of the N samples with a vote:  (N - r + 1) ** power

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        confidence: Confidence of each sample, shape (N,); higher means more confident. Tied samples share the mean of
            their ranks.
        power: 0 gives a majority vote; large values approach best of N.

    Returns:
        The scores, the chosen answer and its confidence.

    Example:
        >>> borda_vote(["7", "8", "7"], [-1.0, -0.25, -0.5], power=1).scores
        {'7': 3.0, '8': 3.0}
    """
    from scipy.stats import rankdata

    confidence = _per_sample("confidence", confidence, answers)
    votes = ~np.isnan(confidence) & np.array([answer is not None for answer in answers], dtype=bool)
    weights = np.full(len(answers), np.nan)
    weights[votes] = rankdata(confidence[votes]) ** power
    return weighted_vote(answers, weights, mean_logps=confidence)


# The selectors that reports compare.
SELECTORS: dict[str, Callable[..., Selection]] = {
    "majority vote": majority_vote,
    "Perplexity Consistency": perplexity_consistency,
    "best of N": best_of_n,
}


def _of_texts(mean_logps: np.ndarray, completions: Sequence[str], answers: Sequence[Hashable | None]) -> np.ndarray:
    """For each sample, the log-prob of the first sample with the same text that has one; NaN if none has."""
    if len(completions) != len(answers):
        raise ValueError(f"`completions` must have one text per answer, got {len(completions)} for {len(answers)}.")
    first: dict[str, float] = {}
    for text, value in zip(completions, mean_logps.tolist(), strict=True):
        if not math.isnan(value):
            first.setdefault(text, value)
    return np.array([first.get(text, math.nan) for text in completions], dtype=np.float64)


def _first_occurrence(completions: Sequence[str]) -> np.ndarray:
    first: dict[str, int] = {}
    for i, text in enumerate(completions):
        first.setdefault(text, i)
    return np.isin(np.arange(len(completions)), list(first.values()))


def _per_sample(name: str, values: ArrayLike, answers: Sequence[Hashable | None]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(answers),):
        raise ValueError(f"`{name}` must have shape ({len(answers)},), one number per answer, got {values.shape}.")
    return values
