import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from trl.rewards import accuracy_reward

from trl_capo.evaluation import grade as grade_module
from trl_capo.evaluation.grade import Grades, canonical_answers, grade, grade_samples
from trl_capo.evaluation.sampling import Samples
from trl_capo.workers import Failure


TEXTS = [
    r"63*15=945;945-43=902;\boxed{902}",
    r"I think \boxed{0902}",
    r"\boxed{902.0}",
    r"\boxed{\frac{1}{2}}",
    r"\boxed{0.5}",
    r"\boxed{50\%}",
    r"\boxed{1,2}",
    r"\boxed{\{2,1\}}",
    r"\boxed{x=902}",
    r"\boxed{902;}",
    r"\boxed{}",
    r"\boxed{90",
    "no answer, 902 in passing",
    "inline, $902$",
    r"first \boxed{3} then \boxed{902}",
    "",
]
SOLUTIONS = ["$902$", r"\boxed{1/2}", r"$\{1,2\}$", ""]


def test_correctness_is_the_accuracy_reward_of_every_pair():
    pairs = [(text, solution) for text in TEXTS for solution in SOLUTIONS] * 2
    texts, solutions = map(list, zip(*pairs, strict=True))
    expected = accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], solutions)
    grades = grade(texts, solutions, progress=False)
    answers, correct = grades.answers, grades.correct
    assert not grades.failed.any()
    np.testing.assert_array_equal(correct, [math.nan if reward is None else reward for reward in expected])
    assert correct.dtype == np.float64
    assert {0.0, 1.0} < set(correct)
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_answers_are_canonical():
    answers = grade(TEXTS, ["$902$"] * len(TEXTS), progress=False).answers
    answer_of = dict(zip(TEXTS, answers, strict=True))
    assert answer_of[r"63*15=945;945-43=902;\boxed{902}"] == answer_of[r"I think \boxed{0902}"] == "902"
    assert answer_of[r"\boxed{\frac{1}{2}}"] == "1/2"
    assert answer_of[r"\boxed{1,2}"] == answer_of[r"\boxed{\{2,1\}}"] == "{1, 2}"
    for nothing in (r"\boxed{}", r"\boxed{90", "no answer, 902 in passing", ""):
        assert answer_of[nothing] is None


def test_a_gold_answer_that_cannot_be_parsed_is_unscorable_not_wrong():
    grades = grade([r"\boxed{3}"], [r"\text"], progress=False)
    assert grades.answers == ["3"]
    assert np.isnan(grades.correct[0]) and not grades.failed[0]


def test_nothing_to_grade():
    grades = grade([], [], progress=False)
    assert grades.answers == grades.sources == []
    assert grades.correct.shape == grades.failed.shape == (0,)


def test_works_off_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        grades = pool.submit(grade, [r"\boxed{3}"], ["$3$"], progress=False).result()
    assert grades.answers == ["3"]
    assert grades.correct.tolist() == [1.0]


def test_without_workers_the_caller_grades(monkeypatch):
    monkeypatch.setattr(grade_module, "can_start_workers", lambda: False)
    grades = grade([r"\boxed{3}", r"\boxed{4}"], ["$3$"] * 2, progress=False)
    assert grades.answers == ["3", "4"]
    assert grades.correct.tolist() == [1.0, 0.0]


def test_items_that_hang_cost_their_deadline_and_nothing_else():
    stuck = r"\boxed{\frac{3^{2500000}+1}{7^{1250000}+2}}"  # 11 seconds inside one call of C
    texts = [stuck if i % 50 == 7 else rf"\boxed{{{i}}}" for i in range(200)]
    started = time.time()
    with pytest.warns(UserWarning, match="4 of 200 completions count as neither right nor wrong.* within 1.5 s"):
        grades = grade([text + " " * i for i, text in enumerate(texts)], ["$3$"] * 200, deadline=1.5, progress=False)
    assert time.time() - started < 20  # 44 in a loop
    hung = np.arange(200) % 50 == 7
    np.testing.assert_array_equal(grades.failed, hung)
    assert [answer is None for answer in grades.answers] == hung.tolist()
    np.testing.assert_array_equal(grades.correct, np.where(hung, np.nan, np.arange(200) == 3))


def test_answers_that_mean_the_same_become_one():
    texts = [
        r"\boxed{0.5}",
        r"\boxed{\frac{1}{2}}",
        r"\boxed{2}",
        r"\boxed{\sqrt{4}}",
        "none",
        r"\boxed{x+1}",
        r"\boxed{1+x}",
    ]
    grades = grade(texts * 2, [r"$\frac{1}{2}$"] * 7 + ["$2$"] * 7, progress=False)
    assert grades.correct.tolist() == [1, 1, 0, 0, 0, 0, 0] + [0, 0, 1, 1, 0, 0, 0]
    names = canonical_answers(grades, [0] * 7 + [1] * 7)
    for first in (0, 7):
        half, also, two, root, nothing, x, y = names[first : first + 7]
        assert half == also == grades.answers[0] and two == root == "2" and nothing is None and x == y
        assert len({half, two, x}) == 3


@pytest.mark.parametrize("gold", ["$x=5$", "$y=5$", "$5$", "$7$"])
def test_the_gold_answer_plays_no_part_in_what_is_the_same(gold):
    """Else a confidence on graded questions would be another than where there is no gold."""
    texts = [r"\boxed{5}", r"\boxed{x=5}", r"\boxed{y=5}", r"\boxed{5.0}", r"\boxed{x>2}", r"\boxed{(2,\infty)}"]
    names = canonical_answers(grade(texts, [gold] * 6, progress=False), [0] * 6)
    assert names == canonical_answers(grade(texts, ["$0$"] * 6, progress=False), [0] * 6)
    assert names[0] == names[3] and names[0] != names[4]


def test_integers_are_not_compared_and_differ(monkeypatch):
    texts = [rf"\boxed{{{n}}}" for n in (12, -12, 7, "007", "12.0", 1000000, 1000001)]
    grades = grade(texts, ["$7$"] * 7, progress=False)
    assert not any(grade_module._same(a, b) for a, b in (("12", "-12"), ("1000000", "1000001"), ("7", "12")))
    compared = []
    monkeypatch.setattr(
        grade_module, "_work", lambda f, pairs, *rest: compared.extend(pairs) or [f(*p) for p in pairs]
    )
    names = canonical_answers(grades, [0] * 7)
    assert names[2] == names[3] and len(set(names)) == 5 and names[0] == names[4]
    assert compared and all("12.0" in pair for pair in compared)


def test_a_comparison_that_is_given_up_counts_as_different(monkeypatch):
    grades = Grades(["a", "b"], ["a", "b"], np.zeros(2), np.zeros(2, bool))
    monkeypatch.setattr(grade_module, "_work", lambda *args: [Failure.TIMEOUT])
    assert canonical_answers(grades, [0, 0]) == ["a", "b"]
    monkeypatch.setattr(grade_module, "_work", lambda *args: [True])
    assert canonical_answers(grades, [0, 0]) == ["a", "a"]


def test_lengths_must_match():
    with pytest.raises(ValueError, match="`solutions` needs one entry per completion, got 1 for 2"):
        grade(["a", "b"], ["$1$"])


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'trl', 'sympy', 'math_verify'}"
    code = f"import sys, trl_capo.evaluation.grade, trl_capo.evaluation.sampling; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_samples_are_graded_against_the_solution_of_their_prompt():
    texts = [[r"\boxed{1}", r"\boxed{2}", "none"], [r"\boxed{2}", r"\boxed{2}", r"\boxed{1}"]]
    shape = (2, 3)
    samples = Samples(texts, np.zeros(shape), np.ones(shape, dtype=int), np.zeros(shape, dtype=bool))
    answers, correct = grade_samples(samples, ["$1$", "$2$"], progress=False)
    assert answers == [["1", "2", None], ["2", "2", "1"]]
    np.testing.assert_array_equal(correct, [[1, 0, 0], [1, 1, 0]])
