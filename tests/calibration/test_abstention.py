import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from trl_capo.calibration.abstention import Abstention, choose_threshold


def literal_threshold(correct, confidence, precision, delta):
    """The procedure step by step, with scipy's own Clopper-Pearson interval."""
    rows = sorted(zip(confidence, correct, strict=True), reverse=True)
    step, best = max(1, round(0.01 * len(rows))), None
    for n in range(50, len(rows) + 1, step):
        threshold = rows[n - 1][0]
        kept = [c for s, c in rows if s >= threshold]
        test = binomtest(int(sum(kept)), len(kept), alternative="greater")
        if test.proportion_ci(1 - delta, method="exact").low < precision:
            break
        best = threshold
    return best


@pytest.mark.parametrize("seed", range(30))
def test_threshold_follows_the_procedure(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(50, 400))
    confidence = rng.random(n).round(int(rng.integers(1, 4)))  # ties
    correct = rng.random(n) < confidence ** rng.uniform(0.1, 1)
    for precision in (0.5, 0.8):
        chosen = choose_threshold(correct, confidence, precision)
        assert chosen.threshold == literal_threshold(correct, confidence, precision, 0.05)
        if chosen.threshold is not None:
            answered = confidence >= chosen.threshold
            assert chosen.coverage == pytest.approx(answered.mean())
            assert chosen.calibration_precision == pytest.approx(correct[answered].mean())
            np.testing.assert_array_equal(chosen.answers(confidence), answered)


def test_the_promise_is_kept_in_simulation():
    """P(correct | c) = c, c uniform: the precision above t is (1 + t) / 2, and the oracle answers 0.4 at 0.8."""
    rng = np.random.default_rng(0)
    broken, coverages = 0, []
    for _ in range(1000):
        confidence = rng.random(5000)
        chosen = choose_threshold(rng.random(5000) < confidence, confidence, 0.8, delta=0.05)
        threshold = 1.0 if chosen.threshold is None else chosen.threshold
        broken += chosen.threshold is not None and (1 + threshold) / 2 < 0.8
        coverages.append(1 - threshold)
    # At most a twentieth; 69 of 1,000 is what a rate of exactly 0.05 exceeds once in 200 times.
    assert binomtest(broken, 1000, 0.05, alternative="greater").pvalue > 0.005
    assert np.mean(coverages) >= 0.85 * 0.4


@pytest.mark.parametrize("num_questions", [60, 300])
def test_the_promise_is_kept_where_it_is_hard(num_questions):
    """A confidence that says nothing, and a true precision just below the target: any threshold breaks the promise."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(1000):
        chosen = choose_threshold(rng.random(num_questions) < 0.799, rng.random(num_questions), 0.8, delta=0.05)
        broken += chosen.threshold is not None
    assert 0 < broken and binomtest(broken, 1000, 0.05, alternative="greater").pvalue > 0.005


def test_no_threshold_is_an_answer(tmp_path):
    chosen = choose_threshold(np.zeros(100), np.arange(100.0), 0.8, name="mean log-prob")
    assert chosen.threshold is None and chosen.coverage == 0 and math.isnan(chosen.calibration_precision)
    assert not chosen.answers([0.0, 1e9, math.nan]).any()
    chosen.save(tmp_path)
    json.loads((tmp_path / "abstention.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    loaded = Abstention.load(tmp_path)
    assert loaded.threshold is None and math.isnan(loaded.calibration_precision)
    assert loaded.confidence == "mean log-prob"


def test_saved_and_loaded(tmp_path):
    chosen = choose_threshold(np.ones(100), np.arange(100.0), 0.8)
    assert chosen.threshold == 0.0 and chosen.coverage == 1.0
    assert Abstention.load(chosen.save(tmp_path)) == chosen


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 50 calibration questions are needed, got 49"):
        choose_threshold(np.ones(60), np.where(np.arange(60) < 49, 1.0, np.nan), 0.8)
    with pytest.raises(ValueError, match=r"one row a question, shape \(P,\)"):
        choose_threshold(np.ones((10, 16)), np.ones((10, 16)), 0.8)
    for bad in (0, 1, 1.2):
        with pytest.raises(ValueError, match=r"`precision` must lie in \(0, 1\)"):
            choose_threshold(np.ones(60), np.ones(60), bad)
        with pytest.raises(ValueError, match=r"`delta` must lie in \(0, 1\)"):
            choose_threshold(np.ones(60), np.ones(60), 0.8, delta=bad)
    with pytest.raises(ValueError, match="does not exist"):
        Abstention.load(tmp_path)
    for content in ("[]", "{}", "nonsense", '{"calibration_precision": 1, "other": 2}'):
        (tmp_path / "abstention.json").write_text(content)
        with pytest.raises(ValueError, match="does not hold a threshold"):
            Abstention.load(tmp_path)
