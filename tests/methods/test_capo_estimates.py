"""What CAPO estimates in training: the mask's thresholds and tau, and how both outlive a restart."""

import json
import math

import numpy as np

from tests.helpers import literal_advantages_of_groups, logged
from tests.methods.capo_runs import make_trainer


def test_quantile_thresholds_are_estimated_once_from_valid_training_completions(tiny_model, tmp_path):
    options = dict(ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, max_steps=5)
    trainer = make_trainer(tiny_model, tmp_path, **options)
    trainer.train()
    first = np.concatenate(
        [
            np.exp(-generation["groups"].ref_mean_logps.double().numpy()).flatten()
            for generation in trainer.generations[:2]
        ]
    )
    assert len(first) == 16
    expected = np.quantile(first, [0.25, 0.75])
    np.testing.assert_allclose(trainer.mask.thresholds, expected, rtol=1e-5)
    assert logged(trainer, "capo/mask_active") == [0, 1, 1, 1, 1]
    unknown, *known = logged(trainer, "capo/ref_ppl_low")
    assert unknown is None and len(known) == 4
    np.testing.assert_allclose(known, expected[0], rtol=1e-5)


def test_quantiles_by_class(tiny_model, tmp_path):
    options = dict(ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, ref_ppl_quantiles_by_class=True)
    trainer = make_trainer(tiny_model, tmp_path, max_steps=2, **options)
    trainer.train()
    groups = [generation["groups"] for generation in trainer.generations]
    ref_ppl = np.concatenate([np.exp(-g.ref_mean_logps.double().numpy()).flatten() for g in groups])
    correct = np.concatenate([g.correct.numpy().flatten() for g in groups]) == 1
    expected = np.quantile(ref_ppl[~correct], 0.25), np.quantile(ref_ppl[correct], 0.75)
    np.testing.assert_allclose(trainer.mask.thresholds, expected, rtol=1e-5)


def test_tau_in_gaps_is_the_frozen_median(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, tau=0.5, tau_unit="gap", ref_ppl_mask=False, max_steps=6)
    trainer._gap_scale.min_gaps = 8
    trainer.train()
    gaps = []
    taus = []
    for generation in trainer.generations:
        groups = generation["groups"]
        if len(gaps) < 8:
            for labels, scores in zip(groups.correct.tolist(), groups.mean_logps.tolist(), strict=True):
                right = [s for s, label in zip(scores, labels, strict=True) if label == 1]
                wrong = [s for s, label in zip(scores, labels, strict=True) if label == 0]
                gaps += [abs(a - b) for a in right for b in wrong]
        taus.append(0.5 * float(np.median(gaps)))
        literal = literal_advantages_of_groups(groups.correct, groups.mean_logps, taus[-1])
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
    np.testing.assert_allclose(logged(trainer, "capo/tau"), taus, rtol=1e-5)
    assert taus[-1] == taus[-2] and len(gaps) >= 8


def test_tau_moves_to_its_end_by_equal_factors(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, tau=0.8, tau_end=0.1, ref_ppl_mask=False, max_steps=6)
    assert trainer.tau == 0.8
    trainer.train()
    assert len(trainer.generations) == 6
    for step, generation in enumerate(trainer.generations):
        groups = generation["groups"]
        literal = literal_advantages_of_groups(groups.correct, groups.mean_logps, 0.8 * 0.5 ** (step / 2))
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
    np.testing.assert_allclose(logged(trainer, "capo/tau")[-1], 0.1, rtol=1e-6)


def test_state_is_saved_beside_the_checkpoint(tiny_model, tmp_path):
    options = dict(
        tau=0.5, tau_unit="gap", ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, save_strategy="steps"
    )
    trainer = make_trainer(tiny_model, tmp_path, max_steps=3, save_steps=3, **options)
    trainer._gap_scale.min_gaps = 8
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-3" / "trl_capo_state.json").read_text())
    assert state["method"]["tau"] == trainer.tau
    assert (state["ref_ppl_low"], state["ref_ppl_high"]) == trainer.mask.thresholds
    resumed = make_trainer(tiny_model, tmp_path, max_steps=5, save_steps=3, **options)
    resumed._gap_scale.min_gaps = 8
    assert math.isnan(resumed.tau)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.tau == trainer.tau and resumed.mask.thresholds == trainer.mask.thresholds


def test_restored_samples_serve_new_quantiles(tiny_model, tmp_path):
    options = dict(ref_ppl_quantile_samples=16, save_strategy="steps", save_steps=2)
    first = make_trainer(tiny_model, tmp_path, max_steps=2, ref_ppl_quantiles=[0.25, 0.75], **options)
    first.train()
    second = make_trainer(tiny_model, tmp_path, max_steps=4, ref_ppl_quantiles=[0.05, 0.95], **options)
    second.train(resume_from_checkpoint=True)
    values = first.mask._estimated.correct + first.mask._estimated.wrong
    np.testing.assert_allclose(second.mask.thresholds, np.quantile(values, [0.05, 0.95]))


def test_evaluation_in_larger_batches_leaves_the_estimates_alone(tiny_model, tmp_path):
    options = dict(tau_unit="gap", ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=512)
    trainer = make_trainer(
        tiny_model, tmp_path, per_device_eval_batch_size=24, eval_strategy="steps", eval_steps=1, **options
    )
    trainer.evaluate()
    evaluated = trainer.generations[-1]
    assert math.isnan(trainer.tau) and evaluated["groups"].rewards.numel() == 24
    settled = ~evaluated["groups"].mixed[:, 0]
    assert settled.any() and evaluated["groups"].ref_mean_logps[settled].isnan().all()
    assert list(trainer._logs["advantages"]) == evaluated["advantages"].flatten().tolist()[-8:]
    trainer.train()
    training = [generation["groups"] for generation in trainer.generations if generation["training"]]
    seen = len(trainer.mask._estimated.correct) + len(trainer.mask._estimated.wrong)
    assert seen == sum(groups.rewards.numel() for groups in training) == 8
