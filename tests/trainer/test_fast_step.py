"""A repacked run ends where TRL's own does, whatever the loss and the layout.

Each comparison is with stock `GRPOTrainer`, or with the same trainer and `repack=False` where stock has no
such method.
"""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from tests.helpers import first_token_is_even, largest_change, logged, parameters, unpadded_rows
from tests.trainer.runs import (
    LAYOUTS,
    LEARNING_RATES,
    MASK,
    PAPER,
    Canned,
    RecordingStock,
    RecordingTrainer,
    assert_equal_runs,
    questions,
    train,
)
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_type", LEARNING_RATES)
def test_every_loss_and_layout_ends_where_trl_does(make, loss_type, layout):
    options = dict(loss_type=loss_type, learning_rate=LEARNING_RATES[loss_type], **LAYOUTS[layout])
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


@pytest.mark.parametrize("layout", ["on-policy", "paper", "G=3, S=2"])
def test_without_repacking_nothing_differs(make, layout):
    options = dict(loss_type="grpo", **LAYOUTS[layout])
    expected, actual = make(GRPOTrainer, **options), make(GroupAdvantageTrainer, repack=False, **options)
    assert_equal_runs(expected, actual, tolerance=0.0)


OPTIONS = {
    "sequence-level ratios": dict(importance_sampling_level="sequence", loss_type="grpo"),
    "sequence-level ratios, dapo": dict(importance_sampling_level="sequence", loss_type="dapo"),
    "sequence-level ratios, luspo": dict(importance_sampling_level="sequence", loss_type="luspo"),
    "two-sided clipping": dict(delta=1.05, epsilon=0.02, loss_type="grpo"),
    "off-policy mask": dict(off_policy_mask_threshold=0.001, loss_type="grpo"),
    "masked truncated completions": dict(mask_truncated_completions=True, loss_type="grpo"),
    "masked truncated completions, dapo": dict(mask_truncated_completions=True, loss_type="dapo"),
    "rewards scaled by batch": dict(scale_rewards="batch", loss_type="dr_grpo"),
    "padding to a multiple": dict(pad_to_multiple_of=8, loss_type="dapo"),
    "gradient checkpointing": dict(gradient_checkpointing=True, loss_type="grpo"),
    "weight decay and clipping": dict(weight_decay=0.1, max_grad_norm=0.5, loss_type="grpo", learning_rate=0.1),
    "one row a micro-batch": dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=8, steps_per_generation=16, loss_type="grpo"
    ),
    "another temperature": dict(temperature=0.7, loss_type="dapo", learning_rate=0.02),
    # Sorted or trimmed only:
    "KL term": dict(beta=0.1, loss_type="grpo"),
    "KL term, dapo": dict(beta=0.1, loss_type="dapo"),
    "KL term, bias corrected": dict(beta=0.1, use_bias_correction_kl=True, loss_type="dr_grpo"),
    "KL term, masked truncated": dict(beta=0.1, mask_truncated_completions=True, loss_type="luspo"),
    "entropy quantile": dict(top_entropy_quantile=0.5, loss_type="grpo"),
    "entropy bonus": dict(entropy_coef=0.05, loss_type="dapo"),
    "adaptive entropy": dict(use_adaptive_entropy=True, entropy_target=1.0, loss_type="grpo"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss(make, option):
    options = {**PAPER, **OPTIONS[option]}
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


@pytest.mark.parametrize("threshold", [0.001, None])
def test_the_options_above_are_not_vacuous(make, threshold):
    """Ratios differ from 1 in the paper layout, and thresholds are where they bind."""
    stock = make(RecordingStock, **PAPER, loss_type="grpo", off_policy_mask_threshold=threshold, epsilon=0.02)
    masks = []
    stock.get_off_policy_mask = lambda **kwargs: masks.append(GRPOTrainer.get_off_policy_mask(**kwargs)) or masks[-1]
    train(stock)
    assert logged(stock, "clip_ratio/region_mean")[0] > 0
    assert any((mask == 0).any() for mask in masks) == (threshold is not None)
    truncated = [row for batch in stock.seen for row in unpadded_rows(batch) if row[1][-1] != 1]
    assert len(truncated) > 0


@pytest.fixture
def make_adapted(make):
    """As `make`, with an adapter: always the same, and not zero, so that its second matrix has a gradient too."""
    build = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}

    def make_trainer(trainer_class, **options):
        torch.manual_seed(0)
        return make(trainer_class, build=build, **options)

    return make_trainer


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters(make_adapted, beta):
    options = dict(loss_type="grpo", beta=beta, gradient_checkpointing=True, **PAPER)
    assert_equal_runs(*(make_adapted(cls, **options) for cls in (GRPOTrainer, GroupAdvantageTrainer)))


def test_adapters_with_a_mask(make_adapted):
    """The reference is the model without its adapter."""
    options = dict(loss_type="grpo", learning_rate=0.05, **MASK, **PAPER)
    assert_equal_runs(*(make_adapted(CAPOTrainer, repack=repack, **options) for repack in (False, True)))


def test_a_run_without_any_gradient_still_steps(make):
    """AdamW moves weights by decay alone; and by its moments, once there were gradients."""
    options = dict(loss_type="grpo", optim="adamw_torch", weight_decay=0.5, learning_rate=0.01)
    expected, actual = (
        make(cls, canned=Canned(degenerate=1.0), **options) for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    assert logged(actual, "frac_reward_zero_std") == [1.0]
    assert sum(len(batch["completion_ids"]) for batch in actual.seen) == len(actual.seen) == len(expected.seen) == 20


def test_moments_outlive_the_last_gradient(make):
    def reward_of_two_generations():
        calls = []

        def reward(completion_ids, **kwargs):
            calls.append(1)
            return first_token_is_even(completion_ids) if len(calls) <= 2 else [1.0] * len(completion_ids)

        return reward

    options = dict(loss_type="dapo", optim="adamw_torch", weight_decay=0.1, learning_rate=0.003)
    options["adam_epsilon"] = 1e-3  # at 1e-8 rounding of a gradient near 0 decides the sign of a step
    expected, actual = (
        make(cls, reward=reward_of_two_generations(), **options) for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    without_gradient = [batch for batch in actual.seen if not batch["advantages"].any()]
    assert len(without_gradient) >= 16 and len(actual.seen) == 20


def test_evaluation_in_between(make):
    """It generates, scores and computes a loss of its own, on batches that stay as they are."""
    options = dict(
        loss_type="grpo", eval_strategy="steps", eval_steps=3, num_generations_eval=4, per_device_eval_batch_size=8
    )
    build = {"eval_dataset": questions(4)}
    expected, actual = (make(cls, build=build, **options, **PAPER) for cls in (GRPOTrainer, GroupAdvantageTrainer))
    assert_equal_runs(expected, actual)
    for name in ("eval_loss", "eval_reward", "eval_entropy"):
        assert len(logged(expected, name)) >= 3
        assert logged(actual, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("trainer_class", [GroupAdvantageTrainer, CAPOTrainer])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make, tmp_path, trainer_class):
    options = dict(loss_type="grpo", save_strategy="steps", save_steps=4, max_steps=8, dataset=questions(12), **PAPER)
    whole = make(trainer_class, output_dir=tmp_path / "whole", **options)
    train(whole)
    canned = Canned()
    canned.next(2 * 16)  # what was generated up to the checkpoint: every second step, 16 rows
    second = make(trainer_class, output_dir=tmp_path / "second", canned=canned, **options)
    start = parameters(second)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert largest_change(start, parameters(whole)) >= 1e-2
    assert largest_change(parameters(whole), parameters(second)) <= 1e-5
