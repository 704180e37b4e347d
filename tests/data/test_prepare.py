"""What is repeated, known or too long goes; training and validation prompts are the same everywhere."""

import pytest
from transformers import AutoTokenizer

from tests.helpers import conversations
from trl_capo.data.prepare import deduplicate, question_key, train_and_validation, within_budget, without_questions_of


def ask(*texts):
    return conversations(texts)


def texts(rows):
    return [prompt[-1]["content"] for prompt in rows["prompt"]]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$.", "find x", True),
        (r"Find $\left( 1,2 \right)$", "Find (1, 2)?", True),
        ("1.5 + 2?", "15 + 2?", False),
        ("2+2?", "2-2?", False),
        ("What is 1+1?\nBox it.", "What is $1 + 1$\nBox it", True),
        ("x=3. 5 apples", "x=35 apples", False),
        ("5! + 3?", "5 + 3?", False),
        ("2^{10}", "2^10", False),
        ("Что такое 2?", "Что такое 3?", False),
    ],
)
def test_which_questions_are_the_same(one, other, same):
    keys = [question_key([{"role": "user", "content": text}]) for text in (one, other)]
    assert (keys[0] == keys[1]) == same


def test_the_system_prompt_does_not_tell_questions_apart():
    assert question_key([{"role": "system", "content": "A"}, {"role": "user", "content": "2?"}]) == "2"


def test_first_copies_stay_in_order():
    assert texts(deduplicate(ask("b?", "a?", "B", "c?", "a"))) == ["b?", "a?", "c?"]


def test_questions_of_others_go():
    rows = without_questions_of(ask("a?", "b?", "c?"), [ask("C"), ask("a", "d")])
    assert texts(rows) == ["b?"]
    assert texts(without_questions_of(ask("a?"), [])) == ["a?"]


def test_long_prompts_go(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)  # one token a character
    assert texts(within_budget(ask("1+1=", "1+1+1=", "1="), tokenizer, 4)) == ["1+1=", "1="]


def test_the_split_is_fixed_disjoint_and_does_not_depend_on_the_training_size():
    rows = ask(*map(str, range(50)))
    train, validation = train_and_validation(rows, 30, 8)
    assert (len(train), len(validation)) == (30, 8) and not set(texts(train)) & set(texts(validation))
    everything, same = train_and_validation(rows, None, 8)
    assert texts(same) == texts(validation) and len(everything) == 42
    assert texts(validation) == ["18", "23", "36", "4", "2", "3", "34", "24"], "another machine would have others"
    _, other = train_and_validation(rows, 30, 8, seed=1)
    assert texts(other) != texts(validation)


def test_too_few_rows():
    with pytest.raises(ValueError, match=r"need 38 prompts, but only 20 are left"):
        train_and_validation(ask(*map(str, range(20))), 30, 8)
    with pytest.raises(ValueError, match="need 9 prompts"):
        train_and_validation(ask(*map(str, range(8))), None, 8)
