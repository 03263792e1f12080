"""`bench`: throughput of a configuration by part, with FLOPs, memory and power.

Full step, student alone and teacher alone alternate in one process (``timer.measure``) on random images on the device;
data only and end to end use the training pipeline. No run folder is created.
"""

import datetime
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from pynvml import NVMLError
from rich.console import Console
from rich.table import Table

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Parts
from fastdeitlt.core.measure.flops import peak_flops
from fastdeitlt.core.measure.timer import Timing, cpu_name, matmul_rate, measure, synchronise, timing
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.errors import UserError, counted
from fastdeitlt.run.folder import environment
from fastdeitlt.store.files import expect_folder, write_atomically
from fastdeitlt.tools.setup import Setup, endless, set_up, step_of

log = logging.getLogger("fastdeitlt")
ROUNDS, QUICK_ROUNDS = 12, 3
DATA_BATCHES, QUICK_DATA_BATCHES = 48, 12
WARM_UP_BATCHES = 4
STEPS_AHEAD = 2
"""Steps queued beyond the running one while power is measured."""
POWER_S, SENSOR_S, POWER_PERIOD_S = 4.0, 1.0, 0.1
"""Seconds of the power measurement, of the sensor's average (NVML, Hopper), and between readings."""
Row = dict[str, Any]


def bench(
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    quick: bool = False,
    synthetic: bool = False,
    ranks: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the throughput on this machine and print it.

    Args:
        config_name, overrides: as for training. With an empty ``teacher.path``, a teacher of ``teacher.arch`` with
            random weights, which are as fast.
        quick: fewer rounds, no scaling over ranks, and on a CPU no compilation.
        synthetic: open no data set, and skip the parts that need one.
        ranks: numbers of processes for the step. None = 1, 2, 4, ... up to the number of GPUs; none with one or none.
        batches: micro-batch sizes. None = half, one and two times the configuration's.
        json_path: file for the results.

    Returns:
        ``rows``, ``facts``, ``left_out`` (part -> reason) and ``environment``.

    Raises:
        UserError: as in training; or a number of ranks or images below one, or no folder for ``json_path``.
    """
    for option, numbers in (("--ranks", ranks), ("--batches", batches)):
        if wrong := [number for number in numbers or () if number < 1]:
            raise UserError(f"{option}: got {wrong[0]}, expected at least 1")
    expect_folder(json_path)
    cfg = config.load(config_name, list(overrides))
    rank, world = distributed.start(cfg.train.device, cfg.train.timeout_s, cfg.train.main_timeout_s)
    device = distributed.device_of(cfg.train.device)
    if quick and device.type == "cpu" and cfg.train.compile:
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"compile": False})})
    setup = set_up(cfg, device, rank, world, synthetic=synthetic)
    log.info("teacher: %s", setup.teacher_title)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    result: dict[str, Any] = {"config": cfg.name, "rows": [], "facts": {}, "left_out": {}}
    result["environment"] = environment() | {"cpu": cpu_name(), "date": datetime.date.today().isoformat()}

    parts = setup.assemble()
    calls = _calls(setup, parts)
    measured = measure(calls, device, rounds, eager=frozenset(calls))
    step = calls["full step"]
    del calls  # frees the other calls' device memory
    watts = _take_steps(step, device) if world == 1 and device.type == "cuda" else []
    images = setup.images_per_call
    rows = [_row(cfg, name, data_rows, images) for name, data_rows in measured.items()]
    result["facts"] = _facts(setup, parts, rows[0]["images_per_s"], watts)
    if synthetic:
        result["left_out"] |= dict.fromkeys(("data only", "end to end"), "not measured with --synthetic")
    elif world == 1:
        data_rows, share = _with_data(setup, QUICK_DATA_BATCHES if quick else DATA_BATCHES)
        rows += data_rows
        result["facts"]["data wait, share of the end-to-end time"] = share
    if world == 1:
        own = cfg.train.batch_size
        usual = {own // 2 or 1, own, *(() if quick else (2 * own,))}
        sizes = sorted(usual) if batches is None else batches
        rows += [_at_batch(setup, size, rounds) for size in sizes]
        gpus = torch.cuda.device_count()
        powers = [2**i for i in range(gpus.bit_length())] if gpus > 1 and not quick else []
        rank_counts = powers if ranks is None else ranks
        rows += [_at_ranks(config_name, overrides, number, quick=quick, synthetic=synthetic) for number in rank_counts]
        if not rank_counts:
            result["left_out"]["scaling over ranks"] = (
                "needs several GPUs and no --quick; add --ranks 1 2 to measure it here"
            )
    else:
        rows[0] |= {"candidate": counted(world, "rank"), "images_per_s": rows[0]["images_per_s"] * world}
    result["rows"] = rows
    if rank == 0:
        if json_path:
            write_atomically(Path(json_path), json.dumps(result, indent=1))
        show(result)
    return result


def _row(cfg: Config, name: str, timing_of: Timing, images: int) -> Row:
    row: Row = {"op": "bench", "case": cfg.name, "candidate": name, "images_per_s": images / timing_of.median * 1e3}
    return row | {"median_ms": timing_of.median, "p20_ms": timing_of.p20, "p80_ms": timing_of.p80, "images": images}


def _calls(setup: Setup, parts: Parts) -> dict[str, Callable[[], object]]:
    """Return calls of full step, student and teacher on ``images_per_call`` images."""
    student_parts = setup.assemble(teacher=False)
    batch, teacher, dtype = parts.noise_batch(), parts.joint.teacher, parts.joint.dtype
    assert teacher is not None
    t = setup.cfg.train
    forward = torch.compile(teacher, options=t.compiler_options) if t.compile else teacher

    def teacher_only() -> None:
        with torch.no_grad(), torch.autocast(setup.device.type, dtype, enabled=dtype is not None):
            for _ in range(setup.micro_batches):
                forward(batch.images_BCHW)

    return {
        "full step": step_of(parts, repeat(batch)),
        "student only": step_of(student_parts, repeat(batch)),
        "teacher only": teacher_only,
    }


def _with_data(setup: Setup, num_batches: int) -> tuple[list[Row], float]:
    """Return rows of pipeline alone and end to end, and the share of data wait."""
    cfg, device = setup.cfg, setup.device
    assert setup.sets is not None
    with closing(open_source(setup.sets.train, cfg.data, device)) as source:
        parts = setup.assemble(source)
        with closing(endless(parts)) as batches:
            marks = [_now(device) for _ in islice(batches, num_batches + WARM_UP_BATCHES)][WARM_UP_BATCHES - 1 :]
        data = _row(cfg, "data only", _paced(marks), cfg.train.batch_size)
        with closing(endless(parts)) as batches:
            waited: list[float] = []

            @contextmanager
            def stage(name: str) -> Iterator[None]:
                start = time.perf_counter()
                yield
                if name == "data":
                    waited.append(time.perf_counter() - start)

            step = step_of(parts, batches, stage)
            for _ in range(-(-WARM_UP_BATCHES // setup.micro_batches)):
                step()
            waited.clear()
            marks = [_now(device)]
            for _ in range(-(-num_batches // setup.micro_batches)):
                step()
                marks.append(_now(device))
    return [data, _row(cfg, "end to end", _paced(marks), setup.images_per_call)], sum(waited) / (marks[-1] - marks[0])


def _paced(marks: Sequence[float]) -> Timing:
    """Return the milliseconds between marks, which are in seconds."""
    # batches come in bursts: the mean is the rate
    spread = timing([1e3 * (end - start) for start, end in pairwise(marks)])
    return replace(spread, median=1e3 * (marks[-1] - marks[0]) / (len(marks) - 1))


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def _at_batch(like: Setup, size: int, rounds: int) -> Row:
    """Return the full step's row at another micro-batch size, or its failure."""
    cfg, device = like.cfg, like.device
    train = cfg.train.model_copy(update={"batch_size": size})
    torch.compiler.reset()  # else the compiler would use dynamic shapes
    name = f"batch {size}"
    try:
        setup = set_up(cfg.model_copy(update={"train": train}), device, synthetic=True, counts=like.data.counts)
        parts = setup.assemble()
        step = step_of(parts, repeat(parts.noise_batch()))
        timing_of = measure({name: step}, device, rounds, eager=frozenset((name,)))[name]
    except torch.OutOfMemoryError:
        return {"op": "bench", "case": cfg.name, "candidate": name, "failed": "out of device memory"}
    return _row(cfg, name, timing_of, setup.images_per_call)


def _at_ranks(config_name: str, overrides: Sequence[str], number: int, *, quick: bool, synthetic: bool) -> Row:
    """Return the full step's row on several processes, started by torchrun."""
    torch.cuda.empty_cache()  # rank 0 uses this process's GPU
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "-m"]
        command += ["fastdeitlt.cli", "bench", config_name, *overrides, "--ranks", "--batches", "--json", str(out)]
        command += ["--quick"] * quick + ["--synthetic"] * synthetic
        name = counted(number, "rank")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.is_file():
            output = (done.stderr or done.stdout).strip().splitlines()
            why = next((line for line in output if "Error" in line or "error:" in line), f"exit code {done.returncode}")
            return {"op": "bench", "case": config_name, "candidate": name, "failed": why.strip()[:200]}
        return json.loads(out.read_text(encoding="utf-8"))["rows"][0] | {"candidate": name}


def _facts(setup: Setup, parts: Parts, images_per_s: float, watts: list[float]) -> dict[str, Any]:
    """Return FLOPs, MFU, memory and power; None = not measurable here."""
    device, gpu = setup.device, setup.device.type == "cuda"
    memory = (  # before matmul_rate allocates more
        torch.cuda.max_memory_allocated(device) if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    flops, dtype = parts.flops, parts.joint.dtype or torch.float32
    achieved, matmul, peak = images_per_s * flops, matmul_rate(device, dtype), peak_flops(device)
    power = sum(watts) / len(watts) if watts else None
    return {
        "model GFLOP an image (student x 3, teacher x 1)": flops / 1e9,
        "achieved GFLOP/s": achieved / 1e9,
        f"measured matmul GFLOP/s ({str(dtype).removeprefix('torch.')})": matmul / 1e9,
        "MFU against the measured matmul": achieved / matmul,
        "MFU against the datasheet": achieved / peak if peak else None,
        "peak memory MiB" + ("" if gpu else " (of the process)"): memory / 2**20,
        "power W (NVML)": power,
        "images a joule": images_per_s / power if power else None,
        "threads": torch.get_num_threads(),
        "images an optimizer step and rank": setup.images_per_call,
    }


def _take_steps(step: Callable[[], object], device: torch.device) -> list[float]:
    """Return the GPU's power in W during full steps; reset peak memory to theirs.

    Empty if NVML reports no power.
    """
    torch.cuda.reset_peak_memory_stats(device)
    done, end = threading.Event(), time.perf_counter() + POWER_S
    pending: deque[torch.cuda.Event] = deque()
    with ThreadPoolExecutor(1) as pool:
        watts = pool.submit(_read_power, device, done)
        try:
            while time.perf_counter() < end:
                step()
                pending.append(torch.cuda.Event())
                pending[-1].record()
                if len(pending) > STEPS_AHEAD:
                    pending.popleft().synchronize()
        finally:
            done.set()
    return watts.result()


def _read_power(device: torch.device, done: threading.Event) -> list[float]:
    watts: list[float] = []
    done.wait(SENSOR_S)
    while not done.wait(POWER_PERIOD_S):
        try:
            watts.append(torch.cuda.power_draw(device) / 1e3)
        except (RuntimeError, NVMLError):  # no driver, or no power sensor
            break
    return watts


def show(result: dict[str, Any]) -> None:
    """Print the results as tables."""
    console, where = Console(), result["environment"]
    table = Table(title=f"{result['config']} on {where['gpu'] or where['cpu']}, {where['cpus']} cores, {where['date']}")
    for column, justify in (("", "left"), ("images/s", "right"), ("ms per call", "right"), ("p20 .. p80", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["candidate"], row["failed"], "", "")
            continue
        spread = f"{row['p20_ms']:.1f} .. {row['p80_ms']:.1f}"
        table.add_row(row["candidate"], f"{row['images_per_s']:,.1f}", f"{row['median_ms']:.1f}", spread)
    for part, why in result["left_out"].items():
        table.add_row(part, "not measured", "", why)
    console.print(table)
    facts = Table(show_header=False)
    for name, value in result["facts"].items():
        facts.add_row(name, "not available" if value is None else f"{value:,.4g}")
    console.print(facts)
