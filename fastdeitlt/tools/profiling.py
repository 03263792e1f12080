"""`profile`: a Perfetto trace of training steps, and time by stage and operation.

Bytes and FLOPs of torch's operations are counted in further steps under a dispatch counter; fused kernels of a compiled
graph have a time but no count. On a GPU the stages are also NVTX ranges, Proton writes a profile, and the allocator's
history is saved for pytorch.org/memory_viz.
"""

# B images in a micro-batch

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastdeitlt import config, distributed
from fastdeitlt.core.assemble import Parts
from fastdeitlt.core.measure.timer import bandwidth, matmul_rate, synchronise
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.errors import UserError, counted
from fastdeitlt.store.files import write_atomically
from fastdeitlt.tools.setup import Setup, endless, set_up, step_of

log = logging.getLogger("fastdeitlt")
STAGES = ("data", "forward", "student", "teacher", "backward", "optimizer", "average")
AUTOGRAD = "autograd::engine::evaluate_function"
"""Prefix of the profiler's events in autograd's thread."""
WARM_UP_STEPS = 2
SHOWN = 25
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}
"""FLOP formulas by operation: torch's, and attention on a CPU, which torch lacks."""


@dataclass
class Operation:
    """One row of the table, sums over the recorded steps.

    Args:
        name: operation or kernel.
        calls: number of calls.
        time_ms: device time, on a CPU its time; with callees if bytes are counted, else self time.
        bytes: bytes of inputs and outputs, each once. None = unknown.
        flops: FLOPs of matrix products. None = unknown.
        share_of_roofline: least time for its bytes and FLOPs here over its time. None = unknown.
    """

    name: str
    calls: int
    time_ms: float
    bytes: int | None = None
    flops: int | None = None
    share_of_roofline: float | None = None


class Costs(TorchDispatchMode):
    """Dispatch mode that counts bytes and FLOPs by operation; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        name = f"{func.namespace}::{func._schema.name.partition('::')[2]}"
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors.values())
        if func.overloadpacket in FLOPS:
            self.flops[name] += int(FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=out))
        return out


@contextmanager
def stage(name: str, device: torch.device) -> Iterator[None]:
    """Mark a named range in the trace, on a GPU also in NVTX."""
    with ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield


def profile(
    config_name: str,
    overrides: Sequence[str] = (),
    out: str | Path = "profile",
    *,
    num_steps: int = 3,
    synthetic: bool = False,
) -> list[Operation]:
    """Profile optimizer steps; print tables; write trace and operations as JSON.

    Args:
        config_name, overrides: as for training. With an empty ``teacher.path``, a teacher with random weights.
        out: folder of trace.json, operations.json and, on a GPU, memory.pickle; created if missing.
        num_steps: optimizer steps in the trace, after two warm-up steps.
        synthetic: random images on the device instead of the data set.

    Returns:
        The table, longest time first.

    Raises:
        UserError: as in training; or fewer than one step.
    """
    if num_steps < 1:
        raise UserError(f"--steps: got {num_steps}, expected at least 1")
    cfg = config.load(config_name, list(overrides))
    device = distributed.device_of(cfg.train.device)
    setup = set_up(cfg, device, synthetic=synthetic)
    log.info("teacher: %s", setup.teacher_title)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    gpu = device.type == "cuda"
    if cfg.train.compile and not gpu:
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True  # else fused loops have no name
    with ExitStack() as stack:
        parts, step = _step(setup, stack)
        for _ in range(WARM_UP_STEPS):
            step()
        synchronise(device)
        if gpu:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
            for _ in range(num_steps):
                step()
            synchronise(device)
        recorded.export_chrome_trace(str(folder / "trace.json"))
        if gpu:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        costs = Costs()
        if not cfg.train.compile:
            with costs:
                for _ in range(num_steps):
                    step()
        events = recorded.events() or []
        rows, stages = table(events, costs, parts), stage_times(events, gpu)
        written = {"config": cfg.name, "steps": num_steps, "operations": [asdict(row) for row in rows]}
        write_atomically(folder / "operations.json", json.dumps(written | {"stages_ms": stages}, indent=1))
        _show(rows, stages, setup, num_steps, folder)
        if gpu:
            _proton(step, num_steps, folder)
    return rows


def _step(setup: Setup, stack: ExitStack) -> tuple[Parts, Callable[[], Tensor]]:
    """Return parts and a step with named stages, on training batches or noise."""
    cfg, device = setup.cfg, setup.device
    source = stack.enter_context(closing(open_source(setup.sets.train, cfg.data, device))) if setup.sets else None
    parts = setup.assemble(source)
    batches = stack.enter_context(closing(endless(parts))) if source else repeat(parts.noise_batch())
    if not cfg.train.compile:  # a compiled graph has no stages
        assert parts.joint.teacher is not None
        _name(parts.student, "student", device)
        _name(parts.joint.teacher, "teacher", device)
    return parts, step_of(parts, batches, partial(stage, device=device))


def _name(module: nn.Module, name: str, device: torch.device) -> None:
    """Mark the module's forward pass as a stage."""
    open_stages: list[Any] = []

    def begin(*_: Any) -> None:
        open_stages.append(stage(name, device))
        open_stages[-1].__enter__()

    def end(*_: Any) -> None:
        open_stages.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _proton(step: Any, num_steps: int, folder: Path) -> None:
    """Run Triton's profiler: time by kernel in ``proton.hatchet``.

    It needs CUPTI, which allows one subscriber per process and may still be used by torch's profiler.
    """
    import triton.profiler as proton

    try:
        proton.start(str(folder / "proton"), context="shadow")
        for _ in range(num_steps):
            step()
        proton.finalize()
    except RuntimeError as error:
        Console().print(f"Proton: no profile, {' '.join(str(error).split())}", markup=False)


def stage_times(events: Sequence[Any], gpu: bool) -> dict[str, float]:
    """Return milliseconds by stage, summed over the recorded steps.

    With a GPU autograd has its own thread; work that starts within a stage is attributed to it.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    autograd = [e for e in host if gpu and e.cpu_parent is None and e.name.startswith(AUTOGRAD)]
    times: dict[str, float] = defaultdict(float)
    for event in host:
        if event.name in STAGES:
            span = event.time_range
            within = [e for e in autograd if e.thread != event.thread and span.start <= e.time_range.start <= span.end]
            times[event.name] += sum(_ms(e, gpu, total=True) for e in (event, *within))
    return dict(times)


def table(events: Sequence[Any], costs: Costs, parts: Parts) -> list[Operation]:
    """Return the rows of a profile, longest first."""
    gpu = parts.device.type == "cuda"
    rows: dict[str, Operation] = {}

    def visit(event: Any) -> None:
        counted = event.name in costs.bytes
        row = rows.setdefault(event.name, Operation(event.name, 0, 0.0))
        row.calls += 1
        row.time_ms += _ms(event, gpu, total=counted)
        for child in () if counted else event.cpu_children:
            visit(child)

    for event in events:
        if event.cpu_parent is None and event.device_type == DeviceType.CPU:
            visit(event)
    dtype = parts.joint.dtype or torch.float32
    for name in costs.bytes.keys() & rows.keys():
        row = rows[name]
        row.bytes, row.flops = costs.bytes[name], costs.flops.get(name, 0)
        least_s = max(row.bytes / bandwidth(parts.device), row.flops / matmul_rate(parts.device, dtype))
        row.share_of_roofline = 1e3 * least_s / row.time_ms if row.time_ms else None
    timed = [row for row in rows.values() if row.time_ms > 0 and row.name not in STAGES]
    return sorted(timed, key=lambda row: -row.time_ms)


def _ms(event: Any, gpu: bool, total: bool = False) -> float:
    kind = ("device_time_total" if total else "self_device_time_total") if gpu else None
    kind = kind or ("cpu_time_total" if total else "self_cpu_time_total")
    return getattr(event, kind) / 1e3


def _show(rows: list[Operation], stages: dict[str, float], setup: Setup, num_steps: int, folder: Path) -> None:
    console, gpu = Console(), setup.device.type == "cuda"
    by_stage = Table(title=f"{setup.cfg.name}: ms per step by stage ({'device' if gpu else 'CPU'} time)")
    by_stage.add_column("stage")
    by_stage.add_column("ms", justify="right")
    for name in STAGES:
        if name in stages:
            by_stage.add_row(f"  {name}" if name in ("student", "teacher") else name, f"{stages[name] / num_steps:.2f}")
    console.print(by_stage)
    by_operation = Table(
        title=f"the {SHOWN} longest of {counted(len(rows), 'operation')}, sums over {counted(num_steps, 'step')}"
    )
    for column in ("operation", "calls", "ms", "share", "MB", "GFLOP", "of the roofline"):
        by_operation.add_column(column, justify="left" if column == "operation" else "right", overflow="fold")
    whole = sum(row.time_ms for row in rows)
    for row in rows[:SHOWN]:
        mega, giga = (None if value is None else value / unit for value, unit in ((row.bytes, 1e6), (row.flops, 1e9)))
        counts = ((mega, "{:,.1f}"), (giga, "{:,.2f}"), (row.share_of_roofline, "{:.0%}"))
        cells = ["-" if value is None else form.format(value) for value, form in counts]
        by_operation.add_row(row.name, str(row.calls), f"{row.time_ms:.2f}", f"{row.time_ms / whole:.1%}", *cells)
    console.print(by_operation)
    console.print(f"trace: {folder / 'trace.json'} (open it at ui.perfetto.dev)", markup=False)
    if setup.cfg.train.compile:
        console.print(
            "bytes, FLOPs and roofline: not available in a compiled graph; set train.compile=false to count them"
        )
    if not gpu:
        console.print("no GPU: kernel times, NVTX ranges, Proton and the memory snapshot are not available")
