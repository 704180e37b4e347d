"""Optional dependencies, checked before any work starts."""

import importlib.util

from trl_capo.errors import UserError


MODULES = {
    "report": ("matplotlib", "sklearn", "scipy", "latex2mathml"),
    "vllm": ("vllm",),
    "peft": ("peft",),
    "language": ("reasoning_gym", "gguf"),
}


def require(extra: str) -> None:
    """Refuse to continue without the libraries of an extra.

    Args:
        extra: A key of `MODULES`.

    Raises:
        UserError: A library is not installed. The message says how to install it.
    """
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for this: pip install 'trl-capo[{extra}]'.")
