"""What the loop costs: losses, images a second, share of time spent waiting for data, MFU, time left.

Losses stay on the device; the host reads them once in ``train.log_every`` optimizer steps, and nowhere else.
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
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, flops_per_image
from fastdeitlt.run import watch
from fastdeitlt.run.folder import Run
from fastdeitlt.stopwatch import WORK

PEAK_FLOPS = {
    "H200 NVL": 836e12, "H100 NVL": 836e12, "H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "A100": 312e12,
    "B200": 2250e12, "L40S": 362e12, "4090": 165e12,
}  # fmt: skip
"""By a part of the GPU's name, the first that fits: datasheet, dense bf16 with float32 accumulation, FLOP/s."""


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 rate of a known GPU in FLOP/s; None for others and for CPUs, where MFU is not shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def forward_flops(teacher: nn.Module, img_size: int, device: torch.device) -> float:
    """FLOPs of one image's forward pass, counted by running it."""
    with FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, 3, img_size, img_size, device=device))
    return float(counter.get_total_flops())


class Pace:
    """Images a second, waiting and time left of a loop of ``total`` steps, from one report to the next."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.first, self.done = total, done, done
        self.away, self.paused_at = 0.0, math.inf
        self.begun = self._seconds()
        self.start_window()

    def _seconds(self) -> float:
        """Seconds of the loop, which stand still while it is paused."""
        return min(time.perf_counter(), self.paused_at) - self.away

    def start_window(self) -> None:
        """What is counted from here on is for the next report."""
        self.window, self.waited, self.images, self.window_done = self._seconds(), 0.0, 0, self.done

    def read(self) -> dict[str, float]:
        """Images a second, share of the time spent waiting for data, seconds left."""
        now = self._seconds()
        seconds, left = now - self.window, self.total - self.done
        eta_s = (now - self.begun) / (self.done - self.first) * left
        return {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds, "eta_s": eta_s}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave evaluation and checkpoints out of the speed, also where a report falls among them."""
        self.paused_at = time.perf_counter()
        yield
        self.away += time.perf_counter() - self.paused_at
        self.paused_at = math.inf


class Meter(Pace):
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
        # backward costs twice the forward; the teacher runs forward only
        self.flops = 3 * flops_per_image(student) + (
            forward_flops(teacher, student.img_size, device) if teacher else 0.0
        )
        self.peak = peak_flops(device)
        self.device = device
        self.norms, self.stragglers = watch.Norms(cfg.train.nonfinite_skips), watch.Stragglers(done)
        super().__init__(plan.optimizer_steps * cfg.train.epochs, done)
        run.start_progress(self.total, done)

    def start_window(self) -> None:
        super().start_window()
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._micro_batches: list[tuple[int, MicroBatch]] = []

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, timing how long it took to come."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        WORK.start(self.device)
        return batch

    def add(self, losses: JointLoss, micro_batch: MicroBatch) -> None:
        """Count a micro-batch after its backward pass; nothing leaves the device."""
        WORK.stop()
        self._losses.append(torch.stack([loss.detach() for loss in losses]))
        self._micro_batches.append((self.done + 1, micro_batch))
        self.images += self.plan.batch_size * self.plan.world

    def step(self, done: int, epoch: int, rate: float, norm: Tensor) -> None:
        """Count an optimizer step; report every ``log_every`` of them and at the end."""
        self.done, self.epoch, self.rate = done, epoch, rate
        self._norms.append(norm)
        if done % self.cfg.train.log_every == 0 or done == self.total:
            self.report()

    def report(self) -> None:
        """Read the losses of the steps since the last report, log them, and refuse to go on when they are not finite.

        Raises:
            NonFiniteError: the loss or the gradient norm is NaN or infinite, in more steps than may be left out.
        """
        steps = self.done - self.window_done
        if steps == 0:
            return
        losses_Mx3, norms_S = torch.stack(self._losses), torch.stack(self._norms).to(self.device)
        finite_M = losses_Mx3.isfinite().all(1)
        sums = torch.where(finite_M[:, None], losses_Mx3, 0.0).sum(0)
        summed, good_R, wait_R, work_R = self._exchange(sums, finite_M.sum())
        norms: list[float] = norms_S.tolist()
        pace, window = self.read(), f"steps {self.window_done + 1} to {self.done}"
        failed = self.norms.failure(norms, self.window_done + 1)
        if failed is not None:
            self._fail(failed, window, losses_Mx3[:, 0].tolist(), norms, good_R)
        self.stragglers.add(wait_R, work_R, self.done)
        loss, cls_loss, dist_loss = (value / max(sum(good_R), 1.0) for value in summed)
        norm = sum(n for n in norms if n < float("inf")) / steps
        facts = {"epoch": self.epoch, "loss": loss, "cls_loss": cls_loss, "dist_loss": dist_loss, "lr": self.rate}
        facts |= {"grad_norm": norm, **pace}
        mfu = ""
        if self.peak:
            facts["mfu"] = pace["images_per_s"] * self.flops / (self.peak * self.plan.world)
            mfu = f"  MFU {facts['mfu']:.1%}"
        self.run.record("step", self.done, **facts)
        self.run.show(
            self.done,
            f"epoch {self.epoch + 1}/{self.cfg.train.epochs}  step {self.done}/{self.total}  loss {loss:.3f} "
            f"(CLS {cls_loss:.3f}, DIST {dist_loss:.3f})  lr {self.rate:.2e}  {pace['images_per_s']:.0f} img/s  "
            f"data wait {pace['data_wait']:.0%}{mfu}  {pace['eta_s']:.0f} s left",
        )
        self.start_window()

    def _exchange(self, sums: Tensor, good: Tensor) -> tuple[list[float], list[float], list[float], list[float]]:
        """One sum over ranks: the three losses, and each rank's finite micro-batches, seconds of waiting and work."""
        ranks, rank = self.plan.world, self.plan.rank
        told = torch.zeros(3 + 3 * ranks, device=self.device)
        told[:3], told[3 + rank] = sums, good
        told[3 + ranks + rank], told[3 + 2 * ranks + rank] = self.waited, WORK.read()
        values = distributed.sum_over_ranks(told).tolist()  # sync: the only one of the loop
        return values[:3], *(values[3 + i * ranks : 3 + (i + 1) * ranks] for i in range(3))  # type: ignore[return-value]

    def _fail(self, step: int, window: str, losses: list[float], norms: list[float], good_R: list[float]) -> None:
        micro_batches = [micro for _, micro in self._micro_batches]
        at = [(number, loss) for (number, _), loss in zip(self._micro_batches, losses, strict=True)]
        watch.dump(self.run.folder, step, at, micro_batches, lr=self.rate, grad_norms=[repr(norm) for norm in norms])
        bad = [str(rank) for rank, good in enumerate(good_R) if good < len(losses)]
        where = f" (rank {', '.join(bad)})" if bad and self.plan.world > 1 else ""
        raise NonFiniteError(
            f"{window}: the {'loss' if bad else 'gradient'} is not finite from step {step}{where}; training stopped "
            f"before that update; {self.run.folder}/nonfinite.rank*.json name the images; "
            + watch.nonfinite_remedy(self.run.checkpoints, "optim", self.cfg.optim.clip_norm)
        )
