"""Resuming, with one decision for all processes of a run."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trl_capo.errors import UserError
from trl_capo.ranks import agree
from trl_capo.trainer.checkpoints import Search, check_checkpoint_of, chosen_checkpoint, find_checkpoint
from trl_capo.trainer.manifest import Checkpoint, Run
from trl_capo.trainer.resume_options import changed_options, kind_of_optimizer


# Options that decide how many prompts a step takes, and so where in the data a resumed run starts.
LAYOUT = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)


def newest_checkpoint(output_dir: str, say: Callable[[str], None]) -> tuple[str | None, Search]:
    """The newest checkpoint to resume from, or None; says which were skipped and why."""
    search = agree(lambda: find_checkpoint(output_dir))
    for line in search.lines:
        say(line)
    return os.path.join(output_dir, search.newest.folder.name) if search.newest else None, search


def newest_or_zero(output_dir: str, say: Callable[[str], None]) -> str | None:
    """The newest checkpoint; None, with a message, if the run starts from scratch because there is none yet.

    Raises:
        UserError: The run had checkpoints, but all are damaged: starting over would overwrite what is left of them.
    """
    newest, search = newest_checkpoint(output_dir, say)
    if newest is None and search.lost:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in search.skipped)
        raise UserError(
            f"resume_from_checkpoint=true: every checkpoint of the run in {output_dir!r} is damaged "
            f"({reasons}). Restore one, or leave resume_from_checkpoint out to start over."
        )
    if newest is None:
        say(f"ℹ️ There is no checkpoint of this run in {output_dir!r} yet: training starts from scratch.")
    return newest


def checkpoint_named(folder: str, output_dir: str) -> Checkpoint:
    """`chosen_checkpoint`, verified by the first process."""
    return agree(lambda: chosen_checkpoint(folder, output_dir))


def checkpoint_to_resume(args) -> str | None:
    """Resolves `--resume_from_checkpoint`: a folder, or `true` for the newest complete checkpoint if there is one."""
    wanted, output_dir = args.resume_from_checkpoint, args.output_dir
    say = print if args.process_index == 0 else lambda line: None
    if str(wanted).lower() == "true":
        return newest_or_zero(output_dir, say)
    if wanted is None or str(wanted).lower() == "false":
        if next(Path(output_dir).glob("checkpoint-*"), None) is not None:
            say(
                f"ℹ️ Starting over in {output_dir}, which has checkpoints of an earlier run. Each is kept until this "
                "run writes one at the same step. To resume from the newest instead: --resume_from_checkpoint true"
            )
        return None
    checkpoint_named(wanted, output_dir)
    return wanted


def check_best(folder: str, run: Run) -> None:
    """Refuses a best checkpoint that is damaged, or that another run left in the folder."""
    agree(lambda: check_checkpoint_of(folder, run))


def what_differs(checkpoint: Checkpoint, args, deepspeed: bool) -> list[str]:
    """Lines that say why the resumed run will not match an uninterrupted one exactly.

    Raises:
        UserError: The checkpoint holds the state of another kind of optimizer.
    """
    name, lines = checkpoint.folder.name, []
    if checkpoint.manifest is None:
        lines.append(f"ℹ️ {name} was written by an earlier version, so its files cannot be verified.")
    if not checkpoint.exact:
        lines.append(
            f"⚠️ {name} lacks the optimizer, scheduler or random state (save_only_model?): it starts anew, and the "
            "resumed run will not match an uninterrupted one exactly."
        )
    if checkpoint.manifest is None:
        return lines
    changed = changed_options(checkpoint.manifest["options"], args)
    old, new = changed.get("optim", ("", ""))
    if checkpoint.exact and not deepspeed and kind_of_optimizer(old) != kind_of_optimizer(new):
        raise UserError(
            f"optim={new}: {name} holds the state of optim={old}, which does not fit. Keep optim={old}, or leave "
            "resume_from_checkpoint out to start over."
        )
    if changed:
        values = ", ".join(f"{option} {old} -> {new}" for option, (old, new) in changed.items())
        lines.append(f"ℹ️ Options changed since {name}; the new values are used from here on: {values}.")
        if deepspeed:
            lines.append("⚠️ DeepSpeed restores the optimizer's options from the checkpoint, so the old ones hold.")
        if {"seed", "data_seed"} & set(changed):
            lines.append("⚠️ seed: prompts are drawn with the new seed, but the random state is the checkpoint's.")
    before = checkpoint.manifest["world_size"]
    if before != args.world_size:
        lines.append(f"⚠️ {name} was written by {before} processes, now there are {args.world_size}: not exact.")
    if before != args.world_size or set(LAYOUT) & set(changed):
        lines.append("⚠️ Steps take different prompts than before: some may be seen twice or left out.")
    return lines


@dataclass
class StreamPosition:
    """The position in a stream, which is read again when it ends, in passes of unknown length.

    Attributes:
        number: The pass, from 0; -1 before the first.
        batches: Batches taken in this pass.
    """

    number: int = -1
    batches: int = 0
    _skipped: int = 0
    _iterator: object = field(default=None, repr=False)

    @classmethod
    def at(cls, number: int, batches: int) -> "StreamPosition":
        """The position of a run that is about to skip `batches` in pass `number`."""
        return cls(number - 1, _skipped=batches)

    def count(self, iterator: object, batches: int) -> None:
        """Counts batches taken from the iterator of a pass."""
        if iterator is not self._iterator:
            self._iterator, self.number = iterator, self.number + 1
            self.batches, self._skipped = self._skipped, 0
        self.batches += batches
