"""TRL's `GRPOTrainer` with exact resume: an interrupted run ends like an uninterrupted one.

TRL's checkpoints lack the prompt order of later epochs, the position in a stream, a method's estimates, a moving
reference, the run that they belong to, and a manifest that tells complete checkpoints from damaged ones. This layer
adds them, restores a finished run instead of training one more step, and saves no weights that are not finite.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from transformers import TrainerState
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from trl_capo.errors import UserError
from trl_capo.files import write_json
from trl_capo.preflight.checks import check_same_checkpoint, steps_between_generations
from trl_capo.publish.card import forget_calibration
from trl_capo.ranks import agree
from trl_capo.trainer.checkpoints import begin_run, remove_old_checkpoints
from trl_capo.trainer.finite import FiniteGRPOTrainer
from trl_capo.trainer.manifest import MANIFEST, STATE_FILE, Checkpoint, Run, checkpoint_step, write_manifest
from trl_capo.trainer.resume import (
    StreamPosition,
    check_best,
    checkpoint_named,
    newest_checkpoint,
    what_differs,
)
from trl_capo.trainer.resume_options import changed_options, hyperparameters, recorded_options, restore_hyperparameters
from trl_capo.trainer.state_values import read_state, truth, whole_number


REFERENCE_DIR = "reference"


class ResumableGRPOTrainer(FiniteGRPOTrainer):
    """Stock GRPO that resumes exactly. Takes the arguments of `GRPOTrainer`.

    Hooks: `_method_state`, `_load_method_state`, `generations_per_batch`.
    """

    num_generations: int
    _run = Run()  # a new one for each training that starts from scratch
    _resumed: Checkpoint | None = None  # the checkpoint that training resumes from

    # Hooks -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def generations_per_batch(args: GRPOConfig) -> int:
        """How many times in a row the sampler draws the same prompts."""
        return 1

    def _method_state(self) -> dict:
        """State besides the model that must survive a restart, as JSON. Must be equal on every rank."""
        return {}

    def _load_method_state(self, state: dict) -> None:
        """Restores what `_method_state` returned when the checkpoint was written."""

    def _all_state(self) -> dict:
        return self._method_state()

    def _load_all_state(self, state: dict) -> None:
        self._load_method_state(state)

    # Training --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: "str | bool | None" = None, *args, **kwargs) -> TrainOutput:
        """Trains as TRL does; `True` resumes from the newest complete checkpoint. A finished run is only restored."""
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        start = 0
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            start = state.global_step
            if self._lies_within_a_generation(checkpoint, state):
                self.accelerator.print(
                    f"⚠️ {checkpoint} lies in the middle of a generation, whose completions are not saved: the resumed "
                    "run will not match an uninterrupted one exactly."
                )
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if 0 < self.args.max_steps <= state.global_step and not sharded:
                return self._restore_finished_run(checkpoint, state)
        self._run = agree(lambda: begin_run(self.args.output_dir, self._resumed))
        if self.is_world_process_zero():
            forget_calibration(self.args.output_dir)
        result = super().train(checkpoint, *args, **kwargs)
        if self.state.global_step == start and (checkpoint is None or start < self.state.max_steps):
            raise UserError(
                f"no optimizer step was made, so there is nothing to save: the training data did not fill a "
                f"generation of {self.args.generation_batch_size // self.num_generations} prompts after step {start}. "
                "Add prompts, lower generation_batch_size, or raise num_generations."
            )
        self._check_parameters()
        return result

    def _checkpoint_to_resume(self, wanted: "str | bool | None") -> str | None:
        """The folder to resume from, the same on all ranks. Refuses one that cannot be resumed from."""
        self._resumed = None
        newest = wanted is True
        folder = None if isinstance(wanted, bool) else wanted
        if newest:
            folder, search = newest_checkpoint(self.args.output_dir, self.accelerator.print)
        check_same_checkpoint(gather_object([checkpoint_step(folder)]))
        if newest and folder is None:
            reasons = "".join(f" {line}" for line in search.lines)
            raise UserError(f"There is no complete checkpoint in {self.args.output_dir!r} to resume from.{reasons}")
        if not folder:
            return None
        named = checkpoint_named(folder, self.args.output_dir)
        self._resumed = replace(named, folder=Path(folder))  # on the first host the folder may be another
        for line in what_differs(self._resumed, self.args, self.is_deepspeed_enabled):
            self.accelerator.print(line)
        return str(folder)

    def _lies_within_a_generation(self, checkpoint: str, state: TrainerState) -> bool:
        path = Path(checkpoint, STATE_FILE)
        by_the_count = state.global_step % steps_between_generations(self.args) != 0
        return truth(read_state(path), "within_a_generation", by_the_count) if path.exists() else by_the_count

    def _restore_finished_run(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        # From the checkpoint of the last step, transformers would train one more step.
        self.accelerator.print(f"{checkpoint} is the end of a run of {state.global_step} steps: nothing to train.")
        assert self._resumed is not None  # set together with `checkpoint`
        self.state, self._run = state, self._resumed.run
        self._load_from_checkpoint(checkpoint)
        self._load_state_file(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, math.nan, {})

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(sampler, RepeatSampler):
            return sampler
        sampler.repeat_count *= self.generations_per_batch(self.args)
        if not sampler.shuffle:
            return sampler
        return _EpochRepeatSampler(
            sampler.data_source,
            sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            seed=sampler.seed,
        )

    def _init_training_state(self, max_steps, *args):
        epochs, batches = super()._init_training_state(max_steps, *args)
        self._stream = StreamPosition()
        if self._resumed is None:
            return epochs, batches
        # A checkpoint's state has the old run's intervals, and its best value may belong to another metric.
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        before = (self._resumed.manifest or {"options": {}})["options"]
        if {"metric_for_best_model", "greater_is_better"} & set(changed_options(before, self.args)):
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        if isinstance(self.train_dataset, IterableDataset) and not self.args.ignore_data_skip:
            # transformers assumes that a stream is endless, and would skip all batches so far in its first pass.
            path = self._resumed.folder / STATE_FILE
            saved = read_state(path) if path.exists() else {}
            if "stream_pass" in saved:
                with _naming(path):
                    epochs, batches = whole_number(saved, "stream_pass"), whole_number(saved, "stream_batches")
            else:
                self.accelerator.print(
                    "⚠️ The checkpoint does not record its position in the stream: prompts may repeat."
                )
            self._stream = StreamPosition.at(epochs, batches)
        return epochs, batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As transformers, and counts the position in a stream."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._stream.count(epoch_iterator, len(samples))
        return samples, num_items

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as transformers does, with a card for `trl-capo push`; refuses weights that are not finite."""
        # Unless the weights are sharded, this may be called on one rank alone.
        self._check_parameters(on_all_ranks=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        self._check_parameters()
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{self.state.global_step}")
        # Optimizer steps would miscount: the last one of an epoch may take fewer micro-batches.
        within = self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0
        state = {**self._all_state(), "within_a_generation": within, "manifest": MANIFEST}
        if isinstance(self.train_dataset, IterableDataset):
            state |= {"stream_pass": self._stream.number, "stream_batches": self._stream.batches}
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # another run's files would be taken for this one's
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # Written first: it tells an incomplete checkpoint from one of a version that wrote no manifest.
            os.makedirs(folder, exist_ok=True)
            write_json(Path(folder, STATE_FILE), state)
            if self._saves_reference():
                self.accelerator.unwrap_model(self.ref_model).save_pretrained(os.path.join(folder, REFERENCE_DIR))
        with _removes_no_checkpoints():
            super()._save_checkpoint(model, trial)
        if not self.args.push_to_hub:
            self._complete_checkpoint(folder)
        if self.args.should_save:
            remove_old_checkpoints(run_dir, self._run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._complete_checkpoint(checkpoint_folder)  # before it is uploaded
        super()._push_from_checkpoint(checkpoint_folder)

    def _complete_checkpoint(self, folder: str) -> None:
        self.accelerator.wait_for_everyone()  # each rank writes its own files
        if self.args.should_save:
            write_manifest(
                folder,
                self._run,
                self.state.global_step,
                exact=not self.args.save_only_model,
                world_size=self.args.world_size,
                options=recorded_options(self.args),
            )

    def _finalize_training(self, *args):
        with _removes_no_checkpoints():  # transformers would also remove those of other runs
            result = super()._finalize_training(*args)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            remove_old_checkpoints(self.args.output_dir, self._run, 1, best, keep_newest=False)
        return result

    def _load_best_model(self):
        check_best(self.state.best_model_checkpoint, self._run)
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        configured = hyperparameters(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_deepspeed_enabled:
            restore_hyperparameters(self.optimizer, self.lr_scheduler, configured)
        self._load_state_file(checkpoint)

    def _load_state_file(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_FILE)
        if os.path.exists(path):
            with _naming(path):
                self._load_all_state(read_state(path))
        elif self._all_state():
            self.accelerator.print(f"⚠️ {checkpoint} has no {STATE_FILE}: {self._name} estimates its constants again.")
        folder = os.path.join(checkpoint, REFERENCE_DIR)
        if self._saves_reference() and not os.path.isdir(folder):
            self.accelerator.print(f"⚠️ {checkpoint} has no moving reference, so it starts from the initial model.")
        elif self._saves_reference():
            reference = self.accelerator.unwrap_model(self.ref_model)
            saved = type(reference).from_pretrained(folder, dtype=reference.dtype)
            reference.load_state_dict(saved.state_dict())

    def _saves_reference(self) -> bool:
        return self.args.sync_ref_model and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


class _EpochRepeatSampler(RepeatSampler):
    """TRL's sampler in the same order, but able to start at any epoch, so a resumed run sees the same prompts."""

    seed: int  # TRL's sampler has no generator without one

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Prefixes errors about a file's values with its path."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing. Resume from another checkpoint.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}. Resume from another checkpoint.") from None


@contextmanager
def _removes_no_checkpoints() -> Iterator[None]:
    """Keeps transformers from removing old checkpoints: it does not tell this run's from others'."""
    names: dict[str, Callable] = {"rotate_checkpoints": lambda **kwargs: None, "sort_checkpoints": lambda **kwargs: []}
    originals = {name: getattr(transformers_trainer, name) for name in names}
    try:
        for name, function in names.items():
            setattr(transformers_trainer, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(transformers_trainer, name, function)
