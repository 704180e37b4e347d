"""A live CAPO step against literal oracles, and the options of `CAPOConfig` that shape its advantages."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import length_reward, literal_advantages_of_groups, logged, parity_reward, unpadded_rows
from tests.methods.capo_runs import make_trainer, policy_logps, strong_lora


LAYOUTS = {
    "on-policy": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "two updates a generation": {"steps_per_generation": 2, "max_steps": 4, "per_device_train_batch_size": 4},
    "paper": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
    },
    "peft": {},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 8},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_step_matches_literal_oracle(tiny_model, tmp_path, layout):
    options = {"max_steps": 2, "ref_ppl_mask": False, **LAYOUTS[layout]}
    lora = strong_lora() if layout == "peft" else None
    trainer = make_trainer(tiny_model, tmp_path, peft_config=lora, **options)
    trainer.train()

    seen_nonzero = False
    for generation in trainer.generations:
        groups, advantages = generation["groups"], generation["advantages"]
        if layout == "evaluation" and not generation["training"]:
            assert groups.rewards.shape[1] == 8
        expected_logps = torch.tensor(policy_logps(trainer, generation, tiny_model), dtype=torch.double)
        expected_logps = expected_logps.view(groups.rewards.shape)
        scored = (groups.mixed if generation["training"] else groups.valid).expand_as(groups.valid)
        np.testing.assert_allclose(groups.mean_logps[scored], expected_logps[scored], atol=1e-4)
        assert groups.mean_logps[~scored].isnan().all(), "the policy ran on rows that cannot matter"
        rewards = [float(sum(completion) % 2 == 0) for _, completion in unpadded_rows(generation["batch"])]
        np.testing.assert_array_equal(groups.correct.flatten().numpy(), rewards)
        for own_logps, scores, target in ((False, expected_logps, 1e-4), (True, groups.mean_logps, 1e-5)):
            literal = literal_advantages_of_groups(groups.correct, scores)
            error = np.abs(advantages.numpy() - literal).max()
            # With the oracle's own log-probs, errors of at most 1e-4 in a score move a sum over 3 partners by less.
            assert error < target, (own_logps, error)
        torch.testing.assert_close(generation["batch"]["advantages"], advantages.flatten())
        seen_nonzero |= bool((advantages != 0).any())
    assert seen_nonzero
    if layout == "evaluation":
        assert any(not generation["training"] for generation in trainer.generations)


def test_pair_scope_batch(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, pair_scope="batch", ref_ppl_mask=False, per_device_train_batch_size=16
    )
    trainer.train()
    groups, advantages = trainer.generations[0]["groups"], trainer.generations[0]["advantages"]
    num_prompts, num_generations = groups.rewards.shape
    rewards, scores = groups.correct.flatten().tolist(), groups.mean_logps.flatten().tolist()
    for i in range(len(rewards)):
        own, other = 0.0, 0.0
        for j in range(len(rewards)):
            gap = rewards[i] - rewards[j]
            weight = gap / (1 + math.exp((scores[i] - scores[j]) * gap / 0.6))
            if i // num_generations == j // num_generations:
                own += weight
            else:
                other += weight / num_prompts
        assert advantages.flatten()[i].item() == pytest.approx(own + other, abs=1e-5)
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-5)


def test_graded_rewards(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=length_reward, graded_rewards=True, ref_ppl_mask=False, max_steps=3
    )
    trainer.train()
    grades = set()
    for generation in trainer.generations:
        groups = generation["groups"]
        graded = groups.rewards_per_func[..., 0]
        grades |= set(graded.flatten().tolist())
        literal = literal_advantages_of_groups(graded, groups.mean_logps)
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
    assert len(grades) > 2


def test_graded_rewards_outside_the_unit_interval(tiny_model, tmp_path):
    def points(completion_ids, **kwargs):
        return [3.0 for _ in completion_ids]

    trainer = make_trainer(tiny_model, tmp_path, reward_funcs=points, graded_rewards=True)
    with pytest.raises(ValueError, match=r"rewards in \[0, 1\], but 'points' returned 3"):
        trainer.train()


@pytest.mark.parametrize("mode", ["add", "ignore"])
def test_auxiliary_rewards(tiny_model, tmp_path, mode):
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        reward_funcs=[length_reward, parity_reward],
        correctness_reward="parity_reward",
        reward_weights=[0.25, 5.0],
        auxiliary_rewards=mode,
        ref_ppl_mask=False,
        max_steps=3,
    )
    trainer.train()
    assert len(trainer.generations) == 3
    for generation in trainer.generations:
        groups = generation["groups"]
        expected = literal_advantages_of_groups(groups.correct, groups.mean_logps)
        if mode == "add":
            other = groups.rewards_per_func[..., 0].double().numpy()
            expected = expected + 0.25 * (other - other.mean(axis=1, keepdims=True))
        np.testing.assert_allclose(generation["advantages"].numpy(), expected, atol=1e-5)


def test_unscorable_and_truncated_completions_take_part_in_nothing(tiny_model, tmp_path):
    def sometimes(completion_ids, **kwargs):
        return [None if i % 4 == 0 else float(sum(ids) % 2 == 0) for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=sometimes, mask_truncated_completions=True, ref_ppl_mask=False, max_steps=4
    )
    trainer.train()
    truncated = 0
    for generation in trainer.generations:
        groups = generation["groups"]
        assert groups.correct[:, 0].isnan().all()
        assert torch.equal(groups.mean_logps.isfinite(), groups.mixed & groups.valid)
        truncated += int((groups.lengths == 0).sum())
        assert not groups.valid[groups.lengths == 0].any()
        literal = literal_advantages_of_groups(groups.correct, groups.mean_logps)
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
        assert (generation["advantages"][~groups.valid] == 0).all()
    assert truncated > 0
    unscorable = logged(trainer, "capo/frac_unscorable")
    assert len(unscorable) == 4 and all(0.25 <= value <= 1 for value in unscorable)


def test_options_reach_the_formula(tiny_model, tmp_path):
    """A threshold, a normalisation and a scale that differ from the defaults."""
    options = dict(correct_threshold=0.75, pair_normalization="opposite_mean", scale_by_tau=True, tau=0.3)
    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=quarter_reward, ref_ppl_mask=False, max_steps=3, **options
    )
    trainer.train()
    nonzero = 0
    for generation in trainer.generations:
        groups = generation["groups"]
        labels = (groups.rewards_per_func[..., 0] >= 0.75).float()
        torch.testing.assert_close(groups.correct, labels)
        opposite = np.array([[sum(other != own for other in row) for own in row] for row in labels.tolist()])
        sums = literal_advantages_of_groups(labels, groups.mean_logps, tau=0.3)
        expected = sums / np.maximum(opposite, 1) / 0.3
        np.testing.assert_allclose(generation["advantages"].numpy(), expected, atol=1e-4)
        nonzero += np.any(sums)
    assert nonzero > 0


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("normalization", ["sum", "group", "opposite_mean"])
def test_a_share_of_the_advantages_ignores_confidence(tiny_model, tmp_path, normalization, share):
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        tau=0.3,
        reward_only_share=share,
        pair_normalization=normalization,
        scale_by_tau=True,
        ref_ppl_mask=False,
    )
    trainer.train()
    assert any(generation["advantages"].abs().sum() > 0 for generation in trainer.generations)
    for generation in trainer.generations:
        labels, scores = generation["groups"].correct, generation["groups"].mean_logps
        capo = literal_advantages_of_groups(labels, scores, 0.3) / 0.3
        members = labels.shape[1]
        linear = np.array(labels - labels.mean(dim=1, keepdim=True)) * members / 2 / 0.3  # every pair weighs a half
        right = np.array(labels.sum(dim=1, keepdim=True))
        opposite = np.where(np.array(labels) == 1, members - right, right)
        divisor = {"sum": 1, "group": members, "opposite_mean": np.maximum(opposite, 1)}[normalization]
        expected = ((1 - share) * capo + share * linear) / divisor
        np.testing.assert_allclose(generation["advantages"].numpy(), expected, atol=1e-5)


def quarter_reward(completion_ids, **kwargs) -> list[float]:
    return [(sum(ids) % 5) / 4 for ids in completion_ids]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_generation": 2},
        {"steps_per_generation": 2, "repack": False},
        {"steps_per_generation": 2, "loss_type": "bnpo"},
        {"steps_per_generation": 2, "beta": 0.01},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:loss_type='bnpo'")
def test_scores_are_without_dropout(tiny_model, tmp_path, options):
    """Whoever computes them: with two updates a generation, some settings let TRL."""
    lora = strong_lora(lora_dropout=0.5)
    trainer = make_trainer(tiny_model, tmp_path, peft_config=lora, ref_ppl_mask=False, **options)
    trainer.train()
    generation = trainer.generations[0]
    expected = policy_logps(trainer, generation, tiny_model)
    assert trainer.model.training
    np.testing.assert_allclose(generation["groups"].mean_logps.flatten().numpy(), expected, atol=1e-4)
