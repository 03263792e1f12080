"""Harness of the benchmark files: cases with a baseline, a check of the op's tests, and rows with their machine.

The timer is ``fastdeitlt.core.measure.timer``. Rows are appended to
``benchmarks/results/<op>_<machine>_<yyyymm>.jsonl``, or to the file BENCHMARK_ROWS.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.portable import ROOT, version_of
from fastdeitlt.core.measure.timer import Call, Timing, bandwidth, capturing_stream, cpu_name, matmul_rate, measure

RECOMPILES = 64
"""Limit of compilations per function, one per shape, pass and contestant; beyond torch's default of 8 it is eager."""


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        name: name in the row.
        candidates: name -> call; a call does all its work on every invocation.
        baseline: candidate to compare with: the best alternative, not the slowest.
        useful_bytes, useful_flops: least work of the op, for the share of the floor; 0 = not stated.
        dtype: type of the floor's matrix products; None: see ``timer.matmul_rate``.
        eager: candidates that cannot be captured in a CUDA graph.
        images: images of a call, for their rate; 0 = not stated.
        facts: further entries of the rows.
    """

    name: str
    candidates: Mapping[str, Call]
    baseline: str
    useful_bytes: int = 0
    useful_flops: int = 0
    dtype: torch.dtype | None = None
    eager: frozenset[str] = field(default_factory=frozenset)
    images: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def pass_cases(title: str, calls: Mapping[str, Mapping[str, Call]], useful_bytes: Mapping[str, int]) -> Iterator[Case]:
    """Yield a case per pass, against inductor; ``title`` has ``{}`` for its name.

    Args:
        calls: peer -> pass -> call, see ``timer.passes``.
        useful_bytes: pass -> bytes.
    """
    for name, moved in useful_bytes.items():
        yield Case(title.format(name), {peer: call[name] for peer, call in calls.items()}, "inductor", moved)


def machine() -> dict[str, Any]:
    """Return the origin of a row: processor, versions, commit, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "allocator": os.environ.get("GLIBC_TUNABLES"),
        "interpreter_lock": getattr(sys, "_is_gil_enabled", lambda: True)(),  # False: free-threaded Python
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """Return the checkout's commit, or GIT_COMMIT.

    The latter without history, or where git refuses the checkout as another user's.
    """
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    return os.environ.get("GIT_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def installed(module: str) -> bool:
    """Return whether an optional package is installed, without importing it."""
    parent, _, _ = module.rpartition(".")
    return (not parent or installed(parent)) and importlib.util.find_spec(module) is not None


def green(op: str) -> bool:
    """Return whether the op's tests pass, on the GPU if there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/kernels/test_{op}.py"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def rows(op: str, case: Case, timings: Mapping[str, Timing], device: torch.device) -> list[dict[str, Any]]:
    """Return one row per candidate.

    Times, ratio to the baseline (above 1 = faster), rates and fraction of the floor.
    """
    floor_s = case.useful_bytes / bandwidth(device) if case.useful_bytes else 0.0
    floor_s = max(floor_s, case.useful_flops / matmul_rate(device, case.dtype) if case.useful_flops else 0.0)
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
        if case.images:
            row["images_per_s"] = case.images / seconds
        result.append(row | case.facts)
    return result


def run(op: str, case: Case, device: torch.device, rounds: int) -> Path:
    """Measure a case, print its rows and append them; return the file."""
    new_rows = rows(op, case, measure(case.candidates, device, rounds, case.eager), device)
    for row in new_rows:
        print(line(row), flush=True)
    return append(op, new_rows)


def main(
    op: str,
    cases: Callable[[torch.device], Iterable[Case]],
    description: str | None = None,
    *,
    gpu_only: bool = False,
) -> int:
    """Run the command line of a ``bench_<op>`` file; return the exit code.

    ``gpu_only``: measure nothing without a GPU, since a CPU only runs torch's implementation.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="samples per candidate")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if gpu_only and device.type != "cuda":
        print(f"no GPU: not measured; on a CPU {op} uses torch")
        return 0
    if not green(op):
        print(f"tests/kernels/test_{op}.py failed: not measured", file=sys.stderr)
        return 1
    if device.type != "cuda":
        print("no GPU: comparing only the torch implementations")
    print(machine())
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES), capturing_stream(device):
        for case in cases(device):
            file = run(op, case, device, arguments.rounds)
    print(f"rows appended to {file}")
    return 0


def append(op: str, new_rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows and machine to BENCHMARK_ROWS, else to this month's file."""
    where = machine()
    override = os.environ.get("BENCHMARK_ROWS")
    name = re.sub(r"[^a-z0-9]+", "-", (where["gpu"] or where["cpu"]).lower()).strip("-")
    month = f"{op}_{name}_{datetime.date.today():%Y%m}.jsonl"
    file = Path(override) if override else ROOT / "benchmarks" / "results" / month
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps({**row, **where}) + "\n" for row in new_rows)
    return file


def line(row: Mapping[str, Any]) -> str:
    units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "images_per_s": "images/s"}
    extra = [f"{row[key]:.0f} {unit}" for key, unit in units.items() if key in row]
    if "share_of_floor" in row:
        extra.append(f"{100 * row['share_of_floor']:.0f} % of the floor")
    times = f"{row['median_ms']:9.4f} ms ({row['p20_ms']:.4f} .. {row['p80_ms']:.4f})"
    return (
        f"{row['case']:28} {row['candidate']:14} {times}  {row['speedup']:6.2f}x {row['baseline']}  {', '.join(extra)}"
    )
