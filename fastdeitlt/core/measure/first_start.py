"""Measurements for "auto" at the first start on a GPU: each op at its current launch setting beside torch's.

Rows are written to the user cache, read by ``kernels._measured``, and are valid for this GPU, torch and Triton. `tune`
also measures launch settings and the whole step.
"""

import datetime
import logging
import os
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from fastdeitlt.core.measure.parts import SETTINGS, Part, Shapes, parts
from fastdeitlt.core.measure.timer import Call, Timing, capturing_stream, measure, tensors_of
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._launch import compiling, context_failure
from fastdeitlt.kernels._measured import (
    FIRST_START,
    Key,
    Row,
    capability,
    file_of,
    gpu_name,
    is_current,
    rows_of,
    write,
)

log = logging.getLogger("fastdeitlt")

ROUNDS = 10
TOLERANCE = 2e-2
"""Largest difference between two implementations relative to the largest value: several roundings of bfloat16."""


def current_rows(shapes: Shapes) -> list[Row]:
    """Measure "auto" ops without a current row; return all rows in effect.

    Measures only if ``measure_kernels``.

    Raises:
        UserError: an implementation broke the CUDA context.
    """
    index, cfg = shapes.device.index, shapes.cfg
    rows, gpu = rows_of(index), gpu_name(index)
    auto = {op for op, (section, field) in SETTINGS.items() if getattr(getattr(cfg, section), field) == "auto"}
    current = {op for op, key in shapes.keys.items() if (r := rows.get(("fastest", op, key))) and is_current(r, gpu)}
    missing = auto & shapes.keys.keys() - current
    if missing and cfg.train.measure_kernels:
        start = time.perf_counter()
        new_rows = [row for op in SETTINGS if op in missing if (row := _measured_op(shapes, op))]
        torch.compiler.reset()  # its graphs count against the compiler's limit
        torch.cuda.empty_cache()
        choices = ", ".join(f"{row.op}={row.impl}" for row in new_rows)
        log.info(
            "kernels: measured on %s in %.0f s: %s (train.measure_kernels=false skips this, 'fastdeitlt tune' measures "
            "more)", gpu, time.perf_counter() - start, choices,
        )  # fmt: skip
    return list(rows_of(index).values())


def _measured_op(shapes: Shapes, op: str) -> Row | None:
    """Store and return an op's row: torch's if it fails, None if memory is full."""
    generators, failure = [shapes.device] if shapes.device.type == "cuda" else [], ""
    try:
        with capturing_stream(shapes.device), torch.random.fork_rng(generators):  # they fail on a broken context
            row = next(fastest(shapes, part, ROUNDS) for part in parts(shapes, {op}) if part.whole)
    except torch.OutOfMemoryError:
        log.warning("%s: not measured, out of GPU memory", op)
        return None
    except (TritonError, RuntimeError) as error:
        log.warning("%s: kernel failed, using torch: %s", op, " ".join(str(error).split())[:200])
        row = new_row(shapes, op, shapes.keys[op], "fastest", {}, impl=shapes.torchs(op))
        failure = context_failure(shapes.device)
    row = row.model_copy(update={"command": FIRST_START})
    write(file_of(row.gpu), [row])
    if failure:
        setting = ".".join(SETTINGS[op])
        raise UserError(
            f"{setting}=auto: measuring {op} broke the CUDA context ({failure}). Rerun the command, which now uses "
            f"{row.impl}, or set {setting}={row.impl} or train.measure_kernels=false. Please report this."
        )
    return row


def fastest(shapes: Shapes, part: Part, rounds: int) -> Row:
    """Return the row of an op's fastest implementation that agrees with torch."""
    torchs = shapes.torchs(part.op)
    expected = copied(part.results(torchs))
    agreeing: dict[str, Call] = {}
    for impl, call in part.whole.items():
        try:
            if impl == "triton":  # several launches: compile them side by side
                with compiling(os.cpu_count() or 1):
                    part.results(impl)
            agrees = impl == torchs or same(part.results(impl), expected)
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError, UserError) as error:
            log.warning("%s: %s failed, not used: %s", part.op, impl, " ".join(str(error).split())[:200])
            if context_failure(shapes.device):
                raise
            continue
        if not agrees:
            log.warning("%s: %s disagrees with torch, not used; please report this", part.op, impl)
            continue
        agreeing[impl] = call
    eager = frozenset(agreeing) if part.eager else frozenset()
    us = microseconds(measure(agreeing, shapes.device, rounds, eager))
    return new_row(shapes, part.op, part.key, "fastest", us, impl=min(us, key=us.__getitem__))


def same(got: Any, expected: Any) -> bool:
    """Return whether two results agree up to the rounding of another summation order."""
    pairs = zip(tensors_of(got), tensors_of(expected), strict=True)
    return all((a.float() - b.float()).abs().max() <= TOLERANCE * b.float().abs().max() for a, b in pairs if b.numel())


def copied(result: Any) -> list[Tensor]:
    """Return copies of the tensors of a result."""
    return [tensor.detach().clone() for tensor in tensors_of(result)]


def microseconds(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Return name -> median in microseconds."""
    return {name: timing.median * 1e3 for name, timing in timings.items()}


def new_row(shapes: Shapes, op: str, key: Key, kind: str, us: dict[str, float], **facts: Any) -> Row:
    """Return a row with today's date, the versions and the GPU."""
    where: dict[str, Any] = {name: metadata.version(name) for name in ("torch", "triton")}
    where |= {"gpu": gpu_name(shapes.device.index), "capability": capability(shapes.device.index)}
    where |= {"date": datetime.date.today().isoformat(), "command": f"fastdeitlt tune {shapes.cfg.name}"}
    return Row(op=op, key=key, kind=kind, us=us, **where, **facts)
