"""Detection of non-finite losses, gradient spikes, slow ranks and full memory."""

import json
import logging
import math
import statistics
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.data.teacher_plan import MIN_PART
from fastdeitlt.errors import CheckpointError, MemoryFullError, is_memory_full
from fastdeitlt.run.checkpoints import Checkpoints
from fastdeitlt.store.files import write_atomically

log = logging.getLogger("fastdeitlt")
STRAGGLER = 0.1
"""Excess data wait over the median rank, as a share of the period, above which a rank is slow."""
PERIOD_S = 10.0
"""Seconds of a comparison period; shorter ones vary by chance."""
SPIKE = 10.0
"""Multiple of the usual gradient norm above which a norm is a spike."""


class Stragglers:
    """Comparison of the ranks' data wait, with warnings of a persistently slow rank."""

    def __init__(self, done: int = 0) -> None:
        self._slow, self._periods = -1, 0
        self._start(done)

    def _start(self, step: int) -> None:
        self._first, self._seconds, self._wait_R = step + 1, 0.0, [0.0]

    def add(self, wait_R: Sequence[float], seconds: float, step: int) -> None:
        """Add the steps up to ``step``; at the end of a period, warn of a slow rank.

        Warnings come after 2, 4, 8, ... consecutive periods.

        Args:
            wait_R: data wait of each rank in seconds since the last call.
            seconds: time since the last call.
            step: the last of these steps.
        """
        if len(wait_R) < 2:
            return
        self._wait_R = [sum(pair) for pair in zip_longest(self._wait_R, wait_R, fillvalue=0.0)]
        self._seconds += seconds
        if self._seconds < PERIOD_S:
            return
        median, slowest = statistics.median_low(self._wait_R), max(range(len(wait_R)), key=self._wait_R.__getitem__)
        slow = slowest if self._wait_R[slowest] - median > STRAGGLER * self._seconds else -1
        self._periods = self._periods + 1 if slow == self._slow else 1
        self._slow = slow
        if slow >= 0 and self._periods > 1 and self._periods.bit_count() == 1:
            log.warning(
                "steps %d to %d: rank %d is a straggler: it waited for data %.1f s of %.1f s, the median rank %.1f s "
                "(%d periods of %.0f s so far)",
                self._first,
                step,
                slow,
                self._wait_R[slow],
                self._seconds,
                median,
                self._periods,
                PERIOD_S,
            )
        self._start(step)


class Norms:
    """Monitors gradient norms on the host for spikes and skipped steps."""

    def __init__(self, skips: int) -> None:
        self.skips = skips
        self.in_a_row = 0
        self.average: float | None = None

    def failure(self, norms: Sequence[float], first_step: int) -> int | None:
        """Return the first of more than ``skips`` consecutive non-finite steps, or None."""
        for step, norm in enumerate(norms, first_step):
            if not math.isfinite(norm):
                self.in_a_row += 1
                if self.in_a_row > self.skips:
                    return step - self.skips
                log.warning("step %d: non-finite gradient, update skipped", step)
                continue
            self.in_a_row = 0
            if self.average and norm > SPIKE * self.average:
                log.warning("step %d: gradient norm %.3g, moving average %.3g", step, norm, self.average)
            before = norm if self.average is None else self.average
            self.average = before + 0.1 * (min(norm, SPIKE * before) - before)
        return None


def dump(
    folder: Path, step: int, losses: Sequence[tuple[int, float]], micro_batches: Sequence[MicroBatch], **facts: Any
) -> Path:
    """Write this rank's micro-batches of a failed step; return the path.

    Args:
        folder: the run folder.
        step: the first step with a non-finite gradient.
        losses: (step, loss) of each micro-batch since the last report.
        micro_batches: the micro-batches themselves.
        facts: further entries.
    """
    records = [
        {
            "step": at,
            "loss": repr(loss),
            "epoch": micro.epoch,
            "index": micro.index,
            "virtual_rank": micro.virtual_rank,
            "images": micro.sample_B.tolist(),
        }
        for (at, loss), micro in zip(losses, micro_batches, strict=True)
        if at == step
    ]
    bad = [entry for entry in records if not math.isfinite(float(entry["loss"]))]
    path = folder / f"nonfinite.rank{distributed.rank()}.json"
    write_atomically(path, json.dumps({"step": step, **facts, "micro_batches": bad or records}, indent=1))
    return path


def nonfinite_remedy(checkpoints: Checkpoints, section: str, clip_norm: float) -> str:
    """Return the remedy of a non-finite loss or gradient: checkpoint and settings.

    Args:
        checkpoints: checkpoints of the run; waits for a current save.
        section: configuration section with the learning rate and ``clip_norm``.
        clip_norm: its value. 0 = off.
    """
    with suppress(CheckpointError):  # the loss is the error to report
        checkpoints.finish()
    saved = checkpoints.latest
    state = f"checkpoint {saved} is intact" if saved else "no checkpoint was saved before"
    clip = "" if 0 < clip_norm <= 1 else f" or set {section}.clip_norm=1"
    return f"{state}. Lower {section}.lr{clip} (another run: --resume never)"


@contextmanager
def memory_hint(cfg: Config, folder: Path, section: str = "train") -> Iterator[None]:
    """Convert an out-of-memory error to one line with settings that need less.

    Args:
        cfg: the run.
        folder: its folder, for the memory summary of a GPU.
        section: configuration section with the batch size: train for a student, teacher_training for a teacher.

    Raises:
        MemoryFullError: the device or host is out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        if not is_memory_full(error):
            raise
        note = ""
        if torch.cuda.is_initialized():
            path = folder / f"memory.rank{distributed.rank()}.txt"
            path.write_text(torch.cuda.memory_summary(), encoding="utf-8")
            note = f"; {path} has the memory summary"
        reason = " ".join(str(error).split())[:160]
        if _is_in_evaluation(error):
            batch = f"evaluate.batch_size={cfg.evaluate.batch_size}"
            less = f"Resume with evaluate.batch_size={max(1, cfg.evaluate.batch_size // 2)}"
        elif section == "train" and (together := cfg.train.ranks_per_forward) > 1:
            batch = f"train.batch_size={cfg.train.batch_size} train.ranks_per_forward={together}"
            fewer = next(n for n in range(together // 2, 0, -1) if together % n == 0)
            less = f"Resume with train.ranks_per_forward={fewer}"
        else:
            batch = f"{section}.batch_size={getattr(cfg, section).batch_size}"
            less = _less_for_student(cfg) if section == "train" else _less_for_teacher(cfg)
            less += " (another run: --resume never)"
        raise MemoryFullError(
            f"out of memory with {batch} on rank {distributed.rank()} ({reason}). {less}{note}"
        ) from None


def _is_in_evaluation(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "gather_logits" for frame, _ in frames)


def _less_for_student(cfg: Config) -> str:
    t, half = cfg.train, cfg.train.batch_size // 2
    if cfg.loss.normalise == "rank" and half >= 2 and half % 2 == 0:
        ranks = f"train.virtual_ranks={2 * t.virtual_ranks}"
        return (
            f"Use train.batch_size={half} {ranks}, which halves the memory with the same learning rate and images per "
            "step"
        )
    sharded = ", or train.zero_stage=2" if distributed.get_world() > 1 and t.zero_stage < 2 else ""
    return f"Use a smaller student or train.batch_size{sharded}"


def _less_for_teacher(cfg: Config) -> str:
    t = cfg.teacher_training
    parts = 2 * t.accumulate
    if t.batch_size >= MIN_PART * distributed.get_world() * parts:
        return (
            f"Use teacher_training.accumulate={parts}, which halves the memory with the same images per step (batch "
            "norm uses half as many at a time)"
        )
    return "Use a smaller teacher_training.arch or teacher_training.img_size"
