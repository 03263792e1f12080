"""The one timer: candidates in interleaved rounds, median with p20 and p80, beside a named baseline, after green tests.

On a GPU a sample is a CUDA graph of several calls between two events, so that launches from Python do not count; a
candidate that cannot be captured (it reads the device from the host) runs eagerly and its row says so. On a CPU it is
perf_counter. Rows are appended to ``benchmarks/results/<op>_<machine>_<yyyymm>.jsonl``.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_MS = 2.0
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        name: what the row calls it.
        candidates: name -> call; a call does all its work on every invocation.
        baseline: the candidate the others are compared with: the best alternative, not the slowest.
        useful_bytes, useful_flops: least work of the op, for the share of the floor; 0 = not stated.
        eager: candidates that a CUDA graph cannot hold.
    """

    name: str
    candidates: Mapping[str, Call]
    baseline: str
    useful_bytes: int = 0
    useful_flops: int = 0
    eager: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    p20: float
    p80: float
    graph: bool


def machine() -> dict[str, Any]:
    """Where a row was measured: processor, versions, commit, date."""
    commit = _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether an optional peer can be imported."""
    return importlib.util.find_spec(module) is not None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def measure(
    candidates: Mapping[str, Call], device: torch.device, rounds: int = 20, eager: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Time the candidates in turn, ``rounds`` times, each round in another order, so that drift hits all alike.

    Args:
        candidates: name -> call.
        device: where they run.
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
    return {name: _timing(values, graph[name]) for name, values in samples.items()}


def _timing(values: list[float], graph: bool) -> Timing:
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Timing(statistics.median(values), cuts[0], cuts[3], graph)


def _sampler(call: Call, device: torch.device, capture: bool) -> Callable[[], float]:
    """Warm up, choose how many calls make a sample, and return what takes one, in ms a call."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    _synchronise(device)
    repeats = max(1, min(1000, int(SAMPLE_MS / 1e3 / (time.perf_counter() - start))))
    if device.type == "cuda":
        return _cuda_sampler(call, max(repeats, 5), capture)

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats

    return sample


def _cuda_sampler(call: Call, repeats: int, capture: bool) -> Callable[[], float]:
    def loop() -> None:
        for _ in range(repeats):
            call()

    run = loop
    if capture:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loop()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain copy of 1 GiB (64 MiB on a CPU), read plus written: the floor's measure."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() * 4 / timing.median * 1e3


@functools.cache
def matmul_rate(device: torch.device) -> float:
    """FLOP a second of a bfloat16 matrix product of 8,192 (float32 of 1,024 on a CPU) with random numbers."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = measure({"matmul": lambda: a @ b}, device)["matmul"]
    return 2 * size**3 / timing.median * 1e3


def green(op: str) -> bool:
    """Whether the op's own tests pass, on the GPU where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/kernels/test_{op}.py"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def rows(op: str, case: Case, timings: Mapping[str, Timing], device: torch.device) -> list[dict[str, Any]]:
    """One JSON row a candidate: times, ratio to the baseline (above 1 = faster), rates and share of the floor."""
    floor_s = case.useful_bytes / bandwidth(device) if case.useful_bytes else 0.0
    floor_s = max(floor_s, case.useful_flops / matmul_rate(device) if case.useful_flops else 0.0)
    result = []
    for name, timing in timings.items():
        seconds = timing.median / 1e3
        row: dict[str, Any] = {"op": op, "case": case.name, "candidate": name, "baseline": case.baseline}
        row |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "graph": timing.graph}
        row["speedup"] = timings[case.baseline].median / timing.median
        if case.useful_bytes:
            row["gb_per_s"] = case.useful_bytes / seconds / 1e9
        if case.useful_flops:
            row["tflop_per_s"] = case.useful_flops / seconds / 1e12
        if floor_s:
            row |= {"floor_ms": floor_s * 1e3, "share_of_floor": floor_s / seconds}
        result.append(row)
    return result


def tune(
    op: str,
    table: MutableMapping[Any, Any],
    key: Any,
    configs: Iterable[Any],
    call: Call,
    device: torch.device,
) -> None:
    """Time ``call`` under each launch configuration, leave the fastest in ``table`` and print its line for the source.

    Args:
        table: the op's TUNED, which ``call`` reads at every launch.
        key: the shape's part of its key.
        configs: ``LaunchConfig``s to try.
    """
    gpu = torch.cuda.get_device_name(device)
    results = []
    for config in configs:
        table[gpu, key] = config
        results.append((measure({op: call}, device, rounds=9)[op].median, config))
    best_ms, best = min(results, key=lambda result: result[0])
    table[gpu, key] = best
    measured = f"{gpu}, {datetime.date.today():%Y-%m}, bench_{op}: {best_ms * 1e3:.1f} us"
    blocks, warps, stages = dict(best.blocks), best.num_warps, best.num_stages
    print(f"    ({gpu!r}, {key!r}): LaunchConfig({blocks}, {warps}, {stages}, {measured!r}),")


def main(
    op: str,
    cases: Callable[[torch.device], Iterable[Case]],
    tuner: Callable[[torch.device], None] | None = None,
    description: str | None = None,
) -> int:
    """Command line of a ``bench_<op>`` file: check, tune if asked, measure, print, append rows; the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try launch configurations first (needs a GPU)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each candidate")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if arguments.tune and device.type != "cuda":
        parser.error("--tune needs a GPU, none is visible")
    if not green(op):
        print(f"tests/kernels/test_{op}.py fails: a wrong kernel has no speed; nothing measured", file=sys.stderr)
        return 1
    if device.type != "cuda":
        print("no GPU: the Triton kernels' times cannot be measured here; only the torch implementations are compared")
    if arguments.tune and tuner:
        tuner(device)
    where = machine()
    name = re.sub(r"[^a-z0-9]+", "-", (where["gpu"] or where["cpu"]).lower()).strip("-")
    file = ROOT / "benchmarks" / "results" / f"{op}_{name}_{datetime.date.today():%Y%m}.jsonl"
    file.parent.mkdir(exist_ok=True)
    print(where)
    for case in cases(device):
        for row in rows(op, case, measure(case.candidates, device, arguments.rounds, case.eager), device):
            print(_line(row))
            with file.open("a") as out:
                out.write(json.dumps(row | where) + "\n")
    print(f"rows appended to {file.relative_to(ROOT)}")
    return 0


def _line(row: Mapping[str, Any]) -> str:
    extra = [f"{row[key]:.0f} {unit}" for key, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")) if key in row]
    if "share_of_floor" in row:
        extra.append(f"{100 * row['share_of_floor']:.0f} % of the floor")
    times = f"{row['median_ms']:9.4f} ms ({row['p20_ms']:.4f} .. {row['p80_ms']:.4f})"
    return (
        f"{row['case']:28} {row['candidate']:14} {times}  {row['speedup']:6.2f}x {row['baseline']}  {', '.join(extra)}"
    )
