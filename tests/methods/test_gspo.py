"""GSPO: TRL's GRPOTrainer with the published setting gives the same parameters, and its loss is the formula."""

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers import (
    config_kwargs,
    first_batch,
    largest_change,
    literal_logits,
    logged,
    move,
    parameters,
    parity_reward,
    prompt_dataset,
    tiny_trainer,
)
from tests.methods.batches import assert_same_gradient
from trl_capo.methods.gspo import GSPOConfig, GSPOTrainer


PUBLISHED = dict(importance_sampling_level="sequence", loss_type="grpo", beta=0.0, epsilon=3e-4, epsilon_high=4e-4)
LAYOUT = dict(gradient_accumulation_steps=1, steps_per_generation=4)


def test_defaults_are_the_published_setting(tiny_model, tmp_path):
    sgd = dict(max_steps=8, optim="sgd", learning_rate=0.05)
    theirs = tiny_trainer(GRPOTrainer, tiny_model, tmp_path / "trl", **sgd, **PUBLISHED, **LAYOUT)
    theirs.train()
    options = config_kwargs(tmp_path / "ours", **sgd)
    assert not set(options) & {*PUBLISHED, *LAYOUT}, "they are GSPO's defaults"
    ours = GSPOTrainer(tiny_model, parity_reward, GSPOConfig(**options), prompt_dataset())
    ours.train()
    assert largest_change(parameters(theirs), parameters(ours)) <= 1e-5
    assert max(logged(ours, "clip_ratio/region_mean")) > 0, "the bounds matter"


def test_the_gradient_is_that_of_the_formula(tiny_model, tmp_path):
    """Row by row without padding: clipped ratio of the two sequence probabilities, to the power of one over length."""
    options = dict(per_device_train_batch_size=16, epsilon=0.02, epsilon_high=0.03, repack=False)
    trainer = tiny_trainer(GSPOTrainer, tiny_model, tmp_path, **options)
    batch, model = first_batch(trainer), trainer.model
    old = [logits.log_softmax(-1).detach() for logits in literal_logits(model, batch)]
    move(model, 0.02)
    loss, ratios = 0.0, []
    for logits, old_logps, row in zip(literal_logits(model, batch), old, range(16), strict=True):
        tokens = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        at = (range(len(tokens)), tokens)
        ratio = (logits.log_softmax(-1)[at].sum() - old_logps[at].sum()).exp() ** (1 / len(tokens))
        advantage = batch["advantages"][row]
        loss = loss - torch.minimum(ratio * advantage, ratio.clamp(1 - 0.02, 1 + 0.03) * advantage) / 16
        ratios.append(ratio.item())
    assert_same_gradient(trainer, batch, loss)
    assert min(ratios) < 0.98 and max(ratios) > 1.03, "both bounds matter"


@pytest.mark.parametrize(("accumulated", "warns"), [(1, False), (2, False), (4, True), (8, True)])
def test_without_mini_batches_it_says_that_it_is_grpo(tmp_path, recwarn, accumulated, warns):
    GSPOConfig(str(tmp_path), gradient_accumulation_steps=accumulated, bf16=False)
    assert any("GSPO equals GRPO" in str(warning.message) for warning in recwarn) == warns


def test_a_generation_batch_size_takes_the_place_of_mini_batches(tmp_path):
    layout = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    options = {k: v for k, v in config_kwargs(tmp_path).items() if k not in (*layout, "steps_per_generation")}
    assert GSPOConfig(**options, **layout).steps_per_generation == 4
    assert GSPOConfig(**options, **layout, generation_batch_size=32).steps_per_generation == 8
