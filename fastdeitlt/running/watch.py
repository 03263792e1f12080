"""What goes wrong in the loop, and on which rank: losses that are not finite, gradient spikes, stragglers, memory."""

import json
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fastdeitlt import distributed
from fastdeitlt.checkpoint import Checkpoints
from fastdeitlt.config import Config
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.errors import CheckpointError, MemoryFullError

log = logging.getLogger("fastdeitlt")
STRAGGLER = 1.5
"""Times the usual seconds of a rank from which one is said to hold the others up."""
NO_ROOM = ("out of memory", "can't allocate", "alloc_failed", "allocation_failed")
"""What plain runtime errors say, in small letters, of CUDA outside torch's allocator (pinned memory, modules, Triton,
NCCL), of the host's allocator and DALI's, and of cuBLAS and cuDNN."""
SPIKE = 10.0
"""Times the usual gradient norm from which a step's is a spike."""


def warn_of_straggler(wait_R: Sequence[float], work_R: Sequence[float], window: str) -> None:
    """Log the rank that the others wait for.

    Args:
        wait_R: seconds that each rank waited for its data.
        work_R: seconds of each rank's forward and backward passes.
        window: the steps they are of, for the message.
    """
    busy_R = [wait + work for wait, work in zip(wait_R, work_R, strict=True)]
    usual, slowest = statistics.median_low(busy_R), max(range(len(busy_R)), key=busy_R.__getitem__)
    if len(busy_R) < 2 or busy_R[slowest] <= STRAGGLER * usual:
        return
    over = {
        phase: seconds[slowest] - statistics.median_low(seconds)
        for phase, seconds in (("waiting for data", wait_R), ("forward and backward", work_R))
    }
    log.warning(
        "%s: rank %d holds the others up: %.2f s where the usual rank took %.2f s, most of it in %s",
        window,
        slowest,
        busy_R[slowest],
        usual,
        max(over, key=over.__getitem__),
    )


class Norms:
    """The gradient norms of a run as the host reads them: spikes, and steps that were left out."""

    def __init__(self, skips: int) -> None:
        self.skips = skips
        self.in_a_row = 0
        self.usual: float | None = None

    def failure(self, norms: Sequence[float], first_step: int) -> int | None:
        """The step at which more than ``skips`` norms in a row were not finite, if one was; logs what is unusual."""
        for step, norm in enumerate(norms, first_step):
            if not math.isfinite(norm):
                self.in_a_row += 1
                if self.in_a_row > self.skips:
                    return step - self.skips
                log.warning("step %d: the gradient is not finite; the update was left out", step)
                continue
            self.in_a_row = 0
            if self.usual and norm > SPIKE * self.usual:
                log.warning("step %d: gradient norm %.3g, usually %.3g", step, norm, self.usual)
            self.usual = norm if self.usual is None else self.usual + 0.1 * (min(norm, SPIKE * self.usual) - self.usual)
        return None


def dump(
    folder: Path, step: int, losses: Sequence[tuple[int, float]], micro_batches: Sequence[MicroBatch], **facts: Any
) -> Path:
    """Write what this rank saw when the run failed at ``step``, and return the file.

    Args:
        folder: the run's.
        step: the first step whose gradient was not finite.
        losses: (step, loss) of each micro-batch since the last report.
        micro_batches: they themselves.
        facts: more to write.
    """
    seen = [
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
    bad = [entry for entry in seen if not math.isfinite(float(entry["loss"]))]
    path = folder / f"nonfinite.rank{distributed.rank()}.json"
    path.write_text(json.dumps({"step": step, **facts, "micro_batches": bad or seen}, indent=1), encoding="utf-8")
    return path


def nonfinite_remedy(checkpoints: Checkpoints, section: str, clip_norm: float) -> str:
    """Return what a run that met a loss or gradient that is not finite can resume from, and which settings help.

    Args:
        checkpoints: the run's; a save in flight is waited for.
        section: of the learning rate and ``clip_norm`` in the configuration.
        clip_norm: its value. 0 = off.
    """
    with suppress(CheckpointError):  # the loss is the news
        checkpoints.finish()
    saved = checkpoints.latest
    state = f"checkpoint {saved} is sound" if saved else "no checkpoint was saved before"
    clip = "" if 0 < clip_norm <= 1 else f" or set {section}.clip_norm=1"
    return f"{state}; lower {section}.lr{clip} (another run: --resume never)"


@contextmanager
def memory_hint(cfg: Config, folder: Path) -> Iterator[None]:
    """Turn running out of memory into one line with settings that need less.

    Raises:
        MemoryFullError: the device, or the host's allocator, has no room.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and not any(said in str(error).lower() for said in NO_ROOM):
            raise
        t, note = cfg.train, ""
        if torch.cuda.is_initialized():
            path = folder / f"memory.rank{distributed.rank()}.txt"
            path.write_text(torch.cuda.memory_summary(), encoding="utf-8")
            note = f"; {path} says what held it"
        half = t.batch_size // 2
        less = (
            f"train.batch_size={half} train.virtual_ranks={2 * t.virtual_ranks} has the same learning rate and images "
            "a step in half the memory"
            if half >= 2 and half % 2 == 0
            else "use a smaller student, or train.zero_stage=3"
        )
        said = " ".join(str(error).split())[:160]
        raise MemoryFullError(
            f"out of memory with train.batch_size={t.batch_size} on rank {distributed.rank()} ({said}); {less} "
            f"(another run: --resume never){note}"
        ) from None
