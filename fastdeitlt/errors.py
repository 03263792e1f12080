"""Errors that are the user's to fix or to know of: the command line prints one line and exits with the error's code."""


class UserError(ValueError):
    """Bad input. The message is one line: what, got, expected, how to fix. Exit code 2."""

    exit_code = 2


class CheckpointError(UserError):
    """No checkpoint is whole, or none can be written. Exit code 4."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is NaN or infinite. Exit code 5."""

    exit_code = 5


class MemoryFullError(UserError):
    """The device's or the host's memory does not hold the step. Exit code 6."""

    exit_code = 6


class RankLostError(UserError):
    """Another rank died, or did not answer in time. Exit code 7."""

    exit_code = 7


class CrashLoopError(UserError):
    """The run died several times without getting further. Exit code 8."""

    exit_code = 8


class StoppedError(UserError):
    """Asked to stop, by SIGTERM or SIGUSR1 (exit code 75: start it again) or Ctrl-C (130); the state is saved."""

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
