"""Errors that are the user's to fix or to know of: the command line prints one line and exits with the error's code."""

import errno
import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, what reverses the direction of a line, bytes that are no UTF-8."""
_NO_ROOM = (
    "out of memory", "can't allocate", "cannot allocate", "alloc_failed", "allocation_failed", "can't start new thread",
    "failed to map segment", "std::bad_alloc",
)  # fmt: skip
"""What plain errors say, in small letters, of CUDA outside torch's allocator (pinned memory, modules, Triton, NCCL), of
the host's allocator and DALI's, of cuBLAS and cuDNN, of the loader of libraries and of threads."""


_CURES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
        "free space or choose another place",
    ),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "put it back if it was moved, and start again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    errno.EISDIR: "give the name of a file",
    errno.EIO: "see the system's log, and start again",
}
"""Errors of the system that are no fault of the program, and what to do."""


def printable(text: object) -> str:
    """Return the text with its control characters escaped: names come from files and may hold what terminals obey."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 class", "2 classes", "1,000 ranks"."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def csv_name(text: object) -> str:
    """Return a name for a cell of a CSV file, after an apostrophe where a spreadsheet would take it for a formula."""
    shown = printable(text)
    return f"'{shown}" if str(text)[:1] in set("=+-@\t\r") else shown


def is_memory_full(error: BaseException) -> bool:
    """Return whether an error says that the device or the system gave no memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    if named or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    said = str(error).lower()  # a library that does not fit is an ImportError
    return isinstance(error, RuntimeError | ImportError | OSError) and any(words in said for words in _NO_ROOM)


def storage_failure(error: BaseException | None) -> str | None:
    """Return what a failed system call on a file means and what to do, for those that are no fault of the program."""
    if not isinstance(error, OSError) or error.errno not in _CURES:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_CURES[error.errno]}"


class UserError(ValueError):
    """Bad input. The message is one line: what, got, expected, how to fix. Exit code 2."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class StorageError(UserError):
    """Files of a run in progress went away or could not be written; starting again may help. Exit code 1."""

    exit_code = 1


class CheckpointError(UserError):
    """No checkpoint is whole, or none can be written. Exit code 4."""

    exit_code = 4


class DamagedError(UserError):
    """A model folder has a file that is missing, does not match its hash or cannot be parsed."""


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
