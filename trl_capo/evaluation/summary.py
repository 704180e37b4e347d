"""The numbers of one model on one set of prompts, from its graded samples: how good, and how trustworthy."""

import json
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration import metrics
from trl_capo.calibration.selection import choose_all, majority_vote, perplexity_consistency
from trl_capo.evaluation.samples import read_samples
from trl_capo.files import write_json


FILE_NAME = "summary.json"
# By name: the title on a page, and a function of correctness and confidence, (P, N) each.
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
# Of a summary, with their headers in the terminal: some of the above, votes, and perplexities.
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


def summarize(
    correct: ArrayLike, mean_logps: ArrayLike, answers: Sequence[Sequence[Hashable | None]]
) -> dict[str, float]:
    """Accuracy, calibration and what selection makes of the same samples.

    Args:
        correct: 1 = correct, 0 = wrong, NaN = unknown, shape (P, N): P prompts, N samples each.
        mean_logps: Mean token log-prob of each sample, in nats, shape (P, N). Higher is surer.
        answers: Canonical answers, P lists of N; None where nothing was extracted.

    Returns:
        `accuracy` (mean@N), `auc_within`, `auc_pooled`, `majority` and `perplexity_consistency` (accuracy of the
        answer chosen from N samples, identical texts counted as often as they were sampled), `precision_at_50` and
        `precision_at_80` (accuracy of the surest 50% and 80% of all samples), `ppl_correct` and `ppl_wrong` (geometric
        mean perplexity). Undefined = NaN.

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
    """A table in the terminal, one block a benchmark, one line a model.

    Args:
        models: What `summarize` gives and `num_samples`, by model and benchmark; all models on the same benchmarks. An
            undefined number may be NaN or None, as it is in JSON.
    """
    from rich.console import Console
    from rich.table import Table

    benchmarks = next(iter(models.values()))
    counts = sorted({of["num_samples"] for by_benchmark in models.values() for of in by_benchmark.values()})
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
        "AUC within: how often, of a right and a wrong answer to one prompt, the right one has the higher mean "
        "log-prob.\nAUC pooled: the same over all prompts. PC: Perplexity Consistency. "
        "precision@50%: accuracy of the surest half.",
        highlight=False,
    )


def write_summary(model: str, folder: Path) -> None:
    """Summarise `samples.parquet` of a folder, in its `summary.json`.

    Args:
        model: Its name, for whoever reads the file.
        folder: Of the samples.
    """
    summary = {
        of.benchmark: summarize(of.correct, of.mean_logps, of.answers)
        | {
            "num_prompts": len(of.correct),
            "num_samples": of.num_samples,
            "grading_failed": int(of.grid("grading_failed").sum()),
            "ungraded": int(np.isnan(of.correct).sum()),
            "truncated": int(of.grid("truncated").sum()),
        }
        for of in read_samples(folder)
    }
    write_json(folder / FILE_NAME, {"model": model, "benchmarks": summary})


def read_summary(folder: Path) -> dict[str, dict]:
    """What `write_summary` wrote, by benchmark; an undefined number is None."""
    return json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["benchmarks"]


def notes(summaries: dict[str, dict[str, dict]]) -> list[str]:
    """What a reader of the table should know: answers that could not be graded, numbers without a meaning.

    Args:
        summaries: By model and benchmark, as for `print_summaries`.
    """
    failed = sum(of["grading_failed"] for benchmarks in summaries.values() for of in benchmarks.values())
    found = [f"{failed} completions count as neither right nor wrong because math-verify hung or crashed on them."]
    return found[: failed > 0] + [
        f"Warning: {model}, {benchmark}: {problem}"
        for model, benchmarks in summaries.items()
        for benchmark, of in benchmarks.items()
        for problem in problems(of)
    ]


def problems(summary: dict) -> list[str]:
    """What leaves the numbers of a benchmark without a meaning. Summaries of earlier versions lack some counts."""
    total, problems = summary["num_prompts"] * summary["num_samples"], []
    if summary["grading_failed"] == total:
        problems.append("grading failed for every completion, so every number is undefined.")
    if summary.get("ungraded") == total:
        problems.append("no gold answer can be read, so nothing is graded and every number is undefined.")
    if summary.get("truncated") == total:
        problems.append("every completion ran into --max_new_tokens. Raise it, or check the end-of-sequence token.")
    if summary["num_samples"] == 1:
        problems.append("AUC within needs several samples of each question: --num_samples 2 or more.")
    return problems
