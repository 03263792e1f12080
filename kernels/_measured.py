"""Measurements of kernels: fastest launch settings, and fastest implementation of each op.

Rows are JSON lines, one file a GPU: the shipped ones in ``measured`` beside the kernels, the user's in the user cache.
A row of the same GPU and Triton has precedence; the fallback is a row of another Triton, or of another GPU of the same
compute capability.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from fastdeitlt.kernels._launch import LaunchConfig
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastdeitlt.errors import UserError, first_fault
from fastdeitlt.store.files import user_cache, write_atomically

Key = tuple[str | int, ...]
SHIPPED = Path(__file__).parent / "measured"
FIRST_START = "first start"
"""Command of the rows that a first start measures."""


class Row(BaseModel):
    """One measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: str
    key: Key
    """The parts of the shape that the measurement depends on."""
    kind: Literal["setting", "fastest"]
    gpu: str
    capability: tuple[int, int]
    """Compute capability of the GPU."""
    torch: str
    triton: str
    date: str
    command: str
    us: dict[str, float] = {}
    """Microseconds of the op alone: a setting's ``best`` and ``default``, or each implementation, both passes."""
    step_ms: dict[str, float] = {}
    """Training step "with" and "without" the implementation."""
    blocks: dict[str, int] = {}
    num_warps: int = 0
    num_stages: int = 0
    impl: str = ""

    @model_validator(mode="after")
    def _complete(self) -> "Row":
        if self.kind == "setting" and not (self.blocks and self.num_warps > 0 and self.num_stages > 0):
            raise ValueError("setting: expected blocks, num_warps and num_stages")
        if self.kind == "fastest" and not self.impl:
            raise ValueError("fastest: expected an impl")
        return self

    @property
    def config(self) -> LaunchConfig:
        """Launch setting of the row."""
        return LaunchConfig(self.blocks, self.num_warps, self.num_stages)

    @property
    def is_tuned(self) -> bool:
        """Whether `tune` measured the row, not a first start."""
        return self.command != FIRST_START


def file_of(gpu: str, folder: Path | None = None) -> Path:
    """Return the path of a GPU's rows in a folder. None = the user cache."""
    name = "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
    return (folder or user_cache("kernels")) / f"{name}.jsonl"


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none if it does not exist.

    Raises:
        UserError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"kernel measurements {path}, line {number}: {first_fault(error)}. Delete the file and run 'fastdeitlt "
                "tune' again."
            ) from None
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Add rows to a file, replacing those of the same kind, op, key and GPU."""
    newest = {(row.kind, row.op, row.key, row.gpu): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in newest.values()))
    rows_of.cache_clear()


@functools.cache
def rows_of(index: int | None) -> Mapping[tuple[str, str, Key], Row]:
    """Return (kind, op, key) -> the row in effect for a GPU and this Triton.

    By rising precedence: another GPU, another Triton, another torch, a first start's, `tune`'s, rows set by ``prefer``;
    at the same level a user's row replaces a shipped one.
    """
    gpu, here = gpu_name(index), capability(index)
    triton, torchs = metadata.version("triton"), metadata.version("torch")
    paths = [*sorted(SHIPPED.glob("*.jsonl")), *sorted(user_cache("kernels").glob("*.jsonl"))]
    rows = [row for path in paths for row in read(path) if row.capability == here]

    def precedence(row: Row) -> tuple[bool, ...]:
        own = row.gpu == gpu
        return own, own and row.triton == triton, own and row.torch == torchs, row.is_tuned

    return {**by_key(sorted(rows, key=precedence)), **_shared}


def by_key(rows: Iterable[Row]) -> dict[tuple[str, str, Key], Row]:
    """Return (kind, op, key) -> the last row of that key."""
    return {(row.kind, row.op, row.key): row for row in rows}


def is_current(row: Row, gpu: str) -> bool:
    """Return whether a row was measured on this GPU with this torch and Triton."""
    return row.gpu == gpu and all(getattr(row, name) == metadata.version(name) for name in ("torch", "triton"))


_shared: dict[tuple[str, str, Key], Row] = {}


def prefer(rows: Iterable[Row]) -> None:
    """Prefer these rows, rank 0's, so that all ranks run the same implementations."""
    _shared.clear()
    _shared.update(by_key(rows))
    rows_of.cache_clear()


_tried: dict[tuple[str, Key], LaunchConfig] = {}


def use(op: str, key: Key, config: LaunchConfig) -> None:
    """Set an op's launch setting in this process."""
    _tried[op, key] = config


@contextmanager
def trying(op: str, key: Key, config: LaunchConfig) -> Iterator[None]:
    """Set an op's launch setting inside the context."""
    before = _tried.get((op, key))
    _tried[op, key] = config
    try:
        yield
    finally:
        del _tried[op, key]
        if before:
            _tried[op, key] = before


def setting(op: str, key: Key, device: torch.device, default: LaunchConfig) -> LaunchConfig:
    """Return the measured launch setting, or ``default`` without one."""
    if (op, key) in _tried:
        return _tried[op, key]
    if device.type != "cuda":
        return default
    row = rows_of(device.index).get(("setting", op, key))
    return row.config if row else default


@functools.cache
def gpu_name(index: int | None) -> str:
    """Return a GPU's name."""
    return torch.cuda.get_device_name(index)


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    return torch.cuda.get_device_capability(index)


def fingerprint(index: int | None = None) -> str:
    """Return a hash of the rows in effect.

    If it changes, a resumed run may compute in another order.
    """
    rows = "\n".join(sorted(row.model_dump_json() for row in rows_of(index).values()))
    return hashlib.sha256(rows.encode()).hexdigest()[:8]
