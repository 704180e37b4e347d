"""The bootstrap against loops, scipy and known answers."""

import numpy as np
import pytest
from scipy import stats

from trl_capo.calibration.bootstrap import (
    bootstrap_means,
    bootstrap_statistic,
    holm,
    interval,
    mean_over_seeds_and_prompts,
    paired_difference,
    prompt_difference,
    prompt_interval,
    two_sided_p,
    widening,
)
from trl_capo.calibration.metrics import auc_within


def table(seed_sd, prompt_sd, noise_sd, shape, rng):
    """Values with a seed effect, a prompt effect and noise; the true mean is 0."""
    num_seeds, num_prompts = shape
    return (
        rng.normal(0, seed_sd, (num_seeds, 1))
        + rng.normal(0, prompt_sd, (1, num_prompts))
        + rng.normal(0, noise_sd, shape)
    )


def test_replicates_are_means_over_drawn_seeds_of_means_over_drawn_prompts():
    rng = np.random.default_rng(0)
    values = rng.random((2, 3, 5))
    values[0, 1, 2] = values[1, 0, :] = np.nan
    replicates = bootstrap_means(values, num_resamples=50, seed=7)

    def mean(table, seeds, prompts):
        by_seed = []
        for seed in seeds:
            drawn = [table[seed, p] for p in prompts if not np.isnan(table[seed, p])]
            if drawn:
                by_seed.append(sum(drawn) / len(drawn))
        return sum(by_seed) / len(by_seed) if by_seed else np.nan

    draws = np.random.default_rng(7)
    seeds = [np.repeat(range(3), counts) for counts in draws.multinomial(3, [1 / 3] * 3, 50)]
    prompts = [np.repeat(range(5), counts) for counts in draws.multinomial(5, [1 / 5] * 5, 50)]
    widened = stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975) * np.sqrt(3 / 2)
    for b in range(50):
        for method in range(2):
            of_all = mean(values[method], range(3), prompts[b])
            expected = of_all + widened * (mean(values[method], seeds[b], prompts[b]) - of_all)
            np.testing.assert_allclose(replicates[b, method], expected, rtol=1e-9)


def test_any_statistic_gets_the_same_distribution_as_the_mean():
    values = np.random.default_rng(0).random((4, 30))
    by_means = bootstrap_means(values, num_resamples=4000)
    by_statistic = bootstrap_statistic(
        lambda seeds, prompts: seeds @ values @ prompts / 120, 4, 30, num_resamples=4000
    )
    quantiles = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(by_statistic, quantiles), np.quantile(by_means, quantiles), atol=0.012)


def test_one_seed_is_the_ordinary_bootstrap_over_prompts():
    values = np.random.default_rng(0).exponential(size=(1, 200))
    ours = interval(values.mean(), bootstrap_means(values, num_resamples=20_000))
    theirs = stats.bootstrap((values[0],), np.mean, n_resamples=20_000, method="percentile", rng=1)
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.01)


@pytest.mark.parametrize("num_seeds", [5, 8, 30])
@pytest.mark.parametrize("sds", [(1.0, 0.0, 0.0), (0.3, 1.0, 0.5)])
def test_the_interval_covers_the_true_mean(sds, num_seeds):
    """Both seeds and prompts vary, so resampling only one of the two would cover too rarely; so would few seeds."""
    rng = np.random.default_rng(1)
    covered, widths = 0, []
    for trial in range(300):
        values = table(*sds, (num_seeds, 40), rng)
        replicates = bootstrap_means(values, num_resamples=200, seed=trial)
        estimate = interval(values.mean(), replicates)
        covered += estimate.low <= 0 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.9 <= covered / 300 <= 0.985  # 0.95 is meant; plain percentiles give 0.83 at five seeds
    spread = np.sqrt(sds[0] ** 2 / num_seeds + sds[1] ** 2 / 40 + sds[2] ** 2 / (40 * num_seeds))
    assert np.median(widths) < 2.4 * stats.t.ppf(0.975, num_seeds - 1) * spread  # and not by being wide


def test_what_methods_share_cancels():
    rng = np.random.default_rng(0)
    baseline = table(1.0, 1.0, 1.0, (5, 100), rng)
    difference = paired_difference(baseline + 0.1, baseline)
    np.testing.assert_allclose([difference.value, difference.low, difference.high], 0.1)
    unpaired = paired_difference(baseline + 0.1, table(1.0, 1.0, 1.0, (5, 100), rng))
    assert unpaired.high - unpaired.low > 0.5


def test_benchmarks_are_averaged_with_one_draw_of_seeds():
    rng = np.random.default_rng(1)
    luck = rng.normal(size=(5, 1))  # of the seeds, opposite on the two benchmarks
    ours = [luck + np.zeros((5, 30)), 3 - luck + np.zeros((5, 10))]
    both = paired_difference(ours, [np.zeros((5, 30)), np.zeros((5, 10))])
    np.testing.assert_allclose([both.value, both.low, both.high], 1.5)
    first = paired_difference(ours[0], np.zeros((5, 30)))
    assert paired_difference(ours[:1], [np.zeros((5, 30))]) == first and first.high > first.low
    assert two_sided_p(ours, [np.zeros((5, 30)), np.zeros((5, 10))]) == pytest.approx(1 / 2000)
    assert np.isnan(two_sided_p([ours[0], np.full((5, 3), np.nan)], [ours[0], np.zeros((5, 3))]))
    with pytest.raises(ValueError, match="same shape to be paired"):
        paired_difference(ours, ours[:1])
    # Prompts of each benchmark are drawn on their own, so equal numbers do not move together: sqrt(2) narrower.
    prompts = rng.normal(size=(1, 400))
    width = {n: np.ptp(_ends(paired_difference([prompts] * n, [np.zeros_like(prompts)] * n))) for n in (1, 2)}
    assert width[2] == pytest.approx(width[1] / np.sqrt(2), rel=0.1)


def _ends(estimate):
    return estimate.low, estimate.high


def test_undefined_values_are_left_out():
    values = np.array([[0.0, np.nan], [1.0, 3.0]])
    assert mean_over_seeds_and_prompts(values) == 1.0
    assert mean_over_seeds_and_prompts([[np.nan], [2.0]]) == 2.0
    assert np.isnan(mean_over_seeds_and_prompts([[np.nan]]))
    nothing = paired_difference([[np.nan, np.nan]], [[0.0, 1.0]])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same shape to be paired"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="seeds by prompts"):
        bootstrap_means(np.zeros(3))
    with pytest.raises(ValueError, match="seeds by prompts"):
        bootstrap_means(np.zeros((2, 0)))
    with pytest.raises(ValueError, match="num_resamples"):
        bootstrap_means(np.zeros((2, 2)), num_resamples=0)
    with pytest.raises(ValueError, match="level"):
        interval(0.0, [0.0], level=95)


def test_prompt_intervals_draw_prompts_with_all_their_samples():
    rng = np.random.default_rng(3)
    correct, confidence = (rng.random((2, 30, 4)) < 0.5).astype(float), rng.random((2, 30, 4))
    found = prompt_interval(auc_within, correct[0], confidence[0], num_resamples=200, seed=5)
    draws = np.random.default_rng(5)
    replicates = []
    for _ in range(200):
        prompts = draws.integers(30, size=30)
        replicates.append(auc_within([correct[0, p] for p in prompts], [confidence[0, p] for p in prompts]))
    assert found.value == auc_within(correct[0], confidence[0])
    assert (found.low, found.high) == tuple(np.quantile(replicates, [0.025, 0.975]))

    ours, theirs = zip(correct, confidence, strict=True)
    difference = prompt_difference(auc_within, ours, theirs, num_resamples=200, seed=5)
    assert difference.value == auc_within(*ours) - auc_within(*theirs)
    assert difference.low < difference.value < difference.high
    nothing = prompt_difference(auc_within, ours, ours)
    assert nothing.value == nothing.low == nothing.high == 0


def test_p_values_agree_with_the_intervals():
    """At every level, an interval leaves 0 out just where the p-value is below one minus the level."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(rng.normal(0, 0.3), 1, (5, 40)) + rng.normal(0, 0.2, (5, 1))
        p = two_sided_p(values, np.zeros_like(values), num_resamples=999)
        for level in (0.5, 0.8, 0.95, 0.99):
            if abs(np.log(p / (1 - level))) > 0.1:
                found = paired_difference(values, np.zeros_like(values), level=level, num_resamples=999)
                assert (found.low > 0 or found.high < 0) == (p < 1 - level)
    assert np.isnan(two_sided_p([[1.0, 2.0]], [[0.0, 0.0]]))


def test_few_seeds_do_not_make_small_p_values():
    """Without a difference, seven methods against one baseline: about 5% of families have a corrected p below 0.05."""
    rng, false = np.random.default_rng(0), 0
    for family in range(200):
        methods = rng.normal(0, 1, (8, 5, 1)) + rng.normal(0, 0.3, (8, 5, 12))
        p_values = [two_sided_p(of, methods[0], num_resamples=400, seed=family) for of in methods[1:]]
        false += holm(p_values).min() < 0.05
    assert false <= 16  # 8%, two standard errors; read at the widening of 95%, it was 17%


def test_how_far_out_p_values_hold():
    """Five normal seeds without a difference: 5% have p below 5%, little more than 1% below 1%; 0.1% is too few."""
    rng, num_seeds = np.random.default_rng(0), 5
    counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), 2000) / num_seeds
    rejected = dict.fromkeys((0.05, 0.01, 0.001), 0)
    for _ in range(40):
        seeds = rng.normal(size=(500, num_seeds))
        means = seeds.mean(axis=1, keepdims=True)
        for p in rejected:
            replicates = means + widening(num_seeds, 1 - p) * (seeds @ counts.T - means)
            low, high = np.quantile(replicates, [p / 2, 1 - p / 2], axis=1)
            rejected[p] += int(((low > 0) | (high < 0)).sum())
    rates = {p: number / 20_000 for p, number in rejected.items()}
    assert 0.045 < rates[0.05] < 0.065 and 0.008 < rates[0.01] < 0.018 and 0.0015 < rates[0.001] < 0.0035, rates


def test_holm_by_its_definition():
    """Step down: reject the smallest while it stays below alpha over the tests that are left."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        p_values = rng.random(6) ** 3
        corrected = holm(p_values)
        for alpha in (0.01, 0.05, 0.2):
            rejected, left = set(), 6
            for k in np.argsort(p_values):
                if p_values[k] > alpha / left:
                    break
                rejected.add(k)
                left -= 1
            assert {k for k in range(6) if corrected[k] <= alpha} == rejected
    np.testing.assert_array_equal(holm([np.nan, 0.02]), [np.nan, 0.02])
    assert holm([]).shape == (0,)


def test_one_prompt_has_no_interval():
    found = prompt_interval(auc_within, [[1, 0]], [[0.9, 0.1]])
    gap = prompt_difference(auc_within, ([[1, 0]], [[0.9, 0.1]]), ([[1, 0]], [[0.1, 0.9]]))
    assert (found.value, gap.value) == (1, 1) and np.isnan([found.low, found.high, gap.low, gap.high]).all()


def test_prompt_intervals_cover_the_truth():
    """Accuracy of prompts of different difficulty, 8 samples each: single samples would vary too little."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(300):
        correct = (rng.random((60, 8)) < rng.beta(0.5, 0.5, (60, 1))).astype(float)
        found = prompt_interval(lambda c, s: c.mean(), correct, correct, num_resamples=200)
        covered += found.low <= 0.5 <= found.high
    assert covered / 300 > 0.9


def test_prompts_must_match():
    samples = np.ones((3, 2)), np.ones((3, 2))
    with pytest.raises(ValueError, match="answered 3 and 4 prompts"):
        prompt_difference(auc_within, samples, (np.ones((4, 2)), np.ones((4, 2))))
    for correct, confidence in ((np.ones(3), np.ones(3)), (np.ones((3, 2)), np.ones((3, 1))), (np.ones((0, 2)),) * 2):
        with pytest.raises(ValueError, match=r"the same shape \(P, G\)"):
            prompt_interval(auc_within, correct, confidence)
