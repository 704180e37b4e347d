"""What `test_compact_ranks.py` looks at, run by each of two processes (`worker.py`)."""

import os

import torch

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo.trainer.config import FastGRPOConfig
from trl_capo.trainer.fast_step import FastGRPOTrainer


RANK = int(os.environ.get("RANK", "0"))


def run(model: str, folder: str) -> dict:
    """Two steps, then completions of one prompt on each rank, one token each on the first, up to 12 on the other."""
    options = dict(generation="compact", max_steps=2, learning_rate=0.01, max_completion_length=12)
    trainer = FastGRPOTrainer(
        model, parity_reward, FastGRPOConfig(**config_kwargs(folder, **options)), prompt_dataset()
    )
    trained_on = []
    original = trainer._generate_single_turn

    def recording(*args, **kwargs):
        completions, logps = original(*args, **kwargs)
        trained_on.append(completions)
        return completions, logps

    trainer._generate_single_turn = recording
    trainer.train()
    forwards = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: forwards.append(list(inputs["input_ids"].shape)), with_kwargs=True
    )
    if RANK == 0:
        trainer.generation_config.eos_token_id = list(range(17))
    torch.manual_seed(RANK)
    last, _ = original([[3, 4]] * 4, None, {}, 4)
    return {"trained_on": trained_on, "last": last, "forwards": forwards}
