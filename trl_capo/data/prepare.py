"""Prepare training and validation prompts: drop questions that are repeated, known from a benchmark, or too long.

Every function takes rows with a column `prompt` of conversations and returns some of them, in their order. The
difference in length is the number of dropped rows.
"""

import re
from collections.abc import Iterable

from datasets import Dataset

from trl_capo.data.conversations import without_template
from trl_capo.errors import UserError
from trl_capo.models.messages import question_of, text_of


def question_key(prompt: str | list[dict]) -> str:
    r"""A key shared by copies of a question: its text without case, spaces, dollars, spacing commands and full stops.

    The question is everything that the user says. A system prompt or a prefilled answer does not make it different.

    A bar marks the end of each sentence or line except the last. A factorial does not end a sentence.

    Example:
        >>> question_key([{"role": "user", "content": r"What is $2 +\, 2.5$ ?"}])
        'whatis2+2.5'
    """
    return _key(question_of(prompt))


def conversation_key(prompt: str | list[dict]) -> tuple:
    """A key shared by copies of a prompt: the roles, and `question_key` of each message."""
    if isinstance(prompt, str):
        return (("user", _key(prompt)),)
    return tuple((message.get("role"), _key(text_of(message.get("content")))) for message in prompt)


def _key(text: str) -> str:
    text = text.lower()
    text = re.sub(r"\\(?:left|right|displaystyle|quad|[,;:!])", "", text)
    sentences = re.split(r"\$?[.:?]?\s*\n\s*|\$?[.:?](?=\s|$)", text)
    return "|".join(key for sentence in sentences if (key := re.sub(r"[\s$~]", "", sentence)))


def deduplicate(rows: Dataset) -> Dataset:
    """Keep the first copy of each conversation. Other system prompts, answers or prefills make a different prompt.

    Example:
        >>> ask = lambda text: [{"role": "user", "content": text}]
        >>> len(deduplicate(Dataset.from_dict({"prompt": [ask("1+1?"), ask("1 + 1"), ask("1-1?")]})))
        2
    """
    first: dict[tuple, int] = {}
    for index, prompt in enumerate(rows["prompt"]):
        first.setdefault(conversation_key(prompt), index)
    return rows.select(sorted(first.values()))


def without_questions_of(rows: Dataset, others: Iterable[Dataset]) -> Dataset:
    """Keep the questions that appear in none of the other datasets, compared by `question_key`."""
    known = {key for other in others for prompt in other["prompt"] for key in _questions(prompt)}
    return rows.select([i for i, prompt in enumerate(rows["prompt"]) if not _questions(prompt) & known])


def _questions(prompt: str | list[dict]) -> set[str]:
    """Keys of the question: all user messages together, and the last one, without a template."""
    texts = {question_of(prompt)}
    if not isinstance(prompt, str):
        texts |= {text_of(message.get("content")) for message in prompt if message.get("role") == "user"}
    return {_key(plain) for text in texts for plain in (text, without_template(text)) if plain.strip()}


def within_budget(rows: Dataset, tokenizer, max_prompt_tokens: int) -> Dataset:
    """Keep the questions whose prompt, with the chat template, has at most `max_prompt_tokens` tokens."""
    from trl_capo.models.prompts import tokenize

    lengths = map(len, tokenize(tokenizer, list(rows["prompt"])))
    return rows.select([i for i, length in enumerate(lengths) if length <= max_prompt_tokens])


def train_and_validation(
    rows: Dataset, num_train: int | None, num_validation: int, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Two disjoint samples, the same on every machine.

    Args:
        rows: Rows.
        num_train: Number of training rows. None means all other rows.
        num_validation: Number of validation rows. Which rows these are does not depend on `num_train`.
        seed: Seed of the order.

    Raises:
        UserError: There are too few rows.
    """
    needed = num_validation + (num_train or 1)
    if len(rows) < needed:
        raise UserError(
            f"num_train_prompts={num_train} and num_validation_prompts={num_validation} need {needed} prompts, but "
            f"only {len(rows)} are left. Lower these numbers."
        )
    rows = rows.shuffle(seed=seed)
    stop = len(rows) if num_train is None else needed
    return rows.select(range(num_validation, stop)), rows.select(range(num_validation))
