"""Timer: candidates in interleaved rounds, median with p20 and p80; and the machine's peak rates.

On a GPU a sample is a CUDA graph of several calls between two events, so that launches from Python do not count; a
candidate that cannot be captured (it reads the device from the host) runs eagerly. On a CPU it is perf_counter.
A backward runs on the stream of its forward, and a graph records only the capturing stream, so to time a backward, run
its forward inside ``capturing_stream`` too.
"""

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLE_MS = 2.0
GPU_CALLS, GPU_SAMPLE_S = 5, 0.5
"""Least calls of a sample on a GPU, so that launches overlap; of long calls, those of so many seconds."""
WARM_UP_CALLS = 3
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call; ``graph``: measured by a CUDA graph."""

    median: float
    p20: float
    p80: float
    graph: bool


def measure(
    candidates: Mapping[str, Call], device: torch.device, rounds: int = 20, eager: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Time candidates in rounds of changing order, so that drift affects all equally.

    Args:
        candidates: name -> call.
        device: device of the calls.
        rounds: samples of each.
        eager: names that must not be captured in a CUDA graph.
    """
    samplers = {name: _sampler(call, device, name not in eager) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(samplers[name]())
    graph = {name: device.type == "cuda" and name not in eager for name in names}
    return {name: timing(values, graph[name]) for name, values in samples.items()}


def passes(function: Callable[[], Any], tensors: Sequence[Tensor]) -> dict[str, Call]:
    """Return the calls of a differentiable function.

    "forward", "backward" on a kept graph, and "whole" for both, with outputs and gradients.

    Args:
        function: returns one tensor or several.
        tensors: the tensors to differentiate by.
    """
    outputs = tensors_of(function())
    generator = torch.Generator(outputs[0].device).manual_seed(0)  # functions that should agree get equal gradients
    upstream = [torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in outputs]

    def forward() -> object:
        with torch.no_grad():
            return function()

    def whole() -> list[Tensor]:
        outputs = tensors_of(function())
        return [*outputs, *torch.autograd.grad(outputs, tensors, upstream)]

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, tensors, upstream, retain_graph=True),
        "whole": whole,
    }


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors of a result, which may be one tensor."""
    return [result] if isinstance(result, Tensor) else [tensor for tensor in result if isinstance(tensor, Tensor)]


@contextmanager
def capturing_stream(device: torch.device) -> Iterator[None]:
    """Run the context on a stream that a CUDA graph can capture, not the default."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def timing(values: list[float], graph: bool = False) -> Timing:
    """Return median and quantiles of samples in ms."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Timing(statistics.median(values), cuts[0], cuts[3], graph)


def _sampler(call: Call, device: torch.device, capture: bool) -> Callable[[], float]:
    """Warm up and return a function that measures one sample in ms per call."""
    for _ in range(WARM_UP_CALLS):
        call()
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    repeats = _repeats(time.perf_counter() - start, device)
    if device.type == "cuda":
        return _cuda_sampler(call, repeats, capture, device)

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats

    return sample


def _repeats(seconds: float, device: torch.device) -> int:
    """Return the calls of a sample, from the seconds of one."""
    least = min(GPU_CALLS, math.ceil(GPU_SAMPLE_S / seconds)) if device.type == "cuda" else 1
    return max(least, min(1000, int(SAMPLE_MS / 1e3 / seconds)))


def _cuda_sampler(call: Call, repeats: int, capture: bool, device: torch.device) -> Callable[[], float]:
    def loop() -> None:
        for _ in range(repeats):
            call()

    run = loop
    if capture:
        on_default = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        with capturing_stream(device) if on_default else nullcontext():
            loop()
            graph = torch.cuda.CUDAGraph()
            # threads of the data path use CUDA during the capture
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device), capture_error_mode="thread_local"):
                loop()
        run = graph.replay
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    return sample


def synchronise(device: torch.device) -> None:
    """Wait for the device; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Measure bytes per second, read plus written, of a large copy."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    found = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() * 4 / found.median * 1e3


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """Measure FLOP/s of a square matrix product of random numbers.

    Args:
        dtype: None = bfloat16 on a GPU, float32 on a CPU.
    """
    gpu = device.type == "cuda"
    size, dtype = 8192 if gpu else 1024, dtype or (torch.bfloat16 if gpu else torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = measure({"matmul": lambda: a @ b}, device)["matmul"]
    return 2 * size**3 / found.median * 1e3


def cpu_name() -> str:
    """Return the processor's name, or its architecture as a fallback."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else os.uname().machine
