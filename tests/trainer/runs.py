"""Runs on canned completions, drawn once from a seed: every trainer of a test trains on the same ones.

Also: layouts and learning rates, classes that record or count what a trainer does, and the comparison of two runs.
"""

import copy
import random

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers import VOCABULARY, conversations, largest_change, logged, parameters
from trl_capo import CAPOTrainer
from trl_capo.methods.grpo import GRPO


NUM_GENERATIONS = 4


def canned_completions(num_groups: int, seed: int = 0, degenerate: float = 0.5) -> list[list[int]]:
    """Groups of completions of 1 to 13 tokens, most of them with an EOS; the first token's parity is the reward."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_groups):
        labels = [rng.random() < 0.5 for _ in range(NUM_GENERATIONS)]
        if rng.random() < degenerate:
            labels = [labels[0]] * NUM_GENERATIONS
        elif len(set(labels)) == 1:
            labels[0] = not labels[0]
        for label in labels:
            length = rng.choice([1, 2, 2, 3, 4, 6, 9, 12])
            row = [2 * rng.randrange(1, 8) + (not label)]
            row += [rng.randrange(2, VOCABULARY) for _ in range(length - 1)]
            rows.append(row + [1] * (rng.random() < 0.8))
    return rows


class Canned:
    """Stands in for `_generate_single_turn`: the next completions, whatever the prompts and the weights."""

    def __init__(self, seed: int = 0, degenerate: float = 0.5):
        self.rows = canned_completions(200, seed, degenerate)
        self.position = 0

    def next(self, count: int) -> list[list[int]]:
        rows = [self.rows[(self.position + i) % len(self.rows)] for i in range(count)]
        self.position += count
        return copy.deepcopy(rows)

    def __call__(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return self.next(len(prompt_ids)), None


def questions(num_prompts: int = 32) -> Dataset:
    """Conversational prompts of 1 to 9 tokens."""
    return conversations("123456789"[: 1 + 4 * i % 9] for i in range(num_prompts))


# Ten steps that move some parameter by at least 1e-2, and not by much more, so that rounding is not amplified: weights
# perturbed by one part in 10^7 end 3e-7 to 6e-7 apart in every layout and loss below.
SGD = dict(
    optim="sgd",
    learning_rate=0.03,
    max_steps=10,
    max_completion_length=16,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=10,
)

# Micro-steps of an optimizer step (G) and of a generation (S). Where S is no multiple of G, an optimizer step spans
# generations. An epoch of 6 prompts has 6 micro-steps, so its last optimizer step has 2 of 4; of 9 prompts 9, 1 of 2.
LAYOUTS = {
    "on-policy": dict(),
    "accumulation": dict(gradient_accumulation_steps=4),
    "paper": dict(steps_per_generation=4),
    "two iterations": dict(num_iterations=2),
    "G=2, S=3": dict(steps_per_generation=3),
    "G=3, S=2": dict(gradient_accumulation_steps=3, steps_per_generation=2),
    "last step short": dict(gradient_accumulation_steps=4, steps_per_generation=2, dataset=questions(6)),
    "last step short, G=2, S=3": dict(steps_per_generation=3, dataset=questions(9)),
}
LEARNING_RATES = {
    "grpo": 0.03,
    "bnpo": 0.03,
    "dr_grpo": 0.05,
    "dapo": 0.03,
    "cispo": 0.07,
    "sapo": 0.03,
    "luspo": 0.03,
    "vespo": 0.03,
}
PAPER = LAYOUTS["paper"]
# Thresholds of CAPO's mask between which this model's perplexities lie, so that it binds on either side.
MASK = dict(ref_ppl_low=50.0, ref_ppl_high=80.0)


def train(trainer) -> None:
    torch.manual_seed(0)  # TRL shuffles a generation by the global generator
    trainer.train()


def assert_equal_runs(expected, actual, least_change: float = 1e-2, tolerance: float = 1e-5) -> None:
    """Trains both, and compares parameters, the logged loss, and the norm of the last gradient."""
    start = parameters(expected)
    assert largest_change(start, parameters(actual)) == 0
    train(expected)
    train(actual)
    difference = largest_change(parameters(expected), parameters(actual))
    change = largest_change(start, parameters(expected))
    print(f"changed {change:.1e}, different {difference:.1e}")  # noqa: T201 (shown for a test that fails)
    assert change >= least_change
    assert difference <= tolerance
    assert expected.state.global_step == actual.state.global_step
    for name in ("loss", "grad_norm"):
        assert logged(actual, name) == pytest.approx(logged(expected, name), rel=1e-2, abs=1e-4), name


class Recording:
    """A trainer that keeps every micro-batch it is trained on; `seen` holds lists of rows, one a micro-step."""

    _loss_allows_repacking = True

    def _compute_loss(self, model, inputs):
        if model.training:
            self.__dict__.setdefault("seen", []).append(inputs)
        return super()._compute_loss(model, inputs)


class RecordingStock(Recording, GRPOTrainer):
    pass


class RecordingTrainer(Recording, GRPO):
    pass


class RecordingCAPO(Recording, CAPOTrainer):
    pass


class Meter:
    """Rows and padded tokens of each forward of a model, with and without gradient, generation excepted."""

    def __init__(self, model):
        self.forwards = {True: [], False: []}
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, positional, inputs):
        self.forwards[torch.is_grad_enabled()].append(inputs["attention_mask"].clone())

    def calls(self, grad: bool) -> int:
        return len(self.forwards[grad])

    def rows(self, grad: bool) -> int:
        return sum(len(mask) for mask in self.forwards[grad])

    def tokens(self, grad: bool) -> int:
        return sum(mask.numel() for mask in self.forwards[grad])


class ScoredCAPO(RecordingCAPO):
    """Keeps the groups and the whole generation."""

    def _compute_advantages(self, groups):
        self.__dict__.setdefault("groups", []).append(groups)
        return super()._compute_advantages(groups)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("generations", []).append(output)
        return output


class LinearSurrogateTrainer(CAPOTrainer):
    """CAPO's pairs with the linear loss -t, over the valid count: by identity, reward minus group mean."""

    def _compute_advantages(self, groups):
        advantages = torch.zeros_like(groups.rewards)
        num_prompts, num_generations = groups.rewards.shape
        for p in range(num_prompts):
            members = [g for g in range(num_generations) if groups.valid[p, g]]
            for i in members:
                gaps = [(groups.rewards[p, i] - groups.rewards[p, j]).item() for j in members]
                advantages[p, i] = sum(gaps) / len(members)
        return advantages


SAMPLER = dict(mean_logps_from="sampler", ref_ppl_mask=False, loss_type="grpo", learning_rate=0.05)
