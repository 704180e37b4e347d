"""Losses that TRL's trainer can compute. TRL has no list of them, and refuses others after the first generation."""

import ast
import functools
import inspect
import textwrap

from trl import GRPOTrainer


def known_losses(trainer: type) -> list[str]:
    """The values of `loss_type` that a trainer accepts; empty if unknown.

    Args:
        trainer: The trainer's class. One whose loss is neither TRL's nor ours may accept others.
    """
    owners = {kind.__module__.partition(".")[0] for kind in trainer.__mro__ if "_compute_loss" in vars(kind)}
    return _losses_of_trl() if owners <= {"trl", "trl_capo"} else []


@functools.cache
def _losses_of_trl() -> list[str]:
    """Values that TRL's code compares `loss_type` with; empty if its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    except (OSError, SyntaxError, AttributeError):
        return []
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    parts = [part for node in compared if "loss_type" in ast.unparse(node.left) for part in ast.walk(node)]
    return sorted({part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)})
