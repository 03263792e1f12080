"""State dicts: safe reading of untrusted files, wrapper prefixes, and loading with every key checked."""

import argparse
import pickle
import re
import struct
import zipfile
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

# Objects beside tensors in released checkpoints: the command line (a Namespace) and accuracies as numpy scalars, which
# numpy 1 pickled under another module name. Unpickling them runs no code.
_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
]
# raised by torch.load for a file that is not a checkpoint, or damaged
_DAMAGE = (
    RuntimeError, OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError,
    ArithmeticError, MemoryError, struct.error,
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")


def read_torch(path: Path) -> Any:
    """Read a torch.save file without executing code.

    It may have tensors, containers, argparse.Namespace and numpy scalars.

    Raises:
        UserError: the file contains any other Python object (nothing of it is executed), or is damaged.
    """
    _refuse_bomb(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"checkpoint {path}: contains {found[1]}, expected only tensors (nothing was executed); if you trust "
                "the file, save its state_dict alone or as safetensors"
            ) from None
        alien = isinstance(error, (pickle.UnpicklingError, LookupError))  # a missing key explains nothing
        reason = "not torch's pickle" if alien else _first_line(error)
        raise UserError(
            f"checkpoint {path}: damaged, or not written by torch.save ({reason}). Copy it again."
        ) from None


def _refuse_bomb(path: Path) -> None:
    """Refuse a zip file that unpacks to more: torch.save does not compress."""
    try:
        with zipfile.ZipFile(path) as records:
            unpacked = sum(record.file_size for record in records.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # not a zip file, as of old versions of torch, or damaged
    if unpacked > (size := path.stat().st_size):
        raise UserError(
            f"checkpoint {path}: got {size:,} bytes that unpack to {unpacked:,}, expected an uncompressed file as "
            "torch.save writes. Save it again."
        )


def read_safetensors(path: Path) -> State:
    """Read the tensors of a safetensors file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {path}: damaged or truncated ({_first_line(error)}). Copy it again.") from None


def tensors(content: Any, path: Path, names: Iterable[str] = ("state_dict", "model")) -> State:
    """Return a checkpoint's state dict: under the first of ``names``, or as a whole.

    Prefixes that DataParallel, DDP and torch.compile add to every key are stripped.

    Raises:
        UserError: there is no mapping of names to tensors.
    """
    if isinstance(content, Mapping):
        content = next((content[name] for name in names if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path}: no state_dict, expected a mapping of names to tensors")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_exact(model: nn.Module, state: State, what: str) -> None:
    """Load ``state`` into ``model``; keys and shapes must be equal.

    Raises:
        UserError: missing, unexpected or wrongly shaped keys; the model is unchanged.
    """
    own = model.state_dict()
    # a counter that inference does not need and old versions of torch did not save
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    problems = [
        ("missing", sorted(own.keys() - state.keys() - optional)),
        ("unexpected", sorted(state.keys() - own.keys())),
        (
            "wrong shape",
            [_shapes(k, state[k], own[k]) for k in sorted(own.keys() & state.keys()) if state[k].shape != own[k].shape],
        ),
    ]
    summary = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys)
    if summary:
        raise UserError(f"{what}: keys do not fit the model ({summary}). Check the architecture and style.")
    model.load_state_dict(state, strict=False)


def _shapes(key: str, got: Tensor, expected: Tensor) -> str:
    return f"{key} {list(got.shape)} instead of {list(expected.shape)}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
