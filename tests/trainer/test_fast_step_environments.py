"""The fast step with a rollout function, whose environment writes some of the tokens."""

import pytest
import torch

from tests.trainer.runs import (
    PAPER,
    SAMPLER,
    Canned,
    RecordingStock,
    RecordingTrainer,
    ScoredCAPO,
    assert_equal_runs,
    train,
)
from trl_capo import CAPOTrainer


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def rollout_with_environment(canned: Canned):
    """Completions in two of three of which an environment wrote all but the first third, or but that and the end."""

    def rollout(prompts, trainer):
        completions = canned.next(len(prompts))
        masks = []
        for i, ids in enumerate(completions):
            hole = range(len(ids) // 3, len(ids) - i % 2) if i % 3 else range(0)
            masks.append([int(t not in hole) for t in range(len(ids))])
        render = trainer.processing_class.apply_chat_template
        return {
            "prompt_ids": [render(prompt, tokenize=True, return_dict=True)["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[-1.0 - 0.1 * (t % 3) for t in range(len(ids))] for ids in completions],
            "env_mask": masks,
        }

    return rollout


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_tokens_of_an_environment(make, loss_type):
    options = dict(loss_type=loss_type, mask_truncated_completions=True, **PAPER)
    expected, actual = (
        make(cls, build={"rollout_func": rollout_with_environment(Canned())}, **options)
        for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    assert any((batch["tool_mask"] == 0).any() for batch in actual.seen)


def test_a_rollout_function_may_ask_the_trainer_for_log_probs(make):
    """The pass that is put off is TRL's own, not one that happens to come while TRL is at work."""
    canned = Canned()

    def rollout(prompts, trainer):
        completions = canned.next(len(prompts))
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([5, *row]) for row in completions], batch_first=True)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, (ids != 0).long(), ids.size(1) - 1, batch_size=4
        )
        return {
            "prompt_ids": [[5] for _ in prompts],
            "completion_ids": completions,
            "logprobs": [row[: len(c)].tolist() for row, c in zip(logps, completions, strict=True)],
        }

    trainer = make(RecordingTrainer, build={"rollout_func": rollout}, loss_type="grpo", max_steps=2, **PAPER)
    train(trainer)
    assert len(trainer.seen) == 4  # two optimizer steps of two micro-batches
    assert all(batch["sampling_per_token_logps"].isfinite().all() for batch in trainer.seen)


def test_sampler_scores_from_a_rollout_function(make):
    build = {"rollout_func": rollout_with_environment(Canned())}
    trainer = make(ScoredCAPO, build=build, max_steps=2, **SAMPLER)
    train(trainer)
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        mask = generation["completion_mask"] * generation["tool_mask"]
        known = generation["sampling_per_token_logps"].masked_fill(mask == 0, torch.nan)
        torch.testing.assert_close(groups.mean_logps.flatten(), known.nanmean(dim=1), equal_nan=True)
    assert any((generation["tool_mask"] == 0).any() for generation in trainer.generations)


def test_a_rollout_function_without_log_probs_is_told(make):
    rollout = rollout_with_environment(Canned())

    def without(prompts, trainer):
        return {**rollout(prompts, trainer), "logprobs": None}

    with pytest.raises(ValueError, match="no log-probs came with the completions: return 'logprobs' from"):
        make(CAPOTrainer, build={"rollout_func": without}, **SAMPLER).train()
