"""A reward for answers that are words, and what a reward function reads from a completion."""

from __future__ import annotations

from collections.abc import Callable

from trl_capo.grading import grade_text, text_answer
from trl_capo.models.messages import answer_of


def answers_and_golds(completions: list[list[dict[str, str]]], solution: list[str]) -> list[tuple[str, str]]:
    """Each completion's text (the assistant's last message) with its gold answer."""
    return [(answer_of(completion), gold) for completion, gold in zip(completions, solution, strict=True)]


def text_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""Reward for answers that are words (`\boxed{Yes}`): exact match, in any case.

    Args:
        completions: Conversations; the last message of the assistant is graded.
        solution: Gold answer of each completion, in `\boxed{}` or `$...$`.
        log_extra: Receives the columns `solution` and `answer_parsed`. TRL's trainers pass it.
        **kwargs: Whatever else TRL's trainers pass; not used.

    Returns:
        1.0 or 0.0 for each completion; None without a gold answer.

    Example:
        >>> text_reward([[{"role": "assistant", "content": r"\boxed{No}"}]] * 2, [r"\boxed{no}", r"\boxed{yes}"])
        [1.0, 0.0]
    """
    items = answers_and_golds(completions, solution)
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("answer_parsed", [text_answer(text) or "[none]" for text, _ in items])
    return [grade_text(*item) for item in items]
