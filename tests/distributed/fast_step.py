"""What `test_fast_step_ranks.py` looks at, run by each of two processes (`worker.py`)."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from trl import GRPOTrainer

from tests.helpers import VOCABULARY, first_token_is_even, largest_change, one_over_length, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


RANK = int(os.environ.get("RANK", "0"))


def canned_rows(rank: int, kind: str) -> list[list[int]]:
    """64 groups of 4 completions of this rank; the first token's parity is the reward.

    `uneven`: the first rank's groups are all right or all wrong, the second's are all mixed.
    `turns`: a run of groups is degenerate on the one rank, the next on the other, some on both.
    `long`: as `uneven`, but all of the first rank's completions are long, and most of the second's short.
    """
    generator = torch.Generator().manual_seed(100 * rank + 1)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    rows = []
    for group in range(64):
        mixed = {"turns": (group // 2 + rank) % 3 == 0}.get(kind, rank == 1)
        right = draw(2)
        for i in range(4):
            parity = (right + (i < 2)) % 2 if mixed else right
            length = [1, 2, 3, 5, 8, 12][draw(6)]
            if kind == "long":
                length = 12 if rank == 0 or group % 4 == 0 else 1
            row = [2 * (1 + draw(7)) + parity] + [2 + draw(VOCABULARY - 2) for _ in range(length - 1)]
            rows.append(row + [1])
    return rows


@dataclass
class Scenario:
    options: dict
    kind: str = "uneven"
    stock: bool = False
    trainer_class: Callable = GroupAdvantageTrainer
    rewards: tuple[Callable, ...] = (first_token_is_even,)


@dataclass
class Seen:
    """What went through a trainer's models on this rank."""

    policy_calls: int = 0
    ref_calls: int = 0
    scored_rows: int = 0
    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    advantages: int = 0


PAPER = dict(gradient_accumulation_steps=2, steps_per_generation=4)
MASK = dict(ref_ppl_low=10.0, ref_ppl_high=500.0)
DDP = {
    "grpo, S=G": Scenario(dict(loss_type="grpo", gradient_accumulation_steps=2)),
    "grpo, S=2G": Scenario(dict(loss_type="grpo", **PAPER), stock=True),
    "grpo, S=2G, turns": Scenario(dict(loss_type="grpo", **PAPER), kind="turns"),
    "grpo, S=2G, long": Scenario(
        dict(loss_type="grpo", gradient_accumulation_steps=4, steps_per_generation=8), kind="long"
    ),
    "grpo, groups on both ranks": Scenario(
        dict(loss_type="grpo", per_device_train_batch_size=2, num_generations=8, **PAPER), kind="turns"
    ),
    "dapo, S=2G": Scenario(dict(loss_type="dapo", **PAPER), stock=True),
    "dr_grpo, G=2, S=3": Scenario(
        dict(loss_type="dr_grpo", gradient_accumulation_steps=2, steps_per_generation=3), kind="turns"
    ),
    "luspo, G=4": Scenario(dict(loss_type="luspo", gradient_accumulation_steps=4), kind="turns"),
    "cispo, S=2G": Scenario(dict(loss_type="cispo", learning_rate=0.09, **PAPER), kind="turns", stock=True),
    "sapo, S=G": Scenario(dict(loss_type="sapo", gradient_accumulation_steps=2), kind="turns", stock=True),
    "vespo, two iterations": Scenario(
        dict(loss_type="vespo", gradient_accumulation_steps=2, num_iterations=2), kind="turns"
    ),
    # Rows of the first rank have an advantage, but are in no mixed group: the second's are scored in one pass before
    # advantages are known, the first's in another after.
    "grpo, two rewards": Scenario(
        dict(loss_type="grpo", correctness_reward="first_token_is_even", **PAPER),
        rewards=(first_token_is_even, one_over_length),
    ),
    "bnpo, S=2G": Scenario(dict(loss_type="bnpo", **PAPER)),
    "grpo, KL term": Scenario(dict(loss_type="grpo", beta=0.1, **PAPER), stock=True),
    "dapo, KL term, truncated": Scenario(
        dict(loss_type="dapo", beta=0.1, mask_truncated_completions=True, **PAPER), kind="turns"
    ),
    "capo, S=2G": Scenario(dict(loss_type="grpo", **MASK, **PAPER), kind="turns", trainer_class=CAPOTrainer),
}
FSDP2 = {
    name: DDP[name]
    for name in (
        "grpo, S=2G",
        "grpo, KL term",
        "capo, S=2G",
    )
}


def whole_parameters(trainer) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    state = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def watch(trainer, seen: Seen) -> None:
    def count_policy(module, positional, inputs):
        if not torch.is_grad_enabled():
            seen.policy_calls += 1
            seen.scored_rows += len(inputs["input_ids"])
        else:
            seen.rows.append(len(inputs["input_ids"]))
            seen.tokens.append(inputs["input_ids"].numel())

    def count_reference(module, positional, inputs):
        seen.ref_calls += 1

    trainer.model.register_forward_pre_hook(count_policy, with_kwargs=True)
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.register_forward_pre_hook(count_reference, with_kwargs=True)
    compute_loss = trainer._compute_loss

    def counting(model, inputs):
        seen.advantages += int((inputs["advantages"] != 0).sum())
        return compute_loss(model, inputs)

    trainer._compute_loss = counting


def run(scenario: Scenario, trainer_class, model: str, folder: str, **options) -> tuple[dict, dict, Seen]:
    """Parameters before and after, and what was seen."""
    defaults = dict(
        optim="sgd",
        learning_rate=0.04,
        max_steps=10,
        per_device_train_batch_size=4,
        max_completion_length=16,
        logging_steps=100,
    )
    options = {**defaults, **scenario.options, **options}
    trainer = tiny_trainer(trainer_class, model, folder, list(scenario.rewards), **options)
    rows, position = canned_rows(RANK, scenario.kind), [0]

    def generate(prompt_ids, *args, **kwargs):
        start = position[0]
        position[0] += len(prompt_ids)
        return [list(rows[(start + i) % len(rows)]) for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate
    seen = Seen()
    start = whole_parameters(trainer)
    watch(trainer, seen)
    torch.manual_seed(RANK)  # TRL shuffles a generation by the global generator
    trainer.train()
    return start, whole_parameters(trainer), seen


def compare(scenario: Scenario, model: str, folder: str) -> dict:
    results = {}
    start, actual, seen = run(scenario, scenario.trainer_class, model, f"{folder}/on")
    _, expected, unpacked = run(scenario, scenario.trainer_class, model, f"{folder}/off", repack=False)
    results["change"] = largest_change(start, expected)
    results["difference"] = largest_change(expected, actual)
    if scenario.stock:
        _, stock, _ = run(scenario, GRPOTrainer, model, f"{folder}/stock")
        results["difference_to_stock"] = largest_change(stock, actual)
    # Copies: CPython 3.13.0 empties the lists of `vars(seen)` when it collects the trainer, whose hooks hold `seen`.
    results["repacked"], results["unpacked"] = asdict(seen), asdict(unpacked)
    results["checksum"] = sum(value.double().sum().item() for value in actual.values())
    return results


def run_all(scenarios: dict[str, Scenario], model: str, folder: str) -> dict:
    return {name: compare(scenario, model, f"{folder}/{name}") for name, scenario in scenarios.items()}
