"""`tune`: what `auto` takes on this GPU, measured at the shapes of a configuration.

Op by op, launch settings of the kernel are compiled many at a time, checked against the default one's results and
timed; then the kernel is timed beside torch's implementations, forward and backward. Those that win there are tried in
the whole training step, one after the other, and stay only where the step becomes faster with them, because a kernel
that wins alone can cost the compiler a fusion. Rows go to the user's cache, where ``kernels._measured`` finds them.
"""

import datetime
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.errors import TritonError

from fastdeitlt import config, distributed
from fastdeitlt.data.counts import KNOWN_CLASSES
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._launch import compiling
from fastdeitlt.kernels._measured import Key, Row, file_of, gpu_name, read, trying, use, write
from fastdeitlt.kernels.adamw_ema import KEY
from fastdeitlt.speed.bench import step_of
from fastdeitlt.speed.setup import Setup, set_up
from fastdeitlt.speed.timer import Call, Timing, capturing_stream, measure, tensors_of
from fastdeitlt.speed.tune_parts import Part, Pass, parts, under

log = logging.getLogger("fastdeitlt")

ROUNDS, SEARCH_ROUNDS = 20, 5
TOLERANCE = 2e-2
"""Of a setting's results beside the default's, as a share of the largest value: several roundings of bfloat16."""
CHOICES = {
    "attention": ("student", "attention", "sdpa"),
    "add_layernorm": ("student", "add_layernorm", "torch"),
    "bias_gelu": ("student", "bias_gelu", "torch"),
    "joint_loss": ("loss", "impl", "torch"),
    "adamw_ema": ("optim", "backend", "torch"),
}
"""Op -> section and field of the configuration that chooses it, and torch's implementation."""


def tune(
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    with_step: bool = True,
    again: bool = False,
) -> list[Row]:
    """Measure, print, and write what `auto` takes from now on.

    Args:
        config_name, overrides: as for training; the data set is not opened where its number of classes is known.
        out: folder for the GPU's file. None = the user's cache.
        with_step: let the whole step decide; else each op alone, and the optimizer stays as it is.
        again: measure the ops also where the file has what was measured with these versions.

    Raises:
        UserError: no GPU, or what training would have raised.
    """
    cfg = config.load(config_name, list(overrides))
    device = distributed.device_of(cfg.train.device)
    if device.type != "cuda":
        raise UserError("tune: got no GPU, and the kernels run on one; on a CPU auto takes torch's everywhere")
    path = file_of(gpu_name(device.index), Path(out) if out else None)
    with capturing_stream(device):
        setup = set_up(cfg, device, synthetic=cfg.data.dataset in KNOWN_CLASSES)
        rows, won = tune_ops(setup, path, {} if again else measured(path, gpu_name(device.index)))
        rows += choose_by_step(setup, won) if with_step else list(won.values())
    write(path, rows)
    show(rows, path)
    return rows


def measured(path: Path, gpu: str) -> dict[tuple[str, str, Key], Row]:
    """(kind, op, key) -> row of a file, of those measured on a GPU with the installed versions."""
    versions = _versions()
    rows = [row for row in read(path) if row.gpu == gpu and {name: getattr(row, name) for name in versions} == versions]
    return {(row.kind, row.op, row.key): row for row in rows}


def tune_ops(setup: Setup, path: Path, known: Mapping[tuple[str, str, Key], Row]) -> tuple[list[Row], dict[str, Row]]:
    """Rows of the settings, each written when it is found, and op -> its row of what is fastest alone.

    The settings found for an op hold from then on, so that its kernel is compared at its best. What is ``known`` is not
    measured: an interrupted `tune` goes on where it was.
    """
    rows, won = [], {}
    for part in parts(setup):
        for key, found in part.passes.items():
            row = known.get(("setting", part.op, key)) or search(setup, part.op, key, found)
            use(part.op, key, row.config)
            write(path, [row])
            rows.append(row)
        if part.whole:
            row = known.get(("fastest", part.op, part.key))
            if row is None:
                row = _fastest(setup, part)
                write(path, [row.model_copy(update={"impl": CHOICES[part.op][2]})])  # until the caller has decided
            won[part.op] = row.model_copy(update={"impl": min(row.us, key=row.us.__getitem__)})
    return rows, won


def _fastest(setup: Setup, part: Part) -> Row:
    us = _us(measure(part.whole, setup.device, ROUNDS))
    return _row(setup, part.op, part.key, "fastest", us, impl=min(us, key=us.__getitem__))


def search(setup: Setup, op: str, key: Key, found: Pass) -> Row:
    """The fastest setting of a launch, the default where none is faster."""
    default = found.settings[0]
    others = [setting for setting in found.settings if setting != default]
    with trying(op, key, default):
        expected = _copied(found.result())
    with compiling(os.cpu_count() or 1):
        for setting in found.settings:
            with trying(op, key, setting):
                found.call()
    times: dict[int, float] = {}
    for number, setting in enumerate(others):
        with trying(op, key, setting):
            try:
                got = found.result()
            except (TritonError, RuntimeError) as error:  # too much shared memory, or ptxas gives up
                log.debug("%s %s: %s left out, %s", op, key, setting, error)
                continue
            if not same(got, expected):
                log.warning("%s %s: %s computes something else and is left out; please report it", op, key, setting)
                continue
            times[number] = measure({op: found.call}, setup.device, SEARCH_ROUNDS)[op].median
    log.info("%s %s: %d of %d settings run", op, key, len(times) + 1, len(others) + 1)
    best = others[min(times, key=times.__getitem__)] if times else default
    calls = {"best": under(op, key, best, found.call), "default": under(op, key, default, found.call)}
    timings = measure(calls, setup.device, ROUNDS)
    if timings["best"].median >= timings["default"].median:
        best = default
    options = {"blocks": dict(best.blocks), "num_warps": best.num_warps, "num_stages": best.num_stages}
    return _row(setup, op, key, "setting", _us(timings), **options)


def same(got: Any, expected: Any) -> bool:
    """Whether two results agree to the rounding that another order of sums brings."""
    pairs = zip(tensors_of(got), tensors_of(expected), strict=True)
    return all((a.float() - b.float()).abs().max() <= TOLERANCE * b.float().abs().max() for a, b in pairs if b.numel())


def _copied(result: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_of(result)]


def choose_by_step(setup: Setup, won: Mapping[str, Row]) -> list[Row]:
    """Rows of what the whole training step takes: each winner joins the step where that makes it faster.

    The step begins with torch's implementations; an op whose winner does not help keeps torch's.
    """
    tried = {op: row for op, row in won.items() if row.impl != CHOICES[op][2]}
    if setup.cfg.optim.algorithm == "adamw":
        tried["adamw_ema"] = _row(setup, "adamw_ema", KEY, "fastest", {}, impl="fastdeitlt")
    rows = {op: row for op, row in won.items() if op not in tried}
    chosen = {op: torchs for op, (_, _, torchs) in CHOICES.items()}
    with torch._dynamo.config.patch(recompile_limit=64):
        step = _step(setup, chosen)
        for op, row in tried.items():
            other = _step(setup, chosen | {op: row.impl})
            timings = measure({"without": step, "with": other}, setup.device, ROUNDS, frozenset(("without", "with")))
            facts: dict[str, Any] = {"step_ms": {name: timing.median for name, timing in timings.items()}}
            if timings["with"].median < timings["without"].median:
                chosen[op], step = row.impl, other
            else:
                facts["impl"] = CHOICES[op][2]
            rows[op] = row.model_copy(update=facts)
    return list(rows.values())


def _step(setup: Setup, choice: Mapping[str, str]) -> Call:
    """The training step with an implementation of each op."""
    sections: dict[str, dict[str, str]] = {}
    for op, impl in choice.items():
        section, field, _ = CHOICES[op]
        sections.setdefault(section, {})[field] = impl
    update = {name: getattr(setup.cfg, name).model_copy(update=fields) for name, fields in sections.items()}
    another = set_up(setup.cfg.model_copy(update=update), setup.device, synthetic=True, counts=setup.counts)
    return step_of(another, another.joint)


def _us(timings: Mapping[str, Timing]) -> dict[str, float]:
    return {name: timing.median * 1e3 for name, timing in timings.items()}


def _row(setup: Setup, op: str, key: Key, kind: str, us: dict[str, float], **facts: Any) -> Row:
    command = f"fastdeitlt tune {setup.cfg.name}"
    gpu, date = gpu_name(setup.device.index), datetime.date.today().isoformat()
    return Row(op=op, key=key, kind=kind, gpu=gpu, date=date, command=command, us=us, **_versions(), **facts)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "triton")}


def show(rows: Sequence[Row], path: Path) -> None:
    """Print what was found and where it went."""
    console = Console()
    table = Table("op", "shape", "taken", "alone, us", "step, ms", title=f"{rows[0].gpu}: what auto takes")
    for row in rows:
        taken = row.impl or " ".join(f"{name}={value}" for name, value in row.blocks.items())
        taken += "" if row.impl else f" warps={row.num_warps} stages={row.num_stages}"
        alone, step = (
            "  ".join(f"{name} {value:.4g}" for name, value in times.items()) for times in (row.us, row.step_ms)
        )
        table.add_row(row.op, " ".join(map(str, row.key)), taken, alone, step)
    console.print(table)
    console.print(f"written to {path}")
