"""Choosing one answer out of N samples, with a confidence.

One signature for every selector: the N answers to one question and N numbers in, a `Selection` out. They differ only
in what a sample's vote weighs:

    score(a) = sum over samples i with answer a of w_i,     answer = argmax_a score(a),
    confidence = score(answer) / sum_a score(a)

Answers are canonical already: two samples agree if their answers are equal. `None` means that nothing could be
extracted; such a sample has no vote.

Departures: the released code of Perplexity Consistency lets tied answers share a win; here one answer wins.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Selection:
    """What a selector decided on one question.

    Attributes:
        scores: Score of every answer that got a vote, in order of first appearance.
        answer: The answer with the highest score; `None` if no sample had a vote.
        confidence: Share of the total score that the answer got, in [0, 1], higher is surer; NaN if no sample had a
            vote or the scores sum to 0.
    """

    scores: dict[Hashable, float]
    answer: Hashable | None
    confidence: float


def weighted_vote(
    answers: Sequence[Hashable | None], weights: ArrayLike, *, mean_logps: ArrayLike | None = None
) -> Selection:
    """Vote in which sample i counts `weights[i]`.

    A tie goes to the answer that owns the single sample of highest mean log-prob; without `mean_logps`, or if these
    tie as well, to the answer that appeared first.

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        weights: Weight of each vote, shape (N,), at least 0. A sample whose weight is NaN has no vote.
        mean_logps: Mean log-prob per token of each sample, shape (N,); only breaks ties, NaN loses them.

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
        mean_logps: Mean log-prob per token of each sample, shape (N,); only breaks ties (see `weighted_vote`).

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

    With `completions`, a text that was sampled several times counts once, by its first sample, as in the released
    code: how probable a text is should count, not how often it was drawn. Without, this is self-consistency weighted
    by exp(mean_logp).

    Args:
        answers: Canonical answers, length N; `None` where nothing was extracted.
        mean_logps: Mean log-prob per token of each sample, shape (N,). A sample whose value is NaN has no vote.
        completions: The sampled texts, length N; merges identical ones.

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
    weights = np.exp(mean_logps)
    if completions is not None:
        weights = np.where(_first_occurrence(completions, answers), weights, np.nan)
    return weighted_vote(answers, weights, mean_logps=mean_logps)


def _first_occurrence(completions: Sequence[str], answers: Sequence[Hashable | None]) -> np.ndarray:
    if len(completions) != len(answers):
        raise ValueError(f"`completions` must have one text per answer, got {len(completions)} for {len(answers)}.")
    first: dict[str, int] = {}
    for i, text in enumerate(completions):
        first.setdefault(text, i)
    return np.isin(np.arange(len(completions)), list(first.values()))


def _per_sample(name: str, values: ArrayLike, answers: Sequence[Hashable | None]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(answers),):
        raise ValueError(f"`{name}` must have shape ({len(answers)},), one number per answer, got {values.shape}.")
    return values
