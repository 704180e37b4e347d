"""Each layer of the seam is useful alone, and what all methods share no method can forget."""

import math

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import largest_change, logged, parameters, prompt_dataset, tiny_trainer
from trl_capo import GroupAdvantageTrainer
from trl_capo.calibration.metrics import auc_within
from trl_capo.trainer.fast_step import FastGRPOTrainer
from trl_capo.trainer.metrics import CalibrationLogging
from trl_capo.trainer.resumable import ResumableGRPOTrainer


def make(trainer_class, model, folder, **options):
    """Each layer takes TRL's own configuration."""
    return tiny_trainer(trainer_class, model, folder, config_class=GRPOConfig, **options)


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
    assert largest_change(before, stock) > 1e-3
    assert largest_change(stock, fast) <= 1e-5


def test_resuming_alone_is_stock_grpo_that_ends_where_it_would_have(tiny_model, tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=0.01, optim="adamw_torch")
    options["dataset"] = prompt_dataset(6)
    whole = make(ResumableGRPOTrainer, tiny_model, tmp_path / "whole", **options)
    whole.train()
    stock = make(GRPOTrainer, tiny_model, tmp_path / "stock", **options)
    stock.train()
    assert largest_change(parameters(whole), parameters(stock)) <= 1e-5
    resumed = make(ResumableGRPOTrainer, tiny_model, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert largest_change(parameters(whole), parameters(resumed)) <= 1e-5


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
    assert logged(trainer, "capo/auc_within")[0] == pytest.approx(
        auc_within(*map(np.concatenate, zip(*kept, strict=True)))
    )


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
    trainer = tiny_trainer(Plain, tiny_model, tmp_path, max_steps=4, **options)
    trainer.train()
    low, high = trainer.mask.thresholds
    assert not math.isnan(low) and not math.isnan(high)
    for groups, advantages in zip(seen[1:], applied[1:], strict=True):
        ref_ppl = groups.ref_mean_logps.neg().exp()
        kept = torch.where(groups.correct == 1, ref_ppl <= high, ref_ppl >= low)
        assert torch.equal(advantages, kept.float())
    assert any((advantages == 0).any() for advantages in applied[1:])
    assert logged(trainer, "capo/frac_masked_wrong")
