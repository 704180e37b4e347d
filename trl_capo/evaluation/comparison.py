"""Which differences between trained methods are sure: several seeds each, one configuration to compare them with.

Intervals are the crossed bootstrap over seeds and prompts of `trl_capo.calibration.bootstrap`, paired: a method and
the baseline share seeds, prompts and random numbers. With several methods some difference will look sure by chance, so
the p-values of each metric are corrected by Holm's method over all methods.

Degenerate cases: with one seed the intervals are about prompts only; the table names the number of seeds. Metrics of a
whole benchmark (AUC pooled, votes) are means over seeds, without an interval.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trl_capo.calibration.bootstrap import holm, mean_over_seeds_and_prompts, paired_difference, two_sided_p
from trl_capo.calibration.metrics import auc_by_prompt, nanmean
from trl_capo.evaluation.samples import SampleSet, read_samples
from trl_capo.folders import write_json


METRICS = ("auc_within", "accuracy")


def write_comparison(folder: Path, runs: dict[str, dict[int | None, Path]], baseline: str) -> str:
    """Write `comparison.md`, `comparison.json`, `comparison.png` and `report.html`.

    Args:
        folder: Where they go.
        runs: Folders of finished runs, by method and seed, as `trl-capo compare` makes them. A method with the single
            seed None was not trained: it is shown with the others and not compared.
        baseline: The method that the others are compared with.

    Returns:
        The table.
    """
    from trl_capo.evaluation.report import markdown, write_report

    evaluated = {name: {seed: evaluation_folder(path) for seed, path in of.items()} for name, of in runs.items()}
    sets = {name: {seed: read_samples(path) for seed, path in of.items()} for name, of in evaluated.items()}
    summaries = {
        name: [json.loads((path / "summary.json").read_text())["benchmarks"] for path in of.values()]
        for name, of in evaluated.items()
    }
    rows = compare(sets, baseline)
    for row in rows:
        for metric in ("auc_pooled", "perplexity_consistency"):
            values = [of[metric] for summary in summaries[row["method"]] for of in summary.values()]
            row[metric] = nanmean([np.nan if value is None else value for value in values])
    header, cells = table(rows, baseline)
    text = markdown(header, cells)
    (folder / "comparison.md").write_text(text + "\n")
    write_json(folder / "comparison.json", {"baseline": baseline, "rows": rows})
    histories = {
        name: mean_history([path / "model" for path in seeds.values()])
        for name, seeds in runs.items()
        if None not in seeds
    }
    draw(folder / "comparison.png", rows, histories, list(runs))
    seed = next(iter(sets[baseline]))  # the page shows single models: those of one seed
    shown = {name: of[None] if None in of else of.get(seed) for name, of in sets.items()}
    shown = {name if None in sets[name] else f"{name}, seed {seed}": of for name, of in shown.items() if of}
    write_report(shown, folder / "report.html")
    return text


def evaluation_folder(run: Path) -> Path | None:
    """Where `trl-capo evaluate` left the samples of a run; None if it has not ended."""
    return next((summary.parent for summary in (run / "evaluation").glob("*/summary.json")), None)


def compare(sets: dict[str, dict[int | None, list[SampleSet]]], baseline: str) -> list[dict[str, Any]]:
    """Accuracy and AUC within of each method over seeds and prompts of all benchmarks, and its differences.

    Args:
        sets: Samples by method and seed.
        baseline: The method that the others are compared with, on the seeds that both have.

    Returns:
        A row a method: `method`, `seeds`, `seeds_compared` (shared with the baseline), the two metrics, and for each
        `<metric>_difference` (value, low, high) and `<metric>_p` (Holm-corrected; NaN with one seed); None where there
        is nothing to compare.
    """
    rows = []
    for name, of in sets.items():
        shared = [seed for seed in of if seed is not None and seed in sets[baseline] and name != baseline]
        row: dict[str, Any] = {"method": name, "seeds": len(of), "seeds_compared": len(shared)}
        for metric in METRICS:
            row[metric] = float(mean_over_seeds_and_prompts(by_prompt(of, metric)))
            row |= {f"{metric}_difference": None, f"{metric}_p": None}
            if shared:
                both = [by_prompt({seed: m[seed] for seed in shared}, metric) for m in (of, sets[baseline])]
                found = paired_difference(*both)
                row[f"{metric}_difference"] = [found.value, found.low, found.high]
                row[f"{metric}_p"] = two_sided_p(*both)
        rows.append(row)
    for metric in METRICS:
        compared = [row for row in rows if row[f"{metric}_p"] is not None]
        for row, corrected in zip(compared, holm([row[f"{metric}_p"] for row in compared]), strict=True):
            row[f"{metric}_p"] = corrected
    return rows


def by_prompt(of: dict[int | None, list[SampleSet]], metric: str) -> np.ndarray:
    """A metric of each seed and prompt, benchmarks one after the other, (S, P)."""
    measure = {
        "auc_within": lambda s: auc_by_prompt(s.correct, s.mean_logps),
        "accuracy": lambda s: np.array([nanmean(row) for row in s.correct]),
    }[metric]
    return np.stack([np.concatenate([measure(s) for s in sets]) for sets in of.values()])


def table(rows: list[dict], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    header = ["method", "seeds", "accuracy", "AUC within", "AUC pooled", "PC"]
    header += [f"{title} minus {baseline}, Holm's p" for title in ("AUC within", "accuracy")]
    cells = []
    for row in rows:
        gaps = []
        for metric in METRICS:
            gap, p = row[f"{metric}_difference"], row[f"{metric}_p"]
            shown = "" if gap is None or np.isnan(p) else ", <0.001" if p < 0.001 else f", {p:.3f}"
            gaps.append("" if gap is None else f"{gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]{shown}")
        numbers = [row[name] for name in ("accuracy", "auc_within", "auc_pooled", "perplexity_consistency")]
        unequal = row["seeds_compared"] not in (0, row["seeds"])
        seeds = f"{row['seeds']}, {row['seeds_compared']} compared" if unequal else str(row["seeds"])
        cells.append([row["method"], seeds, *(f"{number:.3f}" for number in numbers), *gaps])
    return header, cells


def mean_history(models: list[Path]) -> list[dict]:
    """Reward and AUC within along training, averaged over seeds at the steps that all have logged."""
    logs = []
    for model in models:
        states = sorted(model.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        log = json.loads(states[-1].read_text())["log_history"] if states else []
        logs.append({entry["step"]: entry for entry in log if "capo/auc_within" in entry})
    steps = sorted(set.intersection(*(set(log) for log in logs)))
    history = []
    for step in steps:
        entry: dict[str, Any] = {"step": step}
        for name in ("reward", "capo/auc_within"):
            values = [log[step][name] for log in logs]
            entry[name] = None if None in values else float(np.mean(values))
        history.append(entry)
    return history


def draw(path: Path, rows: list[dict], histories: dict[str, list[dict]], runs: list[str]) -> None:
    """Training curves, and AUC within against accuracy at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_capo.evaluation.figures import draw_frontier, draw_training

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    draw_training(axes[:2], histories, runs)
    draw_frontier(axes[2], {row["method"]: (row["accuracy"], row["auc_within"]) for row in rows})
    figure.savefig(path, dpi=110)
    plt.close(figure)
