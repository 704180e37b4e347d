"""The policy of 17 parameters: its samples and their log-probs, by enumeration; and the rule for matched accuracy."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import regime_map


def test_samples_follow_the_declared_law():
    """One prompt, one step of each kind: accuracy and mean confidence equal sums over all outcomes."""
    policy = regime_map.Policy(strength=0.8, sharpness=0.5)
    assert sum(parameter.numel() for parameter in policy.parameters) == 17
    generator = torch.Generator().manual_seed(0)
    is_rule, context = torch.tensor([[True, False]]), torch.tensor([[3, 0]])
    scores = torch.randn(1, 2, 8, generator=generator)
    with torch.no_grad():
        correct, mean_logps = policy.sample((is_rule, context, scores), 40_000, generator)
    logits = 0.5 * scores[0, 1].double().numpy()
    steps = [[0.2, 0.8], np.exp(logits) / np.exp(logits).sum()]
    style = np.array(regime_map.STYLE) ** 0.5
    style /= style.sum()
    surprisal = [sum(p * math.log(p) for p in law) for law in (*steps, style)]
    expected = (surprisal[0] + surprisal[1] + 3 * surprisal[2]) / 9
    assert correct.mean().item() == pytest.approx(0.2 * steps[1][0], abs=0.01)
    assert mean_logps.mean().item() == pytest.approx(expected, abs=0.01)
    # Every possible value of the confidence is one of the sums.
    outcomes = {
        round((sum(map(math.log, pair)) + sum(map(math.log, choices))) / 9, 4)
        for pair in itertools.product(*steps)
        for choices in itertools.combinations_with_replacement(style, 3)
    }
    drawn = {round(value, 4) for value in mean_logps[0].tolist()}
    assert all(min(abs(value - outcome) for outcome in outcomes) < 2e-4 for value in drawn)


def test_curves_are_compared_where_they_are_equally_accurate():
    curve = np.array([(0.2, 0.9), (0.4, 0.8), (0.3, 0.7), (0.6, 0.5)])
    assert regime_map.at_accuracy(curve, 0.3) == pytest.approx(0.85)
    assert regime_map.at_accuracy(curve, 0.45) == pytest.approx(0.6)
    assert math.isnan(regime_map.at_accuracy(curve, 0.7))


@pytest.mark.parametrize("tau", [None, 0.25])
def test_training_raises_accuracy_and_is_repeatable(tau):
    curve = regime_map.train(tau, 0.1, 0.8, seed=1, steps=50)
    assert len(curve) == 3 and curve[-1][0] > curve[0][0] + 0.05
    assert curve == regime_map.train(tau, 0.1, 0.8, seed=1, steps=50)
