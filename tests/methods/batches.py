"""Groups made by hand, and the gradient that a trainer's loss has on a batch."""

from dataclasses import replace

import torch

from trl_capo import RolloutGroups


def make_groups(rewards: torch.Tensor, mean_logps: torch.Tensor, valid: torch.Tensor) -> RolloutGroups:
    """Groups of (P, G) rewards from one reward function, which are right or wrong; unknown ones are not valid."""
    return RolloutGroups(
        rewards,
        rewards.unsqueeze(-1),
        rewards.clone(),
        mean_logps,
        torch.ones_like(rewards),
        valid & rewards.isfinite(),
        kept=torch.ones_like(valid),
    )


def assert_same_gradient(trainer, batch: dict, loss: torch.Tensor) -> None:
    """The trainer's own loss on the batch has the gradient of `loss`, in every parameter."""
    weights = list(trainer.model.parameters())
    expected = torch.autograd.grad(loss, weights)
    found = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def random_groups(seed: int = 0, num_prompts: int = 60, num_generations: int = 5) -> RolloutGroups:
    """Groups with right, wrong, unknown and invalid members; some are all right, all wrong, or tied."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_prompts, num_generations)
    rewards = (torch.rand(shape, generator=generator) < 0.5).float()
    valid = torch.rand(shape, generator=generator) < 0.9
    rewards[::9, 1] = torch.nan
    rewards[1], rewards[2], valid[1], valid[2] = 1.0, 0.0, True, True
    valid[3] = torch.arange(num_generations) == 0
    logps = -torch.rand(shape, generator=generator, dtype=torch.float64)
    logps[4] = -0.25  # all equally sure
    groups = make_groups(rewards, logps, valid)
    return replace(groups, mean_logps=logps.masked_fill(~groups.valid, torch.nan))
