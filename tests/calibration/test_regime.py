"""What the first samples say about training, against a count by hand."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trl_capo.calibration.regime import regime


def test_numbers_equal_a_literal_count():
    rng = np.random.default_rng(0)
    correct = rng.integers(0, 2, (40, 6)).astype(float)
    correct[:3], correct[3:5] = 1, 0
    correct[7, 2] = np.nan  # ungraded
    scores = rng.normal(-1, 0.4, (40, 6))
    answers = [["right" if right == 1 else rng.choice(["a", "b"]) for right in row] for row in correct]
    found = regime(correct, scores, answers)
    gaps, surer, aucs, fooled, shares = [], [], [], 0, []
    for row, score, given in zip(correct, scores, answers, strict=True):
        right = [s for c, s in zip(row, score, strict=True) if c == 1]
        wrong = [s for c, s in zip(row, score, strict=True) if c == 0]
        shares.append(len(right) / (len(right) + len(wrong)))
        said = [answer for c, answer in zip(row, given, strict=True) if c == 0]
        fooled += any(said.count(answer) >= 4 for answer in said)
        if right and wrong:
            gaps += [abs(r - w) for r, w in itertools.product(right, wrong)]
            middle = sorted(right)[len(right) // 2 - 1 : len(right) // 2 + 1]
            median = np.mean(middle) if len(right) % 2 == 0 else sorted(right)[len(right) // 2]
            surer += [w > median for w in wrong]
            aucs.append(roc_auc_score([1] * len(right) + [0] * len(wrong), right + wrong))
    assert found["samples"] == 239 and found["prompts"] == 40
    assert fooled > 0 and found["wrong_majority"] == pytest.approx(fooled / 40)
    assert found["accuracy"] == pytest.approx(np.mean(shares))
    assert found["frac_mixed"] == pytest.approx(len(aucs) / 40)
    assert found["auc_within"] == pytest.approx(np.mean(aucs))
    assert found["auc_within_95"][0] < found["auc_within"] < found["auc_within_95"][1]
    assert found["confident_wrong"] == pytest.approx(np.mean(surer))
    assert found["gap"] == pytest.approx(np.median(gaps))


def test_nothing_mixed_has_no_ranking():
    found = regime([[1, 1], [0, 0]], [[-1.0, -2.0], [-1.0, -2.0]], [["a", "a"], ["b", None]])
    assert all(math.isnan(found[name]) for name in ("auc_within", "confident_wrong", "gap"))
    assert found["accuracy"] == 0.5 and found["frac_mixed"] == 0 and found["wrong_majority"] == 0
