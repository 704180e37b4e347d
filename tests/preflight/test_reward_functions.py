"""Reward functions by the names of a recipe, and functions that share a name."""

import re

import pytest

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer, rewards
from trl_capo.errors import UserError
from trl_capo.preflight.checks import find_correctness_reward
from trl_capo.preflight.rewards import load_reward_function


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules in the working directory, which is not on the path yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    texts = {
        "pf_good.py": "x = 3\ndef my_reward(completions, **kwargs):\n    return [1.0] * len(completions)\n",
        "pf_needs.py": "import no_such_dependency\n",
        "pf_fails.py": "x = 1 / 0\n",
        "pf_broken.py": "x = (\n",
        "pf_exits.py": "import sys\nsys.exit(0)\n",  # a script without `if __name__ == ...`
        "pf_package/__init__.py": "",
        "pf_package/inner.py": "def reward(completions, **kwargs):\n    return [0.0]\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_functions_are_found(modules):
    assert load_reward_function("accuracy_reward") is rewards.accuracy_reward
    assert load_reward_function("think_format_reward").__module__.startswith("trl.rewards")
    assert load_reward_function("pf_good.my_reward")(["a", "b"]) == [1.0, 1.0]
    assert load_reward_function("pf_package.inner.reward")([]) == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "acuracy_reward",
            "'acuracy_reward' is not in trl.rewards or trl_capo.rewards. Did you mean 'accuracy_reward'?",
        ),
        ("get_soft_overlong_punishment", "returns a reward function but is not one"),
        ("pf_good.my_rewrd", "pf_good.py has no 'my_rewrd'. Did you mean 'my_reward'?"),
        ("pf_good.x", "'x' in .*pf_good.py must be a function, got int"),
        ("pf_god.my_reward", "nor is there a file .*pf_god.py. Did you mean 'pf_good'?"),
        ("my.module.fn", "needs a module 'my', which is not installed; nor is there a file .*my/module.py"),
        ("pf_package.iner.reward", "needs a module 'pf_package.iner'.*Did you mean 'inner'?"),
        ("pf_needs.reward", "importing 'pf_needs' failed: No module named 'no_such_dependency'"),
        (
            "pf_fails.reward",
            r"importing 'pf_fails' failed: ZeroDivisionError: division by zero \(.*pf_fails.py, line 1",
        ),
        ("pf_exits.reward", r"importing 'pf_exits' failed: SystemExit: 0 \(.*pf_exits.py, line 2"),
        ("pf_broken.reward", r"importing 'pf_broken' failed: SyntaxError: .*pf_broken.py, line 1"),
    ],
)
def test_what_is_missing_is_said_in_one_line(modules, name, message):
    with pytest.raises(UserError, match=message) as caught:
        load_reward_function(name)
    assert str(caught.value).startswith("reward_funcs: ") and "\n" not in str(caught.value)


def make(kind: str):
    def reward(completion_ids, **kwargs):
        return [float(len(ids) > 3 if kind == "length" else sum(ids) % 2 == 0) for ids in completion_ids]

    return reward


def test_a_correctness_reward_that_names_two_is_refused(tmp_path):
    functions = [make("length"), make("correct"), parity_reward]
    args = CAPOConfig(**config_kwargs(tmp_path, correctness_reward="reward"))
    with pytest.raises(UserError, match=re.escape("is the name of 2 reward functions. Give each its own name")):
        CAPOTrainer("/no/such/model", functions, args, prompt_dataset())
    assert find_correctness_reward(["reward", "reward", "parity"], "parity") == 2


def test_functions_that_share_a_name_are_warned_of(tiny_model, tmp_path):
    """TRL logs them as one; where another decides what is correct, or nothing does, they may train."""
    functions = [make("length"), make("correct"), parity_reward]
    args = CAPOConfig(**config_kwargs(tmp_path, correctness_reward="parity_reward", ref_ppl_mask=False))
    with pytest.warns(UserWarning, match="2 reward functions are named 'reward', so TRL logs them as one"):
        trainer = CAPOTrainer(tiny_model, functions, args, prompt_dataset())
    trainer.train()
    assert trainer._correctness_index == 2
    args = GroupAdvantageConfig(**config_kwargs(tmp_path, log_completions=True))
    with pytest.warns(UserWarning, match="2 reward functions are named 'reward'"):
        GroupAdvantageTrainer(tiny_model, functions[:2], args, prompt_dataset()).train()
