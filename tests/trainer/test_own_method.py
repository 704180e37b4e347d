"""What a method of one's own cannot forget: the mask, the label and the checks are the seam's work."""

import ast
import inspect
import math
import textwrap

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers import config_kwargs, length_reward, parity_reward, prompt_dataset
from tests.trainer.runs import largest_change, parameters
from trl_capo import GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.repack import LOSSES


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


# The loss ------------------------------------------------------------------------------------------------------------


class Regularised:
    """Every row has a gradient, whatever its advantage."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        return super()._compute_loss(model, inputs) + 0.1 * (logps * inputs["completion_mask"]).square().mean()


class RegularisedGRPO(Regularised, GRPO):
    pass


class RegularisedInPublic(GRPO):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return Regularised._compute_loss(self, model, inputs)


class Observing(GRPO):
    _loss_allows_repacking = True

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class RegularisedObserver(Regularised, Observing):
    pass


@pytest.mark.parametrize("trainer_class", [RegularisedGRPO, RegularisedObserver])
def test_rows_without_advantage_matter_in_a_loss_of_its_own(tiny_model, tmp_path, trainer_class):
    options = dict(optim="sgd", learning_rate=0.05, max_steps=3)
    trained = []
    for repack in (True, False):
        half_mixed = by_position("half_mixed", [1, 0, 1, 0, 1, 1, 1, 1])
        trainer = make(trainer_class, tiny_model, tmp_path, half_mixed, repack=repack, **options)
        start = parameters(trainer)
        trainer.train()
        trained.append(parameters(trainer))
    assert largest_change(start, trained[0]) >= 1e-3
    assert largest_change(*trained) <= 1e-5


@pytest.mark.parametrize(
    ("trainer_class", "line"),
    [
        (RegularisedGRPO, "batches are left as TRL makes them, because Regularised has a loss of its own"),
        (RegularisedInPublic, "batches are left as TRL makes them, because RegularisedInPublic has a loss of its own"),
        (RegularisedObserver, "batches are left as TRL makes them, because Regularised has a loss of its own"),
        (Observing, None),
        (GRPO, None),
    ],
)
def test_a_loss_of_its_own_is_not_repacked_unless_it_allows_it(tiny_model, tmp_path, capsys, trainer_class, line):
    trainer = make(trainer_class, tiny_model, tmp_path)
    out = capsys.readouterr().out
    assert trainer._repacking.prune == ("repack:" not in out) == (line is None) and (line or "") in out
    assert bool(trainer_class.known_losses()) == (trainer_class is GRPO)


def test_the_losses_are_those_of_trl():
    code = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    compared = [node for node in ast.walk(code) if isinstance(node, ast.Compare) and "loss_type" in ast.unparse(node)]
    constants = [part.value for node in compared for part in ast.walk(node) if isinstance(part, ast.Constant)]
    assert set(LOSSES) == set(constants)


# The label -----------------------------------------------------------------------------------------------------------


class ReadsCorrect(GroupAdvantageTrainer):
    def _compute_advantages(self, groups):
        return groups.correct.nan_to_num(nan=0.0) - 0.5


class AddsCorrect(GroupAdvantageTrainer):
    def _unmasked_advantages(self, groups):
        return groups.correct.nan_to_num(nan=0.0) - 0.5


class Mixed(ReadsCorrect, GRPO):
    pass


class NeedsNone(ReadsCorrect):
    @classmethod
    def needs_correct(cls, args):
        return False


TWO_REWARDS = [parity_reward, length_reward]


@pytest.mark.parametrize("trainer_class", [ReadsCorrect, AddsCorrect, Mixed])
def test_a_method_that_may_read_a_label_must_have_one(tiny_model, tmp_path, trainer_class):
    with pytest.raises(ValueError, match="With several reward functions, set correctness_reward"):
        make(trainer_class, tiny_model, tmp_path, TWO_REWARDS)
    make(trainer_class, tiny_model, tmp_path, TWO_REWARDS, correctness_reward="parity_reward")


def test_a_method_that_reads_no_label_says_so_and_the_mask_needs_one_all_the_same(tiny_model, tmp_path):
    make(NeedsNone, tiny_model, tmp_path, TWO_REWARDS)
    with pytest.raises(ValueError, match="With several reward functions, set correctness_reward"):
        make(NeedsNone, tiny_model, tmp_path, TWO_REWARDS, **KEEPS_ALL)


@pytest.mark.parametrize("trainer_class", [ReadsCorrect, Mixed])
def test_a_method_with_its_own_advantages_refuses_another_aggregation_at_the_start(
    tiny_model, tmp_path, trainer_class
):
    with pytest.raises(ValueError, match="set it to 'sum_then_normalize'"):
        make(trainer_class, tiny_model, tmp_path, multi_objective_aggregation="normalize_then_sum")


# Advantages a token, and those that the mask cannot drop -------------------------------------------------------------


class ByToken(GRPO):
    """Something for every token, whatever its completion has."""

    def _token_advantages(self, advantages, inputs):
        return advantages.unsqueeze(1) * inputs["completion_mask"] + inputs["completion_mask"]


class KeepsOne(ByToken):
    def _unmasked_advantages(self, groups):
        return torch.eye(8)[3].view(2, 4)


DROPS_ALL = dict(ref_ppl_mask=True, ref_ppl_low=1e30, ref_ppl_high=1.0)
pytestmark = pytest.mark.filterwarnings("ignore:ref_ppl_low and ref_ppl_high are")


def test_what_the_mask_drops_has_no_advantage_by_token_either(tiny_model, tmp_path):
    assert advantages_of(ByToken, tiny_model, tmp_path, **DROPS_ALL).abs().max() == 0
    kept = advantages_of(KeepsOne, tiny_model, tmp_path, **DROPS_ALL).amax(dim=1)
    assert sorted(kept.tolist()) == [0.0] * 7 + [2.0]
    assert advantages_of(ByToken, tiny_model, tmp_path, **KEEPS_ALL).abs().sum(dim=1).min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.masked_fill(a == 0, torch.nan), r"finite numbers, also at padding, .*, got \(8, 8\) with values"),
        (lambda a: a[:, :2], r"of shape \(8,\) or \(8, 8\), got \(8, 2\)\."),
    ],
)
def test_advantages_by_token_are_checked(tiny_model, tmp_path, change, message):
    class Bad(ByToken):
        def _token_advantages(self, advantages, inputs):
            return change(super()._token_advantages(advantages, inputs))

    with pytest.raises(ValueError, match=message):
        advantages_of(Bad, tiny_model, tmp_path, no_reward)


def test_what_the_mask_cannot_drop_counts_without_a_mask_too(tiny_model, tmp_path):
    class Plus(GRPO):
        def _unmasked_advantages(self, groups):
            return 10.0

    plain, plus = (advantages_of(kind, tiny_model, tmp_path) for kind in (GRPO, Plus))
    torch.testing.assert_close(plus, plain + 10)


def test_labels_are_named_as_a_cause_of_advantages_that_are_not_finite(tiny_model, tmp_path):
    class Labels(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            return groups.correct

    def some_unknown(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    with pytest.raises(ValueError, match="not finite.* and correct where a function returned None"):
        advantages_of(Labels, tiny_model, tmp_path, some_unknown)


# State ---------------------------------------------------------------------------------------------------------------


class Remembers(GRPO):
    saved: dict = {}

    def _method_state(self):
        return self.saved

    def _load_method_state(self, state):
        self.restored = state


def remembering(saved, model, folder, **options):
    trainer = make(Remembers, model, folder, save_strategy="steps", save_steps=1, **options)
    trainer.saved = saved
    return trainer


def test_what_a_method_saves_is_restored_as_it_was(tiny_model, tmp_path):
    names = ("manifest", "within_a_generation", "stream_pass", "ref_ppl_low", "ref_ppl_wrong", "method")
    saved = {name: [name, 0.1, {"a": None}] for name in names}
    remembering(saved, tiny_model, tmp_path, **KEEPS_ALL).train()
    resumed = remembering(saved, tiny_model, tmp_path, max_steps=2, **KEEPS_ALL)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.restored == saved


@pytest.mark.parametrize(
    "value", [math.nan, [1.0, math.inf], (1, 2), {3: 4}, torch.ones(1), f"hf_{'a1B2c3D4' * 5}"], ids=repr
)
def test_state_that_a_file_would_change_is_refused(tiny_model, tmp_path, value):
    trainer = remembering({"fine": 1, "bad": value}, tiny_model, tmp_path)
    with pytest.raises(ValueError, match="Remembers._method_state: a file does not restore 'bad' as it is"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
