"""`train --dry-run`: everything that can be wrong before training, what training will need, one step on fake data."""

# B images in a micro-batch, C channels, H height, W width

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Batch
from fastdeitlt.data.longtail import open_training_sets
from fastdeitlt.data.sampler import Plan
from fastdeitlt.data.scan import check_files
from fastdeitlt.engine import build_engine
from fastdeitlt.errors import UserError
from fastdeitlt.joint import JointForward
from fastdeitlt.models import create_student
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, num_parameters
from fastdeitlt.optim import peak_learning_rate
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.running.run import console
from fastdeitlt.teachers.opening import teacher_of
from fastdeitlt.teachers.step import build_objective
from fastdeitlt.teachers.views import Plan as TeacherPlan

MIB = 2**20


def memory_estimate(student: DistilledViT, batch_size: int, bytes_per_value: int, with_ema: bool) -> dict[str, float]:
    """MiB of a rank in training without sharding.

    Weights, gradients and two AdamW moments in float32, the average if there is one, and the activations that the
    backward pass needs: per token and block 2 residuals, 2 norms, qkv, attention output, its projection and the MLP's
    two hidden tensors and output, which is 17 widths (research: about 58 MB an image for ViT-B in bf16).
    """
    parameters = num_parameters(student)
    tokens = student.pos_embed.shape[1]
    activations = batch_size * tokens * len(student.blocks) * 17 * student.width * bytes_per_value
    return {
        "weights, gradients, AdamW": 16 * parameters / MIB,
        "average of the weights": 4 * parameters * with_ema / MIB,
        "activations of a micro-batch": activations / MIB,
    }


def dry_run(cfg: Config, recipe: Config | None = None) -> int:
    """Open the data and the teacher, build the student, print sizes and steps, and run one step on random images.

    Args:
        cfg: the student's run.
        recipe: of the teacher that is to be trained first; the step then has one with fresh weights.

    Raises:
        UserError: what training would have raised.
    """
    _, world = distributed.start(cfg.train.device)
    device = distributed.device_of(cfg.train.device)
    sets = open_training_sets(cfg.data)
    images = sets.train
    looked = distributed.on_main(lambda: check_files(sets, cfg.data))
    distributed.on_main(lambda: _check_folder(Path(cfg.runs_dir) / cfg.name))
    plan = Plan(
        len(images),
        cfg.train.batch_size,
        cfg.train.accumulate,
        cfg.augment.repeats,
        cfg.train.virtual_ranks or world,
        distributed.rank(),
        world,
    )
    student = create_student(num_classes=images.num_classes, **cfg.student.model_dump()).to(device)
    size = student.img_size
    teacher: Teacher | None
    if recipe:
        network = build_objective(recipe.teacher_training, images.counts, device).network
        teacher = Teacher(network, images.num_classes, img_size=cfg.teacher.img_size or size)
    else:
        teacher = teacher_of(cfg, images, size, device)
    table = Table(title=f"dry run of {cfg.name} on {device}", show_header=False)
    table.add_row("training images", f"{len(images):,} in {images.num_classes} classes")
    table.add_row("looked at", looked)
    table.add_row("student", f"{cfg.student.name}, {num_parameters(student):,} parameters")
    table.add_row("teacher", f"{sum(p.numel() for p in teacher.parameters()):,} parameters" if teacher else "none")
    if recipe:
        t = recipe.teacher_training
        steps = TeacherPlan(len(images), t.batch_size, cfg.train.seed, drop_last=t.loss == "paco").steps
        table.add_row("  trained first", f"{t.arch}, {t.loss}, {t.img_size} pixels")
        table.add_row("  optimizer steps", f"{steps:,} an epoch, {steps * t.epochs:,} in all")
    table.add_row("effective batch", f"{plan.images_per_step:,} images")
    table.add_row(
        "optimizer steps", f"{plan.optimizer_steps:,} an epoch, {plan.optimizer_steps * cfg.train.epochs:,} in all"
    )
    table.add_row("peak learning rate", f"{peak_learning_rate(cfg, plan.virtual_ranks):.3g}")
    width = 2 if autocast_dtype(cfg.train.precision, device) else 4
    for name, mib in memory_estimate(student, cfg.train.batch_size, width, cfg.optim.ema_decay > 0).items():
        table.add_row(f"memory: {name} (estimate)", f"{mib:,.0f} MiB")
    show = console.print if distributed.rank() == 0 else lambda text: None
    show(table)

    engine = build_engine(JointForward(student, teacher, images.counts, cfg, device), cfg, plan)
    labels_B = torch.arange(cfg.train.batch_size, device=device) % images.num_classes
    lam = torch.tensor(0.7, device=device)
    mixed = (labels_B.flip(0), lam) if cfg.mixup.on else (None, None)
    batch = Batch(torch.randn(cfg.train.batch_size, 3, size, size, device=device), labels_B, *mixed)
    losses = engine.forward(batch, torch.ones(images.num_classes, device=device), None)
    engine.backward(losses.loss)
    norm = engine.step(peak_learning_rate(cfg, plan.virtual_ranks))
    show(f"one step on random images: loss {losses.loss.item():.3f}, gradient norm {norm.item():.3f}. Ready.")
    return 0


def _check_folder(folder: Path) -> None:
    """Write into the run folder, or the folder that it is to be made in, and leave no trace.

    Raises:
        UserError: that fails.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**12))
    except OSError as error:
        raise UserError(f"run folder {folder}: cannot be written ({error.strerror}); choose another runs_dir") from None
