"""Loads reward functions by the names in recipes, and checks the names that TRL gives them."""

import sys
from collections import Counter

from trl_capo.errors import UserError
from trl_capo.imports import hint, load


def load_reward_function(name: str, normalize_operators: bool = False):
    """Loads a recipe's reward function: the name of one in `trl_capo.rewards` or `trl.rewards`, or a dotted path.

    Modules may also be in the working directory.

    Args:
        name: The name in the recipe.
        normalize_operators: Let `accuracy_reward` repair malformed LaTeX operators before it grades.

    Raises:
        UserError: Names the missing file or name, and suggests similar ones.

    Example:
        >>> load_reward_function("math.sqrt")(4.0)
        2.0
    """
    import trl.rewards

    from trl_capo import rewards

    module, _, attribute = name.rpartition(".")
    if not module:
        names = {*dir(trl.rewards), *rewards.__all__}
        known = sorted(other for other in names if other.endswith("_reward") and not other.startswith("get_"))
        function = getattr(trl.rewards, name, None)
        if name in known and name in rewards.__all__:
            function = getattr(rewards, name)
        if name == "accuracy_reward" and normalize_operators:
            function = rewards.get_accuracy_reward(normalize_operators=True)
        if name.startswith("get_") and callable(function):
            raise UserError(
                f"reward_funcs: {name!r} returns a reward function but is not one. Call it in a module of your own "
                "and give the dotted path of the result."
            )
        if callable(function):
            return function
        raise UserError(
            f"reward_funcs: {name!r} is not in trl.rewards or trl_capo.rewards.{hint(name, known)} Give the dotted "
            "path of your own function."
        )
    function = load("reward_funcs", name, module, attribute)
    if not callable(function):
        where = getattr(sys.modules[module], "__file__", None) or module
        raise UserError(f"reward_funcs: {attribute!r} in {where} must be a function, got {type(function).__name__}.")
    return function


def repeated_names(names: list[str]) -> list[str]:
    """Names shared by several reward functions.

    Example:
        >>> repeated_names(["reward", "length", "reward"])
        ['reward']
    """
    return [name for name, count in Counter(names).items() if count > 1]


def check_one_each(num_functions: int, processing_classes, weights: list[float] | None) -> None:
    """Refuses processing classes or weights that are not one per reward function.

    Raises:
        UserError: Says how many were given and how many are needed.
    """
    if processing_classes is not None:
        count = len(processing_classes) if isinstance(processing_classes, list) else 1
        if count != num_functions:
            raise UserError(
                f"The number of reward processing classes ({count}) must match the number of reward functions "
                f"({num_functions}). Give a list with one for each, None for a function."
            )
    if weights is not None and len(weights) != num_functions:
        raise UserError(
            f"Number of reward weights ({len(weights)}) must match number of reward functions ({num_functions}): set "
            "one number for each in reward_weights."
        )
