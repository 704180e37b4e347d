"""Advantages against oracles that share no code with them: autograd, double loops, scikit-learn, literal formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from trl_capo.advantages import (
    NORMALIZATIONS,
    cross_prompt_advantages,
    pairwise_logistic_advantages,
    reference_perplexity_mask,
    reward_only_advantages,
    soft_misranking,
)


SCORES = [-0.2, -0.5, -0.4, -0.1]  # within-prompt AUC 1/4 for rewards 1, 1, 0, 0
REWARD_VALUES = {"binary": [0.0, 1.0], "graded": [0.0, 0.25, 0.5, 1.0]}
SEEDS = range(12)


def random_groups(seed: int, kind: str = "binary", missing: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, scores and valid of one to five groups of one to nine, float64; ties and one-sided groups included."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 6)), int(rng.integers(1, 10)))
    rewards = rng.choice(REWARD_VALUES[kind], size=shape)
    scores = -rng.exponential(size=shape)
    scores = np.where(rng.random(shape) < 0.3, scores.round(1), scores)  # ties
    valid = np.ones(shape, dtype=bool)
    if missing:
        rewards[rng.random(shape) < 0.15] = np.nan
        scores[rng.random(shape) < 0.1] = np.nan
        scores[rng.random(shape) < 0.1] = -np.inf
        valid = rng.random(shape) < 0.8
    return torch.tensor(rewards), torch.tensor(scores), torch.tensor(valid)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def takes_part(reward: float, score: float, valid: bool) -> bool:
    return valid and math.isfinite(reward) and math.isfinite(score)


def pair_sum(i: tuple[float, float], others: list[tuple[float, float]], tau: float) -> float:
    """What (reward, score) i gains from the others, term by term."""
    return sum((i[0] - j[0]) * sigmoid(-(i[1] - j[1]) * (i[0] - j[0]) / tau) for j in others)


def loop_advantages(rewards: Tensor, scores: Tensor, tau: float, valid: Tensor, normalization: str) -> Tensor:
    rows = []
    for group in zip(rewards.tolist(), scores.tolist(), valid.tolist(), strict=True):
        members = list(zip(*group, strict=True))
        present = [(reward, score) for reward, score, ok in members if takes_part(reward, score, ok)]
        sums = {member: pair_sum(member, present, tau) for member in present}
        row = []
        for reward, score, ok in members:
            if not takes_part(reward, score, ok):
                row.append(0.0)
                continue
            divisor = {
                "sum": 1.0,
                "group": len(present),
                "opposite_mean": max(1, sum(other[0] != reward for other in present)),
                "std": float(np.std([sums[m] for m in present], ddof=1)) + 1e-4 if len(present) > 1 else 1e-4,
            }[normalization]
            row.append(sums[reward, score] / divisor)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).view(rewards.shape)


def loop_cross_prompt(rewards: Tensor, scores: Tensor, tau: float, valid: Tensor) -> Tensor:
    advantages = torch.zeros_like(rewards)
    members = {
        (p, g): (rewards[p, g].item(), scores[p, g].item())
        for p, g in itertools.product(*map(range, rewards.shape))
        if takes_part(rewards[p, g].item(), scores[p, g].item(), valid[p, g].item())
    }
    for (p, g), member in members.items():
        others = [other for (q, _), other in members.items() if q != p]
        advantages[p, g] = pair_sum(member, others, tau) / rewards.shape[0]
    return advantages


# The vectors of a hand-worked group


@pytest.mark.parametrize(
    ("tau", "rewards", "expected"),
    [
        (0.5, [1, 1, 0, 0], [0.951146, 1.239808, -0.951146, -1.239808]),
        (0.6, [1, 1, 0, 0], [0.959000, 1.202327, -0.959000, -1.202327]),
        (1.0, [1, 1, 0, 0], [0.975145, 1.123667, -0.975145, -1.123667]),
        (1e9, [1, 1, 0, 0], [1, 1, -1, -1]),
        (math.inf, [1, 1, 0, 0], [1, 1, -1, -1]),
        (1e-9, [1, 1, 0, 0], [1, 2, -1, -2]),
        (0.6, [1, 0, 0, 0], [1.336541, -0.377541, -0.417430, -0.541570]),
    ],
)
def test_vectors(tau, rewards, expected):
    advantages = pairwise_logistic_advantages(torch.tensor([rewards]).double(), torch.tensor([SCORES]).double(), tau)
    np.testing.assert_allclose(advantages, [expected], atol=1e-6)


def test_vectors_of_grpo_and_soft_misranking():
    rewards, scores = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([SCORES])
    assert soft_misranking(rewards, scores, tau=0.6).item() == pytest.approx(0.540332, abs=1e-5)
    np.testing.assert_allclose(reward_only_advantages(rewards).abs(), [[0.865875] * 4], atol=1e-5)


def test_group_of_eight_is_larger_than_grpo():
    """Four of eight right and all equally sure: 2 where GRPO has 0.935, so learning rates are not comparable."""
    rewards = torch.tensor([[1.0] * 4 + [0.0] * 4])
    advantages = pairwise_logistic_advantages(rewards, torch.full((1, 8), -0.5), tau=0.6)
    np.testing.assert_allclose(advantages, [[2.0] * 4 + [-2.0] * 4])
    np.testing.assert_allclose(reward_only_advantages(rewards).abs(), [[0.935]] * np.ones((1, 8)), atol=1e-3)


# Oracles


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", REWARD_VALUES)
@pytest.mark.parametrize("tau", [0.07, 0.6, 3.0])
def test_is_the_gradient_of_the_pairwise_logistic_loss(seed, kind, tau):
    rewards, scores, _ = random_groups(seed, kind)
    leaf = scores.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for p in range(rewards.shape[0]):
        for i, j in itertools.combinations(range(rewards.shape[1]), 2):
            if rewards[p, i] != rewards[p, j]:
                loss = loss + torch.log1p(
                    torch.exp(-(leaf[p, i] - leaf[p, j]) * (rewards[p, i] - rewards[p, j]) / tau)
                )
    (gradient,) = torch.autograd.grad(loss, leaf) if loss.requires_grad else (torch.zeros_like(scores),)
    exact = pairwise_logistic_advantages(rewards, scores, tau, scale_by_tau=True)
    torch.testing.assert_close(exact, -gradient, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(pairwise_logistic_advantages(rewards, scores, tau), -gradient * tau)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", REWARD_VALUES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equals_the_double_loop(seed, kind, normalization):
    rewards, scores, valid = random_groups(seed, kind, missing=True)
    for tau in (0.05, 0.6):
        expected = loop_advantages(rewards, scores, tau, valid, normalization)
        actual = pairwise_logistic_advantages(rewards, scores, tau, valid=valid, normalization=normalization)
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
        scaled = pairwise_logistic_advantages(
            rewards, scores, tau, valid=valid, normalization=normalization, scale_by_tau=True
        )
        torch.testing.assert_close(scaled, expected / tau, atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", REWARD_VALUES)
@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_cross_prompt_equals_the_double_loop(seed, kind, block_size):
    rewards, scores, valid = random_groups(seed, kind, missing=True)
    expected = loop_cross_prompt(rewards, scores, 0.6, valid)
    actual = cross_prompt_advantages(rewards, scores, 0.6, valid=valid, block_size=block_size)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)
    assert actual.sum().abs() < 1e-10
    scaled = cross_prompt_advantages(rewards, scores, 0.6, valid=valid, scale_by_tau=True, block_size=block_size)
    torch.testing.assert_close(scaled, expected / 0.6, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_misranking_equals_the_mean_over_pairs(seed):
    rewards, scores, valid = random_groups(seed, missing=True)
    expected = []
    for group in zip(rewards.tolist(), scores.tolist(), valid.tolist(), strict=True):
        present = [(reward, score) for reward, score, ok in zip(*group, strict=True) if takes_part(reward, score, ok)]
        right = [score for reward, score in present if reward == 1]
        wrong = [score for reward, score in present if reward == 0]
        rates = [sigmoid((w - r) / 0.3) for r in right for w in wrong]
        expected.append(np.mean(rates) if rates else math.nan)
    actual = soft_misranking(rewards, scores, 0.3, valid=valid)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


# Limits


@pytest.mark.parametrize("seed", SEEDS)
def test_small_tau_counts_the_opponents_on_the_wrong_side(seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(8) * -0.1 - 0.05  # no ties
    rewards = np.array([1.0] * 3 + [0.0] * 5)
    advantages = pairwise_logistic_advantages(torch.tensor(rewards)[None], torch.tensor(scores)[None], tau=1e-4)[0]
    right, wrong = scores[:3], scores[3:]
    np.testing.assert_allclose(advantages[:3], [(wrong > score).sum() for score in right], atol=1e-9)
    np.testing.assert_allclose(advantages[3:], [-(right < score).sum() for score in wrong], atol=1e-9)
    auc = roc_auc_score(rewards, scores)
    assert advantages[:3].sum().item() == pytest.approx(3 * 5 * (1 - auc), abs=1e-9)
    misranking = soft_misranking(torch.tensor(rewards)[None], torch.tensor(scores)[None], tau=1e-4).item()
    assert misranking == pytest.approx(1 - auc, abs=1e-9)


def test_ties_count_one_half_at_small_tau():
    rewards, scores = torch.tensor([[1.0, 1.0, 0.0]]).double(), torch.tensor([[-0.5, -0.3, -0.5]]).double()
    assert soft_misranking(rewards, scores, tau=1e-6).item() == 1 - roc_auc_score([1, 1, 0], [-0.5, -0.3, -0.5])


@pytest.mark.parametrize("seed", SEEDS)
def test_large_tau_is_half_of_grpo(seed):
    rewards, scores, _ = random_groups(seed)
    group_size = rewards.shape[1]
    expected = group_size / 2 * (rewards - rewards.mean(dim=1, keepdim=True))
    torch.testing.assert_close(pairwise_logistic_advantages(rewards, scores, 1e9), expected, atol=1e-7, rtol=1e-7)
    by_group = pairwise_logistic_advantages(rewards, scores, 1e9, normalization="group")
    grpo = reward_only_advantages(rewards, scale_rewards="none")
    torch.testing.assert_close(by_group, grpo / 2, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_large_tau_across_prompts_has_a_batch_mean_baseline(seed):
    rewards, scores, _ = random_groups(seed)
    num_prompts, group_size = rewards.shape
    own = rewards - rewards.mean(dim=1, keepdim=True)
    expected = group_size / 2 * ((1 - 1 / num_prompts) * own + (rewards - rewards.mean()))
    both = pairwise_logistic_advantages(rewards, scores, 1e9) + cross_prompt_advantages(rewards, scores, 1e9)
    torch.testing.assert_close(both, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", REWARD_VALUES)
def test_linear_loss_in_place_of_the_logistic_gives_grpo(seed, kind):
    """The same double loop with weight 1 for every pair, over the number of valid members."""
    rewards, _, valid = random_groups(seed, kind, missing=True)
    expected = torch.zeros_like(rewards)
    for p, i in itertools.product(*map(range, rewards.shape)):
        partners = [j for j in range(rewards.shape[1]) if valid[p, j] and rewards[p, j].isfinite()]
        if i in partners:
            expected[p, i] = sum(rewards[p, i] - rewards[p, j] for j in partners) / len(partners)
    grpo = reward_only_advantages(rewards, valid=valid, scale_rewards="none")
    torch.testing.assert_close(grpo, expected, atol=1e-12, rtol=1e-12)


# Invariants


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", REWARD_VALUES)
def test_sums_bounds_and_signs(seed, kind):
    rewards, scores, valid = random_groups(seed, kind, missing=True)
    present = valid & rewards.isfinite() & scores.isfinite()
    for normalization in ("sum", "group"):
        advantages = pairwise_logistic_advantages(rewards, scores, 0.2, valid=valid, normalization=normalization)
        assert advantages.sum(dim=1).abs().max() < 1e-10
    advantages = pairwise_logistic_advantages(rewards, scores, 0.2, valid=valid)
    for p, i in itertools.product(*map(range, rewards.shape)):
        others = (rewards[p, present[p]] != rewards[p, i]).sum() if present[p, i] else 0
        assert advantages[p, i].abs() <= others
    if kind == "binary":
        assert (advantages[present & (rewards == 1)] >= 0).all()
        assert (advantages[present & (rewards == 0)] <= 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_shifting_all_scores_changes_nothing(normalization):
    rewards, scores, valid = random_groups(3, "graded", missing=True)
    shift = torch.linspace(-3, 3, rewards.shape[0], dtype=torch.float64).unsqueeze(1)
    one = pairwise_logistic_advantages(rewards, scores, 0.6, valid=valid, normalization=normalization)
    other = pairwise_logistic_advantages(rewards, scores + shift, 0.6, valid=valid, normalization=normalization)
    torch.testing.assert_close(one, other)


def test_order_of_a_group_does_not_matter():
    rewards, scores, valid = random_groups(5, missing=True)
    order = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(0))
    one = pairwise_logistic_advantages(rewards, scores, 0.6, valid=valid)[:, order]
    other = pairwise_logistic_advantages(rewards[:, order], scores[:, order], 0.6, valid=valid[:, order])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_unusable_rows_are_as_good_as_removed(seed, normalization):
    rewards, scores, valid = random_groups(seed, "graded", missing=True)
    advantages = pairwise_logistic_advantages(rewards, scores, 0.6, valid=valid, normalization=normalization)
    assert advantages.isfinite().all()
    for p, present in enumerate(valid & rewards.isfinite() & scores.isfinite()):
        assert (advantages[p, ~present] == 0).all()
        alone = pairwise_logistic_advantages(
            rewards[p : p + 1, present], scores[p : p + 1, present], 0.6, normalization=normalization
        )
        torch.testing.assert_close(advantages[p : p + 1, present], alone)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [math.nan] * 3])
def test_group_without_different_rewards_gives_exact_zeros(normalization, rewards):
    scores = torch.tensor([[-0.1, -1e30, -7.0]])
    advantages = pairwise_logistic_advantages(torch.tensor([rewards]), scores, 0.6, normalization=normalization)
    assert torch.equal(advantages, torch.zeros(1, 3))
    assert soft_misranking(torch.tensor([rewards]), scores, 0.6).isnan().all()


def test_cross_prompt_pairs_of_a_single_prompt_add_nothing():
    rewards, scores = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.1, -0.4]])
    assert torch.equal(cross_prompt_advantages(rewards, scores, 0.6), torch.zeros(1, 2))


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (0, 0)])
def test_empty_batches_and_groups_of_one(shape):
    rewards, scores = torch.ones(shape), torch.zeros(shape)
    for normalization in NORMALIZATIONS:
        advantages = pairwise_logistic_advantages(rewards, scores, 0.6, normalization=normalization)
        assert torch.equal(advantages, torch.zeros(shape))
    assert torch.equal(cross_prompt_advantages(rewards, scores, 0.6), torch.zeros(shape))
    for scale_rewards in ("group", "batch", "none"):
        assert torch.equal(reward_only_advantages(rewards, scale_rewards=scale_rewards), torch.zeros(shape))
    assert soft_misranking(rewards, scores, 0.6).shape == shape[:1]
    assert reference_perplexity_mask(rewards, scores + 1, 1.05, 2.5).shape == shape


# Numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision_is_computed_in_float32(dtype, normalization):
    rewards, scores, _ = random_groups(4, "graded")
    low = rewards.to(dtype), scores.to(dtype)
    high = low[0].float(), low[1].float()
    actual = pairwise_logistic_advantages(*low, 0.6, normalization=normalization)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, pairwise_logistic_advantages(*high, 0.6, normalization=normalization))
    assert torch.equal(cross_prompt_advantages(*low, 0.6), cross_prompt_advantages(*high, 0.6))
    assert torch.equal(reward_only_advantages(low[0]), reward_only_advantages(high[0]))


def test_float64_is_kept_and_other_labels_are_understood():
    rewards, scores, _ = random_groups(4)
    assert pairwise_logistic_advantages(rewards, scores, 0.6).dtype == torch.float64
    assert reward_only_advantages(rewards).dtype == torch.float64
    expected = pairwise_logistic_advantages(rewards, scores, 0.6)
    for labels in (rewards.bool(), rewards.long(), rewards.half()):
        assert torch.equal(pairwise_logistic_advantages(labels, scores, 0.6), expected)


@pytest.mark.parametrize("gap", [1e4, 1e30, 3e38])
@pytest.mark.parametrize("tau", [1e-30, 1e-6, 0.6])
def test_extreme_gaps_saturate(gap, tau):
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    scores = torch.tensor([[-gap, gap], [gap, -gap]])  # all wrong, all settled
    expected = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert torch.equal(pairwise_logistic_advantages(rewards, scores, tau), expected)
    assert torch.equal(soft_misranking(rewards, scores, tau), torch.tensor([1.0, 0.0]))
    # Across prompts each member meets the same score with the other reward, or one far away on its own side.
    assert cross_prompt_advantages(rewards, scores, tau).isfinite().all()
    for normalization in NORMALIZATIONS:
        assert pairwise_logistic_advantages(rewards, scores, tau, normalization=normalization).isfinite().all()


def test_extreme_gap_between_equal_rewards_leaks_nothing():
    """An infinite gap times a reward gap of zero is NaN, and has to stay out of the sum."""
    rewards, scores = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[3e38, -3e38, 0.0]])
    assert torch.equal(pairwise_logistic_advantages(rewards, scores, 0.6), torch.tensor([[0.0, 1.0, -1.0]]))


def test_inputs_are_neither_changed_nor_required_to_be_contiguous():
    rewards, scores, valid = random_groups(7, "graded", missing=True)
    strided = [x.repeat_interleave(2, dim=1)[:, ::2] for x in (rewards, scores, valid)]
    transposed = [x.T.contiguous().T for x in (rewards, scores, valid)]
    kept = rewards.clone(), scores.clone(), valid.clone()
    for function in (pairwise_logistic_advantages, cross_prompt_advantages, soft_misranking):
        expected = function(rewards, scores, 0.6, valid=valid)
        for r, s, v in (strided, transposed):
            torch.testing.assert_close(function(r, s, 0.6, valid=v), expected, equal_nan=True)
    for now, before in zip((rewards, scores, valid), kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


# Messages


@pytest.mark.parametrize("function", [pairwise_logistic_advantages, cross_prompt_advantages, soft_misranking])
@pytest.mark.parametrize("tau", [0.0, -0.6, math.nan])
def test_tau_must_be_positive(function, tau):
    with pytest.raises(ValueError, match=f"tau must be positive, got {tau}"):
        function(torch.ones(1, 2), torch.zeros(1, 2), tau)


@pytest.mark.parametrize("function", [pairwise_logistic_advantages, cross_prompt_advantages, soft_misranking])
@pytest.mark.parametrize(("rewards", "scores"), [((2, 3), (3, 2)), ((4,), (4,)), ((1, 2), (2,))])
def test_shapes_must_agree(function, rewards, scores):
    with pytest.raises(ValueError, match=r"must share one shape \(P, G\), got"):
        function(torch.ones(rewards), torch.zeros(scores), 0.6)


def test_unknown_names_are_listed_with_the_known_ones():
    with pytest.raises(ValueError, match="normalization must be one of sum, group, opposite_mean, std, got 'mean'"):
        pairwise_logistic_advantages(torch.ones(1, 2), torch.zeros(1, 2), 0.6, normalization="mean")
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none, got 'std'"):
        reward_only_advantages(torch.ones(1, 2), scale_rewards="std")


# GRPO


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_reward_only_equals_numpy(seed, scale_rewards):
    rewards, _, valid = random_groups(seed, "graded", missing=True)
    values, present = rewards.numpy(), (valid & rewards.isfinite()).numpy()
    expected = np.zeros(rewards.shape)
    for p in range(rewards.shape[0]):
        group = values[p, present[p]]
        sample = {"group": group, "batch": values[present], "none": []}[scale_rewards]
        std = np.std(sample, ddof=1) if len(sample) > 1 else 0.0
        if len(group):
            centred = group - group.mean()
            expected[p, present[p]] = centred if scale_rewards == "none" else centred / (std + 1e-4)
    actual = reward_only_advantages(rewards, valid=valid, scale_rewards=scale_rewards)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.2, -2.4])
def test_equal_rewards_have_no_advantage(reward, scale_rewards):
    """Not even that of a rounded mean over a tiny deviation, which CoDaPO's eps of 1e-6 would make 0.1."""
    rewards = torch.full((3, 7), reward)
    rewards[1, 2] = torch.nan
    assert torch.equal(reward_only_advantages(rewards, scale_rewards=scale_rewards, eps=1e-6), torch.zeros(3, 7))


# The mask

LOW, HIGH = 1.25, 2.5  # exact in binary


@pytest.mark.parametrize(
    ("correct", "ref_ppl", "kept"),
    [
        (1.0, 1.0, True),
        (1.0, 2.5, True),  # the threshold itself is kept
        (1.0, 2.5001, False),  # a lucky guess
        (1.0, math.inf, False),
        (0.0, 1.0, False),  # a near miss
        (0.0, 1.2499, False),
        (0.0, 1.25, True),
        (0.0, 9.0, True),
        (0.5, 1.0, True),  # at least one half counts as correct
        (0.49, 1.0, False),
        (math.nan, 1.5, False),
        (1.0, math.nan, False),
        (0.0, math.nan, False),
        (math.nan, math.nan, False),
    ],
)
def test_mask_truth_table(correct, ref_ppl, kept):
    mask = reference_perplexity_mask(torch.tensor([[correct]]), torch.tensor([[ref_ppl]]), LOW, HIGH)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[kept]]


def test_mask_with_the_papers_thresholds():
    """exp(0.916291) = 2.5 and exp(0.048790) = 1.05: just inside and just outside, from log-probs."""
    correct = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    ref_ppl = torch.tensor([[-0.91629, -0.91630, -0.04880, -0.04878]]).neg().exp()
    assert reference_perplexity_mask(correct, ref_ppl, 1.05, 2.5).tolist() == [[True, False, True, False]]


def test_mask_takes_boolean_labels_and_crossed_thresholds():
    """By class, low may exceed high: the two rules stay independent."""
    correct, ref_ppl = torch.tensor([[True, True, False, False]]), torch.tensor([[1.1, 1.5, 1.5, 2.0]])
    assert reference_perplexity_mask(correct, ref_ppl, low=1.8, high=1.2).tolist() == [[True, False, False, True]]


def test_masked_members_may_stay_partners_or_leave():
    """The two readings: own advantage 0 but still a partner, or out of every pair (the group then sums to zero)."""
    rewards, scores = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([SCORES])
    keep = torch.tensor([[True, False, True, True]])
    partner = pairwise_logistic_advantages(rewards, scores, 0.6).masked_fill(~keep, 0.0)
    left = pairwise_logistic_advantages(rewards, scores, 0.6, valid=keep)
    np.testing.assert_allclose(partner, [[0.959000, 0, -0.959000, -1.202327]], atol=1e-5)
    np.testing.assert_allclose(left, [[0.959000, 0, -sigmoid(-0.2 / 0.6), -sigmoid(0.1 / 0.6)]], atol=1e-5)
    assert left.sum().abs() < 1e-5
