"""The language tasks: splits, answers, and grades that agree with reasoning-gym's own."""

import importlib.util
import re
from itertools import combinations, islice

import numpy as np
import pytest

from trl_capo import extras
from trl_capo.data.benchmarks import load_benchmark
from trl_capo.data.language import (
    RELATIONS,
    SPLITS,
    TASKS,
    has_text_answers,
    language_dataset,
    questions,
    write_relation,
)
from trl_capo.data.splits import load_split
from trl_capo.data.training import DataArguments, load_splits
from trl_capo.errors import UserError
from trl_capo.evaluation.grade import grade_texts
from trl_capo.evaluation.run import graded_table
from trl_capo.evaluation.sampling import Samples
from trl_capo.grading import grade_pair, grade_text
from trl_capo.preflight.rewards import load_reward_function


needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra `language`"
)


@pytest.mark.parametrize(("task", "split"), [("chain", "train"), ("family", "dev")])
def test_unknown_names(task, split):
    with pytest.raises(UserError, match="must be one of"):
        language_dataset(task, split)


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(extras.MODULES, "language", ("no_such_library",))
    with pytest.raises(UserError, match=r"pip install 'trl-capo\[language\]'"):
        language_dataset("family", "train", 1)


@needs_extra
@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_and_distinct(task):
    texts = {split: [row["question"] for row in islice(questions(task, split), 200)] for split in SPLITS}
    assert all(len(set(rows)) == 200 for rows in texts.values())
    assert all(not set(texts[a]) & set(texts[b]) for a, b in combinations(texts, 2))
    assert texts["test"] == [row["question"] for row in islice(questions(task, "test"), 200)]


@needs_extra
@pytest.mark.parametrize("task", TASKS)
def test_every_name_loads(task):
    rows = load_benchmark(f"{task}_test", 5)
    assert list(rows["solution"]) == list(language_dataset(task, "test", 5)["solution"])
    assert set(load_splits(task, None, DataArguments())) == set(SPLITS)
    assert len(load_split(f"{task}_validation", DataArguments())) == SPLITS["validation"][1]


@needs_extra
@pytest.mark.parametrize("task", TASKS)
def test_written_answers_and_grades_agree_with_reasoning_gym(task):
    import reasoning_gym

    scorer = reasoning_gym.create_dataset(TASKS[task].source, seed=0, size=1, **TASKS[task].options)
    rows = list(islice(questions(task, "validation"), 12))
    answers = [row["answer"] for row in rows]
    for row in rows:
        gold = rf"\boxed{{{row['answer']}}}"
        assert TASKS[task].write(row).endswith(gold)
        for text in [TASKS[task].write(row), *(rf"It is \boxed{{{answer}}}." for answer in answers)]:
            [answer] = re.findall(r"\\boxed\{([^}]*)\}", text)
            reward = grade_pair(text, gold).reward if TASKS[task].answers is None else grade_text(text, gold)
            assert reward == float(scorer.score_answer(answer, row) == 1.0)


def test_words_are_graded_in_any_case_and_by_every_letter():
    for gold in RELATIONS:
        gold_box = rf"\boxed{{{gold}}}"
        for word in (*RELATIONS, gold[::-1], gold + "s"):
            assert grade_text(rf"\boxed{{{word}}}", gold_box) == float(word == gold)
        for same in (gold.capitalize(), gold.upper(), rf"\text{{{gold}}}", f" {gold} "):
            assert grade_text(rf"\boxed{{{same}}}", gold_box) == 1.0
        assert grade_text(gold, gold_box) == 0.0 and grade_text(gold_box, "") is None


def test_math_verify_is_no_grader_for_words():
    """The reason for `grade_text`. If this fails, math-verify has learned to read, and we may not need it."""
    assert grade_pair(r"\boxed{tuna}", r"\boxed{aunt}").reward == 1.0
    assert grade_pair(r"\boxed{Daughter}", r"\boxed{daughter}").reward == 0.0


def test_words_are_candidates_of_a_vote():
    words = [*RELATIONS, "Mother", r"\text{mother}"]
    grades = grade_texts([rf"\boxed{{{word}}}" for word in words], [r"\boxed{mother}"] * len(words))
    assert grades.answers == [*RELATIONS, "mother", "mother"]
    assert grades.correct.sum() == 3 and not grades.failed.any()


def test_reward_by_name_in_a_recipe():
    reward = load_reward_function("text_reward")
    completions = [[{"role": "assistant", "content": rf"\boxed{{{word}}}"}] for word in ("Son", "wife")]
    assert reward(completions, [r"\boxed{son}", r"\boxed{son}"]) == [1.0, 0.0]


def test_users_own_file_with_text_answers(tmp_path):
    (tmp_path / "quiz.jsonl").write_text('{"prompt": "Is it?", "solution": "Yes"}\n')
    rows = load_benchmark(str(tmp_path / "quiz.jsonl"), text_answers=True)
    assert grade_text(r"\boxed{yes}", rows[0]["solution"]) == 1.0


def test_a_relation_is_written_out():
    row = {"answer": "wife", "metadata": {"person1": "Mia", "person2": "Jack"}}
    assert write_relation(row) == r"Mia is the wife of Jack. \boxed{wife}"


@needs_extra
def test_evaluate_grades_words_by_itself():
    rows = load_benchmark("family_test", 2)
    shape = (2, 2)
    samples = Samples(
        completions=[[rf"\boxed{{{rows[row]['solution'][7:-1].upper()}}}", "no box"] for row in range(2)],
        mean_logps=np.zeros(shape),
        lengths=np.ones(shape, dtype=int),
        truncated=np.zeros(shape, dtype=bool),
    )
    table = graded_table("family_test", 0, rows, samples, text_answers=has_text_answers("family_test"))
    assert table["correct"].to_pylist() == [1.0, 0.0] * 2
    assert table["answer"].to_pylist()[1] is None and table["answer"].to_pylist()[0] in RELATIONS
