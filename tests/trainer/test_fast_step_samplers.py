"""The fast step with vLLM, and scores from the sampler's log-probs."""

import pytest
import torch
from trl import GRPOTrainer

from tests.trainer.runs import LAYOUTS, PAPER, SAMPLER, Meter, RecordingCAPO, ScoredCAPO, assert_equal_runs, train
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.mark.parametrize(
    ("mode", "loss_type", "layout", "bounds"),
    [
        ("token_truncate", "grpo", "on-policy", {}),
        ("token_truncate", "grpo", "paper", {}),
        ("token_mask", "dapo", "paper", dict(vllm_importance_sampling_clip_min=0.3)),
        ("sequence_truncate", "dapo", "on-policy", {}),
        ("sequence_mask", "grpo", "paper", dict(vllm_importance_sampling_clip_max=20.0)),
        ("token_truncate", "vespo", "on-policy", {}),
        ("token_mask", "vespo", "paper", dict(vllm_importance_sampling_clip_min=0.3)),
        ("token_truncate", "luspo", "G=2, S=3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ratios_to_vllm(make, vllm, mode, loss_type, layout, bounds):
    options = dict(loss_type=loss_type, vllm_importance_sampling_mode=mode, learning_rate=0.05)
    options |= {**bounds, **vllm, **LAYOUTS[layout]}
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_vllm_without_correction(make, vllm, threshold):
    options = dict(loss_type="grpo", vllm_importance_sampling_correction=False, **vllm, **PAPER)
    options["off_policy_mask_threshold"] = threshold  # reads the sampler's log-probs, NaN among them
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


def test_sampler_scores_are_means_over_what_is_known(make, vllm):
    trainer = make(ScoredCAPO, **SAMPLER, **vllm, vllm_importance_sampling_correction=False)
    meter = Meter(trainer.model)
    train(trainer)
    assert meter.calls(False) == 0, "on-policy nothing needs a pass before the loss"
    unknown = 0
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        logps = generation["sampling_per_token_logps"].masked_fill(generation["completion_mask"] == 0, torch.nan)
        torch.testing.assert_close(groups.mean_logps.flatten(), logps.nanmean(dim=1), equal_nan=True)
        assert torch.equal(groups.valid.flatten(), ~logps.nanmean(dim=1).isnan())
        unknown += int((~groups.valid).sum())
    assert unknown > 0


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("layout", ["on-policy", "paper", "G=2, S=3", "two iterations"])
def test_sampler_scores_leave_the_loss_alone(make, vllm, layout, correction):
    options = {**SAMPLER, **vllm, **LAYOUTS[layout], "vllm_importance_sampling_correction": correction}
    if correction and layout in ("on-policy", "two iterations"):
        options["learning_rate"] = 0.2  # ratios make its gradients small
    expected, actual = make(RecordingCAPO, repack=False, **options), make(RecordingCAPO, **options)
    meters = [Meter(trainer.model) for trainer in (expected, actual)]
    assert_equal_runs(expected, actual)
    if layout == "paper" and not correction:
        kept = sum(a != 0 for batch in actual.seen for a in batch["advantages"].tolist())
        assert meters[1].rows(False) == kept < meters[0].rows(False) == 80


def test_sampler_scores_need_a_sampler_with_log_probs(make):
    with pytest.raises(
        ValueError, match="needs a sampler that returns log-probs: set use_vllm=True or generation='compact', pass a"
    ):
        make(CAPOTrainer, **SAMPLER)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 0.9}, "top_p=1.0, got 0.9"),
        ({"top_k": 5}, "top_k=0, got 5"),
        ({"min_p": 0.1}, "min_p=0.0, got 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.0, got 1.1"),
        ({"generation_kwargs": {"top_p": 0.9}}, "top_p=1.0, got 0.9"),
        ({"generation_kwargs": '{"top_k": 3}'}, "top_k=0, got 3"),
        # They make the sampler's distribution another one too.
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature"),
        ({"generation_kwargs": {"presence_penalty": 1.0}}, "presence_penalty"),
        ({"generation_kwargs": {"logit_bias": {"5": 10.0}}}, "logit_bias"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "vllm_structured_outputs_regex"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_samplers_of_another_distribution_are_refused(make, vllm, options, named):
    with pytest.raises(ValueError, match=f"mean_logps_from='sampler'.*{named}"):
        make(CAPOTrainer, **SAMPLER, **vllm, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}},
        {"top_k": -1, "min_p": None},
        {"generation_kwargs": {"stop": ["x"], "top_k": 0}},
        {"temperature": 0.7},
    ],
    ids=str,
)
def test_samplers_of_the_whole_distribution_are_not_refused(make, vllm, options):
    trainer = make(CAPOTrainer, **SAMPLER, **vllm, **options)
    assert trainer.args.mean_logps_from == "sampler"
