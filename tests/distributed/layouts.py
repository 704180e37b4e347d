"""One training with completions fixed beforehand, for any number of processes: what `test_layouts.py` compares."""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.distributed.fast_step import whole_parameters
from tests.distributed.two_ranks import recording
from tests.helpers import VOCABULARY, largest_change, tiny_trainer
from trl_capo import CAPOTrainer
from trl_capo.errors import UserError
from trl_capo.methods.codapo import CoDaPOTrainer
from trl_capo.methods.progrpo import ProGRPOTrainer
from trl_capo.methods.rlsr import RLSRTrainer
from trl_capo.methods.simko import CAPOSimKOTrainer, SimKOTrainer
from trl_capo.trainer.checkpoints import current_run
from trl_capo.trainer.manifest import read_checkpoint


RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GENERATIONS = 8  # completions a prompt
PROMPTS = 3  # a generation: half of the second one's completions are on either of two ranks
MASK = dict(ref_ppl_low=10.0, ref_ppl_high=500.0)
MEAN = dict(pair_normalization="group")  # advantages of size 1, so that 1e-6 is more than float32 rounds away


@dataclass
class Training:
    trainer_class: type
    options: dict


TRAININGS = {
    "capo": Training(CAPOTrainer, dict(**MASK, **MEAN)),
    "codapo": Training(CoDaPOTrainer, dict(replay_quantile=0.5)),  # two prompts of three
    "simko": Training(SimKOTrainer, dict(simko_mix=0.2, ref_ppl_mask=True, **MASK)),
    "rlsr": Training(RLSRTrainer, {}),  # ranks over the whole batch
    "progrpo": Training(ProGRPOTrainer, {}),  # prompts of both ranks
    "capo_simko": Training(CAPOSimKOTrainer, dict(simko_mix=0.2, ref_ppl_mask=False, **MEAN)),
}
FSDP2 = {name: TRAININGS[name] for name in ("capo", "codapo", "simko")}


def completions(step: int) -> list[list[int]]:
    """All ranks' completions of the generation for an optimizer step; in one group all are right (an even sum)."""
    generator = torch.Generator().manual_seed(step)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for i in range(PROMPTS * GENERATIONS):
        row = [draw(2, VOCABULARY) for _ in range([1, 2, 3, 5, 8, 11][draw(0, 6)])] + [1]
        if i // GENERATIONS == step % PROMPTS and sum(row) % 2 == 1:
            row[0] = 2 + (row[0] - 1) % 15
        rows.append(row)
    return rows


def make_trainer(training: Training, model: str, folder: str, **options):
    """Each optimizer step is one generation of two micro-batches, so that no rank's shuffling can matter."""
    defaults = dict(
        optim="sgd",
        learning_rate=0.04,
        max_steps=4,
        per_device_train_batch_size=PROMPTS * GENERATIONS // 2 // PROCESSES,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        num_generations=GENERATIONS,
        max_completion_length=16,
        loss_type="grpo",
    )
    options = {**defaults, **training.options, **options}
    trainer = tiny_trainer(recording(training.trainer_class), model, folder, **options)

    def generate(prompt_ids, *args, **kwargs):
        rows = completions(trainer.state.global_step)
        return rows[RANK * len(prompt_ids) : (RANK + 1) * len(prompt_ids)], None

    trainer._generate_single_turn = generate
    return trainer


def run(training: Training, model: str, folder: str, resume_from: "str | None" = None, **options) -> dict:
    trainer = make_trainer(training, model, folder, **options)
    start = whole_parameters(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    end = whole_parameters(trainer)
    return {
        "seen": trainer.seen,
        "log": trainer.state.log_history,
        "parameters": {name: value.double().tolist() for name, value in end.items()},
        "change": largest_change(start, end),
        "host": socket.gethostname(),
        "place": [trainer.accelerator.process_index, trainer.accelerator.local_process_index],
    }


def run_all(trainings: dict[str, Training], model: str, folder: str) -> dict:
    return {name: run(training, model, f"{folder}/{name}") for name, training in trainings.items()}


class SpoilOneRank(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if RANK == 1 and state.global_step == 1:
            model.model.norm.weight.data[0] = float("nan")


def manifest(model: str, folder: str) -> dict:
    """Two ranks that write one checkpoint: what it lists; then one rank's random state is gone, and both go back."""
    training, shared = TRAININGS["capo"], folder.replace(f"rank{RANK}", "shared")
    run(training, model, shared, save_strategy="steps", save_steps=1, max_steps=2)
    torch.distributed.barrier()
    checkpoint = read_checkpoint(Path(shared, "checkpoint-2"))
    result = {"files": sorted(checkpoint.manifest["files"]), "runs": [checkpoint.run.id, current_run(shared).id]}
    torch.distributed.barrier()
    if RANK == 0:
        Path(shared, "checkpoint-2", "rng_state_1.pth").unlink()
    torch.distributed.barrier()
    result["steps"] = len(run(training, model, shared, True, max_steps=2)["seen"])
    trainer = make_trainer(training, model, f"{folder}-spoilt")
    trainer.add_callback(SpoilOneRank())
    try:
        trainer.train()
    except UserError as error:
        result["not_finite"] = str(error)
    return result


def resume(model: str, folder: str) -> dict:
    """A checkpoint of hosts that share no disc: the first has it, then it is copied to the second, then removed."""
    training, checkpoint = TRAININGS["codapo"], f"{folder}/checkpoint-3"  # in the middle of a batch's two generations
    run(training, model, folder, max_steps=3, save_strategy="steps", save_steps=3)
    torch.distributed.barrier()
    if RANK == 1:
        shutil.copytree(checkpoint.replace("rank1", "rank0"), checkpoint, dirs_exist_ok=True)
    results = {"resumed": run(training, model, folder, checkpoint)}
    if RANK == 1:
        shutil.rmtree(checkpoint)
    # None is what `trl-capo train --resume_from_checkpoint true` asks for where there is no checkpoint.
    for way, wanted in {"newest": True, "folder": checkpoint, "script": None if RANK == 1 else checkpoint}.items():
        try:
            run(training, model, folder, wanted)
        except ValueError as error:
            results[way] = str(error)
    return results
