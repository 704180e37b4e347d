"""What a run leaves in its folder: JSON, written whole or not at all, and the settings that the folder is of."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


SETTINGS = "settings.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all or nothing; NaN, which JSON does not know, becomes null.

    Args:
        path: Where. A run that is killed meanwhile leaves the old file.
        content: Dictionaries, lists, text and numbers.
    """
    write_text(path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing: a run that is killed meanwhile leaves the old file.

    Args:
        path: Where.
        text: The whole content.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write the same file
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of any kind, all or nothing.

    Args:
        path: Where.
        content: The whole content.
    """
    with written_whole(path) as partial:
        partial.write_bytes(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` for a writer that wants one; the file takes its place once the block ends without an error.

    Args:
        path: Where the file goes. The interim name ends in `.partial`, so tell the writer the format.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write the same file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def remember_settings(folder: Path, settings: dict, what: str) -> None:
    """A folder is of one run: finished parts are not done again, so they must be of the same settings.

    Args:
        folder: Where the run is. The settings go into its `settings.json`.
        settings: Whatever decides the results.
        what: What the run is, for the message.

    Raises:
        ValueError: The folder is of other settings.
    """
    check_settings(folder, settings, what)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, settings)


def check_settings(folder: Path, settings: dict, what: str) -> None:
    """`remember_settings` without writing: a folder that is not there yet is of no settings."""
    path = folder / SETTINGS
    if not path.exists():
        return
    known = json.loads(path.read_text())
    wanted = json.loads(json.dumps(settings))  # tuples become lists
    changed = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if changed:
        raise ValueError(
            f"{folder} holds {what} with another {', '.join(changed)}: "
            f"{', '.join(str(known.get(name)) for name in changed)}. Repeat that, choose another output_dir, or "
            "remove the folder."
        )
