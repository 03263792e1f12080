"""User-facing errors, each printed as one line, and their exit codes."""

import errno
import re
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, direction overrides, surrogates of invalid UTF-8."""
_NO_ROOM = (
    "out of memory", "can't allocate", "cannot allocate", "alloc_failed", "allocation_failed", "can't start new thread",
    "failed to map segment", "std::bad_alloc",
)  # fmt: skip
"""Lower-case parts of out-of-memory messages: CUDA outside torch's allocator (pinned memory, modules, Triton, NCCL),
host and DALI allocators, cuBLAS, cuDNN, library loading, threads."""


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space, or write to another folder."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Change the permissions, or use another folder."),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "Restore it if it was moved, and start again."),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit on open files (ulimit -n)."),
    errno.EISDIR: "Use the name of a file.",
    errno.EIO: "Check the system log, and start again.",
}
"""Remedies of system errors that are not bugs, by errno."""


def printable(text: object) -> str:
    """Escape control characters, because file names may have terminal escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: "1 class", "2 classes", "1,000 ranks"."""
    plural = f"{noun}es" if noun.endswith(("s", "tch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def first_fault(error: Any) -> str:
    """Return the place and message of the first fault in a pydantic ValidationError."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def csv_name(text: object) -> str:
    """Format a name for a CSV cell, with an apostrophe before a formula."""
    shown = printable(text)
    return f"'{shown}" if str(text)[:1] in set("=+-@\t\r") else shown


def is_memory_full(error: BaseException) -> bool:
    """Return whether an error means that the device or host is out of memory."""
    is_torch_oom = type(error).__name__ == "OutOfMemoryError"  # torch.OutOfMemoryError, without importing torch
    if is_torch_oom or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    message = str(error).lower()  # loading a library without free memory raises ImportError
    return isinstance(error, RuntimeError | ImportError | OSError) and any(words in message for words in _NO_ROOM)


def storage_failure(error: BaseException | None) -> str | None:
    """Return the message and remedy of a file error that is not a bug, else None."""
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}. {_REMEDIES[error.errno]}"


class UserError(ValueError):
    """Invalid input. One line: what, got, expected, how to fix. Exit code 2."""

    exit_code = 2
    reported: bool | None = None
    """Whether another rank reports it; None: not known."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class StorageError(UserError):
    """Files of a running run disappeared or are not writable. Exit code 1."""

    exit_code = 1


class CheckpointError(UserError):
    """No intact checkpoint, or none can be written. Exit code 4."""

    exit_code = 4


class DamagedError(UserError):
    """A file of a model folder is missing, has a wrong hash or cannot be parsed."""


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is NaN or infinite. Exit code 5."""

    exit_code = 5


class MemoryFullError(UserError):
    """The device or host is out of memory. Exit code 6."""

    exit_code = 6


class RankLostError(UserError):
    """Another rank died or timed out. Exit code 7."""

    exit_code = 7


class CrashLoopError(UserError):
    """The run died repeatedly without progress. Exit code 8."""

    exit_code = 8


class StoppedError(UserError):
    """Stopped, state saved. Exit code 75 (SIGTERM, SIGUSR1: rerun) or 130 (Ctrl-C)."""

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
