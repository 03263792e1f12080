"""Stopping a training loop: SIGTERM, SIGUSR1 or Ctrl-C at any rank ends all of them after the same optimizer step."""

from contextlib import ExitStack
from types import TracebackType

from fastdeitlt import distributed
from fastdeitlt.run.process import STOP


class StopRequest:
    """Context of a training loop, in which stop signals are noted from the first step on instead of ending the process.

    Before that step, and after ``close``, there is nothing to save. No collective runs in a handler: ranks tell each
    other between steps, on the host, one step late, so that neither the device nor a rank waits.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._notes = False
        self._noting = ExitStack()
        self._agreement: distributed.Agreement | None = None

    def __enter__(self) -> "StopRequest":
        self._agreement = distributed.Agreement()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._noting.close()

    def close(self) -> None:
        """Let signals end the process again.

        Raises:
            Stopped: one arrived after the last step.
        """
        self._noting.close()
        self._notes = False
        if self._signal:
            STOP.check()

    def _note(self, number: int) -> None:
        self._signal = self._signal or number

    def agreed(self, at_once: bool = False) -> int:
        """Called by every rank after each step: the signal that all ranks stop for now, or 0.

        Args:
            at_once: wait for the other ranks, where there is no next step to hear from them.
        """
        if not self._notes:
            self._noting.enter_context(STOP.received_by(self._note))
            self._notes = at_once = True  # no rank goes on before all note signals
        return self._agreement.highest(self._signal, at_once) if self._agreement else self._signal
