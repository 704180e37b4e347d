r"""Check whether a dataset is fit for training, for `trl-capo data check`.

Every gold answer is graded against itself, as the completion `\boxed{gold}`. If math-verify can read a gold answer but
does not recognise it, every right answer would count as wrong.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from trl_capo.data.golds import problems
from trl_capo.data.prepare import deduplicate, without_questions_of
from trl_capo.data.rows import check_columns, prompt_problems


EXAMPLES = 5


def health(
    rows: Dataset,
    *,
    against: dict[str, Dataset] | None = None,
    tokenizer=None,
    num_workers=None,
    normalize_operators: bool = False,
) -> dict:
    """Count problems in the questions and gold answers of a dataset.

    Args:
        rows: Conversations in `prompt`, gold answers in `solution`.
        against: Other datasets by name. They should share no question with `rows`.
        tokenizer: Counts tokens.
        num_workers: Number of grading processes. None means one per core.
        normalize_operators: Grade as with this option of `trl-capo train` and `evaluate`.

    Returns:
        Row counts: `rows`, `empty_questions` (which cannot be asked), `repeated_questions`, `missing_golds`,
        `unreadable_golds` (including missing and misread ones), `golds_that_fail_themselves`, and `shared_questions`
        by dataset. Also examples of bad rows and, with a tokenizer, `prompt_tokens`: the median, the 99% quantile and
        the maximum.
    """
    import numpy as np

    from trl_capo.evaluation.grade import grade
    from trl_capo.models.prompts import tokenize

    golds = list(rows["solution"])
    check_columns(rows.column_names, "the dataset")
    prompts = list(rows["prompt"])
    empty, bad = prompt_problems(prompts), problems(golds)
    asked = rows.select([row for row in range(len(rows)) if row not in empty])
    readable = [row for row in range(len(golds)) if row not in bad]
    answers = [as_answer(golds[row]) for row in readable]
    correct = grade(
        answers, [golds[row] for row in readable], num_workers=num_workers, normalize_operators=normalize_operators
    ).correct
    fails = [row for row, right in zip(readable, correct, strict=True) if right != 1]
    found = {
        "rows": len(rows),
        "empty_questions": len(empty),
        "repeated_questions": len(asked) - len(deduplicate(asked)),
        "missing_golds": sum(not gold for gold in golds),
        "unreadable_golds": len(bad),
        "golds_that_fail_themselves": len(fails),
        "shared_questions": {
            name: len(asked) - len(without_questions_of(asked, [other])) for name, other in (against or {}).items()
        },
        "examples": {
            "empty_questions": [f"row {row}: it {empty[row]}" for row in list(empty)[:EXAMPLES]],
            "unreadable_golds": [f"row {row}: {golds[row]} ({bad[row]})" for row in list(bad)[:EXAMPLES]],
            "golds_that_fail_themselves": [f"row {row}: {golds[row]}" for row in fails[:EXAMPLES]],
        },
    }
    if tokenizer is not None:
        lengths = [len(ids) for ids in tokenize(tokenizer, list(asked["prompt"]))]
        quantiles = np.quantile(lengths, [0.5, 0.99, 1.0], method="higher")
        found["prompt_tokens"] = dict(zip(("median", "99%", "longest"), map(int, quantiles), strict=True))
    return found


def print_health(found: dict[str, dict]) -> None:
    """Print a table with one column per dataset, then examples of bad rows."""
    from rich.console import Console
    from rich.table import Table

    lines: dict[str, Callable[[dict], Any]] = {
        "rows": _rows,
        "licence": lambda numbers: numbers.get("licence", "-"),
        "empty questions": lambda numbers: numbers["empty_questions"],
        "repeated questions": lambda numbers: numbers["repeated_questions"],
        "gold answers missing": lambda numbers: numbers["missing_golds"],
        "gold answers not readable": lambda numbers: numbers["unreadable_golds"],
        "gold answers that fail themselves": lambda numbers: numbers["golds_that_fail_themselves"],
    }
    first = next(iter(found.values()))
    nested = {f"questions shared with {name}": ("shared_questions", name) for name in first["shared_questions"]}
    nested |= {f"tokens of a prompt: {name}": ("prompt_tokens", name) for name in first.get("prompt_tokens", ())}
    lines |= {title: functools.partial(_within, *keys) for title, keys in nested.items()}
    table = Table(header_style="bold")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for line, value in lines.items():
        table.add_row(line, *(str(value(numbers)) for numbers in found.values()))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name, numbers in found.items():
        for kind, examples in numbers["examples"].items():
            for example in examples:
                console.print(f"{name}, {kind.replace('_', ' ')}: {example}", highlight=False, markup=False)


def as_answer(gold: str) -> str:
    r"""A completion that gives the gold answer.

    Example:
        >>> as_answer(r"$\frac{1}{2}$"), as_answer(r"so \boxed{4}")
        ('\\boxed{\\frac{1}{2}}', 'so \\boxed{4}')
    """
    return gold if r"\boxed" in gold else rf"\boxed{{{gold.strip('$')}}}"


def _rows(numbers: dict) -> str:
    expected = f" of {numbers['expected_rows']:,}" if "expected_rows" in numbers else ""
    return f"{numbers['rows']:,}{expected}"


def _within(part: str, name: str, numbers: dict) -> Any:
    return numbers[part][name]
