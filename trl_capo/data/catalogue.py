r"""Datasets of mathematics by name: a few declarative lines each, and a check that they are what they were.

Columns and numbers of rows are those of the datasets' cards in 2026; we could not load them ourselves (no network). So
a column that is gone is an error that says what to do, and another number of rows a warning.

Machines without a network read copies: with the environment variable `TRL_CAPO_DATA=/data`, the dataset
`HuggingFaceH4/MATH-500` is looked for in `/data/HuggingFaceH4/MATH-500` first.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset

from trl_capo.data.conversations import to_conversations
from trl_capo.data.files import read_dataset
from trl_capo.errors import UserError


@dataclass(frozen=True)
class MathDataset:
    """Where questions and gold answers are.

    Attributes:
        path: Dataset on the Hub.
        split: Its split.
        prompt_column: Column of the questions.
        solution_column: Column of the gold answers.
        num_rows: How many there were.
        config: Its configuration, if it has several.
        gold: What makes an answer of a value of `solution_column`; None: it is one.
        licence: As its card states it.
        held_out: For evaluation only.
    """

    path: str
    split: str
    prompt_column: str
    solution_column: str
    num_rows: int
    config: str | None = None
    gold: Callable | None = None
    licence: str = "see its card"
    held_out: bool = True


def after_hashes(worked: str) -> str:
    """The answer of GSM8K: what follows `####`, without the commas of thousands.

    Example:
        >>> after_hashes("He sold 2 * 600 = 1,200 eggs. #### 1,200")
        '1200'
    """
    return worked.rpartition("####")[2].strip().replace(",", "")


def all_of(answers: list[str] | str) -> str:
    r"""The answer of OlympiadBench: a list, mostly of one, each perhaps in dollars.

    Example:
        >>> all_of([r"$\frac{1}{2}$"]), all_of(["$1$, $3$", "2"]), all_of("7")
        ('\\frac{1}{2}', '1, 3, 2', '7')
    """
    answers = [answers] if isinstance(answers, str) else answers
    return ", ".join(re.sub(r"(?<!\\)\$", "", answer).strip() for answer in answers)


CATALOGUE = {
    "aime24": MathDataset("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": MathDataset("math-ai/aime25", "test", "problem", "answer", 30, licence="Apache-2.0"),
    "amc23": MathDataset("math-ai/amc23", "test", "question", "answer", 40),
    "math500": MathDataset("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "minerva": MathDataset("math-ai/minervamath", "test", "question", "answer", 272),
    "olympiadbench": MathDataset("math-ai/olympiadbench", "test", "question", "final_answer", 674, gold=all_of),
    "gsm8k": MathDataset("openai/gsm8k", "test", "question", "answer", 1319, "main", after_hashes),
    "deepscaler": MathDataset(
        "agentica-org/DeepScaleR-Preview-Dataset",
        "train",
        "problem",
        "answer",
        40315,
        licence="MIT",
        held_out=False,
    ),
    "dapo17k": MathDataset(
        "open-r1/DAPO-Math-17k-Processed", "train", "prompt", "solution", 17398, "all", held_out=False
    ),
    "gsm8k_train": MathDataset(
        "openai/gsm8k", "train", "question", "answer", 7473, "main", after_hashes, held_out=False
    ),
}


def load_raw(name: str) -> Dataset:
    """The rows of a dataset of the catalogue as they are.

    Raises:
        UserError: A column is gone. A changed number of rows is a warning.
    """
    of = CATALOGUE[name]
    rows = read_dataset(of.path, name, **location(of.path), name=of.config, split=of.split)
    if missing := [column for column in (of.prompt_column, of.solution_column) if column not in rows.column_names]:
        raise UserError(
            f"{name}: {of.path} has changed. It has no column {missing[0]!r} any more, only "
            f"{', '.join(rows.column_names)}. Correct trl_capo/data/catalogue.py, or name the dataset by its path and "
            "its columns by dataset_prompt_column and dataset_solution_column."
        )
    if len(rows) != of.num_rows:
        warnings.warn(
            f"{name}: {of.path} has {len(rows)} rows, {of.num_rows} were expected. It has changed, or this is a part "
            "of it: results cannot be compared with others' on the whole.",
            stacklevel=2,
        )
    return rows


def load_catalogued(
    name: str, *, system_prompt: str | None = None, prompt_template: str | None = None, num_rows: int | None = None
) -> Dataset:
    """Questions and gold answers of a dataset of the catalogue, in the shape that TRL and math-verify read.

    Args:
        name: Key of `CATALOGUE`.
        system_prompt: System message before each question.
        prompt_template: Key of `PROMPT_TEMPLATES`, instead.
        num_rows: Only the first so many.

    Returns:
        Columns `prompt` and `solution` beside its other ones.
    """
    of, rows = CATALOGUE[name], load_raw(name)
    if num_rows is not None:
        rows = rows.select(range(min(num_rows, len(rows))))
    return to_conversations(rows, of.prompt_column, of.solution_column, system_prompt, prompt_template, of.gold)


def location(path: str) -> dict:
    """Arguments of `load_dataset` for a dataset on the Hub, its copy in `TRL_CAPO_DATA`, or a folder.

    datasets keeps what it has read of a folder by the folder's name, not by what is in it: two folders of one name, or
    one that has changed, would be taken for each other. So each state of a folder gets a cache of its own.
    """
    copies = os.environ.get("TRL_CAPO_DATA")
    folder = Path(copies) / path if copies and (Path(copies) / path).is_dir() else Path(path)
    if not folder.is_dir():
        return {"path": path}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return {"path": str(folder), "cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{key}")}
