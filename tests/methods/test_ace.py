"""ACE: loops, its options, and a training in which the reference is the base."""

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import random_groups
from trl_capo.methods.ace import ACEConfig, ACETrainer


@pytest.mark.parametrize(
    "options", [dict(), dict(ace_alpha=0.5, ace_length_normalize=True), dict(ace_max=0.3, scale_rewards="none")]
)
def test_random_groups_by_loops(tiny_model, tmp_path, options):
    groups = random_groups()
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 9, groups.rewards.shape, generator=generator).float()
    references = groups.mean_logps + torch.randn(groups.rewards.shape, generator=generator)
    groups = replace(groups, lengths=lengths, ref_mean_logps=references)
    trainer = tiny_trainer(ACETrainer, tiny_model, tmp_path, **options)
    # What the trainer does not compute must not be read.
    unread = ~trainer._rows_needing_logps(groups), ~trainer._rows_needing_ref(groups)
    groups = replace(
        groups,
        mean_logps=groups.mean_logps.masked_fill(unread[0], torch.nan),
        ref_mean_logps=references.masked_fill(unread[1], torch.nan),
    )
    found = trainer._compute_advantages(groups)
    for p, row in enumerate(found.tolist()):
        members = [i for i in range(5) if groups.valid[p, i]]
        values = [groups.rewards[p, i].item() for i in members]
        mean = sum(values) / max(1, len(values))
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
        divisor = 1.0 if options.get("scale_rewards") == "none" else std + 1e-4
        for i in range(5):
            expected = (groups.rewards[p, i].item() - mean) / divisor if i in members else 0.0
            if i in members and expected < 0 and groups.correct[p, i] == 0:
                ratio = (groups.mean_logps[p, i] - references[p, i]).item()
                ratio *= 1 if options.get("ace_length_normalize") else lengths[p, i].item()
                ratio = min(ratio, options.get("ace_max", math.inf))
                expected *= 1 + options.get("ace_alpha", 1.0) * math.log1p(math.exp(ratio))
            assert row[i] == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_at_the_start_every_error_weighs_the_same(tiny_model, tmp_path):
    trainer = tiny_trainer(ACETrainer, tiny_model, tmp_path, dataset=prompt_dataset(16), scale_rewards="none")
    seen = []
    original = trainer._compute_advantages
    trainer._compute_advantages = lambda groups: seen.append((groups, original(groups))) or seen[-1][1]
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    groups, advantages = seen[0]  # policy and reference are still equal
    wrong = trainer._rows_needing_ref(groups)
    assert wrong.any()
    plain = groups.rewards - groups.rewards.mean(dim=1, keepdim=True)
    torch.testing.assert_close(advantages[wrong], plain[wrong] * (1 + math.log(2)), atol=1e-3, rtol=1e-3)
    assert (trainer.model.model.norm.weight != before).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ace_alpha=-1.0), "ace_alpha must be at least 0 and finite, got -1.0"),
        (dict(ace_max=float("nan")), "ace_max must be finite, got nan"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ACEConfig(str(tmp_path), **options)
