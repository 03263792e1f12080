"""Process set-up of a command: stop signals and fault-tolerant standard streams."""

import ctypes
import errno
import gc
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from fastdeitlt.errors import UserError
from fastdeitlt.machine import usable_cores

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCH = "FASTDEITLT_LAUNCH"
"""Environment variable of a rank: id of its launch, the same after a restart."""
RERUN = "rerun the same command"
PATIENCE_S = 1.0
"""Seconds after which another Ctrl-C counts as a second one: a terminal and a launcher may both deliver the first."""
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code after a closed output pipe, as a shell reports it."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt`` (malloc.h)."""
MOST_KEPT = 1 << 28
"""Bytes of the largest block that is kept, and of free memory at the heap's end."""
MOST_KEPT_BEFORE = 1 << 25
"""Largest block that glibc 2.34 and earlier versions accept."""
GC_THRESHOLDS = (50_000, 20, 100)
"""Python's own (700, 10, 10) traverse all of torch several times while it is imported."""
THREADS = os.environ.get("OMP_NUM_THREADS")
"""Threads of each process as the user set them."""
SPINS = "1000"
"""Turns for which an OpenMP thread waits before it sleeps. With GNU OpenMP's own 300,000 (milliseconds) the threads
of a busy machine wait for each other's time slices: beside two other trainings on two cores, the quick start makes 15
images/s instead of 430."""
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(KeyboardInterrupt):
    """A stop signal arrived too late for the training loop, outside a command."""


def stop_code(number: int) -> int:
    """Return the exit code of a stop signal: 130 for Ctrl-C, else 75 (rerun)."""
    return 130 if number == signal.SIGINT else 75


def say_stopped(number: int) -> None:
    """Report a stop without a save, from rank 0."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        name = signal.Signals(number).name
        line = f"fastdeitlt: stopped by {name}; {STOP.rerun} to resume from the last checkpoint, if any\n"
        with suppress(OSError):
            os.write(2, SHOW_CURSOR * os.isatty(2) + line.encode())


class StopSignals:
    """Handling of SIGTERM, SIGUSR1 and Ctrl-C: exit at once, or call a receiver.

    A thread exits the process, because the main thread may be in native code, and an exception there would break
    library imports and callbacks. Signals after the first have no effect, except that a second Ctrl-C does not wait for
    the receiver.
    """

    def __init__(self) -> None:
        self.first = 0
        """First stop signal; 0 = none."""
        self.rerun = RERUN
        """How to resume the current run."""
        self.cleanup: Callable[[int], None] | None = None
        """Called before an exit, concurrently with the main thread."""
        self._receiver: Callable[[int], None] | None = None
        self._leaving = threading.Lock()
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Install the handlers; outside the main thread, do nothing."""
        if threading.current_thread() is threading.main_thread():
            self.first = 0
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def watch(self) -> None:
        """Start the exit thread of a command's process."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=self._pipe[:1], name="stop signals", daemon=True).start()

    @contextmanager
    def received_by(self, receiver: Callable[[int], None]) -> Iterator[None]:
        """Pass stop signals to ``receiver`` within the block."""
        installed = bool(self._before)
        if not installed:
            self.install()
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None
            if not installed:
                for number, handler in self._before.items():
                    signal.signal(number, handler)
                self._before = {}

    def check(self) -> None:
        """Exit if a signal arrived that no receiver handled.

        Raises:
            Stopped: a signal arrived, and this process is not a command.
        """
        if self.first and self._pipe:
            self._leave()
        if self.first:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        if self._receiver:
            self._receiver(number)

    def _watch(self, pipe: int) -> None:
        first_at = 0.0
        while number := os.read(pipe, 1)[0]:
            if number in SIGNALS:
                self.first = self.first or number
                now = time.monotonic()
                first_at = first_at or now
                impatient = number == signal.SIGINT and now - first_at > PATIENCE_S
                if impatient or not self._receiver:
                    self._leave()

    def _leave(self) -> NoReturn:
        with self._leaving:  # the first of two threads exits the process
            try:
                if self.cleanup:
                    self.cleanup(self.first)
            finally:
                say_stopped(self.first)
                os._exit(stop_code(self.first))


STOP = StopSignals()
"""The one instance: signals belong to the process."""


class _Stream(io.RawIOBase):
    """A standard stream that discards failed writes, and stores the first error."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # another owner of the terminal or pipe set O_NONBLOCK
                select.select((), (self.descriptor,), ())
            except OSError as error:
                self.error = self.error or error
                return len(data)


def _replace_streams() -> _Stream:
    """Open closed descriptors 0 to 2; make stdout and stderr fault-tolerant."""
    streams = {descriptor: _Stream(descriptor) for descriptor in range(3)}
    for descriptor, raw in streams.items():
        try:
            os.fstat(descriptor)
        except OSError as closed:  # else the next opened file gets this number and library output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            raw.error = closed
    for name, raw in (("stdout", streams[1]), ("stderr", streams[2])):
        old = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=old.encoding if old else "utf-8",
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty(),
            write_through=bool(old and old.write_through),
        )
        setattr(sys, name, text)
    return streams[1]


def keep_freed_memory() -> None:
    """Let glibc's allocator keep the memory that a step frees, for the next step.

    Returned to the system at each step, its pages are cleared again: 6 % of the quick start's step on one core.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    # each call ends glibc's own adjustment, so the second without the first would leave the limit at 128 KiB
    if any(libc.mallopt(M_MMAP_THRESHOLD, most) for most in (MOST_KEPT, MOST_KEPT_BEFORE)):
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def start() -> _Stream:
    """Set up a command's process before slow imports; return its standard output."""
    keep_freed_memory()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read by the library when torch loads it
    if (cores := usable_cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # OpenMP does not know a container's quota
    gc.set_threshold(*GC_THRESHOLDS)
    stdout = _replace_streams()  # before any file is opened
    STOP.install()
    STOP.watch()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run does not need its terminal
    return stdout


def end(code: int, result: _Stream | None) -> int:
    """Return a command's exit code, or exit at once if stopped or if ranks wait.

    Args:
        code: return value of the command.
        result: standard output, if the command's result is its output: a failed write is then an error.
    """
    if code == 0:
        STOP.check()  # a command interrupted by a signal is not successful
    sys.stdout.flush()
    if code == 0 and result and (lost := result.error):
        if lost.errno == errno.EPIPE:
            code = CLOSED_PIPE
        else:
            print(f"fastdeitlt: error: standard output: {lost.strerror}; redirect it to another place", file=sys.stderr)
            code = UserError.exit_code
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the exit code is final
    if STOP.first or (code and "FASTDEITLT_LAUNCHER" in os.environ):
        # other ranks wait for this one; do not wait for threads of libraries
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # leaves the last collection nothing to traverse; it would take a second
    return code
