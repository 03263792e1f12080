"""What a teacher's training costs: loss, images a second, share of time spent waiting for data, time left."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.run import Run
from fastdeitlt.teachers.views import Plan

T = TypeVar("T")


class Meter:
    """Loss, speed and waiting of the loop, read from the device once in ``train.log_every`` steps."""

    def __init__(self, cfg: Config, run: Run, plan: Plan, device: torch.device, done: int) -> None:
        self.cfg, self.run = cfg, run
        self.total = plan.steps * cfg.teacher_training.epochs
        self.loss = torch.zeros((), device=device)
        self.done = self.window_done = self.first = done
        self.begun, self.away = time.perf_counter(), 0.0
        self._start_window()
        run.start_progress(self.total, done)

    def _start_window(self) -> None:
        self.window, self.waited, self.images, self.window_done = time.perf_counter(), 0.0, 0, self.done
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
                f"steps {self.window_done + 1} to {self.done}: loss {loss}; training stopped, the last checkpoint in "
                f"{self.run.folder} is sound; lower teacher_training.lr or set teacher_training.clip_norm=1"
            )
        now = time.perf_counter()
        speed, waited = self.images / (now - self.window), self.waited / (now - self.window)
        left = (now - self.begun - self.away) / (self.done - self.first) * (self.total - self.done)
        facts = {"epoch": self.epoch, "loss": loss, "lr": self.rate, "rho": self.rho}
        self.run.record("step", self.done, **facts, images_per_s=speed, data_wait=waited, eta_s=left)
        self.run.show(
            self.done,
            f"epoch {self.epoch + 1}/{self.cfg.teacher_training.epochs}  step {self.done}/{self.total}  "
            f"loss {loss:.3f}  lr {self.rate:.2e}  {speed:.0f} img/s  data wait {waited:.0%}  {left:.0f} s left",
        )
        self._start_window()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave evaluation and checkpoints out of the speed."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.away += spent
        self.window += spent
