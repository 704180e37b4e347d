"""What a method of one's own cannot forget: the mask, the label and the checks are the seam's work."""

import pytest
import torch

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.methods.grpo import GRPO


KEEPS_ALL = dict(ref_ppl_mask=True, ref_ppl_low=1.0, ref_ppl_high=1e30)


def make(trainer_class, model, folder, reward_funcs=parity_reward, **options):
    config = GroupAdvantageConfig(**config_kwargs(folder, **options))
    return trainer_class(model, reward_funcs, config, prompt_dataset())


def advantages_of(trainer_class, *args, **options) -> torch.Tensor:
    """Those of the first generation, as they enter the loss."""

    class Recording(trainer_class):
        def _generate_and_score_completions(self, inputs):
            self.output = super()._generate_and_score_completions(inputs)
            return self.output

    trainer = make(Recording, *args, **options)
    trainer.train()
    return trainer.output["advantages"]


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


class Ones(GroupAdvantageTrainer):
    def _compute_advantages(self, groups):
        return torch.ones_like(groups.rewards)


def by_position(name, values):
    def reward(completions, **kwargs):
        return [values[i % len(values)] for i in range(len(completions))]

    reward.__name__ = name
    return reward


# The mask ------------------------------------------------------------------------------------------------------------


def test_a_mask_that_drops_nothing_keeps_advantages_of_equal_rewards(tiny_model, tmp_path):
    assert advantages_of(Ones, tiny_model, tmp_path, no_reward, **KEEPS_ALL).tolist() == [1.0] * 8


def test_a_mask_that_drops_nothing_keeps_advantages_of_rewards_with_equal_sums(tiny_model, tmp_path):
    rewards = [by_position(*reward) for reward in (("a", [1, 0, 0, 0]), ("b", [0, 2, 1, 1]), ("c", [1, 0, 1, 1]))]
    options = dict(multi_objective_aggregation="normalize_then_sum", correctness_reward="a")
    plain = advantages_of(GRPO, tiny_model, tmp_path, rewards, **options)
    masked = advantages_of(GRPO, tiny_model, tmp_path, rewards, **options, **KEEPS_ALL)
    assert plain.abs().max() > 0.1 and torch.equal(plain, masked)


def test_an_advantage_that_the_mask_cannot_judge_is_refused(tiny_model, tmp_path):
    class Careless(Ones):
        def _rows_needing_logps(self, groups):
            return groups.mixed & groups.valid

    assert advantages_of(Careless, tiny_model, tmp_path, no_reward).tolist() == [1.0] * 8
    with pytest.raises(ValueError, match="no reference perplexity .* _rows_needing_logps"):
        advantages_of(Careless, tiny_model, tmp_path, no_reward, **KEEPS_ALL)
