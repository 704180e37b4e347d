r"""Two tasks in plain English from `reasoning-gym`, for a small real language model.

`chain_sum` asks for the value of a short sum, and `family` for how two members of a family are related:

    State the final answer to the following arithmetic problem: 42 - 25 =
        ->   42 - 25 = 17. \boxed{17}
    David is married to Barbara. They have a child called Jacob. ... What relation is Jacob to Barbara? ...
        ->   Jacob is the son of Barbara. \boxed{son}

Sums are graded by math-verify, relations by `text_answer` (in a recipe, `text_reward`).

Of the family questions we use only those about `RELATIONS`. For nieces, nephews and in-laws, reasoning-gym 0.1.25
gives the gender or the role of the other person, and families of this size have no aunts and uncles.

Questions are assigned to splits by a hash of their text, so that no two splits share one, whatever the sizes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from trl_capo.data.arithmetic import bucket
from trl_capo.errors import UserError
from trl_capo.extras import require


RELATIONS = (
    *("mother", "father", "sister", "brother", "daughter", "son", "wife", "husband"),
    *("grandmother", "grandfather"),
)
ENDLESS = 10**9  # reasoning-gym makes a question when it is asked for, so a size costs nothing


def write_sum(question: dict[str, Any]) -> str:
    r"""The value of a chain, one operation at a time.

    Example:
        >>> write_sum({"metadata": {"expression": "42 - 25 + 61"}})
        '42 - 25 = 17. 17 + 61 = 78. \\boxed{78}'
    """
    first, *rest = question["metadata"]["expression"].split()
    value, steps = int(first), ""
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(term) if operator == "+" else value - int(term)
        steps += f"{value} {operator} {term} = {result}. "
        value = result
    return steps + rf"\boxed{{{value}}}"


def write_relation(question: dict[str, Any]) -> str:
    r"""The relation in a sentence, then alone.

    Example:
        >>> write_relation({"answer": "son", "metadata": {"person1": "Jacob", "person2": "Barbara"}})
        'Jacob is the son of Barbara. \\boxed{son}'
    """
    people = question["metadata"]
    answer = question["answer"]
    return rf"{people['person1']} is the {answer} of {people['person2']}. \boxed{{{answer}}}"


@dataclass(frozen=True)
class Task:
    """A task of reasoning-gym.

    Attributes:
        source: Its name there.
        options: Its options there.
        write: Writes the supervised answer of a question.
        answers: The words that an answer may be; None if it is a number.
    """

    source: str
    options: dict[str, Any]
    write: Callable[[dict[str, Any]], str]
    answers: tuple[str, ...] | None = None


TASKS = {
    "chain_sum": Task("chain_sum", dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2), write_sum),
    "family": Task("family_relationships", dict(min_family_size=4, max_family_size=6), write_relation, RELATIONS),
}

# The hash buckets, of 100, that belong to a split, and its default size.
SPLITS = {
    "base": (range(0, 40), 4096),
    "train": (range(40, 80), 2048),
    "validation": (range(80, 90), 300),
    "test": (range(90, 100), 300),
}
BENCHMARKS = {f"{task}_{split}": (task, split) for task in TASKS for split in ("validation", "test")}


def has_text_answers(name: str) -> bool:
    """Whether the answers of a split, named `TASK_SPLIT`, are words.

    Example:
        >>> has_text_answers("family_test"), has_text_answers("chain_sum_test"), has_text_answers("family.csv")
        (True, False, False)
    """
    task, _, split = name.rpartition("_")
    return task in TASKS and split in SPLITS and TASKS[task].answers is not None


def check_names(task: str, split: str) -> None:
    """Refuse a task or split that does not exist."""
    if task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")


def questions(task: str, split: str) -> Iterator[dict[str, Any]]:
    """The distinct questions of a split, without end, as reasoning-gym makes them: `question`, `answer`, `metadata`.

    Args:
        task: A key of `TASKS`.
        split: A key of `SPLITS`.

    Raises:
        UserError: Unknown task or split, or reasoning-gym is not installed.
    """
    check_names(task, split)
    require("language")
    import reasoning_gym

    kind, seen = TASKS[task], set[str]()
    for question in reasoning_gym.create_dataset(kind.source, seed=0, size=ENDLESS, **kind.options):
        text = question["question"]
        if bucket(text) not in SPLITS[split][0] or text in seen:
            continue
        if kind.answers is None or question["answer"] in kind.answers:
            seen.add(text)
            yield question


def language_dataset(task: str, split: str, num_prompts: int | None = None) -> Dataset:
    r"""Questions of a split with their gold answers, ready for `GRPOTrainer`.

    Args:
        task: A key of `TASKS`.
        split: A key of `SPLITS`; `"base"` has the questions of the supervised warm-up.
        num_prompts: Number of distinct questions; defaults to the size in `SPLITS`.

    Returns:
        Dataset with the columns `prompt` (conversational) and `solution` (in `\boxed{}`).
    """
    check_names(task, split)
    num_prompts = SPLITS[split][1] if num_prompts is None else num_prompts
    if num_prompts < 1:
        raise UserError(f"num_prompts must be at least 1, got {num_prompts}.")
    rows = list(islice(questions(task, split), num_prompts))
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
            "solution": [rf"\boxed{{{row['answer']}}}" for row in rows],
        }
    )
