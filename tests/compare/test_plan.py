"""A plan is checked as a whole before anything runs."""

from pathlib import Path

import pytest

from tests.compare.plans import plan_for
from trl_capo import cli
from trl_capo.compare.plan import read_plan
from trl_capo.compare.runner import evaluation_options
from trl_capo.methods import METHODS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(baseline="none"), "baseline must be one of grpo, capo, broken"),
        (dict(extra=1), "must hold baseline, methods, train, benchmarks, seeds and may hold"),
        (dict(methods=dict(grpo=dict(method="ppo"))), "grpo needs a `method` of"),
        (dict(methods=dict(grpo=dict(method="grpo", tau=1))), "unknown key 'tau'. It is an option of capo"),
        (dict(methods=dict(grpo=None)), "grpo needs a `method` of"),
        (dict(seeds=[0, 0]), "no seed may be named twice"),
        (dict(benchmarks=["arithmetic_9"]), "there is no benchmark"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path, capsys, changes, message):
    assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_options_of_the_evaluation_are_refused(tmp_path, capsys):
    assert cli.main(["compare", plan_for(tmp_path, evaluate=dict(num_sample=4))]) == 2
    assert "--num_sample" in capsys.readouterr().err
    words = evaluation_options(["b"], dict(statistics=True, seed=1))
    assert words == ["--benchmark", "b", "--statistics", "--seed=1"]


def test_the_recipe_holds_every_method(repository):
    plan = read_plan(str(repository / "recipes" / "arithmetic" / "compare.yaml"))
    assert {options["method"] for options in plan.methods.values()} == set(METHODS)
    assert Path(plan.output_dir).parts[0] == "runs"
