"""What `benchmarks/time_to_target.py --report` writes: tables and a figure of its finished runs.

`time_to_target.py` says what is measured and how.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from time_to_target import PARTS, STOCK, UNIFORM, VARIANTS

from trl_capo.calibration.estimate import Estimate
from trl_capo.files import write_json, write_text


AVERAGED = 3  # evaluations in a mean
STYLES = {
    "grpo_stock": dict(color="black"),
    "grpo_fast": dict(color="C0", linestyle=":"),
    "grpo_compact": dict(color="C0", linestyle="--"),
    "grpo_all": dict(color="C0"),
    "capo_uniform": dict(color="C1", linestyle="--"),
    "capo_all": dict(color="C1"),
}


def smooth(values: list[float]) -> np.ndarray:
    """The mean of each evaluation and the two before it, fewer at the start."""
    return np.array([np.mean(values[max(0, k + 1 - AVERAGED) : k + 1]) for k in range(len(values))])


def at_target(curve: list[dict], target: float) -> dict[str, float] | None:
    """Step, seconds, tokens and AUC within where the accuracy first reaches the target; None if it never does.

    Example:
        >>> start = dict(step=0, seconds=0.0, tokens=0, accuracy=0.0, auc_within=0.5)
        >>> curve = [start, dict(step=10, seconds=20.0, tokens=80, accuracy=1.0, auc_within=0.5)]
        >>> at_target(curve, 0.25)  # the mean of both is 0.5: half-way
        {'step': 5.0, 'seconds': 10.0, 'tokens': 40.0, 'auc_within': 0.5}
    """
    columns = {name: [point[name] for point in curve] for name in ("step", "seconds", "tokens")}
    columns["auc_within"] = smooth([point["auc_within"] for point in curve])
    accuracy = smooth([point["accuracy"] for point in curve])
    if not (accuracy >= target).any():
        return None
    after = int((accuracy >= target).argmax())
    before = max(after - 1, 0)
    share = (target - accuracy[before]) / (accuracy[after] - accuracy[before]) if after else 0.0
    return {name: float(values[before] + share * (values[after] - values[before])) for name, values in columns.items()}


def over_seeds(values: list[float], log: bool = False) -> Estimate:
    """Mean with Student's 95% interval; of ratios the geometric mean (`log`). One seed has no interval.

    Example:
        >>> str(over_seeds([1.0, 2.0, 3.0])), str(over_seeds([0.5, 2.0], log=True))
        ('2.000 [-0.484, 4.484]', '1.000 [0.000, 6682.651]')
    """
    from scipy import stats

    numbers = np.log(values) if log else np.asarray(values, dtype=float)
    if not len(numbers):
        return Estimate(np.nan, np.nan, np.nan)
    mean, half = numbers.mean(), np.nan
    if len(numbers) > 1:
        half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
    ends = np.array([mean, mean - half, mean + half])
    return Estimate(*map(float, np.exp(ends) if log else ends))


def numbers_of(runs: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """Every number of the report, by variant, from the runs by variant and seed. What is undefined is NaN."""
    stock = runs[STOCK]
    targets = {seed: smooth([point["accuracy"] for point in run["curve"]])[-1] for seed, run in stock.items()}
    for seed, run in stock.items():
        if targets[seed] <= run["curve"][0]["accuracy"]:
            raise SystemExit(f"{STOCK} with seed {seed} ends no better than it began: train longer.")
    return {variant: row_of(variant, runs, targets) for variant in runs}


def row_of(variant: str, runs: dict[str, dict[int, dict]], targets: dict[int, float]) -> dict:
    by_seed, stock = runs[variant], runs[STOCK]
    there = {seed: at_target(run["curve"], targets[seed]) for seed, run in by_seed.items() if seed in targets}
    reached = {seed: point for seed, point in there.items() if point}
    row: dict = {"seeds": list(there), "reached": list(reached)}
    for name in ("step", "seconds", "tokens", "auc_within"):
        row[name] = over_seeds([point[name] for point in reached.values()])
    lasts = [run["curve"][-1] for run in by_seed.values()]
    row["with_advantage"] = over_seeds([last["with_advantage"] / last["completions"] for last in lasts])
    steps = next(iter(by_seed.values()))["options"]["max_steps"]
    row["parts"] = {part: np.mean([run["parts"][part] for run in by_seed.values()]) / steps for part in PARTS}
    for name in ("accuracy", "auc_within"):
        row[f"final_{name}"] = over_seeds([final(run, name) for run in by_seed.values()])

    # Comparisons, each within a seed.
    others = {} if variant == STOCK else {seed: at_target(stock[seed]["curve"], targets[seed]) for seed in reached}
    for name in ("seconds", "tokens"):
        ratios = [reached[seed][name] / other[name] for seed, other in others.items()]
        row[f"{name}_over_stock"] = over_seeds(ratios, log=True)
    gaps = [reached[seed]["auc_within"] - other["auc_within"] for seed, other in others.items()]
    row["auc_within_minus_stock"] = over_seeds(gaps)
    pairs = [(run, stock[seed]) for seed, run in by_seed.items() if seed in stock and variant != STOCK]
    ratios = [sum(run["parts"].values()) / sum(other["parts"].values()) for run, other in pairs]
    row["step_over_stock"] = over_seeds(ratios, log=True)
    uniform = runs.get(UNIFORM.get(variant, ""), {})
    even = [(run, uniform[seed]) for seed, run in by_seed.items() if seed in uniform]
    for name in ("accuracy", "auc_within"):
        row[f"final_{name}_minus_stock"] = over_seeds([final(a, name) - final(b, name) for a, b in pairs])
        row[f"final_{name}_minus_uniform"] = over_seeds([final(a, name) - final(b, name) for a, b in even])
    return row


def final(run: dict, name: str) -> float:
    """Of the last evaluation, the mean over its splits."""
    return float(np.mean([split[name] for split in run["final"].values()]))


def report(folder: Path) -> None:
    runs: dict[str, dict[int, dict]] = {}
    for variant in VARIANTS:
        found = [json.loads(path.read_text()) for path in folder.glob(f"{variant}-*.json")]
        if found:
            runs[variant] = {run["seed"]: run for run in sorted(found, key=lambda run: run["seed"])}
    if STOCK not in runs:
        raise SystemExit(f"{folder} has no run of {STOCK}, which sets the target.")
    rows = numbers_of(runs)
    everything = [run for by_seed in runs.values() for run in by_seed.values()]
    source = {
        "dates": sorted({run["date"] for run in everything}),
        "hardware": sorted({run["hardware"] for run in everything}),
        "versions": sorted({", ".join(f"{name} {v}" for name, v in run["versions"].items()) for run in everything}),
        "highest_load": max(load for run in everything for load in run["load"].values()),
        "seeds": {variant: list(by_seed) for variant, by_seed in runs.items()},
    }
    as_json = {variant: {name: plain(value) for name, value in row.items()} for variant, row in rows.items()}
    write_json(folder.with_name(f"{folder.name}.json"), source | {"variants": as_json})
    text = to_markdown(rows, source)
    write_text(folder.with_name(f"{folder.name}.md"), text)
    draw(runs, folder.with_name(f"{folder.name}.png"))
    print(text)


def plain(value):
    return asdict(value) if isinstance(value, Estimate) else value


def to_markdown(rows: dict[str, dict], source: dict) -> str:
    lines = [
        "# Time to target",
        "",
        f"Runs of {source['dates'][0]} to {source['dates'][-1]} on {'; '.join(source['hardware'])}, with "
        f"{'; '.join(source['versions'])}. Highest load of the machine: {source['highest_load']:.1f}. The target is "
        "the validation accuracy at which TRL's GRPO ends up, seed by seed; `benchmarks/time_to_target.py` says how "
        "it is measured. A mean is over the seeds that reach the target, which flatters a variant that misses some; "
        "intervals are 95%.",
        "",
        "## Until the target",
        "",
    ]
    cells = {}
    for variant, row in rows.items():
        cells[variant] = [f"{len(row['reached'])} of {len(row['seeds'])}"]
        step, seconds, tokens = (row[name].value for name in ("step", "seconds", "tokens"))
        means = (f"{step:.0f}", f"{seconds:.1f}", f"{tokens:,.0f}") if row["reached"] else ("not reached", "", "")
        cells[variant] += [means[0], means[1], show(row["seconds_over_stock"], ".2f")]
        cells[variant] += [means[2], show(row["tokens_over_stock"], ".2f")]
        cells[variant] += [show(row["auc_within"]), show(row["auc_within_minus_stock"], "+.3f")]
    columns = ["seeds that reach it", "steps", "seconds", "over stock", "tokens", "over stock"]
    lines += table([*columns, "AUC within there", "minus stock"], cells)
    lines += ["", "## After all steps, on the test splits", ""]
    cells = {}
    for variant, row in rows.items():
        cells[variant] = [show(row["with_advantage"])]
        for name in ("final_accuracy", "final_auc_within"):
            gaps = (row[f"{name}_minus_{other}"] for other in ("stock", "uniform"))
            cells[variant] += [show(row[name]), *(show(gap, "+.3f") for gap in gaps)]
    columns = ["completions with an advantage", "accuracy", "minus stock", "minus uniform"]
    lines += table([*columns, "AUC within", "minus stock", "minus uniform"], cells)
    lines += ["", "## Seconds a step, by part", ""]
    cells = {}
    for variant, row in rows.items():
        cells[variant] = [f"{seconds:.3f}" for seconds in (*row["parts"].values(), sum(row["parts"].values()))]
        cells[variant] += [show(row["step_over_stock"], ".2f")]
    lines += table([*PARTS, "all", "over stock"], cells)
    return "\n".join(lines) + "\n"


def table(columns: list[str], cells: dict[str, list[str]]) -> list[str]:
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| `{variant}` | " + " | ".join(row) + " |" for variant, row in cells.items()]


def show(number: Estimate, form: str = ".3f") -> str:
    if np.isnan(number.value):
        return ""
    if np.isnan(number.low):
        return format(number.value, form)
    return f"{number.value:{form}} [{number.low:{form}}, {number.high:{form}}]"


def draw(runs: dict[str, dict[int, dict]], path: Path) -> None:
    """Accuracy and AUC on the validation split against training seconds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant, by_seed in runs.items():
        curves = [run["curve"] for run in by_seed.values()]
        seconds = np.mean([[point["seconds"] for point in curve] for curve in curves], axis=0)
        for axis, name in zip(axes, ("accuracy", "auc_within"), strict=True):
            smoothed = np.array([smooth([point[name] for point in curve]) for curve in curves])
            means = [over_seeds(values) for values in smoothed.T]
            axis.plot(seconds, [mean.value for mean in means], label=variant, **STYLES[variant])
            low, high = [mean.low for mean in means], [mean.high for mean in means]
            axis.fill_between(seconds, low, high, color=STYLES[variant]["color"], alpha=0.1, linewidth=0)
    targets = [smooth([point["accuracy"] for point in run["curve"]])[-1] for run in runs[STOCK].values()]
    axes[0].axhline(np.mean(targets), color="grey", linewidth=0.8, label="target, mean over seeds")
    axes[0].set_ylabel(f"validation accuracy, mean of {AVERAGED} evaluations")
    axes[1].set_ylabel(f"validation AUC within, mean of {AVERAGED} evaluations")
    for axis in axes:
        axis.set_xlabel("training seconds, mean over seeds")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
