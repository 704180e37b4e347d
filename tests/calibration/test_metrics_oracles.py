"""Every metric against scikit-learn or a loop, on random inputs with ties, gaps and prompts of one class."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import brier_score_loss, roc_auc_score

from trl_capo.calibration import metrics


def tables(probabilities=False):
    """Correctness with gaps, and confidences of few values, so that there are ties; shape (P, G)."""
    values = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0] if probabilities else [-2.0, -1.0, -0.5, -0.1])
    return st.tuples(st.integers(1, 6), st.integers(1, 7)).flatmap(
        lambda shape: st.tuples(
            arrays.arrays(float, shape, elements=st.sampled_from([0.0, 1.0, 1.0, 0.0, math.nan])),
            arrays.arrays(float, shape, elements=st.one_of(values, values, values, st.just(math.nan))),
        )
    )


def numbers(correct, confidence):
    use = ~np.isnan(correct) & ~np.isnan(confidence)
    return correct[use], confidence[use]


def same(found, expected):
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def sklearn_auc(correct, confidence):
    correct, confidence = numbers(correct, confidence)
    return roc_auc_score(correct, confidence) if len(np.unique(correct)) == 2 else math.nan


def risks(correct, confidence):
    """Error rate of the n surest, as the mean over all orders of tied rows (few rows), or by blocks."""
    order = sorted(range(len(correct)), key=lambda i: -confidence[i])
    smooth = [np.mean(correct[confidence == confidence[i]]) for i in order]
    return [1 - math.fsum(smooth[:n]) / n for n in range(1, len(correct) + 1)]


many = settings(max_examples=1500, deadline=None)


@many
@given(tables())
def test_ranking_metrics(table):
    correct, confidence = table
    same(metrics.auc_within(correct, confidence), mean([sklearn_auc(c, f) for c, f in zip(*table, strict=True)]))
    same(
        metrics.auc_per_slot(correct, confidence),
        mean([sklearn_auc(c, f) for c, f in zip(correct.T, confidence.T, strict=True)]),
    )
    same(metrics.auc_pooled(correct, confidence), sklearn_auc(correct, confidence))

    right, sure = numbers(correct, confidence)
    risk = risks(right, sure)
    oracle = risks(right, right)
    error = 1 - right.mean() if len(right) else math.nan
    same(metrics.aurc(correct, confidence), mean(risk))
    same(metrics.excess_aurc(correct, confidence), mean(risk) - mean(oracle))
    mixed = len(np.unique(right)) == 2
    prr = (error - mean(risk)) / (error - mean(oracle)) if mixed else math.nan
    same(metrics.prediction_rejection_ratio(correct, confidence), prr)

    levels = [(np.mean(sure >= t), right[sure >= t].mean()) for t in np.unique(sure)]
    for precision in (0.5, 0.8, 1.0):
        reached = max([share for share, kept in levels if kept >= precision - 1e-12], default=0.0)
        same(metrics.coverage_at_precision(correct, confidence, precision), reached if len(right) else math.nan)


@many
@given(tables(probabilities=True), st.integers(1, 12))
def test_probability_metrics(table, num_bins):
    correct, probability = numbers(*table)
    if len(correct) == 0:
        assert math.isnan(metrics.brier_score(*table))
        assert math.isnan(metrics.expected_calibration_error(*table, num_bins=num_bins))
        return
    same(metrics.brier_score(*table), brier_score_loss(correct, probability, pos_label=1))
    widths, mass = {}, {}
    order = sorted(range(len(correct)), key=lambda i: probability[i])
    for rank, i in enumerate(order):
        smooth = np.mean(correct[probability == probability[i]])
        inside = [m for m in range(num_bins) if m / num_bins <= probability[i]]  # [m/M, (m+1)/M), the last one closed
        widths.setdefault(inside[-1], []).append((probability[i], correct[i]))
        mass.setdefault(rank * num_bins // len(correct), []).append((probability[i], smooth))
    for equal_mass, bins in ((False, widths), (True, mass)):
        gaps = [(len(rows), np.mean([p - c for p, c in rows])) for rows in bins.values()]
        ece = math.fsum(n * abs(gap) for n, gap in gaps) / len(correct)
        over = math.fsum(n * max(gap, 0) for n, gap in gaps) / len(correct)
        options = dict(num_bins=num_bins, equal_mass=equal_mass)
        same(metrics.expected_calibration_error(*table, **options), ece)
        same(metrics.expected_calibration_error(*table, overconfident_only=True, **options), over)


@settings(max_examples=300, deadline=None)
@given(
    arrays.arrays(
        float, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=st.sampled_from([0.0, 1.0, math.nan])
    )
)
def test_pass_at_k_is_the_mean_over_all_choices(correct):
    for k in range(1, 8):
        chances = []
        for row in correct:
            row = row[~np.isnan(row)]
            choices = list(itertools.combinations(row, k))
            chances.append(np.mean([max(choice) for choice in choices]) if choices else math.nan)
        same(metrics.pass_at_k(correct, k), mean(chances))
    same(metrics.pass_at_k(correct, 1), metrics.accuracy(correct))


@settings(max_examples=300, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_deferral_curve(table, random):
    correct, confidence = table
    fallback = np.array([random.choice([0.0, 1.0, math.nan]) for _ in range(correct.size)]).reshape(correct.shape)
    use = ~np.isnan(correct) & ~np.isnan(confidence) & ~np.isnan(fallback)
    right, sure, other = correct[use], confidence[use], fallback[use]
    share, accuracy = metrics.deferral_curve(correct, confidence, fallback)
    assert len(share) == len(accuracy) == (len(right) + 1 if len(right) else 0)
    order = sorted(range(len(right)), key=lambda i: -sure[i])
    smooth = [(np.mean(right[sure == sure[i]]), np.mean(other[sure == sure[i]])) for i in order]
    for m in range(len(accuracy)):
        kept, deferred = smooth[: len(right) - m], smooth[len(right) - m :]
        same(accuracy[m], (math.fsum(own for own, _ in kept) + math.fsum(o for _, o in deferred)) / len(right))
        same(share[m], m / len(right))


def test_what_is_no_probability_is_refused():
    for value in (-0.2, 1.5):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
            metrics.brier_score([1, 0], [0.5, value])
        with pytest.raises(ValueError, match="not a probability"):
            metrics.expected_calibration_error([1, 0], [0.5, value])
    with pytest.raises(ValueError, match="`precision`"):
        metrics.coverage_at_precision([1], [1], 0)
    with pytest.raises(ValueError, match="`k`"):
        metrics.pass_at_k([[1]], 0)
    with pytest.raises(ValueError, match="`num_bins`"):
        metrics.calibration_bins([1], [1], num_bins=0)
