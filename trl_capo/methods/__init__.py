"""CAPO and its rivals: one small file per method, with its formula, options and trainer.

`METHODS` maps each method to its trainer, whose `config_class` defines the options. Your own method needs no entry:
wherever a method is named, give its trainer as `package.module:Trainer`.
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
    "conspo": "trl_capo.methods.conspo:ConSPOTrainer",
    "maxrl": "trl_capo.methods.maxrl:MaxRLTrainer",
    "c2gspg": "trl_capo.methods.c2gspg:C2GSPGTrainer",
    "ace": "trl_capo.methods.ace:ACETrainer",
    "rlsr": "trl_capo.methods.rlsr:RLSRTrainer",
    "self_aligned": "trl_capo.methods.self_aligned:SelfAlignedTrainer",
    "progrpo": "trl_capo.methods.progrpo:ProGRPOTrainer",
}


def trainer_of(method: str) -> Any:
    """Return a method's trainer class; its `config_class` defines the options.

    Args:
        method: A key of `METHODS`, or `package.module:Trainer` for your own trainer. Modules in the working directory
            are found too, as with `python -m`.

    Raises:
        UserError: The method, module or trainer does not exist, or is not derived from `GroupAdvantageTrainer`.

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
        raise UserError(f"method {method!r} is not a trainer: derive it from trl_capo.GroupAdvantageTrainer.")
    if not _derives(trainer.config_class, GroupAdvantageConfig):
        raise UserError(
            f"method {method!r} has no config_class: set it to a dataclass derived from trl_capo.GroupAdvantageConfig."
        )
    return trainer


def _derives(found: Any, parent: type) -> bool:
    return isinstance(found, type) and issubclass(found, parent)
