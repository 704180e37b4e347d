"""A repacked run ends where one that is not repacked does: CAPO, advantages a token, several rewards."""

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers import first_token_is_even, logged, one_over_length
from tests.trainer.runs import LAYOUTS, MASK, PAPER, RecordingCAPO, RecordingTrainer, assert_equal_runs
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


class TokenAdvantages(RecordingTrainer):
    """(B, T) advantages: 0 for every other token, and for all of a completion that starts with a token above 9."""

    def _compute_advantages(self, groups):
        return groups.correct - groups.correct.mean(dim=1, keepdim=True) + 0.3  # no row is 0 by itself

    def _token_advantages(self, advantages, inputs):
        ids = inputs["completion_ids"]
        every_other = (torch.arange(ids.size(1)) % 2 == 0).float()
        return advantages.unsqueeze(1) * every_other * (ids[:, :1] <= 9)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_advantages_a_token(make, loss_type):
    options = dict(loss_type=loss_type, **PAPER)
    expected, actual = make(TokenAdvantages, repack=False, **options), make(TokenAdvantages, **options)
    assert_equal_runs(expected, actual)
    rows, packed = ([row for batch in t.seen for row in batch["advantages"].tolist()] for t in (expected, actual))
    nonzero = sum(any(row) for row in rows)
    assert nonzero < len(rows) and len(packed) == sum(any(row) for row in packed) == nonzero


CAPO_OPTIONS = {
    "mask": dict(**MASK),
    "no mask": dict(ref_ppl_mask=False),
    # Between samples: at a quantile that is a sample, rounding decides whether it is masked.
    "estimated mask": dict(ref_ppl_quantiles=[0.3, 0.7], ref_ppl_quantile_samples=16),
    "mask among partners": dict(**MASK, mask_partners=True),
    "gap unit": dict(ref_ppl_mask=False, tau_unit="gap"),
    "pairs across prompts": dict(ref_ppl_mask=False, pair_scope="batch"),
    "moving mask": dict(**MASK, sync_ref_model=True, ref_model_sync_steps=2),
    "mask and KL term": dict(**MASK, beta=0.1),
    "mask and bnpo": dict(**MASK, loss_type="bnpo"),
}


@pytest.mark.parametrize(
    ("option", "layout"),
    [(option, "paper") for option in CAPO_OPTIONS] + [("mask", "on-policy"), ("gap unit", "G=2, S=3")],
)
def test_capo(make, option, layout):
    options = {"loss_type": "grpo", "learning_rate": 0.06, **CAPO_OPTIONS[option], **LAYOUTS[layout]}
    expected, actual = make(RecordingCAPO, repack=False, **options), make(RecordingCAPO, **options)
    assert_equal_runs(expected, actual)
    if actual.args.ref_ppl_mask:
        assert 0 < logged(actual, "capo/frac_masked_wrong")[0] < 1
    for name in ("capo/soft_misranking", "capo/auc_within", "capo/frac_mixed", "capo/ppl_wrong"):
        assert logged(actual, name) == pytest.approx(logged(expected, name), abs=1e-3), name


def test_capo_with_auxiliary_and_graded_rewards(make):
    """Groups that are all right may still have an advantage: of another reward, or of unequal grades."""

    def graded(completion_ids, **kwargs):
        return [(ids[0] % 5) / 4 for ids in completion_ids]

    options = dict(
        reward=[graded, one_over_length],
        reward_weights=[1.0, 0.5],
        correctness_reward="graded",
        graded_rewards=True,
        auxiliary_rewards="add",
        ref_ppl_mask=False,
        loss_type="grpo",
        **PAPER,
    )
    assert_equal_runs(make(CAPOTrainer, repack=False, **options), make(CAPOTrainer, **options))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_outside_mixed_groups(make, aggregation):
    """Where another reward tells completions apart that are all right or all wrong, old log-probs are needed too."""
    options = dict(
        reward=[first_token_is_even, one_over_length],
        correctness_reward="first_token_is_even",
        multi_objective_aggregation=aggregation,
        loss_type="grpo",
        learning_rate=0.05,
        **PAPER,
    )
    actual = make(RecordingTrainer, **options)
    options.pop("correctness_reward")
    assert_equal_runs(make(GRPOTrainer, **options), actual)
    advantages = [a for batch in actual.seen for a in batch["advantages"].tolist()]
    assert sum(a != 0 for a in advantages) > 0.8 * len(advantages)


@pytest.mark.parametrize(
    ("plain", "repacked", "options"),
    [(GRPOTrainer, GroupAdvantageTrainer, {}), (CAPOTrainer, CAPOTrainer, {"ref_ppl_mask": False})],
    ids=["grpo", "capo"],
)
def test_unscorable_completions(make, plain, repacked, options):
    def sometimes(completion_ids, **kwargs):
        return [None if ids[-1] % 3 == 0 else float(ids[0] % 2 == 0) for ids in completion_ids]

    options = dict(reward=sometimes, loss_type="grpo", **options, **PAPER)
    assert_equal_runs(make(plain, repack=False, **options), make(repacked, **options))
