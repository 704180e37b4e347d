"""What the fast step computes, and how often: rows, tokens and passes, counted."""

import copy
from collections import Counter

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers import literal_mean_logp, logged, unpadded_rows
from tests.trainer.runs import (
    LAYOUTS,
    PAPER,
    Meter,
    RecordingCAPO,
    RecordingStock,
    RecordingTrainer,
    ScoredCAPO,
    train,
)
from trl_capo import GroupAdvantageTrainer


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def rows_of_each_step(trainer, num_micro_steps: int) -> list[list[tuple]]:
    """(prompt, completion, advantage) of the rows of each optimizer step."""
    rows = [
        [(tuple(p), tuple(c), a) for (p, c), a in zip(unpadded_rows(batch), batch["advantages"].tolist(), strict=True)]
        for batch in trainer.seen
    ]
    return [sum(rows[i : i + num_micro_steps], []) for i in range(0, len(rows), num_micro_steps)]


@pytest.mark.parametrize("layout", ["on-policy", "accumulation", "paper"])
def test_only_rows_with_advantage_are_trained_on(make, layout):
    options = dict(loss_type="grpo", learning_rate=0.0, **LAYOUTS[layout])
    trainers, meters = [], []
    for trainer_class in (RecordingStock, RecordingTrainer):
        trainers.append(make(trainer_class, **options))
        meters.append(Meter(trainers[-1].model))
        train(trainers[-1])
    num_micro_steps = trainers[0].args.gradient_accumulation_steps
    assert meters[0].calls(True) == meters[1].calls(True) == 10 * num_micro_steps
    expected_rows = expected_tokens = 0
    for stock, ours in zip(*(rows_of_each_step(trainer, num_micro_steps) for trainer in trainers), strict=True):
        kept = [row for row in stock if row[2] != 0]
        assert Counter(row for row in ours if row[2] != 0) == Counter(kept)
        dropped = sorted(len(p) + len(c) for p, c, advantage in stock if advantage == 0)
        fill = sorted(len(p) + len(c) for p, c, advantage in ours if advantage == 0)
        assert fill == dropped[: max(0, num_micro_steps - len(kept))]
        expected_rows += max(len(kept), num_micro_steps)
        expected_tokens += sum(len(p) + len(c) for p, c, _ in ours)
    assert meters[1].rows(True) == expected_rows < 0.7 * meters[0].rows(True)
    assert meters[0].rows(True) == 10 * num_micro_steps * 4
    for mask in meters[1].forwards[True]:
        assert mask[:, 0].any() and mask[:, -1].any(), "a column that is padding in every row"
    assert expected_tokens <= meters[1].tokens(True) < 0.5 * meters[0].tokens(True)
    largest = [max(mask.numel() for mask in meter.forwards[True]) for meter in meters]
    assert largest[1] <= largest[0]


def test_old_log_probs_only_where_they_are_read(make):
    """In the paper layout TRL passes over every row. CAPO needs mixed groups, and GRPO rows with an advantage."""
    for trainer_class, options in ((RecordingTrainer, {}), (RecordingCAPO, {"ref_ppl_mask": False})):
        stock = make(RecordingStock, loss_type="grpo", **PAPER)
        ours = make(trainer_class, loss_type="grpo", **PAPER, **options)
        meters = [Meter(trainer.model) for trainer in (stock, ours)]
        train(stock)
        train(ours)
        mixed = sum(a != 0 for batch in stock.seen for a in batch["advantages"].tolist())
        assert mixed == sum(a != 0 for batch in ours.seen for a in batch["advantages"].tolist())
        assert meters[0].rows(False) == 5 * 16
        assert meters[1].rows(False) == mixed < 5 * 16
        assert meters[1].tokens(False) < 0.6 * meters[0].tokens(False)
        assert meters[1].calls(False) <= meters[0].calls(False) // 2
        for mask in meters[1].forwards[False]:
            assert mask[:, 0].any() and mask[:, -1].any()


def test_old_log_probs_are_those_trl_would_have_used(make):
    stock = make(RecordingStock, loss_type="grpo", max_steps=2, learning_rate=0.0, **PAPER)
    ours = make(RecordingTrainer, loss_type="grpo", max_steps=2, learning_rate=0.0, **PAPER)
    for trainer in (stock, ours):
        train(trainer)
    expected = {}
    for batch in stock.seen:
        for row, logps, mask in zip(
            unpadded_rows(batch), batch["old_per_token_logps"], batch["completion_mask"], strict=True
        ):
            expected[str(row)] = logps[mask.bool()]
    compared = 0
    for batch in ours.seen:
        assert batch["old_per_token_logps"].shape == batch["completion_ids"].shape
        for i, row in enumerate(unpadded_rows(batch)):
            if batch["advantages"][i] != 0:
                logps = batch["old_per_token_logps"][i][batch["completion_mask"][i].bool()]
                torch.testing.assert_close(logps, expected[str(row)], atol=1e-4, rtol=0)
                compared += 1
    assert compared >= 4


def test_on_policy_grpo_scores_mixed_groups_only(make):
    ours = make(RecordingTrainer, loss_type="grpo")
    meter = Meter(ours.model)
    train(ours)
    kept = sum(a != 0 for batch in ours.seen for a in batch["advantages"].tolist())
    assert meter.rows(False) == kept and logged(ours, "capo/auc_within")[0] is not None


def test_reference_of_the_mask_and_of_the_kl_term(make):
    """The mask needs mixed groups only; the KL term all rows, sorted and trimmed."""
    capo = make(RecordingCAPO, loss_type="grpo", **PAPER)
    meter = Meter(capo.ref_model)
    train(capo)
    assert meter.rows(False) == round(logged(capo, "capo/frac_mixed")[0] * 80) and meter.calls(True) == 0
    meters = []
    for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
        trainer = make(trainer_class, loss_type="grpo", beta=0.1, **PAPER)
        meters.append(Meter(trainer.ref_model))
        train(trainer)
    assert meters[0].rows(False) == meters[1].rows(False) == 80
    assert meters[1].calls(False) == meters[0].calls(False) // 2
    assert meters[1].tokens(False) < 0.85 * meters[0].tokens(False)


def test_rows_with_a_kl_term_are_sorted_not_dropped(make):
    trainers = [make(cls, loss_type="grpo", beta=0.1, learning_rate=0.0) for cls in (RecordingStock, RecordingTrainer)]
    for trainer in trainers:
        train(trainer)
    stock, ours = (rows_of_each_step(trainer, 2) for trainer in trainers)
    for expected, actual in zip(stock, ours, strict=True):
        assert Counter(row[:2] for row in expected) == Counter(row[:2] for row in actual)
        lengths = [len(p) + len(c) for p, c, _ in actual]
        assert lengths == sorted(lengths, reverse=True)


def test_padding_to_a_multiple_is_kept(make):
    trainer = make(RecordingTrainer, loss_type="grpo", pad_to_multiple_of=4, **PAPER)
    meter = Meter(trainer.model)
    train(trainer)
    assert meter.calls(False) > 0 and all(mask.size(1) % 4 == 0 for mask in meter.forwards[False])
    for batch in trainer.seen:
        assert batch["prompt_ids"].size(1) % 4 == 0 and batch["completion_ids"].size(1) % 4 == 0
        assert batch["prompt_mask"][:, :4].any() and batch["completion_mask"][:, -4:].any()
    assert len({batch["completion_ids"].size(1) for batch in trainer.seen}) > 1


def test_scores_are_unchanged_by_repacking(make):
    """Against unpadded forwards of one sequence each."""
    trainer = make(ScoredCAPO, ref_ppl_mask=False, loss_type="grpo", learning_rate=0.0, **PAPER)
    train(trainer)
    policy = copy.deepcopy(trainer.model).eval()
    compared = 0
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        scored = groups.mixed.expand_as(groups.valid).flatten()
        assert torch.equal(groups.mean_logps.flatten().isfinite(), scored)
        for i, (prompt, completion) in enumerate(unpadded_rows(generation)):
            if scored[i]:
                literal = literal_mean_logp(policy, prompt, completion)
                assert groups.mean_logps.flatten()[i].item() == pytest.approx(literal, abs=1e-4)
                compared += 1
    assert compared > 20
