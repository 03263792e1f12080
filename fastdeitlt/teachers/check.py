"""Check of a teacher's accuracy on clean images before student training."""

# B batch, C channels, H height, W width, K classes, N images

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastdeitlt.config import IMAGENET_MEAN, IMAGENET_STD, Config
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.models.resnet_cifar import ResNetCifar
from fastdeitlt.models.teacher import Teacher, TeacherInput, teacher_input
from fastdeitlt.store.manifest import Manifest, preprocess_of
from fastdeitlt.teachers.decisions import Decisions, class_sample, clean_batches, decide

log = logging.getLogger("fastdeitlt")
FAR = 0.75
"""Share of the stated accuracy below which a teacher is refused."""
NEAR = 5.0
"""Points below the stated accuracy without a warning."""
TRIED_IMAGES = 512
"""Images of each diagnostic trial."""
STATISTICS = {
    "ImageNet's mean and std": (IMAGENET_MEAN, IMAGENET_STD),
    "CIFAR's mean and std": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "iNaturalist's mean and std": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
    "values of -1 to 1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "values of 0 to 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and std of released CNNs."""


def check_decisions(teacher: Teacher, images: LongTailSet, source: Source, cfg: Config, size: int) -> float:
    """Check a teacher on clean images; return its balanced accuracy in %.

    Balanced accuracy is the mean over classes, on up to 64 images of each. It must exceed chance by half of chance, at
    most by 10 points, and reach three quarters of the balanced accuracy stated in the teacher's folder. If the folder
    states only the accuracy over images, that one must be reached to three quarters as well. A teacher without stated
    accuracy must reach the geometric mean of chance and 100 % (32 % of 10 classes, 3 % of 1,000). Clearly exchanged
    classes are refused, but only a warning if the balanced accuracy is within 5 points of the stated one: a poor
    teacher of many small classes has some.

    Args:
        teacher: the student's teacher with its class map.
        images, source: the training set.
        cfg: the student's run.
        size: side in pixels of the student's images.

    Raises:
        UserError: the teacher is wrong; the message has the most likely cause.
    """
    check = _Check(teacher, images, source, cfg, size)
    sample_N = class_sample(images.labels)
    decisions = check.decide(sample_N)
    balanced, stated, is_balanced = decisions.balanced(), *_stated(teacher.manifest)
    measured = balanced if is_balanced else decisions.weighted(images.counts)
    over = "" if is_balanced else " over images"
    got = f"{balanced:.1f} % right (mean over classes{'' if is_balanced else f'; {measured:.1f} %{over}'})"
    chance = 100 / images.num_classes
    limit = _without_statement(images.num_classes) if stated is None else chance + min(chance / 2, 10)
    if stated is not None and is_balanced:
        limit = max(limit, FAR * stated)
    is_low = balanced < limit or (stated is not None and measured < FAR * stated)
    is_as_stated = is_balanced and stated is not None and measured >= stated - NEAR
    is_exchanged = (decisions.exchanged() != np.arange(images.num_classes)).any()
    if is_low or (is_exchanged and not is_as_stated):
        is_chance = stated is None or stated <= limit
        expected = f"at least {limit:.1f} %" if is_chance else f"{stated:.1f} %{over} as stated in its folder"
        raise UserError(
            f"teacher {cfg.teacher.path}: got {got} on {len(sample_N):,} clean training images, expected {expected}; "
            f"{check.cause(sample_N, decisions, limit)}; teacher.check=false skips this check"
        )
    log.info("teacher: %s on %d clean training images", got, len(sample_N))
    if is_exchanged:
        log.warning("teacher %s: got %s; %s", cfg.teacher.path, got, check.another_order(decisions))
    if stated is not None and measured < stated - NEAR:
        log.warning(
            "teacher %s: %s on clean training images with the student's preprocessing, %.1f %%%s stated in its folder",
            cfg.teacher.path,
            got,
            stated,
            over,
        )
    return balanced


def _without_statement(num_classes: int) -> float:
    """Return the accuracy in % required of a teacher whose folder states none."""
    return 100 / num_classes**0.5


def _stated(manifest: Manifest | None) -> tuple[float | None, bool]:
    """Return the folder's training accuracy in %, and whether it is balanced."""
    if manifest and "train" in (manifest.balanced_accuracy or {}):
        return (manifest.balanced_accuracy or {})["train"], True
    if manifest and "train" in (manifest.accuracy or {}):
        return (manifest.accuracy or {})["train"], False
    return None, True


@dataclass(frozen=True)
class _Trial:
    """Result of another input or class order of a teacher."""

    accuracy: float
    """Balanced accuracy in %."""
    how: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} % are right with {self.how}: {self.remedy}"


@dataclass(frozen=True)
class _Check:
    """A teacher and the student's images, with trials of other inputs and orders."""

    teacher: Teacher
    images: LongTailSet
    source: Source
    cfg: Config
    size: int

    def decide(self, sample_N: np.ndarray) -> Decisions:
        return decide(self.teacher, self._batches(sample_N), self.images.labels[sample_N])

    def cause(self, sample_N: np.ndarray, decisions: Decisions, limit: float) -> str:
        """Return the cause of a low accuracy: the simplest of the best trials, if any."""
        order = self.another_order(decisions)
        tried_N = sample_N[np.linspace(0, len(sample_N) - 1, min(TRIED_IMAGES, len(sample_N))).astype(np.int64)]
        batches, labels_N = list(self._batches(tried_N)), self.images.labels[tried_N]
        trials, pairs = [order], []
        for own, how, remedy in self._other_inputs():
            fed = decide(self.teacher.fed(own, self.cfg.augment.mean, self.cfg.augment.std), batches, labels_N)
            trials.append(_Trial(fed.balanced(), how, remedy))
            other = self.another_order(fed)
            pairs.append(_Trial(other.accuracy, f"{how} and {other.how}", f"{remedy}; {other.remedy}"))
        lowest = max(
            limit, _without_statement(decisions.num_classes)
        )  # an untrained network's best order is above chance
        if good := [trial for trial in trials + pairs if trial.accuracy >= max(lowest, decisions.balanced() + NEAR)]:
            best = max(trial.accuracy for trial in good)
            return str(next(trial for trial in good if trial.accuracy >= best - NEAR))
        if order.accuracy > decisions.balanced() and order.accuracy >= lowest:  # few of many classes
            return str(order)
        label, share = decisions.commonest()
        if share >= 90:
            name = self.images.class_name(label)
            return f"it predicts {name!r} for {share:.0f} % of the images: untrained, or collapsed in training"
        if decisions.balanced() < max(2 * 100 / decisions.num_classes, 5):
            return "near chance in any class order and with any input tried: untrained"
        return "no class order and no input tried is better: poorly trained, or trained on other images"

    def _batches(self, sample_N: np.ndarray) -> Iterator[Tensor]:
        stated = self.teacher.manifest.preprocess if self.teacher.manifest else None
        preprocess = preprocess_of(self.cfg, self.size)
        if stated:
            preprocess = preprocess.model_copy(update={"crop_pct": stated.crop_pct})
        return clean_batches(self.source, sample_N, preprocess)

    def another_order(self, decisions: Decisions) -> _Trial:
        label_K = decisions.exchanged()
        moved = [self.images.class_name(k) for k, label in enumerate(label_K.tolist()) if k != label]
        remedy = (
            "correct class_map or class_names of its folder" if self.teacher.manifest else "see teacher.map_classes"
        )
        accuracy = decisions.relabelled(label_K).balanced()
        return _Trial(accuracy, f"another order of its classes ({listed(moved)})", remedy)

    def _other_inputs(self) -> Iterator[tuple[TeacherInput, str, str]]:
        """Yield inputs that differ in one property, the difference, and the setting.

        The first, if the folder states another size and normalisation, has both as stated.
        """
        cfg, manifest = self.cfg.teacher, self.teacher.manifest
        student = self.cfg.augment.mean, self.cfg.augment.std, self.size
        fed = teacher_input(cfg, manifest, *student)
        stated = manifest.preprocess if manifest else None
        own = teacher_input(cfg.model_copy(update={"normalise": "auto", "img_size": 0}), manifest, *student)
        if stated and own.img_size != fed.img_size and (own.mean, own.std) != (fed.mean, fed.std):
            remedy = "set teacher.normalise=auto and teacher.img_size=0"
            yield own, "the size, mean and std stated in its folder", remedy
        settings = "correct mean and std of its folder" if stated else "set teacher.normalise=teacher, .mean and .std"
        norms = {"the student's mean and std": (*student[:2], "set teacher.normalise=student")}
        if stated:
            norms["its folder's mean and std"] = stated.mean, stated.std, "set teacher.normalise=auto"
        norms["the configured mean and std"] = cfg.mean, cfg.std, settings
        norms |= {how: (*values, settings) for how, values in STATISTICS.items()}
        inputs = {(fed.mean, fed.std)}
        for how, (mean, std, remedy) in norms.items():
            if (mean, std) not in inputs:
                inputs.add((mean, std))
                yield replace(fed, mean=mean, std=std), how, remedy
        usual = 32 if isinstance(self.teacher.network, ResNetCifar) else 224
        for img_size in sorted({self.size, own.img_size, usual} - {fed.img_size}):
            yield replace(fed, img_size=img_size), f"images of {img_size} pixels", f"set teacher.img_size={img_size}"
        if fed.img_size != self.size:
            how = "a resize without antialiasing" if fed.antialias else "an antialiased resize"
            remedy = f"set teacher.resize_antialias={str(not fed.antialias).lower()}"
            yield replace(fed, antialias=not fed.antialias), how, remedy
