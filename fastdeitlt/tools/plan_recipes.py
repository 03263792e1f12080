"""Recipes of `plan`, with a reason per setting; figures are from docs/results.md.

N training images.
"""

import math

from fastdeitlt.errors import counted
from fastdeitlt.tools.plan_facts import Choice, Facts, Rung, Schedule, Setting

FEW_CHANGES, SOME_CHANGES, PAPER_CHANGES = 150_000, 2_000_000, 10_000_000
"""Images seen in training from which augmentation is mild, medium, and as in the paper."""


def recipes(facts: Facts, s: Schedule, hours: float, name: str) -> Choice:
    shared = _shared(facts)
    return Choice(
        student={"name": (name, f"the run folder is runs/{name}"), **shared, **_student(facts, s)},
        teacher={"name": (f"{name}-teacher", "prefix of the run folder's name"), **shared, **_teacher(facts, s)},
        seconds=s.seconds,
        images_seen=s.images_seen,
        rung=s.rung,
        remarks=_remarks(facts, s, hours),
    )


def _shared(facts: Facts) -> dict[str, Setting]:
    """Return the settings common to both recipes."""
    shared: dict[str, Setting] = {
        "data.dataset": (facts.dataset, "detected layout"),
        "data.root": (facts.root, "argument of plan"),
    }
    for split, file in facts.lists.items():
        shared[f"data.{split}_list"] = (file, f"list of the {split} split")
    for split, share in facts.holdouts.items():
        shared[f"data.{split}_holdout"] = (
            share,
            f"no {split} split: this fraction of each class, the same in every run",
        )
    if facts.unreadable:
        shared["data.on_error"] = ("skip", f"{counted(facts.unreadable, 'unreadable image')} in the sample")
    measured = "measured on the training images"
    shared["augment.mean"] = (list(facts.mean), measured)
    shared["augment.std"] = (list(facts.std), measured)
    if facts.gray > 0.9:
        flip = 0.0, "gray images are often signs or scans, which must not be mirrored; 0.5 if they may"
    else:
        flip = 0.5, "photos: mirroring keeps the class; 0 if left and right matter"
    shared["augment.flip_prob"] = flip
    shared["evaluate.crop_pct"] = (1.0, "the full short side, as in training")
    return shared


def _student(facts: Facts, s: Schedule) -> dict[str, Setting]:
    rung, n = s.rung, facts.num_images
    enlarged = f"; the images are enlarged (median short side {facts.short_side} px)"
    why_size = f"{s.images_seen:,} images in the available time, needs {rung.needs:,}"
    why_size += enlarged if facts.short_side < rung.img_size else ""
    effective = s.batch * s.micro_batches
    ranks, accumulate = (s.micro_batches, 1) if facts.gpu else (1, s.micro_batches)
    steps = max(s.epochs * (n // effective), 1)
    decay = round(min(max(1 - 25 / steps, 0.9), 0.99996), 5)
    averaged = min(round(1 / (1 - decay)), steps)
    settings: dict[str, Setting] = _augmentation(s)
    settings |= {
        "student.name": (rung.student, why_size),
        "student.depth": (rung.depth, "few blocks: training time matters more than depth" if rung.depth < 12 else
                          "of the architecture"),
        "student.drop_path": (0.0 if rung.depth < 12 else 0.1, "no regularisation for few blocks"
                              if rung.depth < 12 else "as in DeiT"),
    }  # fmt: skip
    if facts.init:
        settings["student.init"] = (facts.init, "plan --from")
        settings["optim.layer_decay"] = (0.75, "smaller changes to the lower pretrained layers")
    settings |= {
        "teacher.arch": (rung.teacher, "as in the teacher's recipe"),
        "teacher.img_size": (rung.img_size, "as the student, without a resize"),
        "loss.drw_epoch": _drw(facts, s),
        "optim.lr": (_rate(rung, effective, bool(facts.init)), f"for {counted(effective, 'image')} per step"),
        "optim.lr_scale": ("none", "lr is used unchanged"),
        "optim.betas": ([0.9, 0.98], "faster average for few steps") if steps < 20_000 else ([0.9, 0.999], "default"),
        "optim.warmup_epochs": (round(min(5.0, s.epochs / 20), 2), "5 % of the epochs, at most 5"),
        "optim.clip_norm": (1.0, "for stability in the first steps"),
        "optim.ema_decay": (decay, f"averages about {averaged:,} of {steps:,} steps"),
        "train.epochs": (s.epochs, f"fits the time: {s.seconds['student'] / 60:,.1f} min at the measured rate"),
        "train.batch_size": (s.batch, "small sets need many steps" if n < 10_000 else "for throughput"),
        "train.accumulate": (accumulate, f"{counted(effective, 'image')} per optimizer step"),
        "train.virtual_ranks": (ranks, f"the same steps on up to {counted(ranks, 'GPU')}"),
        "train.compile": _compile(facts, s.seconds["student"]),
        "train.save_every_epochs": (s.every, "at each evaluation"),
        "evaluate.every": (s.every, "about ten evaluations, for selection on validation images"),
        "evaluate.analyze_images": (256 if n < 4_000 else 1024, "images analysed for the report"),
    }  # fmt: skip
    return settings


def _augmentation(s: Schedule) -> dict[str, Setting]:
    """Return augmentation settings by the number of images seen.

    The paper's cost 16 points at 150,000 images, 5.5 at 590,000.
    """
    seen = f"{s.images_seen:,} images seen"
    if s.images_seen < FEW_CHANGES:
        levels = 0, [0.7, 1.0], 0.0, 0.0
    elif s.images_seen < SOME_CHANGES:
        levels = 4, [0.7, 1.0], 0.2, 0.0
    elif s.images_seen < PAPER_CHANGES:
        levels = 7, [0.35, 1.0], 0.5, 0.1
    else:
        levels = 9, [0.08, 1.0], 1.0, 0.25
    magnitude, crop, mix, erase = levels
    how = "as in the paper" if s.images_seen >= PAPER_CHANGES else "milder than in the paper for a short schedule"
    return {
        "augment.rand_ops": (2 if magnitude else 0, f"{how} ({seen})"),
        "augment.rand_magnitude": (magnitude or 4, "level of RandAugment" if magnitude else "unused: no operations"),
        "augment.crop_scale": (crop, how),
        "augment.erase_prob": (erase, how),
        "augment.repeats": (s.repeats, "every image once per epoch" if s.repeats == 1 else "as in the paper"),
        "mixup.prob": (mix, f"fraction of mixed batches; {how}"),
        "mixup.off_in_drw": (True, "as the official code on small sets"),
    }  # fmt: skip


def _drw(facts: Facts, s: Schedule) -> Setting:
    present = [count for count in facts.counts if count]
    if max(present) < 1.5 * min(present):
        return -1, "balanced classes need no re-weighting"
    if s.images_seen < SOME_CHANGES:
        return s.epochs // 2, "from half of the epochs: earlier is better in a short schedule (+1.5 points)"
    return s.epochs * 11 // 12, "the last twelfth, as in the paper"


def _teacher_drw(facts: Facts, s: Schedule) -> Setting:
    student_epoch, why = _drw(facts, s)
    if student_epoch < 0:
        return -1, why
    lost = "a teacher without re-weighting costs the student 20 points on the tail"
    if s.teacher_epochs * facts.num_images < FEW_CHANGES:
        return s.teacher_epochs * 3 // 5, f"the last two fifths, earlier for a short schedule; {lost}"
    return s.teacher_epochs * 4 // 5, f"the last fifth; {lost}"


def _rate(rung: Rung, effective: int, is_init: bool) -> float:
    """Return the peak learning rate, by square root of the batch, width and init."""
    most = {"tiny": 1.5e-3, "small": 1e-3, "base": 5e-4, "large": 3e-4}[rung.width]
    rate = min(1e-3 * math.sqrt(effective / 64), most)
    return round(rate * (0.3 if is_init else 1.0), 6)


def _compile(facts: Facts, seconds: float) -> Setting:
    if facts.gpu or seconds > 3600:
        return True, "worth its minutes; the rate was measured without compiling"
    return False, "compiling costs more time than it saves in a short run"


def _teacher(facts: Facts, s: Schedule) -> dict[str, Setting]:
    rung, n = s.rung, facts.num_images
    batch = max(2, min(64 if n < 20_000 else 128 if n < 50_000 else 256, n))
    if rung.img_size < 128 or s.teacher_epochs * n < FEW_CHANGES:
        settings: dict[str, Setting] = {
            "augment.recipe": ("pad_crop", "standard for CNNs on small images, mild enough for a short schedule"),
            "augment.pad": (max(2, rung.img_size // 10), "a tenth of the side"),
        }
    else:
        settings = {
            "augment.recipe": ("crop_jitter", "crops and colour: standard for CNNs on photos"),
            "augment.crop_scale": ([0.35, 1.0], "milder than on ImageNet"),
        }
    return settings | {
        "augment.repeats": (1, "every image once per epoch"),
        "mixup.prob": (0.0, "no mixing for the teacher"),
        "train.compile": _compile(facts, s.seconds["teacher"]),
        "train.save_every_epochs": (s.teacher_every, "at each evaluation"),
        "evaluate.every": (s.teacher_every, "about ten evaluations, for selection on validation images"),
        "teacher_training.arch": (rung.teacher, "fits the time"),
        "teacher_training.img_size": (rung.img_size, "as the student"),
        "teacher_training.loss": ("ldam", "larger margins for rare classes"),
        "teacher_training.normed_head": (True, "as in LDAM"),
        "teacher_training.drw_epoch": _teacher_drw(facts, s),
        "teacher_training.sam": ("sam", "flat minima, as in the paper") if s.sam else (
            "none", "SAM doubles the time without a gain in short schedules"),
        "teacher_training.lr": (round(0.1 * math.sqrt(batch / 128), 4), f"for {counted(batch, 'image')} per step"),
        "teacher_training.schedule": ("cosine", "has no milestones to set"),
        "teacher_training.warmup_epochs": (min(3, s.teacher_epochs // 5), "at most 3"),
        "teacher_training.epochs": (s.teacher_epochs, f"fits the time: {s.seconds['teacher'] / 60:,.1f} min"),
        "teacher_training.batch_size": (batch, "small sets need many steps" if n < 20_000 else "as in the recipes"),
    }  # fmt: skip


def _remarks(facts: Facts, s: Schedule, hours: float) -> tuple[str, ...]:
    remarks = []
    if s.teacher_epochs < 15:
        remarks.append(
            f"{hours:g} h are short for {counted(facts.num_images, 'image')} on this machine: the teacher trains for "
            f"only {counted(s.teacher_epochs, 'epoch')}, and an undertrained teacher limits the student"
        )
    if facts.num_images < 5_000:
        remarks.append(
            "this set is small for a Vision Transformer trained from scratch: the teacher may be better than the "
            "student; see the recommendation after training"
        )
    if not facts.num_val:
        remarks.append("no validation images: no recommendation after training")
    return tuple(remarks)
