"""CAPO, Calibration-Aware Policy Optimization (arXiv 2604.12632), for TRL.

`CAPOTrainer` and `CAPOConfig` are drop-in replacements of TRL's `GRPOTrainer` and `GRPOConfig`. Importing this package
is cheap: torch, transformers and TRL are imported on first use of a name.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_EXPORTS = {
    "CAPOConfig": "methods.capo_config",
    "CAPOTrainer": "methods.capo",
    "GroupAdvantageConfig": "trainer.config",
    "GroupAdvantageTrainer": "trainer.group_advantage",
    "RolloutGroups": "trainer.groups",
}

__all__ = ["CAPOConfig", "CAPOTrainer", "GroupAdvantageConfig", "GroupAdvantageTrainer", "RolloutGroups"]

if TYPE_CHECKING:
    from trl_capo.methods.capo import CAPOTrainer
    from trl_capo.methods.capo_config import CAPOConfig
    from trl_capo.trainer.config import GroupAdvantageConfig
    from trl_capo.trainer.group_advantage import GroupAdvantageTrainer
    from trl_capo.trainer.groups import RolloutGroups


def _check_trl_version() -> None:
    """Refuse other versions of TRL: the seam relies on the internals of 1.16, and others would fail less clearly."""
    try:
        installed = version("trl")
    except PackageNotFoundError as error:
        raise ImportError("trl_capo needs TRL: pip install 'trl[math-verify]>=1.16,<1.17'") from error
    if installed.split(".")[:2] != ["1", "16"]:
        raise ImportError(
            f"trl_capo {__version__} is written and tested for TRL >=1.16,<1.17, but TRL {installed} is installed. "
            "Run: pip install 'trl[math-verify]>=1.16,<1.17'"
        )


_check_trl_version()


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_capo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_capo.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
