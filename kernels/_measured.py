"""What was measured on a GPU: the launch settings that won, and which implementation of an op is fastest.

Rows are JSON lines, a file a GPU: those that ship lie beside the kernels in ``measured``, those that `fastdeitlt tune`
found here in the user's cache, and those win. A row counts only under the Triton it was measured with.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from fastdeitlt.kernels._launch import LaunchConfig, say_once
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastdeitlt.atomic import write_atomically
from fastdeitlt.errors import UserError
from fastdeitlt.user_cache import user_cache

Key = tuple[str | int, ...]
SHIPPED = Path(__file__).parent / "measured"


class Row(BaseModel):
    """One thing that was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: str
    key: Key
    """Shape: what of it matters to the op, see there."""
    kind: Literal["setting", "fastest"]
    gpu: str
    torch: str
    triton: str
    date: str
    command: str
    us: dict[str, float] = {}
    """Microseconds alone: of a setting's ``best`` and ``default``, of an op's implementations, forward and backward."""
    step_ms: dict[str, float] = {}
    """Training step "with" and "without" the implementation."""
    blocks: dict[str, int] = {}
    num_warps: int = 0
    num_stages: int = 0
    impl: str = ""

    @model_validator(mode="after")
    def _complete(self) -> "Row":
        if self.kind == "setting" and not (self.blocks and self.num_warps > 0 and self.num_stages > 0):
            raise ValueError("a setting needs blocks, num_warps and num_stages")
        if self.kind == "fastest" and not self.impl:
            raise ValueError("the fastest needs an impl")
        return self

    @property
    def config(self) -> LaunchConfig:
        """The setting."""
        return LaunchConfig(self.blocks, self.num_warps, self.num_stages)


def file_of(gpu: str, folder: Path | None = None) -> Path:
    """Where a GPU's rows lie; None = the user's."""
    name = "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
    return (folder or user_cache("kernels")) / f"{name}.jsonl"


def read(path: Path) -> list[Row]:
    """Rows of a file, none where there is no file.

    Raises:
        UserError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            what = error.errors()[0]
            raise UserError(
                f"kernel measurements {path}, line {number}: {'.'.join(map(str, what['loc'])) or 'the line'}: "
                f"{what['msg']}; delete the file and run 'fastdeitlt tune' again"
            ) from None
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Add rows to a file; of two of the same kind, op, key and GPU the later stays."""
    newest = {(row.kind, row.op, row.key, row.gpu): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in newest.values()))
    rows_of.cache_clear()


@functools.cache
def rows_of(gpu: str) -> Mapping[tuple[str, str, Key], Row]:
    """(kind, op, key) -> what counts for a GPU with the installed Triton."""
    installed, found = metadata.version("triton"), {}
    for path in (file_of(gpu, SHIPPED), file_of(gpu)):
        rows = [row for row in read(path) if row.gpu == gpu]
        if old := {row.triton for row in rows} - {installed}:
            say_once(
                f"kernels: what was measured with Triton {', '.join(sorted(old))} ({path}) does not count with "
                f"{installed}; 'fastdeitlt tune CONFIG' measures again"
            )
        found |= {(row.kind, row.op, row.key): row for row in rows if row.triton == installed}
    return found


_tried: dict[tuple[str, Key], LaunchConfig] = {}


def use(op: str, key: Key, config: LaunchConfig) -> None:
    """Launch an op with a setting from now on, in this process."""
    _tried[op, key] = config


@contextmanager
def trying(op: str, key: Key, config: LaunchConfig) -> Iterator[None]:
    """Launch an op with a setting inside."""
    before = _tried.get((op, key))
    _tried[op, key] = config
    try:
        yield
    finally:
        del _tried[op, key]
        if before:
            _tried[op, key] = before


def setting(op: str, key: Key, device: torch.device, default: LaunchConfig) -> LaunchConfig:
    """The launch setting measured on this GPU, or ``default`` for a GPU or key nobody measured."""
    if (op, key) in _tried:
        return _tried[op, key]
    if device.type != "cuda":
        return default
    row = rows_of(gpu_name(device.index)).get(("setting", op, key))
    return row.config if row else default


def fastest(op: str, key: Key, device: torch.device, default: str) -> str:
    """What "auto" takes: the implementation measured fastest on this GPU, or ``default``.

    A GPU or key that nobody measured is said once an op; on a CPU nothing else than the default makes sense.
    """
    if device.type != "cuda":
        return default
    gpu = gpu_name(device.index)
    row = rows_of(gpu).get(("fastest", op, key))
    if row is None:
        say_once(
            f"{op}: auto takes torch's, nothing is measured on {gpu} at {key}; 'fastdeitlt tune CONFIG' measures, "
            "'triton' takes the kernel"
        )
    return row.impl if row else default


@functools.cache
def gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def fingerprint(gpu: str) -> str:
    """Changes when the rows that count for a GPU do: a resumed run may then compute in another order."""
    rows = "\n".join(sorted(row.model_dump_json() for row in rows_of(gpu).values()))
    return hashlib.sha256(rows.encode()).hexdigest()[:8]
