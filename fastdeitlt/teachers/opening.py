"""Opening of a student's teacher: weights, input and class order."""

# N images, K classes

import json
import logging
from pathlib import Path

import numpy as np
import torch

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.counts import class_order
from fastdeitlt.data.sets.fingerprint import warn_of_moved_images
from fastdeitlt.data.sets.splits import find_splits
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.models.teacher import Teacher, open_teacher
from fastdeitlt.store.files import read_json, write_atomically
from fastdeitlt.store.manifest import preprocess_of
from fastdeitlt.teachers.decisions import class_sample, clean_batches, decide

log = logging.getLogger("fastdeitlt")
ORDER_FILE = "teacher_classes.json"
"""File in a student's run folder with the class order of a teacher opened with ``teacher.map_classes``."""
TIE_IMAGES = 8
"""Smallest number of sample images per class, if it has as many, to order classes of equal size."""


def teacher_of(cfg: Config, images: LongTailSet, size: int, device: torch.device) -> Teacher | None:
    """Return the frozen teacher for students of ``size`` pixels; None without a path.

    With ``teacher.map_classes`` classes of equal size keep the data's order; see ``settle_order``.

    Raises:
        UserError: see ``open_teacher``.
    """
    if not cfg.teacher.path:
        log.info("teacher: none (teacher.path is empty), both heads learn the labels")
        return None
    order = class_order(images.counts).tolist() if cfg.teacher.map_classes else None
    mean, std = cfg.augment.mean, cfg.augment.std
    teacher = open_teacher(cfg.teacher, mean, std, size, images.num_classes, order, images.class_names).to(device)
    own = "its own" if teacher.scale_1C11 is not None else "the student's"
    log.info("teacher %s: input of %d pixels, normalised with %s mean and std", cfg.teacher.path, teacher.img_size, own)
    stated = teacher.manifest.preprocess if teacher.manifest else None
    if stated and stated.exif != cfg.data.exif:
        log.warning(
            "data.exif: got %s, but teacher %s was trained with %s; use data.exif=%s, unless no image has an EXIF "
            "orientation",
            cfg.data.exif,
            cfg.teacher.path,
            stated.exif,
            stated.exif,
        )
    return teacher


def settled_teacher(
    cfg: Config, images: LongTailSet, source: Source, size: int, device: torch.device, run_folder: Path | None = None
) -> Teacher | None:
    """Return a run's frozen teacher with its final class order; see ``settle_order``.

    Warns if some of the images held out of its training images may have been among them.
    """
    teacher = teacher_of(cfg, images, size, device)
    if teacher:
        settle_order(teacher, images, source, cfg, size, run_folder)
        facts = teacher.manifest
        if facts and cfg.data.is_own and facts.dataset == cfg.data.title and find_splits(cfg.data).shares:
            what = f"teacher {cfg.teacher.path}"
            distributed.on_main(lambda: warn_of_moved_images(what, facts.data_sha256, images))
    return teacher


def settle_order(
    teacher: Teacher, images: LongTailSet, source: Source, cfg: Config, size: int, run_folder: Path | None = None
) -> None:
    """Order the classes of equal size of a ``teacher.map_classes`` teacher.

    The official code numbers classes by descending size with an unstable sort, so the order of classes of equal size
    depends on its environment. They are matched one to one with the teacher's decisions on clean training images.
    Greedy matching suffices: no matching separates two classes that compete for one decision.

    Args:
        size: side in pixels of the student's images.
        run_folder: stores the order for a resumed run; None: not stored.
    """
    if teacher.class_map is None or teacher.manifest is not None:
        return
    key, file = teacher.sha256(), run_folder / ORDER_FILE if run_folder else None

    def order() -> list[int]:
        assert teacher.class_map is not None
        stored = read_json(file) if file else {}
        if stored.get("teacher") == key:
            return stored["class_map"]
        class_map = _by_decisions(teacher, teacher.class_map.cpu().numpy(), images, source, cfg, size).tolist()
        if file:
            write_atomically(file, json.dumps({"teacher": key, "class_map": class_map}))
        return class_map

    teacher.class_map.copy_(torch.tensor(distributed.on_main(order)))


def _by_decisions(
    teacher: Teacher, class_map_K: np.ndarray, images: LongTailSet, source: Source, cfg: Config, size: int
) -> np.ndarray:
    """Return ``class_map_K`` with equally large classes ordered by decisions."""
    counts_K = np.asarray(images.counts)
    is_tied_K = np.bincount(counts_K)[counts_K] > 1
    tied_N = np.flatnonzero(is_tied_K[images.labels])
    if not len(tied_N):
        return class_map_K
    sample_N = tied_N[class_sample(images.labels[tied_N], TIE_IMAGES)]
    batches = clean_batches(source, sample_N, preprocess_of(cfg, size))
    label_K, clear_K = decide(teacher, batches, images.labels[sample_N]).matched(counts_K)
    num_tied, num_moved = int(is_tied_K.sum()), int((label_K != np.arange(len(label_K))).sum())
    log.info("teacher.map_classes: %d of %d classes of equal size are in another order", num_moved, num_tied)
    is_open_K = is_tied_K & ~clear_K
    is_open_K &= (
        np.bincount(counts_K[is_open_K], minlength=max(counts_K) + 1)[counts_K] > 1
    )  # one is left by elimination
    if doubtful := [images.class_name(k) for k in label_K[is_open_K].tolist()]:
        log.warning(
            "teacher.map_classes: the decisions of the teacher do not distinguish %d of %d classes of equal size (%s); "
            "their order is a guess",
            len(doubtful),
            num_tied,
            listed(doubtful),
        )
    return label_K[class_map_K]
