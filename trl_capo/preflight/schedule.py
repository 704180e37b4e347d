"""Counts the generations and optimizer steps of a run, as TRL's sampler and loop do.

TRL's sampler divides the prompts of an epoch into generations and leaves out a remainder that does not fill one. Each
generation feeds `steps_per_generation x num_iterations` micro-steps. An optimizer step takes
`gradient_accumulation_steps` of them; the last one of an epoch may take fewer.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import GRPOConfig

from trl_capo.errors import UserError


if TYPE_CHECKING:

    class FilledConfig(GRPOConfig):
        """A configuration whose constructor has run: TRL declares as optional what the constructor fills in."""

        output_dir: str
        num_generations: int
        generation_batch_size: int
        steps_per_generation: int
        gradient_checkpointing_kwargs: dict[str, Any] | None
        correctness_reward: str | None  # ours: the trainer sets its default on a plain `GRPOConfig`

else:
    FilledConfig = GRPOConfig


@dataclass(frozen=True)
class Schedule:
    """A run in numbers.

    Attributes:
        prompts_per_generation: Prompts over all processes.
        generations_per_epoch: Generations with prompts of their own. Infinite for a stream, whose length is unknown.
        draws: How many times in a row each generation's prompts are drawn (a method's `generations_per_batch`).
        micro_steps_per_generation: Micro-steps per draw.
        steps_per_epoch: Optimizer steps per epoch.
        steps: Optimizer steps of the whole run.
        accumulation: Micro-steps per optimizer step.
    """

    prompts_per_generation: int
    generations_per_epoch: float
    draws: int
    micro_steps_per_generation: int
    steps_per_epoch: float
    steps: int
    accumulation: int

    @property
    def rollout_batches(self) -> int:
        """Number of times that completions are generated."""
        if math.isinf(self.steps_per_epoch):
            micro_steps: float = self.steps * self.accumulation
        elif self.steps_per_epoch == 0:
            return 0
        else:
            micro_steps_per_epoch = self.generations_per_epoch * self.draws * self.micro_steps_per_generation
            epochs, rest = divmod(self.steps, self.steps_per_epoch)
            micro_steps = epochs * micro_steps_per_epoch + min(rest * self.accumulation, micro_steps_per_epoch)
        return math.ceil(micro_steps / self.micro_steps_per_generation)

    @property
    def prompts_seen(self) -> int:
        """Prompts of the whole run; repeats in later epochs count again."""
        return math.ceil(self.rollout_batches / self.draws) * self.prompts_per_generation


def schedule(args: FilledConfig, num_prompts: int | None, draws: int = 1) -> Schedule:
    """Counts the steps of a run.

    Args:
        args: The trainer's configuration, with the launch's number of processes.
        num_prompts: Rows of the training set; None for a stream.
        draws: `generations_per_batch` of the method.
    """
    prompts = args.generation_batch_size // args.num_generations
    generations: float = math.inf if num_prompts is None else num_prompts // prompts
    micro_steps = args.steps_per_generation * args.num_iterations
    accumulation = args.gradient_accumulation_steps
    if num_prompts is None:
        steps_per_epoch: float = math.inf
        steps = max(0, args.max_steps)
    else:
        steps_per_epoch = math.ceil(generations * draws * micro_steps / accumulation)
        steps = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        steps = steps if steps_per_epoch else 0
    return Schedule(prompts, generations, draws, micro_steps, steps_per_epoch, steps, accumulation)


def check_some_steps(args: FilledConfig) -> None:
    """Refuses a run without steps.

    Raises:
        UserError: `max_steps` or `num_train_epochs` is 0.
    """
    if args.max_steps == 0:
        raise UserError("max_steps=0 trains nothing: set it to at least 1, or to -1 to use num_train_epochs.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise UserError(f"num_train_epochs={args.num_train_epochs} trains nothing: set it above 0, or set max_steps.")


def check_enough_prompts(args: FilledConfig, train_dataset, eval_dataset=None) -> None:
    """Refuses datasets too small for one generation or one evaluation batch.

    Args:
        args: The trainer's configuration.
        train_dataset: As given to the trainer. Streams cannot be counted in advance.
        eval_dataset: As given to the trainer; may be a dictionary of sets.

    Raises:
        UserError: Says how many prompts there are, how many are needed and what to lower.
    """
    if isinstance(train_dataset, Dataset):
        needed = args.generation_batch_size // args.num_generations
        if len(train_dataset) < needed:
            options = ["per_device_train_batch_size", steps_option(args)]
            raise UserError(
                f"train_dataset has {_prompts(len(train_dataset))}, but one generation takes {needed}, so nothing "
                f"would be trained: {batch_arithmetic(args)} = {args.generation_batch_size} completions, "
                f"num_generations={args.num_generations} for each prompt. Lower {' or '.join(options)} to at most "
                f"{len(train_dataset) * args.num_generations} completions per generation, or add prompts."
            )
    if not args.dataloader_drop_last or args.eval_strategy == "no":
        return
    sets = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    num_generations = args.num_generations_eval or args.num_generations
    rows = args.per_device_eval_batch_size * args.world_size
    for name, dataset in sets.items():
        if isinstance(dataset, Dataset) and len(dataset) * num_generations < rows:
            label = "eval_dataset" if name is None else f"eval_dataset[{name!r}]"
            raise UserError(
                f"{label} has {_prompts(len(dataset))} x {num_generations} generations, but "
                f"dataloader_drop_last=True drops batches of fewer than {rows} completions, so "
                "nothing would be evaluated. Lower per_device_eval_batch_size, or set dataloader_drop_last=False."
            )


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def steps_option(args: FilledConfig) -> str:
    """The option that sets the number of micro-batches in a generation."""
    same = args.steps_per_generation == args.gradient_accumulation_steps
    return "gradient_accumulation_steps" if same else "steps_per_generation"


def batch_arithmetic(args: FilledConfig) -> str:
    """The completions of a generation as a product of the options that the user sets."""
    processes = f"{args.world_size} process{'' if args.world_size == 1 else 'es'}"
    return (
        f"per_device_train_batch_size={args.per_device_train_batch_size} x {processes} x "
        f"{steps_option(args)}={args.steps_per_generation}"
    )
