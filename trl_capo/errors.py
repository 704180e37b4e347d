"""Errors that are the user's to mend, and texts that are short enough to be read."""


class UserError(ValueError):
    """Something the user typed, wrote or installed is wrong, and the message says what to change.

    The command line prints the message in one line, without a traceback, and exits with code 2.
    """


class UserErrors(UserError):
    """Several of them, found together; the command line prints one line for each.

    Attributes:
        problems: A message each.
    """

    def __init__(self, problems: list[str]):
        self.problems = [one_line(problem) for problem in problems]
        super().__init__("; ".join(self.problems))


def one_line(text: str, limit: int = 2000) -> str:
    r"""A text as one line of bounded length, for messages and logs: completions can be as long as a context.

    Args:
        text: Any text.
        limit: Characters to keep, from both ends of it.

    Returns:
        The text with single spaces, and in place of its middle how much of it is left out.

    Example:
        >>> one_line("a  b\n" + 100 * "c", limit=10)
        'a b c ... [94 characters left out] ... ccccc'
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head, tail = text[: (limit + 1) // 2], text[len(text) - limit // 2 :]
    return f"{head} ... [{len(text) - limit} characters left out] ... {tail}"
