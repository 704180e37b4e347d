"""What the metrics cost: times all point metrics on a million samples, and compares AUC within prompts with a loop.

    python benchmarks/metrics.py

Uses 62,500 prompts x 16 samples with informative confidence, on one core, and takes medians of three repeats. The loop
calls scikit-learn's `roc_auc_score` for each mixed prompt in a part of the prompts; its time is scaled up. Prints a
table and writes `benchmarks/results/metrics.json`.
"""

import json
import os
import platform
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from trl_capo.calibration import metrics


RESULTS = Path(__file__).parent / "results" / "metrics.json"
NUM_PROMPTS, NUM_SAMPLES = 62_500, 16
LOOPED = 2_500  # prompts in the loop, which would take a minute for all prompts
REPEATS = 3
METRICS = {
    "auc_within": metrics.auc_within,
    "auc_per_slot": metrics.auc_per_slot,
    "auc_pooled": metrics.auc_pooled,
    "accuracy": lambda correct, _: metrics.accuracy(correct),
    "pass_at_8": lambda correct, _: metrics.pass_at_k(correct, 8),
    "aurc": metrics.aurc,
    "excess_aurc": metrics.excess_aurc,
    "prediction_rejection_ratio": metrics.prediction_rejection_ratio,
    "precision_at_80": partial(metrics.precision_at_coverage, coverage=0.8),
    "coverage_at_90": partial(metrics.coverage_at_precision, precision=0.9),
    "brier_score": lambda correct, logps: metrics.brier_score(correct, np.exp(logps)),
    "ece": lambda correct, logps: metrics.expected_calibration_error(correct, np.exp(logps)),
    "ece_equal_mass": lambda correct, logps: metrics.expected_calibration_error(
        correct, np.exp(logps), equal_mass=True
    ),
}


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    rng = np.random.default_rng(0)
    difficulty = rng.random((NUM_PROMPTS, 1))
    correct = (rng.random((NUM_PROMPTS, NUM_SAMPLES)) < difficulty).astype(float)
    logps = -rng.exponential(0.3, correct.shape) * (2 - correct)
    seconds = {name: seconds_of(metric, correct, logps) for name, metric in tqdm(METRICS.items(), desc="Metrics")}

    part = slice(0, LOOPED)
    started = time.perf_counter()
    mixed = [p for p in range(LOOPED) if 0 < correct[p].sum() < NUM_SAMPLES]
    looped = float(np.mean([roc_auc_score(correct[p], logps[p]) for p in mixed]))
    loop_seconds = (time.perf_counter() - started) * NUM_PROMPTS / LOOPED
    assert abs(looped - metrics.auc_within(correct[part], logps[part])) < 1e-12

    results = {
        "date": str(date.today()),
        "machine": f"{platform.machine()} CPU, one core",
        "samples": correct.size,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "all_seconds": round(sum(seconds.values()), 3),
        "loop_seconds": round(loop_seconds, 1),
        "auc_within_times_faster": round(loop_seconds / seconds["auc_within"]),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, value in seconds.items():
        print(f"{name:28} {value:7.3f} s")
    print(f"{'all':28} {results['all_seconds']:7.3f} s")
    print(f"auc_within is {results['auc_within_times_faster']} times faster than a loop over scikit-learn")


def seconds_of(metric, correct: np.ndarray, logps: np.ndarray) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        metric(correct, logps)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
