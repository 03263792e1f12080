"""The checkpoints of one run: saved in the background, found again, the best weights among them."""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeitlt.errors import CheckpointError, DamagedError, UserError
from fastdeitlt.store.checkpoint import (
    MANIFEST,
    list_names,
    load_tensors,
    read_manifest,
    replace_folder,
    save_model_folder,
    step_folders,
)

log = logging.getLogger("fastdeitlt")


def sweep(folder: Path) -> None:
    """Undo what a killed writer left in ``folder``: remove drafts, and put back a folder that had stepped aside.

    Only the run that holds the folder's lock may call it.
    """
    for draft in folder.glob(".*.tmp-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for link in folder.glob(".last-*"):
        link.unlink()
    for aside in folder.glob(".*.old-*"):
        path = folder / aside.name[1:].rpartition(".old-")[0]
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(path)


class Checkpoints:
    """The training checkpoints of one run: ``step-<n>`` folders, the newest ``keep`` of them.

    ``best`` beside them is a model folder of its own, with the selected weights alone; a milestone is a checkpoint
    that is kept under a name of its own; ``last`` links to the newest where the file system has links. A save copies
    the tensors to host memory and returns; a thread writes them. One save is in flight at a time. A save that fails is
    reported at the next call, and training goes on without it.

    The manifest of a checkpoint names the best weights so far (``best``). They are written to ``best`` right after the
    checkpoint of their step, so that they can be made again from it when the run dies in between.

    Args:
        folder: the run's ``checkpoints``.
        keep: checkpoints kept, at least 2, so that a damaged one has one before it.
        before: what must be on the disk before a checkpoint is.
    """

    FAILURES = 3
    """Saves in a row that may fail before the run stops."""
    STATE = ("step", "epoch", "best", "recent", "fingerprint")
    """Facts of a checkpoint's manifest that are about the run; ``best`` has the others, which are about the model."""

    def __init__(self, folder: Path, keep: int = 2, before: Callable[[], None] | None = None) -> None:
        self.folder, self.keep, self.before = folder, keep, before
        self.step = -1
        """The newest step that this process saved."""
        self._writer: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._failures = 0
        self._best: Any = None
        """What is in ``best``, as far as this process knows."""
        self._links = True
        """Whether the file system has symbolic links, as far as known."""
        self._best_weights: dict[str, Tensor] | None = None
        """Weights that are not yet in ``best``."""

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        manifest: dict[str, Any],
        *,
        wait: bool = False,
        milestone: str = "",
    ) -> None:
        """Save in the background, then drop the checkpoints that are too many.

        Args:
            step: optimizer steps done.
            parts: state dicts by name; "model" is the weights that evaluation uses.
            manifest: see ``save_model_folder``; ``best`` in it names the step and the part of the best weights.
            wait: until it is on disk.
            milestone: name under which it is kept besides.

        Raises:
            CheckpointError: three saves in a row failed, or this one did and ``wait`` is set.
        """
        self.finish()
        held = {name: _host_copy(tensors) for name, tensors in parts.items()}
        best = manifest["best"]
        if best and best["step"] == step and best != self._best:
            self._best_weights = held[best["weights"]]
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()

        def write() -> None:
            try:
                if copied:
                    copied.synchronize()
                self._write(step, held, {**manifest, "step": step}, milestone)
                self.step, self._failures = step, 0
            except BaseException as error:  # noqa: BLE001 - whatever it is, nothing is saved
                self._failed = error

        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()
        if wait:
            self.finish(must=True)

    def finish(self, must: bool = False) -> None:
        """Wait for the save in flight, and say so if it failed.

        Raises:
            CheckpointError: it was the third in a row, or ``must`` is set.
        """
        if self._writer is None:
            return
        self._writer.join()
        error, self._writer, self._failed = self._failed, None, None
        if error is None:
            return
        self._failures += 1
        what = str(error)
        if not isinstance(error, UserError):
            what = f"checkpoint: could not be written ({type(error).__name__}: {error})"
        if must or self._failures >= self.FAILURES:
            raise CheckpointError(f"{what} ({self._failures} failed saves in a row)") from error
        log.warning("%s; training goes on (%d of %d failed saves)", what, self._failures, self.FAILURES)

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], manifest: dict[str, Any], milestone: str) -> None:
        if self.before:
            self.before()
        path = self.folder / f"step-{step:08d}"
        others = {name: tensors for name, tensors in parts.items() if name != "model"}
        # the milestone first: a checkpoint after which it is due must not be there without it
        whole = save_model_folder(self.folder / milestone if milestone else path, parts["model"], manifest, **others)
        if milestone:
            draft = self.folder / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
            shutil.copytree(whole, draft, copy_function=_link_or_copy)
            replace_folder(draft, path)
        if self._best_weights:
            self._write_best(self._best_weights, manifest)
            self._best_weights = None
        self._link_last(path)
        for old in step_folders(self.folder)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _write_best(self, weights: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        facts = {name: fact for name, fact in manifest.items() if name not in (*self.STATE, "files")}
        save_model_folder(self.folder / "best", weights, facts | {"selected": manifest["best"]})
        self._best = manifest["best"]

    def _link_last(self, path: Path) -> None:
        """Point ``last`` at the newest checkpoint, for people: the program finds it by its step."""
        if not self._links:
            return
        draft, last = self.folder / f".last-{uuid.uuid4().hex[:8]}", self.folder / "last"
        try:
            draft.symlink_to(path.name)
            draft.replace(last)
        except OSError as error:
            draft.unlink(missing_ok=True)
            self._links = False
            log.warning(
                "%s: cannot link to %s (%s); every checkpoint is saved, the newest is the one of the highest step",
                last, path.name, error,
            )  # fmt: skip

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its manifest; a damaged one is set aside as ``*.damaged-*``.

        Returns:
            None: nothing was saved yet.

        Raises:
            CheckpointError: there were checkpoints but none is whole, one cannot be read, or it is of another version.
        """
        for path in step_folders(self.folder):
            try:
                manifest = read_manifest(path)
                if manifest.get("step") != int(path.name.removeprefix("step-")) or "best" not in manifest:
                    raise DamagedError(f"model folder {path}: {MANIFEST} is not that of a checkpoint of this step")
            except DamagedError as error:
                log.warning("%s; trying the one before", error)
                path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
                continue
            if not manifest.keys() >= set(self.STATE):
                raise CheckpointError(
                    f"checkpoint {path}: was written by version {manifest.get('version')}, which this one cannot "
                    "resume; finish the run with that version, or use --resume never for a new folder"
                )
            return path, manifest
        damaged = [name for name in list_names(self.folder) if ".damaged-" in name]
        if damaged:
            raise CheckpointError(
                f"resume: none of the checkpoints in {self.folder} is whole (e.g. {damaged[-1]}); bring one back "
                "from a copy, or use --resume never to train from the first step in a new folder"
            )
        return None

    def restore_best(self, manifest: dict[str, Any]) -> bool:
        """Make ``best`` what a checkpoint's manifest names as the best; from the checkpoint of that step if need be.

        Returns:
            Whether it is; False: those weights are lost.

        Raises:
            CheckpointError: the file system fails.
        """
        best, folder = manifest["best"], self.folder / "best"
        self._best = best
        if best is None:
            return True
        named = f"the best weights ({best['weights']} of step {best['step']})"
        try:
            found = read_manifest(folder).get("selected")
            if found == best:
                return True
            wrong = f"{folder}: holds other weights than {named}"
        except DamagedError as error:
            wrong = f"{folder}: not whole ({error})" if folder.exists() else f"{folder}: is missing"
        source = self.folder / f"step-{best['step']:08d}"
        try:
            facts = read_manifest(source)
            self._write_best(load_tensors(source, best["weights"]), {**facts, "best": best})
        except DamagedError:
            log.warning("%s; %s are lost, and the next evaluation chooses again", wrong, named)
            self._best = None
            return False
        log.warning("%s; made again from %s", wrong, source.name)
        return True

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint on disk, not verified."""
        return next(iter(step_folders(self.folder)), None)


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that later steps do not change. From a GPU they are started, and not waited for."""
    copies = {}
    for name, tensor in tensors.items():
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = held.copy_(tensor.detach(), non_blocking=True)
    return copies


def _link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes, where the file system has that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
