"""C2GSPG: the vector, loops, autograd on the cross-entropy, and a training."""

import math

import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import random_groups
from trl_capo.methods.c2gspg import C2GSPGConfig, C2GSPGTrainer, calibrated_advantages


def test_known_vector():
    logps = torch.tensor([[-0.2, -0.5, -0.4, -0.1]])
    found = calibrated_advantages(torch.tensor([[1.0, 1, 0, 0]]), logps, bce_weight=0.0)
    assert found[0].tolist() == pytest.approx([2.758328, 1.270747, -1.516622, -5.254166], abs=2e-5)


def test_the_second_term_is_the_gradient_of_the_cross_entropy():
    groups = random_groups()
    options = dict(valid=groups.valid)
    with_bce, without = (
        calibrated_advantages(groups.correct, groups.mean_logps, bce_weight=w, **options) for w in (2, 0)
    )
    logps = groups.mean_logps.masked_fill(~groups.valid, -1.0).requires_grad_()
    labels = groups.correct.double().masked_fill(~groups.valid, 0.0)
    entropies = torch.nn.functional.binary_cross_entropy(logps.exp(), labels, reduction="none")
    gradient = torch.autograd.grad(entropies[groups.valid].sum(), logps)[0]
    torch.testing.assert_close((with_bce - without).double(), -2 * gradient, atol=1e-5, rtol=1e-5)


def test_random_groups_by_loops(tiny_model, tmp_path):
    groups = random_groups(seed=1)
    trainer = tiny_trainer(C2GSPGTrainer, tiny_model, tmp_path, bce_weight=0.3, min_doubt=0.2)
    found = trainer._compute_advantages(groups)
    for p, row in enumerate(found.tolist()):
        members = [i for i in range(5) if groups.valid[p, i]]
        mean = sum(groups.correct[p, i].item() for i in members) / max(1, len(members))
        for i in range(5):
            expected = 0.0
            if i in members:
                label, sure = groups.correct[p, i].item(), math.exp(groups.mean_logps[p, i].item())
                expected = (label - mean + 0.3 * (label - sure)) / max(1 - sure, 0.2)
            assert row[i] == pytest.approx(expected, abs=1e-5)


def test_certainty_is_bounded():
    labels, logps = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    found = calibrated_advantages(labels, logps, bce_weight=1.0, min_doubt=0.5)
    assert found.tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_which_rows_are_read(tiny_model, tmp_path, weight):
    groups = random_groups()
    rows = tiny_trainer(C2GSPGTrainer, tiny_model, tmp_path, bce_weight=weight)._rows_needing_logps(groups)
    advantages = calibrated_advantages(groups.correct, groups.mean_logps, bce_weight=weight, valid=groups.valid)
    assert not advantages[~rows].any() and (rows == groups.valid).all() == (weight > 0)


def test_training_moves_the_weights(tiny_model, tmp_path):
    trainer = tiny_trainer(C2GSPGTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16))
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert (trainer.model.model.norm.weight != before).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bce_weight=-0.1), "bce_weight must be at least 0 and finite, got -0.1"),
        (dict(min_doubt=0.0), r"min_doubt must be in \(0, 1\), got 0.0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        C2GSPGConfig(str(tmp_path), **options)
