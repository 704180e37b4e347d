"""The manifest of a checkpoint: which run wrote it, and whether it is complete.

The manifest is the last file written to a checkpoint. It holds the size and SHA-256 of every other file, and the run
that wrote them.

A run that starts from scratch gets a random id, and keeps it when it resumes from its newest checkpoint. If it resumes
from another checkpoint, it gets a new id and records the checkpoints that led to it (`Run.after`). Version 0.1.0 wrote
no manifest: the run's id is then None, and its checkpoints are not verified.
"""

import hashlib
import json
import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from trl_capo.files import write_json


MANIFEST = "trl_capo_manifest.json"  # in a checkpoint
STATE_FILE = "trl_capo_state.json"  # in a checkpoint: written first, and says that a manifest follows
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """The run that a checkpoint belongs to.

    Attributes:
        id: Random; None for a run that started before runs had ids.
        after: Id and step of each checkpoint of another run that led to this run.
    """

    id: str | None = None
    after: tuple[tuple[str | None, int], ...] = ()

    @classmethod
    def start(cls, after: "Checkpoint | None" = None) -> "Run":
        """A new run, from scratch or from a checkpoint of another run."""
        lineage = (*after.run.after, (after.run.id, after.step)) if after else ()
        return cls(uuid.uuid4().hex, lineage)

    def owns(self, checkpoint: "Checkpoint") -> bool:
        """Whether the run wrote the checkpoint or descends from it.

        Example:
            >>> first, branch = Run("a"), Run("b", after=(("a", 4),))
            >>> [branch.owns(Checkpoint(Path(), step, first)) for step in (4, 6)]
            [True, False]
        """
        ancestors = any(id == checkpoint.run.id and checkpoint.step <= step for id, step in self.after)
        return checkpoint.run.id == self.id or ancestors

    def as_json(self) -> dict[str, Any]:
        return {"run": self.id, "after": [list(pair) for pair in self.after]}

    @classmethod
    def from_json(cls, content: dict) -> "Run":
        return cls(content["run"], tuple((id, int(step)) for id, step in content["after"]))


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-STEP` that is complete according to its manifest."""

    folder: Path
    step: int
    run: Run
    manifest: dict | None = field(default=None, compare=False)

    @property
    def exact(self) -> bool:
        """Whether it holds the optimizer, scheduler and random states, which an exact resume needs."""
        if self.manifest is not None:
            return self.manifest["exact"]
        names = [path.name for path in self.folder.iterdir()]
        kinds = (("optimizer", "global_step"), ("scheduler", "global_step"), ("rng_state",))
        return all(any(name.startswith(kind) for name in names) for kind in kinds)


class Unusable(Exception):
    """A checkpoint cannot be resumed from. `lost` says whether it was once complete."""

    def __init__(self, reason: str, lost: bool):
        super().__init__(reason)
        self.lost = lost


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's manifest without verifying its files.

    Raises:
        Unusable: The checkpoint is incomplete, or its manifest cannot be read.
    """
    if not (folder / MANIFEST).exists():
        try:
            state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
            ours = (
                json.loads((folder / STATE_FILE).read_text(encoding="utf-8")) if (folder / STATE_FILE).exists() else {}
            )
        except (OSError, ValueError):
            raise Unusable("it is incomplete", lost=False) from None
        if not isinstance(state, dict) or not isinstance(ours, dict) or "manifest" in ours:
            raise Unusable("it is incomplete", lost=False)
        step = state.get("global_step", step_in_name(folder))
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise Unusable(f"global_step in {TRAINER_STATE} must be a number of steps, got {step!r}", lost=True)
        return Checkpoint(folder, step, Run())
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        run, _ = Run.from_json(manifest), (str(manifest["written"]), dict(manifest["options"]))
        step, world_size, exact = manifest["step"], manifest["world_size"], manifest["exact"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"{MANIFEST} cannot be read", lost=True) from None
    if type(step) is not int or type(world_size) is not int or world_size < 1 or type(exact) is not bool:
        raise Unusable(f"{MANIFEST} is damaged: step, world_size or exact has an invalid value", lost=True)
    if TRAINER_STATE not in files:
        raise Unusable(f"{MANIFEST} is damaged: it does not list {TRAINER_STATE}", lost=True)
    named = step_in_name(folder) if re.fullmatch(r"checkpoint-\d+", folder.name) else None
    written = checkpoint_step(folder)  # None if it cannot be read: `verify` says why
    for source, other in (("the folder name", named), (TRAINER_STATE, written)):
        if other is not None and other != step:
            raise Unusable(f"{MANIFEST} says step {step}, but {source} says {other}", lost=True)
    return Checkpoint(folder, step, run, {**manifest, "files": files})


def verify(checkpoint: Checkpoint) -> None:
    """Compares a checkpoint's files with its manifest: first sizes, then contents.

    Raises:
        Unusable: A file is missing or has changed.
    """
    if checkpoint.manifest is None:
        return
    files, stamps = checkpoint.manifest["files"], {}
    for name, (size, _) in files.items():
        try:
            status = (checkpoint.folder / name).stat()
        except OSError:
            raise Unusable(f"{name} is missing", lost=True) from None
        if status.st_size != size:
            raise Unusable(f"{name} has {status.st_size:,} bytes instead of {size:,}", lost=True)
        stamps[name] = status.st_mtime_ns
    expected = tuple((name, digest, stamps[name]) for name, (_, digest) in files.items())
    try:
        changed = _changed_files(checkpoint.folder, expected)
    except OSError as error:
        raise Unusable(f"it cannot be read ({error})", lost=True) from None
    if changed:
        raise Unusable(f"the content of {changed} is damaged", lost=True)


@lru_cache(maxsize=64)  # the script verifies before it loads the model, then the trainer verifies again
def _changed_files(folder: Path, files: tuple[tuple[str, str, int], ...]) -> str:
    digests = _sha256([folder / name for name, *_ in files])
    return ", ".join(name for (name, digest, _), found in zip(files, digests, strict=True) if digest != found)


def write_manifest(folder: str | Path, run: Run, step: int, exact: bool, world_size: int, options: dict) -> None:
    """Completes a checkpoint. One process calls this after all have written their files.

    Args:
        folder: The checkpoint.
        run: The run that writes it.
        step: Optimizer steps so far.
        exact: Whether it holds the states of the optimizer, scheduler and random generators.
        world_size: Number of processes.
        options: Settings that a resumed run compares with its own.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in [*paths, *sorted({path.parent for path in paths})]:
        _sync(path)
    digests = _sha256(paths)
    manifest = {
        **run.as_json(),
        "step": step,
        "exact": exact,
        "world_size": world_size,
        "written": datetime.now(UTC).isoformat(),
        "options": options,
        "files": {
            path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
            for path, digest in zip(paths, digests, strict=True)
        },
    }
    write_json(folder / MANIFEST, manifest)
    for path in (folder / MANIFEST, folder, folder.parent):
        _sync(path)


def _sha256(paths: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(digest, paths))


def _sync(path: Path) -> None:
    """Waits until a file or a folder's list of files is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not support fsync on folders
        pass
    finally:
        os.close(descriptor)


def checkpoint_step(checkpoint: str | Path | None) -> int | None:
    """Optimizer steps after which a checkpoint was written; None if there is none or its state cannot be read.

    Example:
        >>> checkpoint_step("/no/such/folder") is None
        True
    """
    if not checkpoint:
        return None
    try:
        return json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8")).get("global_step")
    except (OSError, ValueError, AttributeError):
        return None


def step_in_name(folder: Path) -> int | None:
    """The number at the end of a folder's name, or None."""
    digits = re.search(r"\d+$", folder.name)
    return int(digits.group()) if digits else None
