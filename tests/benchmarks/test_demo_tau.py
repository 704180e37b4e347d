"""Tau of the demo: the plan that chooses it has the demo's options, and the demo has what was chosen."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import demo_tau

from trl_capo.compare.demo import OWN, demo_plan
from trl_capo.compare.plan import read_plan


def test_the_plan_is_the_demo_at_several_tau(repository):
    plan, demo = read_plan(str(repository / "benchmarks" / "demo_tau.yaml")), demo_plan(Path("demo"), 80, 0, 400, 16)
    assert (plan.train, plan.methods["grpo"]) == (demo.train, demo.methods["grpo"]) and 0 not in plan.seeds
    assert plan.methods[f"capo_tau_{OWN['capo']['tau']}"] == demo.methods["capo"]
    assert plan.benchmarks == ["arithmetic_validation"] and plan.evaluate.items() >= {"max_new_tokens": 56}.items()


def test_the_demo_has_the_tau_that_the_rule_chooses(repository):
    """From the committed means over seeds."""
    runs = json.loads((repository / "benchmarks" / "results" / "demo_tau.json").read_text())
    rows = []
    for tau in dict.fromkeys(run["tau"] for run in runs):
        of_tau = [run for run in runs if run["tau"] == tau]
        means = {name: sum(run[name] for run in of_tau) / len(of_tau) for name in ("accuracy", "auc_within")}
        rows.append({"method": "grpo" if tau is None else f"capo_tau_{tau}", **means})
    assert demo_tau.chosen(rows)["method"] == f"capo_tau_{OWN['capo']['tau']}"
