"""How far a command is, for the one that started it: a small file, named by a variable, that each report replaces."""

import json
import os
from pathlib import Path
from typing import Any

from trl_capo.files import write_json


PROGRESS = "TRL_CAPO_PROGRESS"  # the file


def report_progress(done: int, total: int, unit: str, **numbers: float | None) -> None:
    """Say how far this process is. Does nothing if nobody asked.

    Args:
        done: How many units are done.
        total: Of how many.
        unit: What is counted.
        numbers: What to show beside them; None is left out.
    """
    if path := os.environ.get(PROGRESS):
        shown = {name: number for name, number in numbers.items() if number is not None}
        write_json(Path(path), {"done": done, "total": total, "unit": unit, "numbers": shown})


def read_progress(path: Path) -> dict[str, Any] | None:
    """The last report, None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
