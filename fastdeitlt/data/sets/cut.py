"""Long-tailed subsets of CIFAR and Fashion-MNIST, with torchvision's checksums.

N images, H height, W width, C channels.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets.counts import CUT_SETS, cifar_lt_counts
from fastdeitlt.data.sets.types import LongTailSet, Sets, class_counts
from fastdeitlt.errors import UserError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of the IDX files of the Debian package dataset-fashion-mnist."""
IDX_MD5 = {
    "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
}
"""Fashion-MNIST: file -> md5 of its uncompressed bytes.

torchvision's md5 includes the gzip header, from which Debian's package strips name and time. With the published name
and time restored (2017-08-31 10:50:06 UTC, training files, and 10:50:27, test files), Debian's four files have
torchvision's md5.
"""


def long_tail_indices(labels_N: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Choose ``counts[k]`` images of each class k; return int64 indices by class.

    Identical to the reference's subset. Source: LDAM-DRW imbalance_cifar.py (``np.random.seed(0)``, one shuffle per
    class in label order).
    """
    generator = np.random.RandomState(0)
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels_N == label)
        generator.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)


def open_cut(cfg: DataConfig) -> Sets:
    """Open the decoded long-tailed training set and full test set, offline.

    Raises:
        UserError: the archive under data.root is missing or damaged.
    """
    source = CUT_SETS[cfg.dataset]
    whole, test = _read(source.archive, cfg.root)
    counts = cifar_lt_counts(len(whole), source.classes, cfg.imbalance_factor, cfg.imbalance_kind)
    return Sets(whole.take(long_tail_indices(whole.labels, counts)), test=test)


def prepare(dataset: str, root: str, download: bool = False) -> Path:
    """Verify an archive (CIFAR: unpack it once) and return its folder.

    Args:
        dataset: cifar10, cifar100 or fashion_mnist.
        root: folder of the archive.
        download: fetch the archive if it is missing.

    Raises:
        UserError: another data set, no archive, a wrong checksum, a failed download, or an unwritable root.
    """
    archives = [source.archive for source in CUT_SETS.values()]
    archive = CUT_SETS[dataset].archive if dataset in CUT_SETS else dataset
    if archive not in archives:
        names = f"{', '.join(archives[:-1])} or {archives[-1]}"
        raise UserError(f"data prepare: got {dataset!r}, expected {names}; other sets need no preparation")
    _read(archive, root, download)
    return (
        _idx_folder(root) if archive == "fashion_mnist" else Path(os.path.expanduser(root), _cifar(archive).base_folder)
    )


def _read(archive: str, root: str, download: bool = False) -> tuple[LongTailSet, LongTailSet]:
    """Read the balanced training set and the test set."""
    return (_read_idx_files if archive == "fashion_mnist" else _read_cifar)(archive, root, download)


def _cifar(archive: str) -> type[datasets.CIFAR10]:
    return datasets.CIFAR100 if archive == "cifar100" else datasets.CIFAR10


def _read_cifar(archive: str, root: str, download: bool) -> tuple[LongTailSet, LongTailSet]:
    """Read CIFAR; torchvision verifies every md5 before it unpickles a file."""
    cifar = _cifar(archive)
    if not root:
        raise UserError(f"data.root: empty, expected the folder of {cifar.filename}. Set data.root=FOLDER.")
    folder = Path(os.path.expanduser(root))

    def unpacked() -> list[datasets.CIFAR10]:
        return [cifar(folder, train=is_train) for is_train in (True, False)]

    try:
        try:
            splits = unpacked()  # also from a folder that cannot be written
        except RuntimeError:
            if not (download or check_integrity(folder / cifar.filename, cifar.tgz_md5)):
                raise
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{cifar.base_folder}.lock"):  # one rank unpacks, the others wait
                cifar(folder, download=True)  # does not download if the archive exists and is intact
            splits = unpacked()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{archive} in {folder}: no {cifar.filename} or {cifar.base_folder}/ with the published md5 ({error}). "
            f"Copy one there, or run `fastdeitlt data prepare {archive} --root {root} --download`."
        ) from None
    train, test = (
        _as_set(np.asarray(split.targets), np.ascontiguousarray(split.data), name, root, split.classes)
        for split, name in zip(splits, ("train", "test"), strict=True)
    )
    return train, test


def _read_idx_files(archive: str, root: str, download: bool) -> tuple[LongTailSet, LongTailSet]:
    """Read gray images of gzipped IDX files as RGB."""
    fashion = datasets.FashionMNIST
    folder = _idx_folder(root)
    try:
        if download and not all((folder / name).is_file() for name in IDX_MD5):
            fashion(Path(os.path.expanduser(root)), download=True)
            folder = _idx_folder(root)
        images_NHW, labels_N, test_images_NHW, test_labels_N = (
            _read_idx(folder / name) for name, _ in fashion.resources
        )
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive} in {folder}: {error}; expected {', '.join(IDX_MD5)} as published. Put them there, install the "
            f"Debian package dataset-fashion-mnist and set data.root={DEBIAN_FOLDER}, or run `fastdeitlt data prepare "
            f"{archive} --root {root or 'FOLDER'} --download`"
        ) from None
    train = _as_set(labels_N, _rgb(images_NHW), "train", root, fashion.classes)
    return train, _as_set(test_labels_N, _rgb(test_images_NHW), "test", root, fashion.classes)


def _idx_folder(root: str) -> Path:
    """Return the IDX files' folder: root, torchvision's below it, or Debian's."""
    folder = Path(os.path.expanduser(root)) if root else DEBIAN_FOLDER
    downloaded = folder / "FashionMNIST" / "raw"
    return downloaded if downloaded.is_dir() else folder


def _read_idx(file: Path) -> np.ndarray:
    """Read an IDX file and verify the md5 of its uncompressed bytes."""
    data = gzip.decompress(file.read_bytes())
    if (md5 := hashlib.md5(data, usedforsecurity=False).hexdigest()) != IDX_MD5[file.name]:
        raise RuntimeError(f"{file.name}: got md5 {md5} after unpacking, expected {IDX_MD5[file.name]}")
    return parse_idx(data)


def parse_idx(data: bytes) -> np.ndarray:
    """Return the uint8 array of an IDX file: a magic number, big-endian sizes, bytes."""
    num_dims = data[3]
    shape = np.frombuffer(data, ">u4", num_dims, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def _rgb(images_NHW: np.ndarray) -> np.ndarray:
    return np.repeat(images_NHW[..., None], 3, axis=3)


def _as_set(labels: np.ndarray, images_NHWC: np.ndarray, name: str, root: str, classes: list[str]) -> LongTailSet:
    labels_N = labels.astype(np.int64)
    paths = [f"{name}/{index:05d}" for index in range(len(labels_N))]
    return LongTailSet(paths, labels_N, class_counts(labels_N, len(classes)), root, classes, images_NHWC)
