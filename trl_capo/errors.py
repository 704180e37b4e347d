"""Errors that are the user's to mend."""


class UserError(ValueError):
    """Something the user typed, wrote or installed is wrong, and the message says what to change.

    The command line prints the message in one line, without a traceback, and exits with code 2.
    """
