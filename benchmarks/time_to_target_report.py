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


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each evaluation and the two before it, fewer at the start, along the last axis."""
    return np.stack([values[..., max(0, k + 1 - AVERAGED) : k + 1].mean(-1) for k in range(values.shape[-1])], -1)


def curves_of(by_seed: dict[int, dict], seeds: list[int]) -> dict[str, np.ndarray]:
    """What the runs' evaluations measured, each of shape (seeds, evaluations); accuracy and AUC are smoothed."""
    names = ("step", "seconds", "tokens", "accuracy", "auc_within")
    curves = {name: np.array([[point[name] for point in by_seed[seed]["curve"]] for seed in seeds]) for name in names}
    return curves | {name: smooth(curves[name]) for name in ("accuracy", "auc_within")}


def at_target(curves: dict[str, np.ndarray], target: float) -> dict[str, float]:
    """Step, seconds, tokens and AUC within where the mean accuracy first reaches the target; infinite if never.

    Example:
        >>> curves = {"step": [[0, 10]], "seconds": [[0, 20]], "tokens": [[0, 80]], "accuracy": [[0.0, 0.5]]}
        >>> curves = {name: np.array(values, dtype=float) for name, values in curves.items()}
        >>> at_target(curves | {"auc_within": np.array([[0.5, 0.5]])}, 0.25)  # half-way
        {'step': 5.0, 'seconds': 10.0, 'tokens': 40.0, 'auc_within': 0.5}
    """
    means = {name: values.mean(axis=0) for name, values in curves.items()}
    reached = means["accuracy"] >= target
    if not reached.any():
        return dict.fromkeys(("step", "seconds", "tokens"), np.inf) | {"auc_within": np.nan}
    after = int(reached.argmax())
    before = max(after - 1, 0)
    rise = means["accuracy"][after] - means["accuracy"][before]
    share = (target - means["accuracy"][before]) / rise if after else 0.0
    names = ("step", "seconds", "tokens", "auc_within")
    return {name: float(means[name][before] + share * (means[name][after] - means[name][before])) for name in names}


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
    return {variant: row_of(variant, runs) for variant in runs}


def row_of(variant: str, runs: dict[str, dict[int, dict]]) -> dict:
    by_seed, stock = runs[variant], runs[STOCK]
    seeds = [seed for seed in by_seed if seed in stock]
    row: dict = {"seeds": seeds, **until_target(curves_of(by_seed, seeds), curves_of(stock, seeds))}
    last_step = next(iter(stock.values()))["schedule"]["steps"]
    lasts = [point for run in by_seed.values() for point in run["curve"] if point["step"] == last_step]
    row["with_advantage"] = over_seeds([last["with_advantage"] / last["completions"] for last in lasts])
    steps = next(iter(by_seed.values()))["options"]["max_steps"]
    row["parts"] = {part: np.mean([run["parts"][part] for run in by_seed.values()]) / steps for part in PARTS}
    for name in ("accuracy", "auc_within"):
        row[f"final_{name}"] = over_seeds([final(run, name) for run in by_seed.values()])

    # Comparisons, each within a seed.
    pairs = [(by_seed[seed], stock[seed]) for seed in seeds if variant != STOCK]
    ratios = [seconds_a_step(run) / seconds_a_step(other) for run, other in pairs]
    row["step_over_stock"] = over_seeds(ratios, log=True)
    uniform = runs.get(UNIFORM.get(variant, ""), {})
    even = [(run, uniform[seed]) for seed, run in by_seed.items() if seed in uniform]
    for name in ("accuracy", "auc_within"):
        row[f"final_{name}_minus_stock"] = over_seeds([final(a, name) - final(b, name) for a, b in pairs])
        row[f"final_{name}_minus_uniform"] = over_seeds([final(a, name) - final(b, name) for a, b in even])
    return row


def until_target(
    curves: dict[str, np.ndarray], stock: dict[str, np.ndarray], draws: int = 2000
) -> dict[str, Estimate]:
    """Where a variant's mean curve reaches the target, and over where stock's does, with intervals from the seeds."""

    def numbers(seeds: np.ndarray) -> dict[str, float]:
        of_stock = {name: values[seeds] for name, values in stock.items()}
        target = of_stock["accuracy"].mean(axis=0)[-1]
        there = at_target({name: values[seeds] for name, values in curves.items()}, target)
        others = at_target(of_stock, target)
        ratios = {f"{name}_over_stock": there[name] / others[name] for name in ("seconds", "tokens")}
        return there | ratios | {"auc_within_minus_stock": there["auc_within"] - others["auc_within"]}

    every = np.arange(len(stock["accuracy"]))
    if stock["accuracy"].mean(axis=0)[-1] <= stock["accuracy"].mean(axis=0)[0]:
        raise SystemExit(f"{STOCK} ends no better than it began: train longer.")
    rng = np.random.default_rng(0)
    resampled = [numbers(rng.choice(every, len(every))) for _ in range(draws if len(every) > 1 else 0)]
    found = {}
    for name, value in numbers(every).items():
        # A draw that never gets there has infinite seconds, and no AUC there.
        values = [numbers[name] for numbers in resampled if not np.isnan(numbers[name])]
        ends = np.quantile(values, [0.025, 0.975], method="nearest") if values else [np.nan] * 2
        found[name] = Estimate(value, *map(float, ends))
    return found


def seconds_a_step(run: dict) -> float:
    return sum(run["parts"].values()) / run["options"]["max_steps"]


def final(run: dict, name: str) -> float:
    """After as many steps as TRL's GRPO makes, the mean over the test splits."""
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
        "the mean validation accuracy at which TRL's GRPO ends up; `benchmarks/time_to_target.py` says how it is "
        "measured. Intervals are 95%.",
        "",
        "## Until the target",
        "",
    ]
    cells = {}
    for variant, row in rows.items():
        step, seconds, tokens = (row[name].value for name in ("step", "seconds", "tokens"))
        means = (f"{step:.0f}", f"{seconds:.1f}", f"{tokens:,.0f}") if np.isfinite(step) else ("not reached", "", "")
        cells[variant] = [str(len(row["seeds"])), means[0], means[1], show(row["seconds_over_stock"], ".2f")]
        cells[variant] += [means[2], show(row["tokens_over_stock"], ".2f")]
        cells[variant] += [show(row["auc_within"]), show(row["auc_within_minus_stock"], "+.3f")]
    columns = ["seeds", "steps", "seconds", "over stock", "tokens", "over stock"]
    lines += table([*columns, "AUC within there", "minus stock"], cells)
    lines += ["", "## After equal steps, on the test splits", ""]
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
    if not np.isfinite(number.value):
        return ""
    if np.isnan(number.low):
        return format(number.value, form)
    return f"{number.value:{form}} [{number.low:{form}}, {number.high:{form}}]"


def draw(runs: dict[str, dict[int, dict]], path: Path) -> None:
    """Accuracy and AUC on the validation split against training seconds. Bands span the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant, by_seed in runs.items():
        curves = curves_of(by_seed, list(by_seed))
        for axis, name in zip(axes, ("accuracy", "auc_within"), strict=True):
            seconds = curves["seconds"].mean(axis=0)
            axis.plot(seconds, curves[name].mean(axis=0), label=variant, **STYLES[variant])
            low, high = curves[name].min(axis=0), curves[name].max(axis=0)
            axis.fill_between(seconds, low, high, color=STYLES[variant]["color"], alpha=0.1, linewidth=0)
    target = curves_of(runs[STOCK], list(runs[STOCK]))["accuracy"].mean(axis=0)[-1]
    axes[0].axhline(target, color="grey", linewidth=0.8, label="target")
    axes[0].set_ylabel(f"validation accuracy, mean of {AVERAGED} evaluations")
    axes[1].set_ylabel(f"validation AUC within, mean of {AVERAGED} evaluations")
    for axis in axes:
        axis.set_xlabel("training seconds, mean over seeds")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
