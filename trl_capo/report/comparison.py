"""Compare trained methods, with several seeds each, to one baseline, and find which differences are significant.

Each score is averaged over prompts and seeds within a benchmark, then over benchmarks. Pooling all prompts would
favour a method that leaves more easy prompts unsolved: having more of them would raise its AUC. Intervals come from
the crossed bootstrap over seeds and prompts in `trl_capo.calibration.bootstrap`. They are paired: a method and the
baseline share seeds, prompts and random numbers. With several methods, some difference will look significant by
chance, so Holm's method corrects the p-values of a metric over all methods. It does not change the intervals.

AUC within uses prompts that a method answers both right and wrong, and training changes this set. So the difference is
also computed on the prompts that are mixed for both methods.

Degenerate cases: with one seed, the intervals cover prompts only; the table states the number of seeds. A method
without a mixed prompt on some benchmark has no AUC within, no difference and no test. Metrics of a whole benchmark
(AUC pooled, votes) are means over seeds and benchmarks, without an interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from trl_capo.calibration.bootstrap import Estimate, holm, mean_over_seeds_and_prompts, paired_difference, two_sided_p
from trl_capo.calibration.metrics import auc_by_prompt, nanmean
from trl_capo.errors import UserError
from trl_capo.evaluation.samples import SampleSet, read_samples, shared_prompts
from trl_capo.evaluation.summary import read_summary
from trl_capo.files import replacing, write_json, write_text


METRICS = ("auc_within", "accuracy")
OF_BENCHMARK = ("auc_pooled", "perplexity_consistency")


def write_comparison(
    folder: Path, runs: dict[str, dict[int | None, Path]], baseline: str, planned: dict[str, Any] | None = None
) -> str:
    """Write `comparison.md`, `.json`, `.npz` and `.png`, and `report.html`.

    Args:
        folder: The folder for these files.
        runs: Folders of finished runs, by method and seed, as `trl-capo compare` makes them. A method with the single
            seed None was not trained: it is shown but not compared.
        baseline: The method that the others are compared with.
        planned: The planned runs, for readers of the JSON.

    Returns:
        The tables, with notes for the reader.

    Raises:
        UserError: The runs answered different questions.
    """
    from trl_capo.report.page import html_section, markdown, write_report

    runs = {baseline: runs[baseline], **runs}  # first everywhere, so that its colour is the same everywhere
    evaluated = {
        name: {seed: cast(Path, evaluation_folder(path)) for seed, path in seeds.items()}
        for name, seeds in runs.items()
    }
    sets = {name: {seed: read_samples(path) for seed, path in seeds.items()} for name, seeds in evaluated.items()}
    check_same_questions(sets)
    summaries = {name: {seed: read_summary(path) for seed, path in seeds.items()} for name, seeds in evaluated.items()}
    rows = compare(sets, baseline)
    for row in rows:
        row["by_run"] = {
            run_name(row["method"], seed): {name: numbers(benchmark) for name, benchmark in summary.items()}
            for seed, summary in summaries[row["method"]].items()
        }
        for metric in OF_BENCHMARK:
            row[metric] = nanmean([benchmark[metric] for run in row["by_run"].values() for benchmark in run.values()])
    histories = {
        name: mean_history([path / "model" for path in seeds.values()])
        for name, seeds in runs.items()
        if None not in seeds
    }
    records = {run_name(name, seed): record(path) for name, seeds in runs.items() for seed, path in seeds.items()}
    caption = describe(sets, baseline, records, rows)
    write_json(
        folder / "comparison.json",
        {
            "baseline": baseline,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "planned": planned,
            "rows": rows,
            "runs": records,
        },
    )
    with replacing(folder / "comparison.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays(sets))  # type: ignore[arg-type]
    header, cells = table(rows, baseline)
    parts = [caption, markdown(header, cells), "Accuracy / AUC within by benchmark:", markdown(*by_benchmark(rows))]
    text = "\n\n".join(parts)
    write_text(folder / "comparison.md", text + "\n")
    draw(folder / "comparison.png", rows, histories, list(runs))
    picture = (folder / "comparison.png").read_bytes()
    section = html_section("All seeds", caption, (header, cells), picture)
    seed = next(iter(sets[baseline]))  # the sections below show single models: those with this seed
    chosen = {name: seeds.get(None, seeds.get(seed)) for name, seeds in sets.items()}
    shown = {
        name if None in sets[name] else f"{name}, seed {seed}": samples for name, samples in chosen.items() if samples
    }
    write_report(shown, folder / "report.html", first_section=section)
    return text


def run_name(method: str, seed: int | None) -> str:
    """`method-seed`, or only the method if it was not trained."""
    return method if seed is None else f"{method}-{seed}"


def check_same_questions(sets: dict[str, dict[int | None, list[SampleSet]]]) -> None:
    """Refuse runs that answered different questions, because rows are paired by their number."""
    known: dict[str, SampleSet] = {}
    for name, seeds in sets.items():
        for seed, benchmarks in seeds.items():
            for samples in benchmarks:
                first = known.setdefault(samples.benchmark, samples)
                rows, _, differing = shared_prompts(samples, first)
                if differing or any(len(either.grid("prompt_id")) != len(rows) for either in (samples, first)):
                    raise UserError(
                        f"{run_name(name, seed)} answered different questions of {samples.benchmark} than the runs "
                        "before it. Remove the evaluation folders of the runs that differ, and evaluate them again."
                    )


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers that the comparison takes from a benchmark's summary; NaN if one is missing."""
    named = {name: summary[name] for name in (*METRICS, *OF_BENCHMARK, "grading_failed")}
    return {name: np.nan if value is None else value for name, value in named.items()}


def record(run: Path) -> dict[str, Any]:
    """The origin of a run: dates, versions, commits and device from its model, and its duration in seconds."""
    found: dict[str, Any] = {}
    for path in (run / "model" / "reproduction.json", run / "work.json"):
        if path.exists():
            found |= json.loads(path.read_text(encoding="utf-8"))
    kept = {name: found[name] for name in ("date", "device", "seconds", "threads") if name in found}
    events = [found, *found.get("resumed", [])] if "versions" in found else []
    commits = [(event.get("git") or {}).get("package") for event in events]
    return kept | {"versions": _distinct([event["versions"] for event in events]), "commits": _distinct(commits)}


def _distinct(values: list) -> list:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def describe(sets: dict, baseline: str, records: dict[str, dict], rows: list[dict]) -> str:
    """A description of the table, and of any differences between runs that make its rows less comparable."""
    benchmarks = next(iter(sets[baseline].values()))
    sizes = ", ".join(
        f"{samples.benchmark} ({len(samples.correct)} questions x {samples.num_samples})" for samples in benchmarks
    )
    lines = [
        f"Means over benchmarks: {sizes}. PC: accuracy of the vote weighted by confidence. Differences from "
        f"{baseline} have 95% intervals over seeds and questions, each on its own, and p-values after Holm's "
        "correction over all methods, separately for each metric. Where both are mixed: the difference in AUC within "
        f"on questions that both the method and {baseline} answered sometimes right and sometimes wrong."
    ]
    for what in ("commits", "versions"):
        if len(_distinct([value for run_record in records.values() for value in run_record[what]])) > 1:
            lines.append(f"Runs used different {what}: see comparison.json.")
    failed = sum(
        benchmark["grading_failed"] for row in rows for run in row["by_run"].values() for benchmark in run.values()
    )
    if failed:
        lines.append(f"{failed} answers could not be graded and count as neither right nor wrong.")
    return " ".join(lines)


def arrays(sets: dict[str, dict[int | None, list[SampleSet]]]) -> dict[str, np.ndarray]:
    """The data behind the table: share of right samples and AUC of each question, by `run/benchmark/metric`."""
    return {
        f"{run_name(name, seed)}/{samples.benchmark}/{metric}": of_prompt(samples, metric).astype(np.float32)
        for name, seeds in sets.items()
        for seed, benchmarks in seeds.items()
        for samples in benchmarks
        for metric in METRICS
    }


def evaluation_folder(run: Path) -> Path | None:
    """The folder with a run's samples from `trl-capo evaluate`; None if the evaluation has not finished."""
    return next((summary.parent for summary in (run / "evaluation").glob("*/summary.json")), None)


def compare(sets: dict[str, dict[int | None, list[SampleSet]]], baseline: str) -> list[dict[str, Any]]:
    """Accuracy and AUC within of each method, and the differences from the baseline.

    Args:
        sets: Samples by method and seed.
        baseline: The method that the others are compared with, on shared seeds.

    Returns:
        One row per method: `method`, `seeds`, `seeds_compared` (shared with the baseline) and the two metrics. For
        each metric also `<metric>_difference` (value, low, high), `<metric>_p` (Holm-corrected; NaN with one seed) and
        `<metric>_p_alone`. `auc_common_difference` uses the prompts that are mixed for both methods. A value is None
        if nothing can be compared.
    """
    rows = []
    for name, seeds in sets.items():
        shared = [seed for seed in seeds if seed is not None and seed in sets[baseline] and name != baseline]
        row: dict[str, Any] = {"method": name, "seeds": len(seeds), "seeds_compared": len(shared)}
        pair: list[dict[int | None, list[SampleSet]]] = [
            {seed: m[seed] for seed in shared} for m in (seeds, sets[baseline])
        ]
        for metric in METRICS:
            row[metric] = float(np.mean([mean_over_seeds_and_prompts(values) for values in by_prompt(seeds, metric)]))
            row |= dict.fromkeys((f"{metric}_difference", f"{metric}_p", f"{metric}_p_alone"))
            if shared:
                both = [by_prompt(m, metric) for m in pair]
                row[f"{metric}_difference"] = _numbers(paired_difference(*both))
                row[f"{metric}_p_alone"] = two_sided_p(*both, num_resamples=20_000)
        row["auc_common_difference"] = None
        if shared:
            row["auc_common_difference"] = _numbers(paired_difference(*_where_both(*(by_prompt(m) for m in pair))))
        rows.append(row)
    compared = [row for row in rows if row["seeds_compared"]]
    for metric in METRICS:
        corrected = holm([row[f"{metric}_p_alone"] for row in compared])
        for row, p in zip(compared, corrected, strict=True):
            row[f"{metric}_p"] = float(p)
    return rows


def _numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _where_both(ours: list[np.ndarray], theirs: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Both tables, with NaN unless both are defined."""
    undefined = [np.isnan(a) | np.isnan(b) for a, b in zip(ours, theirs, strict=True)]
    return ([np.where(u, np.nan, t) for u, t in zip(undefined, tables, strict=True)] for tables in (ours, theirs))


def by_prompt(sets: dict[int | None, list[SampleSet]], metric: str = "auc_within") -> list[np.ndarray]:
    """A metric of each seed and prompt, shape (S, P), one table per benchmark."""
    return [np.stack([of_prompt(samples, metric) for samples in seeds]) for seeds in zip(*sets.values(), strict=True)]


def of_prompt(samples: SampleSet, metric: str) -> np.ndarray:
    """A metric of each prompt, shape (P,)."""
    if metric == "auc_within":
        return auc_by_prompt(samples.correct, samples.mean_logps)
    return np.array([nanmean(row) for row in samples.correct])


def table(rows: list[dict], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    header = ["method", "seeds", "accuracy", "AUC within", "AUC pooled", "PC", f"AUC within minus {baseline}, p"]
    header += ["where both are mixed", f"accuracy minus {baseline}, p"]
    cells = []
    for row in rows:
        auc, accuracy = (_with_p(row[f"{metric}_difference"], row[f"{metric}_p"]) for metric in METRICS)
        gaps = [auc, _with_p(row["auc_common_difference"], np.nan), accuracy]
        numbers = [row[name] for name in ("accuracy", "auc_within", *OF_BENCHMARK)]
        unequal = row["seeds_compared"] not in (0, row["seeds"])
        seeds = f"{row['seeds']}, {row['seeds_compared']} compared" if unequal else str(row["seeds"])
        cells.append([row["method"], seeds, *(f"{number:.3f}" for number in numbers), *gaps])
    return header, cells


def _with_p(gap: list[float] | None, p: float | None) -> str:
    if gap is None or p is None:
        return ""
    if np.isnan(gap[0]):
        return "undefined"
    shown = "" if np.isnan(p) else ", <0.01" if p < 0.01 else f", {p:.3f}"  # see two_sided_p
    return f"{gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]{shown}"


def by_benchmark(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Accuracy and AUC within of each benchmark, averaged over seeds."""
    names = list(next(iter(rows[0]["by_run"].values())))
    cells = []
    for row in rows:
        seeds = row["by_run"].values()
        pairs = [[nanmean([run[name][m] for run in seeds]) for m in ("accuracy", "auc_within")] for name in names]
        cells.append([row["method"], *(f"{accuracy:.3f} / {auc:.3f}" for accuracy, auc in pairs)])
    return ["method", *names], cells


def mean_history(models: list[Path]) -> list[dict]:
    """Reward and AUC within over training, averaged over seeds at the steps that all seeds logged.

    `step` is the finished share of the training, because methods may split their mini-batches into more steps.
    """
    logs, last = [], 1
    for model in models:
        states = sorted(model.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        state: dict[str, Any] = (
            json.loads(states[-1].read_text(encoding="utf-8")) if states else {"log_history": [], "max_steps": 1}
        )
        logs.append({entry["step"]: entry for entry in state["log_history"] if "capo/auc_within" in entry})
        last = state["max_steps"]
    steps = sorted(set.intersection(*(set(log) for log in logs)))
    history = []
    for step in steps:
        entry: dict[str, Any] = {"step": step / last}
        for name in ("reward", "capo/auc_within"):
            values = [log[step][name] for log in logs]
            entry[name] = None if None in values else float(np.mean(values))
        history.append(entry)
    return history


def draw(path: Path, rows: list[dict], histories: dict[str, list[dict]], runs: list[str]) -> None:
    """Draw training curves, and final AUC within against accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_capo.report.figures import draw_frontier, draw_training

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    draw_training(axes[:2], histories, runs, x="share of the training")

    def mean_of(run: dict[str, dict], name: str) -> float:
        return float(np.mean([benchmark[name] for benchmark in run.values()]))

    points = {
        row["method"]: [(mean_of(run, "accuracy"), mean_of(run, "auc_within")) for run in row["by_run"].values()]
        for row in rows
    }
    draw_frontier(axes[2], points)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
