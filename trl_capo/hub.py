"""How a model that is saved gets to the Hub: the command, for whoever has to name it."""

import shlex
from pathlib import Path


def push_command(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    dataset: str | None = None,
    revision: str | None = None,
) -> str:
    """The command that uploads a folder.

    Example:
        >>> push_command("runs/capo", "me/capo", private=True)
        'trl-capo push runs/capo --repo_id me/capo --private'
    """
    words = ["trl-capo", "push", str(folder), "--repo_id", repo_id] + ["--private"] * bool(private)
    for name, value in (("--dataset", dataset), ("--revision", revision)):
        words += [name, value] if value is not None else []
    return shlex.join(words)
