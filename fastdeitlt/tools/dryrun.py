"""`--dry-run`: check inputs, estimate memory and steps, run one step."""

# B images in a micro-batch, C channels, H height, W width

import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from rich.table import Table
from torch import nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.assemble import Data, assemble
from fastdeitlt.core.optim import learning_rate, peak_learning_rate
from fastdeitlt.data.check.scan import check_files
from fastdeitlt.data.pixels.source import open_source
from fastdeitlt.data.sampler import plan_of
from fastdeitlt.data.sets.opening import open_training_sets
from fastdeitlt.data.sets.types import LongTailSet, Sets
from fastdeitlt.data.teacher_plan import teacher_plan_of
from fastdeitlt.errors import UserError, counted
from fastdeitlt.models import create_student
from fastdeitlt.models.start import start_from
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT, num_parameters
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.run.choice import choose_folder, refuse_other_run
from fastdeitlt.run.progress import console
from fastdeitlt.run.selection import selection_set
from fastdeitlt.teachers.check import check_decisions
from fastdeitlt.teachers.opening import settle_order, teacher_of
from fastdeitlt.teachers.schedule import learning_rate as teacher_rate
from fastdeitlt.teachers.step import Step, build_objective, build_optimizer
from fastdeitlt.teachers.views import Part, StepBatch, view_recipes
from fastdeitlt.tools.demo import with_shared
from fastdeitlt.train_teacher import for_any_ranks

MIB = 2**20


def memory_estimate(student: DistilledViT, batch_size: int, bytes_per_value: int, with_ema: bool) -> dict[str, float]:
    """Return the MiB of a rank in training without sharding.

    Weights, gradients and two AdamW moments in float32, the EMA if enabled, and the activations for the backward pass:
    per token and block 2 residuals, 2 norms, qkv, attention output, its projection and the MLP's two hidden tensors and
    output, which is 17 widths (59 MiB per image for ViT-B/16 at 224 pixels in bf16).
    """
    parameters = num_parameters(student)
    tokens = student.pos_embed.shape[1]
    activations = batch_size * tokens * len(student.blocks) * 17 * student.width * bytes_per_value
    return {
        "weights, gradients, AdamW": 16 * parameters / MIB,
        "averaged weights (EMA)": 4 * parameters * with_ema / MIB,
        "activations of a forward pass": activations / MIB,
    }


def dry_run(cfg: Config, recipe: Config | None = None, resume: str = "auto") -> int:
    """Check a student's run, print sizes and steps, run one step on random images.

    Args:
        cfg: the student's run.
        recipe: recipe of a teacher to be trained first, which runs a step before the student's, with random weights.
        resume: resume mode, see ``train``.

    Raises:
        UserError: as in training.
    """
    opened = _open(cfg, resume, ["teacher.path"] if recipe else [])  # the path is known once the teacher is trained
    selection_set(cfg, opened.sets)
    images, device, world = opened.sets.train, opened.device, opened.world
    plan = plan_of(cfg, len(images), distributed.rank(), world)
    student = create_student(num_classes=images.num_classes, **cfg.student.architecture)
    if cfg.student.init:
        start_from(student, cfg.student.init, images.class_names, cfg.augment.mean, cfg.augment.std)
    student.to(device)
    size = student.img_size
    rows = opened.rows | {"student": f"{cfg.student.name}, {num_parameters(student):,} parameters"}
    teacher: Teacher | None
    if recipe:
        network, facts = _teacher_step(with_shared(recipe, cfg), opened)
        teacher = Teacher(network, images.num_classes, img_size=cfg.teacher.img_size or size)
        rows |= {f"{name}, trained first" if name == "teacher" else f"  {name}": text for name, text in facts.items()}
    elif teacher := teacher_of(cfg, images, size, device):
        rows["teacher"] = f"{sum(p.numel() for p in teacher.parameters()):,} parameters"
        _check_teacher(teacher, images, cfg, size)
    else:
        rows["teacher"] = "none"
    warm = math.nextafter(min(cfg.optim.warmup_epochs, cfg.train.epochs), 0)  # the run may end within warm-up
    rows |= {
        "effective batch": counted(plan.images_per_step, "image"),
        "optimizer steps": _steps(plan.optimizer_steps, cfg.train.epochs),
        "peak learning rate": f"{learning_rate(warm, cfg, plan.virtual_ranks):.3g}",
    }
    width = 2 if autocast_dtype(cfg.train.precision, device) else 4
    together = cfg.train.ranks_per_forward
    for name, mib in memory_estimate(student, together * plan.batch_size, width, cfg.optim.ema_decay > 0).items():
        rows[f"memory: {name} (estimate)"] = f"{mib:,.0f} MiB"
    _show_table(cfg, device, rows)

    parts = assemble(cfg, Data(images.counts, plan), device, lambda size: teacher, student)
    rate = peak_learning_rate(cfg, plan.virtual_ranks)
    result = parts.step()(repeat(parts.noise_batch()), together, parts.phase(0), rate)
    _show(f"one step on random images: loss {result.losses[0].loss.item():.3f}. Ready.")
    return 0


def dry_run_teacher(cfg: Config, resume: str = "auto") -> int:
    """Check a teacher's run, print sizes and steps, run one step on random images.

    Raises:
        UserError: as in training.
    """
    opened = _open(for_any_ranks(cfg), resume)
    _, facts = _teacher_step(cfg, opened)
    loss = facts.pop("one step")
    _show_table(cfg, opened.device, opened.rows | facts)
    _show(f"one step on random images: {loss}. Ready.")
    return 0


@dataclass(frozen=True)
class _Opened:
    """Common start of both dry runs."""

    sets: Sets
    device: torch.device
    world: int
    rows: dict[str, str]
    """Table rows on the data."""


def _open(cfg: Config, resume: str, free: Sequence[str] = ()) -> _Opened:
    _, world = distributed.start(cfg.train.device)
    sets = open_training_sets(cfg.data)
    summary = distributed.on_main(lambda: check_files(sets, cfg.data))
    distributed.on_main(lambda: _check_folder(cfg, resume, free))
    rows = {"training images": f"{len(sets.train):,} in {counted(sets.num_classes, 'class')}", "checked": summary}
    return _Opened(sets, distributed.device_of(cfg.train.device), world, rows)


def _teacher_step(cfg: Config, opened: _Opened) -> tuple[nn.Module, dict[str, str]]:
    """Build a teacher and run a step on random images; return network and table rows."""
    t, images, device = cfg.teacher_training, opened.sets.train, opened.device
    selection_set(cfg, opened.sets)
    plan = teacher_plan_of(cfg, len(images), distributed.rank(), opened.world)
    objective = build_objective(t, images.counts, device)
    step = Step(objective, build_optimizer(objective.network, t), cfg, device)
    labels_B = torch.arange(len(next(plan.batches(0))[0]), device=device) % images.num_classes
    parts = []
    for part_B in plan.parts(np.arange(len(labels_B))):
        views = [torch.randn(len(part_B), 3, t.img_size, t.img_size, device=device) for _ in view_recipes(cfg)]
        parts.append(Part(views, labels_B[torch.from_numpy(part_B).to(device)]))
    loss = step(StepBatch(parts, labels_B), torch.ones(images.num_classes, device=device), plan.step_seed(0, 0))
    parameters = num_parameters(objective.network)
    copies = 3 + (t.sam != "none")
    facts = {
        "teacher": f"{t.arch}, {parameters:,} parameters, {t.loss}, images of {t.img_size} pixels",
        "teacher's batch": f"{counted(t.batch_size, 'image')}, {len(parts[0].labels_B):,} at a time",
        "teacher's optimizer steps": _steps(plan.steps, t.epochs),
        "teacher's last batch": plan.last_batch or "full, or smaller",
        "teacher's peak learning rate": f"{max(teacher_rate(epoch, t) for epoch in range(t.epochs)):.3g}",
        "memory: teacher's weights, gradients, momentum (estimate)": f"{4 * copies * parameters / MIB:,.1f} MiB",
    }
    if device.type == "cuda":
        facts["memory: peak in the teacher's step"] = f"{torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB"
    return objective.network, facts | {"one step": f"loss {distributed.sum_over_ranks(loss).item():.3f}"}


def _check_teacher(teacher: Teacher, images: LongTailSet, cfg: Config, size: int) -> None:
    """Check a teacher as in training, without decoding the whole set."""
    streamed = {"residency": "stream", "stored_short_side": 0} if images.images_NHWC is None else {}
    data = cfg.data.model_copy(update=streamed)
    with closing(open_source(images, data, distributed.device_of(cfg.train.device))) as source:
        settle_order(teacher, images, source, cfg, size)
        if cfg.teacher.check:
            distributed.on_main(lambda: check_decisions(teacher, images, source, cfg, size))


def _steps(in_epoch: int, epochs: int) -> str:
    return f"{in_epoch:,} per epoch, {in_epoch * epochs:,} in total"


def _show_table(cfg: Config, device: torch.device, rows: dict[str, str]) -> None:
    table = Table(title=f"dry run of {cfg.name} on {device}", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    _show(table)


def _show(content: Table | str) -> None:
    if distributed.rank() == 0:
        console.print(content)


def _check_folder(cfg: Config, resume: str, free: Sequence[str]) -> None:
    """Check that the run folder is writable, or can be made, and has no other run.

    Raises:
        UserError: as in training.
    """
    folder = choose_folder(cfg, resume)
    refuse_other_run(folder, cfg, free)
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**12))
    except OSError as error:
        raise UserError(f"run folder {folder}: cannot be written ({error.strerror}). Set another runs_dir.") from None
