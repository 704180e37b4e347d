"""RLSR: the vectors, the area under the risk-coverage curve by scikit-learn's rules, loops, and a training."""

import numpy as np
import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import random_groups
from trl_capo.methods.rlsr import RLSRTrainer, rank_weights


def test_known_vectors():
    weights = rank_weights(torch.tensor([-0.1, -0.2, -0.3, -0.4]))
    assert weights.tolist() == pytest.approx([2.083333, 1.083333, 0.583333, 0.25], abs=1e-6)
    assert (weights * torch.tensor([0.0, 1, 0, 1])).mean().item() == pytest.approx(0.333333, abs=1e-6)


def test_weighted_errors_are_the_area_under_the_risk_coverage_curve():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        confidence, errors = rng.permutation(n).astype(float), rng.integers(0, 2, n)
        by_falling = errors[np.argsort(-confidence)]
        risks = [by_falling[: k + 1].mean() for k in range(n)]  # of the k + 1 surest answers
        weights = rank_weights(torch.tensor(confidence))
        assert (weights.numpy() * errors).mean() == pytest.approx(np.mean(risks), abs=1e-9)
        assert weights.mean().item() == pytest.approx(1.0)


def test_ties_share_the_mean_of_all_orders():
    confidence = torch.tensor([0.5, 0.5, 0.9, 0.5], dtype=torch.float64)
    n = len(confidence)
    harmonic = [sum(1 / k for k in range(rank, n + 1)) for rank in range(1, n + 1)]
    shared = sum(harmonic[1:]) / 3
    assert rank_weights(confidence).tolist() == pytest.approx([shared, shared, harmonic[0], shared])


def test_random_groups_by_loops(tiny_model, tmp_path):
    groups = random_groups()
    found = tiny_trainer(RLSRTrainer, tiny_model, tmp_path)._compute_advantages(groups)
    answers = [(p, i) for p in range(60) for i in range(5) if groups.valid[p, i]]
    n = len(answers)
    suffix = [0.0] * (n + 2)
    for rank in range(n, 0, -1):
        suffix[rank] = suffix[rank + 1] + 1 / rank
    rewards = {}
    for at in answers:
        surer = sum(groups.mean_logps[other] > groups.mean_logps[at] for other in answers).item()
        ties = sum(groups.mean_logps[other] == groups.mean_logps[at] for other in answers).item()
        weight = sum(suffix[surer + 1 + k] for k in range(ties)) / ties
        rewards[at] = weight if groups.correct[at] == 1 else -weight
    for p, row in enumerate(found.tolist()):
        members = [i for i in range(5) if (p, i) in rewards]
        mean = sum(rewards[p, i] for i in members) / max(1, len(members))
        expected = [rewards[p, i] - mean if i in members else 0.0 for i in range(5)]
        assert row == pytest.approx(expected, abs=1e-5)


def test_training_moves_the_weights(tiny_model, tmp_path):
    trainer = tiny_trainer(RLSRTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16))
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert (trainer.model.model.norm.weight != before).any()
