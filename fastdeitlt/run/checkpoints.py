"""Checkpoints of a run: background saves, recovery, the best weights."""

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

from fastdeitlt.errors import CheckpointError, DamagedError, UserError, counted
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
    """Clean up after a killed writer: remove drafts and restore folders moved away.

    Requires the folder's lock.
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
    """The training checkpoints of a run: the newest ``keep`` folders ``step-<n>``.

    ``best`` is a separate model folder with the selected weights alone; a milestone is a checkpoint kept under its own
    name; ``last`` is a symbolic link to the newest, if supported. A save copies the tensors to host memory and returns;
    a thread writes them, one save at a time. A failed save is reported at the next call, and training continues.

    The manifest of a checkpoint refers to the best weights so far (``best``). They are written to ``best`` right after
    the checkpoint of their step, from which they can be restored if the run dies in between.

    Args:
        folder: the run's ``checkpoints``.
        keep: number of checkpoints kept, at least 2, as a fallback for a damaged one.
        before: called before a checkpoint is written, to flush other files.
    """

    FAILURES = 3
    """Consecutive failed saves that stop the run."""
    STATE = ("step", "epoch", "best", "recent", "fingerprint")
    """Manifest entries about the run; ``best`` has the other entries, about the model."""

    def __init__(self, folder: Path, keep: int = 2, before: Callable[[], None] | None = None) -> None:
        self.folder, self.keep, self.before = folder, keep, before
        self.step = -1
        """Newest step saved by this process."""
        self._writer: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._failures = 0
        self._best: Any = None
        """Last known content of ``best``."""
        self._links = True
        """Whether symbolic links work, until one fails."""
        self._best_weights: dict[str, Tensor] | None = None
        """Weights still to be written to ``best``."""

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        manifest: dict[str, Any],
        *,
        wait: bool = False,
        milestone: str = "",
    ) -> None:
        """Save in the background, then delete surplus checkpoints.

        Args:
            step: completed optimizer steps.
            parts: state dicts by name; "model" is used for evaluation.
            manifest: see ``save_model_folder``; its ``best`` has the step and state-dict name of the best weights.
            wait: wait until the checkpoint is on disk.
            milestone: additional name under which it is kept.

        Raises:
            CheckpointError: three consecutive saves failed, or this one with ``wait``.
        """
        self.finish()
        copies = {name: _host_copy(tensors) for name, tensors in parts.items()}
        best = manifest["best"]
        if best and best["step"] == step and best != self._best:
            self._best_weights = copies[best["weights"]]
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()

        def write() -> None:
            try:
                if copied:
                    copied.synchronize()
                self._write(step, copies, {**manifest, "step": step}, milestone)
                self.step, self._failures = step, 0
            except BaseException as error:  # noqa: BLE001 - reported by finish
                self._failed = error

        writer = threading.Thread(target=write, name="checkpoint")
        writer.start()
        self._writer = writer  # not before it can be joined: ``finish`` may run in another thread
        if wait:
            self.finish(must=True)

    def finish(self, must: bool = False) -> None:
        """Wait for the current save, and log its failure.

        Several threads may call it: a stop signal's waits while the main thread may do the same.

        Raises:
            CheckpointError: it was the third consecutive failure, or ``must`` is set.
        """
        if (writer := self._writer) is None:
            return
        writer.join()
        error, self._writer, self._failed = self._failed, None, None
        if error is None:
            return
        self._failures += 1
        what = str(error).rstrip(".")
        if not isinstance(error, UserError):
            what = f"checkpoint: could not be written ({type(error).__name__}: {error})"
        if must or self._failures >= self.FAILURES:
            raise CheckpointError(f"{what} ({counted(self._failures, 'consecutive failed save')})") from error
        log.warning("%s; training continues (failed save %d of %d)", what, self._failures, self.FAILURES)

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], manifest: dict[str, Any], milestone: str) -> None:
        if self.before:
            self.before()
        path = self.folder / f"step-{step:08d}"
        others = {name: tensors for name, tensors in parts.items() if name != "model"}
        # the milestone first: a checkpoint must not exist without its milestone
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
        facts = {name: fact for name, fact in manifest.items() if name not in (*self.STATE, "epoch_steps", "files")}
        save_model_folder(self.folder / "best", weights, facts | {"selected": manifest["best"]})
        self._best = manifest["best"]

    def _link_last(self, path: Path) -> None:
        """Link ``last`` to the newest checkpoint, for users, not for the program."""
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
                "%s: cannot link to %s (%s); checkpoints are still saved, the newest has the highest step",
                last, path.name, error,
            )  # fmt: skip

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest intact checkpoint and its manifest.

        Renames damaged ones to ``*.damaged-*``.

        Returns:
            None: there are no checkpoints yet.

        Raises:
            CheckpointError: no checkpoint is intact, one cannot be read, or it has an incompatible version.
        """
        for path in step_folders(self.folder):
            try:
                manifest = read_manifest(path)
                if manifest.get("step") != int(path.name.removeprefix("step-")) or "best" not in manifest:
                    raise DamagedError(f"model folder {path}: {MANIFEST} is not of a checkpoint of this step")
            except DamagedError as error:
                log.warning("%s; trying the previous checkpoint", str(error).rstrip("."))
                path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
                continue
            if not manifest.keys() >= set(self.STATE):
                raise CheckpointError(
                    f"checkpoint {path}: written by version {manifest.get('version')}, which this version cannot "
                    "resume. Use that version, or --resume never for a new folder."
                )
            return path, manifest
        damaged = [name for name in list_names(self.folder) if ".damaged-" in name]
        if damaged:
            raise CheckpointError(
                f"resume: no intact checkpoint in {self.folder} (e.g. {damaged[-1]}). Restore one from a backup, or "
                "use --resume never to train from the first step in a new folder."
            )
        return None

    def restore_best(self, manifest: dict[str, Any]) -> bool:
        """Restore ``best`` as stated in a checkpoint's manifest, if needed from its step.

        Returns:
            Whether it succeeded; False: the weights are lost.

        Raises:
            CheckpointError: the file system fails.
        """
        best, folder = manifest["best"], self.folder / "best"
        self._best = best
        if best is None:
            return True
        description = f"the best weights ({best['weights']} of step {best['step']})"
        try:
            selected = read_manifest(folder).get("selected")
            if selected == best:
                return True
            problem = f"{folder}: does not contain {description}"
        except DamagedError as error:
            problem = f"{folder}: damaged ({error})" if folder.exists() else f"{folder}: missing"
        source = self.folder / f"step-{best['step']:08d}"
        try:
            facts = read_manifest(source)
            self._write_best(load_tensors(source, best["weights"]), {**facts, "best": best})
        except DamagedError:
            log.warning("%s; %s are lost, the next evaluation selects new ones", problem, description)
            self._best = None
            return False
        log.warning("%s; restored from %s", problem, source.name)
        return True

    @property
    def latest(self) -> Path | None:
        """Newest checkpoint on disk, not verified."""
        return next(iter(step_folders(self.folder)), None)


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory; copies from a GPU are asynchronous."""
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
    return copies


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
