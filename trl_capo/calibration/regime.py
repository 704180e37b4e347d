"""Which regime a model is in: what its first samples say about how reinforcement learning will move its confidence.

Assumes samples at temperature 1, as training takes them. Degenerate case: without a prompt that has right and wrong
samples, everything that compares the two is NaN.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration.prompt_bootstrap import prompt_interval
from trl_capo.calibration.ranking import accuracy, auc_within, group_fractions
from trl_capo.calibration.rows import paired_rows


def regime(correct: ArrayLike, mean_logps: ArrayLike, answers: Sequence[Sequence[str | None]]) -> dict[str, Any]:
    """Numbers that tell regimes apart. `docs/evidence.md` has those of the worlds where the outcome is known.

    Args:
        correct: Correctness, shape (P, G): 1, 0 or NaN.
        mean_logps: Mean token log-probs, shape (P, G).
        answers: Canonical answers, P lists of G; None where there is none.

    Returns:
        `prompts` and `samples`; `accuracy`; `frac_mixed`, the share of prompts with right and wrong samples;
        `auc_within` with the ends of its 95% interval over prompts; `confident_wrong`, the share of wrong samples that
        are surer than half of the right samples to the same prompt; `wrong_majority`, the share of prompts where more
        than half of the samples agree on one wrong answer; `gap`, the median distance between a right and a wrong
        sample to one prompt, in nats.

    Example:
        >>> found = regime([[1, 1, 0, 0]], [[-0.1, -0.5, -0.2, -0.9]], [["4", "4", "5", "6"]])
        >>> found["confident_wrong"], round(found["gap"], 3), found["wrong_majority"]
        (0.5, 0.35, 0.0)
    """
    right, confidence, valid = paired_rows(correct, mean_logps)
    gaps: list[float] = []
    surer: list[bool] = []
    for row, scores, usable in zip(right, confidence, valid, strict=True):
        good, bad = scores[usable & (row == 1)], scores[usable & (row == 0)]
        if len(good) and len(bad):
            gaps += np.abs(good[:, None] - bad).ravel().tolist()
            surer += (bad > np.median(good)).tolist()
    measured = prompt_interval(auc_within, right, confidence)
    return {
        "prompts": len(right),
        "samples": int(valid.sum()),
        "accuracy": float(accuracy(right, valid=valid)),
        "frac_mixed": float(group_fractions(right, valid=valid)["frac_mixed"]),
        "auc_within": float(measured.value),
        "auc_within_95": [float(measured.low), float(measured.high)],
        "confident_wrong": float(np.mean(surer)) if surer else float("nan"),
        "wrong_majority": float(np.mean([_is_wrong_majority(*pair) for pair in zip(right, answers, strict=True)])),
        "gap": float(np.median(gaps)) if gaps else float("nan"),
    }


def print_regimes(found: dict[str, dict[str, Any]]) -> None:
    """Print a table with one column per sample set; `tau_in_gaps` is the caller's tau divided by `gap`."""
    from rich.console import Console
    from rich.table import Table

    lines = {
        "questions": lambda r: f"{r['prompts']:,}",
        "samples": lambda r: f"{r['samples']:,}",
        "accuracy": lambda r: f"{r['accuracy']:.3f}",
        "questions with right and wrong": lambda r: f"{r['frac_mixed']:.0%}",
        "AUC within prompts, 95% interval": lambda r: "{:.3f} [{:.3f}, {:.3f}]".format(
            r["auc_within"], *r["auc_within_95"]
        ),
        "wrong, and surer than half of the right": lambda r: f"{r['confident_wrong']:.0%}",
        "questions with a wrong majority": lambda r: f"{r['wrong_majority']:.0%}",
        "gap from right to wrong, nats": lambda r: f"{r['gap']:.3f}",
        "tau in gaps": lambda r: f"{r['tau_in_gaps']:.1f}",
    }
    table = Table(header_style="bold")
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(name.replace(", ", "\n"), justify="right")
    for line, cell in lines.items():
        table.add_row(line, *map(cell, found.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _is_wrong_majority(right: np.ndarray, answers: Sequence[str | None]) -> bool:
    wrong = Counter(answer for answer, value in zip(answers, right, strict=True) if value == 0 and answer is not None)
    return bool(wrong) and 2 * max(wrong.values()) > len(answers)
