"""The program with a fault that rank 1 meets once: ``python fault_ranks.py FAULT NOTE train ...``.

It is the launcher and each of its ranks. The launcher imports no more than the program's own.
"""

import dataclasses
import errno
import os
import signal
import sys
import time
from pathlib import Path

from fastdeitlt import cli
from fastdeitlt.run import launch

FAULTS = {
    # fault: (step at whose start rank 1 meets it, exit code, what is said)
    "sigterm": (2, 75, "stopped by SIGTERM, saved at step"),
    "sigint": (5, 130, "stopped by SIGINT, saved at step"),
    "raise": (7, 1, "rank 1 of 2 stopped: RuntimeError: a bug"),
    "hang": (7, 7, "lost contact with rank 1"),
    "memory": (8, 6, "out of memory with train.batch_size=8 on rank 1"),
    "nan": (9, 5, "non-finite loss from step 9 (rank 1); training stopped before that update"),
    "gone": (10, 1, "/gone.png: No such file or directory. Restore it"),
    "kill": (10, 0, "rank 1 of 2 killed by SIGKILL"),  # and started again
}
SLOW_STEPS = (11, 12)
"""At which rank 1 waits half a second longer for each micro-batch, with the fault ``none``."""


def main(fault, note, *arguments):
    """The program; writes the moment of the fault to the file ``note``."""
    launch.PROGRAM = [sys.executable, __file__, fault, note]
    if "RANK" in os.environ:
        from fastdeitlt.run import watch

        watch.PERIOD_S, watch.STRAGGLER = 1.0, 0.3
    if os.environ.get("RANK") == "1":
        _inject(fault, Path(note))
    sys.argv = [__file__, *arguments]
    return cli.main()


def _inject(fault, note):
    """Rank 1 meets the fault when it waits for the first batch of a step."""
    import torch

    from fastdeitlt.core.step import TrainStep
    from fastdeitlt.run.meter import Meter

    take, start, meters = TrainStep.__call__, Meter.__init__, []

    def remembered(self, *arguments):
        start(self, *arguments)
        meters.append(self)

    def faulty(batch):
        step = meters[-1].done + 1
        if fault == "none":
            time.sleep(0.5 * (step in SLOW_STEPS))
            return batch
        if note.exists() or step != FAULTS[fault][0]:
            return batch
        note.write_text(str(time.time()))
        if fault == "sigterm":  # as of an impatient queue
            for _ in range(40):
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(0.009)
        elif fault == "sigint":
            os.kill(os.getppid(), signal.SIGINT)
        elif fault in ("hang", "kill"):
            os.kill(os.getpid(), signal.SIGSTOP if fault == "hang" else signal.SIGKILL)
        elif fault == "raise":
            raise RuntimeError("a bug")
        elif fault == "gone":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/gone.png")
        elif fault == "memory":
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")
        return dataclasses.replace(batch, images_BCHW=batch.images_BCHW * (float("nan") if fault == "nan" else 1.0))

    Meter.__init__ = remembered
    TrainStep.__call__ = lambda self, batches, *rest: take(self, map(faulty, batches), *rest)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
