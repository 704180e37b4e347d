"""Errors that the user can fix, and texts that are short enough to read."""


class UserError(ValueError):
    """Something the user typed, wrote or installed is wrong, and the message says what to change.

    The command line prints the message in one line, without a traceback, and exits with code 2.
    """


class UserErrors(UserError):
    """Several user errors, found together. The command line prints one line for each.

    Attributes:
        problems: One message per error.
    """

    def __init__(self, problems: list[str]):
        self.problems = [one_line(problem) for problem in problems]
        super().__init__(problems)  # as it was called, so that a copy in another process is the same

    def __str__(self) -> str:
        return "; ".join(self.problems)


def one_line(text: str, limit: int = 2000) -> str:
    r"""A text as one line of bounded length, for messages and logs, because completions can be very long.

    Args:
        text: Any text.
        limit: Number of characters to keep, from both ends of the text.

    Returns:
        The text with single spaces. A note about the omitted length replaces the middle of a long text.

    Example:
        >>> one_line("a  b\n" + 100 * "c", limit=10)
        'a b c ... [94 characters left out] ... ccccc'
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head, tail = text[: (limit + 1) // 2], text[len(text) - limit // 2 :]
    return f"{head} ... [{len(text) - limit} characters left out] ... {tail}"
