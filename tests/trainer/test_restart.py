"""A run that was stopped ends where one that was not does; damaged checkpoints are in test_resume.py."""

import json

import pytest

from tests.helpers import largest_change, parameters, prompt_dataset, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


class StopAt(Exception):
    pass


@pytest.mark.parametrize("num_prompts", [32, 6], ids=["one epoch", "several epochs"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny_model, tmp_path, num_prompts):
    options = dict(
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.01,
        optim="adamw_torch",
        tau_unit="gap",
        ref_ppl_quantiles=[0.25, 0.75],
        ref_ppl_quantile_samples=16,
    )

    def make(folder):
        dataset = prompt_dataset(num_prompts)
        return tiny_trainer(CAPOTrainer, tiny_model, tmp_path / folder, dataset=dataset, **options)

    whole = make("whole")
    whole.train()
    first = make("parts")
    step = first.training_step

    def stop_in_the_middle(*args, **kwargs):
        if first.state.global_step == 5:
            raise StopAt
        return step(*args, **kwargs)

    first.training_step = stop_in_the_middle
    with pytest.raises(StopAt):
        first.train()
    second = make("parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert largest_change(parameters(whole), parameters(second)) <= 1e-5
    assert second.tau == whole.tau and second.mask.thresholds == whole.mask.thresholds


@pytest.mark.parametrize("way", ["folder", "newest"])
def test_a_finished_run_is_not_trained_further(tiny_model, tmp_path, way):
    options = dict(max_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.01)

    whole = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, **options)
    whole.train()
    again = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, **options)
    result = again.train(resume_from_checkpoint=True if way == "newest" else str(tmp_path / "checkpoint-2"))
    assert result.global_step == 2 and again.state.log_history == whole.state.log_history[:-1]
    assert largest_change(parameters(whole), parameters(again)) == 0


def test_moving_reference_survives_a_restart(tiny_model, tmp_path):
    options = dict(
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.01,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=0.3,
    )

    whole = tiny_trainer(CAPOTrainer, tiny_model, tmp_path / "whole", **options)
    whole.train()
    resumed = tiny_trainer(CAPOTrainer, tiny_model, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, actual = whole.ref_model.state_dict(), resumed.ref_model.state_dict()
    assert largest_change(expected, actual) <= 1e-5
    assert largest_change(expected, parameters(whole)) > 1e-4


def test_state_file_is_json(tiny_model, tmp_path):
    tiny_trainer(CAPOTrainer, tiny_model, tmp_path, save_strategy="steps", save_steps=1).train()
    state = json.loads((tmp_path / "checkpoint-1" / "trl_capo_state.json").read_text())
    assert state["method"]["tau"] == 0.6 and (state["ref_ppl_low"], state["ref_ppl_high"]) == (1.05, 2.5)


def test_a_finished_run_keeps_its_best_model(tiny_model, tmp_path):
    options = dict(
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        ref_ppl_mask=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_capo/ppl_wrong",
        greater_is_better=False,
        eval_dataset=prompt_dataset(8),
    )
    first = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, **options)
    first.train()
    again = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_change(parameters(first), parameters(again)) == 0


def test_resuming_without_a_checkpoint_is_an_error(tiny_model, tmp_path):
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_in_the_middle_of_a_generation_is_warned_of(tiny_model, tmp_path, capsys):
    options = dict(steps_per_generation=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    # transformers saves after the last step, wherever that is
    tiny_trainer(CAPOTrainer, tiny_model, tmp_path, max_steps=3, **options).train()
    resumed = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "lies in the middle of a generation" in capsys.readouterr().out


def test_an_epoch_may_end_within_a_generation(tiny_model, tmp_path, capsys):
    """Its last optimizer step takes fewer micro-batches, so where generations end is not a multiple of steps."""
    options = dict(per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=3)
    options |= dict(save_strategy="steps", save_steps=4, max_steps=9, dataset=prompt_dataset(8))
    tiny_trainer(GroupAdvantageTrainer, tiny_model, tmp_path, **options).train()
    resumed = tiny_trainer(GroupAdvantageTrainer, tiny_model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "lies in the middle of a generation" in capsys.readouterr().out


def test_a_moving_reference_may_be_switched_on_at_a_restart(tiny_model, tmp_path, capsys):
    options = dict(save_strategy="steps", save_steps=1)
    tiny_trainer(CAPOTrainer, tiny_model, tmp_path, **options).train()
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, max_steps=2, sync_ref_model=True, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has no moving reference" in capsys.readouterr().out
