"""Finding the checkpoint to resume from."""

import json
import re
from pathlib import Path


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Newest `checkpoint-*` folder that was written to the end; None without one.

    A run that is killed while it saves leaves a folder behind that cannot be resumed from. The trainer's state is the
    last file of a checkpoint, so a folder is complete if that file can be read.

    Args:
        output_dir: The run's `output_dir`.

    Example:
        >>> last_complete_checkpoint("/no/such/folder") is None
        True
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def checkpoint_step(checkpoint: str | Path | None) -> int | None:
    """Optimizer steps after which a checkpoint was written; None without one, or if its state cannot be read.

    Example:
        >>> checkpoint_step("/no/such/folder") is None
        True
    """
    if not checkpoint:
        return None
    try:
        return json.loads((Path(checkpoint) / "trainer_state.json").read_text()).get("global_step")
    except (OSError, ValueError):
        return None
