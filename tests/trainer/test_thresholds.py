"""The unit of tau and the mask's thresholds, against NumPy over the values that should have been seen."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from trl_capo.methods.gap_scale import GapScale
from trl_capo.trainer.mask import PerplexityThresholds


def random_batch(seed: int, num_prompts: int = 6, num_generations: int = 8):
    """Correctness (with NaN), mean log-probs and valid of a batch; some groups are not mixed."""
    rng = np.random.default_rng(seed)
    shape = (num_prompts, num_generations)
    correct = (rng.random(shape) < rng.random((num_prompts, 1))).astype(float)
    correct[rng.random(shape) < 0.1] = np.nan
    return torch.tensor(correct), torch.tensor(-rng.exponential(size=shape)), torch.tensor(rng.random(shape) < 0.9)


def loop_gaps(correct, mean_logps, valid) -> list[float]:
    gaps = []
    for group in zip(correct.tolist(), mean_logps.tolist(), valid.tolist(), strict=True):
        members = [(label, score) for label, score, ok in zip(*group, strict=True) if ok]
        gaps += [abs(r - w) for label, r in members if label == 1 for other, w in members if other == 0]
    return gaps


@pytest.mark.parametrize("seed", range(6))
def test_median_gap_is_that_of_the_double_loop(seed):
    scale = GapScale(min_gaps=10_000)
    expected = []
    for step in range(3):
        batch = random_batch(10 * seed + step)
        scale.update(*batch)
        expected += loop_gaps(*batch)
        assert scale.median == pytest.approx(np.median(expected), abs=1e-12)


def test_median_gap_freezes_with_the_batch_that_brings_enough_pairs():
    scale = GapScale(min_gaps=5)
    one_pair = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, -1.5]]), torch.ones(1, 2).bool()
    six_pairs = torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.tensor([[-1.0, -4.0, -5.0]] * 3), torch.ones(3, 3).bool()
    scale.update(*one_pair)
    assert scale.median == 1.0
    scale.update(*six_pairs)  # crosses the limit, and is taken whole
    frozen = scale.median
    assert (len(scale.gaps), frozen) == (7, 3.0)
    scale.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -99.0]]), torch.ones(1, 2).bool())
    assert (len(scale.gaps), scale.median) == (7, frozen)


@pytest.mark.parametrize("correct", [[1.0, 1.0], [0.0, 0.0], [1.0, math.nan], [0.4, 0.7]])
def test_median_gap_is_unknown_without_a_pair(correct):
    scale = GapScale()
    scale.update(torch.tensor([correct]), torch.tensor([[-0.5, -1.5]]), torch.ones(1, 2).bool())
    assert math.isnan(scale.median)


def test_an_invalid_row_makes_no_gap():
    scale = GapScale()
    correct, mean_logps = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-1.0, math.nan, -1.5]])
    scale.update(correct, mean_logps, torch.tensor([[True, False, True]]))
    assert scale.gaps == [0.5]


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_numpys_quantiles(seed, by_class):
    thresholds = PerplexityThresholds((0.25, 0.75), by_class=by_class, num_samples=100)
    right, wrong = [], []
    for step in range(10):
        correct, mean_logps, valid = random_batch(10 * seed + step)
        if not thresholds.ready:
            right += mean_logps.neg().exp()[valid & (correct == 1)].tolist()
            wrong += mean_logps.neg().exp()[valid & (correct == 0)].tolist()
            assert all(math.isnan(x) for x in thresholds.low_high)
        thresholds.update(correct, mean_logps.neg().exp(), valid)
    assert len(right) + len(wrong) >= 100
    low, high = (wrong, right) if by_class else (right + wrong, right + wrong)
    np.testing.assert_allclose(thresholds.low_high, (np.quantile(low, 0.25), np.quantile(high, 0.75)), rtol=1e-12)


def test_thresholds_by_class_may_cross_and_pooled_ones_do_not():
    correct, ref_ppl = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.25, 3.0, 4.0]])
    by_class = PerplexityThresholds((0.25, 0.75), by_class=True, num_samples=4)
    by_class.update(correct, ref_ppl, torch.ones(1, 4).bool())
    assert by_class.low_high == (3.25, 1.1875)
    pooled = PerplexityThresholds((0.25, 0.75), num_samples=4)
    pooled.update(correct, ref_ppl, torch.ones(1, 4).bool())
    assert pooled.low_high == (1.1875, 3.25)


def test_thresholds_freeze():
    thresholds = PerplexityThresholds((0.5, 0.5), num_samples=2)
    thresholds.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.5, 2.5]]), torch.ones(1, 2).bool())
    assert thresholds.ready and thresholds.low_high == (2.0, 2.0)
    thresholds.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 9.0]]), torch.ones(1, 2).bool())
    assert thresholds.low_high == (2.0, 2.0)


def test_thresholds_by_class_wait_for_one_in_sixteen_of_the_rarer_class():
    thresholds = PerplexityThresholds((0.5, 0.5), by_class=True, num_samples=32)
    all_wrong = torch.zeros(4, 8), torch.full((4, 8), 2.0), torch.ones(4, 8).bool()
    one_right = torch.tensor([[1.0]]), torch.tensor([[1.5]]), torch.ones(1, 1).bool()
    thresholds.update(*all_wrong)
    assert not thresholds.ready
    thresholds.update(*one_right)
    assert not thresholds.ready
    thresholds.update(*one_right)
    assert thresholds.ready and thresholds.low_high == (2.0, 1.5)
    pooled = PerplexityThresholds((0.5, 0.5), num_samples=32)
    pooled.update(*all_wrong)
    assert pooled.ready


def test_thresholds_leave_out_what_is_unknown():
    thresholds = PerplexityThresholds((0.5, 0.5), num_samples=2)
    correct = torch.tensor([[1.0, 1.0, 1.0, math.nan, 0.0]])
    ref_ppl = torch.tensor([[1.5, math.nan, math.inf, 1.2, 1.3]])
    thresholds.update(correct, ref_ppl, torch.tensor([[True, True, True, True, False]]))
    assert (thresholds.correct, thresholds.wrong, thresholds.ready) == ([1.5], [], False)


def test_state_survives_json_and_continues_the_same():
    """What a checkpoint does: an interrupted estimate goes on as if it had not been interrupted."""
    scale = GapScale(min_gaps=120)
    thresholds = PerplexityThresholds((0.2, 0.7), by_class=True, num_samples=90)
    resumed_scale, resumed_thresholds = scale, thresholds
    for step in range(6):
        correct, mean_logps, valid = random_batch(step)
        for each in {id(x): x for x in (scale, resumed_scale)}.values():
            each.update(correct, mean_logps, valid)
        for each in {id(x): x for x in (thresholds, resumed_thresholds)}.values():
            each.update(correct, mean_logps.neg().exp(), valid)
        resumed_scale = GapScale(**json.loads(json.dumps(asdict(resumed_scale))))
        resumed_thresholds = PerplexityThresholds(**json.loads(json.dumps(asdict(resumed_thresholds))))
        assert resumed_scale == scale
        np.testing.assert_equal(resumed_thresholds.low_high, thresholds.low_high)  # NaN = NaN here
    assert thresholds.ready and len(scale.gaps) >= 120


def test_defaults_are_not_shared_between_instances():
    first = GapScale()
    first.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, -1.5]]), torch.ones(1, 2).bool())
    assert GapScale().gaps == []
