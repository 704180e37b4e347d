r"""Is a dataset fit to train on: what `trl-capo data check` finds out.

Every gold answer is graded against itself, as `\boxed{gold}` would be: one that math-verify reads but does not
recognise would make every right answer wrong.
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
    """Numbers about questions and gold answers.

    Args:
        rows: Conversations in `prompt`, gold answers in `solution`.
        against: Other datasets by name, which should share no question with it.
        tokenizer: Counts tokens.
        num_workers: Processes that grade. None: one a core.
        normalize_operators: Grade as with this option of `trl-capo train` and `evaluate`.

    Returns:
        Numbers of rows: `rows`, `empty_questions` (which cannot be asked), `repeated_questions`, `missing_golds`,
        `unreadable_golds` (those that are missing or misread included), `golds_that_fail_themselves`,
        `shared_questions` by name; examples of the bad rows; and, with a tokenizer, `prompt_tokens` at the median,
        at 99% and at most.
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
    """A table, one column a dataset, then examples of what is wrong."""
    from rich.console import Console
    from rich.table import Table

    lines: dict[str, Callable[[dict], Any]] = {
        "rows": lambda of: f"{of['rows']:,}" + (f" of {of['expected_rows']:,}" if "expected_rows" in of else ""),
        "licence": lambda of: of.get("licence", "-"),
        "empty questions": lambda of: of["empty_questions"],
        "repeated questions": lambda of: of["repeated_questions"],
        "gold answers missing": lambda of: of["missing_golds"],
        "gold answers not readable": lambda of: of["unreadable_golds"],
        "gold answers that fail themselves": lambda of: of["golds_that_fail_themselves"],
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
        table.add_row(line, *(str(value(of)) for of in found.values()))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name, of in found.items():
        for kind, examples in of["examples"].items():
            for example in examples:
                console.print(f"{name}, {kind.replace('_', ' ')}: {example}", highlight=False, markup=False)


def as_answer(gold: str) -> str:
    r"""A completion that gives the gold answer.

    Example:
        >>> as_answer(r"$\frac{1}{2}$"), as_answer(r"so \boxed{4}")
        ('\\boxed{\\frac{1}{2}}', 'so \\boxed{4}')
    """
    return gold if r"\boxed" in gold else rf"\boxed{{{gold.strip('$')}}}"


def _within(part: str, name: str, of: dict) -> Any:
    return of[part][name]
