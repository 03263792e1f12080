"""Batches of a teacher's training: the images of each batch of an epoch."""

# B batch, N images in the set

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastdeitlt.config import Config
from fastdeitlt.data.augment import counter
from fastdeitlt.data.sampling import Sampling, sampling_of
from fastdeitlt.errors import UserError, counted

ORDER, STEP = 210, 211
"""Streams of the generator."""
MIN_PART = 2
"""Fewest images in a micro-batch: batch norm has no variance of one value."""
LEAST_SHARE = 1 / 8
"""Smallest last batch, as a share of a whole one, so that an epoch has equally many steps on up to batch_size / 16
ranks (times micro-batches)."""


@dataclass(frozen=True)
class TeacherPlan:
    """The batches of an epoch, a permutation that depends on (seed, epoch) alone.

    A batch is split in order into nearly equal parts: over ranks, then over a rank's micro-batches. Batch norm needs
    two images in each, so a last batch too small for that, or smaller than ``LEAST_SHARE``, is merged into the one
    before. PaCo drops an incomplete last batch, because a batch replaces a fixed part of its queue.
    """

    n: int
    batch_size: int
    seed: int
    drop_last: bool
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    sampling: Sampling | None = None
    """How often an epoch shows each class; None: every image once."""

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        whole, rest = divmod(self.n, self.batch_size)
        least = max(LEAST_SHARE * self.batch_size if whole else 0, MIN_PART * self.world * self.accumulate)
        return whole + (rest >= least and not self.drop_last)

    @property
    def last_batch(self) -> str:
        """Note on images that fill no batch; empty if there is nothing to report."""
        left = self.n - self.steps * self.batch_size
        if left <= 0:
            return ""
        if self.drop_last:
            return f"PaCo uses full batches: each epoch skips {left} of {self.n} images, others in each"
        images = f"{self.batch_size + left} images"
        return f"the last batch of an epoch has {images}: {left} alone would be too few for a step"

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield image indices and their occurrence so far, two int64 [B] a batch.

        Begins at batch number ``start``.
        """
        if self.sampling:
            order_N, before_N = self.sampling.draw(epoch)
        else:
            key_N = counter.keys(self.seed, epoch, np.arange(self.n))
            order_N = counter.words(key_N, ORDER, 1)[:, 0].argsort(kind="stable")
            before_N = np.zeros_like(order_N)
        for index in range(start, self.steps):
            is_last = index + 1 == self.steps and not self.drop_last
            batch = slice(index * self.batch_size, self.n if is_last else (index + 1) * self.batch_size)
            yield order_N[batch], before_N[batch]

    def parts(self, values_B: np.ndarray) -> list[np.ndarray]:
        """Return this rank's parts of a batch."""
        return np.array_split(np.array_split(values_B, self.world)[self.rank], self.accumulate)

    def step_seed(self, epoch: int, index: int) -> int:
        """Return the seed of all other randomness of a step on this rank."""
        seed = int(counter.words(counter.keys(self.seed, epoch, index), STEP, 1)[0, 0] >> np.uint64(1))
        return (seed + self.rank) % 2**63


def teacher_plan_of(
    cfg: Config, num_images: int, rank: int = 0, world: int = 1, labels_N: np.ndarray | None = None
) -> TeacherPlan:
    """Return the batches of a teacher's run.

    Args:
        labels_N: class of each image, for ``data.sampling``; None: the plan is for counts only.

    Raises:
        UserError: the batch is too small for the ranks and micro-batches, or larger than the set.
    """
    t = cfg.teacher_training
    seed, sampling = cfg.train.seed, sampling_of(cfg.data, labels_N, t.epochs, cfg.train.seed)
    plan = TeacherPlan(num_images, t.batch_size, seed, t.loss == "paco", rank, world, t.accumulate, sampling)
    if plan.batch_size < MIN_PART * world * t.accumulate:
        raise UserError(
            f"teacher_training.batch_size: got {plan.batch_size}, expected at least {MIN_PART} images for each of "
            f"{counted(world, 'rank')} x {counted(t.accumulate, 'micro-batch')}, as batch norm needs. Use a larger "
            "batch or fewer of them."
        )
    if plan.steps == 0:
        raise UserError(
            f"teacher_training.batch_size: got {plan.batch_size}, expected at most {plan.n}, the images of the set"
        )
    return plan
