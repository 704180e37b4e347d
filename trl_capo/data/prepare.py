"""From questions to training and validation prompts: what is repeated, known from a benchmark or too long goes.

Every function takes rows with a column `prompt` of conversations and returns fewer of them, in their order. What was
dropped is the difference in length.
"""

import re
from collections.abc import Iterable

from datasets import Dataset


def question_key(prompt: list[dict]) -> str:
    r"""What two copies of a question share: its text without case, spaces, dollars, spacing commands and full stops.

    Where a sentence or a line ends there is a bar, but for the last; a factorial is no end of a sentence.

    Example:
        >>> question_key([{"role": "user", "content": r"What is $2 +\, 2.5$ ?"}])
        'whatis2+2.5'
    """
    text = prompt[-1]["content"].lower()
    text = re.sub(r"\\(?:left|right|displaystyle|quad|[,;:!])", "", text)
    sentences = re.split(r"\$?[.:?]?\s*\n\s*|\$?[.:?](?=\s|$)", text)
    return "|".join(key for sentence in sentences if (key := re.sub(r"[\s$~]", "", sentence)))


def deduplicate(rows: Dataset) -> Dataset:
    """The first of each question.

    Example:
        >>> ask = lambda text: [{"role": "user", "content": text}]
        >>> len(deduplicate(Dataset.from_dict({"prompt": [ask("1+1?"), ask("1 + 1"), ask("1-1?")]})))
        2
    """
    first = {}
    for index, prompt in enumerate(rows["prompt"]):
        first.setdefault(question_key(prompt), index)
    return rows.select(sorted(first.values()))


def without_questions_of(rows: Dataset, others: Iterable[Dataset]) -> Dataset:
    """The questions that are in none of the other datasets, up to `question_key`."""
    known = {question_key(prompt) for other in others for prompt in other["prompt"]}
    return rows.select([i for i, prompt in enumerate(rows["prompt"]) if question_key(prompt) not in known])


def within_budget(rows: Dataset, tokenizer, max_prompt_tokens: int) -> Dataset:
    """The questions whose prompt, with the chat template, has at most so many tokens."""
    from trl_capo.evaluation.sample import tokenize

    lengths = map(len, tokenize(tokenizer, list(rows["prompt"])))
    return rows.select([i for i, length in enumerate(lengths) if length <= max_prompt_tokens])


def train_and_validation(
    rows: Dataset, num_train: int | None, num_validation: int, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Two disjoint samples, the same on every machine.

    Args:
        rows: Rows.
        num_train: How many to train on; None: all others.
        num_validation: How many to validate on. They do not depend on `num_train`.
        seed: Of the order.

    Raises:
        ValueError: There are too few rows.
    """
    needed = num_validation + (num_train or 1)
    if len(rows) < needed:
        raise ValueError(
            f"{needed} prompts are wanted (num_train_prompts={num_train}, num_validation_prompts={num_validation}), "
            f"but {len(rows)} are left. Lower these numbers."
        )
    rows = rows.shuffle(seed=seed)
    stop = len(rows) if num_train is None else needed
    return rows.select(range(num_validation, stop)), rows.select(range(num_validation))
