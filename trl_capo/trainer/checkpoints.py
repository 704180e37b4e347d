"""Chooses the checkpoint that a run resumes from, and the old ones that it may remove.

Checkpoints that do not match their manifest (see `trl_capo.trainer.manifest`) are skipped, and so are those that
another run left in the same folder.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trl_capo.errors import UserError
from trl_capo.files import write_json
from trl_capo.trainer.manifest import Checkpoint, Run, Unusable, read_checkpoint, step_in_name, verify


RUN_FILE = "trl_capo_run.json"  # in the run's folder


@dataclass
class Search:
    """The result of searching a folder for checkpoints.

    Attributes:
        newest: The newest checkpoint that can be resumed from, or None.
        skipped: Name and reason of each skipped checkpoint.
        lost: Names of the skipped checkpoints that were once complete.
    """

    newest: Checkpoint | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [f"⚠️ Skipped {name}: {reason}." for name, reason in self.skipped]


def find_checkpoint(output_dir: str | Path) -> Search:
    """Finds the newest checkpoint of the folder's run that matches its manifest, and lists those skipped.

    Args:
        output_dir: The run's `output_dir`.
    """
    folders, search, known = _folders(output_dir), Search(), {}
    for folder in folders:
        try:
            known[folder] = read_checkpoint(folder)
        except Unusable as error:
            search.skipped.append((folder.name, str(error)))
            search.lost += [folder.name] if error.lost else []
    run = current_run(output_dir, known.values())
    for folder, checkpoint in known.items():
        if not run.owns(checkpoint):
            search.skipped.append((folder.name, "it belongs to another run that used this folder"))
        elif search.newest is None:
            try:
                verify(checkpoint)
                search.newest = checkpoint
            except Unusable as error:
                search.skipped.append((folder.name, str(error)))
                search.lost.append(folder.name)
    return search


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-*` folder that the run in `output_dir` can resume from, or None.

    Args:
        output_dir: The run's `output_dir`.

    Example:
        >>> last_complete_checkpoint("/no/such/folder") is None
        True
    """
    newest = find_checkpoint(output_dir).newest
    return None if newest is None else str(newest.folder)


def chosen_checkpoint(folder: str | Path, output_dir: str | Path) -> Checkpoint:
    """Reads and verifies the checkpoint that the user named.

    Raises:
        UserError: It cannot be resumed from. Names the newest checkpoint in `output_dir` that can.
    """
    if not os.path.isdir(folder):
        raise UserError(f"resume_from_checkpoint={str(folder)!r} is not a folder. Use true for the newest checkpoint.")
    try:
        checkpoint = read_checkpoint(Path(folder))
        verify(checkpoint)
    except Unusable as error:
        newest = last_complete_checkpoint(output_dir)
        raise UserError(
            f"resume_from_checkpoint={str(folder)!r} cannot be resumed from: {error}. "
            + (f"Use {newest}, the newest complete checkpoint." if newest else "Use another checkpoint.")
        ) from None
    return checkpoint


def check_checkpoint_of(folder: str | Path, run: Run) -> None:
    """Refuses a best checkpoint that is damaged or belongs to another run.

    Raises:
        UserError: Names the checkpoint and the reason.
    """
    try:
        checkpoint = read_checkpoint(Path(folder))
        verify(checkpoint)
        if not run.owns(checkpoint):
            raise Unusable("it belongs to another run that used this folder", lost=False)
    except Unusable as error:
        raise UserError(
            f"the best checkpoint, {folder}, cannot be loaded: {error}. To save the last weights instead, resume from "
            "the newest checkpoint with load_best_model_at_end=False."
        ) from None


def current_run(output_dir: str | Path, checkpoints: Iterable[Checkpoint] = ()) -> Run:
    """The run that a folder belongs to: the one in its run file, or else the run of the checkpoint written last.

    Raises:
        UserError: The run file cannot be read.
    """
    path = Path(output_dir, RUN_FILE)
    if path.exists():
        try:
            return Run.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, which records the run that the folder belongs to, cannot be read. Delete it to continue the "
                "run that wrote the newest checkpoint."
            ) from None
    written = {c.manifest["written"]: c.run for c in checkpoints if c.manifest is not None}
    return written[max(written)] if written else Run()


def begin_run(output_dir: str | Path, checkpoint: Checkpoint | None) -> Run:
    """Chooses the run that a training belongs to, and records it in the folder.

    Args:
        output_dir: Where the run writes.
        checkpoint: The checkpoint that the training resumes from; None if it starts from scratch.
    """
    search = find_checkpoint(output_dir) if checkpoint is not None else Search()
    if checkpoint is not None and search.newest is not None and _same(search.newest.folder, checkpoint.folder):
        run = current_run(output_dir, [checkpoint])
    else:
        run = Run.start(checkpoint)
    os.makedirs(output_dir, exist_ok=True)
    write_json(Path(output_dir, RUN_FILE), run.as_json())
    return run


def remove_old_checkpoints(
    output_dir: str | Path, run: Run, limit: int | None, best: str | None, keep_newest: bool = True
) -> None:
    """Removes a run's oldest checkpoints until `limit` remain. Checkpoints of other runs are kept.

    Args:
        output_dir: The folder with the checkpoints.
        run: The run whose checkpoints may be removed.
        limit: `save_total_limit`; None keeps all.
        best: A checkpoint that is always kept.
        keep_newest: Whether the newest checkpoint is always kept too.
    """
    if not limit or limit < 0:
        return
    own = []
    for folder in _folders(output_dir):
        try:
            checkpoint = read_checkpoint(folder)
        except Unusable:
            continue
        if run.owns(checkpoint):
            own.append(folder)
    protected = [
        folder
        for folder in own
        if (keep_newest and folder == own[0]) or (best is not None and _same(folder, Path(best)))
    ]
    others = [folder for folder in own if folder not in protected]
    for folder in others[max(0, limit - len(protected)) :]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders, newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: step_in_name(path) or 0, reverse=True)


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()
