"""Groups made by hand, and the gradient that a trainer's loss has on a batch."""

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
