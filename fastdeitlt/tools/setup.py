"""Set-up of `bench`, `profile` and `tune`: the step of a configuration."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Data, OpenData, Parts, assemble
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.optim import peak_learning_rate
from fastdeitlt.core.step import Stage, unobserved
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets.counts import KNOWN_CLASSES
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import Sets
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_teacher
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.teachers.opening import teacher_of

SYNTHETIC_BATCHES = 256
"""Micro-batches of a virtual rank in an epoch of synthetic images."""


@dataclass
class Setup:
    """A configuration on this machine; each ``assemble`` reuses the same teacher."""

    cfg: Config
    device: torch.device
    data: Data
    sets: Sets | None
    """None: no data set was opened."""
    _teachers: dict[int, Teacher] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in an optimizer step."""
        return self.data.plan.micro_batches_per_step

    @property
    def images_per_call(self) -> int:
        """Images of this rank in an optimizer step."""
        return self.micro_batches * self.cfg.train.batch_size

    @property
    def teacher_title(self) -> str:
        """Description of the measured teacher, with the settings that select another."""
        if self.cfg.teacher.path and self.sets:
            return self.cfg.teacher.path
        return (
            f"{self.cfg.teacher.arch} with random weights, as fast as a trained one (--with-teacher RECIPE, "
            "teacher.arch or teacher.path selects another)"
        )

    def assemble(self, source: Source | None = None, *, teacher: bool = True) -> Parts:
        """Return new parts with the same initial weights.

        Args:
            source: pixel source of the training set, for parts that produce batches.
            teacher: include the teacher.
        """
        data = self.data
        if source and self.sets:
            data = OpenData(data.counts, data.plan, self.sets, source)
        return assemble(self.cfg, data, self.device, self._teacher if teacher else lambda size: None)

    def _teacher(self, size: int) -> Teacher:
        """Return the configured teacher, or one with random weights, which is as fast."""
        if size not in self._teachers:
            cfg = self.cfg
            teacher = teacher_of(cfg, self.sets.train, size, self.device) if cfg.teacher.path and self.sets else None
            if teacher is None:
                network = create_teacher(cfg.teacher.arch, len(self.data.counts)).eval()
                network = fold_batchnorm(network).to(memory_format=torch.channels_last)
                teacher = Teacher(
                    network,
                    len(self.data.counts),
                    img_size=cfg.teacher.img_size or size,
                    antialias=cfg.teacher.resize_antialias,
                ).to(self.device)
            self._teachers[size] = teacher
        return self._teachers[size]


def set_up(
    cfg: Config,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    *,
    synthetic: bool,
    counts: list[int] | None = None,
) -> Setup:
    """Set up the measurement of a configuration.

    Args:
        synthetic: open no data set.
        counts: images of each class without a data set. None: the data set's number of classes.

    Raises:
        UserError: as in training; ``synthetic`` for a data set with unknown classes.
    """
    sets = None if synthetic else _open(cfg)
    if sets:
        counts = sets.train.counts
    elif counts is None:
        if cfg.data.dataset not in KNOWN_CLASSES:
            raise UserError(
                f"--synthetic: got data.dataset={cfg.data.dataset}, expected a set with a fixed number of classes "
                f"({', '.join(KNOWN_CLASSES)}). Remove --synthetic, or set data.dataset."
            )
        counts = [100] * KNOWN_CLASSES[cfg.data.dataset]
    t = cfg.train
    in_epoch = SYNTHETIC_BATCHES * t.batch_size * t.accumulate * (t.virtual_ranks or world)
    plan = plan_of(cfg, len(sets.train) if sets else in_epoch, rank, world)
    return Setup(cfg, device, Data(counts, plan), sets)


def _open(cfg: Config) -> Sets:
    try:
        return open_sets(cfg.data)
    except UserError as error:
        hint = ". Use --synthetic to measure without the data set." if cfg.data.dataset in KNOWN_CLASSES else ""
        raise UserError(f"{str(error).rstrip('.')}{hint}") from None


def step_of(parts: Parts, batches: Iterator[Batch], stage: Stage = unobserved) -> Callable[[], Tensor]:
    """Return a function that runs one optimizer step and returns the gradient norm."""
    take_step, phase, plan = parts.step(stage), parts.phase(0), parts.data.plan
    rate = peak_learning_rate(parts.cfg, plan.virtual_ranks)
    return lambda: take_step(batches, plan.micro_batches_per_step, phase, rate).norm


def endless(parts: Parts) -> Generator[Batch, None, None]:
    """Yield training batches of one epoch after another, without end."""
    for epoch in count():
        with closing(parts.batches(list(parts.data.plan.steps(epoch)), parts.phase(0))) as batches:
            yield from batches
