r"""What math-verify gave up on is no wrong answer, and malformed operators are mended on request."""

import numpy as np
import pytest

from trl_capo.evaluation.grade import canonical_answers, grade
from trl_capo.grading import equal, grade_pair, parse_answer
from trl_capo.rewards import get_accuracy_reward
from trl_capo.workers import Failure


@pytest.mark.parametrize(
    ("text", "gold"),
    [(r"\boxed{\frac13}", r"$\frac{1}{3}$"), (r"\boxed{2\sqrt3}", r"$2\sqrt{3}$"), (r"so \boxed 7", "$7$")],
)
def test_malformed_operators_count_on_request(text, gold):
    assert grade_pair(text, gold).reward == 0
    assert grade_pair(text, gold, normalize_operators=True).reward == 1
    assert grade_pair(text, "$12$", normalize_operators=True).reward == 0
    assert get_accuracy_reward(1, normalize_operators=True)([[{"content": text}]], [gold]) == [1.0]


def test_mended_answers_share_their_votes():
    texts = [r"\boxed{\frac13}", r"\boxed{1/3}", r"\boxed{\frac{1}{3}}"]
    for mended, classes in ((False, 2), (True, 1)):
        grades = grade(texts, [r"$\frac{1}{3}$"] * 3, progress=False, num_workers=1, normalize_operators=mended)
        assert len(set(canonical_answers(grades, [0] * 3))) == classes
        assert grades.correct.tolist() == [float(mended), 1, 1]


@pytest.mark.parametrize("where", ["gold", "answer", "comparison"])
def test_what_math_verify_gives_up_is_unscorable(monkeypatch, where):
    from math_verify.errors import TimeoutException

    def give_up(*args, **kwargs):
        raise TimeoutException

    target = {"gold": "parse_gold", "answer": "parse_answer", "comparison": "equal"}[where]
    monkeypatch.setattr(f"trl_capo.grading.{target}", give_up)
    found = grade_pair(r"\boxed{3}", "$3$")
    assert found.reward is None and found.failure is Failure.TIMEOUT
    monkeypatch.setattr("trl_capo.evaluation.grade.can_start_workers", lambda: False)
    monkeypatch.setattr("trl_capo.rewards.accuracy.can_start_workers", lambda: False)
    with pytest.warns(UserWarning, match="1 of 1 completions count as neither right nor wrong: math-verify timed out"):
        grades = grade([r"\boxed{3}"], ["$3$"], progress=False)
    assert np.isnan(grades.correct).all() and grades.failed.all()
    assert grades.answers == (["3"] if where == "comparison" else [None])
    with pytest.warns(UserWarning, match="1 of 1 completions count as neither right nor wrong"):
        assert get_accuracy_reward()([[{"content": r"\boxed{3}"}]], ["$3$"]) == [None]


def test_a_real_timeout_is_told_from_a_wrong_answer(monkeypatch):
    import time

    monkeypatch.setattr("trl_capo.grading.seconds", lambda limit: 1)
    monkeypatch.setattr("math_verify.grader.sympy_expr_eq", lambda *args: time.sleep(5))
    assert grade_pair(r"\boxed{3}", "$4$").failure is Failure.TIMEOUT


def test_a_pair_that_is_equal_outweighs_one_that_timed_out(monkeypatch):
    from math_verify.errors import TimeoutException

    def verify(gold, answer, **kwargs):
        if gold == answer == "3":
            return True
        raise TimeoutException

    monkeypatch.setattr("math_verify.verify", verify)
    assert equal(parse_answer(r"\boxed{3}"), parse_answer(r"\boxed{3}"))


def test_tools_are_graded_by_the_last_message():
    messages = [
        {"role": "assistant", "content": r"\boxed{3}"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": [{"type": "text", "text": r"\boxed{4}"}]},
    ]
    assert get_accuracy_reward(1)([messages, messages[:2], [{"role": "assistant", "content": None}]], ["$4$"] * 3) == [
        1.0,
        0.0,
        0.0,
    ]
