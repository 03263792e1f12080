"""Image order and micro-batches, independent of the number of GPUs.

The recipe is defined for R data-parallel ranks ("virtual ranks"). Each of W real ranks runs R / W of them in turn, so
one GPU forms exactly the batches of R GPUs.
"""

# N images in the set, B images in a micro-batch, R virtual ranks, W real ranks

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastdeitlt.config import Config
from fastdeitlt.data.sampling import Sampling, sampling_of
from fastdeitlt.errors import UserError


class RepeatedAugmentationSampler:
    """Yield one rank's indices; each image appears ``repeats`` times across ranks.

    The permutation is seeded by the epoch alone. Each rank uses every ``world_size``-th entry of the repeated
    permutation. With ``repeats`` > 1 it keeps the first floor(floor(N / 256) * 256 / world_size), as the reference.
    With ``repeats`` = 1, and for sets of fewer than 256 images (for which the reference yields nothing), it keeps
    floor(N / world_size).

    Args:
        n: images in the set.
        world_size: ranks that share an epoch.
        rank: this rank.
        repeats: copies of an image in the repeated permutation. 1 = a plain distributed sampler.
        seed_epoch: first epoch; ``set_epoch`` changes it.

    Raises:
        UserError: an argument out of range.

    Source: DeiT samplers.py (RASampler), timm RepeatAugSampler.
    """

    def __init__(self, n: int, world_size: int, rank: int, repeats: int = 3, seed_epoch: int = 0) -> None:
        if n < world_size or world_size < 1 or not 0 <= rank < world_size or repeats < 1:
            raise UserError(
                f"sampler: got n={n}, world_size={world_size}, rank={rank}, repeats={repeats}; "
                "expected n >= world_size >= 1, 0 <= rank < world_size and repeats >= 1"
            )
        self.n, self.world_size, self.rank, self.repeats = n, world_size, rank, repeats
        self.epoch = seed_epoch
        self.cursor = 0
        rounded = n // 256 * 256 if repeats > 1 else n
        self.length = (rounded or n) // world_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch and restart at its first index."""
        self.epoch, self.cursor = epoch, 0

    def order(self, drawn: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's whole epoch: (image index, copy number), two int64 arrays.

        Args:
            drawn: the epoch's image order and how often each image was shown before, see ``Sampling.draw``; None:
                every image once, in the reference's order.
        """
        if drawn is None:
            generator = torch.Generator().manual_seed(self.epoch)
            drawn = torch.randperm(self.n, generator=generator).numpy(), np.zeros(self.n, np.int64)
        sample_N, before_N = drawn
        total = -(-self.n * self.repeats // self.world_size) * self.world_size
        position = np.arange(self.rank, total, self.world_size)[: self.length] % (self.n * self.repeats)
        place = position // self.repeats
        return sample_N[place], before_N[place] * self.repeats + position % self.repeats

    def __iter__(self) -> Iterator[int]:
        for index in self.order()[0][self.cursor :].tolist():
            self.cursor += 1
            yield index
        self.cursor = 0

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, for ``load_state_dict``."""
        return {"epoch": self.epoch, "cursor": self.cursor, "n": self.n, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a position; raise UserError for another set size or number of ranks."""
        if (state["n"], state["world_size"]) != (self.n, self.world_size):
            raise UserError(
                f"sampler state: got n={state['n']}, world_size={state['world_size']}, expected n={self.n}, "
                f"world_size={self.world_size}. Resume with the data set and train.virtual_ranks of the saved run."
            )
        self.epoch, self.cursor = state["epoch"], state["cursor"]


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward and backward pass of a virtual rank."""

    epoch: int
    index: int
    """Number of the micro-step in the epoch, the same for all virtual ranks."""
    virtual_rank: int
    sample_B: np.ndarray
    """int64 indices into the set."""
    copy_B: np.ndarray
    """int64 copy numbers of repeated augmentation."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank."""

    clock: float
    """Position in the learning-rate schedule, in epochs from the start of training."""
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class Plan:
    """The micro-batches of a run and their grouping into optimizer steps.

    Raises:
        UserError: real ranks do not divide virtual ranks, an image per virtual rank is missing, or an epoch has no full
            micro-batch or fewer of them than one optimizer step.
    """

    n: int
    batch_size: int
    accumulate: int
    repeats: int
    virtual_ranks: int
    rank: int = 0
    world: int = 1
    sampling: Sampling | None = None
    """How often an epoch shows each class; None: every image once."""

    def __post_init__(self) -> None:
        if self.virtual_ranks % self.world:
            raise UserError(
                f"train.virtual_ranks: got {self.virtual_ranks}, expected a multiple of {self.world}, the ranks"
            )
        if self.n < self.virtual_ranks:
            raise UserError(
                f"train.virtual_ranks: got {self.virtual_ranks}, expected at most {self.n}, the images of the set"
            )
        if self.micro_steps == 0:
            raise UserError(
                f"train.batch_size: got {self.batch_size}, expected at most {len(self._sampler(0))}, the images per "
                f"epoch ({self.n} in the set) and rank of train.virtual_ranks={self.virtual_ranks}. Use a smaller batch"
                + (" or fewer train.virtual_ranks" if self.virtual_ranks > self.world else "")
            )
        if self.accumulate > self.micro_steps:
            raise UserError(
                f"train.accumulate: got {self.accumulate}, expected at most {self.micro_steps}, the micro-batches per "
                f"epoch and rank of train.batch_size={self.batch_size} ({self.n} images in the set)"
            )

    def _sampler(self, virtual_rank: int) -> RepeatedAugmentationSampler:
        return RepeatedAugmentationSampler(self.n, self.virtual_ranks, virtual_rank, self.repeats)

    @property
    def micro_steps(self) -> int:
        """Micro-steps of a virtual rank in an epoch; an incomplete last batch is dropped."""
        return len(self._sampler(0)) // self.batch_size

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps in an epoch; the last one may have fewer micro-steps."""
        return -(-self.micro_steps // self.accumulate)

    @property
    def ranks_per_process(self) -> int:
        """Virtual ranks per real rank."""
        return self.virtual_ranks // self.world

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches per real rank in one full optimizer step."""
        return self.accumulate * self.ranks_per_process

    @property
    def images_per_step(self) -> int:
        """Images of all ranks in one full optimizer step (the effective batch)."""
        return self.batch_size * self.accumulate * self.virtual_ranks

    @property
    def images_per_epoch(self) -> int:
        """Images of all ranks in an epoch, copies of the same image included."""
        return self.micro_steps * self.batch_size * self.virtual_ranks

    @property
    def distinct_images(self) -> int:
        """Distinct images in an epoch."""
        return -(-self.images_per_epoch // self.repeats)

    @property
    def is_partial(self) -> bool:
        """Whether rounding drops more than a tenth of the set from each epoch."""
        return self.sampling is None and self.images_per_epoch < 0.9 * self.n

    def describe_epoch(self) -> str:
        """Summarize an epoch in one line, with remedies if it is partial."""
        if self.sampling:
            return f"{self.images_per_epoch:,} images per epoch, sampled with data.sampling={self.sampling.kind}"
        text = f"{self.distinct_images:,} of {self.n:,} images per epoch"
        if self.repeats > 1:
            text += f", {self.images_per_epoch:,} with copies (augment.repeats={self.repeats})"
        if not self.is_partial:
            return text
        remedies = ["augment.repeats=1"] if self.repeats > 1 else []
        if self.images_per_epoch < 0.9 * self.virtual_ranks * len(self._sampler(0)):
            remedies.append(f"a train.batch_size below {self.batch_size}")
        return f"{text}; the others are in later epochs. For more per epoch, use {' or '.join(remedies)}"

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """Yield the optimizer steps of an epoch from number ``start`` on.

        The clock is that of the step's first micro-step; for an epoch's last step, that of the last micro-step. The
        reference's engine.py calls its schedule at both.
        """
        mine = range(self.rank * self.ranks_per_process, (self.rank + 1) * self.ranks_per_process)
        drawn = self.sampling.draw(epoch) if self.sampling else None
        orders = {}
        for virtual_rank in mine:
            sampler = self._sampler(virtual_rank)
            sampler.set_epoch(epoch)
            orders[virtual_rank] = sampler.order(drawn)
        for number in range(start, self.optimizer_steps):
            first = number * self.accumulate
            last = min(first + self.accumulate, self.micro_steps)
            clock = self.micro_steps - 1 if last == self.micro_steps else first
            micro_batches = [self._cut(epoch, index, r, *orders[r]) for index in range(first, last) for r in mine]
            yield Step(epoch + clock / self.micro_steps, micro_batches)

    def _cut(self, epoch: int, index: int, virtual_rank: int, sample: np.ndarray, copy: np.ndarray) -> MicroBatch:
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return MicroBatch(epoch, index, virtual_rank, sample[part], copy[part])


def plan_of(cfg: Config, num_images: int, rank: int = 0, world: int = 1, labels_N: np.ndarray | None = None) -> Plan:
    """Return the plan of a run on ``num_images`` images.

    Args:
        world: real ranks; also the virtual ranks, unless ``train.virtual_ranks`` is set.
        labels_N: class of each image, for ``data.sampling``; None: the plan is for counts only.

    Raises:
        UserError: see ``Plan``.
    """
    t = cfg.train
    virtual_ranks = t.virtual_ranks or world
    sampling = sampling_of(cfg.data, labels_N, t.epochs, t.seed)
    return Plan(num_images, t.batch_size, t.accumulate, cfg.augment.repeats, virtual_ranks, rank, world, sampling)
