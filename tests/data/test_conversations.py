"""Questions and answers of one's own, in the shape that TRL and math-verify read."""

import pytest
from datasets import Dataset, DatasetDict

from tests.helpers import conversations
from trl_capo.data.conversations import drop_unparsable_gold, to_conversations, wrap_gold
from trl_capo.data.golds import unparsable_golds


@pytest.mark.parametrize(
    "bare",
    [
        r"\sqrt{3}+1",
        r"x \in [-2,7]",
        r"\text{east}",
        "p - q",
        r"2^{10}-1",
        r"\frac{1}{2}, 3",
        "27.0",
        r"\$18",
        12,
    ],
)
def test_wrapped_golds_grade_themselves(bare):
    from trl.rewards import accuracy_reward

    gold = wrap_gold(bare)
    assert unparsable_golds([gold]) == []
    assert accuracy_reward([[{"role": "assistant", "content": rf"so \boxed{{{bare}}}"}]], [gold]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("4.5e33", r"4.5\cdot 10^{33}"),
        ("1e-3", "0.001"),
        ("-2E+2", "-200"),
    ],
)
def test_scientific_notation_is_not_eulers_number(gold, answer):
    from trl.rewards import accuracy_reward

    graded = [rf"\boxed{{{answer}}}", r"\boxed{2.718}"]
    completions = [[{"role": "assistant", "content": text}] for text in graded]
    assert accuracy_reward(completions, [wrap_gold(gold)] * 2) == [1.0, 0.0]


def test_a_template_is_not_for_conversations():
    rows = conversations(["1+1?"], solution=["2"])
    for options in ({"prompt_template": "qwen-boxed"}, {"system_prompt": "Think."}):
        with pytest.raises(ValueError, match="these prompts are conversations. Leave both out"):
            to_conversations(rows, **options)


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_missing_golds_are_caught(missing):
    assert unparsable_golds([wrap_gold(missing)]) == [0]


def test_conversations():
    rows = Dataset.from_dict({"problem": ["1+1?"], "answer": [2], "solution": ["long"], "level": [3]})
    splits = to_conversations(DatasetDict(train=rows), "problem", "answer", "Think.")
    expected = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    assert splits["train"][0] == {"prompt": expected, "solution": "$2$", "level": 3}
    assert to_conversations(splits)["train"][0] == splits["train"][0], "what is ready already must stay as it is"


def test_streams():
    rows = Dataset.from_dict({"prompt": ["1+1?", "2+2?"], "solution": ["2", None]}).to_iterable_dataset()
    assert [row["solution"] for row in drop_unparsable_gold(to_conversations(rows))] == ["$2$"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("question", "solution"), "no column 'question'.*dataset_prompt_column in a recipe"),
        (("prompt", "answer"), "no column 'answer'.*dataset_solution_column in a recipe"),
    ],
)
def test_missing_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        to_conversations(Dataset.from_dict({"prompt": ["1+1?"], "solution": ["2"]}), *columns)


def test_dropping_says_what_it_drops():
    rows = Dataset.from_dict({"solution": ["$2$", "east", "True"]})
    with pytest.warns(UserWarning, match="Dropping 2 of 3 rows whose gold answer cannot be parsed: 'east', 'True'"):
        assert drop_unparsable_gold(rows)["solution"] == ["$2$"]
    with pytest.raises(ValueError, match="needs a column 'solution', but the dataset has only answer"):
        drop_unparsable_gold(Dataset.from_dict({"answer": ["$2$"]}))
