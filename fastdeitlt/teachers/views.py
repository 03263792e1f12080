"""The teacher's batches: which images, and one augmented view of each, or two for PaCo."""

# B batch, C channels, H height, W width, N images in the set

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.data import colour, counter
from fastdeitlt.data.augment import CropRequest
from fastdeitlt.data.batches import Source, prefetch
from fastdeitlt.data.colour import View, ViewDraws
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.side_stream import aside, side_stream
from fastdeitlt.errors import UserError

ORDER, STEP = 210, 211
"""Streams of the generator."""
MIN_PART = 2
"""Images in a micro-batch: batch norm has no deviation of one value."""


@dataclass(frozen=True)
class Part:
    """What one rank puts through the network at once: its micro-batch of a step."""

    views: list[Tensor]
    """Each images_BCHW, normalised, on the source's device."""
    labels_B: Tensor


@dataclass(frozen=True)
class StepBatch:
    """The images of an optimizer step: this rank's parts, and the labels of all ranks' in their order."""

    parts: list[Part]
    labels_B: Tensor


@dataclass(frozen=True)
class Plan:
    """The batches of an epoch: a new order of all images each time, drawn from (seed, epoch) alone.

    A batch is cut into nearly equal parts, in order: over ranks, then a rank's into micro-batches. Batch norm needs two
    images in each, so a last batch that has fewer joins the one before. PaCo leaves any incomplete last batch out,
    because a batch replaces a whole part of its queue.
    """

    n: int
    batch_size: int
    seed: int
    drop_last: bool
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        whole, rest = divmod(self.n, self.batch_size)
        return whole + (rest >= MIN_PART * self.world * self.accumulate and not self.drop_last)

    @property
    def last_batch(self) -> str:
        """What becomes of images that fill no batch; empty where they are an ordinary smaller one, or none."""
        left = self.n - self.steps * self.batch_size
        if left <= 0:
            return ""
        if self.drop_last:
            return f"{left} of {self.n} images, others in each epoch, are left out, because PaCo takes whole batches"
        return f"the last batch of an epoch has {self.batch_size + left} images: {left} would be too few for batch norm"

    def samples(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Indices sample_B of each batch from number ``start`` on."""
        key_N = counter.keys(self.seed, epoch, np.arange(self.n))
        order_N = counter.words(key_N, ORDER, 1)[:, 0].argsort(kind="stable")
        for index in range(start, self.steps):
            is_last = index + 1 == self.steps and not self.drop_last
            yield order_N[index * self.batch_size : self.n if is_last else (index + 1) * self.batch_size]

    def parts(self, sample_B: np.ndarray) -> list[np.ndarray]:
        """This rank's parts of a batch."""
        return np.array_split(np.array_split(sample_B, self.world)[self.rank], self.accumulate)

    def step_seed(self, epoch: int, index: int) -> int:
        """Seed of everything else that is random in a step on this rank."""
        seed = int(counter.words(counter.keys(self.seed, epoch, index), STEP, 1)[0, 0] >> np.uint64(1))
        return (seed + self.rank) % 2**63


def plan_of(cfg: Config, num_images: int, rank: int = 0, world: int = 1) -> Plan:
    """Return the batches of a teacher's run.

    Raises:
        UserError: a batch that is too small for the ranks and micro-batches, or larger than the set.
    """
    t = cfg.teacher_training
    plan = Plan(num_images, t.batch_size, cfg.train.seed, t.loss == "paco", rank, world, t.accumulate)
    if plan.batch_size < MIN_PART * world * t.accumulate:
        raise UserError(
            f"teacher_training.batch_size: got {plan.batch_size}, expected at least {MIN_PART} images for each of "
            f"{world} ranks x {t.accumulate} micro-batches, as batch norm needs. Use a larger batch or fewer of them."
        )
    if plan.steps == 0:
        raise UserError(f"teacher_training.batch_size: got {plan.batch_size}, the set has {plan.n} images; lower it")
    return plan


def view_recipes(cfg: Config) -> list[View]:
    """How each view is made: the network's (for PaCo the queries'), and for PaCo the keys'."""
    first = colour.view_of(cfg.augment)
    if cfg.teacher_training.loss != "paco":
        return [first]
    cropped = cfg.augment.model_copy(update={"recipe": "crop_jitter"})
    match cfg.teacher_training.paco_view:
        case "same":
            return [first, first]
        case "simclr":
            cropped = cropped.model_copy(update={"crop_scale": (0.2, 1.0)})
            return [first, View(cropped, jitter_prob=0.8, hue=0.1, gray_prob=0.2, blur_prob=0.5)]
        case "simclr_weak":
            return [first, View(cropped, jitter_prob=1.0, gray_prob=0.2, blur_prob=0.5)]


def teacher_batches(
    cfg: Config, source: Source, images: LongTailSet, plan: Plan, epoch: int, start: int = 0
) -> Iterator[StepBatch]:
    """An epoch's batches from number ``start`` on, their parts prepared two ahead in a thread.

    Everything random is drawn from (seed, epoch, image).
    """
    size = cfg.teacher_training.img_size
    recipes = view_recipes(cfg)
    labels_N, side = torch.from_numpy(images.labels), side_stream(source.device, "augment")

    def labels_of(sample_B: np.ndarray) -> Tensor:
        return labels_N[torch.from_numpy(sample_B)].to(source.device, non_blocking=True)

    def prepare() -> Iterator[Part]:
        waiting: deque[tuple[np.ndarray, ViewDraws]] = deque()

        def requests() -> Iterator[CropRequest]:
            for batch_B in plan.samples(epoch, start):
                for sample_B in plan.parts(batch_B):
                    for copy, view in enumerate(recipes):
                        copy_B = np.full(len(sample_B), copy)
                        draws = colour.draw(sample_B, copy_B, seed=cfg.train.seed, epoch=epoch, view=view, size=size)
                        waiting.append((sample_B, draws))
                        yield CropRequest(sample_B, size, draws.draws)

        ready: list[Tensor] = []
        for crops_BHWC in source.crops(requests()):
            sample_B, draws = waiting.popleft()
            with aside(side) as made:  # copying draws to the device would wait for the step on its stream
                made.append(colour.apply(crops_BHWC, draws, recipes[len(ready)], source.pool))
            ready += made
            if len(ready) == len(recipes):
                yield Part(ready, labels_of(sample_B))
                ready = []

    with closing(prefetch(prepare(), depth=2 * plan.accumulate)) as parts:
        for batch_B in plan.samples(epoch, start):
            yield StepBatch([next(parts) for _ in range(plan.accumulate)], labels_of(batch_B))
