"""Stage 8: folders of weights that are whole or absent. Safetensors and JSON only, nothing is ever unpickled.

A *model folder* holds ``model.safetensors`` (and, for a checkpoint of a run, ``ema``, ``optimizer`` and ``rng``
beside it) and ``manifest.json``, which names every file with its size and sha256. It is written under another name,
flushed, and renamed into place, so that a reader never meets half of one; a file that does not match its manifest is
refused (torch and safetensors would load a flipped bit without a word).
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdeitlt import __version__
from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")
MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        UserError: the disk has not twice the room that the tensors need, or writing failed; the old folder stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, **others}
    need = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    room = shutil.disk_usage(path.parent).free
    if room < 2 * need:
        raise UserError(
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
            _flush(file)
            files[file.name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        whole = {"format": "fastdeitlt", "version": __version__, **manifest, "files": files}
        (draft / MANIFEST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        _flush(draft / MANIFEST)
        _flush(draft)
        _replace_folder(draft, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: could not be written ({error}); the previous one is kept") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def _replace_folder(draft: Path, path: Path) -> None:
    """Rename needs an absent target, so an old folder steps aside first and is removed last."""
    aside = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(aside)
    draft.rename(path)
    _flush(path.parent)
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
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != "fastdeitlt" or "model.safetensors" not in files:
        raise UserError(f"model folder {path}: {MANIFEST} is not a fastdeitlt manifest; give a folder written by train")
    for name, facts in files.items():
        file = path / Path(name).name
        expected = facts.get("sha256") if isinstance(facts, dict) else None
        if not file.is_file():
            raise UserError(f"model folder {path}: {name} is missing; copy the folder again or use an older checkpoint")
        if _sha256(file) != expected:
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


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as flat tensors named ``<parameter>/<state>``, whichever implementation it is of."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{name_of[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    for group in optimizer.param_groups if _counts_in_groups(optimizer) else ():
        for parameter in group["params"]:
            tensors[f"{name_of[id(parameter)]}/step"] = torch.tensor(float(group.get("step", 0)))
    return tensors


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """apex's and DeepSpeed's FusedAdam count steps once a group instead of once a parameter."""
    return hasattr(optimizer, "adam_w_mode")


def check_optimizer(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises UserError when ``optimizer_tensors`` are of other parameters than the model's."""
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {key.rpartition("/")[0] for key in tensors}
    if names and names != parameters:
        raise UserError(f"optimizer state: of other parameters (e.g. {sorted(names ^ parameters)[0]}); start anew")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back.

    Raises:
        UserError: the state belongs to other parameters.
    """
    check_optimizer(model, tensors)
    parameters = dict(model.named_parameters())
    if tensors and _counts_in_groups(optimizer):
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        for group in optimizer.param_groups:
            group["step"] = int(tensors[f"{name_of[id(group['params'][0])]}/step"])
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("/step")}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = parameters[name]
        device = (
            parameter.device if tensor.ndim or parameter.device.type == "cpu" else _step_device(optimizer, parameter)
        )
        optimizer.state[parameter][state] = tensor.to(device, copy=True)


def _step_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """AdamW keeps its step counter on the parameter's device only when fused or capturable."""
    fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return parameter.device if fused else torch.device("cpu")


class Checkpoints:
    """The training checkpoints of one run, ``step-<n>`` folders the two newest kept, and the link ``last``.

    ``best`` beside them is a model folder of its own, with the selected weights alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, step: int, model: Mapping[str, Tensor], manifest: dict[str, Any], **others: Mapping[str, Tensor]
    ) -> Path:
        """Save, point ``last`` at it, then drop all but the two newest."""
        path = save_model_folder(self.folder / f"step-{step:08d}", model, {**manifest, "step": step}, **others)
        draft = self.folder / f".last-{uuid.uuid4().hex[:8]}"
        draft.symlink_to(path.name)
        draft.replace(self.folder / "last")
        for old in self._steps()[2:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its manifest; a damaged one is set aside as ``*.damaged-*``."""
        for path in self._steps():
            try:
                return path, read_manifest(path)
            except UserError as error:
                log.warning("%s; trying the one before", error)
                path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
        return None

    def _steps(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
        return sorted(found, reverse=True)
