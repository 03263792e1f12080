"""CIFAR-10-LT and CIFAR-100-LT from torchvision's archives: checked, read without running pickle's code, cut.

N images, H height, W width, C channels.
"""

import hashlib
import io
import logging
import pickle
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import download_url

from fastdeitlt.atomic import draft_file
from fastdeitlt.config import DataConfig
from fastdeitlt.data.counts import cifar_lt_counts
from fastdeitlt.data.sets import LongTailSet, Sets, class_counts
from fastdeitlt.errors import UserError

SELECTION_SEED = 0
SIZE = 32


@dataclass(frozen=True)
class Archive:
    """An archive as its publisher made it; every md5 is checked before anything is read."""

    num_classes: int
    filename: str
    url: str
    md5: str
    folder: str
    """Folder in the archive that holds the files."""
    train_files: dict[str, str]
    """File name -> md5."""
    test_files: dict[str, str]
    meta_file: tuple[str, str]
    """Name and md5 of the file with the class names."""
    names_key: str
    """Key of the class names in the meta file."""


@dataclass(frozen=True, eq=False)
class Cifar:
    """The whole balanced set: uint8 RGB images [N, 32, 32, 3] and int64 labels [N] of both splits."""

    train_NHWC: np.ndarray
    train_labels_N: np.ndarray
    test_NHWC: np.ndarray
    test_labels_N: np.ndarray
    class_names: np.ndarray
    """Strings [K]."""


def known_archive(dataset: str) -> Archive:
    """torchvision's description of the archive of ``cifar10`` or ``cifar100``, or of the long tail cut from it (_lt).

    Raises:
        UserError: another data set.
    """
    known = {"cifar10": (datasets.CIFAR10, 10), "cifar100": (datasets.CIFAR100, 100)}
    if dataset.removesuffix("_lt") not in known:
        raise UserError(f"data prepare: got {dataset!r}, expected {' or '.join(known)}; other sets need no preparation")
    cifar, num_classes = known[dataset.removesuffix("_lt")]
    return Archive(
        num_classes=num_classes,
        filename=cifar.filename,
        url=cifar.url,
        md5=cifar.tgz_md5,
        folder=cifar.base_folder,
        train_files=dict(cifar.train_list),
        test_files=dict(cifar.test_list),
        meta_file=(cifar.meta["filename"], cifar.meta["md5"]),
        names_key=cifar.meta["key"],
    )


def long_tail_indices(labels_N: np.ndarray, counts: Sequence[int], seed: int = SELECTION_SEED) -> np.ndarray:
    """The images of a long tail: int64 indices, class by class, ``counts[k]`` of class k.

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


def open_cifar(cfg: DataConfig, archive: Archive | None = None) -> Sets:
    """The long-tailed training set and the whole test set, decoded; never downloads.

    Args:
        archive: another archive of the same structure. None: the published one.

    Raises:
        UserError: no archive under data.root, or a damaged one.
    """
    archive = archive or known_archive(cfg.dataset)
    cifar = _open(cfg.dataset, cfg.root, False, archive)[1]
    counts = cifar_lt_counts(len(cifar.train_labels_N), archive.num_classes, cfg.imbalance_factor, cfg.imbalance_kind)
    chosen = long_tail_indices(cifar.train_labels_N, counts)
    names = cifar.class_names.tolist()
    train = _as_set(cifar.train_NHWC, cifar.train_labels_N, "train", names, cfg.root).take(chosen)
    return Sets(train, test=_as_set(cifar.test_NHWC, cifar.test_labels_N, "test", names, cfg.root))


def prepare(dataset: str, root: str, download: bool = False, archive: Archive | None = None) -> Path:
    """Make the .npz of a CIFAR archive (or of its unpacked folder) under ``root``, once; returns its path.

    Args:
        download: fetch the archive if it is not there. Nothing is fetched unasked.

    Raises:
        UserError: no archive; a wrong checksum; a failed download; a root that cannot be written.
    """
    return _open(dataset, root, download, archive or known_archive(dataset))[0]


def _open(dataset: str, root: str, download: bool, archive: Archive) -> tuple[Path, Cifar]:
    """The .npz and what it holds; made from the archive if it is missing or damaged."""
    if not root:
        raise UserError(f"data.root: got nothing, expected the folder of {archive.filename}; set data.root=FOLDER")
    folder = Path(root).expanduser()
    converted = folder / archive.filename.replace(".tar.gz", ".npz")
    if (cifar := _load(converted, archive)) is not None:
        return converted, cifar
    packed, unpacked = folder / archive.filename, folder / archive.folder
    if download and not unpacked.is_dir():
        try:
            download_url(archive.url, str(folder), archive.filename, archive.md5)
        except (OSError, RuntimeError) as error:
            raise UserError(f"download of {archive.url}: {error}; fetch it yourself and put it in {folder}") from None
    if packed.is_file():
        files = _read_packed(packed, archive)
    elif unpacked.is_dir():
        files = {name: _read_file(unpacked / name) for name in _checksums(archive)}
    else:
        raise UserError(
            f"data.root: neither {archive.filename} nor {archive.folder}/ in {folder}; put one there or run "
            f"`fastdeitlt data prepare {dataset.removesuffix('_lt')} --root {root} --download`"
        )
    for name, md5 in _checksums(archive).items():
        _check_md5(folder / archive.folder / name, files[name], md5)
    cifar = _parse(files, archive)
    _save(converted, cifar)
    return converted, cifar


def _checksums(archive: Archive) -> dict[str, str]:
    return archive.train_files | archive.test_files | {archive.meta_file[0]: archive.meta_file[1]}


def _check_md5(file: Path, data: bytes, expected: str) -> None:
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest != expected:
        raise UserError(f"{file}: md5 is {digest}, expected {expected}; it is damaged or another file, get it again")


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); get the archive again") from None


def _read_packed(packed: Path, archive: Archive) -> dict[str, bytes]:
    """The files that are needed, in memory: nothing is written, so no member can leave the folder."""
    data = _read_file(packed)
    _check_md5(packed, data, archive.md5)
    wanted = {f"{archive.folder}/{name}": name for name in _checksums(archive)}
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name in wanted and (content := tar.extractfile(member)):
                    files[wanted[member.name]] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{packed}: not a readable .tar.gz ({error})") from None
    if missing := set(wanted.values()) - set(files):
        raise UserError(f"{packed}: {sorted(missing)[0]} is missing in it; expected the published archive")
    return files


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old pickle, limited to the one encoding it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_PICKLED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; refuses everything else a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _PICKLED_NAMES[module, name]


def _unpickle(name: str, data: bytes) -> dict[str, Any]:
    try:
        return dict(_ArrayUnpickler(io.BytesIO(data), encoding="latin1").load())
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{name}: not a CIFAR file ({error}); get the archive again") from None


def _parse(files: dict[str, bytes], archive: Archive) -> Cifar:
    def split(names: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        batches = [_unpickle(name, files[name]) for name in names]
        try:
            labels_N = np.concatenate([np.asarray(b.get("labels", b.get("fine_labels")), np.int64) for b in batches])
            images_NCHW = np.concatenate([b["data"] for b in batches]).reshape(len(labels_N), 3, SIZE, SIZE)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{next(iter(names))}: not a CIFAR file ({error}); get the archive again") from None
        return np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), labels_N

    names = _unpickle(archive.meta_file[0], files[archive.meta_file[0]]).get(archive.names_key, [])
    return Cifar(*split(archive.train_files), *split(archive.test_files), np.array(names, dtype=str))


def _save(file: Path, cifar: Cifar) -> None:
    """Atomically: a process that is killed leaves no half file under the final name."""
    try:
        with draft_file(file) as draft, draft.open("wb") as out:
            np.savez(out, **vars(cifar))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error}); data.root must be writable once, for this file"
        ) from None
    logging.getLogger("fastdeitlt").info("wrote %s (%d bytes)", file, file.stat().st_size)


def _load(file: Path, archive: Archive) -> Cifar | None:
    """What ``_save`` wrote, or None if it is not there or not whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            cifar = Cifar(**{name: arrays[name] for name in arrays})
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return cifar if len(cifar.class_names) == archive.num_classes else None


def _as_set(images_NHWC: np.ndarray, labels_N: np.ndarray, split: str, names: list[str], root: str) -> LongTailSet:
    paths = [f"{split}/{index:05d}" for index in range(len(labels_N))]
    return LongTailSet(paths, labels_N, class_counts(labels_N, len(names)), root, names, images_NHWC)
