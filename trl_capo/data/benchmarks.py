"""Held-out questions to evaluate on, by name.

Every benchmark becomes a dataset with `prompt` (a conversation) and `solution` (a gold answer that math-verify reads).
Any other file with these columns, or with columns that you name, also works as a benchmark. Gold answers that cannot
be read, or would be misread, become empty text: answers to these questions count as neither right nor wrong, and a
warning names the questions before sampling starts.
"""

import warnings
from pathlib import Path

from datasets import Dataset

from trl_capo.data import language
from trl_capo.data.arithmetic import SPLITS, arithmetic_dataset
from trl_capo.data.catalogue import CATALOGUE, load_catalogued
from trl_capo.data.conversations import to_conversations
from trl_capo.data.files import FORMATS, read_dataset
from trl_capo.data.golds import problems
from trl_capo.data.rows import check_prompts
from trl_capo.errors import UserError


DEFAULT_TEMPLATE = "qwen25-math-cot"
BENCHMARKS = [name for name, dataset in CATALOGUE.items() if dataset.held_out]
LANGUAGE = language.BENCHMARKS
ARITHMETIC = {f"arithmetic_{split}": split for split in SPLITS if split not in ("base", "train")}


def load_benchmark(
    name: str,
    num_prompts: int | None = None,
    *,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
    system_prompt: str | None = None,
    prompt_template: str | None = None,
    text_answers: bool = False,
) -> Dataset:
    """The questions of a benchmark.

    Args:
        name: A key of `BENCHMARKS`, `ARITHMETIC` or `LANGUAGE`, or a file (.parquet, .jsonl, .json, .csv).
        num_prompts: Use only this number of prompts, from the start.
        prompt_column: For a file: the column with the questions, text or conversations.
        solution_column: For a file: the column with the gold answers.
        system_prompt: System message before questions that are plain text.
        prompt_template: A key of `PROMPT_TEMPLATES`, instead of a system prompt. If both are None, mathematics
            benchmarks use `DEFAULT_TEMPLATE` and files use no template.
        text_answers: Gold answers are words, which math-verify need not read.

    Returns:
        Columns `prompt` and `solution`.

    Raises:
        UserError: Unknown name, missing column, or no rows.
    """
    if name in ARITHMETIC:
        data = arithmetic_dataset(ARITHMETIC[name], *([] if num_prompts is None else [num_prompts]))
    elif name in LANGUAGE:
        data = language.language_dataset(*LANGUAGE[name], num_prompts)
    elif name in BENCHMARKS:
        if system_prompt is None and prompt_template is None:
            prompt_template = DEFAULT_TEMPLATE
        data = load_catalogued(
            name, system_prompt=system_prompt, prompt_template=prompt_template, num_rows=num_prompts
        )
    else:
        kind = FORMATS.get(Path(name).suffix)
        if kind is None or not Path(name).is_file():
            raise UserError(
                f"unknown benchmark {name!r}. Use one of {', '.join([*ARITHMETIC, *LANGUAGE, *BENCHMARKS])}, or a "
                f"file ({', '.join(FORMATS)}) with the columns {prompt_column!r} and {solution_column!r}."
            )
        rows = read_dataset(name, "--benchmark", split="train")
        if solution_column not in rows.column_names:
            raise UserError(
                f"{name} has no column {solution_column!r}, only {', '.join(rows.column_names)}. Set "
                "--solution_column to the column with the gold answers."
            )
        data = to_conversations(
            _first(rows, num_prompts), prompt_column, solution_column, system_prompt, prompt_template
        )
    data = data.select_columns(["prompt", "solution"])
    if len(data) == 0:
        raise UserError(f"{name} has no questions.")
    check_prompts(data, name)
    if text_answers or language.has_text_answers(name):
        return data
    if bad := problems(data["solution"]):
        examples = "; ".join(f"{data[row]['solution']!r} (row {row}: {bad[row]})" for row in list(bad)[:5])
        warnings.warn(
            f"{name}: math-verify cannot read the gold answer of {len(bad)} of {len(data)} questions, or reads it as "
            f"something else. Their answers will count as neither right nor wrong: {examples}",
            stacklevel=2,
        )
        golds = ["" if row in bad else gold for row, gold in enumerate(data["solution"])]
        data = Dataset.from_dict({"prompt": list(data["prompt"]), "solution": golds})
    return data


def _first(rows: Dataset, num_prompts: int | None) -> Dataset:
    return rows if num_prompts is None else rows.select(range(min(num_prompts, len(rows))))
