r"""Grade one completion against one gold answer: TRL's `accuracy_reward`, but with timeouts kept separate.

TRL's function counts an answer as wrong if math-verify times out. `grade_pair` calls math-verify as TRL does, but
reports `Failure.TIMEOUT` in this case. With `normalize_operators`, answers are also repaired, as gold answers always
are: `\frac13`, `2\sqrt3` and `\boxed 7` count.
"""

from __future__ import annotations

import itertools
import re
import threading
from typing import Any, NamedTuple

from trl_capo.workers import Failure


def load_math_verify() -> None:
    """Prepares a worker that grades: the import takes half a second."""
    import math_verify  # noqa: F401


class PairGrade(NamedTuple):
    """The result of grading.

    Attributes:
        reward: 1.0 or 0.0; None if the gold answer cannot be parsed or math-verify gave up.
        gold: The gold answer as math-verify parsed it: an expression and its source, only the source, or nothing.
        answer: The completion's answer in the same form.
        failure: The reason if there is no reward although the gold answer can be parsed.
    """

    reward: float | None
    gold: list[Any]
    answer: list[Any]
    failure: Failure | None = None


def grade_pair(text: str, solution: str, normalize_operators: bool = False) -> PairGrade:
    r"""Grade a completion.

    Args:
        text: The completion.
        solution: Its gold answer.
        normalize_operators: Repair `\frac13`, `2\sqrt3` and `\boxed 7` in the completion.

    Example:
        >>> grade_pair(r"\boxed{\frac13}", r"$\frac{1}{3}$").reward
        0.0
        >>> grade_pair(r"\boxed{\frac13}", r"$\frac{1}{3}$", normalize_operators=True).reward
        1.0
    """
    from math_verify.errors import TimeoutException

    gold, answer = [], []
    try:
        gold = parse_gold(solution)
        answer = parse_answer(text, normalize_operators)
        return PairGrade(float(equal(gold, answer)) if gold else None, gold, answer)
    except TimeoutException:
        return PairGrade(None, gold, answer, Failure.TIMEOUT)


def text_answer(text: str) -> str | None:
    r"""The content of the first `\boxed{}`, or of a whole `$...$`, for answers that are words: lower case, no `\text`.

    Math-verify is no grader for words: it reads one as the product of its letters, so `aunt` equals `tuna`, and
    `Daughter` does not equal `daughter`, because it takes an `e` for Euler's number and `da` for a differential.

    Example:
        >>> text_answer(r"So it is \boxed{\text{ Mother}}."), text_answer("$Yes$"), text_answer("mother")
        ('mother', 'yes', None)
    """
    found = re.search(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text) or re.fullmatch(r"\s*\$([^$]*)\$\s*", text)
    if found is None:
        return None
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", found[1])
    return " ".join(words.split()).lower() or None


def grade_text(text: str, solution: str) -> float | None:
    r"""Grade an answer that is a word: 1.0 if `text_answer` finds the gold answer, else 0.0; None without a gold.

    Example:
        >>> grade_text(r"\boxed{Mother}", r"\boxed{mother}"), grade_text("mother", r"\boxed{mother}")
        (1.0, 0.0)
    """
    gold = text_answer(solution)
    return None if gold is None else float(text_answer(text) == gold)


def parse_gold(solution: str) -> list[Any]:
    """Parse a gold answer as `accuracy_reward` does. Raises math-verify's `TimeoutException`."""
    return _parse(solution)


def parse_answer(text: str, normalize_operators: bool = False) -> list[Any]:
    """Extract a completion's answer as `accuracy_reward` does. Raises math-verify's `TimeoutException`."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    if normalize_operators:
        text = re.sub(r"\\boxed(?:\s*([+-]?\d(?:[\d.,/]*\d)?)|\s+([A-Za-z])\b)", r"\\boxed{\1\2}", text)
    rules = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True, malformed_operators=normalize_operators),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    return _parse(text, extraction_config=[rules], extraction_mode="first_match")


def equal(gold: list[Any], answer: list[Any]) -> bool:
    """Whether an answer matches the gold answer. Raises math-verify's `TimeoutException` if it cannot decide."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    timed_out = None
    for pair in itertools.product(gold, answer):
        try:
            if verify(*pair, timeout_seconds=seconds(5), raise_on_error=True):
                return True
        except TimeoutException as error:
            timed_out = error
        except Exception:  # noqa: BLE001 - math-verify treats any sympy error as "not equal"
            pass
    if timed_out is not None:
        raise timed_out
    return False


def _parse(text: str, **options) -> list[Any]:
    from math_verify import parse

    try:
        return parse(text, parsing_timeout=seconds(10), raise_on_error=True, **options)
    except Exception:  # noqa: BLE001 - math-verify treats it as "nothing found"
        return []


def seconds(limit: int) -> int | None:
    """math-verify's timeouts are signals, which only the main thread may set."""
    return limit if threading.current_thread() is threading.main_thread() else None
