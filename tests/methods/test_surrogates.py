"""The claims of docs/method.md about surrogate losses of AUC, on finite cases.

A prompt has finitely many possible answers: answer o is sampled with probability p_o, is correct with probability
eta_o and has score f_o. AUC is the probability that of a correct and a wrong answer the correct one has the higher
score, ties counting one half. A surrogate puts a loss phi(f_correct - f_wrong) in the place of "ranked wrong". Plain
NumPy: nothing here uses the package except the last test, which ties the figure to it.
"""

import itertools

import numpy as np
import pytest
import torch

from trl_capo.advantages import pairwise_logistic_advantages, reward_only_advantages


def pair_weights(p: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """Probability that the correct one of a (correct, wrong) pair is answer o and the wrong one o', shape (n, n)."""
    weights = np.outer(p * eta, p * (1 - eta))
    return weights / weights.sum()


def pair_risk(loss, p: np.ndarray, eta: np.ndarray, f: np.ndarray) -> float:
    return float((pair_weights(p, eta) * loss(f[:, None] - f[None, :])).sum())


def misranked(gap: np.ndarray) -> np.ndarray:
    return (gap < 0) + (gap == 0) / 2


def linear(gap: np.ndarray) -> np.ndarray:
    return -gap


def logistic(gap: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -gap)


def auc(p, eta, f) -> float:
    return 1 - pair_risk(misranked, p, eta, f)


def random_answers(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, eta and f of two to seven answers; eta in (0, 1), with ties in eta and in f now and then."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    eta = rng.uniform(0.02, 0.98, size=n)
    f = rng.normal(scale=rng.choice([0.3, 1.0, 4.0]), size=n)
    if seed % 3 == 0:
        f = f.round()
    if seed % 4 == 0:
        eta = eta.round(1).clip(0.1, 0.9)
    return rng.dirichlet(np.ones(n)), eta, f


# Scale: the linear loss can be lowered without ranking anything better


@pytest.mark.parametrize("seed", range(20))
def test_linear_loss_scales_with_the_scores_and_auc_does_not(seed):
    p, eta, f = random_answers(seed)
    for a in (0.5, 2.0, 10.0):
        assert pair_risk(linear, p, eta, a * f) == pytest.approx(a * pair_risk(linear, p, eta, f))
        assert auc(p, eta, a * f) == pytest.approx(auc(p, eta, f))


def test_stretching_half_misranked_scores_lowers_the_linear_loss_for_ever_and_the_logistic_loss_not():
    """Right answers lead on average, by one big lead, while half of the pairs are the wrong way round."""
    right, wrong = np.array([3.0, 0.0]), np.array([0.5, 1.0])
    gaps = right[:, None] - wrong[None, :]
    assert misranked(gaps).mean() == 0.5 and gaps.mean() > 0
    stretches = 2.0 ** np.arange(-3, 8)
    linear_losses = [linear(a * gaps).mean() for a in stretches]
    logistic_losses = [logistic(a * gaps).mean() for a in stretches]
    assert (np.diff(linear_losses) < 0).all()
    best = int(np.argmin(logistic_losses))
    assert 0 < best < len(stretches) - 1
    assert (np.diff(logistic_losses)[best:] > 0).all() and logistic_losses[-1] > logistic_losses[0]
    assert {misranked(a * gaps).mean() for a in stretches} == {0.5}


# The linear loss with bounded scores: a split at the mean, and ties on either side of it


@pytest.mark.parametrize("seed", range(20))
def test_linear_loss_sees_only_the_difference_to_the_mean(seed):
    """E[-(R_1 - R_2)(f_1 - f_2)] over two independent samples is -2 E[f (eta - mean eta)]."""
    p, eta, f = random_answers(seed)
    expected = sum(
        p[i] * p[j] * eta[i] * (1 - eta[j]) * 2 * -(f[i] - f[j]) for i, j in itertools.product(range(len(p)), repeat=2)
    )
    assert expected == pytest.approx(-2 * np.sum(p * f * (eta - p @ eta)), abs=1e-12)


def test_bounded_linear_minimiser_splits_at_the_mean_and_is_not_auc_optimal():
    p, eta, bound = np.full(4, 0.25), np.array([0.9, 0.6, 0.4, 0.1]), 2.0
    corners = [np.array(signs) * bound for signs in itertools.product([-1, 1], repeat=4)]
    best = min(corners, key=lambda f: pair_risk(linear, p, eta, f))  # a linear function is least in a corner
    np.testing.assert_array_equal(best, [bound, bound, -bound, -bound])
    rng = np.random.default_rng(0)
    inside = rng.uniform(-bound, bound, size=(200, 4))
    assert min(pair_risk(linear, p, eta, f) for f in inside) > pair_risk(linear, p, eta, best)
    assert auc(p, eta, best) < auc(p, eta, eta) - 0.05
    # Breaking the ties the right way costs linear loss and gains AUC.
    broken = best + np.array([0.0, -0.1, 0.1, 0.0])
    assert pair_risk(linear, p, eta, broken) > pair_risk(linear, p, eta, best)
    assert auc(p, eta, broken) == pytest.approx(auc(p, eta, eta))
    assert auc(p, eta, broken) > auc(p, eta, best)


@pytest.mark.parametrize("eta", itertools.product([0.0, 1.0], repeat=4))
def test_with_a_deterministic_verifier_the_mean_split_is_auc_optimal_too(eta):
    """The limit of the argument above: the losses then differ in where their gradient goes, not in what they seek."""
    p, eta = np.array([0.4, 0.3, 0.2, 0.1]), np.array(eta)
    if 0 < eta.sum() < 4:
        assert auc(p, eta, np.sign(eta - p @ eta)) == 1.0


# The logistic loss bounds the regret of AUC


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("tau", [0.1, 0.6, 3.0])
def test_deterministic_regret_bound(seed, tau):
    """eta 0 or 1: 1 - AUC <= logistic loss / ln 2, for every tau and every score."""
    p, eta, f = random_answers(seed)
    eta = (eta >= np.median(eta)).astype(float)
    if eta.all():  # two equal answers
        eta[0] = 0.0
    assert 1 - auc(p, eta, f) <= pair_risk(logistic, p, eta, f / tau) / np.log(2) + 1e-12


@pytest.mark.parametrize("seed", range(100))
def test_noisy_regret_bound(seed):
    """Any eta in (0, 1): AUC regret <= sqrt(2 x logistic regret)."""
    p, eta, f = random_answers(seed)
    best = np.log(eta / (1 - eta))
    auc_regret = auc(p, eta, eta) - auc(p, eta, f)
    logistic_regret = pair_risk(logistic, p, eta, f) - pair_risk(logistic, p, eta, best)
    assert logistic_regret >= -1e-12
    assert -1e-12 <= auc_regret <= np.sqrt(2 * max(logistic_regret, 0)) + 1e-9


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_logistic_minimiser_is_tau_times_the_log_odds(seed, tau):
    """It ranks by eta, so it is AUC-optimal; its gaps grow with tau, which is why tau has the unit of the gaps."""
    p, eta, _ = random_answers(seed)
    best = tau * np.log(eta / (1 - eta))
    assert auc(p, eta, best) == pytest.approx(auc(p, eta, eta))
    probabilities = 1 / (1 + np.exp(np.subtract.outer(best, best) / tau))  # how much a pair still pushes
    pushes = pair_weights(p, eta) * probabilities
    np.testing.assert_allclose(pushes.sum(axis=1), pushes.sum(axis=0), atol=1e-12)  # convex loss, zero gradient


def test_noise_needs_the_square_root():
    """Two answers right 51 and 49 times in a hundred, ranked the wrong way by a hair: 1 / ln 2 is too little."""
    p, eta, f = np.full(2, 0.5), np.array([0.51, 0.49]), np.array([-0.001, 0.001])
    auc_regret = auc(p, eta, eta) - auc(p, eta, f)
    logistic_regret = pair_risk(logistic, p, eta, f) - pair_risk(logistic, p, eta, np.log(eta / (1 - eta)))
    assert auc_regret > logistic_regret / np.log(2)
    assert auc_regret <= np.sqrt(2 * logistic_regret)


# What the package makes of it


def test_capo_corrects_the_misranked_pair_first_and_grpo_all_alike():
    gaps = torch.linspace(-3, 3, 13)
    rewards = torch.tensor([[1.0, 0.0]]).expand(13, 2)
    scores = torch.stack([gaps - 2, torch.full_like(gaps, -2.0)], dim=1)
    capo = pairwise_logistic_advantages(rewards, scores, tau=0.6)[:, 0]
    grpo = reward_only_advantages(rewards, scale_rewards="none")[:, 0]
    assert (capo.diff() < 0).all()
    assert (grpo == 0.5).all()
    assert capo[6] == 0.5 and capo[0] > 0.99 and capo[-1] < 0.01
