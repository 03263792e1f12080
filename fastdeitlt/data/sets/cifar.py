"""CIFAR-10-LT and CIFAR-100-LT, cut from the archives that torchvision checks and reads.

N images, H height, W width, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets.counts import CIFAR_CLASSES, cifar_lt_counts
from fastdeitlt.data.sets.types import LongTailSet, Sets, class_counts
from fastdeitlt.errors import UserError

SELECTION_SEED = 0


def long_tail_indices(labels_N: np.ndarray, counts: Sequence[int], seed: int = SELECTION_SEED) -> np.ndarray:
    """Choose the images of a long tail: int64 indices, class by class, ``counts[k]`` of class k.

    The same images as the reference chooses. Source: LDAM-DRW imbalance_cifar.py (``np.random.seed(0)``, one shuffle a
    class in the order of the labels).
    """
    generator = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels_N == label)
        generator.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)


def open_cifar(cfg: DataConfig) -> Sets:
    """Open the long-tailed training set and the whole test set, decoded; never downloads.

    Raises:
        UserError: no archive under data.root, or a damaged one.
    """
    whole, test = _read(cfg.dataset, cfg.root)
    counts = cifar_lt_counts(len(whole), CIFAR_CLASSES[cfg.dataset], cfg.imbalance_factor, cfg.imbalance_kind)
    return Sets(whole.take(long_tail_indices(whole.labels, counts)), test=test)


def prepare(dataset: str, root: str, download: bool = False) -> Path:
    """Check the archive of ``cifar10`` or ``cifar100`` under ``root``, unpack it once, and return its folder.

    Args:
        download: fetch the archive if it is not there.

    Raises:
        UserError: another data set; no archive; a wrong checksum; a failed download; a root that cannot be written.
    """
    if f"{dataset.removesuffix('_lt')}_lt" not in CIFAR_CLASSES:
        raise UserError(f"data prepare: got {dataset!r}, expected cifar10 or cifar100; other sets need no preparation")
    _read(dataset, root, download)
    return Path(root).expanduser() / _torchvision(dataset).base_folder


def _torchvision(dataset: str) -> type[datasets.CIFAR10]:
    return datasets.CIFAR100 if dataset.startswith("cifar100") else datasets.CIFAR10


def _read(dataset: str, root: str, download: bool = False) -> tuple[LongTailSet, LongTailSet]:
    """The balanced training set and the test set. torchvision checks every md5 before it unpickles a file."""
    cifar = _torchvision(dataset)
    if not root:
        raise UserError(f"data.root: got nothing, expected the folder of {cifar.filename}; set data.root=FOLDER")
    folder = Path(root).expanduser()
    try:
        if download or check_integrity(folder / cifar.filename, cifar.tgz_md5):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{cifar.base_folder}.lock"):  # of several ranks one unpacks
                cifar(folder, download=True)  # uses an archive that is there and sound
        splits = [cifar(folder, train=is_train) for is_train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{dataset} in {folder}: neither {cifar.filename} nor {cifar.base_folder}/ is there with its published md5 "
            f"({error}); put one there or run `fastdeitlt data prepare {dataset.removesuffix('_lt')} --root {root} "
            "--download`"
        ) from None
    train, test = (_as_set(split, name, root) for split, name in zip(splits, ("train", "test"), strict=True))
    return train, test


def _as_set(split: datasets.CIFAR10, name: str, root: str) -> LongTailSet:
    labels_N = np.asarray(split.targets, np.int64)
    paths = [f"{name}/{index:05d}" for index in range(len(labels_N))]
    counts = class_counts(labels_N, len(split.classes))
    return LongTailSet(paths, labels_N, counts, root, split.classes, np.ascontiguousarray(split.data))
