"""The rule by which a target is reached, by hand; and two tiny runs, from training to tables."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import time_to_target as study
import time_to_target_report as report


def curve(accuracies, seconds_a_step=1.0):
    return [
        dict(step=10 * k, seconds=10 * k * seconds_a_step, tokens=1000 * k, accuracy=accuracy, auc_within=0.5 + k / 10)
        | dict(completions=100 * k, with_advantage=60 * k)
        for k, accuracy in enumerate(accuracies)
    ]


def summary(accuracies, seconds_a_step):
    steps = 10 * (len(accuracies) - 1)
    return {
        "curve": curve(accuracies, seconds_a_step),
        "parts": {part: steps * seconds_a_step / len(report.PARTS) for part in report.PARTS},
        "options": {"max_steps": steps},
        "schedule": {"steps": steps, "every": 10},
        "final": {"test_2": {"accuracy": accuracies[-1], "auc_within": 0.7}},
    }


def test_a_target_is_reached_between_two_means_of_three():
    def there(accuracies, target):
        return report.at_target(report.curves_of({0: summary(accuracies, 1.0) | {"seed": 0}}, [0]), target)

    accuracies = [0.0, 0.3, 0.3, 0.6, 0.9]  # the means: 0, .15, .2, .4, .6; those of the AUC: .5, .55, .6, .7, .8
    assert there(accuracies, 0.3) == pytest.approx(dict(step=25, seconds=25, tokens=2500, auc_within=0.65))
    assert there(accuracies, 0.6)["step"] == pytest.approx(40)
    assert there(accuracies, 0.61)["seconds"] == np.inf and np.isnan(there(accuracies, 0.61)["auc_within"])
    # Later falls do not matter, one high evaluation is not enough.
    assert there([0.0, 0.3, 0.3, 0.0, 0.0], 0.15)["step"] == 10
    assert there([0.0, 0.0, 0.0, 0.5, 0.0], 0.3)["step"] == np.inf


def test_ratios_are_those_of_mean_curves_and_nothing_is_imputed():
    slow, low = [0.0, 0.3, 0.6, 0.6, 0.6], [0.0, 0.1, 0.1, 0.1, 0.1]
    runs = {
        "grpo_stock": {0: summary(slow, 2.0), 1: summary(slow, 8.0)},
        "grpo_fast": {0: summary(slow, 1.0), 1: summary(slow, 1.0)},
        "grpo_all": {0: summary(slow, 1.0), 1: summary(low, 1.0)},
        "capo_all": {0: summary(low, 1.0)},
        "capo_uniform": {0: summary(low, 1.0), 1: summary(low, 1.0)},  # reached in no draw of the seeds
    }
    rows = report.numbers_of(runs)
    assert rows["grpo_stock"]["seconds"].value == pytest.approx(200)  # 40 steps of 5 seconds
    fast = rows["grpo_fast"]["seconds_over_stock"]
    assert fast.value == pytest.approx(1 / 5) and (fast.low, fast.high) == pytest.approx((1 / 8, 1 / 2))
    assert rows["grpo_fast"]["step_over_stock"].value == pytest.approx(0.25)  # of 1/2 and 1/8, geometrically
    assert rows["grpo_fast"]["tokens_over_stock"].value == pytest.approx(1)
    mixed = rows["grpo_all"]["seconds_over_stock"]  # one seed of two is far below: so is the mean
    assert mixed.value == np.inf and mixed.low < 1 and mixed.high == np.inf
    assert rows["capo_all"]["seconds"].value == np.inf
    never = rows["capo_uniform"]
    assert never["seconds"].low == np.inf and np.isnan([never["auc_within"].low, never["auc_within"].high]).all()
    lines = report.to_markdown(
        rows, {"dates": ["today"], "hardware": ["this"], "versions": ["1"], "highest_load": 1.0}
    ).splitlines()
    assert "| `capo_all` | 1 | not reached |  |  |  |  |  |  |" in lines
    assert next(line for line in lines if line.startswith("| `grpo_stock` | 2 | 40 | 200.0 |"))


def test_a_start_as_good_as_the_end_is_no_target():
    with pytest.raises(SystemExit, match="grpo_stock ends no better than it began"):
        report.numbers_of({"grpo_stock": {3: summary([0.5, 0.5, 0.4], 1.0)}})


def test_runs_of_two_trainers_are_timed_and_counted_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CURVE", ("validation", 6, 4))
    monkeypatch.setattr(study, "FINAL", [("test_2", 4, 4)])
    args = argparse.Namespace(steps=2, device="cpu")
    small = dict(per_device_train_batch_size=32)
    found = {}
    for variant in ("grpo_stock", "grpo_fast"):
        path, options = tmp_path / f"{variant}-0.json", study.options_of(args, variant, 0) | small
        study.run(path, variant, options, {"steps": 2, "every": 1})
        assert study.is_done(path, options, {"steps": 2, "every": 1})
        found[variant] = json.loads(path.read_text())
    with pytest.raises(SystemExit, match="other options"):
        study.is_done(path, options, {"steps": 2, "every": 2})
    stock, fast = found.values()
    for run in found.values():
        first, *_, last = run["curve"]
        assert [point["step"] for point in run["curve"]] == [0, 1, 2]
        assert first["seconds"] == pytest.approx(0, abs=0.1) and first["tokens"] == 0
        assert last["seconds"] <= sum(run["parts"].values()) < run["run_seconds"] + 1
        assert last["completions"] == 64 and 0 < last["with_advantage"] < 64
        assert all(run["parts"][part] > 0 for part in ("generation", "rewards", "loss", "optimizer", "rest"))
    # Both draw the same completions: the fast step changes no parameter.
    assert [point["tokens"] for point in stock["curve"]] == [point["tokens"] for point in fast["curve"]]
    assert stock["curve"][-1]["with_advantage"] == fast["curve"][-1]["with_advantage"]
    assert stock["parts"]["passes"] == 0 < fast["parts"]["passes"]  # which calibration metrics need
