"""Stage 8: folders of weights that are whole or absent. Safetensors and JSON only, nothing is ever unpickled.

A *model folder* holds ``model.safetensors`` (and, for a checkpoint of a run, ``ema`` and ``optimizer`` beside it) and
``manifest.json``, which names every file with its size and sha256. It is written under another name, flushed, and
renamed into place, so that a reader never meets half of one; a file that does not match its manifest is refused (torch
and safetensors would load a flipped bit without a word).
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdeitlt import __version__
from fastdeitlt.atomic import flush, write_atomically
from fastdeitlt.errors import CheckpointError, UserError
from fastdeitlt.manifest import Manifest

log = logging.getLogger("fastdeitlt")
MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model_folder(
    path: str | Path, model: Mapping[str, Tensor], manifest: dict[str, Any], **others: Mapping[str, Tensor]
) -> Path:
    """Write a model folder atomically; an older one of the same name is replaced.

    Args:
        path: the folder to make.
        model: state dict of the weights that evaluation uses.
        manifest: JSON-able facts about the model (kind, model, class_map, preprocess, ...).
        others: more state dicts, one file each, named by keyword.

    Returns:
        The folder.

    Raises:
        CheckpointError: the disk has not twice the room that the tensors need, or writing failed; the old folder stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, **others}
    need = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    room = shutil.disk_usage(path.parent).free
    if room < 2 * need:
        raise CheckpointError(
            f"checkpoint {path}: {room / 2**20:.0f} MiB free, {2 * need / 2**20:.0f} MiB needed; free space"
        )
    draft = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir()
        files = {}
        for name, tensors in parts.items():
            file = draft / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
            file.chmod(0o644)  # safetensors makes files that only their owner can read
            flush(file)
            files[file.name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        whole = {"format": "fastdeitlt", "version": __version__, **manifest, "files": files}
        (draft / MANIFEST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        flush(draft / MANIFEST)
        flush(draft)
        _replace_folder(draft, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: could not be written ({error}); the previous one is kept") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def add_facts(path: str | Path, facts: dict[str, Any]) -> None:
    """Add to the manifest of a model folder what was found out after its weights were written. Atomic.

    Raises:
        CheckpointError: it cannot be written; the folder is as it was.
        UserError: see ``read_manifest``.
    """
    path = Path(path)
    whole = read_manifest(path) | facts
    try:
        write_atomically(path / MANIFEST, json.dumps(whole, indent=1))
        flush(path)
    except OSError as error:
        raise CheckpointError(f"model folder {path}: {MANIFEST} cannot be written ({error})") from error


def _replace_folder(draft: Path, path: Path) -> None:
    """Rename needs an absent target, so an old folder steps aside first and is removed last."""
    aside = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(aside)
    draft.rename(path)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a model folder, after every file it names was found with its size and hash.

    Raises:
        UserError: no folder, no manifest, not one of ours, or a file that is missing or altered.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"model folder {path}: no readable {MANIFEST} ({error}); give a folder written by train"
        ) from None
    if not isinstance(manifest, dict) or "model.safetensors" not in (manifest.get("files") or ()):
        raise UserError(f"model folder {path}: {MANIFEST} is not a fastdeitlt manifest; give a folder written by train")
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"model folder {path}: {MANIFEST}, {where}: {first['msg']}; give a folder written by train"
        ) from None
    for name, facts in checked.files.items():
        file = path / Path(name).name
        if not file.is_file():
            raise UserError(f"model folder {path}: {name} is missing; copy the folder again or use an older checkpoint")
        if _sha256(file) != facts.sha256:
            raise UserError(
                f"model folder {path}: {name} ({file.stat().st_size} bytes) does not match its sha256; it is damaged, "
                "use an older checkpoint"
            )
    return manifest


def load_tensors(path: str | Path, name: str = "model") -> dict[str, Tensor]:
    """One state dict of a model folder, on the CPU. Call ``read_manifest`` first: it checks the hashes.

    Raises:
        UserError: the file is missing or not safetensors.
    """
    file = Path(path) / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); use another checkpoint") from None


def find_model_folder(path: str | Path) -> Path:
    """The model folder that a user means: the folder itself, or the best (else last) checkpoint of a run folder.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"model {path}: no {MANIFEST} there; give a run folder or a folder written by train")


def read_folder(path: str | Path, kind: str, weights: str = "model") -> tuple[dict[str, Tensor], Manifest]:
    """The tensors and the manifest of a model folder, or of the best checkpoint in a run folder.

    Args:
        kind: "student" or "teacher"; the manifest must say the same.
        weights: "model" or "ema".

    Raises:
        UserError: no or a malformed manifest, the other kind, a file that is missing, truncated or changed.
    """
    folder = find_model_folder(path)
    manifest = Manifest.model_validate(read_manifest(folder))
    if manifest.kind != kind:
        raise UserError(f"model folder {folder}: got a {manifest.kind}, expected a {kind}")
    if not manifest.model.num_classes:
        raise UserError(f"model folder {folder}: {MANIFEST} has no model.num_classes; give a folder written by train")
    return load_tensors(folder, weights), manifest


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
    """The training checkpoints of one run: ``step-<n>`` folders, the newest ``keep`` of them, and the link ``last``.

    ``best`` beside them is a model folder of its own, with the selected weights alone; a milestone is a checkpoint
    that is kept under a name of its own. A save copies the tensors to host memory and returns; a thread writes them.
    One save is in flight at a time. A save that fails is reported at the next call, and training goes on without it.

    Args:
        folder: the run's ``checkpoints``.
        keep: checkpoints kept, at least 2, so that a damaged one has one before it.
    """

    FAILURES = 3
    """Saves in a row that may fail before the run stops."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.step = -1
        """The step last given to ``save``."""
        self._writer: threading.Thread | None = None
        self._failed: UserError | None = None
        self._failures = 0

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        manifest: dict[str, Any],
        *,
        wait: bool = False,
        milestone: str = "",
    ) -> None:
        """Save in the background, point ``last`` at it, then drop the checkpoints that are too many.

        Args:
            step: optimizer steps done.
            parts: state dicts by name; "model" is the weights that evaluation uses.
            manifest: see ``save_model_folder``.
            wait: until it is on disk.
            milestone: name under which it is kept besides.

        Raises:
            CheckpointError: three saves in a row failed, or this one did and ``wait`` is set.
        """
        self.finish()
        held = {name: _host_copy(tensors) for name, tensors in parts.items()}
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self.step = step

        def write() -> None:
            try:
                if copied:
                    copied.synchronize()
                self._write(step, held, {**manifest, "step": step}, milestone)
                self._failures = 0
            except UserError as error:
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
        if must or self._failures >= self.FAILURES:
            raise CheckpointError(f"{error} ({self._failures} failed saves in a row)")
        log.warning("%s; training goes on (%d of %d failed saves)", error, self._failures, self.FAILURES)

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], manifest: dict[str, Any], milestone: str) -> None:
        path = save_model_folder(self.folder / f"step-{step:08d}", parts.pop("model"), manifest, **parts)
        if milestone:
            draft = self.folder / f".{milestone}.tmp-{uuid.uuid4().hex[:8]}"
            shutil.copytree(path, draft, copy_function=_link_or_copy)
            _replace_folder(draft, self.folder / milestone)
        draft = self.folder / f".last-{uuid.uuid4().hex[:8]}"
        draft.symlink_to(path.name)
        draft.replace(self.folder / "last")
        for old in self._steps()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint on disk, not verified."""
        return next(iter(self._steps()), None)

    def newest(self, must: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its manifest; a damaged one is set aside as ``*.damaged-*``.

        Raises:
            CheckpointError: ``must``, and there were checkpoints but none is whole.
        """
        for path in self._steps():
            try:
                manifest = read_manifest(path)
                if manifest.get("step") != int(path.name.removeprefix("step-")) or "best" not in manifest:
                    raise UserError(f"model folder {path}: {MANIFEST} is not that of a checkpoint of this step")
                return path, manifest
            except UserError as error:
                log.warning("%s; trying the one before", error)
                path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
        damaged = sorted(self.folder.glob("step-*.damaged-*"))
        if must and damaged:
            raise CheckpointError(
                f"resume: none of the checkpoints in {self.folder} is whole (e.g. {damaged[-1].name}); "
                "use --resume auto to start from the first step, or --resume never for a new folder"
            )
        return None

    def _steps(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
        return sorted(found, reverse=True)


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
