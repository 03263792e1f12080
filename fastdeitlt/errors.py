"""Errors that are the user's to fix: the command line prints one line and exits with the error's code."""


class UserError(ValueError):
    """Bad input. The message is one line: what, got, expected, how to fix. Exit code 2."""

    exit_code = 2
