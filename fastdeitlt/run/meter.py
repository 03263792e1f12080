"""Meter of a training loop: losses, throughput, data wait, MFU, time left.

Losses stay on the device; the host reads them only every ``train.log_every`` optimizer steps.
"""

# M micro-batches, L losses, R ranks, S steps

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.core.measure.flops import peak_flops
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.errors import NonFiniteError
from fastdeitlt.run import watch
from fastdeitlt.run.folder import Run


@dataclass(frozen=True)
class Loop:
    """Description of a training loop for its meter."""

    steps: int
    """Total optimizer steps."""
    epochs: int
    losses: Mapping[str, str]
    """Log key -> title of each loss of a micro-batch; the first is minimised."""
    section: str
    """Configuration section with ``lr`` and ``clip_norm``."""
    clip_norm: float
    log_every: int
    skips: int = 0
    """Allowed consecutive steps with a non-finite gradient (``train.nonfinite_skips``)."""
    flops: float = 0.0
    """Model FLOPs per image; 0 = MFU is not shown."""
    rank: int = 0
    world: int = 1


class Meter:
    """Accumulate a run's steps and report them every ``train.log_every``.

    Args:
        run: destination of the reports.
        loop: the training loop.
        device: device of the losses.
        done: optimizer steps completed before.
    """

    def __init__(self, run: Run, loop: Loop, device: torch.device, done: int) -> None:
        self.run, self.loop, self.device = run, loop, device
        self.peak = peak_flops(device) if loop.flops else None
        self.norms, self.stragglers = watch.Norms(loop.skips), watch.Stragglers(done)
        self.first = self.done = done
        self.epoch, self.facts = 0, dict[str, float]()
        self.away, self.paused_at = 0.0, math.inf
        self.begun = self._seconds()
        self._start_window()
        run.start_progress(loop.steps, done)

    def _seconds(self) -> float:
        """Return the loop's seconds, without pauses."""
        return min(time.perf_counter(), self.paused_at) - self.away

    def _start_window(self) -> None:
        """Reset the counters for the next report."""
        self.window, self.waited, self.images, self.window_done = self._seconds(), 0.0, 0, self.done
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._micro_batches: list[tuple[int, MicroBatch]] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude evaluation and checkpoints from the measured speed."""
        self.paused_at = time.perf_counter()
        yield
        self.away += time.perf_counter() - self.paused_at
        self.paused_at = math.inf

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time of a step's stage "data"."""
        start = time.perf_counter()
        yield
        if name == "data":
            self.waited += time.perf_counter() - start

    def step(
        self,
        losses: Sequence[Sequence[Tensor]],
        norm: Tensor | None,
        images: int,
        *,
        done: int,
        epoch: int,
        facts: Mapping[str, float],
        micro_batches: Sequence[MicroBatch] = (),
    ) -> None:
        """Add an optimizer step without a host sync; report every ``log_every`` steps.

        Args:
            losses: losses of each micro-batch of this rank, 0-d; reported as mean over micro-batches and ranks.
            norm: gradient norm, equal on all ranks, 0-d; None: unknown, then no loss may be non-finite.
            images: images of all ranks.
            done, epoch: completed optimizer steps, completed epochs.
            facts: settings of this step for the log, including ``lr``.
            micro_batches: images of the step, dumped if a gradient is not finite.
        """
        self.done, self.epoch, self.facts = done, epoch, dict(facts)
        self._losses += [torch.stack(list(parts)) for parts in losses]
        self._norms += [] if norm is None else [norm]
        self._micro_batches += [(done, micro_batch) for micro_batch in micro_batches]
        self.images += images
        if done % self.loop.log_every == 0 or done == self.loop.steps:
            self.report()

    def report(self) -> None:
        """Read and log the losses since the last report.

        Raises:
            NonFiniteError: the loss or gradient norm is NaN or infinite in more steps than allowed.
        """
        loop, steps = self.loop, self.done - self.window_done
        if steps == 0:
            return
        losses_MxL = torch.stack(self._losses)
        norms_S = torch.stack(self._norms).to(self.device) if self._norms else None
        finite_M = losses_MxL.isfinite().all(1)
        sums_L = torch.where(finite_M[:, None], losses_MxL, 0.0).sum(0)
        summed_L, good_R, wait_R = self._exchange(sums_L, finite_M.sum())
        norms: list[float] = norms_S.tolist() if norms_S is not None else []
        now = self._seconds()
        seconds, waited = now - self.window, self.waited
        eta_s = (now - self.begun) / (self.done - self.first) * (loop.steps - self.done)
        failed = self.norms.failure(norms, self.window_done + 1)
        if failed is not None or (not norms and sum(good_R) < loop.world * len(losses_MxL)):
            self._fail(failed, losses_MxL[:, 0].tolist(), norms, good_R)
        self.stragglers.add(wait_R, seconds, self.done)
        means = {key: value / max(sum(good_R), 1.0) for key, value in zip(loop.losses, summed_L, strict=True)}
        rate = self.images / seconds
        facts: dict[str, float] = {"epoch": self.epoch, **means, **self.facts}
        if norms:
            facts["grad_norm"] = sum(n for n in norms if math.isfinite(n)) / steps
        facts |= {"images_per_s": rate, "data_wait": waited / seconds, "eta_s": eta_s}
        if self.peak:
            facts["mfu"] = rate * loop.flops / (self.peak * loop.world)
        self.run.record("step", self.done, **facts)
        brief = {"loss": facts[next(iter(loop.losses))], **{key: facts[key] for key in ("images_per_s", "eta_s")}}
        self.run.show(self.done, self._text(facts), f"epoch {self.epoch + 1}/{loop.epochs}", brief)
        self._start_window()

    def _text(self, facts: Mapping[str, float]) -> str:
        """Format a report as one line."""
        loop = self.loop
        first, *others = loop.losses
        parts = ", ".join(f"{loop.losses[key]} {facts[key]:.3f}" for key in others)
        mfu = f"  MFU {facts['mfu']:.1%}" if "mfu" in facts else ""
        return (
            f"epoch {self.epoch + 1}/{loop.epochs}  step {self.done}/{loop.steps}  loss {facts[first]:.3f}"
            + (f" ({parts})" if parts else "")
            + f"  lr {facts['lr']:.2e}  {facts['images_per_s']:.0f} img/s  data wait {facts['data_wait']:.0%}{mfu}  "
            f"{facts['eta_s']:.0f} s left"
        )

    def _exchange(self, sums_L: Tensor, good: Tensor) -> tuple[list[float], list[float], list[float]]:
        """Return summed losses, and per rank the finite micro-batches and data wait (s)."""
        ranks, rank, losses = self.loop.world, self.loop.rank, len(sums_L)
        buffer = torch.zeros(losses + 2 * ranks, device=self.device)
        buffer[:losses], buffer[losses + rank], buffer[losses + ranks + rank] = sums_L, good, self.waited
        values = distributed.sum_over_ranks(buffer).tolist()  # the only host sync of the loop
        return values[:losses], values[losses : losses + ranks], values[losses + ranks :]

    def _fail(self, step: int | None, losses: list[float], norms: list[float], good_R: list[float]) -> None:
        run, loop = self.run, self.loop
        dumps = ""
        if step is not None:
            micro_batches = [micro for _, micro in self._micro_batches]
            at = [(number, loss) for (number, _), loss in zip(self._micro_batches, losses, strict=True)]
            watch.dump(run.folder, step, at, micro_batches, **self.facts, grad_norms=[repr(norm) for norm in norms])
            dumps = f"{run.folder}/nonfinite.rank*.json list the images; "
        since = "" if step is None else f" from step {step}"
        bad = [str(rank) for rank, good in enumerate(good_R) if good < len(losses)]
        where = f" (rank {', '.join(bad)})" if bad and loop.world > 1 else ""
        skip = "" if step is None or loop.skips else ". To skip that update, resume with train.nonfinite_skips=1"
        raise NonFiniteError(
            f"steps {self.window_done + 1} to {self.done}: non-finite {'loss' if bad else 'gradient'}"
            f"{since}{where}; training stopped{' before that update' if since else ''}; {dumps}"
            + watch.nonfinite_remedy(run.checkpoints, loop.section, loop.clip_norm)
            + skip
        )
