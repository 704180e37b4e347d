"""Libraries that only some users need: asked for by name before any work is spent."""

import importlib.util

from trl_capo.errors import UserError


MODULES = {
    "report": ("matplotlib", "sklearn", "scipy", "latex2mathml"),
    "vllm": ("vllm",),
    "peft": ("peft",),
}


def require(extra: str) -> None:
    """Refuse to go on without the libraries of an extra.

    Args:
        extra: A key of `MODULES`.

    Raises:
        UserError: If one is not installed; says how to install them.
    """
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for this: pip install 'trl-capo[{extra}]'.")
