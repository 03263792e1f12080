"""Assembly of a run from its configuration: data, student, teacher, loss, engine and moving average."""

# K classes

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.batches import Batch, noise_batch, train_batches
from fastdeitlt.core.engine import Engine, build_engine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.measure.flops import forward_flops
from fastdeitlt.core.optim import Ema
from fastdeitlt.core.step import Phase, Stage, TrainStep, phase_of, unobserved
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sampler import Plan, Step, plan_of
from fastdeitlt.data.sets.counts import drw_weights
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.models import create_student
from fastdeitlt.models.start import start_from
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, flops_per_image

log = logging.getLogger("fastdeitlt")


@dataclass(frozen=True)
class Data:
    """Class counts and sampling plan of a run's training images."""

    counts: list[int]
    """Images of each class [K]."""
    plan: Plan


@dataclass(frozen=True)
class OpenData(Data):
    """Training images of a run, with the source of their pixels."""

    sets: Sets
    source: Source

    @property
    def images(self) -> LongTailSet:
        """Training images."""
        return self.sets.train


def open_data(cfg: Config, device: torch.device, rank: int = 0, world: int = 1) -> OpenData:
    """Open a run's images, their sampling plan and the source of their pixels.

    Raises:
        UserError: see ``open_training_sets``, ``check_files``, ``Plan`` and ``open_source``.
    """
    sets = open_training_sets(cfg.data)
    distributed.on_main(lambda: check_files(sets, cfg.data))
    plan = plan_of(cfg, len(sets.train), rank, world, sets.train.labels)
    log.log(logging.WARNING if plan.is_partial else logging.INFO, "%s", plan.describe_epoch())
    window = plan.ranks_per_process if plan.repeats > 1 else 1  # virtual ranks share the copies of an image
    source = open_source(sets.train, cfg.data, device, window, tell=True)
    return OpenData(sets.train.counts, plan, sets, source)


ChooseTeacher = Callable[[int], Teacher | None]
"""Function of the student's image size in pixels that returns the teacher; None: both heads learn the labels."""


@dataclass(frozen=True)
class Parts:
    """Parts of an assembled run."""

    cfg: Config
    device: torch.device
    data: Data
    student: DistilledViT
    teacher: Teacher | None
    joint: JointForward
    engine: Engine
    ema: Ema | None
    drw_weights_K: Tensor

    @property
    def size(self) -> int:
        """Side of the student's images in pixels."""
        return self.student.img_size

    @property
    def flops(self) -> float:
        """Model FLOPs per image.

        The student's forward counts three times (the backward costs two), the teacher's once.
        """
        teacher = forward_flops(self.teacher, self.size, self.device) if self.teacher else 0.0
        return 3 * flops_per_image(self.student) + teacher

    def phase(self, epoch: int) -> Phase:
        """Return the phase of an epoch."""
        return phase_of(self.cfg, self.drw_weights_K, epoch)

    def batches(self, steps: Sequence[Step], phase: Phase) -> Generator[Batch, None, None]:
        """Yield the augmented and mixed batches of some optimizer steps."""
        data = self.data
        assert isinstance(data, OpenData)
        micro_batches = chain.from_iterable(step.micro_batches for step in steps)
        return train_batches(micro_batches, data.source, data.images, self.cfg, mixing=phase.mixing, size=self.size)

    def noise_batch(self) -> Batch:
        """Return a micro-batch of noise."""
        return noise_batch(self.cfg, len(self.data.counts), self.size, self.device)

    def step(self, stage: Stage = unobserved) -> TrainStep:
        """Return the training step, its stages wrapped by ``stage``."""
        return TrainStep(self.engine, self.ema, self.cfg.train, self.joint.student, stage)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts of a checkpoint by name."""
        parts = {"model": self.engine.weights(), "optimizer": self.engine.optimizer_tensors()}
        return parts | ({"ema": self.ema.state} if self.ema else {})

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Restore a checkpoint; ``read`` returns the state dict of a name."""
        self.engine.load(read("model"), read("optimizer"))
        if self.ema:
            self.ema.load(read("ema"))


def measure_kernels(
    cfg: Config, student: DistilledViT, teacher: Teacher | None, num_classes: int, device: torch.device
) -> None:
    """Measure the ops that are set to "auto".

    This is done once for each GPU, torch, Triton and shape, and not without a GPU. Rank 0 measures, and all ranks use
    its rows; with train.measure_kernels=false it only shares those it has.
    """
    if device.type != "cuda":
        return
    from fastdeitlt.core.measure.first_start import current_rows  # Triton is slow to import, and may be missing on CPUs
    from fastdeitlt.core.measure.parts import Shapes
    from fastdeitlt.kernels._measured import prefer

    rows = distributed.on_main(lambda: current_rows(Shapes(cfg, student, teacher, num_classes, device)))
    if distributed.get_world() > 1:
        prefer(rows)


def assemble(
    cfg: Config,
    data: Data,
    device: torch.device,
    choose_teacher: ChooseTeacher,
    student: DistilledViT | None = None,
    init: str = "",
) -> Parts:
    """Build student, teacher, joint loss, engine and moving average.

    Args:
        cfg: the run.
        data: its images, or only their class counts and plan.
        device: device of the step.
        choose_teacher: returns the teacher.
        student: on the device, in training mode; None: a new one of ``cfg.student``, seeded by ``cfg.train.seed``.
        init: initial weights of a new student, see ``start_from``.

    Raises:
        UserError: a setting that this machine or this number of ranks does not support; see ``build_engine``.
    """
    torch.manual_seed(cfg.train.seed)
    num_classes = len(data.counts)
    if student is None:
        student = create_student(num_classes=num_classes, **cfg.student.architecture).train()
        if init:
            assert isinstance(data, OpenData)
            start_from(student, init, data.images.class_names, cfg.augment.mean, cfg.augment.std)
        student.to(device)
    teacher = choose_teacher(student.img_size)
    measure_kernels(cfg, student, teacher, num_classes, device)
    joint = JointForward(student, teacher, data.counts, cfg, device)
    engine = build_engine(joint, cfg, data.plan)
    ema = Ema(student, cfg.optim.ema_decay, engine.optimizer) if cfg.optim.ema_decay else None
    weights_K = drw_weights(data.counts, cfg.loss.drw_beta).to(device)
    return Parts(cfg, device, data, student, teacher, joint, engine, ema, weights_K)
