r"""Mathematics datasets by name: a few declarative lines each, and a check that they have not changed.

Columns and row counts come from the datasets' cards in 2026; we could not load the datasets ourselves (no network). So
a missing column is an error that says what to do, and a different row count is a warning.

Machines without a network read copies: with the environment variable `TRL_CAPO_DATA=/data`, the dataset
`HuggingFaceH4/MATH-500` is first searched in `/data/HuggingFaceH4/MATH-500`.
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
    """The location of a dataset's questions and gold answers.

    Attributes:
        path: Name of the dataset on the Hub.
        split: Its split.
        prompt_column: Column with the questions.
        solution_column: Column with the gold answers.
        num_rows: Expected number of rows.
        config: Its configuration, if it has several.
        gold: Function that extracts the answer from a value of `solution_column`. None if the value is the answer.
        licence: The licence stated on its card.
        held_out: Whether it is for evaluation only.
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
    """The answer in GSM8K: the text after `####`, without thousands separators.

    Example:
        >>> after_hashes("He sold 2 * 600 = 1,200 eggs. #### 1,200")
        '1200'
    """
    return worked.rpartition("####")[2].strip().replace(",", "")


def all_of(answers: list[str] | str) -> str:
    r"""The answer in OlympiadBench: a list, usually with one entry. Entries may be in dollars.

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
    """The unchanged rows of a catalogue dataset.

    Raises:
        UserError: A column is missing. A changed number of rows is only a warning.
    """
    dataset = CATALOGUE[name]
    rows = read_dataset(dataset.path, name, **location(dataset.path), name=dataset.config, split=dataset.split)
    if missing := [
        column for column in (dataset.prompt_column, dataset.solution_column) if column not in rows.column_names
    ]:
        raise UserError(
            f"{name}: {dataset.path} no longer has a column {missing[0]!r}, only {', '.join(rows.column_names)}. "
            "Correct trl_capo/data/catalogue.py, or set dataset_name to the path, and dataset_prompt_column and "
            "dataset_solution_column to its columns."
        )
    if len(rows) != dataset.num_rows:
        warnings.warn(
            f"{name}: {dataset.path} has {len(rows)} rows, but {dataset.num_rows} were expected. It has changed or is "
            "incomplete, so do not compare results with others' results on the whole set.",
            stacklevel=2,
        )
    return rows


def load_catalogued(
    name: str, *, system_prompt: str | None = None, prompt_template: str | None = None, num_rows: int | None = None
) -> Dataset:
    """Questions and gold answers of a catalogue dataset, in the format that TRL and math-verify read.

    Args:
        name: Key of `CATALOGUE`.
        system_prompt: System message before each question.
        prompt_template: Key of `PROMPT_TEMPLATES`, instead of a system prompt.
        num_rows: Use only this number of rows, from the start.

    Returns:
        Columns `prompt` and `solution`, and the dataset's other columns.
    """
    dataset, rows = CATALOGUE[name], load_raw(name)
    if num_rows is not None:
        rows = rows.select(range(min(num_rows, len(rows))))
    return to_conversations(
        rows, dataset.prompt_column, dataset.solution_column, system_prompt, prompt_template, dataset.gold
    )


def location(path: str) -> dict:
    """Arguments of `load_dataset` for a dataset on the Hub, its copy in `TRL_CAPO_DATA`, or a folder.

    `datasets` caches a folder by its name, not by its content. It would confuse two folders with the same name, or two
    states of one folder. So each state of a folder gets its own cache.
    """
    copies = os.environ.get("TRL_CAPO_DATA")
    folder = Path(copies) / path if copies and (Path(copies) / path).is_dir() else Path(path)
    if not folder.is_dir():
        return {"path": path}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return {"path": str(folder), "cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{key}")}
