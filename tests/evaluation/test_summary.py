"""The numbers of an evaluation, and what is said about them."""

import json

import pytest

from trl_capo.errors import UserError
from trl_capo.evaluation.summary import COLUMNS, problems, read_summary


def test_numbers_without_a_meaning_are_named():
    good = dict(num_prompts=2, num_samples=2, grading_failed=0, ungraded=0, truncated=3)
    assert problems(good) == [] == problems({**good, "grading_failed": 3})
    for name, message in (
        ("grading_failed", "grading failed for every completion"),
        ("ungraded", "nothing is graded"),
        ("truncated", "every completion reached --max_new_tokens"),
    ):
        [problem] = problems({**good, name: 4})
        assert message in problem
    assert "needs several samples" in problems({**good, "num_samples": 1, "truncated": 0})[0]


def test_a_summary_of_another_tool_is_refused_by_file_and_key(tmp_path):
    good = {**dict.fromkeys(COLUMNS, 0.5), "auc_within": None, "num_prompts": 2, "num_samples": 2, "grading_failed": 0}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"benchmarks": {"maths": good}}))
    assert read_summary(tmp_path) == {"maths": good}
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "`benchmarks` must contain the numbers of each benchmark, got None"),
        ('{"benchmarks": {"maths": 1}}', "`benchmarks.maths` must contain numbers by name, got 1"),
        ({"accuracy": "0.5"}, "`benchmarks.maths.accuracy` must be a number or null, got '0.5'"),
        ({"num_prompts": None}, "`benchmarks.maths.num_prompts` must be a whole number, got None"),
    ):
        path.write_text(content if isinstance(content, str) else json.dumps({"benchmarks": {"maths": good | content}}))
        with pytest.raises(UserError) as error:
            read_summary(tmp_path)
        assert str(error.value).startswith(str(path)) and message in str(error.value)
    del good["majority"]
    path.write_text(json.dumps({"benchmarks": {"maths": good}}))
    with pytest.raises(UserError, match="`benchmarks.maths.majority` must be a number or null, got nothing"):
        read_summary(tmp_path)
