"""Open the splits of a data set.

N images in the set, K classes.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets.class_names import normalised
from fastdeitlt.data.sets.findings import opening_findings
from fastdeitlt.data.sets.splits import Classes, Places, find_splits, no_training_split, number_alike, renumber
from fastdeitlt.data.sets.types import SPLITS, LongTailSet, Sets
from fastdeitlt.errors import UserError, counted

log = logging.getLogger("fastdeitlt")


def hold_out(images: LongTailSet, val: float = 0.0, test: float = 0.0) -> tuple[LongTailSet, LongTailSet, LongTailSet]:
    """Split off shares of each class as (train, val, test), by the images' names.

    The images of a class are ranked by a hash of their paths; the first are for validation, the last for testing. So
    neither their order in a list nor other classes matter, and added images move few others.

    Shares are rounded to whole images: a class with fewer than 0.5 / share images contributes none, and train keeps at
    least one. All parts keep the list's order. The validation images do not depend on ``test``.

    Raises:
        UserError: a share above 0 would hold out no image.
    """
    names = (normalised(path).encode("utf-8", "surrogateescape") for path in images.paths)
    key_N = np.frombuffer(b"".join(hashlib.sha256(name).digest()[:8] for name in names), "<u8")
    part_N = np.zeros(len(images), dtype=np.int64)
    for members in np.split(np.lexsort((key_N, images.labels)), np.cumsum(images.counts)[:-1]):
        left = max(len(members) - 1, 0)
        num_val = min(int(len(members) * val + 0.5), left)
        num_test = min(int(len(members) * test + 0.5), left - num_val)
        part_N[members[:num_val]] = 1
        part_N[members[len(members) - num_test :]] = 2
    for part, name, share in ((1, "val", val), (2, "test", test)):
        if share and not (part_N == part).any():
            raise UserError(
                f"data.{name}_holdout: got {share}, which holds out no image of the largest class "
                f"({counted(max(images.counts), 'image')}). Use a larger value or 0."
            )
    train, held_val, held_test = (images.take(np.flatnonzero(part_N == part)) for part in range(3))
    return train, held_val, held_test


def open_sets(cfg: DataConfig) -> Sets:
    """Open the splits of ``cfg`` without reading images (cut sets: their archive).

    Class names come from the list (csv, json), the folders, or the lines of root/classes.txt. Validation and test
    images have the training split's classes, matched by name if both have names.

    Raises:
        UserError: a missing root, list or archive; an invalid list, see ``read_list``; classes that differ.
    """
    places = find_splits(cfg)
    if "train" not in places.readers:
        raise no_training_split(cfg)
    splits = _read(places, SPLITS)
    return Sets(splits["train"], splits.get("val"), splits.get("test"), tuple(places.shares), places.remarks)


def open_training_sets(cfg: DataConfig) -> Sets:
    """Open the sets for training and log findings about them.

    Raises:
        UserError: see ``open_sets``; or fewer than two classes with training images.
    """
    sets = open_sets(cfg)
    log.info("data %s: %s", cfg.title, sets)
    for finding in opening_findings(sets):
        if finding.level == "error":
            raise UserError(f"data {cfg.title}, {finding.split}: {finding.message}")
        level = logging.WARNING if finding.level == "warning" else logging.INFO
        log.log(level, "data %s, %s: %s", cfg.title, finding.split, finding)
    return sets


def open_splits(
    cfg: DataConfig, required: Sequence[str], optional: Sequence[str], classes: Classes
) -> dict[str, LongTailSet]:
    """Open splits for a model, numbered by its classes (by name, else by position).

    A split may lack some of the model's classes. The training split is read only if another split is held out of it or
    lists follow its numbering.

    Args:
        required, optional: splits to open; missing optional splits are skipped.
        classes: classes of the model.

    Raises:
        UserError: see ``open_sets``; a missing required split, or classes that the model does not have.
    """
    places = find_splits(cfg, required)
    there = [split for split in SPLITS if split in places.readers or split in places.shares]
    if absent := [split for split in required if split not in there]:
        raise UserError(
            f"split: got {absent[0]!r}, expected a split of {cfg.title} ({', '.join(there) or 'none'})"
            + (f". Use --split {there[-1]}." if there else "")
        )
    for remark in places.remarks:
        log.info("data %s: %s", cfg.title, remark.message)
    return _read(places, (*required, *optional), classes)


def _read(places: Places, requested: Sequence[str], classes: Classes | None = None) -> dict[str, LongTailSet]:
    """Read the requested existing splits; ``classes`` None: the training split's."""
    shares, needed = places.shares, {*requested}
    if places.names_file or shares.keys() & needed:
        needed.add("train")
    splits = number_alike({split: read() for split, read in places.readers.items() if split in needed}, places)
    if shares and "train" in splits:
        train, val, test = hold_out(splits["train"], shares.get("val", 0.0), shares.get("test", 0.0))
        splits |= {"train": train} | {split: part for split, part in (("val", val), ("test", test)) if split in shares}
    chosen = [split for split in requested if split in splits]
    if classes:
        what = dict.fromkeys(shares, places.what.get("train", "")) | places.what
        exact = "train" in splits  # else only the labels show how many classes lists without names have
        splits = {split: renumber(splits[split], classes, what[split], exact) for split in chosen}
    return {split: splits[split] for split in SPLITS if split in chosen}
