import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trl_capo.calibration import metrics


def random_rows(seed, shape=(40, 6), missing=0.1):
    """Rows with many ties, NaN on either side, prompts that are all right, all wrong or all missing, and a mask."""
    rng = np.random.default_rng(seed)
    correct = (rng.random(shape) < 0.5).astype(float)
    confidence = rng.integers(-4, 0, shape) / 4
    correct[0], correct[1], correct[2] = 1, 0, np.nan
    correct[rng.random(shape) < missing] = np.nan
    confidence[rng.random(shape) < missing] = np.nan
    confidence[rng.random(shape) < 0.02] = -np.inf
    return correct, confidence, rng.random(shape) < 0.9


def usable(correct, confidence, valid=None):
    usable = ~np.isnan(correct) & ~np.isnan(confidence)
    return usable if valid is None else usable & valid


def pairwise_auc(correct, confidence):
    """AUC by counting pairs; NaN without a pair."""
    right, wrong = confidence[correct == 1], confidence[correct == 0]
    wins = [float(r > w) + 0.5 * float(r == w) for r in right for w in wrong]
    return np.mean(wins) if wins else math.nan


def defined_mean(values):
    values = [value for value in values if not math.isnan(value)]
    return np.mean(values) if values else math.nan


def expected_precision(correct, confidence):
    """Precision among the n surest rows, by putting in a tied row's place the mean correctness of its equals."""
    order = sorted(range(len(correct)), key=lambda i: -confidence[i])
    smoothed = [np.mean(correct[confidence == confidence[i]]) for i in order]
    return np.array([np.mean(smoothed[:n]) for n in range(1, len(correct) + 1)])


def test_auc_of_the_reference_group():
    assert metrics.auc_within([[1, 1, 0, 0]], [[-0.2, -0.5, -0.4, -0.1]]) == 0.25


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("masked", [False, True])
def test_aucs_count_pairs(seed, masked):
    correct, confidence, valid = random_rows(seed)
    valid = valid if masked else None
    use = usable(correct, confidence, valid)
    within = [pairwise_auc(c[u], f[u]) for c, f, u in zip(correct, confidence, use, strict=True)]
    slots = [pairwise_auc(c[u], f[u]) for c, f, u in zip(correct.T, confidence.T, use.T, strict=True)]
    assert metrics.auc_by_prompt(correct, confidence, valid=valid) == pytest.approx(within, abs=1e-12, nan_ok=True)
    assert metrics.auc_within(correct, confidence, valid=valid) == pytest.approx(defined_mean(within), abs=1e-12)
    assert metrics.auc_per_slot(correct, confidence, valid=valid) == pytest.approx(defined_mean(slots), abs=1e-12)
    pooled = pairwise_auc(correct[use], confidence[use])
    assert metrics.auc_pooled(correct, confidence, valid=valid) == pytest.approx(pooled, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_aucs_agree_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    correct = rng.random((200, 16)) < rng.random((200, 1))
    confidence = -rng.exponential(size=(200, 16)).round(1 + seed % 3)
    mixed = [p for p in range(200) if 0 < correct[p].sum() < 16]
    within = np.mean([roc_auc_score(correct[p], confidence[p]) for p in mixed])
    slots = np.mean([roc_auc_score(correct[:, k], confidence[:, k]) for k in range(16)])
    pooled = roc_auc_score(correct.ravel(), confidence.ravel())
    assert metrics.auc_within(correct, confidence) == pytest.approx(within, abs=1e-12)
    assert metrics.auc_per_slot(correct, confidence) == pytest.approx(slots, abs=1e-12)
    assert metrics.auc_pooled(correct, confidence) == pytest.approx(pooled, abs=1e-12)


def test_only_the_order_of_confidence_matters():
    rng = np.random.default_rng(0)
    correct, logps = rng.integers(0, 2, (30, 8)), -rng.exponential(size=(30, 8))
    for metric in (metrics.auc_within, metrics.auc_pooled, metrics.auc_per_slot, metrics.aurc):
        assert metric(correct, np.exp(logps)) == metric(correct, logps)
    assert metrics.auc_within(correct, -logps) == pytest.approx(1 - metrics.auc_within(correct, logps))


@pytest.mark.parametrize("correct", [np.ones((3, 4)), np.zeros((3, 4)), np.full((3, 4), np.nan), np.empty((0, 4))])
def test_aucs_without_a_pair_are_nan(correct):
    confidence = np.arange(correct.size, dtype=float).reshape(correct.shape)
    assert math.isnan(metrics.auc_within(correct, confidence))
    assert math.isnan(metrics.auc_pooled(correct, confidence))
    assert math.isnan(metrics.auc_per_slot(correct, confidence))


def test_constant_confidence_is_chance():
    correct = np.array([[1, 0, 0], [0, 1, 1]])
    constant = np.zeros((2, 3))
    assert metrics.auc_within(correct, constant) == metrics.auc_pooled(correct, constant) == 0.5
    assert metrics.aurc(correct, constant) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(10))
def test_accuracy_and_group_fractions_loop_over_prompts(seed):
    correct, _, valid = random_rows(seed, missing=0.4)
    shares = [[c for c, v in zip(*row, strict=True) if v and c == c] for row in zip(correct, valid, strict=True)]
    assert metrics.accuracy(correct, valid=valid) == pytest.approx(np.mean([np.mean(s) for s in shares if s]))
    fractions = metrics.group_fractions(correct, valid=valid)
    assert fractions == {
        "frac_mixed": pytest.approx(np.mean([len(set(s)) == 2 for s in shares])),
        "frac_all_correct": pytest.approx(np.mean([set(s) == {1.0} for s in shares])),
        "frac_all_wrong": pytest.approx(np.mean([set(s) == {0.0} for s in shares])),
    }
    assert sum(fractions.values()) < 1  # prompt 2 has no valid row


def test_nothing_to_count_is_nan():
    assert math.isnan(metrics.accuracy(np.full((2, 3), np.nan)))
    assert all(math.isnan(value) for value in metrics.group_fractions(np.empty((0, 4))).values())
    assert math.isnan(metrics.aurc([], []))
    assert math.isnan(metrics.precision_at_coverage([np.nan], [0.5], 0.5))
    coverage, precision = metrics.precision_coverage([], [])
    assert coverage.shape == precision.shape == (0,)


@pytest.mark.parametrize("seed", range(20))
def test_precision_coverage_averages_tied_rows(seed):
    correct, confidence, valid = random_rows(seed, shape=(12, 5))
    use = usable(correct, confidence, valid)
    expected = expected_precision(correct[use], confidence[use])
    coverage, precision = metrics.precision_coverage(correct, confidence, valid=valid)
    np.testing.assert_allclose(coverage, np.arange(1, use.sum() + 1) / use.sum(), atol=1e-15)
    np.testing.assert_allclose(precision, expected, atol=1e-12)
    assert metrics.aurc(correct, confidence, valid=valid) == pytest.approx(np.mean(1 - expected), abs=1e-12)


def test_precision_coverage_is_the_mean_over_shuffles_of_tied_rows():
    rng = np.random.default_rng(0)
    correct, confidence = np.array([1, 0, 0, 1, 1, 0]), np.array([3, 2, 2, 2, 1, 1])
    shuffles = np.array([correct[np.lexsort((rng.random(6), -confidence))] for _ in range(20_000)])
    expected = (shuffles.cumsum(1) / np.arange(1, 7)).mean(0)
    np.testing.assert_allclose(metrics.precision_coverage(correct, confidence)[1], expected, atol=0.01)


def test_aurc_weighs_losses_harmonically():
    losses = np.array([0, 1, 0, 1])
    weights = np.array([2.083333, 1.083333, 0.583333, 0.25])
    assert metrics.aurc(1 - losses, [4, 3, 2, 1]) == pytest.approx(np.mean(weights * losses), abs=1e-6)


@pytest.mark.parametrize("n_rows", [1, 3, 10, 50])
def test_precision_at_coverage_answers_the_fewest_rows_that_reach_it(n_rows):
    rng = np.random.default_rng(n_rows)
    correct, confidence = rng.integers(0, 2, n_rows), rng.permutation(n_rows)
    by_confidence = correct[np.argsort(-confidence)]
    for answered in range(1, n_rows + 1):
        expected = by_confidence[:answered].mean()
        # 100 * n / N / 100 is often a rounding error above n / N: still n rows.
        for coverage in (answered / n_rows, 100 * answered / n_rows / 100, (answered - 0.5) / n_rows):
            assert metrics.precision_at_coverage(correct, confidence, min(coverage, 1)) == pytest.approx(expected)
    assert metrics.precision_at_coverage([1] * 7 + [0] * 3, np.arange(10, 0, -1), 0.7) == 1.0


def test_minus_infinity_is_answered_last():
    assert metrics.precision_at_coverage([0, 1, 1], [-np.inf, -5.0, -1.0], 2 / 3) == 1.0


def test_perplexity_is_a_geometric_mean():
    mean_logps = np.array([[-0.5, -1.0], [np.nan, -1.5]])
    assert metrics.perplexity(mean_logps) == pytest.approx(math.exp(1.0))
    correct = np.array([[1, 0], [1, 0]])
    assert metrics.perplexity(mean_logps, valid=correct == 1) == pytest.approx(math.exp(0.5))
    assert math.isnan(metrics.perplexity([]))
    assert math.isnan(metrics.perplexity(mean_logps, valid=np.zeros((2, 2), dtype=bool)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc_within([[0.3, 1]], [[1, 2]]), "`correct` must hold 0, 1 or NaN, got 0.3"),
        (lambda: metrics.auc_within([1, 0], [1, 2]), r"`correct` must have shape \(P, G\)"),
        (lambda: metrics.auc_per_slot([1, 0], [1, 2]), r"`correct` must have shape \(P, G\)"),
        (lambda: metrics.accuracy([1, 0]), r"`correct` must have shape \(P, G\)"),
        (lambda: metrics.auc_pooled([1, 0], [1, 2, 3]), "`correct` and `confidence` must have the same shape"),
        (lambda: metrics.aurc([1, 0], [1, 2], valid=[True]), "`valid` must have the shape"),
        (lambda: metrics.precision_at_coverage([1, 0], [1, 2], 80), r"`coverage` must lie in \(0, 1\], got 80"),
        (lambda: metrics.precision_at_coverage([1, 0], [1, 2], 0), r"`coverage` must lie in \(0, 1\], got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
