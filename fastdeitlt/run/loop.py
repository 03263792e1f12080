"""What every training loop does after a step and after an epoch: save, evaluate, stop when asked to."""

from collections.abc import Iterator

from fastdeitlt.config import Config
from fastdeitlt.run.folder import Run
from fastdeitlt.run.meter import Meter
from fastdeitlt.run.preemption import StopRequest
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State


class EpochLoop:
    """The epochs of a run from its state on.

    Args:
        run: its folder and settings.
        state: where it is.
        selector: evaluates.
        meter: counts.
        stop: signals that ask the run to stop.
        epochs: of the whole run.
    """

    def __init__(
        self, run: Run, state: State, selector: Selector, meter: Meter, stop: StopRequest, epochs: int
    ) -> None:
        self.run, self.cfg = run, run.cfg
        self.state, self.selector, self.meter, self.stop = state, selector, meter, stop
        self._epochs = epochs

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, none once the selector is stale (``train.patience``)."""
        for epoch in range(self.state.epoch, self._epochs):
            if self.selector.is_stale:
                return
            yield epoch

    def end_step(self) -> None:
        """Save and stop as the step that was just counted asks for.

        Raises:
            StoppedError: a signal asked for it; the state is saved.
        """
        every = self.cfg.train.save_every_steps
        if every and self.state.step % every == 0:
            self.state.save(self.meter)
        self._stop_if_asked()

    def end_epoch(self, milestone: str = "") -> None:
        """Evaluate, save and stop as the epoch that was just finished asks for.

        Args:
            milestone: name of a checkpoint of its own that this epoch leaves; "": none.

        Raises:
            StoppedError: a signal asked for it; the state is saved.
        """
        cfg: Config = self.cfg
        epoch = self.state.epoch
        last, every = epoch + 1 == self._epochs, cfg.train.save_every_epochs
        evaluates = last or (epoch + 1) % cfg.evaluate.every == 0
        with self.meter.paused():
            if evaluates:
                self.selector.evaluate(self.state.step, epoch, last)
            self.state.epoch += 1
            if evaluates or milestone or (every and (epoch + 1) % every == 0):
                self.state.save(self.meter, wait=last or self.selector.is_stale, milestone=milestone)
        self._stop_if_asked(at_once=True)

    def finish(self) -> None:
        """Choose the weights and test them once."""
        self.stop.close()  # nothing is left to save
        self.selector.finish(self.state.step, epoch=self.state.epoch - 1)

    def _stop_if_asked(self, at_once: bool = False) -> None:
        if number := self.stop.agreed(at_once=at_once):
            self.state.save(self.meter, wait=True)
            raise self.run.stopped(number, self.state.step)
