r"""Convert a dataset of questions and answers to the format that TRL's trainers and `accuracy_reward` read.

The column `prompt` has one conversation per row. The column `solution` has the gold answer in `$...$`, because
math-verify misreads bare LaTeX such as `3x+2` or `\text{east}`, or does not read it at all.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from trl_capo.data.golds import gold_problem, problems, wrap_gold
from trl_capo.errors import UserError


Rows: TypeAlias = Dataset | IterableDataset
Splits: TypeAlias = DatasetDict | IterableDatasetDict

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
# System message and user message by name. Qwen2.5-Math was trained with the first. A base model answers far better
# with a template that it knows.
PROMPT_TEMPLATES = {
    "qwen25-math-cot": (BOXED, "{question}"),
    "qwen-boxed": (None, "{question}\n" + BOXED),
    "step-by-step": (None, r"{question} Let's think step by step and output the final answer within \boxed{}."),
}


def without_template(text: str) -> str:
    """A question without the words that a template from `PROMPT_TEMPLATES` adds to it.

    Example:
        >>> without_template("1+1?\\n" + BOXED)
        '1+1?'
    """
    for _, user in PROMPT_TEMPLATES.values():
        before, after = user.split("{question}")
        if (before or after) and text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)].strip()
    return text


def drop_unparsable_gold(dataset: Rows | Splits) -> Rows | Splits:
    """Keep the rows whose gold answer in `solution` math-verify reads correctly, and report the dropped rows.

    Args:
        dataset: Dataset, or splits, with a column `solution`.

    Raises:
        UserError: There is no column `solution`.
    """
    if isinstance(dataset, Splits):
        return type(dataset)({split: drop_unparsable_gold(rows) for split, rows in dataset.items()})
    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda row: gold_problem(row["solution"]) is None)
    if "solution" not in dataset.column_names:
        raise UserError(
            "drop_unparsable_gold needs a column 'solution', but the dataset has only "
            f"{', '.join(dataset.column_names)}."
        )
    bad = problems(dataset["solution"])
    if not bad:
        return dataset
    examples, first = ", ".join(repr(dataset[row]["solution"]) for row in list(bad)[:3]), next(iter(bad))
    warnings.warn(
        f"Dropping {len(bad)} of {len(dataset)} rows whose gold answer cannot be parsed: {examples} ... "
        f"(row {first}: {bad[first]})",
        UserWarning,
        stacklevel=2,
    )
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def to_conversations(
    dataset: Rows | Splits,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
    system_prompt: str | None = None,
    prompt_template: str | None = None,
    gold: Callable | None = None,
) -> Rows | Splits:
    r"""Rename and rewrite two columns for TRL. Prompts that are already conversations stay unchanged.

    Args:
        dataset: Questions and gold answers.
        prompt_column: Column of the questions, text or conversations.
        solution_column: Column of the gold answers. Left alone if the dataset has none.
        system_prompt: System message put before a text question.
        prompt_template: Key of `PROMPT_TEMPLATES`, instead of a system prompt.
        gold: Function that extracts the answer from a raw value, before `wrap_gold`. None if the value is the answer.

    Returns:
        The dataset with `prompt` (conversations) and `solution` (wrapped by `wrap_gold`) beside its other columns.

    Raises:
        UserError: `prompt_column` is missing, or `solution_column` is missing and not the default; the template is
            unknown, or comes with a system prompt.

    Example:
        >>> rows = to_conversations(Dataset.from_dict({"question": ["1+1?"], "answer": [2]}), "question", "answer")
        >>> rows[0]
        {'prompt': [{'role': 'user', 'content': '1+1?'}], 'solution': '$2$'}
    """
    if isinstance(dataset, Splits):
        columns = (prompt_column, solution_column, system_prompt, prompt_template, gold)
        return type(dataset)({split: to_conversations(rows, *columns) for split, rows in dataset.items()})
    for option, column in (("prompt", prompt_column), ("solution", solution_column)):
        if column not in dataset.column_names and (option == "prompt" or column != "solution"):
            raise UserError(
                f"The dataset has no column {column!r}, only {', '.join(dataset.column_names)}. Name the column "
                f"with the {option}s: dataset_{option}_column in a recipe, --{option}_column of trl-capo evaluate."
            )
    if prompt_template is not None and (prompt_template not in PROMPT_TEMPLATES or system_prompt is not None):
        raise UserError(
            f"prompt_template must be one of {', '.join(PROMPT_TEMPLATES)}, without a system_prompt; got "
            f"{prompt_template!r} and {system_prompt!r}."
        )
    system_prompt, user_prompt = PROMPT_TEMPLATES.get(prompt_template or "", (system_prompt, "{question}"))
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    dataset = _rename(_rename(dataset, prompt_column, "prompt"), solution_column, "solution")

    def rewrite(row: dict) -> dict:
        new: dict[str, Any] = {}
        if isinstance(row["prompt"], list) and (system_prompt is not None or prompt_template is not None):
            raise UserError(
                "prompt_template and system_prompt need plain-text questions, but these prompts are conversations. "
                "Leave both out."
            )
        if isinstance(row["prompt"], str):
            new["prompt"] = [*system, {"role": "user", "content": user_prompt.replace("{question}", row["prompt"])}]
        if "solution" in row:
            new["solution"] = wrap_gold(gold(row["solution"]) if gold else row["solution"])
        return new

    return dataset.map(rewrite)


def _rename(dataset: Rows, old: str, new: str) -> Rows:
    if old == new or old not in dataset.column_names:
        return dataset
    if new in dataset.column_names:  # e.g. a worked solution beside the answer
        dataset = dataset.remove_columns(new)
    return dataset.rename_column(old, new)
