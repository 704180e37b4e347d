import numpy as np
import pytest
from scipy.special import expit

from trl_capo.calibration.metrics import auc_pooled, brier_score, expected_calibration_error
from trl_capo.calibration.posthoc import fit_isotonic, fit_platt


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_platt_finds_the_curve_that_made_the_data(scale):
    rng = np.random.default_rng(0)
    confidence = rng.normal(-0.3, 1, 20000) * scale
    correct = rng.random(20000) < expit(2 * confidence / scale + 0.5)
    probability = fit_platt(correct, confidence)
    points = np.linspace(-2, 2, 9)
    assert probability(points * scale) == pytest.approx(expit(2 * points + 0.5), abs=0.03)


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_probabilities_are_calibrated_on_other_data(fit):
    rng = np.random.default_rng(1)
    confidence = -rng.exponential(0.5, (2, 20000))
    correct = rng.random((2, 20000)) < expit(3 * confidence + 1)
    probability = fit(correct[0], confidence[0])(confidence[1])
    assert (
        expected_calibration_error(correct[1], probability)
        < 0.02
        < 0.1
        < expected_calibration_error(correct[1], np.exp(confidence[1]))
    )
    assert brier_score(correct[1], probability) < brier_score(correct[1], np.exp(confidence[1]))
    assert auc_pooled(correct[1], probability) == pytest.approx(auc_pooled(correct[1], confidence[1]), abs=2e-3)


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_gaps_and_shapes(fit):
    probability = fit([[1, 0, np.nan], [0, 1, 1]], [[-0.1, -2.0, -0.3], [-1.0, -0.2, np.nan]])
    found = probability([[-0.1, np.nan], [-5.0, 3.0]])
    assert found.shape == (2, 2) and np.isnan(found[0, 1])
    assert ((found >= 0) & (found <= 1))[~np.isnan(found)].all()
    assert np.isnan(probability(np.nan))
    for correct in (np.ones(5), np.zeros(5), np.full(5, np.nan)):
        with pytest.raises(ValueError, match="right and wrong answers are needed"):
            fit(correct, np.arange(5.0))
