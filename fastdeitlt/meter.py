"""What the loop costs: losses, images a second, share of time spent waiting for data, MFU, time left.

Losses are summed on the device; the host reads them once in ``train.log_every`` optimizer steps, and nowhere else.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Batch
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.loss import JointLoss
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, flops_per_image
from fastdeitlt.run import Run

# Datasheet, dense bf16 with float32 accumulation, FLOP/s.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 rate of a known GPU in FLOP/s; None for others and for CPUs, where MFU is not shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def _forward_flops(teacher: nn.Module, img_size: int, device: torch.device) -> float:
    """FLOPs of one image's forward pass, counted by running it."""
    with FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, 3, img_size, img_size, device=device))
    return float(counter.get_total_flops())


class Meter:
    """Counts one run's steps and reports them every ``train.log_every``."""

    def __init__(
        self,
        cfg: Config,
        run: Run,
        plan: Plan,
        student: DistilledViT,
        teacher: Teacher | None,
        device: torch.device,
        done: int,
    ) -> None:
        self.cfg, self.run, self.plan = cfg, run, plan
        self.total = plan.optimizer_steps * cfg.train.epochs
        # backward costs twice the forward; the teacher runs forward only
        self.flops = 3 * flops_per_image(student) + (
            _forward_flops(teacher, student.img_size, device) if teacher else 0.0
        )
        self.peak = peak_flops(device)
        self.sums = torch.zeros(4, device=device)
        self.first, self.done = done, done
        self.micro = 0
        self._start_window()
        self.begun, self.away = time.perf_counter(), 0.0
        run.start_progress(self.total, done)

    def _start_window(self) -> None:
        self.window, self.waited, self.images, self.window_done = time.perf_counter(), 0.0, 0, self.done
        self.micro = 0
        self.sums.zero_()

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, timing how long it took to come."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, losses: JointLoss) -> None:
        """Count a micro-batch; nothing leaves the device."""
        self.sums[:3] += torch.stack([losses.loss.detach(), losses.cls_loss.detach(), losses.dist_loss.detach()])
        self.micro += 1
        self.images += self.plan.batch_size * self.plan.world

    def step(self, done: int, epoch: int, rate: float, norm: Tensor) -> None:
        """Count an optimizer step; report every ``log_every`` of them and at the end."""
        self.done, self.epoch, self.rate = done, epoch, rate
        self.sums[3] += norm
        if done % self.cfg.train.log_every == 0 or done == self.total:
            self.report()

    def report(self) -> None:
        """Read the sums of the steps since the last report, log them, and refuse to go on when they are not finite.

        Raises:
            NonFiniteError: the loss or the gradient norm is NaN or infinite.
        """
        steps = self.done - self.window_done
        if steps == 0:
            return
        summed = distributed.sum_over_ranks(self.sums).tolist()  # sync: the only one of the loop
        now = time.perf_counter()
        ranks, seconds = self.plan.world, now - self.window
        loss, cls_loss, dist_loss = (value / (self.micro * ranks) for value in summed[:3])
        norm = summed[3] / (steps * ranks)
        if not math.isfinite(loss + norm):
            raise NonFiniteError(
                f"steps {self.window_done + 1} to {self.done}: loss {loss}, gradient norm {norm}; training stopped; "
                f"the last checkpoint in {self.run.folder} is sound; lower optim.lr or set optim.clip_norm=1"
            )
        speed = self.images / seconds
        left = (now - self.begun - self.away) / (self.done - self.first) * (self.total - self.done)
        facts = {"epoch": self.epoch, "loss": loss, "cls_loss": cls_loss, "dist_loss": dist_loss, "lr": self.rate}
        facts |= {"grad_norm": norm, "images_per_s": speed, "data_wait": self.waited / seconds, "eta_s": left}
        mfu = ""
        if self.peak:
            facts["mfu"] = speed * self.flops / (self.peak * ranks)
            mfu = f"  MFU {facts['mfu']:.1%}"
        self.run.record("step", self.done, **facts)
        self.run.show(
            self.done,
            f"epoch {self.epoch + 1}/{self.cfg.train.epochs}  step {self.done}/{self.total}  loss {loss:.3f} "
            f"(CLS {cls_loss:.3f}, DIST {dist_loss:.3f})  lr {self.rate:.2e}  {speed:.0f} img/s  "
            f"data wait {facts['data_wait']:.0%}{mfu}  {left:.0f} s left",
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
