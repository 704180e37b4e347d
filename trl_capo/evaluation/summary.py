"""Summarise a model's graded samples on one set of prompts: how accurate it is, and how trustworthy its confidence."""

import json
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration import metrics
from trl_capo.calibration.selection import choose_all, majority_vote, perplexity_consistency
from trl_capo.errors import UserError
from trl_capo.evaluation.samples import read_samples
from trl_capo.files import write_json


FILE_NAME = "summary.json"
# By name: the title on a page, and a function of correctness and confidence, shape (P, N) each.
METRICS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "accuracy": ("accuracy", lambda correct, logps: metrics.accuracy(correct)),
    "auc_within": ("AUC within", metrics.auc_within),
    "auc_pooled": ("AUC pooled", metrics.auc_pooled),
    "aurc": ("AURC", metrics.aurc),
    "excess_aurc": ("excess AURC", metrics.excess_aurc),
    "prr": ("PRR", metrics.prediction_rejection_ratio),
    "precision_at_50": ("precision@50%", partial(metrics.precision_at_coverage, coverage=0.5)),
    "precision_at_80": ("precision@80%", partial(metrics.precision_at_coverage, coverage=0.8)),
    "coverage_at_90": ("coverage@90%", partial(metrics.coverage_at_precision, precision=0.9)),
}
# Numbers in a summary, with their headers in the terminal: some of the metrics above, votes, and perplexities.
COLUMNS = {
    "accuracy": "accuracy\nmean@N",
    "auc_within": "AUC\nwithin",
    "auc_pooled": "AUC\npooled",
    "majority": "majority\nvote@N",
    "perplexity_consistency": "PC@N",
    "precision_at_50": "precision\n@50%",
    "precision_at_80": "precision\n@80%",
    "ppl_correct": "perplexity\nright",
    "ppl_wrong": "perplexity\nwrong",
}
COUNTS = ("num_prompts", "num_samples", "grading_failed")


def summarize(
    correct: ArrayLike, mean_logps: ArrayLike, answers: Sequence[Sequence[Hashable | None]]
) -> dict[str, float]:
    """Accuracy and calibration of samples, and the accuracy of answers selected from them.

    Args:
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, N): P prompts, N samples each.
        mean_logps: Mean token log-prob of each sample, in nats, shape (P, N). Higher means more confident.
        answers: Canonical answers, P lists of N; None if nothing was extracted.

    Returns:
        `accuracy` (mean@N), `auc_within`, `auc_pooled`, `majority` and `perplexity_consistency` (accuracy of the
        answer chosen from N samples, where each identical text counts every time it was sampled), `precision_at_50`
        and `precision_at_80` (accuracy of the most confident 50% and 80% of all samples), `ppl_correct` and
        `ppl_wrong` (geometric mean perplexity). Undefined numbers are NaN.

    Example:
        >>> summary = summarize([[1, 0, 0]], [[-0.1, -1.0, -2.0]], [["4", "5", "5"]])
        >>> summary["auc_within"], summary["majority"], summary["perplexity_consistency"]
        (1.0, 0.0, 1.0)
    """
    correct, mean_logps = np.asarray(correct, dtype=float), np.asarray(mean_logps, dtype=float)
    numbers = {name: METRICS[name][1](correct, mean_logps) for name in COLUMNS if name in METRICS} | {
        "majority": metrics.nanmean(choose_all(majority_vote, answers, mean_logps, correct)[1]),
        "perplexity_consistency": metrics.nanmean(choose_all(perplexity_consistency, answers, mean_logps, correct)[1]),
        "ppl_correct": metrics.perplexity(mean_logps, valid=correct == 1),
        "ppl_wrong": metrics.perplexity(mean_logps, valid=correct == 0),
    }
    return {name: numbers[name] for name in COLUMNS}


def print_summaries(models: dict[str, dict[str, dict]]) -> None:
    """Print a table in the terminal, with one block per benchmark and one line per model.

    Args:
        models: Results of `summarize` plus `num_samples`, by model and benchmark. All models need the same benchmarks.
            An undefined number may be NaN, or None as in JSON.
    """
    from rich.console import Console
    from rich.table import Table

    benchmarks = next(iter(models.values()))
    counts = sorted({numbers["num_samples"] for by_benchmark in models.values() for numbers in by_benchmark.values()})
    table = Table(header_style="bold")
    table.add_column("benchmark")
    table.add_column("model")
    for header in COLUMNS.values():
        table.add_column(header.replace("@N", f"@{counts[0]}") if len(counts) == 1 else header, justify="right")
    for benchmark in benchmarks:
        for i, (model, by_benchmark) in enumerate(models.items()):
            numbers = [by_benchmark[benchmark][name] for name in COLUMNS]
            values = ["-" if number is None or np.isnan(number) else f"{number:.3f}" for number in numbers]
            table.add_row(benchmark if i == 0 else "", model, *values, end_section=i == len(models) - 1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        "AUC within: how often a right answer has a higher mean log-prob than a wrong answer to the same prompt.\n"
        "AUC pooled: the same over all prompts. PC: Perplexity Consistency. "
        "precision@50%: accuracy of the most confident half.",
        highlight=False,
    )


def write_summary(model: str, folder: Path) -> None:
    """Summarise a folder's `samples.parquet` in its `summary.json`.

    Args:
        model: The model's name, for readers of the file.
        folder: Folder of the samples.
    """
    summary = {
        samples.benchmark: summarize(samples.correct, samples.mean_logps, samples.answers)
        | {
            "num_prompts": len(samples.correct),
            "num_samples": samples.num_samples,
            "grading_failed": int(samples.grid("grading_failed").sum()),
            "ungraded": int(np.isnan(samples.correct).sum()),
            "truncated": int(samples.grid("truncated").sum()),
        }
        for samples in read_samples(folder)
    }
    write_json(folder / FILE_NAME, {"model": model, "benchmarks": summary})


def read_summary(folder: Path) -> dict[str, dict]:
    """Read the output of `write_summary`, by benchmark. An undefined number is None.

    Raises:
        UserError: The file, perhaps from another tool, cannot be read or lacks a number. The message names the file
            and the key.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(benchmarks, dict) or not benchmarks:
        raise UserError(f"{path}: `benchmarks` must contain the numbers of each benchmark, got {benchmarks!r:.100}.")
    for benchmark, numbers in benchmarks.items():
        if not isinstance(numbers, dict):
            raise UserError(f"{path}: `benchmarks.{benchmark}` must contain numbers by name, got {numbers!r:.100}.")
        for name in (*COLUMNS, *COUNTS):
            value, shown = numbers.get(name), repr(numbers[name]) if name in numbers else "nothing"
            fits = type(value) is int if name in COUNTS else value is None or type(value) in (int, float)
            if not fits or name not in numbers:
                wanted = "a whole number" if name in COUNTS else "a number or null"
                raise UserError(f"{path}: `benchmarks.{benchmark}.{name}` must be {wanted}, got {shown:.100}.")
    return benchmarks


def notes(summaries: dict[str, dict[str, dict]]) -> list[str]:
    """Notes for readers of the table: answers that could not be graded, and numbers that mean nothing.

    Args:
        summaries: By model and benchmark, as for `print_summaries`.
    """
    failed = sum(numbers["grading_failed"] for benchmarks in summaries.values() for numbers in benchmarks.values())
    found = [f"{failed} completions count as neither right nor wrong because math-verify hung or crashed on them."]
    return found[: failed > 0] + [
        f"Warning: {model}, {benchmark}: {problem}"
        for model, benchmarks in summaries.items()
        for benchmark, numbers in benchmarks.items()
        for problem in problems(numbers)
    ]


def problems(summary: dict) -> list[str]:
    """Reasons why the numbers of a benchmark mean nothing. Summaries from earlier versions lack some counts."""
    total, problems = summary["num_prompts"] * summary["num_samples"], []
    if summary["grading_failed"] == total:
        problems.append("grading failed for every completion, so every number is undefined.")
    if summary.get("ungraded") == total:
        problems.append("no gold answer can be read, so nothing is graded and every number is undefined.")
    if summary.get("truncated") == total:
        problems.append("every completion reached --max_new_tokens. Raise it, or check the end-of-sequence token.")
    if summary["num_samples"] == 1:
        problems.append("AUC within needs several samples per question. Set --num_samples to 2 or more.")
    return problems
