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
from fastdeitlt.errors import CheckpointError, DamagedError, UserError
from fastdeitlt.store.files import flush, write_atomically
from fastdeitlt.store.manifest import Manifest

log = logging.getLogger("fastdeitlt")
T = TypeVar("T")
MANIFEST = "manifest.json"
READ_TRIES = 3
RETRY_S = 2.0
"""Seconds between the tries: a file system that fails is not a damaged file."""
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Return ``read(path)``, tried again where the file system fails.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: no such file.
        CheckpointError: every try failed.
    """
    for left in reversed(range(READ_TRIES)):
        try:
            return read(path)
        except ABSENT:
            raise
        except OSError as error:
            if not left:
                raise CheckpointError(
                    f"{path}: cannot be read ({error}), tried {READ_TRIES} times; nothing was changed, run the same "
                    "command again once the file system answers"
                ) from error
            time.sleep(RETRY_S)
    raise AssertionError


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
    parts = {"model": model, **others}
    need = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    draft = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(path.parent).free
        if room < 2 * need:
            raise CheckpointError(
                f"checkpoint {path}: {room / 2**20:.0f} MiB free, {2 * need / 2**20:.0f} MiB needed; free space"
            )
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
        replace_folder(draft, path)
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


def replace_folder(draft: Path, path: Path) -> None:
    """Rename needs an absent target, so an old folder steps aside first and is removed last."""
    aside = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(aside)
    draft.rename(path)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a model folder and check every file that it names against its hash.

    Raises:
        DamagedError: no folder, no manifest, not one of ours, or a file that is missing or altered.
        CheckpointError: the file system fails.
    """
    path = Path(path)
    try:
        manifest = json.loads(_read(path / MANIFEST, Path.read_bytes))
    except UserError:
        raise
    except (*ABSENT, ValueError, RecursionError) as error:
        raise DamagedError(
            f"model folder {path}: no readable {MANIFEST} ({error}); give a folder written by train"
        ) from None
    if not isinstance(manifest, dict) or "model.safetensors" not in (manifest.get("files") or ()):
        raise DamagedError(
            f"model folder {path}: {MANIFEST} is not a fastdeitlt manifest; give a folder written by train"
        )
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedError(
            f"model folder {path}: {MANIFEST}, {where}: {first['msg']}; give a folder written by train"
        ) from None
    for name, facts in checked.files.items():
        file = path / Path(name).name
        try:
            found = _read(file, _sha256)
        except ABSENT:
            raise DamagedError(
                f"model folder {path}: {name} is missing; copy the folder again or use an older checkpoint"
            ) from None
        if found != facts.sha256:
            raise DamagedError(
                f"model folder {path}: {name} does not match its sha256; it is damaged, use an older checkpoint"
            )
    return manifest


def load_tensors(path: str | Path, name: str = "model") -> dict[str, Tensor]:
    """One state dict of a model folder, on the CPU. Call ``read_manifest`` first: it checks the hashes.

    Raises:
        DamagedError: the file is missing or not safetensors.
        CheckpointError: the file system fails.
    """
    file = Path(path) / f"{name}.safetensors"
    try:
        return _read(file, load_file)
    except (*ABSENT, SafetensorError) as error:
        raise DamagedError(f"{file}: cannot be read ({error}); use another checkpoint") from None


def find_model_folder(path: str | Path) -> Path:
    """Find the model folder that a user means: the folder itself, or the best (else newest) checkpoint of a run folder.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints" / "best", *step_folders(path / "checkpoints")):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"model {path}: no {MANIFEST} there; give a run folder or a folder written by train")


def list_names(folder: Path) -> list[str]:
    """List what is in a folder, in order; nothing where there is no such folder.

    Raises:
        CheckpointError: the file system fails: a folder that cannot be read is not empty.
    """
    try:
        return sorted(_read(folder, os.listdir))
    except ABSENT:
        return []


def step_folders(folder: Path) -> list[Path]:
    """List the checkpoints in a run's ``checkpoints``, newest first; see ``list_names``."""
    steps = [name for name in list_names(folder) if name.startswith("step-") and name.removeprefix("step-").isdigit()]
    return [folder / name for name in reversed(steps)]


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
