"""From questions to training and validation prompts: what is repeated, known from a benchmark or too long goes.

Every function takes rows with a column `prompt` of conversations and returns fewer of them, in their order. What was
dropped is the difference in length.
"""

import re
from collections.abc import Iterable

from datasets import Dataset

from trl_capo.data.conversations import without_template
from trl_capo.errors import UserError
from trl_capo.models.messages import question_of, text_of


def question_key(prompt: str | list[dict]) -> str:
    r"""What two copies of a question share: its text without case, spaces, dollars, spacing commands and full stops.

    The question is all that the user says: a system prompt or a prefilled answer makes no other question of it.

    Where a sentence or a line ends there is a bar, but for the last; a factorial is no end of a sentence.

    Example:
        >>> question_key([{"role": "user", "content": r"What is $2 +\, 2.5$ ?"}])
        'whatis2+2.5'
    """
    return _key(question_of(prompt))


def conversation_key(prompt: str | list[dict]) -> tuple:
    """What two copies of a prompt share: the roles, and of each message what `question_key` keeps."""
    if isinstance(prompt, str):
        return (("user", _key(prompt)),)
    return tuple((message.get("role"), _key(text_of(message.get("content")))) for message in prompt)


def _key(text: str) -> str:
    text = text.lower()
    text = re.sub(r"\\(?:left|right|displaystyle|quad|[,;:!])", "", text)
    sentences = re.split(r"\$?[.:?]?\s*\n\s*|\$?[.:?](?=\s|$)", text)
    return "|".join(key for sentence in sentences if (key := re.sub(r"[\s$~]", "", sentence)))


def deduplicate(rows: Dataset) -> Dataset:
    """The first of each conversation: other system prompts, answers between or prefills make other prompts.

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
    """The questions that are in none of the other datasets, up to `question_key`."""
    known = {key for other in others for prompt in other["prompt"] for key in _questions(prompt)}
    return rows.select([i for i, prompt in enumerate(rows["prompt"]) if not _questions(prompt) & known])


def _questions(prompt: str | list[dict]) -> set[str]:
    """Keys of the question: what the user asks in all, and last, without a template around it."""
    texts = {question_of(prompt)}
    if not isinstance(prompt, str):
        texts |= {text_of(message.get("content")) for message in prompt if message.get("role") == "user"}
    return {_key(plain) for text in texts for plain in (text, without_template(text)) if plain.strip()}


def within_budget(rows: Dataset, tokenizer, max_prompt_tokens: int) -> Dataset:
    """The questions whose prompt, with the chat template, has at most so many tokens."""
    from trl_capo.models.prompts import tokenize

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
        UserError: There are too few rows.
    """
    needed = num_validation + (num_train or 1)
    if len(rows) < needed:
        raise UserError(
            f"{needed} prompts are wanted (num_train_prompts={num_train}, num_validation_prompts={num_validation}), "
            f"but {len(rows)} are left. Lower these numbers."
        )
    rows = rows.shuffle(seed=seed)
    stop = len(rows) if num_train is None else needed
    return rows.select(range(num_validation, stop)), rows.select(range(num_validation))
