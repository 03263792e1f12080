"""Saving, evaluation and stopping after each step and epoch of a training loop."""

from collections.abc import Iterator

from fastdeitlt.run.folder import Run
from fastdeitlt.run.meter import Meter
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State


class EpochLoop:
    """The remaining epochs of a run.

    Args:
        run: folder and settings.
        state: step and epoch.
        selector: evaluation and selection of weights.
        meter: losses and speed.
        stop: stop signals.
        epochs: epochs of the whole run.
    """

    def __init__(
        self, run: Run, state: State, selector: Selector, meter: Meter, stop: StopRequest, epochs: int
    ) -> None:
        self.run, self.cfg = run, run.cfg
        self.state, self.selector, self.meter, self.stop = state, selector, meter, stop
        self._epochs = epochs

    def epochs(self) -> Iterator[int]:
        """Yield the remaining epochs until the selector is stale (``train.patience``)."""
        for epoch in range(self.state.epoch, self._epochs):
            if self.selector.is_stale:
                return
            yield epoch

    def end_step(self) -> None:
        """Save every ``train.save_every_steps``; save and stop after a stop signal.

        Raises:
            StoppedError: stopped by a signal; the state is saved.
        """
        every = self.cfg.train.save_every_steps
        if every and self.state.step % every == 0:
            self.state.save(self.meter)
        self._stop_if_requested()

    def end_epoch(self, milestone: str = "") -> None:
        """Evaluate and save as configured; save and stop after a stop signal.

        Args:
            milestone: name of an additional checkpoint of this epoch; "": none.

        Raises:
            StoppedError: stopped by a signal; the state is saved.
        """
        cfg, epoch = self.cfg, self.state.epoch
        last, every = epoch + 1 == self._epochs, cfg.train.save_every_epochs
        evaluates = last or (epoch + 1) % cfg.evaluate.every == 0
        with self.meter.paused():
            if evaluates:
                self.selector.evaluate(self.state.step, epoch, last)
            self.state.epoch += 1
            if evaluates or milestone or (every and (epoch + 1) % every == 0):
                self.state.save(self.meter, wait=last or self.selector.is_stale, milestone=milestone)
        self._stop_if_requested(at_once=True)

    def finish(self) -> None:
        """Test the selected weights once."""
        self.stop.close()  # everything is saved
        self.selector.finish(self.state.step, epoch=self.state.epoch - 1)

    def _stop_if_requested(self, at_once: bool = False) -> None:
        if number := self.stop.agreed(at_once=at_once):
            self.state.save(self.meter, wait=True)
            raise self.run.stopped(number, self.state.step)
