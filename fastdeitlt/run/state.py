"""Where a run is, in optimizer steps and epochs: saved and restored with the weights and the best result so far."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.run.folder import Run
from fastdeitlt.store import checkpoint

log = logging.getLogger("fastdeitlt")


class Parts(Protocol):
    """What is trained."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """State dicts by name; "model" is the weights that evaluation uses."""

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Put them back; ``read`` gives the one of a name."""


class Selection(Protocol):
    """The best result so far, and facts about the run that a checkpoint has with it."""

    best: dict[str, Any] | None
    recent: dict[str, float]
    fingerprint: dict[str, str | None]

    def manifest(self) -> dict[str, Any]:
        """What a reader of the weights needs to know."""

    def check_fingerprint(self, saved: Mapping[str, str | None], folder: str) -> None:
        """Refuse to continue a run on other data."""


class Reporter(Protocol):
    """A meter: reports first, so that weights from a loss that is not finite are never saved."""

    def report(self) -> None:
        """Log the steps since the last report."""


class State:
    """The place of a run. All that a state is due (evaluation, milestone) is done before ``epoch`` counts the epoch.

    So a checkpoint of an epoch's last step, saved before its end, makes the next start do what is due first: the loop
    enters that epoch again with no step left.

    Args:
        run: its folder.
        selection: has the best result so far.
        parts: what is trained.
        steps: optimizer steps of an epoch.
    """

    def __init__(self, run: Run, selection: Selection, parts: Parts, steps: int) -> None:
        self.run, self.selection, self.parts, self.steps = run, selection, parts, steps
        self.step = 0
        """Optimizer steps done."""
        self.epoch = 0
        """Epochs ended."""

    @property
    def begun(self) -> int:
        """Optimizer steps of this epoch that are done."""
        return self.step - self.epoch * self.steps

    def save(self, meter: Reporter, wait: bool = False, milestone: str = "") -> None:
        """Checkpoint this state; see ``Checkpoints.save``.

        The meter reports first: it refuses weights that came from a loss that is not finite, and a resumed run then
        logs the same intervals as one that never stopped.
        """
        meter.report()
        tensors, selection, save = self.parts.tensors(), self.selection, self.run.checkpoints.save
        state = {
            "epoch": self.epoch,
            "best": selection.best,
            "recent": selection.recent,
            "fingerprint": selection.fingerprint,
        }
        manifest = selection.manifest() | state
        distributed.on_main(lambda: save(self.step, tensors, manifest, wait=wait, milestone=milestone))

    def restore(self) -> None:
        """Continue from the run's newest whole checkpoint, if there is one.

        Raises:
            CheckpointError: there are checkpoints, but none is whole or one cannot be read.
            UserError: the checkpoint is of other data.
        """
        run = self.run
        folder, manifest = distributed.on_main(run.checkpoints.newest) or (None, None)
        if manifest:
            self.selection.check_fingerprint(manifest["fingerprint"], str(run.folder))
            self.step, self.epoch = manifest["step"], manifest["epoch"]
            if distributed.on_main(lambda: run.checkpoints.restore_best(manifest)):
                self.selection.best, self.selection.recent = manifest["best"], manifest["recent"]
            elif self.begun == 0:
                self.epoch -= 1  # chosen again from these weights
        distributed.on_main(lambda: run.count_start(self.step, self.epoch))
        run.rewind(self.step, ended=self.begun == 0)
        if folder:
            self.parts.load(lambda name: checkpoint.load_tensors(folder, name))
            due = f"; the end of epoch {self.epoch + 1} is due" if self.begun == self.steps else ""
            log.info("resumed %s after step %d%s", run.folder, self.step, due)
