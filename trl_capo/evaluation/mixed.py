"""Which questions teach a model anything: those that it answers now rightly, now wrongly."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from trl_capo.errors import UserError
from trl_capo.evaluation.samples import read_samples
from trl_capo.files import replacing


def check_bounds(lowest: float, highest: float, num_samples: int) -> None:
    """Refuse bounds between which no question can lie.

    Raises:
        UserError: Names the option and its value.
    """
    if not 0 <= lowest < highest <= 1:
        raise UserError(f"--lowest and --highest must be 0 <= lowest < highest <= 1, got {lowest}, {highest}.")
    if num_samples < 2:
        raise UserError(f"--num_samples must be at least 2, or no outcome is mixed; got {num_samples}.")


def write_mixed(path: Path, questions: Dataset, samples: Path, lowest: float, highest: float) -> dict[str, int]:
    """Write the questions whose pass rate lies between the two bounds, with it, one JSON a line.

    Args:
        path: Where.
        questions: Conversations in `prompt`, gold answers in `solution`; the first of them were sampled, in order.
        samples: Folder of their samples, on one benchmark.
        lowest: Pass rates above this are kept.
        highest: And below this.

    Returns:
        Numbers of questions that were kept and, by the reason, not.
    """
    (of,) = read_samples(samples)
    readable = np.isfinite(of.correct).all(axis=1)
    rates = np.where(readable, of.correct.mean(axis=1), np.nan)
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
