r"""Reads the confidence that a completion states in its last `<confidence>` tag.

The completion ends with tags, in one of these orders (the names are those of RLCR's released prompts):

    tac    <answer>...</answer> <confidence>0.8</confidence>
    tabc   <answer>...</answer> <analysis>...</analysis> <confidence>0.8</confidence>
    tbac   <analysis>...</analysis> <answer>...</answer> <confidence>0.8</confidence>
    c      <confidence>0.8</confidence> after any text

`stated_confidence` is strict: each tag appears once, tags are not nested, nothing but space follows the last one, and
the tag holds one number on the scale that you name. Anything else is NaN, because a confidence that was not stated is
unknown. A scale is never guessed: on the scale "unit", the text "8" is NaN and "80%" is 0.8.

`rlcr_confidence` reads as RLCR's released reward does: the last pair counts wherever it stands, a number above 1 is a
percentage, the first number of other text counts, and anything unreadable is 0.

Both take time proportional to the length of the text: tags are found with `str.find`, never with a pattern that can
backtrack.

Source: RLCR (arXiv 2507.16806), its format and its released reader. Assumed here: "c", the percent sign on the scale
"unit", and that RLCR's reader returns 0 for numbers outside of 0..100.
"""

from __future__ import annotations

import math
import re

from trl_capo.errors import UserError


# What the largest value on a scale is; a percent sign is read on "unit" and "percent" only.
SCALES = {"unit": 1.0, "ten": 10.0, "percent": 100.0}
FORMATS = {
    "c": ("confidence",),
    "tac": ("answer", "confidence"),
    "tabc": ("answer", "analysis", "confidence"),
    "tbac": ("analysis", "answer", "confidence"),
}
MAX_NUMBER = 40  # characters; longer text is no stated number, and Python refuses to convert very long ones

_NUMBER = re.compile(r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})[ ]?(%?)", re.ASCII)
_FIRST_NUMBER = re.compile(r"[0-9]{1,30}(?:\.[0-9]{1,30})?", re.ASCII)


def stated_confidence(text: str, *, scale: str = "unit", format: str = "c") -> float:
    """The confidence stated at the end of a completion.

    Args:
        text: The completion.
        scale: "unit" (0..1), "ten" (0..10) or "percent" (0..100).
        format: The tags that the completion must end with: "c", "tac", "tabc" or "tbac".

    Returns:
        The confidence between 0 and 1; NaN if the text breaks the format or holds no number on this scale.

    Raises:
        UserError: Unknown scale or format.

    Example:
        >>> stated_confidence("It is 7. <confidence>0.8</confidence>")
        0.8
        >>> [stated_confidence("<confidence>8</confidence>", scale=scale) for scale in ("ten", "unit")]
        [0.8, nan]
    """
    check_scale(scale)
    parts = terminal_tags(text, format)
    return math.nan if parts is None else read_number(parts["confidence"], scale)


def terminal_tags(text: str, format: str) -> dict[str, str] | None:
    """The content of the tags that end a completion.

    Args:
        text: The completion.
        format: A key of `FORMATS`.

    Returns:
        The content of each tag; None unless each appears once, in this order, not nested, with nothing but space
        between them and after the last.

    Example:
        >>> terminal_tags("<answer>7</answer> <confidence>1</confidence>", "tac")
        {'answer': '7', 'confidence': '1'}
        >>> terminal_tags("<answer>7</answer> <confidence>1</confidence> or so", "tac") is None
        True
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    found, end = {}, None
    for tag in FORMATS[format]:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, stop = text.find(opening), text.find(closing)
        if start < 0 or stop < start or text.rfind(opening) != start or text.rfind(closing) != stop:
            return None
        if end is not None and (start < end or not _is_space(text, end, start)):
            return None
        found[tag] = text[start + len(opening) : stop]
        end = stop + len(closing)
    return found if _is_space(text, end or 0, len(text)) else None


def rlcr_confidence(text: str) -> float:
    """The confidence as RLCR's released reward reads it: lenient, and 0 where nothing can be read.

    Args:
        text: The completion.

    Returns:
        The confidence between 0 and 1.

    Example:
        >>> [rlcr_confidence(f"<confidence>{said}</confidence>") for said in ("0.8", "80", "about 0.7", "no idea")]
        [0.8, 0.8, 0.7, 0.0]
    """
    stop = text.rfind("</confidence>")
    start = text.rfind("<confidence>", 0, max(stop, 0))
    if start < 0:
        return 0.0
    found = _FIRST_NUMBER.search(text, start + len("<confidence>"), stop)
    value = float(found[0]) if found else 0.0
    if value > 1:
        value /= SCALES["percent"]
    return value if value <= 1 else 0.0


def read_number(text: str, scale: str = "unit") -> float:
    """A number on a scale, as a confidence between 0 and 1; NaN for anything else.

    Example:
        >>> read_number(" 80% "), read_number("80", "percent"), read_number("8", "ten"), read_number("80")
        (0.8, 0.8, 0.8, nan)
    """
    largest = SCALES[scale]
    stripped = text.strip() if len(text) <= MAX_NUMBER else ""
    found = _NUMBER.fullmatch(stripped)
    if found is None or found[2] and scale == "ten":
        return math.nan
    value = float(found[1]) / (SCALES["percent"] if found[2] else largest)
    return value if value <= 1 else math.nan


def check_scale(scale: str) -> None:
    """Refuses an unknown scale."""
    if scale not in SCALES:
        raise UserError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}.")


def _is_space(text: str, start: int, end: int) -> bool:
    return not text[start:end].strip()
