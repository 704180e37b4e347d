"""The example of docs/your_method.md, as a reader uses it: a file of one's own, named on the command line."""

import json
import math
import re
import shlex
import sys

import pytest
import torch
import yaml

from trl_capo import RolloutGroups, cli
from trl_capo.compare.plan import read_plan
from trl_capo.errors import UserError
from trl_capo.methods import trainer_of


METHOD = "leave_one_out:LeaveOneOutTrainer"
FEW = ["--per_device_train_batch_size", "16", "--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture
def page(repository) -> str:
    return (repository / "docs" / "your_method.md").read_text()


@pytest.fixture
def folder(page, tmp_path, monkeypatch):
    """The working directory of a reader who saved the example."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "leave_one_out", raising=False)
    (tmp_path / "leave_one_out.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1))
    return tmp_path


@pytest.fixture
def command(page) -> list[str]:
    """The page's command without `trl-capo`, and cut short."""
    text = re.search(r"```bash\n(trl-capo train .*?)```", page, re.DOTALL).group(1)
    assert METHOD in text
    return [*shlex.split(text.replace("\\\n", " "))[1:], *FEW]


def test_it_trains_and_its_recipe_repeats_the_run(folder, command, capsys):
    assert cli.main(command) == 0
    assert "✅ Training completed." in capsys.readouterr().out
    run = folder / "runs" / "rloo"
    assert "RLOO" in (run / "README.md").read_text()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["advantage_scale"]) == (METHOD, 0.5)
    weights = (run / "model.safetensors").read_bytes()
    (run / "recipe.yaml").rename(folder / "recipe.yaml")
    assert cli.main(["train", "--config", "recipe.yaml", "--output_dir", "runs/again"]) == 0
    assert (folder / "runs" / "again" / "model.safetensors").read_bytes() == weights
    assert json.loads((folder / "runs" / "again" / "reproduction.json").read_text())["world_size"] == 1


def test_dry_run(folder, command, capsys):
    assert cli.main([*command, "--dry-run"]) == 0
    assert "Training: 2 optimizer steps = 2 rollout batches" in capsys.readouterr().out
    assert not (folder / "runs").exists()


def test_help_shows_its_options(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--method", METHOD, "--help"])
    assert "--advantage_scale" in capsys.readouterr().out


def test_its_advantages_are_those_of_its_formula(folder):
    """Rewards 1, 0, 0 beside one that cannot be scored; and a group with one valid completion."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, math.nan], [1.0, math.nan, math.nan, math.nan]])
    valid, unused = rewards.isfinite(), torch.zeros(2, 4)
    groups = RolloutGroups(rewards, rewards[..., None], rewards, unused, unused, valid=valid, kept=valid)
    trainer_class = trainer_of(METHOD)
    trainer = trainer_class.__new__(trainer_class)
    trainer.args = trainer_class.config_class("unused", advantage_scale=2.0, use_cpu=True, bf16=False)
    expected = torch.tensor([[2.0, -1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(trainer._compute_advantages(groups), expected)


def write_mistakes(folder) -> None:
    (folder / "mistakes.py").write_text(
        "from trl_capo import GroupAdvantageTrainer\n\n\nfactor = 3\n\n\n"
        "class Plain:\n    pass\n\n\nclass NoOptions(GroupAdvantageTrainer):\n    config_class = None\n"
    )
    (folder / "broken.py").write_text("factor = 1 / 0\n")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("leave_one_ot:LeaveOneOutTrainer", "nor is there a file .*leave_one_ot.py. Did you mean 'leave_one_out'?"),
        (
            "leave_one_out:LeaveOneTrainer",
            "leave_one_out.py has no 'LeaveOneTrainer'. Did you mean 'LeaveOneOutTrainer'?",
        ),
        ("leave_one_out", "method must be one of capo, .*, or package.module:Trainer, got 'leave_one_out'"),
        (":LeaveOneOutTrainer", "method must be one of capo"),
        ("broken:Trainer", "importing 'broken' failed: ZeroDivisionError: division by zero .*broken.py, line 1"),
        ("mistakes:factor", "'mistakes:factor' is not a trainer: derive it from trl_capo.GroupAdvantageTrainer"),
        ("mistakes:Plain", "is not a trainer"),
        ("mistakes:NoOptions", "has no config_class: set it to a dataclass derived from"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, command, capsys, method, message):
    write_mistakes(folder)
    assert cli.main([*command, "--method", method]) == 2
    error = capsys.readouterr().err
    assert re.match(f"trl-capo train: error: .*{message}", error) and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--advantage_scal", "2"], "unknown option --advantage_scal. Did you mean '--advantage_scale'?"),
        (["--advantage_scale", "much"], "--advantage_scale must be a number, got 'much'."),
        (["--tau", "0.5"], f"unknown option --tau. It is an option of capo, not of {METHOD}."),
    ],
)
def test_its_options_are_checked(folder, command, capsys, option, message):
    assert cli.main([*command, *option]) == 2
    assert message in capsys.readouterr().err


def plan(folder, **options) -> str:
    methods = {"rloo": {"method": METHOD, **options}, "grpo": {"method": "grpo"}}
    train = {"model_name_or_path": "arithmetic-base", "dataset_name": "arithmetic"}
    content = dict(baseline="grpo", methods=methods, train=train, benchmarks=["arithmetic_test_2"], seeds=[0])
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "plan.yaml")


def test_it_stands_in_the_plan_of_a_comparison(folder):
    assert read_plan(plan(folder, advantage_scale=0.5)).methods["rloo"]["method"] == METHOD
    for options, message in (
        (dict(advantage_scal=1), "plan.yaml, rloo: unknown key 'advantage_scal'. Did you mean 'advantage_scale'?"),
        (dict(method="leave_one_out:Leave"), "plan.yaml, rloo: method: .*leave_one_out.py has no 'Leave'"),
    ):
        with pytest.raises(UserError, match=message):
            read_plan(plan(folder, **options))
