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
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from fastdeitlt.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE_S = 1.0
"""A terminal and a launcher may both deliver one Ctrl-C; one this much later than the first signal is a second one."""
GRACE_S = 5.0
"""Time to clean up after a stop signal before the process is ended: native code and libraries may swallow it."""
AFTER_CALLBACK_S = 0.05
"""A callback in which a stop signal could not be raised has ended by then; else the signal comes again."""
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code of a command whose reader has gone, as the shell reports it for other programs."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first stop signal, where no training loop will save and stop by itself."""


def stop_code(number: int) -> int:
    """Return the exit code for a stop signal: 130 for Ctrl-C, else 75 (start again)."""
    return 130 if number == signal.SIGINT else 75


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C of this process: end it at once, or go to a receiver while there is one.

    Signals after the first change nothing, except that a second Ctrl-C does not wait for the receiver.
    """

    def __init__(self) -> None:
        self.first = 0
        """The first stop signal; 0 = none."""
        self.cleanup: Callable[[int], None] | None = None
        """What a stop must not leave undone, also where the main thread cannot unwind. It may be called twice."""
        self._at = 0.0
        self._raised = False
        self._receiver: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Set the handlers; does nothing outside the main thread, the only one that can."""
        if threading.current_thread() is threading.main_thread():
            self.first, self._raised = 0, False
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def watch(self) -> None:
        """Start a thread that ends the process ``GRACE_S`` after a stop signal, whatever the main thread does."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        sys.unraisablehook = self._raise_again
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()

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
            Stopped: there is one.
        """
        if self.first:
            self._raise()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        impatient = self.first and number == signal.SIGINT and now - self._at > PATIENCE_S
        if not self.first:
            self.first, self._at = number, now
        if self._receiver:
            self._receiver(number)
        if (impatient or not self._receiver) and not self._raised:
            self._raise()

    def _raise(self) -> NoReturn:
        self._raised = True
        if self._pipe:
            os.write(self._pipe[1], bytes([self.first]))
        raise Stopped(signal.Signals(self.first).name)

    def _raise_again(self, swallowed: "sys.UnraisableHookArgs") -> None:
        """Let a stop that came in a callback, where nothing can be raised, come once more after it."""
        if isinstance(swallowed.exc_value, Stopped):
            self._raised = False
            threading.Timer(AFTER_CALLBACK_S, os.kill, (os.getpid(), self.first)).start()
        else:
            sys.__unraisablehook__(swallowed)

    def _watch(self) -> None:
        assert self._pipe
        while number := os.read(self._pipe[0], 1)[0]:
            time.sleep(GRACE_S)
            if self._raised or (number in SIGNALS and self._receiver is None):
                number = self.first or number
                try:
                    if self.cleanup:
                        self.cleanup(number)
                finally:
                    os._exit(stop_code(number))


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
