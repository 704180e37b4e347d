"""Text that others wrote, quoted in Markdown of ours."""

import re


# Fences of Markdown, around text that may have fences of its own.
BACKTICKS = re.compile(r"`{3,}")
SPECIAL = re.compile(r"[\\`|<>]|(?<=\])\(")  # code, cells, tags; and a bracket that makes a link or an image


def markdown_text(text: str) -> str:
    r"""Text that Markdown shows as it is: in one line, without tags, links, images, code or cells of its own.

    Example:
        >>> print(markdown_text("a|b ![x](../y.png) [0.1, 0.2]"))
        a\|b ![x]\(../y.png) [0.1, 0.2]
    """
    return SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def code_block(text: str, language: str = "") -> str:
    """A block of code with a fence that nothing in it closes."""
    fence = "`" * max([3, *(len(found) + 1 for found in BACKTICKS.findall(text))])
    return f"{fence}{language}\n{text}\n{fence}"
