"""Each layer of the seam is useful alone, and what all methods share no method can forget."""

import math

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.calibration.metrics import auc_within
from trl_capo.trainer.fast_step import FastGRPOTrainer
from trl_capo.trainer.metrics import CalibrationLogging
from trl_capo.trainer.resumable import ResumableGRPOTrainer


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def largest_difference(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def make(trainer_class, model, folder, num_prompts=32, **options):
    config = GRPOConfig(**config_kwargs(folder, **options))
    return trainer_class(model, parity_reward, config, prompt_dataset(num_prompts))


def test_the_fast_step_alone_is_stock_grpo(tiny_model, tmp_path):
    options = dict(max_steps=4, learning_rate=0.05, optim="sgd", steps_per_generation=2, gradient_accumulation_steps=2)
    result = {}
    for kind in (GRPOTrainer, FastGRPOTrainer):  # one after the other: they draw from one random state
        trainer = make(kind, tiny_model, tmp_path / kind.__name__, **options)
        before = parameters(trainer)
        trainer.train()
        result[kind] = parameters(trainer)
    stock, fast = result.values()
    assert trainer._repacking.prune and trainer._repacking.sort
    assert largest_difference(before, stock) > 1e-3
    assert largest_difference(stock, fast) <= 1e-5


def test_resuming_alone_is_stock_grpo_that_ends_where_it_would_have(tiny_model, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=0.01, optim="adamw_torch")
    whole = make(ResumableGRPOTrainer, tiny_model, tmp_path / "whole", num_prompts=6, **options)
    whole.train()
    stock = make(GRPOTrainer, tiny_model, tmp_path / "stock", num_prompts=6, **options)
    stock.train()
    assert largest_difference(parameters(whole), parameters(stock)) <= 1e-5
    resumed = make(ResumableGRPOTrainer, tiny_model, tmp_path / "resumed", num_prompts=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert largest_difference(parameters(whole), parameters(resumed)) <= 1e-5


def test_logging_alone_computes_metrics_of_the_whole_window(tiny_model, tmp_path):
    class Logging(CalibrationLogging, GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            rng = np.random.default_rng(self.state.global_step)
            correct, logps = rng.integers(0, 2, (2, 4)).astype(float), rng.normal(size=(2, 4))
            kept.append((correct, logps))
            ones = np.ones((2, 4))
            self._remember({"correct": correct, "mean_logps": logps, "valid": ones, "in_mixed_group": ones})
            return output

    kept = []
    trainer = make(Logging, tiny_model, tmp_path, max_steps=3, logging_steps=3)
    trainer.train()
    logged = next(entry["capo/auc_within"] for entry in trainer.state.log_history if "capo/auc_within" in entry)
    assert logged == pytest.approx(auc_within(*map(np.concatenate, zip(*kept, strict=True))))


def test_a_method_that_knows_nothing_of_the_mask_is_masked(tiny_model, tmp_path):
    class Plain(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            seen.append(groups)
            return torch.ones_like(groups.rewards)

        def _replace_advantages(self, output, advantages):
            applied.append(advantages.view(seen[-1].valid.shape).clone())
            super()._replace_advantages(output, advantages)

    seen, applied = [], []
    options = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.3, 0.7], ref_ppl_quantile_samples=8)
    config = GroupAdvantageConfig(**config_kwargs(tmp_path, max_steps=4, logging_steps=1, **options))
    trainer = Plain(tiny_model, parity_reward, config, prompt_dataset())
    trainer.train()
    low, high = trainer.mask.thresholds
    assert not math.isnan(low) and not math.isnan(high)
    for groups, advantages in zip(seen[1:], applied[1:], strict=True):
        ref_ppl = groups.ref_mean_logps.neg().exp()
        kept = torch.where(groups.correct == 1, ref_ppl <= high, ref_ppl >= low)
        assert torch.equal(advantages, kept.float())
    assert any((advantages == 0).any() for advantages in applied[1:])
    assert any("capo/frac_masked_wrong" in entry for entry in trainer.state.log_history)
