"""The files in a run's folder: JSON that is written completely or not at all, and the run's settings."""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_capo.errors import UserError
from trl_capo.redact import mask, redact


SETTINGS = "settings.json"
MAX_NAME, MAX_BYTES = 120, 200  # most systems allow 255 bytes, and we append to names
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all or nothing. NaN, which JSON lacks, becomes null; secret values are masked with stars.

    Args:
        path: The file to write. A run that is killed during the write keeps the old file.
        content: Dictionaries, lists, text and numbers.
    """
    write_text(path, json.dumps(_clean(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing: a run that is killed during the write keeps the old file.

    Args:
        path: The file to write.
        text: The whole content.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. The file written there replaces `path` if the block ends without an error.

    Args:
        path: The file to replace.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write the same file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, all or nothing.

    Args:
        path: The file to write.
        content: The whole content.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def check_names(what: str, names: Sequence[Any]) -> None:
    """Refuse names that cannot become files or folders next to each other on every system.

    Args:
        what: The option or key that holds the names, for the message.
        names: All names in one folder.

    Raises:
        UserError: A name is not text, leaves its folder, or is reserved, hidden or too long; or two names differ only
            in case or Unicode form, which some file systems ignore.
    """
    known: dict[str, str] = {}
    for name in names:
        if problem := _name_problem(name):
            raise UserError(
                f"{what}: {name!r:.200} {problem}. It becomes the name of a file or folder: use letters, digits, '-', "
                f"'_' and '.', at most {MAX_NAME} characters, starting with a letter, a digit or '_'."
            )
        same = known.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if same is not name:
            raise UserError(
                f"{what}: {same!r} and {name!r} become the same file or folder on some systems. Rename one of them."
            )


def _name_problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return "is not text (put it in quotes)"
    if not name.strip():
        return "is empty"
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters"
    if (size := len(name.encode("utf-8", "surrogatepass"))) > MAX_BYTES:
        return f"has {size} bytes in UTF-8, more than {MAX_BYTES}"
    if bad := sorted({c for c in name if c in '/\\:*?"<>|' or unicodedata.category(c).startswith(("C", "Zl", "Zp"))}):
        return f"contains {bad[0]!r}"
    if name[0] in ".-~" or name[0].isspace():
        return f"starts with {name[0]!r}"
    if name[-1] in ". ":
        return f"ends with {name[-1]!r}"
    return "is a reserved name on Windows" if RESERVED.fullmatch(name) else None


def _clean(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _clean(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_clean(value) for value in content]
    if isinstance(content, str):
        return mask(content)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def remember_settings(folder: Path, settings: dict, what: str) -> None:
    """Record the settings of a run, or refuse a folder that has others.

    Each folder belongs to one run. Finished parts are reused, so the settings must match.

    Args:
        folder: The run's folder. The settings go into its `settings.json`.
        settings: Everything that determines the results.
        what: A description of the run, for the message.

    Raises:
        UserError: The folder has other settings.
    """
    settings = redact(settings)
    check_settings(folder, settings, what)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, settings)


def check_settings(folder: Path, settings: dict, what: str) -> None:
    """`remember_settings` without writing. A missing folder has no settings to conflict with."""
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError(f"not a dictionary but {type(known).__name__}")
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}. Delete the folder, or choose another output_dir.") from error
    wanted = json.loads(json.dumps(redact(settings)))  # tuples become lists
    changed = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if changed:
        raise UserError(
            f"{folder} already contains {what} with {', '.join(f'{name}={known.get(name)}' for name in changed)}. "
            "Rerun with these settings, choose another output_dir, or delete the folder."
        )
