"""Calibration figures: each function draws one picture of any number of runs on the given matplotlib axes.

`runs` maps a run's name to its samples on one benchmark. Colours follow the order of the runs in every figure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trl_capo.calibration.metrics import calibration_bins, deferral_curve, nanmean, precision_coverage
from trl_capo.calibration.posthoc import fit_isotonic
from trl_capo.calibration.selection import SELECTORS, accuracy_by_count
from trl_capo.evaluation.predictor import question_table
from trl_capo.evaluation.samples import shared_prompts


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trl_capo.evaluation.samples import SampleSet

COLORS = ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b", "#bcbd22")
LINES = {"majority vote": ":", "Perplexity Consistency": "-", "best of N": "--"}


def draw_precision_coverage(axes: Axes, runs: dict[str, SampleSet]) -> None:
    """Precision of the most confident samples against their share."""
    for color, (name, samples) in zip(_colors(runs), runs.items(), strict=True):
        coverage, precision = precision_coverage(samples.correct, samples.mean_logps)
        if len(coverage):
            points = np.unique(np.linspace(len(coverage) // 100, len(coverage) - 1, 300).astype(int))
            axes.plot(coverage[points], precision[points], color=color, label=name, linewidth=2)
    _finish(axes, "precision of the most confident samples", "coverage: share of samples answered", "precision")


def draw_questions(axes: Axes, runs: dict[str, SampleSet]) -> None:
    """Precision of the most confident questions against their share. Perplexity Consistency chooses the answers."""
    for color, (name, samples) in zip(_colors(runs), runs.items(), strict=True):
        coverage, precision = precision_coverage(*question_table(samples))
        first = len(coverage) // 50
        axes.plot(coverage[first:], precision[first:], color=color, label=name, linewidth=2)
    _finish(axes, "precision of the most confident questions", "coverage: share of questions answered", "precision")


def draw_deferral(axes: Axes, runs: dict[str, SampleSet]) -> None:
    """Accuracy if the least confident questions go to the most accurate run, on questions that both runs answered."""
    tables = {name: question_table(samples) for name, samples in runs.items()}
    best = max(tables, key=lambda name: np.nan_to_num(nanmean(tables[name][0]), nan=-1))
    for color, name in zip(_colors(runs), runs, strict=True):
        if name == best:
            continue
        rows, of_best, _ = shared_prompts(runs[name], runs[best])
        right, confidence = (array[rows] for array in tables[name])
        share, accuracy = deferral_curve(right, confidence, tables[best][0][of_best])
        axes.plot(share, accuracy, color=color, label=f"{name}, else {best}", linewidth=2)
    _finish(axes, "deferring the least confident questions", "share deferred", "accuracy")


def draw_reliability(axes: Axes, runs: dict[str, SampleSet], num_bins: int = 10) -> None:
    """Accuracy against stated probability. Isotonic regression learns the probabilities on the other half.

    Bins have equal mass. With equal widths, the few samples with high probability would give random points.
    """
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for color, (name, samples) in zip(_colors(runs), runs.items(), strict=True):
        probability = cross_fitted(samples.correct, samples.mean_logps)
        if probability is None:
            continue
        count, stated, right = calibration_bins(samples.correct, probability, num_bins=num_bins, equal_mass=True)
        axes.plot(stated[count > 0], right[count > 0], color=color, marker="o", markersize=4, label=name, linewidth=2)
    _finish(axes, "reliability, after isotonic regression", "stated probability", "accuracy")


def cross_fitted(correct: np.ndarray, confidence: np.ndarray) -> np.ndarray | None:
    """Probabilities of being right, each learnt on the other half of the prompts; None if a half has only one class.

    Args:
        correct: Shape (P, N).
        confidence: Shape (P, N).
    """
    probability = np.empty(confidence.shape)
    for part in (0, 1):
        try:
            probability[part::2] = fit_isotonic(correct[1 - part :: 2], confidence[1 - part :: 2])(confidence[part::2])
        except ValueError:
            return None
    return probability


def draw_perplexities(axes: Axes, runs: dict[str, SampleSet]) -> None:
    """Histograms of perplexity: right answers are filled, wrong ones are outlined."""
    shown = [np.exp(-samples.mean_logps[~np.isnan(samples.correct)]) for samples in runs.values()]
    edges = np.linspace(1, max([np.quantile(values, 0.99) for values in shown if len(values)], default=2), 50)
    for color, (name, samples) in zip(_colors(runs), runs.items(), strict=True):
        ppl = np.exp(-samples.mean_logps)
        for label, style in ((1, dict(alpha=0.3)), (0, dict(histtype="step", linewidth=1.5))):
            if (samples.correct == label).any():
                title = f"{name}, {'right' if label else 'wrong'}"
                axes.hist(
                    ppl[samples.correct == label], bins=edges.tolist(), density=True, color=color, label=title, **style
                )
    _finish(axes, "perplexity of right and wrong answers", "perplexity", "density")


def draw_selection(axes: Axes, runs: dict[str, SampleSet], max_prompts: int = 500) -> None:
    """Accuracy of the chosen answer against the number of samples, on the first `max_prompts` prompts."""
    for color, (name, samples) in zip(_colors(runs), runs.items(), strict=True):
        counts = [2**k for k in range(samples.num_samples.bit_length()) if 2**k <= samples.num_samples]
        for selector, select in SELECTORS.items():
            line = LINES[selector]
            rows = slice(0, max_prompts)
            found = accuracy_by_count(
                select, samples.answers[rows], samples.mean_logps[rows], samples.correct[rows], counts, num_draws=4
            )
            with np.errstate(invalid="ignore"):
                accuracy = np.nanmean(found, axis=0) if not np.isnan(found).all() else np.full(len(counts), np.nan)
            label = f"{name}, {selector}" if line == "-" or name == next(iter(runs)) else None
            axes.plot(counts, accuracy, color=color, linestyle=line, label=label, linewidth=1.8)
    axes.set_xscale("log", base=2)
    _finish(axes, "accuracy of the chosen answer", "samples per question", "accuracy")


def draw_training(
    axes: Sequence[Axes], histories: dict[str, list[dict]], runs: Sequence[str], *, x: str = "optimizer step"
) -> None:
    """Accuracy and AUC within prompts over training, on two axes.

    Args:
        axes: Two axes.
        histories: `log_history` from the trainer states of some runs.
        runs: Names of all runs. They determine the colours.
        x: Label of the unit that `step` counts.
    """
    for axis, metric, title in (
        (axes[0], "reward", "training reward"),
        (axes[1], "capo/auc_within", "AUC within prompts, training prompts"),
    ):
        for color, name in zip(_colors(runs), runs, strict=True):
            history = histories.get(name, [])
            points = [(entry["step"], entry[metric]) for entry in history if entry.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, label=name, linewidth=2)
        _finish(axis, title, x, "")


def draw_frontier(axes: Axes, points: dict[str, list[tuple[float, float]]]) -> None:
    """AUC within prompts against accuracy: a faint point for each seed, a strong one for their mean.

    Args:
        axes: The axes to draw on.
        points: Accuracy and AUC of each seed, by run.
    """
    for color, (name, seeds) in zip(_colors(points), points.items(), strict=True):
        accuracy, auc = zip(*seeds, strict=True)
        axes.plot(accuracy, auc, "o", color=color, markersize=4, alpha=0.35, markeredgewidth=0)
        axes.plot(sum(accuracy) / len(seeds), sum(auc) / len(seeds), "o", color=color, markersize=8, label=name)
    _finish(axes, "AUC within prompts against accuracy", "accuracy", "AUC within prompts")


def _colors(runs: Collection) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
