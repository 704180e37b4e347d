"""Grade completions with math-verify, as the training reward does and with the same worker processes.

Correctness is TRL's `accuracy_reward`. The answer is what math-verify parses under the reward's extraction rules. A
completion that hangs or crashes math-verify costs only its deadline or its worker: it counts as neither right nor
wrong (NaN) and appears in `Grades.failed`. Repeated pairs of text and solution are graded once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trl_capo.grading import grade_text, load_math_verify, text_answer
from trl_capo.workers import DeadlinePool, Failure, can_start_workers


if TYPE_CHECKING:
    from trl_capo.evaluation.sampling import Samples

CHUNK = 1000  # completions between two ticks of the progress bar


@dataclass(frozen=True)
class Grades:
    """Graded completions, in input order.

    Attributes:
        answers: The answer of each completion, as sympy prints it (`902` and `0902` give the same text); `None` if
            nothing was extracted.
        sources: The same answers as written, in LaTeX. `canonical_answers` compares these.
        correct: 1, 0, or NaN if the solution cannot be parsed or grading failed, float64.
        failed: Whether grading failed: math-verify gave up, the deadline passed, or the worker died. Bool.
    """

    answers: list[str | None]
    sources: list[str | None]
    correct: np.ndarray
    failed: np.ndarray


def grade(
    completions: Sequence[str],
    solutions: Sequence[str],
    *,
    num_workers: int | None = None,
    deadline: float = 30.0,
    progress: bool = True,
    normalize_operators: bool = False,
) -> Grades:
    r"""Extract the answer of each completion and compare it with its solution.

    Args:
        completions: Sampled texts, any number.
        solutions: Gold answer of each completion, in `$...$` or `\boxed{...}`; math-verify misreads some bare ones.
        num_workers: Number of worker processes. None means one per core.
        deadline: Seconds that one completion may take.
        progress: Show a progress bar.
        normalize_operators: Repair `\frac13`, `2\sqrt3` and `\boxed 7` in completions, which otherwise count as wrong.

    Returns:
        The grades. A warning reports how many failed.
    """
    from tqdm.auto import tqdm

    if len(completions) != len(solutions):
        raise ValueError(f"`solutions` needs one entry per completion, got {len(solutions)} for {len(completions)}.")
    pairs = [(text, gold, normalize_operators) for text, gold in zip(completions, solutions, strict=True)]
    graded = []
    with tqdm(total=len(pairs), desc="Grading", unit="sample", disable=not progress) as bar:
        for start in range(0, len(pairs), CHUNK):
            graded += _work(_grade_and_extract, pairs[start : start + CHUNK], num_workers, deadline)
            bar.update(len(pairs[start : start + CHUNK]))
    rows = [(None, None, None, True) if isinstance(result, Failure) else result for result in graded]
    failed = np.array([given_up for *_, given_up in rows], dtype=bool)
    if failed.any():
        warnings.warn(
            f"{failed.sum()} of {len(graded)} completions count as neither right nor wrong: math-verify timed out, "
            f"did not grade them within {deadline:g} s, or crashed on them.",
            stacklevel=2,
        )
    correct = np.array([np.nan if reward is None else reward for reward, *_ in rows], dtype=np.float64)
    return Grades([answer for _, answer, *_ in rows], [source for _, _, source, _ in rows], correct, failed)


def grade_texts(completions: Sequence[str], solutions: Sequence[str]) -> Grades:
    r"""`grade` for answers that are words: see `trl_capo.grading.text_answer`. The answers are canonical already.

    Example:
        >>> grades = grade_texts([r"\boxed{Yes}", "yes"], [r"\boxed{yes}"] * 2)
        >>> grades.answers, grades.correct.tolist()
        (['yes', None], [1.0, 0.0])
    """
    answers = [text_answer(text) for text in completions]
    rewards = [grade_text(*pair) for pair in zip(completions, solutions, strict=True)]
    correct = np.array([np.nan if reward is None else reward for reward in rewards], dtype=np.float64)
    return Grades(answers, answers, correct, np.zeros(len(answers), dtype=bool))


def grade_samples(
    samples: Samples, solutions: Sequence[str], *, text_answers: bool = False, progress: bool = True
) -> tuple[list[list[str | None]], np.ndarray]:
    """`grade` for the samples of P prompts, N each.

    Args:
        samples: Samples from `sample_completions`.
        solutions: Gold answer of each prompt, length P.
        text_answers: Answers are words: use `grade_texts`.
        progress: Show a progress bar.

    Returns:
        Answers, P lists of N, and correctness, shape (P, N).
    """
    num_prompts, num_samples = samples.mean_logps.shape
    texts = [text for row in samples.completions for text in row]
    golds = np.repeat(solutions, num_samples).tolist()
    grades = grade_texts(texts, golds) if text_answers else grade(texts, golds, progress=progress)
    rows = [grades.answers[start : start + num_samples] for start in range(0, len(grades.answers), num_samples)]
    return rows, grades.correct.reshape(num_prompts, num_samples)


def canonical_answers(grades: Grades, groups: Sequence[int], *, deadline: float = 30.0) -> list[str | None]:
    r"""Give equivalent answers to one question one name: `0.5` and `\frac{1}{2}` become one candidate.

    Math-verify compares the answers pairwise, in the workers. A comparison that fails counts as different. The gold
    answer plays no part: it is unknown when a model is deployed, and confidence must be the same there.

    Args:
        grades: Graded completions.
        groups: The question that each completion belongs to.
        deadline: Seconds that one comparison may take.

    Returns:
        One answer for each completion, named after the first answer in its class.
    """
    from trl_capo.calibration.selection import equivalence_classes

    source_of: dict[tuple[int, str], str] = {}
    for group, answer, source in zip(groups, grades.answers, grades.sources, strict=True):
        if answer is not None and source is not None:
            source_of.setdefault((group, answer), source)
    by_group: dict[int, list[str]] = {}
    for group, answer in source_of:
        by_group.setdefault(group, []).append(answer)
    pairs = [
        (group, a, b)
        for group, answers in by_group.items()
        for a, b in itertools.combinations(answers, 2)
        if not (_is_integer(a) and _is_integer(b))  # sympy prints different integers differently
    ]
    compared = _work(_same, [(source_of[g, a], source_of[g, b]) for g, a, b in pairs], None, deadline)
    same = {pair for pair, equal in zip(pairs, compared, strict=True) if equal is True}

    name: dict[tuple[int, str | None], str | None] = {}
    for group, answers in by_group.items():

        def alike(a: str, b: str, group: int = group) -> bool:
            return (group, a, b) in same

        classes = equivalence_classes(answers, alike)
        name.update({(group, answer): canonical for answer, canonical in zip(answers, classes, strict=True)})
    return [name.get((group, answer)) for group, answer in zip(groups, grades.answers, strict=True)]


def _is_integer(answer: str) -> bool:
    return answer.removeprefix("-").isdecimal()


@functools.cache
def _pool(function: Callable, num_workers: int | None, deadline: float) -> DeadlinePool:
    """Workers start when first needed, which takes half a second, and stay alive for the next call."""
    return DeadlinePool(function, num_workers, deadline, load_math_verify)


def _work(function: Callable, pairs: list[tuple], num_workers: int | None, deadline: float) -> list:
    if not can_start_workers():
        return [function(*pair) for pair in pairs]
    return _pool(function, num_workers, deadline).results(pairs)


def _grade_and_extract(
    text: str, solution: str, normalize_operators: bool = False
) -> tuple[float | None, str | None, str | None, bool]:
    """Reward, answer, its source, and whether grading failed."""
    from trl_capo.grading import grade_pair

    found = grade_pair(text, solution, normalize_operators)
    answer = (str(found.answer[0]), found.answer[-1]) if found.answer else (None, None)
    return found.reward, *answer, found.failure is not None


def _same(source: str, other: str) -> bool:
    from math_verify.errors import TimeoutException

    from trl_capo.grading import equal, parse_answer

    try:
        ours, theirs = (parse_answer(rf"\boxed{{{text}}}") for text in (source, other))
        # Verification is not symmetric: `5` is accepted for the gold answer `x=5`, but not the other way round.
        return equal(ours, theirs) and equal(theirs, ours)
    except TimeoutException:
        return False
