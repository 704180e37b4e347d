"""Rows and files are checked before they are used."""

import pytest
from datasets import Dataset

from tests.helpers import conversations
from trl_capo.data.files import is_local, read_dataset
from trl_capo.data.prepare import deduplicate, without_questions_of
from trl_capo.data.rows import check_data, check_prompts, prompt_problems, with_checked_streams
from trl_capo.evaluation.health import health
from trl_capo.models.messages import answer_of, question_of


def user(text):
    return {"role": "user", "content": text}


PART = [{"type": "text", "text": "1+1?"}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "is null"),
        ("", "has no text"),
        ([], "has no messages"),
        ([user(None)], r"without content \(null\)"),
        ([user(" ")], "has no text in its user messages"),
        ([{"role": "system", "content": "Think."}, user("")], "has no text in its user messages"),
        ([{"role": " ", "content": "1+1?"}], "the invalid role ' '"),
        ([{"role": None, "content": "1+1?"}], "the invalid role None"),
        ([{"role": "user"}], "without role and content"),
        ([user([{"type": "text", "text": None}])], "neither text nor parts"),
        ([user([])], "has no text"),
        (7, "neither text nor a list of messages"),
    ],
)
def test_prompts_that_cannot_be_asked(prompt, message):
    import re

    ((row, found),) = prompt_problems([[user("1+1?")], prompt]).items()
    assert row == 1 and re.search(message, found)


@pytest.mark.parametrize(
    "prompt",
    [
        "1+1?",
        [user("1+1?")],
        [user(PART)],
        [user([{"type": "image"}])],
        *([user("1+1?"), {"role": role, "content": "2"}] for role in ("ipython", "observation", "function", "model")),
        [user("1+1?"), {"role": "assistant", "content": "<think>"}],
        [user("1+1?"), {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "2"}],
    ],
)
def test_prompts_that_can_be_asked(prompt):
    assert prompt_problems([prompt]) == {}


def test_plain_and_conversational_prompts_do_not_mix():
    assert prompt_problems([[user("1?")], "2?"]) == {1: "is plain text, but others are conversations"}


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_columns_that_trl_needs_are_refused(column):
    with pytest.raises(ValueError, match=f"train_dataset has a column '{column}'.*remove_columns"):
        check_prompts(Dataset.from_dict({"prompt": ["1?"], column: [1]}), "train_dataset")


def test_a_null_prompt_is_refused_with_its_row():
    rows = Dataset.from_dict({"prompt": [[user("1?")], None], "solution": ["$1$"] * 2})
    with pytest.raises(ValueError, match="train_dataset: the prompt in row 1 is null"):
        check_data([len], train_dataset=rows)
    assert health(rows, num_workers=1)["empty_questions"] == 1


def test_streams_are_checked_as_they_flow():
    from trl_capo.rewards import accuracy_reward

    def stream(prompts, golds):
        rows = Dataset.from_dict({"prompt": prompts, "solution": golds}).to_iterable_dataset()
        (checked,) = with_checked_streams(accuracy_reward, train_dataset=rows)
        return iter(checked)

    rows = stream([[user("1?")], [user(None)]], ["$1$"] * 2)
    assert next(rows)["solution"] == "$1$"
    with pytest.raises(
        ValueError,
        match="the prompt in row 1 has a message",
    ):
        next(rows)
    with pytest.raises(ValueError, match="row 0, gold answer '3 1/2': math-verify reads"):
        next(stream([[user("1?")]], ["3 1/2"]))


def test_conversations_are_the_same_as_a_whole_and_questions_by_what_the_user_asks():
    assistant = {"role": "assistant", "content": "<think>"}
    system = [{"role": "system", "content": f"Work modulo {n}."} for n in (7, 8)]
    rows = Dataset.from_dict(
        {
            "prompt": [
                [user("1+1?"), assistant],
                [user("2+1?"), assistant],
                [system[0], user("3?")],
                [system[1], user("3?")],
            ]
        }
    )
    assert len(deduplicate(rows)) == 4
    benchmark = conversations(["1 + 1?", "3?"])
    assert [question_of(prompt) for prompt in without_questions_of(rows, [benchmark])["prompt"]] == ["2+1?"]
    turns = Dataset.from_dict({"prompt": [[user(f"a={n}"), assistant, user("What is a+1?")] for n in range(3)]})
    assert len(deduplicate(turns)) == 3
    parts = conversations([PART, PART])
    assert len(deduplicate(parts)) == 1 and len(without_questions_of(parts, [benchmark])) == 0


def test_a_template_hides_no_question_of_a_benchmark():
    from trl_capo.data.conversations import BOXED

    rows, plain = conversations(["1+1?\n" + BOXED, "2+1?\n" + BOXED]), conversations(["1+1?"])
    assert len(without_questions_of(rows, [plain])) == 1 and len(without_questions_of(plain, [rows])) == 0


def test_the_last_message_of_the_assistant_is_the_answer():
    tool = {"role": "tool", "content": r"\boxed{9}"}
    first, last = ({"role": "assistant", "content": rf"\boxed{{{n}}}"} for n in (3, 4))
    assert answer_of([first, tool, last]) == answer_of([first, tool, last, tool]) == r"\boxed{4}"
    assert answer_of([{"role": "assistant", "content": None}]) == answer_of([tool]) == ""
    assert answer_of([{"role": "assistant", "content": PART}]) == "1+1?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zero.jsonl", b"", "is an empty file"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("header.csv", b"prompt,solution\n", "has no rows"),
        ("none.json", b"[]", "has no rows"),
        ("half.jsonl", b'{"prompt": "1?", "solution": "1"}\n{"prompt": "1?", "sol', "cannot be read as questions"),
        ("broken.parquet", b"PAR1abc", "cannot be read as questions"),
        ("latin.jsonl", '{"prompt": "café"}'.encode("latin-1"), "is not in UTF-8"),
        ("latin.csv", "prompt\ncafé\n".encode("latin-1"), "is not in UTF-8"),
        ("notes.txt", b"hello", "must end in one of .parquet"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_dataset(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_capo.data.files.load_dataset", lambda **kwargs: pytest.fail("the Hub was asked"))
    for name in ("mine.jsonl", "./mine", str(tmp_path / "mine"), "a/b/c"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            read_dataset(name)
    assert not is_local("openai/gsm8k") and not is_local("imdb")
