import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from trl.rewards import accuracy_reward

from trl_capo.evaluation.grade import grade, grade_samples
from trl_capo.evaluation.sample import Samples


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
    answers, correct = grade(texts, solutions, progress=False)
    np.testing.assert_array_equal(correct, [math.nan if reward is None else reward for reward in expected])
    assert correct.dtype == np.float64
    assert {0.0, 1.0} < set(correct)
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_answers_are_canonical():
    answers, _ = grade(TEXTS, ["$902$"] * len(TEXTS), progress=False)
    answer_of = dict(zip(TEXTS, answers, strict=True))
    assert answer_of[r"63*15=945;945-43=902;\boxed{902}"] == answer_of[r"I think \boxed{0902}"] == "902"
    assert answer_of[r"\boxed{\frac{1}{2}}"] == "1/2"
    assert answer_of[r"\boxed{1,2}"] == answer_of[r"\boxed{\{2,1\}}"] == "{1, 2}"
    for nothing in (r"\boxed{}", r"\boxed{90", "no answer, 902 in passing", ""):
        assert answer_of[nothing] is None


def test_a_gold_answer_that_cannot_be_parsed_is_unscorable_not_wrong():
    answers, correct = grade([r"\boxed{3}"], [r"\text"], progress=False)
    assert answers == ["3"]
    assert np.isnan(correct[0])


def test_nothing_to_grade():
    answers, correct = grade([], [], progress=False)
    assert answers == []
    assert correct.shape == (0,)


def test_works_off_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        answers, correct = pool.submit(grade, [r"\boxed{3}"], ["$3$"], progress=False).result()
    assert answers == ["3"]
    assert correct.tolist() == [1.0]


def test_lengths_must_match():
    with pytest.raises(ValueError, match="`solutions` needs one entry per completion, got 1 for 2"):
        grade(["a", "b"], ["$1$"])


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'trl', 'sympy', 'math_verify'}"
    code = f"import sys, trl_capo.evaluation.grade, trl_capo.evaluation.sample; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_samples_are_graded_against_the_solution_of_their_prompt():
    texts = [[r"\boxed{1}", r"\boxed{2}", "none"], [r"\boxed{2}", r"\boxed{2}", r"\boxed{1}"]]
    shape = (2, 3)
    samples = Samples(texts, np.zeros(shape), np.ones(shape, dtype=int), np.zeros(shape, dtype=bool))
    answers, correct = grade_samples(samples, ["$1$", "$2$"], progress=False)
    assert answers == [["1", "2", None], ["2", "2", "1"]]
    np.testing.assert_array_equal(correct, [[1, 0, 0], [1, 1, 0]])
