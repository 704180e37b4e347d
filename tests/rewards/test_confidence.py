"""Rewards for stated confidence: literal formulas, the papers' values, and training with TRL's own trainer."""

import math
import pickle
import random

import pytest
from trl import GRPOTrainer

from tests.helpers import tiny_trainer
from trl_capo import rewards
from trl_capo.errors import UserError
from trl_capo.preflight.rewards import load_reward_function


def given_grades(completions, grade, **kwargs):
    """A grader that returns the column `grade`."""
    return list(grade)


def said(confidence) -> str:
    return f"It is 7. <confidence>{confidence}</confidence>"


def literal_rewarding_doubt(c: float, q: float) -> float:
    p = 0.001 if q < 0.001 else 0.999 if q > 0.999 else q
    score = math.log(p) if c == 1 else math.log(1 - p)
    lowest = 0.5 * math.log(0.001)
    return 10 * (score - lowest) / (math.log(0.999) - lowest) + 2.5 * c


LITERAL = {
    "rlcr": lambda c, q: (1.0 if c == 1 else 0.0) - (q * q if c == 0 else (1 - q) * (1 - q)),
    "sayself": lambda c, q: 1 - 2 * (q * q if c == 0 else (1 - q) * (1 - q)),
    "rewarding_doubt": literal_rewarding_doubt,
}
MISSING = {"rlcr": -1.0, "sayself": -1.0, "rewarding_doubt": -30.0}


@pytest.mark.parametrize("name", LITERAL)
def test_each_reward_equals_its_literal_formula(name):
    generator = random.Random(0)
    rows = [(float(generator.random() < 0.5), round(generator.random(), 6)) for _ in range(200)]
    rows += [(c, q) for c in (0.0, 1.0) for q in (0.0, 0.5, 1.0)]
    reward = getattr(rewards, f"get_{name}_reward")(scale="unit", correctness=given_grades)
    found = reward([said(q) for _, q in rows], grade=[c for c, _ in rows])
    assert found == pytest.approx([LITERAL[name](c, q) for c, q in rows], abs=1e-6)


@pytest.mark.parametrize("name", LITERAL)
def test_no_confidence_and_no_grade(name):
    reward = getattr(rewards, f"get_{name}_reward")(correctness=given_grades)
    texts = ["7", said("sure"), said(1), said(1), "7"]
    found = reward(texts, grade=[1.0, 0.0, None, math.nan, None])
    assert found == [MISSING[name], MISSING[name], None, None, None]
    assert getattr(rewards, f"get_{name}_reward")(missing=-7, correctness=given_grades)(["7"], grade=[1.0]) == [-7]


@pytest.mark.parametrize(
    ("confidence", "right", "wrong"), [(0, -7.503, 10.0), (5, 10.495, 7.995), (8, 11.857, 5.342), (10, 12.5, -10.003)]
)
def test_values_of_rewarding_doubt(confidence, right, wrong):
    reward = rewards.get_rewarding_doubt_reward(correctness=given_grades)
    assert reward([said(confidence)] * 2, grade=[1.0, 0.0]) == pytest.approx([right, wrong], abs=5e-4)


@pytest.mark.parametrize(("c", "q", "expected"), [(1, 0.8, 0.92), (1, 0.5, 0.5), (0, 0.3, 0.82), (0, 0.8, -0.28)])
def test_values_of_sayself(c, q, expected):
    assert rewards.get_sayself_reward(correctness=given_grades)([said(q)], grade=[c]) == pytest.approx([expected])


def tabc(answer, confidence) -> str:
    tags = {"answer": f"\\boxed{{{answer}}}", "analysis": "hm", "confidence": confidence}
    return "so</think> " + " ".join(f"<{tag}>{content}</{tag}>" for tag, content in tags.items())


def test_released_parts_of_rlcr_with_the_real_grader():
    texts = [tabc(a, q) for a in (8, 7) for q in (0, 0.5, 1)] + [tabc(7, 50), r"\boxed{7}", r"\boxed{7}"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    solution = ["$7$"] * 8 + ["no gold $ here"]
    parts = [
        function(completions=completions, solution=solution)
        for function in (rewards.rlcr_format_reward, rewards.rlcr_accuracy_reward, rewards.rlcr_brier_reward)
    ]
    totals = [None if None in row else 0.5 * sum(row) for row in zip(*parts, strict=True)]
    assert totals == pytest.approx([1.0, 0.875, 0.5, 1.0, 1.375, 1.5, 1.375, 0.0, None])
    paper = rewards.rlcr_reward(completions=completions[:6], solution=solution[:6])
    assert [1 + 0.5 * reward for reward in paper] == pytest.approx(totals[:6])


NAMES = [
    "rlcr_reward",
    "sayself_reward",
    "rewarding_doubt_reward",
    "rlcr_format_reward",
    "rlcr_accuracy_reward",
    "rlcr_brier_reward",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_them(name):
    function = load_reward_function(name)
    assert function is getattr(rewards, name) and function.__name__ == name
    assert pickle.loads(pickle.dumps(function)).__name__ == name  # TRL's asynchronous trainers send it elsewhere


def test_options_are_checked():
    with pytest.raises(UserError, match="scale must be one of"):
        rewards.get_rlcr_reward(scale="five")
    with pytest.raises(UserError, match="missing must be a finite number, got nan"):
        rewards.get_rlcr_reward(missing=math.nan)
    with pytest.raises(UserError, match="Did you mean 'rlcr_reward'"):
        load_reward_function("rlrc_reward")


def test_trains_with_the_stock_trainer(tiny_model, tmp_path):
    calls = []

    def grade(completions, **kwargs):
        calls.append(completions)
        return [float(i % 2) for i in range(len(completions))]

    reward = rewards.get_rlcr_reward(correctness=grade)
    trainer = tiny_trainer(GRPOTrainer, tiny_model, tmp_path, reward, scale_rewards="none", max_steps=2)
    trainer.train()
    assert len(calls) == 2
    losses = [row["rewards/rlcr_reward/mean"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [-1.0, -1.0]  # a random model states nothing
