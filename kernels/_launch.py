"""Launches, argument checks and ahead-of-time configurations of all kernels.

The import does not initialise CUDA.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
import triton
from torch import Tensor

from fastdeitlt.errors import UserError

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that every kernel is compiled for ahead of time: A100, RTX 30, RTX 40, H100, B200, RTX 50."""


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET=1 was set when triton was imported."""
    return bool(triton.knobs.runtime.interpret)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types of activations that the kernels accept."""
_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool",
    torch.dtype | None: "ScalarType?",
}  # fmt: skip


def schema(inputs: type, mutated: tuple[str, ...] = ()) -> str:
    """Return a NamedTuple's fields, also nested ones, in torch's schema syntax.

    Args:
        inputs: NamedTuple whose fields have types that an operator accepts.
        mutated: tensors that the operator writes to.
    """

    def fields(of: type) -> Iterator[tuple[str, str]]:
        for name, kind in get_type_hints(of).items():
            yield from fields(kind) if hasattr(kind, "_fields") else [(name, _SCHEMA_TYPES[kind])]

    kinds = dict(fields(inputs))
    for alias, name in enumerate(mutated):
        kinds[name] = kinds[name].replace("Tensor", f"Tensor(a{alias}!)")
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


@dataclass(frozen=True)
class LaunchConfig:
    """Launch setting of a kernel: block sizes by constexpr name, warps, pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


_compiler: Callable[..., object] | None = None


def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of ``near``; inside ``compiling``, only compile it."""
    if _compiler:
        stand_ins = tuple(_Pointer(x.dtype, x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
        _compiler(_compile, kernel, grid, near.device, stand_ins, options)
        return
    with torch.cuda.device_of(near):
        kernel[grid](*arguments, **options)


@dataclass(frozen=True)
class _Pointer:
    """Type and address of a tensor, for a compilation that must not keep its memory alive."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _compile(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...], options: Any
) -> None:
    if not interpreted():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel.warmup(*arguments, grid=grid, **options)


@contextmanager
def compiling(workers: int) -> Iterator[list[Future[None]]]:
    """Make ``launch`` compile in ``workers`` threads instead of running.

    Triton caches the results. Yields the compilations: a failed one has its exception, and the real launch raises it
    again.
    """
    global _compiler
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(workers) as pool:

        def submit(*call: Any) -> None:
            pending.append(pool.submit(*call))

        _compiler = submit
        try:
            yield pending
        finally:
            _compiler = None


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return a GPU's multiprocessors, for persistent grids; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse an argument that a kernel does not support, before any launch.

    Args:
        op, name: for the message.
        shape: expected sizes; None = any.
        dtypes: accepted types.
        device: expected device; None = any.
        contiguous: True = all of it; False = the last dimension only.

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    if tensor.dim() != len(shape) or any(e is not None and g != e for g, e in zip(tensor.shape, shape, strict=True)):
        expected = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise UserError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{op}: {name}: got dtype {got}, expected {names}. Convert it with .to().")
    if device is not None and tensor.device != device:
        raise UserError(f"{op}: {name}: got device {tensor.device}, expected {device}. Move it with .to().")
    if contiguous and not tensor.is_contiguous():
        raise UserError(f"{op}: {name}: got strides {tensor.stride()}, expected contiguous. Call .contiguous().")
    if not contiguous and tensor.size(-1) > 1 and tensor.stride(-1) != 1:
        raise UserError(
            f"{op}: {name}: got strides {tensor.stride()}, expected 1 in the last dimension. Call .contiguous()."
        )


def check_launchable(op: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not accessible to Triton.

    Raises:
        UserError: a CPU tensor outside the interpreter, or a device that is not CUDA.
    """
    if tensor.device.type != "cuda" and not interpreted():
        raise UserError(
            f"{op}: got a tensor on {tensor.device}, expected CUDA for the Triton kernel. Use the torch "
            "implementation, or set TRITON_INTERPRET=1 before Python starts to interpret it slowly on the CPU."
        )


def context_failure(device: torch.device) -> str:
    """Wait for the kernels; return the error that broke the CUDA context, or "".

    After an illegal access every later call of the process on the device fails.
    """
    try:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # not the device: another thread may capture a graph
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    return ""


@dataclass(frozen=True)
class AotConfig:
    """One shipped specialisation of a kernel, compiled ahead of time by ``benchmarks.aot`` without a GPU.

    Each kernel file has ``aot_configs() -> list[AotConfig]``.

    Args:
        kernel: the ``triton.jit`` function.
        signature: run-time argument -> Triton type ("*bf16", "*fp32", "*i64", "i32", "i64", "fp32").
        constexprs: constexpr argument -> value; also a pointer passed as None.
        divisible_by_16: integer arguments that are multiples of 16 in a real launch (pointers are assumed aligned).
        fp_fusion: whether fused multiply-adds are allowed, as in the launch.
        mma: whether the kernel must contain tensor-core instructions.
        narrow_stores: maximum number of stores to global memory of less than 8 bytes per thread; None = any. A mask or
            an offset that Triton cannot analyse makes every store narrow.
        architectures: compute capabilities to compile for.
        note: its text in the table; empty = all constexprs.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    divisible_by_16: tuple[str, ...] = ()
    fp_fusion: bool = True
    mma: bool = False
    narrow_stores: int | None = None
    architectures: tuple[int, ...] = ARCHITECTURES
    note: str = field(default="", compare=False)

    @classmethod
    def of(
        cls, kernel: Any, config: LaunchConfig, constexprs: Mapping[str, Any], types: Mapping[str, str], **options: Any
    ) -> "AotConfig":
        """Return the specialisation of a kernel at a launch setting.

        Args:
            constexprs: those that the kernel does not have are left out.
            types: Triton types by argument; of the others, ``p_...`` is "*fp32" and a number "fp32".
            options: further fields.
        """
        own = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
        signature = {
            name: types.get(name, "*fp32" if name.startswith("p_") else "fp32")
            for name in kernel.arg_names
            if name not in own
        }
        return cls(kernel, signature, own, config.num_warps, config.num_stages, **options)
