"""Does a threshold keep its promise, and what share of the answerable questions does it answer?

    python benchmarks/abstention.py

Draws calibration sets from populations whose precision above every threshold is known, and chooses a threshold on
each. Writes to `results/abstention.json` and `results/abstention.md` how often the promise is broken (allowed in a
share delta = 0.05 of the sets) and the mean coverage, as a share of what an oracle would answer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from trl_capo.calibration.abstention import choose_threshold
from trl_capo.files import write_json, write_text


RESULTS = Path(__file__).parent / "results"
DELTA = 0.05
LEVELS = 100_000  # confidence levels at which a population is integrated

# The probability that an answer with this confidence is right. Confidence is uniform in [0, 1].
POPULATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "monotone": lambda c: np.clip(0.2 + 0.9 * c, 0, 0.995),
    "flat top": lambda c: np.where(c > 0.6, 0.97, 0.5),
    "low flat top": lambda c: np.where(c > 0.5, 0.94, 0.4),
    "noisy top": lambda c: np.where(c > 0.95, 0.8, np.where(c > 0.5, 0.96, 0.5)),
    "noisy tenth": lambda c: np.where(c > 0.9, 0.85, np.where(c > 0.45, 0.97, 0.3)),
    "ties": lambda c: np.clip(0.3 + 0.75 * c, 0, 0.99),
    "ties, flat top": lambda c: np.where(c > 0.6, 0.97, 0.5),
    "barely too low": lambda c: np.full_like(c, np.nan),  # just below each target, at every confidence
}


def confidence_of(name: str, c: np.ndarray) -> np.ndarray:
    """The observed confidence; populations with ties have only 20 values."""
    return np.floor(c * 20) / 20 if name.startswith("ties") else c


def right_at(name: str, c: np.ndarray, target: float) -> np.ndarray:
    """The probability that an answer is right."""
    return np.full_like(c, target - 0.001) if name == "barely too low" else POPULATIONS[name](c)


def oracle(name: str, target: float) -> tuple[float, Callable[[float], tuple[float, float]]]:
    """The largest coverage that keeps the target, and a function that maps a threshold to coverage and precision."""
    c = (np.arange(LEVELS) + 0.5) / LEVELS
    right, seen = right_at(name, c, target), confidence_of(name, c)

    def at(threshold: float) -> tuple[float, float]:
        kept = seen >= threshold
        return float(kept.mean()), float(right[kept].mean()) if kept.any() else np.nan

    coverage, precision = np.arange(1, LEVELS + 1) / LEVELS, np.cumsum(right[::-1]) / np.arange(1, LEVELS + 1)
    ends = np.append(seen[::-1][1:] != seen[::-1][:-1], True)  # answer all of a tie or none of it
    return float(coverage[ends & (precision >= target)].max(initial=0.0)), at


def simulate(name: str, target: float, num_questions: int, num_sets: int, seed: int = 0) -> dict:
    """Count broken promises and average the coverage over calibration sets."""
    rng = np.random.default_rng(seed)
    best, at = oracle(name, target)
    broken, coverages = 0, []
    for _ in range(num_sets):
        c = rng.random(num_questions)
        correct = rng.random(num_questions) < right_at(name, c, target)
        chosen = choose_threshold(correct, confidence_of(name, c), target, delta=DELTA)
        coverage, precision = (0.0, np.nan) if chosen.threshold is None else at(chosen.threshold)
        broken += precision < target
        coverages.append(coverage)
    return {
        "population": name,
        "target": target,
        "questions": num_questions,
        "sets": num_sets,
        "broken": int(broken),
        # The probability of at least this many broken promises if each is broken with probability delta.
        "p": float(binomtest(int(broken), num_sets, DELTA, alternative="greater").pvalue),
        "coverage": float(np.mean(coverages)),
        "oracle": best,
        "share": float(np.mean(coverages) / best) if best else None,
    }


def to_markdown(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "# Abstention in simulation",
        "",
        f"`python benchmarks/abstention.py`. A promise may be broken in {DELTA:.0%} of the calibration sets; share: "
        "coverage over the oracle's.",
        "",
        "| population | target | questions | broken | coverage | oracle | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "-" if row["share"] is None else f"{row['share']:.2f}"
        lines.append(
            f"| {row['population']} | {row['target']} | {row['questions']:,} | {row['broken'] / row['sets']:.3f} | "
            f"{row['coverage']:.3f} | {row['oracle']:.3f} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", type=int, default=1000, help="calibration sets per setting (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for name in POPULATIONS:
        for target in (0.8, 0.9, 0.95, 0.99):
            for num_questions in (1000, 4000):
                rows.append(simulate(name, target, num_questions, args.sets))
                print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "abstention.json", rows)
    write_text(RESULTS / "abstention.md", to_markdown(rows))
    worst = max(rows, key=lambda row: row["broken"] / row["sets"])
    print(f"{to_markdown(rows)}\nMost often broken: {worst}")


if __name__ == "__main__":
    main()
