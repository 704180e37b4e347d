"""Self-aligned reward: the vectors, an unpadded pass of each row with and without its prompt, and its options."""

import math

import pytest
import torch

from tests.helpers import literal_mean_logp, prompt_dataset, tiny_trainer, unpadded_rows
from trl_capo.methods.self_aligned import SelfAlignedConfig, SelfAlignedTrainer, self_alignment


@pytest.mark.parametrize(
    ("with_prompt", "without", "expected"), [(1.2, 2.4, 0.5), (2, 2, 0), (3, 1.2, -1), (1.05, 1.5, 0.3)]
)
def test_known_vectors(with_prompt, without, expected):
    logps = (torch.tensor(float(ppl)).log().neg() for ppl in (with_prompt, without))
    assert self_alignment(*logps).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sampler", [False, True])
def test_a_generation_equals_unpadded_passes(tiny_model, tmp_path, sampler):
    options = dict(generation="compact", mean_logps_from="sampler") if sampler else {}
    trainer = tiny_trainer(
        SelfAlignedTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16), alignment_weight=0.7, **options
    )
    seen = []
    compute, replace = trainer._compute_advantages, trainer._replace_advantages
    trainer._compute_advantages = lambda groups: seen.append({"groups": groups}) or compute(groups)
    model = trainer.model

    def recorded(output, advantages):
        if len(seen) == 1:
            rows = unpadded_rows(output)
            model.eval()
            seen[0] |= {
                "with": [literal_mean_logp(model, prompt, answer) for prompt, answer in rows],
                "without": [literal_mean_logp(model, prompt[-1:], answer) for prompt, answer in rows],
                "advantages": advantages.clone(),
            }
            model.train()
        replace(output, advantages)

    trainer._replace_advantages = recorded
    before = model.model.norm.weight.detach().clone()
    trainer.train()
    assert (model.model.norm.weight != before).any()
    first = seen[0]
    rewards = first["groups"].rewards
    bonus = [
        max((math.exp(-b) - math.exp(-a)) / math.exp(-b), -1)
        for a, b in zip(first["with"], first["without"], strict=True)
    ]
    assert max(bonus) - min(bonus) > 1e-3, "the prompts must matter"
    total = rewards + 0.7 * torch.tensor(bonus).view_as(rewards)
    expected = total - total.mean(dim=1, keepdim=True)
    torch.testing.assert_close(first["advantages"].view_as(rewards), expected, atol=1e-5, rtol=1e-4)


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="alignment_weight must be finite, got nan"):
        SelfAlignedConfig(str(tmp_path), alignment_weight=float("nan"))


def test_images_are_refused(tiny_model, tmp_path):
    trainer = tiny_trainer(SelfAlignedTrainer, tiny_model, tmp_path)
    trainer._is_vlm = True
    with pytest.raises(ValueError, match="Self-aligned reward needs passes of its own over text"):
        trainer._finish_init()
