"""CoDaPO: weights and advantages by hand and by loops, and a schedule that answers a batch's best prompts again."""

import json
import math

import pytest
import torch

from tests.helpers import prompt_dataset, tiny_trainer
from tests.methods.batches import make_groups
from trl_capo.methods.codapo import CoDaPOConfig, CoDaPOTrainer, kept_prompts, prompt_weights


LOGPS = torch.tensor([[-0.2, -0.5, -0.4, -0.1]])


@pytest.mark.parametrize(
    ("rewards", "weight", "advantages"),
    [
        ([1, 1, 0, 0], 0.840818, [0.728169, 0.728169, -0.728169, -0.728169]),
        ([1, 0, 0, 0], 0.655614, [0.983419, -0.327806, -0.327806, -0.327806]),
    ],
)
def test_published_vectors(tiny_model, tmp_path, rewards, weight, advantages):
    rewards = torch.tensor([rewards], dtype=torch.float)
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert prompt_weights(rewards, LOGPS, everything).item() == pytest.approx(weight, abs=1e-5)
    trainer = make_trainer(tiny_model, tmp_path, replay=False)
    groups = make_groups(rewards, LOGPS, everything)
    assert trainer._compute_advantages(groups)[0].tolist() == pytest.approx(advantages, abs=1e-5)


def make_trainer(tiny_model, tmp_path, dataset=None, **options):
    dataset = prompt_dataset(16) if dataset is None else dataset
    return tiny_trainer(CoDaPOTrainer, tiny_model, tmp_path, dataset=dataset, **options)


def literal(rewards, logps, valid, base_weight=0.1):
    """One group at a time, as the formula is written."""
    result = []
    for row, scores, ok in zip(rewards.tolist(), logps.tolist(), valid.tolist(), strict=True):
        members = [i for i in range(len(row)) if ok[i] and not math.isnan(row[i])]
        values = [row[i] for i in members]
        advantages = [0.0] * len(row)
        if len(members) > 1:
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            value = 1 - 4 * (0.5 - sum(v == 1 for v in values) / len(values)) ** 2
            confidence = math.exp(sum(scores[i] for i in members) / len(members)) if value > 0 else 0.0
            for i in members:
                advantages[i] = (confidence * value + base_weight) * (row[i] - mean) / (std + 1e-6)
        result.append(advantages)
    return torch.tensor(result)


def test_advantages_of_random_groups(tiny_model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(200, 6, generator=generator) < torch.rand(200, 1, generator=generator)).float()
    rewards[::7, 2] = torch.nan
    rewards[3], rewards[4] = 1.0, 0.0
    valid = torch.rand(200, 6, generator=generator) < 0.9
    logps = -torch.rand(200, 6, generator=generator) * 2
    groups = make_groups(rewards, logps.masked_fill(~valid, torch.nan), valid)
    found = make_trainer(tiny_model, tmp_path, replay=False)._compute_advantages(groups)
    torch.testing.assert_close(found, literal(rewards, logps, groups.valid), atol=1e-5, rtol=1e-5)
    assert (found[3:5] == 0).all()


def test_kept_prompts_are_those_from_the_quantile_on():
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.9])
    assert kept_prompts(weights, 0.75) == [1, 7]  # numpy.quantile: 0.325
    assert kept_prompts(weights, 0.5) == [1, 2, 3, 7]  # 0.15
    assert kept_prompts(torch.full((4,), 0.1), 0.75) == [0, 1, 2, 3]
    assert kept_prompts(weights, 1.0) == [7]


class Recording(CoDaPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.seen = [*getattr(self, "seen", []), (inputs, self._replayed)]
            self.generated = [*getattr(self, "generated", []), output["prompt_ids"].tolist()]
        return output


def numbered(inputs):
    return [row["number"] for row in inputs[::4]]


def record(tiny_model, tmp_path, **options):
    options |= dict(per_device_train_batch_size=16, replay_quantile=0.75)
    dataset = prompt_dataset(16, number=list(range(16)))
    return tiny_trainer(Recording, tiny_model, tmp_path, dataset=dataset, **options)


def test_every_batch_is_used_twice_and_the_second_time_its_best(tiny_model, tmp_path):
    trainer = record(tiny_model, tmp_path, max_steps=6)
    trainer.train()
    assert len(trainer.seen) == 6
    for i in range(0, 6, 2):
        (first, kept), (second, after) = trainer.seen[i : i + 2]
        prompts = trainer.generated[i : i + 2]
        assert numbered(first) == numbered(second), "the sampler draws the batch again"
        assert 1 <= len(kept) <= 4 and after is None
        order = ([row for row in kept for _ in range(4)] * 4)[:4]  # as the released code builds it
        expected = [prompts[0][4 * row] for row in order for _ in range(4)]
        strip = [[[t for t in row if t] for row in rows] for rows in (prompts[1], expected)]
        assert strip[0] == strip[1]
    assert any(len(kept) < 4 for _, kept in trainer.seen[::2])
    batches = [tuple(numbered(inputs)) for inputs, _ in trainer.seen[::2]]
    assert len(set(batches)) == 3


def test_replayed_rows_are_not_one_object(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path)
    rows = [{"prompt": [{"role": "user", "content": str(i // 4)}]} for i in range(8)]
    assert trainer._choose_prompts(rows) is rows
    trainer._replayed = [1]
    chosen = trainer._choose_prompts([{"prompt": "another batch"}] * 8)
    assert [row["prompt"][0]["content"] for row in chosen] == ["1"] * 8, "of the batch that was weighed"
    chosen[0]["prompt"].append("a tool's answer")
    assert all(len(row["prompt"]) == 1 for row in chosen[1:])


@pytest.mark.parametrize(
    ("repeats", "kept", "chosen"),
    [
        (4, [2, 5, 6, 7], [2] * 4 + [5] * 4 + [6] * 4 + [7] * 4),
        (4, list(range(15)), [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
        (4, [3, 9, 11], [3] * 4 + [9] * 4 + [11] * 4 + [3] * 4),
        (4, [7], [7] * 16),
        (1, [3, 9, 11], [3, 9, 11] * 5 + [3]),
    ],
)
def test_kept_prompts_refill_the_batch_in_the_released_order(tiny_model, tmp_path, repeats, kept, chosen):
    trainer = make_trainer(tiny_model, tmp_path, replay_repeats=repeats)
    rows = [{"prompt": str(number)} for number in range(16) for _ in range(4)]
    trainer._choose_prompts(rows)
    trainer._replayed = kept
    found = [row["prompt"] for row in trainer._choose_prompts(rows)]
    assert found == [str(number) for number in chosen for _ in range(4)]


def test_a_second_training_starts_with_a_first_generation(tiny_model, tmp_path):
    trainer = record(tiny_model, tmp_path, max_steps=3)
    trainer.train()
    assert trainer._replayed is not None
    trainer.seen, trainer.generated = [], []
    trainer.train()
    assert [kept is not None for _, kept in trainer.seen] == [True, False, True]
    rows = [[[token for token in row if token] for row in rows] for rows in trainer.generated]
    assert len({tuple(row) for row in rows[0]}) == len({*numbered(trainer.seen[0][0])}) == 4


def test_a_stream_cannot_be_replayed(tiny_model, tmp_path):
    stream = prompt_dataset(16).to_iterable_dataset()
    with pytest.raises(ValueError, match="cannot read a streamed dataset twice"):
        make_trainer(tiny_model, tmp_path, stream)
    make_trainer(tiny_model, tmp_path, stream, replay=False)


def test_without_replay_every_batch_is_new(tiny_model, tmp_path):
    trainer = record(tiny_model, tmp_path, max_steps=2, replay=False)
    trainer.train()
    assert numbered(trainer.seen[0][0]) != numbered(trainer.seen[1][0])
    assert trainer._method_state() == {"replayed": None}


def test_a_resumed_run_answers_what_was_kept(tiny_model, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=4)
    whole = record(tiny_model, tmp_path, **options)
    whole.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trl_capo_state.json").read_text())
    assert state["method"]["replayed"] == whole.seen[0][1]
    resumed = record(tiny_model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.generated == whole.generated[1:]


def test_bad_quantile(tmp_path):
    with pytest.raises(ValueError, match="replay_quantile must lie in"):
        CoDaPOConfig(str(tmp_path), replay_quantile=1.5)
    with pytest.raises(ValueError, match="replay_repeats must be at least 1"):
        CoDaPOConfig(str(tmp_path), replay_repeats=0)
