"""Select the questions that a model can learn from: those that it answers sometimes right and sometimes wrong."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from trl_capo.errors import UserError
from trl_capo.evaluation.samples import read_samples
from trl_capo.files import replacing


def check_bounds(lowest: float, highest: float, num_samples: int) -> None:
    """Refuse bounds that no question can lie between.

    Raises:
        UserError: A bound is wrong. The message names the option and its value.
    """
    if not 0 <= lowest < highest <= 1:
        raise UserError(f"--lowest and --highest must be 0 <= lowest < highest <= 1, got {lowest}, {highest}.")
    if num_samples < 2:
        raise UserError(f"--num_samples must be at least 2, because one sample is never mixed; got {num_samples}.")


def write_mixed(path: Path, questions: Dataset, samples: Path, lowest: float, highest: float) -> dict[str, int]:
    """Write the questions whose pass rate lies between two bounds, with the pass rate, one JSON object per line.

    Args:
        path: The file to write.
        questions: Conversations in `prompt`, gold answers in `solution`. The samples cover the first ones, in order.
        samples: Folder of their samples, on one benchmark.
        lowest: Questions with a pass rate above this are kept.
        highest: Questions with a pass rate below this are kept.

    Returns:
        Number of questions that were kept, and number of dropped questions by reason.
    """
    (graded,) = read_samples(samples)
    readable = np.isfinite(graded.correct).all(axis=1)
    rates = np.where(readable, graded.correct.mean(axis=1), np.nan)
    kept = np.flatnonzero((rates > lowest) & (rates < highest))
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in kept.tolist():
            messages = questions[row]["prompt"]
            prompt = messages[0]["content"] if len(messages) == 1 else messages
            line = {"prompt": prompt, "solution": questions[row]["solution"], "pass_rate": float(rates[row])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = {
        "kept": len(kept),
        "always right": int((rates == 1).sum()),
        "never right": int((rates == 0).sum()),
        "without a readable gold answer": int((~readable).sum()),
    }
    return counts | {"outside the bounds": len(rates) - sum(counts.values())}
