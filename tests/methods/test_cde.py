"""CDE: rewards with bonus by hand and by loops, the schedules, and a training."""

import math

import pytest
import torch

from tests.helpers import length_reward, parity_reward, prompt_dataset, tiny_trainer
from tests.methods.batches import make_groups
from trl_capo.methods.cde import CDEConfig, CDETrainer, bonus_weight, curious_rewards


LOGPS = torch.tensor([[-0.2, -0.5, -0.4, -0.1]])


def make_trainer(tiny_model, tmp_path, **options):
    return tiny_trainer(CDETrainer, tiny_model, tmp_path, dataset=prompt_dataset(16), **options)


def test_published_vector(tiny_model, tmp_path):
    found = curious_rewards(torch.tensor([[1.0, 1, -1, -1]]), LOGPS, omega=1.0)
    assert found[0].tolist() == pytest.approx([1.2, 1 + 1 / 3, -2 / 3, -0.9])
    groups = make_groups(torch.tensor([[1.0, 1, 0, 0]]), LOGPS, torch.ones(1, 4, dtype=torch.bool))
    advantages = make_trainer(tiny_model, tmp_path)._compute_advantages(groups)[0].tolist()
    assert advantages == pytest.approx([0.806174, 0.918338, -0.764113, -0.960399], abs=1e-4)


def test_random_groups_by_loops(tiny_model, tmp_path):
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(100, 5, generator=generator) < 0.5).float()
    rewards[::9, 1] = torch.nan
    valid = torch.rand(100, 5, generator=generator) < 0.9
    logps = -torch.rand(100, 5, generator=generator)
    groups = make_groups(rewards, logps.masked_fill(~valid, torch.nan), valid)
    trainer = make_trainer(tiny_model, tmp_path, bonus_weight=0.7, bonus_scale=0.5, bonus_cap=2.0)
    found = trainer._compute_advantages(groups)
    for p in range(100):
        members = [i for i in range(5) if groups.valid[p, i]]
        signed = {i: 2 * rewards[p, i].item() - 1 for i in members}
        new = {i: r + 0.7 * min(abs(r) / 2.0, 0.5 * -logps[p, i].item()) for i, r in signed.items()}
        mean = sum(new.values()) / max(1, len(new))
        std = math.sqrt(sum((r - mean) ** 2 for r in new.values()) / (len(new) - 1)) if len(new) > 1 else 0.0
        expected = [(new[i] - mean) / (std + 1e-4) if i in new else 0.0 for i in range(5)]
        assert found[p].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_bonus_never_changes_a_sign_and_prefers_the_unsure():
    rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    logps = torch.tensor([[-5.0, -0.01, -5.0, -0.01]])
    found = curious_rewards(rewards, logps, omega=1.0)[0]
    assert (found.sign() == rewards[0]).all() and found[0] > found[1] and found[2] > found[3]


def test_schedules_start_and_end_where_they_should():
    for schedule in ("linear", "cosine", "staircase"):
        assert bonus_weight(0.0, schedule, 0.8, 0.2) == pytest.approx(0.8)
        assert bonus_weight(1.0, schedule, 0.8, 0.2) == pytest.approx(0.2)
    assert bonus_weight(0.5, "linear", 1.0, 0.0) == bonus_weight(0.5, "constant", 0.5, 0.0) == 0.5
    assert bonus_weight(0.25, "cosine", 1.0, 0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    stairs = {round(bonus_weight(p / 100, "staircase", 1.0, 0.0, 4), 9) for p in range(101)}
    assert stairs == {1.0, round(2 / 3, 9), round(1 / 3, 9), 0.0}
    assert [bonus_weight(p, "staircase", 0.8, 0.0, 2) for p in (0.0, 0.49, 0.5, 1.0)] == [0.8, 0.8, 0.0, 0.0]


def test_the_bonus_decays_while_training(tiny_model, tmp_path, monkeypatch):
    from trl_capo.methods import cde

    omegas = []
    original = cde.curious_rewards
    monkeypatch.setattr(
        cde, "curious_rewards", lambda r, s, omega, *a: omegas.append(omega) or original(r, s, omega, *a)
    )
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4, bonus_schedule="linear")
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert omegas == [1.0, 0.75, 0.5, 0.25]
    assert (trainer.model.model.norm.weight != before).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bonus_schedule="steps"), "bonus_schedule must be one of"),
        (dict(bonus_stairs=1), "bonus_stairs must be at least 2"),
        (dict(bonus_weight=3.0), "can outweigh its reward"),
        (dict(bonus_weight_end=-2.0), "must be >= 0 and less than bonus_cap=3.0"),
        (dict(bonus_scale=-1.0), "bonus_scale must be at least 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CDEConfig(str(tmp_path), **options)


def test_a_sum_of_rewards_is_neither_0_and_1_nor_signed(tiny_model, tmp_path):
    options = dict(reward=[parity_reward, length_reward], correctness_reward="parity_reward")
    with pytest.raises(ValueError, match="Keep one reward function with weight 1, or make the sums positive"):
        make_trainer(tiny_model, tmp_path, **options)
    make_trainer(tiny_model, tmp_path, signed_rewards=True, **options)


def test_a_weighted_reward_is_neither_0_and_1_nor_signed(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="a weighted reward .* Keep one reward function with weight 1"):
        make_trainer(tiny_model, tmp_path, reward_weights=[2.0])
    make_trainer(tiny_model, tmp_path, reward_weights=[1.0])
    make_trainer(tiny_model, tmp_path, reward_weights=[2.0], signed_rewards=True)


def test_signed_sums_need_no_label(tiny_model, tmp_path):
    make_trainer(tiny_model, tmp_path, reward=[parity_reward, length_reward], signed_rewards=True)
