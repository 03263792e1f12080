"""The process of a command: stop signals from its first lines on, and standard streams whose failure ends nothing."""

import errno
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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE_S = 1.0
"""A terminal and a launcher may both deliver one Ctrl-C; one this much later than the first signal is a second one."""
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code of a command whose reader has gone, as the shell reports it for other programs."""
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(KeyboardInterrupt):
    """Raised at the end of a training loop by a stop signal that came too late for it, outside a command."""


def stop_code(number: int) -> int:
    """Return the exit code for a stop signal: 130 for Ctrl-C, else 75 (start again)."""
    return 130 if number == signal.SIGINT else 75


def say_stopped(number: int) -> None:
    """Report a stop at a moment when nothing was to be saved, from one rank."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        name = signal.Signals(number).name
        line = f"fastdeitlt: stopped by {name}; the same command continues from the last checkpoint, if there is one\n"
        with suppress(OSError):
            os.write(2, SHOW_CURSOR * os.isatty(2) + line.encode())


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C of this process: end it at once, or go to a receiver while there is one.

    A thread ends it: the main thread may be in native code, and an exception in its place would break a library that
    is being imported or called back. Signals after the first change nothing, except that a second Ctrl-C does not wait
    for the receiver.
    """

    def __init__(self) -> None:
        self.first = 0
        """The first stop signal; 0 = none."""
        self.cleanup: Callable[[int], None] | None = None
        """What a stop must not leave undone; the main thread runs on beside it."""
        self._receiver: Callable[[int], None] | None = None
        self._leaving = threading.Lock()
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Set the handlers; does nothing outside the main thread, the only one that can."""
        if threading.current_thread() is threading.main_thread():
            self.first = 0
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def watch(self) -> None:
        """Start the thread, for a process that is a command."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=self._pipe[:1], name="stop signals", daemon=True).start()

    @contextmanager
    def received_by(self, receiver: Callable[[int], None]) -> Iterator[None]:
        """Give every stop signal to ``receiver`` while the block runs."""
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
        """Stop here if a signal has arrived that its receiver left unserved.

        Raises:
            Stopped: there is one, and this process is no command.
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
        begun = 0.0
        while number := os.read(pipe, 1)[0]:
            if number in SIGNALS:
                self.first = self.first or number
                now = time.monotonic()
                begun = begun or now
                impatient = number == signal.SIGINT and now - begun > PATIENCE_S
                if impatient or not self._receiver:
                    self._leave()

    def _leave(self) -> NoReturn:
        with self._leaving:  # of two threads the first ends the process
            try:
                if self.cleanup:
                    self.cleanup(self.first)
            finally:
                say_stopped(self.first)
                os._exit(stop_code(self.first))


STOP = StopSignals()
"""Signals are the process's, so there is one."""


class _Stream(io.RawIOBase):
    """A standard stream that accepts what cannot be written, and keeps the first error."""

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
    """Open those of descriptors 0 to 2 that are closed, and replace stdout and stderr by streams that do not fail."""
    streams = {descriptor: _Stream(descriptor) for descriptor in range(3)}
    for descriptor, raw in streams.items():
        try:
            os.fstat(descriptor)
        except OSError as closed:  # else the next file opened gets this number, and with it what libraries print
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


def start() -> _Stream:
    """Set up the process of a command, before anything slow is imported; return its standard output."""
    stdout = _replace_streams()  # before any file is opened
    STOP.install()
    STOP.watch()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run does not need its terminal
    return stdout


def end(code: int, result: _Stream | None) -> int:
    """Return the exit code of a command, or end the process at once where others wait for it or it was stopped.

    Args:
        code: what the command returned.
        result: standard output, for a command whose result is what it prints: losing that is an error.
    """
    if code == 0:
        STOP.check()  # a signal that cut short what the command waited for is no success
    sys.stdout.flush()
    if code == 0 and result and (lost := result.error):
        if lost.errno == errno.EPIPE:
            code = CLOSED_PIPE
        else:
            print(f"fastdeitlt: error: standard output: {lost.strerror}; write it elsewhere", file=sys.stderr)
            code = UserError.exit_code
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the code stands
    if STOP.first or (code and "FASTDEITLT_LAUNCHER" in os.environ):
        # the other ranks wait for this one, and threads of libraries for their queues
        sys.stderr.flush()
        os._exit(code)
    return code
