"""What every kernel file shares: where Triton can run, argument checks, launch settings, ahead-of-time configurations.

Nothing here touches a GPU at import.
"""

import functools
import logging
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: block sizes by constexpr name, warps, pipeline stages.

    ``measured`` says on which GPU, when and by which benchmark the setting won, or that nobody measured it.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1
    measured: str = "not measured"

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


TunedTable = MutableMapping[tuple[str, Hashable], LaunchConfig]


def tuned(table: TunedTable, key: Hashable, device: torch.device, default: LaunchConfig) -> LaunchConfig:
    """The setting measured for this GPU, ``table[gpu name, key]``, or ``default`` for a GPU or key nobody measured."""
    return table.get((_gpu_name(device.index), key), default) if device.type == "cuda" and table else default


BestTable = Mapping[tuple[str, Hashable], str]


def best(op: str, table: BestTable, key: Hashable, device: torch.device, default: str) -> str:
    """What "auto" takes: the implementation measured fastest on this GPU, ``table[gpu name, key]``, or ``default``.

    A GPU or key that nobody measured is said once an op; on a CPU nothing else than the default makes sense.
    """
    if device.type != "cuda":
        return default
    gpu = _gpu_name(device.index)
    if (gpu, key) not in table:
        say_once(
            f"{op}: auto takes torch's, nothing is measured on {gpu} at {key}; "
            f"'python -m benchmarks.gpu {op}' measures, 'triton' takes the kernel"
        )
    return table.get((gpu, key), default)


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time."""
    log.warning(message)


@functools.cache
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, for persistent grids; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    contiguous: bool | None = True,
) -> None:
    """Refuse an argument a kernel cannot take, before anything is allocated or launched.

    Args:
        op, name: for the message.
        shape: expected sizes; None = any.
        dtypes: accepted types.
        device: expected device; None = any.
        contiguous: True = all of it; False = the last dimension only; None = not checked.

    Raises:
        UserError: names what was got, what is expected and how to get there.
    """
    if tensor.dim() != len(shape) or any(e is not None and g != e for g, e in zip(tensor.shape, shape, strict=True)):
        expected = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise UserError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{op}: {name} has dtype {got}, expected {names}; convert it with .to()")
    if device is not None and tensor.device != device:
        raise UserError(f"{op}: {name} is on {tensor.device}, expected {device}; move it with .to()")
    if contiguous and not tensor.is_contiguous():
        raise UserError(f"{op}: {name} has strides {tensor.stride()}, expected contiguous; call .contiguous()")
    if contiguous is False and tensor.size(-1) > 1 and tensor.stride(-1) != 1:
        raise UserError(
            f"{op}: {name} has strides {tensor.stride()}, expected 1 in the last dimension; call .contiguous()"
        )


def check_launchable(op: str, tensor: Tensor) -> None:
    """Refuse a tensor no Triton program can reach.

    Raises:
        UserError: a CPU tensor outside the interpreter, or a device that is not CUDA.
    """
    if tensor.device.type != "cuda" and not interpreted():
        raise UserError(
            f"{op}: got a tensor on {tensor.device}, but the Triton kernel runs on CUDA; use the torch implementation, "
            "or set TRITON_INTERPRET=1 before Python starts to run it slowly on the CPU"
        )


@dataclass(frozen=True)
class AotConfig:
    """One specialisation of a kernel that ships, compiled ahead of time by ``benchmarks.aot`` without a GPU.

    Each kernel file offers ``aot_configs() -> list[AotConfig]``.

    Args:
        kernel: the ``triton.jit`` function.
        signature: run-time argument -> Triton type ("*bf16", "*fp32", "*i64", "i32", "i64", "fp32").
        constexprs: constexpr argument -> value; a pointer passed as None belongs here too.
        divisible_by_16: integer arguments that are multiples of 16 in a real launch (pointers are taken to be aligned).
        mma: the kernel must contain tensor-core instructions.
        architectures: compute capabilities it ships for.
        note: what the table shows for it; empty = all constexprs.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible_by_16: tuple[str, ...] = ()
    mma: bool = False
    architectures: tuple[int, ...] = (80, 90, 100)
    note: str = field(default="", compare=False)
