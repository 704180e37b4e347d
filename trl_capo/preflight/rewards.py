"""Reward functions: found by the names that recipes give them, and told apart by the names that TRL gives them."""

import difflib
import importlib
import os
import sys
import traceback
from collections import Counter

from trl_capo.errors import UserError


def load_reward_function(name: str, normalize_operators: bool = False):
    """The reward function of a recipe: `accuracy_reward`, another name of `trl.rewards`, or a dotted import path.

    Modules are also looked for in the working directory.

    Args:
        name: The name in the recipe.
        normalize_operators: Let `accuracy_reward` mend malformed LaTeX operators before it grades.

    Raises:
        UserError: Says which file or name was looked for, and what may have been meant.

    Example:
        >>> load_reward_function("math.sqrt")(4.0)
        2.0
    """
    import trl.rewards

    from trl_capo.rewards import accuracy_reward, get_accuracy_reward

    module, _, attribute = name.rpartition(".")
    if not module:
        known = [other for other in dir(trl.rewards) if other.endswith("_reward") and not other.startswith("get_")]
        function = getattr(trl.rewards, name, None)
        if name == "accuracy_reward":
            function = get_accuracy_reward(normalize_operators=True) if normalize_operators else accuracy_reward
        if name.startswith("get_") and callable(function):
            raise UserError(
                f"reward_funcs: {name!r} makes a reward function and is none. Call it in a module of your own and "
                "give the dotted path of what it returns."
            )
        if callable(function):
            return function
        raise UserError(
            f"reward_funcs: {name!r} is not in trl.rewards or trl_capo.rewards.{_hint(name, known)} Give the dotted "
            "path of your own function."
        )
    found = _import(name, module)
    function = getattr(found, attribute, None)
    where = getattr(found, "__file__", None) or module
    if function is None:
        functions = [other for other, value in vars(found).items() if callable(value) and not other.startswith("_")]
        raise UserError(f"reward_funcs: {where} has no {attribute!r}.{_hint(attribute, functions)}")
    if not callable(function):
        raise UserError(f"reward_funcs: {attribute!r} of {where} is no function, but {type(function).__name__}.")
    return function


def _import(name: str, module: str):
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            tried = os.path.join(os.getcwd(), *module.split("."))
            folder = os.path.dirname(tried)
            there = [entry.removesuffix(".py") for entry in os.listdir(folder)] if os.path.isdir(folder) else []
            hint = _hint(os.path.basename(tried), there)
            raise UserError(
                f"reward_funcs: {name!r} needs a module {error.name!r}, which is not installed; nor is there a file "
                f"{tried}.py.{hint}"
            ) from error
        reason = str(error)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not isinstance(error, SyntaxError) and not frame.filename.startswith("<"):
            reason += f" ({frame.filename}, line {frame.lineno})"
    raise UserError(f"reward_funcs: importing {module!r} failed: {reason}")


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" It has {', '.join(sorted(known)[:8])}." if 0 < len(known) <= 8 else ""


def repeated_names(names: list[str]) -> list[str]:
    """Names that several reward functions share.

    Example:
        >>> repeated_names(["reward", "length", "reward"])
        ['reward']
    """
    return [name for name, count in Counter(names).items() if count > 1]


def check_numbers(num_functions: int, processing_classes, weights: list[float] | None) -> None:
    """Refuses processing classes or weights that are not one for each reward function.

    Raises:
        UserError: Says how many there are and how many are needed.
    """
    if processing_classes is not None:
        count = len(processing_classes) if isinstance(processing_classes, list) else 1
        if count != num_functions:
            raise UserError(
                f"The number of reward processing classes ({count}) must match the number of reward functions "
                f"({num_functions}). Give a list of one for each, None for a function."
            )
    if weights is not None and len(weights) != num_functions:
        raise UserError(
            f"Number of reward weights ({len(weights)}) must match number of reward functions ({num_functions}): set "
            "one number for each in reward_weights."
        )
