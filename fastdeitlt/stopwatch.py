"""How long a rank works by itself: a stopwatch that stands still while the rank is in a collective.

Ranks move in step, so the time of a step is the same on all of them; what tells them apart is how much of it each one
waits for the others. Where it waits depends on the engine: in the step, or, at ZeRO stages 2 and 3, inside the backward
and forward passes.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


class Stopwatch:
    """Seconds on the device's own time line; the host waits for it in ``read`` alone."""

    def __init__(self) -> None:
        self._on_gpu = False
        self._since: Moment | None = None
        self._seconds = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def runs(self) -> bool:
        """Whether what happens now counts."""
        return self._since is not None

    def start(self, device: torch.device) -> None:
        """What ``device`` does from here on counts."""
        self._on_gpu = device.type == "cuda"
        self._since = self._now()

    def stop(self) -> None:
        """What follows does not count."""
        since, self._since = self._since, None
        if isinstance(since, torch.cuda.Event):
            self._spans.append((since, self._now()))  # type: ignore[arg-type]
            self._add_spans()
        elif since is not None:
            self._seconds += time.perf_counter() - since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A collective: does not count."""
        if not self.runs:
            yield
            return
        self.stop()
        try:
            yield
        finally:
            self._since = self._now()

    def read(self) -> float:
        """Seconds that counted since it was read last; waits for the device to reach the last ``stop``."""
        if self._spans:
            self._spans[-1][1].synchronize()
            self._add_spans()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_spans(self) -> None:
        """Count the spans that the device has finished, so that no more events live than it has work."""
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3


WORK = Stopwatch()
"""This rank's: it runs from the arrival of a micro-batch to the end of its backward pass."""
