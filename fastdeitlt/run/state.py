"""Progress of a run in steps and epochs, saved and restored with its weights."""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.errors import UserError, counted
from fastdeitlt.run.folder import Run
from fastdeitlt.run.meter import Meter
from fastdeitlt.run.selection import Selector
from fastdeitlt.store import checkpoint

log = logging.getLogger("fastdeitlt")


class Parts(Protocol):
    """Trained tensors of a run."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return state dicts by name; "model" is used for evaluation."""

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Restore the tensors; ``read`` returns the state dict of a name."""


class State:
    """Step and epoch of a run; ``epoch`` increases after evaluation and milestone.

    After a restart from a checkpoint of an epoch's last step, the loop re-enters that epoch with no step left, and runs
    its evaluation and milestone first.

    Args:
        run: folder of the run.
        selection: best result so far.
        parts: trained tensors.
        steps: optimizer steps per epoch.
    """

    def __init__(self, run: Run, selection: Selector, parts: Parts, steps: int) -> None:
        self.run, self.selection, self.parts, self.steps = run, selection, parts, steps
        self.step = 0
        """Completed optimizer steps."""
        self.epoch = 0
        """Completed epochs."""

    @property
    def begun(self) -> int:
        """Completed optimizer steps of this epoch."""
        return self.step - self.epoch * self.steps

    def save(self, meter: Meter, wait: bool = False, milestone: str = "") -> None:
        """Save a checkpoint; see ``Checkpoints.save``.

        The meter reports first, which refuses weights after a non-finite loss, and keeps the log intervals of a resumed
        run equal to those of an uninterrupted one.
        """
        meter.report()
        tensors, selection, save = self.parts.tensors(), self.selection, self.run.checkpoints.save
        state = {
            "epoch": self.epoch,
            "epoch_steps": self.steps,
            "best": selection.best,
            "recent": selection.recent,
            "fingerprint": selection.fingerprint,
        }
        manifest = selection.manifest() | state
        distributed.on_main(lambda: save(self.step, tensors, manifest, wait=wait, milestone=milestone))

    def restore(self) -> None:
        """Restore the run's newest intact checkpoint, if there is one.

        Raises:
            CheckpointError: no checkpoint is intact, or one cannot be read.
            UserError: the checkpoint has other data, or epochs of another length.
        """
        run = self.run
        folder, manifest = distributed.on_main(run.checkpoints.newest) or (None, None)
        if manifest:
            self.selection.check_fingerprint(manifest["fingerprint"], str(run.folder))
            self.step, self.epoch = manifest["step"], manifest["epoch"]
            steps = manifest.get("epoch_steps")  # None: saved before version 0.3
            if steps not in (None, self.steps) or not 0 <= self.begun <= self.steps:
                raise UserError(
                    f"checkpoint {folder}: step {self.step} after {counted(self.epoch, 'epoch')}, got "
                    f"{counted(self.steps, 'step')} per epoch, expected {steps or 'those of its run'}. "
                    "Use the batch size, accumulation, ranks and version of fastdeitlt of the run that saved it."
                )
            if distributed.on_main(lambda: run.checkpoints.restore_best(manifest)):
                self.selection.best, self.selection.recent = manifest["best"], manifest["recent"]
            elif self.begun == 0:
                self.epoch -= 1  # evaluate and select again from these weights
        distributed.on_main(lambda: run.count_start(self.step, self.epoch))
        run.rewind(self.step, ended=self.begun == 0)
        if folder:
            self.parts.load(lambda name: checkpoint.load_tensors(folder, name))
            due = f"; next: end of epoch {self.epoch + 1}" if self.begun == self.steps else ""
            log.info("resumed %s at step %d%s", run.folder, self.step, due)
