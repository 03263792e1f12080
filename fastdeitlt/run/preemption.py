"""Graceful stop: a stop signal at any rank stops all after the same step."""

from contextlib import ExitStack
from types import TracebackType

from fastdeitlt import distributed
from fastdeitlt.run.process import STOP


class StopRequest:
    """Context manager that records stop signals from the first step on.

    Before that step, and after ``close``, there is nothing to save. Handlers run no collective: ranks exchange signals
    between steps, on the host, one step late, so that neither the device nor a rank waits.
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
        """Restore the default effect of signals.

        Raises:
            Stopped: a signal arrived after the last step.
        """
        self._noting.close()
        self._notes = False
        if self._signal:
            STOP.check()

    def _note(self, number: int) -> None:
        self._signal = self._signal or number

    def agreed(self, at_once: bool = False) -> int:
        """Return the signal for which all ranks stop now, or 0; call after each step.

        Args:
            at_once: wait for the other ranks' signals of this step, if there is no next step.
        """
        if not self._notes:
            self._noting.enter_context(STOP.received_by(self._note))
            self._notes = at_once = True  # no rank continues before all record signals
        return self._agreement.highest(self._signal, at_once) if self._agreement else self._signal
