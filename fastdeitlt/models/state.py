"""State dicts: read files that nobody has to trust, strip wrapper prefixes, check every key before loading."""

import argparse
import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdeitlt.errors import UserError

State = dict[str, Tensor]

# What released checkpoints hold beside tensors: the command line (a Namespace) and accuracies as numpy scalars, which
# numpy 1 pickled under another module name. None of these runs code when rebuilt.
_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
]
_WRAPPERS = ("module.", "_orig_mod.")


def read_torch(path: Path) -> Any:
    """The content of a torch.save file: tensors, containers, argparse.Namespace and numpy scalars, nothing else.

    Raises:
        UserError: the file holds any other Python object (nothing of it is executed), or is damaged.
    """
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = named[0] if named else "not a checkpoint of torch.save"
        raise UserError(
            f"checkpoint {path}: refused, nothing was executed ({reason}); expected tensors only: save its state_dict "
            "alone, or as safetensors, on a machine where you trust the file"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: damaged or truncated ({_first_line(error)}); copy it again") from None


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {path}: damaged or truncated ({_first_line(error)}); copy it again") from None


def read_folder(folder: Path, kind: str, weights: str = "model") -> tuple[State, dict[str, Any]]:
    """The tensors of ``<weights>.safetensors`` and the manifest of a model folder, after the hash holds.

    Args:
        kind: "student" or "teacher"; the manifest must say the same.
        weights: "model" or "ema".

    Raises:
        UserError: no or a foreign manifest, the other kind, a file that is missing, truncated or changed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"model folder {folder}: no readable manifest.json; expected a folder that training or export wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"model folder {folder}: manifest.json is not valid JSON ({_first_line(error)})") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != "fastdeitlt"
        or not isinstance(manifest.get("model"), dict)
    ):
        raise UserError(f"model folder {folder}: manifest.json is not of this project; expected format 'fastdeitlt'")
    if manifest.get("kind") != kind:
        raise UserError(f"model folder {folder}: got a {manifest.get('kind')}, expected a {kind}")
    name = f"{weights}.safetensors"
    files = manifest.get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    if not isinstance(entry, dict) or not (folder / name).is_file():
        raise UserError(f"model folder {folder}: has no {name}")
    got = sha256(folder / name)
    if got != entry.get("sha256"):
        raise UserError(
            f"model folder {folder}: {name} changed or is damaged (sha256 {got[:12]}, manifest says "
            f"{str(entry.get('sha256'))[:12]}); copy it again"
        )
    return read_safetensors(folder / name), manifest


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors(content: Any, path: Path, names: Iterable[str] = ("state_dict", "model")) -> State:
    """The state dict inside a released checkpoint: under the first of ``names`` it has, or the content itself.

    Prefixes that DataParallel, DDP and torch.compile add to every key are stripped.

    Raises:
        UserError: there is no mapping of names to tensors.
    """
    if isinstance(content, Mapping):
        content = next((content[name] for name in names if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path}: holds no state_dict; expected a mapping of names to tensors")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_exact(model: nn.Module, state: State, what: str) -> None:
    """Copy ``state`` into ``model``: every key present, none over, every shape equal.

    Raises:
        UserError: names the first missing, unexpected and wrongly shaped keys; the model is left as it was.
    """
    own = model.state_dict()
    # a counter that inference does not read and that old torch did not write
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    problems = [
        ("missing", sorted(own.keys() - state.keys() - optional)),
        ("unexpected", sorted(state.keys() - own.keys())),
        (
            "wrong shape",
            [_shapes(k, state[k], own[k]) for k in sorted(own.keys() & state.keys()) if state[k].shape != own[k].shape],
        ),
    ]
    told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys)
    if told:
        raise UserError(f"{what}: keys do not fit the model ({told}); check the architecture and style")
    model.load_state_dict(state, strict=False)


def _shapes(key: str, got: Tensor, expected: Tensor) -> str:
    return f"{key} {list(got.shape)} instead of {list(expected.shape)}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
