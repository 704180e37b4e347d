"""Which answers are one, and whether the chosen one is right."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_capo.calibration import selection, votes
from trl_capo.calibration.selection import (
    accuracy_by_count,
    choose_all,
    class_grade,
    equivalence_classes,
    majority_vote,
)


def test_selectors_can_be_imported_from_here():
    """As the documentation does."""
    public = {name for name, value in vars(votes).items() if getattr(value, "__module__", "") == votes.__name__}
    public = {name for name in public if not name.startswith("_")} | {"SELECTORS"}
    assert public <= set(selection.__all__)
    assert all(getattr(selection, name) is getattr(votes, name) for name in public)


def test_equivalence_is_carried_over():
    asked = []

    def equal(a, b):
        asked.append((a, b))
        return {a, b} in ({"1/2", "0.5"}, {"0.5", ".50"})

    answers = ["1/2", ".50", None, "3", "0.5", "3"]
    assert equivalence_classes(answers, equal) == ["1/2", "1/2", None, "3", "1/2", "3"]
    assert len(asked) == len(set(asked)) <= 6
    assert equivalence_classes([None, None], equal) == [None, None]


def test_unknown_correctness_stays_unknown():
    answers, logps = [["7", None], [None, None], [None, None], ["7", "8"]], [[-0.1, -0.2]] * 4
    labels = [[1, 0], [np.nan, np.nan], [np.nan, 0], [np.nan, np.nan]]
    choices, right = choose_all(majority_vote, answers, logps, labels)
    assert [choice.answer for choice in choices] == ["7", None, None, "7"]
    np.testing.assert_array_equal(right, [1, np.nan, 0, np.nan])


def test_accuracy_by_count_is_the_mean_over_subsets():
    rng = np.random.default_rng(0)
    answers = [[str(a) for a in row] for row in rng.integers(0, 3, (4, 5))]
    logps = -rng.exponential(size=(4, 5))
    correct = np.array([[float(a == "0") for a in row] for row in answers])
    found = accuracy_by_count(majority_vote, answers, logps, correct, [1, 3, 5], num_draws=4000)
    for p in range(4):
        for k, count in enumerate((1, 3, 5)):
            chosen = [
                majority_vote([answers[p][i] for i in subset], logps[p, list(subset)]).answer == "0"
                for subset in itertools.permutations(range(5), count)
            ]
            assert found[p, k] == pytest.approx(np.mean(chosen), abs=0.03)
    with pytest.raises(ValueError, match="between 1 and the 5 samples"):
        accuracy_by_count(majority_vote, answers, logps, correct, [6])
    nothing = accuracy_by_count(majority_vote, [[None] * 5], logps[:1], correct[:1], [2])
    assert nothing.tolist() == [[0.0]]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 1.0, math.nan]), st.floats(-3, 0)), min_size=1),
    st.randoms(use_true_random=False),
)
def test_the_grade_of_a_class_does_not_depend_on_the_order(samples, random):
    """Equality is not transitive: a class may hold right and wrong answers."""
    shuffled = random.sample(samples, len(samples))
    found = []
    for rows in (samples, shuffled):
        answers, correct, logps = zip(*rows, strict=True)
        (choice,), right = choose_all(majority_vote, [answers], [logps], [correct])
        found.append((sorted(choice.scores.items()), choice.answer, right[0]))
    scores, logps = [score for _, score in found[0][0]], [logp for *_, logp in samples]
    tied = len(set(scores)) < len(scores) and len(set(logps)) < len(logps)
    assert tied or found[0][:2] == found[1][:2]
    assert tied or found[0][2] == found[1][2] or (math.isnan(found[0][2]) and math.isnan(found[1][2]))


def test_mixed_classes_get_the_grade_of_most():
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        correct = np.array([0.0, 1.0, 1.0])[order]
        assert choose_all(lambda a, s: majority_vote(a), [["5"] * 3], [np.zeros(3)], [correct])[1].item() == 1
    assert class_grade(np.array([1.0, 0.0]), np.array([-0.1, -0.2])) == 1
    assert class_grade(np.array([1.0, 0.0]), np.array([-0.2, -0.1])) == 0
    assert class_grade(np.array([1.0, 0.0]), np.zeros(2)) == 0
    assert math.isnan(class_grade(np.full(2, math.nan), np.zeros(2)))
