"""What `test_two_ranks.py` looks at, run by each of two processes (`worker.py`)."""

import os

import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import config_kwargs, parity_reward, prompt_dataset, unpadded_rows
from trl_capo import CAPOConfig, CAPOTrainer


RANK = int(os.environ.get("RANK", "0"))


def recording(trainer_class):
    """The trainer, keeping of each generation the groups' numbers (global) and this rank's rows and advantages."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []

        def _compute_advantages(self, groups):
            ref_mean_logps = groups.ref_mean_logps
            self.seen.append(
                {
                    "mode": "train" if self.model.training else "eval",
                    "correct": groups.correct.tolist(),
                    "mean_logps": groups.mean_logps.double().tolist(),
                    "ref_mean_logps": None if ref_mean_logps is None else ref_mean_logps.double().tolist(),
                }
            )
            return super()._compute_advantages(groups)

        def _replace_advantages(self, output, advantages):
            per_group = len(self.seen[-1]["correct"][0])
            self.seen[-1]["advantages"] = advantages.double().view(-1, per_group).tolist()
            super()._replace_advantages(output, advantages)

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            local = output["advantages"].double().tolist()
            self.seen[-1] |= {"rows": unpadded_rows(output), "local_advantages": local}
            return output

    return Recording


def uneven_reward(completion_ids, **kwargs):
    """Mixed groups on the first rank only."""
    return parity_reward(completion_ids) if RANK == 0 else [1.0 for _ in completion_ids]


def straddling_groups(model: str, folder: str) -> dict:
    """Four rows a rank and groups of eight: half of each group is on either rank. Two learning steps of size 0."""
    config = CAPOConfig(
        **config_kwargs(
            folder,
            per_device_train_batch_size=4,
            num_generations=8,
            max_steps=4,
            learning_rate=0.0,
            eval_strategy="steps",
            eval_steps=4,
            logging_steps=2,
            num_generations_eval=4,
            per_device_eval_batch_size=4,
        )
    )
    trainer = recording(CAPOTrainer)(model, parity_reward, config, prompt_dataset(), eval_dataset=prompt_dataset(7))
    trainer.train()
    return {"seen": trainer.seen, "log": trainer.state.log_history}


def uneven_reference_rows(model: str, folder: str) -> dict:
    trainer = recording(CAPOTrainer)(model, uneven_reward, CAPOConfig(**config_kwargs(folder)), prompt_dataset())
    calls = []
    forward = trainer.ref_model.forward
    trainer.ref_model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    trainer.train()
    return {"calls": len(calls), "seen": trainer.seen}


def linear_surrogate(model: str, folder: str) -> dict:
    """Largest difference to TRL's own trainer after 5 SGD steps, and the largest step."""

    class LinearSurrogateTrainer(CAPOTrainer):
        def _compute_advantages(self, groups):
            advantages = torch.zeros_like(groups.rewards)
            for p, rewards in enumerate(groups.rewards.tolist()):
                for i, reward in enumerate(rewards):
                    advantages[p, i] = sum(reward - other for other in rewards) / len(rewards)
            return advantages

    options = dict(
        optim="sgd", learning_rate=0.3, max_steps=5, per_device_train_batch_size=4, num_generations=8, loss_type="grpo"
    )
    stock_config = GRPOConfig(**config_kwargs(f"{folder}/stock", scale_rewards="none", **options))
    stock = GRPOTrainer(model, parity_reward, stock_config, prompt_dataset())
    start = {name: value.clone() for name, value in stock.accelerator.unwrap_model(stock.model).state_dict().items()}
    stock.train()
    config = CAPOConfig(**config_kwargs(f"{folder}/ours", ref_ppl_mask=False, **options))
    ours = LinearSurrogateTrainer(model, parity_reward, config, prompt_dataset())
    ours.train()
    expected = stock.accelerator.unwrap_model(stock.model).state_dict()
    actual = ours.accelerator.unwrap_model(ours.model).state_dict()
    return {
        "change": max((expected[name] - start[name]).abs().max().item() for name in start),
        "difference": max((expected[name] - actual[name]).abs().max().item() for name in start),
    }


def run_all(model: str, folder: str) -> dict:
    return {
        scenario.__name__: scenario(model, f"{folder}/{scenario.__name__}")
        for scenario in (straddling_groups, uneven_reference_rows, linear_surrogate)
    }
