"""What was tuned is what is compared. In a file of its own: the study's tests shrink the study."""

import sys
from pathlib import Path

import numpy as np
import yaml


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import arithmetic_evidence as evidence
import arithmetic_study as study


def test_the_comparison_has_the_settings_that_were_chosen(repository):
    """Those of the tuning, run with the same options: what was tuned is what is compared."""
    plan = yaml.safe_load((repository / "recipes" / "arithmetic" / "compare.yaml").read_text())
    chosen = evidence.chosen_alike("slips")
    grpo, capo = evidence.chosen_settings("slips")
    assert capo == chosen["capo"]
    settings = chosen | {"grpo": grpo, "grpo_by_auc": chosen["grpo"]}
    assert set(plan["methods"]) == {*settings, "capo_simko"}
    for name, setting in settings.items():
        tuned = study.options_of("slips", setting, 0, tune=True)
        recipe = plan["train"] | plan["methods"][name]
        ours = {"seed", "disable_tqdm", "logging_steps", "save_strategy", "save_steps", "save_total_limit"}
        if name == "capo":  # it has no use for it
            ours.add("scale_rewards")
        assert {key: recipe.get(key) for key in tuned if key not in ours} == {
            key: value for key, value in tuned.items() if key not in ours
        }, name
        assert recipe["method"] == study.TUNING["slips"][setting][0]
        assert set(plan["methods"][name]) - {"method"} - ours <= set(study.TUNING["slips"][setting][1])
    loss = {name: value for name, value in plan["methods"]["simko"].items() if name.startswith("simko_")}
    assert plan["methods"]["capo_simko"] == plan["methods"]["capo"] | loss | {"method": "capo_simko"}


def test_the_seeds_that_were_added_are_told_apart(repository):
    """Differences of means, by loops over the committed numbers."""
    runs = np.load(repository / "benchmarks" / "results" / "compare" / "comparison.npz")
    rows = [line.split(" | ") for line in evidence.looks_table(num_resamples=50).splitlines()[2:]]
    assert len(rows) == 7

    def mean(method, seeds):
        splits = ("arithmetic_test_2", "arithmetic_test_3", "arithmetic_test_4")
        of_runs = [[np.nanmean(runs[f"{method}-{seed}/{split}/auc_within"]) for seed in seeds] for split in splits]
        return np.mean(of_runs)

    for name, *cells in rows:
        for cell, seeds in zip(cells, ([20, 21, 22, 23, 24], [25, 26, 27, 28, 29]), strict=True):
            assert abs(float(cell.split(" ")[0]) - (mean(name[2:], seeds) - mean("capo", seeds))) <= 5.1e-4
