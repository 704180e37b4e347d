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
        (dict(extra=1), "must have the keys baseline, methods, train, benchmarks, seeds, may have"),
        (dict(methods=dict(grpo=dict(method="ppo"))), "grpo needs a `method`, one of"),
        (dict(methods=dict(grpo=dict(method="grpo", tau=1))), "unknown key 'tau'. It is an option of capo"),
        (dict(methods=dict(grpo=None)), "grpo needs a `method`, one of"),
        (dict(seeds=[0, 0]), "seed 0 appears twice"),
        *((dict(seeds=[seed]), f"from 0 to 4294967295, got {seed!r}") for seed in (-1, "1", 1.5, True, None, 2**32)),
        (dict(seeds=[]), "seeds must be a list of whole numbers, got []"),
        (dict(seeds=3), "seeds must be a list of whole numbers, got 3"),
        *(
            (dict(baseline=name, methods={name: dict(method="grpo")}), "becomes the name of a file or folder")
            for name in ("../x", "..", "/x", "", "a/b", "a\\b", ".x", "-x", "NUL", "a\nb", "x" * 300, 5)
        ),
        (dict(methods=dict(grpo=dict(method="grpo"), GRPO=dict(method="grpo"))), "'grpo' and 'GRPO' become the same"),
        (dict(baseline="Base", methods=dict(Base=dict(method="grpo"))), "No method may be called 'base'"),
        (dict(methods=dict(grpo=dict(method="grpo", seed=1))), "seed comes from the seeds"),
        (dict(methods=dict(grpo=dict(method="grpo", env=dict(LD_PRELOAD="x")))), "env may not set 'LD_PRELOAD'"),
        (dict(output_dir=""), "output_dir must be the path of a folder, got ''"),
        (dict(evaluate=dict(output_dir="x")), "output_dir comes from the plan itself"),
        (dict(evaluate=dict(temperature=-1)), "must be positive, got -1.0"),
        (dict(benchmarks=["arithmetic_9"]), "unknown benchmark"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path, capsys, changes, message):
    assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_plan_are_named_at_once(tmp_path, capsys):
    methods = {"a/b": dict(method="grpo"), "x": dict(method="capo", tau="high")}
    assert cli.main(["compare", plan_for(tmp_path, baseline="x", seeds=[-1, "2"], methods=methods)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("trl-capo compare: error: ") for line in lines)
    for wanted in ("'a/b' contains '/'", "got -1", "got '2'", "tau must be a number, got 'high'"):
        assert sum(wanted in line for line in lines) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(methods=dict(grpo=dict(method="grpo", hub_token="geheim77"))), "methods.grpo.hub_token"),
        (dict(methods=dict(grpo=dict(method="grpo", model_init_kwargs='{"token": "geheim77"}'))), "model_init_kwargs"),
        (dict(evaluate=dict(system_prompt="https://me:geheim77@example.com/x")), "evaluate.system_prompt"),
    ],
)
def test_secrets_are_refused(tmp_path, capsys, changes, name):
    """Every run's recipe would repeat them; the message does not."""
    assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err
    assert f"{name} is or contains a secret" in error and "geheim77" not in error
    assert not (tmp_path / "out").exists()


def test_unknown_options_of_the_evaluation_are_refused(tmp_path, capsys):
    assert cli.main(["compare", plan_for(tmp_path, evaluate=dict(num_sample=4))]) == 2
    assert "--num_sample" in capsys.readouterr().err
    words = evaluation_options(["b"], dict(statistics=True, seed=1))
    assert words == ["--benchmark", "b", "--statistics", "--seed=1"]


@pytest.mark.filterwarnings("error:.*gold answers")
def test_benchmarks_are_read_as_the_evaluation_reads_them(tmp_path, monkeypatch, capsys):
    """A file with other columns, whose answers are words that math-verify cannot read."""
    monkeypatch.chdir(tmp_path)
    Path("words.jsonl").write_text('{"question": "Is 2 even?", "gold": "Yes"}')
    evaluate = dict(prompt_column="question", solution_column="gold", text_answers=True)
    plan = read_plan(plan_for(tmp_path, benchmarks=["words.jsonl"], evaluate=evaluate))
    assert plan.evaluate == evaluate
    assert cli.main(["compare", plan_for(tmp_path, benchmarks=["words.jsonl"])]) == 2
    assert "words.jsonl has no column" in capsys.readouterr().err


def test_the_recipe_holds_the_papers_rivals(repository):
    plan = read_plan(str(repository / "recipes" / "arithmetic" / "compare.yaml"))
    rivals = {"grpo", "gspo", "codapo", "cde", "simko"}
    assert {options["method"] for options in plan.methods.values()} == {"capo", "capo_simko", *rivals} <= set(METHODS)
    assert Path(plan.output_dir).parts[0] == "runs"
