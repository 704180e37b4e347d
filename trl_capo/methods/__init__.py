"""CAPO and its rivals: one small file a method, with its formula, its options and its trainer.

`METHODS` has one line a method: its trainer, whose `config_class` gives the options. A method of your own needs no
entry: name its trainer as `package.module:Trainer` wherever a method is named.
"""

import os
import sys
from pkgutil import resolve_name

from trl_capo.errors import UserError


METHODS = {
    "capo": "trl_capo.methods.capo:CAPOTrainer",
    "grpo": "trl_capo.methods.grpo:GRPO",
    "gspo": "trl_capo.methods.gspo:GSPOTrainer",
    "codapo": "trl_capo.methods.codapo:CoDaPOTrainer",
    "cde": "trl_capo.methods.cde:CDETrainer",
    "simko": "trl_capo.methods.simko:SimKOTrainer",
    "capo_simko": "trl_capo.methods.simko:CAPOSimKOTrainer",
}


def trainer_of(method: str) -> type:
    """The trainer of a method; its `config_class` has the options.

    Args:
        method: A key of `METHODS`, or `package.module:Trainer` for a subclass of `GroupAdvantageTrainer` of your own,
            found from the working directory as `python -m` would.

    Raises:
        UserError: There is no such method, module or trainer, or it is no subclass of TRL's `GRPOTrainer`.

    Example:
        >>> trainer_of("trl_capo.methods.gspo:GSPOTrainer").__name__
        'GSPOTrainer'
    """
    path = METHODS.get(method, method)
    if ":" not in path:
        raise UserError(f"method must be one of {', '.join(METHODS)}, or package.module:Trainer, got {method!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        trainer = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method {method!r} could not be imported: {error}.") from error
    from trl import GRPOTrainer

    if not (isinstance(trainer, type) and issubclass(trainer, GRPOTrainer) and hasattr(trainer, "config_class")):
        raise UserError(f"method {method!r} is no trainer: derive it from trl_capo.GroupAdvantageTrainer.")
    return trainer
