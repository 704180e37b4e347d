"""The datasets of the catalogue, from local repositories with their columns and oddities."""

import json

import pytest

from tests.data.standins import ROWS
from trl_capo.data.benchmarks import BENCHMARKS, load_benchmark
from trl_capo.data.catalogue import CATALOGUE, load_catalogued
from trl_capo.data.conversations import BOXED
from trl_capo.data.golds import unparsable_golds
from trl_capo.evaluation.health import health


pytestmark = [
    pytest.mark.usefixtures("repositories"),
    pytest.mark.filterwarnings("ignore:.*rows, .* were expected"),
]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_dataset_loads_and_its_golds_grade_themselves(name):
    rows = load_catalogued(name)
    assert len(rows) == len(ROWS[CATALOGUE[name].path]), "the other configuration has one row"
    assert rows[0]["prompt"][-1]["role"] == "user"
    found = health(rows, num_workers=1)
    bad = 2 if name == "deepscaler" else 0
    assert (found["unreadable_golds"], found["golds_that_fail_themselves"]) == (bad, 0)


@pytest.mark.parametrize(
    ("name", "golds"),
    [
        ("aime24", ["$003$", "$013$"]),
        ("amc23", ["$27.0$", "$28.0$"]),
        ("math500", [r"$\frac{1}{2}$", r"$\sqrt{3}+1$"]),
        ("olympiadbench", ["$2$", r"$\frac{1}{2}, 3$"]),
        ("gsm8k", ["$1000$", "$1001$"]),
        ("minerva", [r"$4.5 \times 10^{33}$", "$2$"]),
    ],
)
def test_golds_become_answers(name, golds):
    assert load_catalogued(name, num_rows=2)["solution"] == golds


def test_benchmarks_are_the_held_out_ones_in_qwens_template():
    assert set(BENCHMARKS) == {"aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gsm8k"}
    for name in BENCHMARKS:
        data = load_benchmark(name, 2)
        assert data.column_names == ["prompt", "solution"] and len(data) == 2
        assert data[0]["prompt"][0] == {"role": "system", "content": BOXED}
    assert load_benchmark("aime24", prompt_template="qwen-boxed")[0]["prompt"] == [
        {"role": "user", "content": f"What is $100+100$?\n{BOXED}"}
    ]
    assert load_benchmark("aime24", system_prompt="Think.")[0]["prompt"][0]["content"] == "Think."


def test_a_column_that_is_gone_is_explained(repositories):
    path = repositories / "math-ai" / "aime25" / "default-test.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "answer": "2"}))
    with pytest.raises(ValueError, match="aime25: math-ai/aime25 no longer has a column 'problem', only"):
        load_catalogued("aime25")


def test_another_number_of_rows_is_a_warning():
    with pytest.warns(UserWarning, match="math500: HuggingFaceH4/MATH-500 has 6 rows, but 500 were expected"):
        load_catalogued("math500")


def test_without_a_copy_the_hub_is_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("trl_capo.data.files.load_dataset", lambda **kwargs: asked.append(kwargs))
    monkeypatch.setenv("TRL_CAPO_DATA", str(tmp_path / "elsewhere"))
    for name in ("gsm8k", "aime24"):
        with pytest.raises(AttributeError):
            load_catalogued(name)
    assert asked == [
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
        {"path": "HuggingFaceH4/aime_2024", "name": None, "split": "train"},
    ]


def test_a_changed_folder_is_read_anew(repositories):
    assert len(load_catalogued("math500")) == 6
    path = repositories / "HuggingFaceH4" / "MATH-500" / "default-test.jsonl"
    path.write_text(json.dumps({"problem": "1+1?", "answer": "2"}))
    assert load_catalogued("math500")["solution"] == ["$2$"]


def test_health_finds_what_is_wrong():
    against = {"aime24": load_catalogued("aime24"), "aime25": load_catalogued("aime25")}
    found = health(load_catalogued("deepscaler"), against=against, num_workers=1)
    assert found == {
        "rows": 65,
        "empty_questions": 0,
        "repeated_questions": 2,
        "missing_golds": 1,
        "unreadable_golds": 2,
        "golds_that_fail_themselves": 0,
        "shared_questions": {"aime24": 1, "aime25": 0},
        "examples": {
            "empty_questions": [],
            "unreadable_golds": [
                "row 63:  (it is missing)",
                "row 64: $ east (math-verify would read the word 'east' as a product of letters)",
            ],
            "golds_that_fail_themselves": [],
        },
    }
    assert unparsable_golds(["$ east"]) == [0]


def test_health_sees_a_gold_that_fails_itself():
    rows = load_catalogued("aime24").map(lambda row: {"solution": r"$\frac13$"})
    found = health(rows, num_workers=1)
    assert found["golds_that_fail_themselves"] == 4 and found["unreadable_golds"] == 0
