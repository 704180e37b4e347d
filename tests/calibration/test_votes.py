"""The selectors against literal votes, and how ties are broken."""

import math

import numpy as np
import pytest

from trl_capo.calibration.votes import (
    best_of_n,
    borda_vote,
    majority_vote,
    perplexity_consistency,
    reasoning_pruned_perplexity_consistency,
    weighted_vote,
)


def random_samples(seed, n=16):
    """Answers with gaps, log-probs with gaps, and texts that repeat."""
    rng = np.random.default_rng(seed)
    texts = [f"text {i}" for i in rng.integers(0, n // 2, n)]
    answer_of = {text: [None, "1", "2", "3"][rng.integers(4)] for text in texts}
    logp_of = {text: [np.nan, *-rng.exponential(size=9)][rng.integers(10)] for text in texts}
    return [answer_of[text] for text in texts], np.array([logp_of[text] for text in texts]), texts


def literal_vote(answers, weights):
    """Scores by a loop over the distinct answers."""
    rows = [(a, w) for a, w in zip(answers, weights, strict=True) if a is not None and not math.isnan(w)]
    return {answer: sum(w for a, w in rows if a == answer) for answer in {a for a, _ in rows}}


def assert_follows(selection, scores):
    assert selection.scores == pytest.approx(scores)
    if not scores:
        assert selection.answer is None
        assert math.isnan(selection.confidence)
        return
    assert selection.scores[selection.answer] == max(selection.scores.values())
    assert selection.confidence == pytest.approx(max(scores.values()) / sum(scores.values()))


@pytest.mark.parametrize("seed", range(50))
def test_selectors_follow_a_literal_vote(seed):
    answers, logps, texts = random_samples(seed)
    assert_follows(majority_vote(answers), literal_vote(answers, [1] * 16))
    assert_follows(majority_vote(answers, logps), literal_vote(answers, [1] * 16))
    assert_follows(perplexity_consistency(answers, logps), literal_vote(answers, np.exp(logps)))

    firsts = [texts.index(text) for text in dict.fromkeys(texts)]
    distinct = literal_vote([answers[i] for i in firsts], np.exp(logps[firsts]))
    assert_follows(perplexity_consistency(answers, logps, completions=texts), distinct)


def test_perplexity_consistency_without_duplicates_is_a_weighted_vote():
    answers, logps = ["a", "b", "a", "b"], np.log([0.2, 0.9, 0.3, 0.1])
    expected = weighted_vote(answers, np.exp(logps), mean_logps=logps)
    assert perplexity_consistency(answers, logps) == expected
    assert perplexity_consistency(answers, logps, completions=list("wxyz")) == expected
    assert expected.answer == "b"
    assert expected.confidence == pytest.approx(1 / 1.5)


def test_a_text_counts_once_by_its_first_sample():
    selection = perplexity_consistency(["a", "a", "b"], np.log([0.4, 0.5, 0.6]), completions=["same", "same", "other"])
    assert selection.scores == pytest.approx({"a": 0.4, "b": 0.6})


def test_ties_go_to_the_surest_single_sample():
    answers = ["a", "b", "b", "a"]
    assert majority_vote(answers, [-0.3, -0.9, -0.1, -0.2]).answer == "b"
    assert majority_vote(answers, [-0.3, -0.9, math.nan, -0.2]).answer == "a"


def test_ties_without_log_probs_go_to_the_first():
    assert majority_vote(["b", "a", "a", "b"]).answer == "b"
    assert majority_vote(["b", "a"], [-0.5, -0.5]).answer == "b"
    assert majority_vote([None, "a", "b"], [-0.1, -0.5, -0.5]).answer == "a"


def test_the_order_of_votes_does_not_break_a_tie():
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit.
    selection = weighted_vote(["a", "b"] * 3, [0.3, 0.1, 0.2, 0.2, 0.1, 0.3])
    assert selection.scores["a"] == selection.scores["b"]
    assert selection.answer == "a"


def test_missing_answers_neither_win_nor_count():
    selection = majority_vote([None, None, None, "7"])
    assert (selection.scores, selection.answer, selection.confidence) == ({"7": 1.0}, "7", 1.0)


@pytest.mark.parametrize("answers", [[], [None, None]])
def test_no_answer_at_all(answers):
    for selection in (majority_vote(answers), perplexity_consistency(answers, np.full(len(answers), -0.5))):
        assert (selection.scores, selection.answer) == ({}, None)
        assert math.isnan(selection.confidence)


def test_scores_that_sum_to_zero_give_no_confidence():
    selection = perplexity_consistency(["a", "b"], [-math.inf, -math.inf])
    assert selection.answer == "a"
    assert math.isnan(selection.confidence)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_vote(["a"], [-0.5]), "`weights` must be at least 0, got -0.5"),
        (lambda: weighted_vote(["a"], [1.0, 2.0]), r"`weights` must have shape \(1,\)"),
        (lambda: majority_vote(["a"], [[-1.0]]), r"`mean_logps` must have shape \(1,\)"),
        (lambda: perplexity_consistency(["a"], [-1.0], completions=[]), "`completions` must have one text per answer"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(50))
def test_best_of_n_takes_the_surest_that_has_an_answer(seed):
    answers, logps, _ = random_samples(seed)
    rows = [(logp, -i) for i, (answer, logp) in enumerate(zip(answers, logps, strict=True)) if answer and logp == logp]
    selection = best_of_n(answers, logps)
    assert selection.answer == (answers[-max(rows)[1]] if rows else None)
    assert selection.confidence == pytest.approx(max(rows)[0] if rows else math.nan, nan_ok=True)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("power", [0, 0.5, 2])
def test_borda_vote_counts_ranks(seed, power):
    answers, logps, _ = random_samples(seed)
    logps = logps.round(1)  # ties
    voters = [i for i in range(16) if answers[i] is not None and logps[i] == logps[i]]
    weights = np.full(16, np.nan)
    for i in voters:
        surer = sum(logps[j] > logps[i] for j in voters)
        tied = sum(logps[j] == logps[i] for j in voters)
        rank = surer + (1 + tied) / 2
        weights[i] = (len(voters) - rank + 1) ** power
    assert_follows(borda_vote(answers, logps, power=power), literal_vote(answers, weights))


def literal_pruning(p):
    """Which paths reasoning pruning drops, with the densities written out."""
    from scipy.optimize import minimize
    from scipy.special import gamma

    def density(x, k, scale):
        return float(np.exp(np.log(k / scale) + (k - 1) * np.log(x / scale) - np.exp(k * np.log(x / scale))))

    @np.errstate(over="ignore")  # the search tries scales at which a density is 0
    def loss(v):
        return -sum(math.log(v[0] * density(x, v[1], v[2]) + (1 - v[0]) * density(x, v[3], v[4]) + 1e-300) for x in p)

    bounds = [(0.2, 0.8)] + [(0.01, None)] * 4
    w, k1, l1, k2, l2 = minimize(loss, [0.5, 1, 1, 1.5, 2], bounds=bounds, method="L-BFGS-B").x
    first_is_good = l1 * gamma(1 + 1 / k1) >= l2 * gamma(1 + 1 / k2)
    dropped = []
    for x in p:
        first, second = w * density(x, k1, l1), (1 - w) * density(x, k2, l2)
        good, bad = (first, second) if first_is_good else (second, first)
        dropped.append(good < bad and x < sum(p) / len(p))
    return dropped


@pytest.mark.parametrize("seed", range(25))
def test_reasoning_pruning_follows_a_literal_one(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.beta(2, 12, 8), rng.beta(12, 3, 8)])
    answers = [str(a) for a in rng.integers(0, 3, 16)]
    dropped = literal_pruning(p.tolist())
    expected = literal_vote(answers, np.where(dropped, np.nan, p))
    assert_follows(reasoning_pruned_perplexity_consistency(answers, np.log(p)), expected)


def test_pruning_drops_something_and_never_all():
    p = np.array([0.1, 0.11, 0.12, 0.9, 0.92, 0.91])
    assert literal_pruning(p.tolist()) == [True] * 3 + [False] * 3
    for logps in ([-0.5] * 4, [math.nan, -0.5, math.nan, math.nan]):
        answers = list("abab")
        expected = perplexity_consistency(answers, logps)
        assert reasoning_pruned_perplexity_consistency(answers, logps) == expected
    assert reasoning_pruned_perplexity_consistency(["a"], [math.nan]).answer is None


def test_a_text_whose_first_sample_has_no_log_prob_keeps_its_vote():
    selection = perplexity_consistency(["a", "a", "b"], [math.nan, -0.1, -1.0], completions=["x", "x", "y"])
    assert selection.answer == "a" and selection.scores["a"] == pytest.approx(math.exp(-0.1))


def test_pruning_treats_all_samples_of_a_text_alike():
    logps = np.log([0.1, 0.9, 0.9, 0.92, 0.91, 0.11, 0.12])
    rounded = logps.copy()
    rounded[2] += 1e-12
    texts = ["u", "x", "x", "y", "z", "v", "w"]
    answers = ["8", "7", "7", "7", "7", "8", "8"]
    one, other = (
        reasoning_pruned_perplexity_consistency(answers, values, completions=texts) for values in (logps, rounded)
    )
    assert one.scores == other.scores
