"""CAPO and its rivals: one small file a method, with its formula, its options and its trainer.

`METHODS` has one line a method: its trainer, whose `config_class` gives the options. A method of your own needs no
entry: name its trainer as `package.module:Trainer` wherever a method is named.
"""

from pkgutil import resolve_name
from typing import Any

from trl_capo.errors import UserError
from trl_capo.imports import load


METHODS = {
    "capo": "trl_capo.methods.capo:CAPOTrainer",
    "grpo": "trl_capo.methods.grpo:GRPO",
    "gspo": "trl_capo.methods.gspo:GSPOTrainer",
    "codapo": "trl_capo.methods.codapo:CoDaPOTrainer",
    "cde": "trl_capo.methods.cde:CDETrainer",
    "simko": "trl_capo.methods.simko:SimKOTrainer",
    "capo_simko": "trl_capo.methods.simko:CAPOSimKOTrainer",
}


def trainer_of(method: str) -> Any:
    """The trainer of a method; its `config_class` has the options.

    Args:
        method: A key of `METHODS`, or `package.module:Trainer` for a trainer of your own, found from the working
            directory as `python -m` would.

    Raises:
        UserError: There is no such method, module or trainer, or it is not derived from `GroupAdvantageTrainer`.

    Example:
        >>> trainer_of("gspo").__name__, trainer_of("trl_capo.methods.gspo:GSPOTrainer").__name__
        ('GSPOTrainer', 'GSPOTrainer')
    """
    if not isinstance(method, str) or method not in METHODS and not all(method.partition(":")):
        raise UserError(f"method must be one of {', '.join(METHODS)}, or package.module:Trainer, got {method!r}.")
    if method in METHODS:
        return resolve_name(METHODS[method])
    module, _, name = method.partition(":")
    trainer = load("method", method, module, name)

    from trl_capo.trainer.config import GroupAdvantageConfig
    from trl_capo.trainer.group_advantage import GroupAdvantageTrainer

    if not _derives(trainer, GroupAdvantageTrainer):
        raise UserError(f"method {method!r} is no trainer: derive it from trl_capo.GroupAdvantageTrainer.")
    if not _derives(trainer.config_class, GroupAdvantageConfig):
        raise UserError(
            f"method {method!r} has no config_class: set it to a dataclass derived from trl_capo.GroupAdvantageConfig."
        )
    return trainer


def _derives(found: Any, parent: type) -> bool:
    return isinstance(found, type) and issubclass(found, parent)
