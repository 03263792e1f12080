"""Kernels under test: on a GPU compiled, elsewhere in Triton's interpreter with bfloat16 put right; memory is NaN."""

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from fastdeitlt.kernels import _measured
from fastdeitlt.kernels._launch import context_failure
from fastdeitlt.kernels._pick import say_once
from triton.runtime import interpreter

ALLOCATORS = ("empty", "empty_like", "empty_strided")
UNWRITTEN = 0x7FC0DEAD


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that does not fit into the GPU, which may be small, or full beside other processes."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of GPU memory: {error}")


@pytest.fixture(autouse=True)
def own_context_errors(device) -> Iterator[None]:
    """A kernel's error belongs to the test that launched it.

    After an illegal access every later call of the process fails: a worker of pytest-xdist ends, and another runs the
    other tests. The check comes after what a test patches is restored.
    """
    yield
    if failure := context_failure(device):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.fail(failure)
    if device.type == "cuda" and torch.cuda.memory_reserved() > 2**31:  # of a huge tensor, for other processes
        torch.cuda.empty_cache()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
        return tensor
    unwritten = float("nan") if tensor.is_floating_point() else min(UNWRITTEN, _largest(tensor.dtype))
    return tensor.fill_(unwritten)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


@pytest.fixture(autouse=True)
def poisoned_memory(own_context_errors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory our package allocates holds NaN (integers: a huge value), so a lane left unwritten shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(tensor) if caller.startswith("fastdeitlt.") else tensor

        return wrapper

    for name in ALLOCATORS:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def _to_float32(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as the hardware does; the interpreter stores bfloat16 as uint16."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _correct_bfloat16() -> None:
    """The interpreter computes on bfloat16's bit patterns and truncates casts to it; compute in float32 instead."""
    builder = interpreter.InterpreterBuilder
    cast, fp_to_fp, binary, fma = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op, builder.create_fma
    reduce = interpreter.ReduceOps.apply

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            source = interpreter.TensorHandle(_to_float32(source), tl.float32)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16 or right.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        result = op(_to_float32(left), _to_float32(right))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, left.dtype.scalar)
        return interpreter.TensorHandle(_to_bfloat16(result), tl.bfloat16)

    def create_fma(self, x, y, z):
        if z.dtype.scalar != tl.bfloat16:
            return fma(self, x, y, z)
        return interpreter.TensorHandle(_to_bfloat16(_to_float32(x) * _to_float32(y) + _to_float32(z)), tl.bfloat16)

    def create_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        kind = accumulator.data.dtype
        product = np.matmul(_to_float32(a), _to_float32(b), dtype=kind)
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def apply(self, tensors):
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            assert tensor.dtype.scalar != tl.bfloat16, "the interpreter cannot reduce bfloat16: load .to(tl.float32)"
        return reduce(self, tensors)

    builder.cast_impl, builder.create_fp_to_fp, builder.binary_op = cast_impl, create_fp_to_fp, binary_op
    builder.create_fma, builder.create_dot, interpreter.ReduceOps.apply = create_fma, create_dot, apply


def _write_in_place() -> None:
    """Tensors of the CPU are not copied for the interpreter; copying them onto themselves afterwards only costs."""
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


_correct_bfloat16()
if not torch.cuda.is_available():
    _write_in_place()


@pytest.fixture
def some_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of the name "some GPU", for which nothing was measured; what a test measures stays its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("kernels._measured", "core.measure.first_start", "tools.tune"):
        if module := sys.modules.get(f"fastdeitlt.{name}"):
            monkeypatch.setattr(module, "gpu_name", lambda index: "some GPU")
            monkeypatch.setattr(module, "capability", lambda index: (9, 0), raising=False)
    for cache in ("_tried", "_shared"):
        monkeypatch.setattr(_measured, cache, {})
    _measured.rows_of.cache_clear()
    say_once.cache_clear()
    yield
    _measured.rows_of.cache_clear()


@pytest.fixture
def far_program(monkeypatch: pytest.MonkeyPatch):
    """``far_program(x)`` runs a kernel's program x alone: launch it with the grid (1,) or (1, n).

    Tensors beyond 2^31 elements are then addressed where they are, in memory of which only the pages touched exist.
    """

    def shift(by: int) -> None:
        def set_grid_idx(self, x, y, z):
            self.grid_idx = (x + by, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)

    return shift
