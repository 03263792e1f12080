"""Stopping when asked to: SIGTERM, SIGUSR1 or Ctrl-C at any rank ends all of them after the same optimizer step."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fastdeitlt import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE_S = 1.0
"""A terminal and a launcher may both deliver one Ctrl-C; a signal this much later is a second one."""


class StopRequest:
    """Context in which the signals are noted instead of ending the process; a second one ends it at once.

    No collective runs in a handler: ranks tell each other between steps, on the host, one step late, so that neither
    the device nor a rank waits.
    """

    def __init__(self) -> None:
        self._signal, self._at = 0, 0.0
        self._before: dict[int, Any] = {}
        self._agreement: distributed.Agreement | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._agreement = distributed.Agreement()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The signals end the process again, as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._at = number, now
        elif now - self._at > PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """Called by every rank after each step: the signal that all ranks stop for now, or 0."""
        return self._agreement.highest(self._signal) if self._agreement else self._signal
