"""Model folders of safetensors and JSON (no pickle), atomic writes, verified reads.

A *model folder* has ``model.safetensors`` (a checkpoint of a run also ``ema`` and ``optimizer``) and ``manifest.json``,
which lists every file with its size and sha256. It is written under a temporary name, flushed, and renamed, so readers
never see a partial folder. A file that does not match its manifest is refused: torch and safetensors would silently
load a flipped bit.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdeitlt import __version__
from fastdeitlt.errors import CheckpointError, DamagedError, UserError, first_fault
from fastdeitlt.store.files import flush, write_atomically
from fastdeitlt.store.manifest import Manifest

log = logging.getLogger("fastdeitlt")
T = TypeVar("T")
MANIFEST = "manifest.json"
READ_TRIES = 3
RETRY_S = 2.0
"""Seconds between retries of a failed read."""
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Return ``read(path)``, retrying when the file system fails.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: no such file.
        CheckpointError: every attempt failed.
    """
    for left in reversed(range(READ_TRIES)):
        try:
            return read(path)
        except ABSENT:
            raise
        except OSError as error:
            if not left:
                raise CheckpointError(
                    f"{path}: cannot be read after {READ_TRIES} tries ({error}); nothing was changed, rerun the same "
                    "command when the file system works"
                ) from error
            time.sleep(RETRY_S)
    raise AssertionError


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model_folder(
    path: str | Path, model: Mapping[str, Tensor], manifest: dict[str, Any], **others: Mapping[str, Tensor]
) -> Path:
    """Write a model folder atomically, replacing an existing one.

    Args:
        path: the folder to write.
        model: state dict of the weights that evaluation uses.
        manifest: JSON-able facts about the model (kind, model, class_map, preprocess, ...).
        others: further state dicts by file name, one file each.

    Returns:
        The folder.

    Raises:
        CheckpointError: less free space than twice the tensors' size, or a failed write; the old folder is kept.
    """
    path = Path(path)
    parts = {"model": model, **others}
    need = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    draft = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(path.parent).free
        if room < 2 * need:
            raise CheckpointError(
                f"checkpoint {path}: {room / 2**20:.0f} MiB free, expected {2 * need / 2**20:.0f} MiB. Free space."
            )
        draft.mkdir()
        files = {}
        for name, tensors in parts.items():
            file = draft / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
            file.chmod(0o644)  # safetensors creates files with mode 0600
            flush(file)
            files[file.name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        whole = {"format": "fastdeitlt", "version": __version__, **manifest, "files": files}
        (draft / MANIFEST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        flush(draft / MANIFEST)
        flush(draft)
        replace_folder(draft, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path}: could not be written ({error}); the previous checkpoint is kept"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def add_facts(path: str | Path, facts: dict[str, Any]) -> None:
    """Add entries to the manifest of a model folder, atomically.

    Raises:
        CheckpointError: it cannot be written; the folder is unchanged.
        UserError: see ``read_manifest``.
    """
    path = Path(path)
    whole = read_manifest(path) | facts
    try:
        write_atomically(path / MANIFEST, json.dumps(whole, indent=1))
        flush(path)
    except OSError as error:
        raise CheckpointError(f"model folder {path}: {MANIFEST} cannot be written ({error})") from error


def replace_folder(draft: Path, path: Path) -> None:
    """Rename ``draft`` to ``path``, replacing an existing folder."""
    aside = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(aside)
    draft.rename(path)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a model folder and verify the hash of every file in it.

    Raises:
        DamagedError: no folder, no fastdeitlt manifest, or a missing or altered file.
        CheckpointError: the file system fails.
    """
    path = Path(path)
    try:
        manifest = json.loads(_read(path / MANIFEST, Path.read_bytes))
    except UserError:
        raise
    except (*ABSENT, ValueError, RecursionError) as error:
        raise DamagedError(
            f"model folder {path}: no readable {MANIFEST} ({error}), expected a folder written by train"
        ) from None
    if not isinstance(manifest, dict) or "model.safetensors" not in (manifest.get("files") or ()):
        raise DamagedError(
            f"model folder {path}: {MANIFEST} is not a fastdeitlt manifest, expected a folder written by train"
        )
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        fault = first_fault(error)
        raise DamagedError(f"model folder {path}: {MANIFEST}, {fault}. Use a folder written by train.") from None
    for name, facts in checked.files.items():
        file = path / Path(name).name
        try:
            digest = _read(file, _sha256)
        except ABSENT:
            raise DamagedError(
                f"model folder {path}: {name} is missing. Copy the folder again or use an older checkpoint."
            ) from None
        if digest != facts.sha256:
            raise DamagedError(f"model folder {path}: {name} is damaged (wrong sha256). Use an older checkpoint.")
    return manifest


def load_tensors(path: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Load one state dict to the CPU; call ``read_manifest`` first to verify hashes.

    Raises:
        DamagedError: the file is missing or not safetensors.
        CheckpointError: the file system fails.
    """
    file = Path(path) / f"{name}.safetensors"
    try:
        return _read(file, load_file)
    except (*ABSENT, SafetensorError) as error:
        raise DamagedError(f"{file}: cannot be read ({error}). Use another checkpoint.") from None


def find_model_folder(path: str | Path) -> Path:
    """Return the folder itself, or a run's best (else newest) checkpoint.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints" / "best", *step_folders(path / "checkpoints")):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"model {path}: no {MANIFEST}, expected a run folder or a folder written by train")


def list_names(folder: Path) -> list[str]:
    """List the names in a folder in sorted order; empty if it does not exist.

    Raises:
        CheckpointError: the folder exists but cannot be read.
    """
    try:
        return sorted(_read(folder, os.listdir))
    except ABSENT:
        return []


def step_folders(folder: Path) -> list[Path]:
    """List the step folders of a run's ``checkpoints``, newest first."""
    steps = [name for name in list_names(folder) if name.startswith("step-") and name.removeprefix("step-").isdigit()]
    return [folder / name for name in reversed(steps)]


def read_folder(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Manifest]:
    """Load tensors and manifest of a model folder or a run's best checkpoint.

    Args:
        kind: "student" or "teacher", the kind that the manifest must state.

    Raises:
        UserError: a missing or malformed manifest, the other kind, or a missing, truncated or changed file.
    """
    folder = find_model_folder(path)
    manifest = Manifest.model_validate(read_manifest(folder))
    if manifest.kind != kind:
        raise UserError(f"model folder {folder}: got a {manifest.kind}, expected a {kind}")
    if not manifest.model.num_classes:
        raise UserError(
            f"model folder {folder}: {MANIFEST} has no model.num_classes, expected a folder written by train"
        )
    return load_tensors(folder), manifest
