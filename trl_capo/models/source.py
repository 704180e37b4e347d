"""Locate models: every option and function that takes a model's name calls `model_path`.

This module imports nothing heavy, so a missing folder is refused before torch is loaded.
"""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_capo.errors import UserError


ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {name: ASSETS / name for name in ("arithmetic-base", "arithmetic-flat", "arithmetic-misconceptions")}


class ModelNotFound(OSError, UserError):
    """A model that cannot be found or loaded. Also an `OSError`, as in transformers."""


def model_path(name: str) -> str:
    """The location of a model: one of `SHIPPED` by its name, a folder, or a name on the Hub.

    A folder with that name in the working directory takes precedence over a shipped model.

    Raises:
        ModelNotFound: The name can only mean a folder, and the folder does not exist.

    Example:
        >>> model_path("arithmetic-base") == str(ASSETS / "arithmetic-base"), model_path("Qwen/Qwen2.5-Math-1.5B")
        (True, 'Qwen/Qwen2.5-Math-1.5B')
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path) if name.startswith("~") else name
    if name in SHIPPED:
        return str(SHIPPED[name])
    if path.is_file():
        raise ModelNotFound(f"{name!r} is a file. A model is a folder with a config.json, or a name on the Hub.")
    if name.startswith("arithmetic-"):
        raise ModelNotFound(f"{name!r} is neither a folder nor a shipped model ({', '.join(SHIPPED)}).")
    owner, _, rest = name.partition("/")
    if not name or name[0] in "./~" or "\\" in name or name.endswith("/") or "/" in rest:
        raise ModelNotFound(
            f"{name!r} is not a folder{_nearest_parent(path)}. A name on the Hub looks like owner/name."
        )
    if rest and Path(owner).is_dir() and not _on_the_hub(name):
        raise ModelNotFound(
            f"{name!r} is not a folder{_nearest_parent(path)}, and the Hub has no model with that name."
        )
    return name


def _nearest_parent(path: Path) -> str:
    """The existing part of a missing path, for a message."""
    parent = next((parent for parent in path.parents if parent.is_dir()), None)
    if parent is None or parent == Path("/"):
        return ""
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    held = f"contains {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "contains no folders"
    return f" ({str(parent)!r} {held})"


def _on_the_hub(name: str) -> bool:
    """Asks the Hub once, with a short timeout, because `runs/capo` may be a misspelt folder or a repository."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(name, timeout=10)
    except Exception:
        return False
    return True


def check_trainable(path: str) -> None:
    """Refuses a folder without a model to train. The message points out an adapter without its base.

    Raises:
        ModelNotFound: There is no readable config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ModelNotFound(
                f"{path!r} contains an adapter, not a whole model. Merge it into its base and train the result: "
                f"AutoPeftModelForCausalLM.from_pretrained({path!r}).merge_and_unload().save_pretrained(FOLDER); "
                "or, in Python, pass PeftModel.from_pretrained(base, ..., is_trainable=True) as model."
            )
        raise ModelNotFound(f"{path!r} contains no model: it has no config.json.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelNotFound(f"{path}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or not {"model_type", "auto_map"} & config.keys():
        raise ModelNotFound(f"{path}/config.json does not describe a model: it has no 'model_type'.")


@contextmanager
def explained(*names: str) -> Iterator[None]:
    """Explains in one line which model is missing on the Hub, or that the Hub is unreachable.

    Args:
        names: Models that are loaded inside. Folders are left out of the message.

    Raises:
        ModelNotFound: Replaces transformers' error, which does not always name the model.
    """
    try:
        yield
    except OSError as error:
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

        causes, raised_by = [], list(traceback.walk_tb(error.__traceback__))[-1][0].f_globals.get("__name__", "")
        cause: BaseException | None = error
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        name = " or ".join(repr(name) for name in names if not os.path.isdir(name))
        if not name or not raised_by.startswith("transformers"):
            raise
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            reason = "is gated: accept its conditions on its page, then log in with `hf auth login`"
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            reason = "is neither a local folder nor a model on the Hub. If it is private, log in with `hf auth login`"
        elif any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
            reason = (
                f"is neither a local folder nor in the cache, and {offline}. Download it on a machine that can reach "
                f"the Hub (`hf download NAME --local-dir FOLDER`) and pass the folder"
            )
        else:
            raise
        raise ModelNotFound(f"{name} {reason}.") from error
