"""The numbers of an evaluation, and what is said about them."""

from trl_capo.evaluation.summary import problems


def test_numbers_without_a_meaning_are_named():
    good = dict(num_prompts=2, num_samples=2, grading_failed=0, ungraded=0, truncated=3)
    assert problems(good) == [] == problems({**good, "grading_failed": 3})
    for name, message in (
        ("grading_failed", "grading failed for every completion"),
        ("ungraded", "nothing is graded"),
        ("truncated", "every completion ran into --max_new_tokens"),
    ):
        [problem] = problems({**good, name: 4})
        assert message in problem
    assert "needs several samples" in problems({**good, "num_samples": 1, "truncated": 0})[0]
