"""What a teacher's training costs: loss, images a second, share of time spent waiting for data, time left."""

import math
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.teacher_plan import Plan
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.run import watch
from fastdeitlt.run.folder import Run
from fastdeitlt.run.meter import Pace

T = TypeVar("T")


class Meter(Pace):
    """Loss, speed and waiting of the loop, read from the device once in ``train.log_every`` steps."""

    def __init__(self, cfg: Config, run: Run, plan: Plan, device: torch.device, done: int) -> None:
        self.cfg, self.run = cfg, run
        self.loss = torch.zeros((), device=device)
        super().__init__(plan.steps * cfg.teacher_training.epochs, done)
        run.start_progress(self.total, done)

    def start_window(self) -> None:
        super().start_window()
        self.loss.zero_()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; counts how long each took to come."""
        start = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def step(self, loss: Tensor, images: int, done: int, epoch: int, rate: float, rho: float) -> None:
        """Count a step by this rank's share of its loss and all ranks' images; report every ``train.log_every``."""
        self.loss += loss
        self.images += images
        self.done, self.epoch, self.rate, self.rho = done, epoch, rate, rho
        if done % self.cfg.train.log_every == 0 or done == self.total:
            self.report()

    def report(self) -> None:
        """Log the steps since the last report.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        steps = self.done - self.window_done
        if steps == 0:
            return
        loss = distributed.sum_over_ranks(self.loss).item() / steps  # sync: the only one of the loop
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"steps {self.window_done + 1} to {self.done}: loss {loss}; training stopped; "
                + watch.nonfinite_remedy(self.run.checkpoints, "teacher_training", self.cfg.teacher_training.clip_norm)
            )
        pace = self.read()
        facts = {"epoch": self.epoch, "loss": loss, "lr": self.rate, "rho": self.rho}
        self.run.record("step", self.done, **facts, **pace)
        self.run.show(
            self.done,
            f"epoch {self.epoch + 1}/{self.cfg.teacher_training.epochs}  step {self.done}/{self.total}  "
            f"loss {loss:.3f}  lr {self.rate:.2e}  {pace['images_per_s']:.0f} img/s  "
            f"data wait {pace['data_wait']:.0%}  {pace['eta_s']:.0f} s left",
        )
        self.start_window()
