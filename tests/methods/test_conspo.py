"""ConSPO: the vectors, autograd on the loss, its equality with CAPO, and a training."""

import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import make_groups, random_groups
from trl_capo.methods.advantages import pairwise_logistic_advantages
from trl_capo.methods.conspo import ConSPOConfig, ConSPOTrainer, contrastive_advantages


LOGPS = torch.tensor([[-0.2, -0.5, -0.4, -0.1]])


@pytest.mark.parametrize(
    ("labels", "tau", "expected"),
    [
        ([1.0, 1, 0, 0], 1.0, [0.657991, 0.721990, -0.587261, -0.792720]),
        ([1.0, 1, 0, 0], 0.6, [0.654922, 0.757816, -0.533366, -0.879372]),
        ([1.0, 1, 0, 0], 0.1, [0.740504, 0.982852, -0.081732, -1.641624]),
        ([1.0, 1, 1, 0], 0.6, [0.541570, 0.660756, 0.622459, -1.824786]),
    ],
)
def test_known_vectors(labels, tau, expected):
    assert contrastive_advantages(torch.tensor([labels]), LOGPS, tau)[0].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_random_groups_have_the_gradient_of_the_loss(margin):
    groups = random_groups()
    found = contrastive_advantages(groups.correct, groups.mean_logps, 0.3, margin=margin, valid=groups.valid)
    for p in range(len(found)):
        members = [i for i in range(found.shape[1]) if groups.valid[p, i]]
        scores = {i: groups.mean_logps[p, i].clone().requires_grad_() for i in members}
        right = [i for i in members if groups.correct[p, i] == 1]
        wrong = [i for i in members if groups.correct[p, i] == 0]
        loss = torch.zeros((), dtype=torch.float64)
        for i in right:
            rivals = [(scores[j] + margin) / 0.3 for j in wrong]
            loss = loss + torch.stack([scores[i] / 0.3, *rivals]).logsumexp(0) - scores[i] / 0.3
        if right and wrong:
            loss.backward()
        expected = [-0.3 * scores[i].grad.item() if i in members and right and wrong else 0.0 for i in range(5)]
        assert found[p].tolist() == pytest.approx(expected, abs=1e-6)


def test_with_one_wrong_answer_it_is_capo():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1.0, 1, 0, 1, 1]]).expand(50, -1)
    logps = -torch.rand(50, 5, generator=generator)
    torch.testing.assert_close(
        contrastive_advantages(labels, logps, 0.2), pairwise_logistic_advantages(labels, logps, 0.2)
    )


def test_the_margin_moves_linearly(tiny_model, tmp_path, monkeypatch):
    from trl_capo.methods import conspo

    margins, original = [], conspo.contrastive_advantages

    def recorded(*args, margin, **kwargs):
        margins.append(margin)
        return original(*args, margin=margin, **kwargs)

    monkeypatch.setattr(conspo, "contrastive_advantages", recorded)
    options = dict(dataset=prompt_dataset(16), max_steps=4, margin=0.1, margin_end=0.5)
    trainer = tiny_trainer(ConSPOTrainer, tiny_model, tmp_path, **options)
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert margins == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (trainer.model.model.norm.weight != before).any()


def test_log_probs_outside_mixed_groups_are_not_needed(tiny_model, tmp_path):
    trainer = tiny_trainer(ConSPOTrainer, tiny_model, tmp_path)
    groups = make_groups(torch.tensor([[1.0, 0], [1, 1]]), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert trainer._rows_needing_logps(groups).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tau=0.0), "tau must be positive and finite, got 0.0"),
        (dict(tau=float("nan")), "tau must be positive and finite, got nan"),
        (dict(margin=float("inf")), "margin must be finite, got inf"),
        (dict(margin_end=float("nan")), "margin_end must be finite, got nan"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ConSPOConfig(str(tmp_path), **options)
