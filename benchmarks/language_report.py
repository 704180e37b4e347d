"""The table and figure of `language_study.py --report`: every method, and each one's difference to GRPO.

Intervals are the 95% crossed bootstrap over seeds and prompts of `trl_capo.calibration.bootstrap`. Differences are
paired: the seeds that both have, and the same prompts. Numbers of whole runs, which no prompt has for itself (pooled
AUC, precision and coverage), are means over seeds.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from trl_capo.calibration.bootstrap import bootstrap_means, mean_over_seeds_and_prompts, paired_difference
from trl_capo.files import replacing, write_json, write_text


BASELINE = "grpo"
WHOLE = {
    "auc_pooled": "AUC pooled",
    "precision_at_50": "precision@50%",
    "precision_at_80": "precision@80%",
    "coverage_at_90": "coverage@90%",
    "perplexity_consistency": "PC@16",
}


def report(folder: Path) -> None:
    """Write `<task>.md`, `.json` and `.png` beside the folder of a task's runs."""
    runs = load(folder)
    if BASELINE not in runs:
        raise SystemExit(f"{folder} has no finished run of {BASELINE}, which the others are compared with.")
    numbers = {method: summary(by_seed, runs[BASELINE]) for method, by_seed in runs.items()}
    write_json(folder.with_suffix(".json"), numbers)
    write_text(folder.with_suffix(".md"), table(numbers))
    draw(numbers, folder.with_suffix(".png"))
    print(folder.with_suffix(".md").read_text(encoding="utf-8"))


def load(folder: Path) -> dict[str, dict[int, dict]]:
    """Finished runs by method and seed: `numbers`, and by prompt `accuracy` and `auc`."""
    runs: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as arrays:
            by_prompt = {"accuracy": np.nanmean(arrays["correct"], axis=1), "auc": arrays["auc"]}
        runs[found["method"]][found["seed"]] = {"numbers": found["numbers"]} | by_prompt
    return dict(runs)


def summary(by_seed: dict[int, dict], baseline: dict[int, dict]) -> dict:
    """A method's numbers: means with intervals, differences to the baseline, and the numbers of whole runs."""
    both = sorted(by_seed.keys() & baseline.keys())
    result: dict = {"seeds": sorted(by_seed)}
    for name in ("accuracy", "auc"):
        values = np.stack([run[name] for run in by_seed.values()])
        low, high = np.nanquantile(bootstrap_means(values), [0.025, 0.975])
        result[name] = [float(mean_over_seeds_and_prompts(values)), float(low), float(high)]
        if both and by_seed is not baseline:
            ours, theirs = (np.stack([runs[seed][name] for seed in both]) for runs in (by_seed, baseline))
            result[f"{name}_difference"] = str(paired_difference(ours, theirs))
    for name in WHOLE:
        values = [run["numbers"][name] for run in by_seed.values()]
        defined = [value for value in values if value is not None]
        result[name] = float(np.mean(defined)) if defined else None
    return result


def table(numbers: dict[str, dict]) -> str:
    """Markdown: one line per method, then one per difference."""
    head = ["method", "seeds", "accuracy", "AUC within", *WHOLE.values()]
    lines = [head, ["---"] * len(head)]
    for method, row in numbers.items():
        means = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (row["accuracy"], row["auc"])]
        whole = ["-" if row[name] is None else f"{row[name]:.3f}" for name in WHOLE]
        lines.append([method, str(len(row["seeds"])), *means, *whole])
    lines += [[], [f"minus {BASELINE}", "accuracy", "AUC within"], ["---"] * 3]
    lines += [
        [method, row["accuracy_difference"], row["auc_difference"]]
        for method, row in numbers.items()
        if "auc_difference" in row
    ]
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines) + "\n"


def draw(numbers: dict[str, dict], path: Path) -> None:
    """Accuracy and AUC within, with intervals, one point per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4))
    for method, row in numbers.items():
        (x, *x_ends), (y, *y_ends) = row["accuracy"], row["auc"]
        axes.plot(x_ends, [y, y], color="0.75", lw=1)
        axes.plot([x, x], y_ends, color="0.75", lw=1)
        axes.plot(x, y, "o", label=method)
    axes.set_xlabel("accuracy")
    axes.set_ylabel("AUC within prompts")
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
