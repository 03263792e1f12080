"""What `bench` and `profile` measure: student, teacher, plan and one batch of random images of a configuration."""

# B images in a micro-batch, K classes

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.core.batches import Batch, use_kernel
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.measure.auto import measure_kernels
from fastdeitlt.data.sampler import Plan
from fastdeitlt.data.sets.counts import KNOWN_CLASSES
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, flops_per_image
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.run.meter import forward_flops
from fastdeitlt.teachers.opening import teacher_of


@dataclass(frozen=True)
class Setup:
    """Everything a step needs. ``images`` is None when no data set was opened."""

    cfg: Config
    device: torch.device
    plan: Plan
    images: LongTailSet | None
    counts: list[int]
    second_student: Callable[[], DistilledViT]
    teacher: Teacher
    joint: JointForward
    batch: Batch

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.joint.student.img_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in an optimizer step."""
        return self.plan.micro_batches_per_step

    @property
    def images_per_call(self) -> int:
        """Images of this rank in an optimizer step."""
        return self.micro_batches * self.cfg.train.batch_size

    @property
    def flops(self) -> float:
        """Model FLOPs an image: backward costs twice the forward, the teacher runs forward only."""
        return 3 * flops_per_image(self.joint.student) + forward_flops(self.teacher, self.size, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the step's matrix products have."""
        return autocast_dtype(self.cfg.train.precision, self.device) or torch.float32

    @property
    def teacher_title(self) -> str:
        """The teacher whose time is measured, and how to choose another when it is not that of a run."""
        if self.cfg.teacher.path and self.images:
            return self.cfg.teacher.path
        return (
            f"{self.cfg.teacher.arch} with random weights, as fast as a trained one; "
            "--with-teacher RECIPE, teacher.arch or teacher.path chooses another"
        )

    def autocast(self) -> torch.autocast:
        """The step's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def set_up(
    cfg: Config,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    *,
    synthetic: bool,
    counts: list[int] | None = None,
) -> Setup:
    """Build a configuration's student, teacher and plan, and one mixed batch of noise on the device.

    Args:
        synthetic: open no data set.
        counts: images of each class when no set is opened. None: as many classes as the named data set has.

    Raises:
        UserError: what training would have raised; ``synthetic`` for a data set whose classes are not known.
    """
    images = None if synthetic else _open(cfg)
    if images:
        counts = images.counts
    elif counts is None:
        if cfg.data.dataset not in KNOWN_CLASSES:
            raise UserError(
                f"--synthetic: the classes of data.dataset={cfg.data.dataset} are only known from its images; leave "
                f"--synthetic out, or set data.dataset to one of {', '.join(KNOWN_CLASSES)}"
            )
        counts = [100] * KNOWN_CLASSES[cfg.data.dataset]
    virtual_ranks, t = cfg.train.virtual_ranks or world, cfg.train
    n = len(images) if images else 256 * t.batch_size * t.accumulate * virtual_ranks
    plan = Plan(n, t.batch_size, t.accumulate, cfg.augment.repeats, virtual_ranks, rank, world)

    def student() -> DistilledViT:
        torch.manual_seed(t.seed)
        return create_student(num_classes=len(counts), **cfg.student.model_dump()).to(device).train()

    first = student()
    teacher = _teacher(cfg, images, len(counts), first.img_size, device)
    measure_kernels(cfg, first, teacher, len(counts), device)
    joint = JointForward(first, teacher, counts, cfg, device)
    labels_B = torch.arange(t.batch_size, device=device) % len(counts)
    lam = torch.tensor(0.7, device=device)
    mixed = (labels_B.flip(0), lam) if cfg.mixup.on else (None, None)
    batch = Batch(_noise(cfg, first.img_size, device), labels_B, *mixed)
    return Setup(cfg, device, plan, images, counts, student, teacher, joint, batch)


def _noise(cfg: Config, size: int, device: torch.device) -> Tensor:
    """Random images_BCHW in the type and the layout in which ``train_batches`` gives them."""
    images_BCHW = torch.randn(cfg.train.batch_size, 3, size, size, device=device)
    dtype = autocast_dtype(cfg.train.precision, device) if use_kernel(cfg.augment, device) else None
    return images_BCHW.to(dtype or torch.float32, memory_format=torch.channels_last)


def _open(cfg: Config) -> LongTailSet:
    try:
        return open_sets(cfg.data).train
    except UserError as error:
        hint = "; --synthetic measures without the data set" if cfg.data.dataset in KNOWN_CLASSES else ""
        raise UserError(f"{error}{hint}") from None


def _teacher(cfg: Config, images: LongTailSet | None, num_classes: int, size: int, device: torch.device) -> Teacher:
    """The configured teacher, or a fresh one of its architecture: weights do not change the speed."""
    if cfg.teacher.path and images:
        found = teacher_of(cfg, images, size, device)
        assert found is not None
        return found
    network = fold_batchnorm(create_teacher(cfg.teacher.arch, num_classes).eval()).to(memory_format=torch.channels_last)
    return Teacher(
        network, num_classes, img_size=cfg.teacher.img_size or size, antialias=cfg.teacher.resize_antialias
    ).to(device)
