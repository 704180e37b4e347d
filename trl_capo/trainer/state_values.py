"""Checked values from a method's state file, which may have been edited by hand."""

import json
import math
from pathlib import Path
from typing import Any

from trl_capo.errors import UserError


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads a state file.

    Raises:
        UserError: It cannot be read, or is not a JSON object.
    """
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Resume from another checkpoint.") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(state).__name__}. Resume from another checkpoint.")
    return state


def finite_number(state: dict, key: str, above: float) -> float | None:
    """A number > `above`; None if it is null or missing.

    Example:
        >>> finite_number({"tau": 0.5}, "tau", above=0)
        0.5
    """
    value = state.get(key)
    if value is not None and not (_is_finite(value) and value > above):
        raise UserError(f"{key} must be null or a finite number above {above:g}, got {_short(value)}")
    return value


def finite_numbers(state: dict, key: str, minimum: float) -> list[float]:
    """A list of numbers >= `minimum`; empty if it is missing."""
    values = state.get(key, [])
    if not isinstance(values, list):
        raise UserError(f"{key} must be a list of numbers, got {_short(values)}")
    for index, value in enumerate(values):
        if not (_is_finite(value) and value >= minimum):
            raise UserError(f"{key}[{index}] must be a finite number of at least {minimum:g}, got {_short(value)}")
    return values


def whole_numbers(state: dict, key: str, limit: int) -> list[int] | None:
    """A list of whole numbers from 0 to below `limit`; None if it is null or missing."""
    values = state.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise UserError(f"{key} must be null or a list of whole numbers, got {_short(values)}")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise UserError(f"{key}[{index}] must be a whole number from 0 to {limit - 1}, got {_short(value)}")
    return values


def whole_number(state: dict, key: str) -> int:
    """A whole number >= 0."""
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{key} must be a whole number of at least 0, got {_short(value)}")
    return value


def truth(state: dict, key: str, default: bool) -> bool:
    """A boolean; `default` if it is missing."""
    value = state.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false, got {_short(value)}")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
