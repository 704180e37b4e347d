"""Quote text that others wrote in our Markdown."""

import re


# Markdown fences, around text that may contain fences itself.
BACKTICKS = re.compile(r"`{3,}")
SPECIAL = re.compile(r"[\\`|<>]|(?<=\])\(")  # code, cells, tags; and a bracket that makes a link or an image


def markdown_text(text: str) -> str:
    r"""Escape text so that Markdown shows it literally, on one line: no tags, links, images, code or cells.

    Example:
        >>> print(markdown_text("a|b ![x](../y.png) [0.1, 0.2]"))
        a\|b ![x]\(../y.png) [0.1, 0.2]
    """
    return SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def code_block(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any fence in the text."""
    fence = "`" * max([3, *(len(found) + 1 for found in BACKTICKS.findall(text))])
    return f"{fence}{language}\n{text}\n{fence}"
