"""Progress reports from a command to its parent: a small file, named by a variable, that each report replaces."""

import json
import os
from pathlib import Path
from typing import Any

from trl_capo.files import write_json


PROGRESS = "TRL_CAPO_PROGRESS"  # the file


def report_progress(done: int, total: int, unit: str, **numbers: float | None) -> None:
    """Report this process's progress. Does nothing unless a parent asked for it.

    Args:
        done: Number of finished units.
        total: Number of all units.
        unit: Name of the unit.
        numbers: Numbers to show next to the progress. None values are left out.
    """
    if path := os.environ.get(PROGRESS):
        shown = {name: number for name, number in numbers.items() if number is not None}
        write_json(Path(path), {"done": done, "total": total, "unit": unit, "numbers": shown})


def read_progress(path: Path) -> dict[str, Any] | None:
    """The last report, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
