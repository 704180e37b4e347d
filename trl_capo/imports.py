"""Import the user's own code that an option names: reward functions, methods."""

import difflib
import importlib
import os
import sys
import traceback
from typing import Any

from trl_capo.errors import UserError


def load(option: str, name: str, module: str, attribute: str) -> Any:
    """Import what an option names. Modules in the working directory are found too.

    Args:
        option: The option's name, for messages.
        name: The option's value.
        module: The module named in the value.
        attribute: The attribute to take from the module.

    Raises:
        UserError: The file or name was not found. The message names it and suggests a similar name.
    """
    found = _import(option, name, module)
    if not hasattr(found, attribute):
        where = getattr(found, "__file__", None) or module
        known = [other for other, value in vars(found).items() if callable(value) and not other.startswith("_")]
        raise UserError(f"{option}: {where} has no {attribute!r}.{hint(attribute, known)}")
    return getattr(found, attribute)


def hint(name: str, known: list[str]) -> str:
    """The end of a message: a suggestion for a misspelt name."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" It has {', '.join(sorted(known)[:8])}." if 0 < len(known) <= 8 else ""


def _import(option: str, name: str, module: str):
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            tried = os.path.join(os.getcwd(), *module.split("."))
            folder = os.path.dirname(tried)
            there = [entry.removesuffix(".py") for entry in os.listdir(folder)] if os.path.isdir(folder) else []
            raise UserError(
                f"{option}: {name!r} needs a module {error.name!r}, which is not installed; nor is there a file "
                f"{tried}.py.{hint(os.path.basename(tried), there)}"
            ) from error
        reason = str(error)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not isinstance(error, SyntaxError) and not frame.filename.startswith("<"):
            reason += f" ({frame.filename}, line {frame.lineno})"
    raise UserError(f"{option}: importing {module!r} failed: {reason}")
