"""What `test_two_ranks.py` looks at, run by each of two processes (`worker.py`)."""

import os

from trl import GRPOTrainer

from tests.helpers import (
    count_forwards,
    largest_change,
    parameters,
    parity_reward,
    prompt_dataset,
    tiny_trainer,
    unpadded_rows,
)
from tests.trainer.runs import LinearSurrogateTrainer
from trl_capo import CAPOTrainer


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
    options = dict(
        per_device_train_batch_size=4,
        num_generations=8,
        max_steps=4,
        learning_rate=0.0,
        eval_dataset=prompt_dataset(7),
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=2,
        num_generations_eval=4,
        per_device_eval_batch_size=4,
    )
    trainer = tiny_trainer(recording(CAPOTrainer), model, folder, **options)
    trainer.train()
    return {"seen": trainer.seen, "log": trainer.state.log_history}


def uneven_reference_rows(model: str, folder: str) -> dict:
    trainer = tiny_trainer(recording(CAPOTrainer), model, folder, uneven_reward)
    calls = count_forwards(trainer.ref_model)
    trainer.train()
    return {"calls": len(calls), "seen": trainer.seen}


def linear_surrogate(model: str, folder: str) -> dict:
    """Largest difference to TRL's own trainer after 5 SGD steps, and the largest step."""
    options = dict(
        optim="sgd", learning_rate=0.3, max_steps=5, per_device_train_batch_size=4, num_generations=8, loss_type="grpo"
    )
    stock = tiny_trainer(GRPOTrainer, model, f"{folder}/stock", scale_rewards="none", **options)
    start = parameters(stock)
    stock.train()
    ours = tiny_trainer(LinearSurrogateTrainer, model, f"{folder}/ours", ref_ppl_mask=False, **options)
    ours.train()
    return {
        "change": largest_change(start, parameters(stock)),
        "difference": largest_change(parameters(stock), parameters(ours)),
    }


def chosen_prompts(model: str, folder: str) -> dict:
    """What this rank generated for, and what its selection knows then. The middle one of three groups straddles."""
    asked = []

    def reward(prompts, completion_ids, **kwargs):
        asked.append([prompt[0]["content"] for prompt in prompts])
        return parity_reward(completion_ids)

    options = dict(per_device_train_batch_size=4, num_generations=8, gradient_accumulation_steps=3, max_steps=3)
    options |= dict(prompt_selection="informative", prompt_candidates=4)
    trainer = tiny_trainer(CAPOTrainer, model, folder, reward, **options)
    if RANK == 1:  # as another processor would
        trainer.selection.choose = lambda num_generations: [(0, False), (1, False), (2, False)]
    trainer.train()
    return {"asked": asked, "state": trainer.selection.state()}


def run_all(model: str, folder: str) -> dict:
    return {
        scenario.__name__: scenario(model, f"{folder}/{scenario.__name__}")
        for scenario in (straddling_groups, uneven_reference_rows, linear_surrogate, chosen_prompts)
    }
