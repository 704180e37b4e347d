"""From a name to the prompts of a run."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.data.standins import question
from tests.helpers import conversations
from trl_capo.data.conversations import BOXED
from trl_capo.data.training import DataArguments, load_splits, prepare


pytestmark = pytest.mark.filterwarnings("ignore:.*rows, .* were expected", "ignore:Dropping")


RECIPE = dict(
    prompt_template="qwen-boxed",  # the benchmarks must be asked in it too, or no question is recognised
    drop_unparsable_gold=True,
    deduplicate=True,
    exclude_benchmarks=["aime24", "aime25"],
    num_train_prompts=40,
    num_validation_prompts=8,
)


def test_deepscaler_as_in_the_recipe(repositories):
    said = []
    args = DataArguments(**RECIPE)
    rows = load_splits("deepscaler", None, args)["train"]
    kept = prepare(rows, args, say=said.append)
    splits = {split: rows.select(indices) for split, indices in kept.items()}
    assert said == [
        "Data: 65 prompts, less 2 without a readable gold answer, 2 repeated, 1 in a benchmark; 40 to train on and 8 "
        "to validate on."
    ]
    questions = [prompt[0]["content"] for part in splits.values() for prompt in part["prompt"]]
    assert len(set(questions)) == 48 and set(questions) <= {f"{question(i)}\n{BOXED}" for i in range(60)}


def test_a_repository_by_its_path_with_its_columns(repositories, tmp_path):
    args = DataArguments(dataset_prompt_column="problem", dataset_solution_column="answer")
    for name in ("agentica-org/DeepScaleR-Preview-Dataset", str(repositories / "HuggingFaceH4" / "aime_2024")):
        rows = load_splits(name, None, args)["train"]
        assert rows[0]["prompt"][0]["role"] == "user" and rows[0]["solution"].startswith("$")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files(tmp_path, suffix):
    path = str(tmp_path / f"mine.{suffix}")
    rows = Dataset.from_dict({"question": ["1+1?", "2+2?"], "gold": ["2", "4"]})
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "jsonl": rows.to_json}[suffix](path)
    args = DataArguments(dataset_prompt_column="question", dataset_solution_column="gold", system_prompt="Think.")
    assert load_splits(path, None, args)["train"][1] == {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}],
        "solution": "$4$",
    }


def test_long_prompts_are_counted(tmp_path, tiny_model):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "solution": "1"}) for text in ("1=", "1+1+1+1=")))
    args, said = DataArguments(max_prompt_tokens=4), []
    rows = load_splits(str(path), None, args)["train"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert prepare(rows, args, tokenizer, say=said.append) == {"train": [0]}
    assert prepare(rows, args, tokenizer, "eval", say=said.append) == {"train": [0]}
    assert said == [f"Data: 2 prompts, less 1 over 4 tokens; 1 to {use} on." for use in ("train", "evaluate")]


def test_rows_to_evaluate_on_are_not_sampled():
    rows = conversations(["1"] * 2, solution=["$1$", "east"])
    args = DataArguments(deduplicate=True, num_train_prompts=1, drop_unparsable_gold=True)
    assert prepare(rows, args, part="eval") == {"train": [0]}
    rows = conversations(["1"] * 3, solution=["$1$"] * 3)
    assert prepare(rows, args, part="eval") == {"train": [0, 1, 2]} and prepare(rows, args) == {"train": [0]}


def test_nothing_is_said_or_done_unless_asked():
    rows = conversations(["1"] * 2, solution=["$1$"] * 2)
    said = []
    assert prepare(rows, DataArguments(), say=said.append) == {"train": [0, 1]} and said == []


def test_streams_cannot_be_split(tmp_path):
    stream = Dataset.from_dict({"prompt": ["1"], "solution": ["1"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="deduplicate needs all rows of the dataset, not a stream"):
        prepare(stream, DataArguments(deduplicate=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_template="qwen"), "prompt_template must be one of qwen25-math-cot, qwen-boxed, step-by-step"),
        (dict(prompt_template="qwen-boxed", system_prompt="Think."), "without a system_prompt; got"),
    ],
)
def test_bad_templates(repositories, options, message):
    with pytest.raises(ValueError, match=message):
        load_splits("aime24", None, DataArguments(**options))


@pytest.mark.parametrize(
    ("options", "config"), [(dict(dataset_prompt_column="question"), None), ({}, "main")], ids=["column", "config"]
)
def test_the_catalogue_knows_its_columns(repositories, options, config):
    with pytest.raises(ValueError, match="has no effect on 'aime24', whose columns the catalogue knows"):
        load_splits("aime24", config, DataArguments(**options))


def test_bad_numbers():
    with pytest.raises(ValueError, match="num_train_prompts must be at least 1"):
        DataArguments(num_train_prompts=0)
    with pytest.raises(ValueError, match="dataset_name is missing: .*deepscaler"):
        load_splits(None, None, DataArguments())
