"""`tune`: measure the implementations for `auto` on this GPU.

For each op, the kernel's launch settings are compiled in parallel, verified against the default's results and timed;
then the kernel is timed against torch's implementations, forward and backward. Winners are tried in the whole training
step, one after the other, and kept only if the step becomes faster, because a kernel that is faster alone can cost the
compiler a fusion. Rows are written to the user cache, which ``kernels._measured`` reads.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import TritonError

from fastdeitlt import config, distributed
from fastdeitlt.core.measure.first_start import copied, fastest, microseconds, new_row, same
from fastdeitlt.core.measure.parts import SETTINGS, Pass, Shapes, parts, under
from fastdeitlt.core.measure.timer import Call, capturing_stream, measure
from fastdeitlt.data.sets.counts import KNOWN_CLASSES
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._launch import compiling, context_failure
from fastdeitlt.kernels._measured import Key, Row, by_key, file_of, gpu_name, is_current, read, trying, use, write
from fastdeitlt.tools.setup import Setup, set_up, step_of

log = logging.getLogger("fastdeitlt")

ROUNDS, SEARCH_ROUNDS = 20, 5


def tune(
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    with_step: bool = True,
    again: bool = False,
) -> list[Row]:
    """Measure, print and store the implementations for `auto`.

    Args:
        config_name, overrides: as for training; the data set is not opened if its number of classes is known.
        out: folder of the GPU's file. None = the user cache.
        with_step: select by the time of the whole step; else by each op alone.
        again: repeat measurements already in the file for these versions.

    Raises:
        UserError: no GPU, or as in training.
    """
    cfg = config.load(config_name, list(overrides))
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"measure_kernels": False})})
    device = distributed.device_of(cfg.train.device)
    if device.type != "cuda":
        raise UserError("tune: no GPU; on a CPU auto always uses torch")
    path = file_of(gpu_name(device.index), Path(out) if out else None)
    with capturing_stream(device):
        setup = set_up(cfg, device, synthetic=cfg.data.dataset in KNOWN_CLASSES)
        earlier = {} if again else by_key(row for row in read(path) if is_current(row, gpu_name(device.index)))
        shapes = shapes_of(setup)
        rows, won = tune_ops(shapes, path, earlier)
        rows += choose_by_step(setup, shapes, won) if with_step else list(won.values())
    write(path, rows)
    show(rows, path)
    return rows


def shapes_of(setup: Setup) -> Shapes:
    """Return the models and sizes that determine a step's shapes."""
    parts = setup.assemble()
    return Shapes(setup.cfg, parts.student, parts.teacher, len(setup.data.counts), setup.device)


def tune_ops(
    shapes: Shapes, path: Path, saved_rows: Mapping[tuple[str, str, Key], Row]
) -> tuple[list[Row], dict[str, Row]]:
    """Return rows of launch settings, and op -> row of its fastest implementation.

    Each row is written at once. An op's kernel is compared with its best settings. Rows in ``saved_rows`` are not
    measured again, so an interrupted `tune` resumes.
    """
    rows, won = [], {}
    for part in parts(shapes):
        for key, launch in part.passes.items():
            row = saved_rows.get(("setting", part.op, key)) or search(shapes, part.op, key, launch)
            use(part.op, key, row.config)
            write(path, [row])
            rows.append(row)
        if part.whole:
            row = saved_rows.get(("fastest", part.op, part.key))
            if row is None or not row.is_tuned:
                row = fastest(shapes, part, ROUNDS)
                write(path, [row.model_copy(update={"impl": shapes.torchs(part.op)})])  # until the caller decides
            won[part.op] = row.model_copy(update={"impl": min(row.us, key=row.us.__getitem__)})
    return rows, won


def search(shapes: Shapes, op: str, key: Key, launch: Pass) -> Row:
    """Return the row of a launch's fastest setting, the default if none is faster."""
    default = launch.settings[0]
    others = [setting for setting in launch.settings if setting != default]
    with trying(op, key, default):
        expected = copied(launch.result())
    with compiling(os.cpu_count() or 1):
        for setting in launch.settings:
            with trying(op, key, setting):
                launch.call()
    times: dict[int, float] = {}
    for number, setting in enumerate(others):
        with trying(op, key, setting):
            try:
                agrees = same(launch.result(), expected)
            except (TritonError, RuntimeError) as error:  # too much shared memory, or ptxas fails
                log.debug("%s %s: %s not measured, %s", op, key, setting, error)
                if failure := context_failure(shapes.device):
                    raise UserError(
                        f"tune: {op} {key}: {setting} broke the CUDA context ({failure}). Please report this."
                    ) from error
                continue
            if not agrees:
                log.warning("%s %s: %s disagrees with torch, not used; please report this", op, key, setting)
                continue
            times[number] = measure({op: launch.call}, shapes.device, SEARCH_ROUNDS)[op].median
    log.info("%s %s: %d of %d settings run", op, key, len(times) + 1, len(others) + 1)
    best = others[min(times, key=times.__getitem__)] if times else default
    calls = {"best": under(op, key, best, launch.call), "default": under(op, key, default, launch.call)}
    timings = measure(calls, shapes.device, ROUNDS)
    if timings["best"].median >= timings["default"].median:
        best = default
    options = {"blocks": dict(best.blocks), "num_warps": best.num_warps, "num_stages": best.num_stages}
    return new_row(shapes, op, key, "setting", microseconds(timings), **options)


def choose_by_step(setup: Setup, shapes: Shapes, won: Mapping[str, Row]) -> list[Row]:
    """Return the rows selected by the whole step: winners that make it faster.

    The step starts with torch's implementations; an op whose winner does not help keeps torch's.
    """
    chosen = {op: shapes.torchs(op) for op in SETTINGS}
    winners = {op: row for op, row in won.items() if row.impl != chosen[op]}
    rows = {op: row for op, row in won.items() if op not in winners}
    with torch._dynamo.config.patch(recompile_limit=64):
        step = _step(setup, chosen)
        for op, row in winners.items():
            other = _step(setup, chosen | {op: row.impl})
            timings = measure({"without": step, "with": other}, setup.device, ROUNDS, frozenset(("without", "with")))
            facts: dict[str, Any] = {"step_ms": {name: timing.median for name, timing in timings.items()}}
            if timings["with"].median < timings["without"].median:
                chosen[op], step = row.impl, other
            else:
                facts["impl"] = chosen[op]
            rows[op] = row.model_copy(update=facts)
    return list(rows.values())


def _step(setup: Setup, choice: Mapping[str, str]) -> Call:
    """Return the training step with an implementation of each op."""
    sections: dict[str, dict[str, str]] = {}
    for op, impl in choice.items():
        section, field = SETTINGS[op]
        sections.setdefault(section, {})[field] = impl
    update = {name: getattr(setup.cfg, name).model_copy(update=fields) for name, fields in sections.items()}
    another = set_up(setup.cfg.model_copy(update=update), setup.device, synthetic=True, counts=setup.data.counts)
    parts = another.assemble()
    return step_of(parts, repeat(parts.noise_batch()))


def show(rows: Sequence[Row], path: Path) -> None:
    """Print the rows and the path of their file."""
    console = Console()
    table = Table("op", "shape", "selected", "alone, us", "step, ms", title=f"{rows[0].gpu}: selected by auto")
    for row in rows:
        selected = row.impl or " ".join(f"{name}={value}" for name, value in row.blocks.items())
        selected += "" if row.impl else f" warps={row.num_warps} stages={row.num_stages}"
        alone, step = (
            "  ".join(f"{name} {value:.4g}" for name, value in times.items()) for times in (row.us, row.step_ms)
        )
        table.add_row(row.op, " ".join(map(str, row.key)), selected, alone, step)
    console.print(table)
    console.print(f"written to {path}", markup=False)
