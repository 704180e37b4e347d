"""Grade completions with math-verify, as the training reward does.

Correctness is TRL's `accuracy_reward`; the answer is what math-verify parses under the reward's extraction rules. Both
take up to a millisecond and samples repeat, so each distinct text is parsed once, and the reward is asked once per
distinct pair of parsed answer and solution: it sees a completion only through that answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from trl_capo.evaluation.sample import Samples


def grade(
    completions: Sequence[str], solutions: Sequence[str], *, progress: bool = True
) -> tuple[list[str | None], np.ndarray]:
    r"""Extract the answer of each completion and compare it with its solution.

    Args:
        completions: Sampled texts, any number.
        solutions: Gold answer of each completion, in `$...$` or `\boxed{...}`; math-verify misreads some bare ones.
        progress: Show a progress bar.

    Returns:
        Answers as sympy prints them (`902` and `0902` give the same text, `0.5` and `\frac{1}{2}` do not), `None`
        where nothing was extracted; and correctness, float64: 1, 0, or NaN where the solution cannot be parsed.
    """
    from tqdm.auto import tqdm
    from trl.rewards import accuracy_reward

    if len(completions) != len(solutions):
        raise ValueError(f"`solutions` needs one entry per completion, got {len(solutions)} for {len(completions)}.")
    answers: list[str | None] = []
    correct = np.empty(len(completions), dtype=np.float64)
    parsed_texts: dict[str, tuple[str | None, str]] = {}
    rewards: dict[tuple[str, str], float] = {}
    bar = tqdm(completions, desc="Grading", unit="sample", disable=not progress)
    for i, (text, solution) in enumerate(zip(bar, solutions, strict=True)):
        if text not in parsed_texts:
            parsed = _parse_answer(text)
            parsed_texts[text] = (str(parsed[0]) if parsed else None, str(parsed))
        answer, parsed_answer = parsed_texts[text]
        if (parsed_answer, solution) not in rewards:
            [reward] = accuracy_reward([[{"role": "assistant", "content": text}]], [solution])
            rewards[parsed_answer, solution] = np.nan if reward is None else reward
        answers.append(answer)
        correct[i] = rewards[parsed_answer, solution]
    return answers, correct


def grade_samples(
    samples: Samples, solutions: Sequence[str], *, progress: bool = True
) -> tuple[list[list[str | None]], np.ndarray]:
    """`grade` for the samples of P prompts, N each.

    Args:
        samples: What `sample_completions` returned.
        solutions: Gold answer of each prompt, P of them.
        progress: Show a progress bar.

    Returns:
        Answers, P lists of N, and correctness, shape (P, N).
    """
    num_prompts, num_samples = samples.mean_logps.shape
    texts = [text for row in samples.completions for text in row]
    answers, correct = grade(texts, np.repeat(solutions, num_samples).tolist(), progress=progress)
    rows = [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]
    return rows, correct.reshape(num_prompts, num_samples)


def _parse_answer(text: str) -> list[Any]:
    """What `accuracy_reward` extracts: a sympy expression and its source, only the source, or nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    rules = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    # math-verify's timeouts are signals, which only the main thread may set.
    timeout = 10 if threading.current_thread() is threading.main_thread() else None
    return parse(text, extraction_config=[rules], extraction_mode="first_match", parsing_timeout=timeout)
