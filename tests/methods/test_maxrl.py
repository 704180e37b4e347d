"""MaxRL: the vector, loops, and a training."""

import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import random_groups
from trl_capo.methods.maxrl import MaxRLTrainer, mean_scaled_advantages


def test_known_vector():
    assert mean_scaled_advantages(torch.tensor([[1.0, 0, 0, 0]])).tolist() == [[3.0, -1.0, -1.0, -1.0]]


def test_random_groups_by_loops(tiny_model, tmp_path):
    groups = random_groups()
    found = tiny_trainer(MaxRLTrainer, tiny_model, tmp_path)._compute_advantages(groups)
    for labels, valid, row in zip(groups.correct.tolist(), groups.valid.tolist(), found.tolist(), strict=True):
        members = [label for label, ok in zip(labels, valid, strict=True) if ok]
        solved = sum(members)
        expected = [
            label * len(members) / solved - 1 if ok and solved else 0.0
            for label, ok in zip(labels, valid, strict=True)
        ]
        assert row == pytest.approx(expected, abs=1e-6)


def test_training_moves_the_weights(tiny_model, tmp_path):
    trainer = tiny_trainer(MaxRLTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16))
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert (trainer.model.model.norm.weight != before).any()
