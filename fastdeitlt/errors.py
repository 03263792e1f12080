"""Errors that are the user's to fix: the command line prints one line and exits with the error's code."""


class UserError(ValueError):
    """Bad input. The message is one line: what, got, expected, how to fix. Exit code 2."""

    exit_code = 2


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is NaN or infinite. Exit code 5."""

    exit_code = 5
