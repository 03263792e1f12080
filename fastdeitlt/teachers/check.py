"""Before a student trains: does its teacher know these classes, in this order, on such images?"""

# B batch, K classes, N images, C channels, H height, W width

import logging

import numpy as np
import torch

from fastdeitlt.config import Config
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.teachers.diagnose import clean_batches, manifest_of

log = logging.getLogger("fastdeitlt")
NUM_IMAGES = 512


def check_decisions(teacher: Teacher, images: LongTailSet, source: Source, cfg: Config, size: int) -> float:
    """Accuracy of the student's teacher on clean training images, in %; stops a run whose classes are mixed up.

    The limit is half of the accuracy that the teacher's folder states; of a teacher that states none, the geometric
    mean of chance and 100 % (32 % of 10 classes, 3 % of 1,000).

    Args:
        teacher: as the student's run opened it, with its class map.
        images, source: the training set; up to 512 of its images, evenly spaced in the list, are looked at.
        cfg: the student's run.
        size: side in pixels of the student's images.

    Raises:
        UserError: too few are right; says whether another order of the classes would explain it.
    """
    manifest = manifest_of(cfg.teacher.path)
    stated = manifest.accuracy.get("train") if manifest and manifest.accuracy else None
    sample_N = np.linspace(0, len(images) - 1, min(NUM_IMAGES, len(images))).astype(np.int64)
    batches = clean_batches(source, sample_N, size, cfg.evaluate.crop_pct, cfg.augment.mean, cfg.augment.std)
    decided_N = torch.cat([teacher(images_BCHW).argmax(1) for images_BCHW in batches])
    if teacher.class_map is not None:
        decided_N = teacher.class_map[decided_N]
    labels_N, decided_N = torch.from_numpy(images.labels[sample_N]), decided_N.cpu()
    accuracy = 100 * float((decided_N == labels_N).float().mean())
    limit = stated / 2 if stated else 10 * (100 / images.num_classes) ** 0.5
    if accuracy < limit:
        expected = f"its folder says {stated:.1f} %" if stated else f"expected at least {limit:.1f} %"
        raise UserError(
            f"teacher {cfg.teacher.path}: {accuracy:.1f} % right on {len(sample_N)} clean training images, {expected}; "
            f"{_reason(decided_N, labels_N, images.num_classes, accuracy)}; teacher.check=false trains all the same"
        )
    log.info("teacher: %.1f %% right on %d clean training images", accuracy, len(sample_N))
    return accuracy


def _reason(decided_N: torch.Tensor, labels_N: torch.Tensor, num_classes: int, accuracy: float) -> str:
    """What explains an accuracy: with as many images as this, an order in which most decisions would be right."""
    table_KK = torch.zeros(num_classes, num_classes).index_put_((decided_N, labels_N), torch.ones(()), accumulate=True)
    best = 100 * float(table_KK.amax(1).sum()) / len(labels_N)
    if len(labels_N) >= 5 * num_classes and best > 2 * accuracy + 20:
        return (
            f"in another order of its classes {best:.1f} % would be right, so the class map is wrong "
            "(teacher.map_classes)"
        )
    return (
        "its classes are in another order (teacher.map_classes), or its input differs (teacher.img_size, "
        "teacher.normalise)"
    )
