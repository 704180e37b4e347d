"""GSPO: TRL's GRPOTrainer with the published setting gives the same parameters."""

import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo.baselines.gspo import GSPOConfig, GSPOTrainer


PUBLISHED = dict(importance_sampling_level="sequence", loss_type="grpo", beta=0.0, epsilon=3e-4, epsilon_high=4e-4)
LAYOUT = dict(gradient_accumulation_steps=1, steps_per_generation=4)


def parameters(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_defaults_are_the_published_setting(tiny_model, tmp_path):
    options = config_kwargs(tmp_path / "trl", max_steps=8, optim="sgd", learning_rate=0.05)
    expected = parameters(
        GRPOTrainer(tiny_model, parity_reward, GRPOConfig(**options, **PUBLISHED, **LAYOUT), prompt_dataset(32))
    )
    options = config_kwargs(tmp_path / "ours", max_steps=8, optim="sgd", learning_rate=0.05)
    for name in set(options) & {*PUBLISHED, *LAYOUT}:
        del options[name]
    ours = GSPOTrainer(tiny_model, parity_reward, GSPOConfig(**options), prompt_dataset(32))
    found = parameters(ours)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    clipped = [
        entry["clip_ratio/region_mean"] for entry in ours.state.log_history if "clip_ratio/region_mean" in entry
    ]
    assert max(clipped) > 0, "the bounds matter"
