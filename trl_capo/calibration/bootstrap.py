"""Uncertainty of a comparison of trained models: a paired bootstrap over seeds and prompts.

The measurements form a table with one number per training seed and prompt, shape (S, P): how often that seed's model
was right on that prompt, or its AUC there. Another seed would give another model, and other prompts another test. So
both are resampled with replacement, independently, and every drawn seed meets every drawn prompt (the crossed
bootstrap).

Resampling a few seeds underestimates their variation: with five seeds, a plain 95% interval covers the truth in 83% of
cases. So the contribution of the seeds is widened, by sqrt(S / (S - 1)) for the lost degree of freedom and by the
ratio of Student's quantile with S - 1 degrees of freedom to the normal one. For a statistic f of drawn seeds and
prompts,

    replicate = f(all seeds, prompts) + widening * [f(seeds, prompts) - f(all seeds, prompts)]

Models that share seeds and prompts are compared within each replicate: all rows of one call use the same draws, so
shared luck cancels in their difference.

Assumption: seeds and prompts are independent draws. Degenerate case: with one seed, the interval covers prompts only,
which is not evidence about training. A NaN, e.g. the AUC of a prompt that was always answered right, is left out of
the mean over the drawn prompts. Needs scipy (`pip install 'trl-capo[report]'`).
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trl_capo.calibration.estimate import Estimate, interval
from trl_capo.calibration.prompt_bootstrap import prompt_difference, prompt_interval


__all__ = [
    "Estimate",
    "bootstrap_means",
    "bootstrap_statistic",
    "holm",
    "interval",
    "mean_over_seeds_and_prompts",
    "paired_difference",
    "prompt_difference",
    "prompt_interval",
    "two_sided_p",
    "widening",
]


def mean_over_seeds_and_prompts(values: ArrayLike) -> NDArray[np.float64]:
    """The resampled statistic: the mean over prompts, then over seeds. Both leave out NaN.

    Args:
        values: Shape (..., S, P).

    Returns:
        Shape (...); NaN if no value is defined.

    Example:
        >>> mean_over_seeds_and_prompts([[1.0, 0.0, np.nan], [1.0, 1.0, 1.0]]).item()  # mean of 1/2 and 1
        0.75
    """
    values = _as_table(values)
    num_seeds, num_prompts = values.shape[-2:]
    return _weighted_means(values, np.ones((1, num_seeds)), np.ones((1, num_prompts)))[0]


def widening(num_seeds: int, level: float = 0.95) -> float:
    """Factor that widens the contribution of the seeds, for an interval of a given level; 0 with a single seed.

    Args:
        num_seeds: Number of seeds, S.
        level: Share of the replicates that the interval should contain, in (0, 1).

    Example:
        >>> round(widening(5), 3), round(widening(8), 3), round(widening(1000), 3)
        (1.584, 1.29, 1.002)
    """
    from scipy import stats

    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level}. Use 0.95 for a 95% interval.")
    if num_seeds == 1:
        return 0.0
    quantile = (1 + level) / 2
    student = stats.t.ppf(quantile, num_seeds - 1) / stats.norm.ppf(quantile)
    return float(student * np.sqrt(num_seeds / (num_seeds - 1)))


def bootstrap_means(
    values: ArrayLike, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Replicates of `mean_over_seeds_and_prompts` under crossed resampling of seeds and prompts.

    Args:
        values: One number per seed and prompt, NaN if undefined, shape (..., S, P). Put everything you want to compare
            into one call, along the leading dimensions, so that it gets the same draws.
        level: Level of the interval that the replicates are for (see `widening`).
        num_resamples: Number of replicates, B.
        seed: Seed of the draws.

    Returns:
        Shape (B, ...).

    Example:
        >>> replicates = bootstrap_means([[[0.0, 1.0]], [[0.5, 1.5]]], num_resamples=3)  # 2 methods, 1 seed
        >>> (replicates[:, 1] - replicates[:, 0]).tolist()  # the prompts differ, the methods' difference does not
        [0.5, 0.5, 0.5]
    """
    values = _as_table(values)
    of_all, drawn = _crossed_means(values, num_resamples, seed)
    return of_all + widening(values.shape[-2], level) * (drawn - of_all)


def _crossed_means(
    values: NDArray[np.float64], num_resamples: int, seed: int, benchmark: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of drawn prompts over all seeds, and over drawn seeds, shape (B, ...) each.

    All benchmarks share the draws of seeds. Each benchmark, by its number, has its own draws of prompts.
    """
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    num_seeds, num_prompts = values.shape[-2:]
    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)  # (B, S)
    if benchmark:
        rng = np.random.default_rng([seed, benchmark])
    prompt_counts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples)  # (B, P)
    of_all = _weighted_means(values, np.ones_like(seed_counts), prompt_counts)
    return of_all, _weighted_means(values, seed_counts, prompt_counts)


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.int64], NDArray[np.int64]], ArrayLike],
    num_seeds: int,
    num_prompts: int,
    *,
    level: float = 0.95,
    num_resamples: int = 500,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Replicates of any statistic under crossed resampling, e.g. precision at a coverage, which is not a mean.

    Args:
        statistic: Function of how often each seed, shape (S,), and each prompt, shape (P,), was drawn. Returns a
            number or an array. Put everything you want to compare into one call.
        num_seeds: Number of seeds, S.
        num_prompts: Number of prompts, P.
        level: Level of the interval that the replicates are for (see `widening`).
        num_resamples: Number of replicates, B.
        seed: Seed of the draws.

    Returns:
        Shape (B, ...); the dots are the shape that `statistic` returns.

    Example:
        >>> values = np.array([[1.0, 3.0, 2.0]])
        >>> bootstrap_statistic(lambda seeds, prompts: values[0, prompts > 0].max(), 1, 3, num_resamples=4).tolist()
        [3.0, 2.0, 3.0, 3.0]
    """
    rng = np.random.default_rng(seed)
    factor, every_seed = widening(num_seeds, level), np.ones(num_seeds, dtype=np.int64)
    replicates = []
    for _ in range(num_resamples):
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds))
        prompts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts))
        of_all = np.asarray(statistic(every_seed, prompts), dtype=np.float64)
        replicates.append(of_all + factor * (np.asarray(statistic(seeds, prompts)) - of_all))
    return np.array(replicates)


def two_sided_p(values: ArrayLike, baseline: ArrayLike, *, num_resamples: int = 2000, seed: int = 0) -> float:
    """p-value of a difference: one minus the highest level whose `paired_difference` interval excludes 0.

    Each level has its own widening, because with few seeds the far tails are much heavier than at 95%, and Holm's
    correction uses the far tails. Below p = 0.01 the values are still too small, by a factor of two or more at 0.001
    with five seeds (simulated in `tests/calibration/test_bootstrap.py`), so do not interpret them.

    Args:
        values: The method's numbers, as for `paired_difference`.
        baseline: The baseline's numbers, same shapes.
        num_resamples: Number of replicates, B.
        seed: Seed of the draws.

    Returns:
        A number between 1 / B and 1. NaN if the difference is undefined, or with one seed, which says nothing about
        training.

    Example:
        >>> better = np.array([[0.25, 0.5], [0.75, 1.0], [0.5, 0.5]])
        >>> two_sided_p(better, better - 0.25), two_sided_p(better, better[[1, 0, 2]])  # everywhere; on average not
        (0.0005, 1.0)
    """
    measured, of_all, drawn = _crossed_differences(values, baseline, num_resamples, seed)
    num_seeds = _tables(values)[0].shape[0]
    if num_seeds == 1 or np.isnan(measured):
        return float("nan")

    def leaves_zero_out(p: float) -> bool:
        replicates = of_all + widening(num_seeds, 1 - p) * (drawn - of_all)
        low, high = np.nanquantile(replicates, [p / 2, 1 - p / 2])
        return low > 0 or high < 0

    levels = np.geomspace(1 / num_resamples, 0.999, 200)
    index = bisect_left(levels, True, key=leaves_zero_out)  # the lower the level, the narrower the interval
    return float(levels[index]) if index < len(levels) else 1.0


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's correction: adjusts several p-values so that you can compare all of them with one level.

    Args:
        p_values: The p-values, shape (K,). NaN stays NaN and does not count as a test.

    Returns:
        Shape (K,), each at most 1: the k-th smallest times (K - k + 1), and no smaller than the one before.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(p_values.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(p_values))
    order = tests[np.argsort(p_values[tests], kind="stable")]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return corrected


def paired_difference(
    values: ArrayLike | list[ArrayLike],
    baseline: ArrayLike | list[ArrayLike],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Difference between two methods in the mean over seeds and prompts, with its interval.

    Args:
        values: The method's numbers, shape (S, P), NaN if undefined. Or a list of such tables, one per benchmark,
            whose means are averaged. In a single table, each method would weight the benchmarks by its own number of
            defined prompts.
        baseline: The baseline's numbers, same shapes. Row s: same training seed; column p: same prompt.
        level: Share of the replicates inside the interval.
        num_resamples: Number of replicates. Each draws seeds once for all benchmarks, and prompts for each benchmark.
        seed: Seed of the draws.

    Returns:
        Mean of `values` minus mean of `baseline`, and the interval.

    Example:
        >>> str(paired_difference([[0.25, 0.5], [0.75, 1.0]], [[0.0, 0.25], [0.5, 0.75]]))  # better by 1/4 everywhere
        '0.250 [0.250, 0.250]'
    """
    measured, of_all, drawn = _crossed_differences(values, baseline, num_resamples, seed)
    factor = widening(_tables(values)[0].shape[0], level)
    return interval(measured, of_all + factor * (drawn - of_all), level=level)


def _crossed_differences(
    values: ArrayLike | list[ArrayLike], baseline: ArrayLike | list[ArrayLike], num_resamples: int, seed: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """The measured difference, and its `_crossed_means`, shape (B,) each."""
    ours, theirs = _tables(values), _tables(baseline)
    if [table.shape for table in ours] != [table.shape for table in theirs]:
        raise ValueError(
            f"`values` and `baseline` must have the same shape to be paired, got {[table.shape for table in ours]} "
            f"and {[table.shape for table in theirs]}. Keep the seeds and prompts that both have."
        )
    pairs = [np.stack(pair) for pair in zip(ours, theirs, strict=True)]
    measured = np.mean([mean_over_seeds_and_prompts(pair) for pair in pairs], axis=0)
    means = np.mean(
        [_crossed_means(pair, num_resamples, seed, i) for i, pair in enumerate(pairs)], axis=0
    )  # (2, B, 2)
    return float(measured[0] - measured[1]), *(means[..., 0] - means[..., 1])


def _weighted_means(values: NDArray[np.float64], seed_counts: NDArray, prompt_counts: NDArray) -> NDArray[np.float64]:
    """Means with every seed and prompt counted as often as it was drawn, (..., S, P), (B, S), (B, P) -> (B, ...)."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        by_seed = (np.where(defined, values, 0) @ prompt_counts.T) / (defined @ prompt_counts.T)  # (..., S, B)
        seen = ~np.isnan(by_seed)
        counts = seed_counts.T * seen
        means = np.where(seen, by_seed * counts, 0).sum(-2) / counts.sum(-2)  # (..., B)
    return np.moveaxis(means, -1, 0)


def _tables(values: ArrayLike | list[ArrayLike]) -> list[NDArray[np.float64]]:
    """One table per benchmark."""
    tables: Any = values
    return [_as_table(table) for table in (tables if len(np.shape(tables[0])) == 2 else [tables])]


def _as_table(values: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim < 2 or 0 in table.shape[-2:]:
        raise ValueError(f"values must have shape (..., S, P), seeds by prompts, each at least 1, got {table.shape}.")
    return table
