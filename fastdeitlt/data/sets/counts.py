"""Functions of class counts: long tails, DRW weights, head / mid / tail groups.

K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.errors import UserError, counted

KNOWN_COUNTS = {
    "fashion_mnist_lt": {"train": (2478, 10, 1000, 10), "val": (500, 10, 50, 50), "test": (1000, 10, 100, 100)},
    "imagenet_lt": {
        "train": (115_846, 1000, 1280, 5),
        "val": (20_000, 1000, 20, 20),
        "test": (50_000, 1000, 50, 50),
    },
    "inat18": {"train": (437_513, 8142, 1000, 2), "test": (24_426, 8142, 3, 3)},
    "places_lt": {"train": (62_500, 365, 4980, 5), "val": (7_300, 365, 20, 20), "test": (36_500, 365, 100, 100)},
}
"""Published sets: images, classes, images of the largest and smallest class."""


class BalancedSet(NamedTuple):
    """A balanced set with long-tailed subsets."""

    archive: str
    """Name for ``data prepare``."""
    num_train: int
    num_test: int
    classes: int


CUT_SETS = {
    "cifar10_lt": BalancedSet("cifar10", 50_000, 10_000, 10),
    "cifar100_lt": BalancedSet("cifar100", 50_000, 10_000, 100),
    "fashion_mnist_full_lt": BalancedSet("fashion_mnist", 60_000, 10_000, 10),
}
"""Long-tailed subsets of balanced sets, with counts set by the imbalance (``cifar_lt_counts``)."""
KNOWN_CLASSES = {name: splits["train"][1] for name, splits in KNOWN_COUNTS.items()}
KNOWN_CLASSES |= {name: source.classes for name, source in CUT_SETS.items()}
"""Classes of every named set."""
OFFICIAL_BOUNDS = {10: (3, 7), 100: (36, 71), 1000: (390, 835), 8142: (842, 4543)}
"""Number of classes -> (first mid class, first tail class) in frequency order, as in the official code for
CIFAR-10-LT, CIFAR-100-LT, ImageNet-LT and iNaturalist-2018 at any imbalance (DeiT-LT utils and main.py)."""


def cifar_lt_counts(n_total: int, classes: int, imb_factor: float, kind: str = "exp") -> list[int]:
    """Return class sizes [K] of a long-tailed subset of ``n_total`` balanced images.

    exp: ``int(n_max * imb_factor^(i / (K - 1)))``; step: ``int(n_max)`` for the first half, ``int(n_max *
    imb_factor)`` for the others; ``n_max = n_total / K``. Source: LDAM-DRW imbalance_cifar.py (Cao et al. 2019).

    Raises:
        UserError: fewer than one image per class, imb_factor outside (0, 1], or an unknown kind.
    """
    if classes < 1 or n_total < classes:
        raise UserError(
            f"long tail: got {counted(n_total, 'image')} of {counted(classes, 'class')}, expected at least one image "
            "per class"
        )
    if not 0 < imb_factor <= 1:
        raise UserError(f"imbalance_factor: got {imb_factor}, expected smallest / largest class size in (0, 1]")
    largest = n_total / classes
    if kind == "exp":
        return [int(largest * imb_factor ** (i / max(classes - 1.0, 1.0))) for i in range(classes)]
    if kind == "step":
        return [int(largest if i < classes // 2 else largest * imb_factor) for i in range(classes)]
    raise UserError(f"imbalance_kind: got {kind!r}, expected 'exp' or 'step'")


def drw_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Return deferred re-weighting's class weights, float32 [K], sum K.

    Inverse effective numbers of samples, ``w_k ~ (1 - beta) / (1 - beta^N_k)``; 0 for a class without images. Source:
    Cui et al. 2019, eq. 2; DeiT-LT main.py.

    Raises:
        UserError: beta outside [0, 1), a negative count, or no images.
    """
    counts_K = np.asarray(counts, dtype=np.float64)
    if not 0 <= beta < 1:
        raise UserError(f"loss.drw_beta: got {beta}, expected a number in [0, 1)")
    if counts_K.ndim != 1 or (counts_K < 0).any() or not counts_K.any():
        raise UserError(f"class counts: got {list(counts)[:10]}, expected non-negative numbers, at least one above 0")
    present_K = counts_K > 0
    weights_K = np.zeros_like(counts_K)
    weights_K[present_K] = (1 - beta) / (1 - np.power(beta, counts_K[present_K]))
    return torch.from_numpy(weights_K / weights_K.sum() * len(weights_K)).float()


def class_order(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the classes from most to least frequent, int64 [K], by a stable sort."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def shot_groups(counts: Sequence[int], split: str = "threshold", dataset: str | None = None) -> dict[str, Tensor]:
    """Return the classes of {"head", "mid", "tail"}, int64 ids in ascending order.

    threshold: more than 100 training images, 20 to 100, fewer than 20 (Liu et al. 2019); a class without images is in
    the tail. official: the index ranges of the DeiT-LT code after a stable sort by frequency, by number of classes
    (``OFFICIAL_BOUNDS``); thirds of the classes for other data sets (``has_official_split``), of two classes head and
    tail. Published tables use either, so a tail accuracy needs its split.

    Args:
        counts: training images of each class [K].
        dataset: name of the data set; None: any set with that many classes.

    Raises:
        UserError: an unknown split.
    """
    counts_K = np.asarray(counts, dtype=np.int64)
    if split == "threshold":
        masks = {"head": counts_K > 100, "mid": (counts_K >= 20) & (counts_K <= 100), "tail": counts_K < 20}
        return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in masks.items()}
    if split != "official":
        raise UserError(f"shot split: got {split!r}, expected 'threshold' or 'official'")
    classes = len(counts_K)
    third = 1 if classes == 2 else classes // 3
    bounds = OFFICIAL_BOUNDS[classes] if has_official_split(classes, dataset) else (third, classes - third)
    groups = zip(("head", "mid", "tail"), np.split(class_order(counts_K), bounds), strict=True)
    return {name: torch.from_numpy(np.sort(ids)) for name, ids in groups}


def has_official_split(classes: int, dataset: str | None = None) -> bool:
    """Return whether the official code has index ranges for a data set."""
    official = (None, "cifar10_lt", "cifar100_lt", "imagenet_lt", "inat18")
    return dataset in official and classes in OFFICIAL_BOUNDS
