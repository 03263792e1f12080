"""Class folders, root/{train,val,test}/<class>/<image>, to image paths and labels; no image is opened."""

import os
from pathlib import Path

import numpy as np

from fastdeitlt.data.sets import LongTailSet, class_counts
from fastdeitlt.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")


def read_folder(root: str | Path, split: str, class_names: list[str] | None = None) -> LongTailSet:
    """Read root/split/<class>/<image>; classes are the sub-folders in sorted order, images may lie deeper.

    Hidden files and folders and files that are no images are left out. A class folder without images has count 0.

    Args:
        class_names: classes of the training split; this one's must be among them. None: its own.

    Raises:
        UserError: no such folder, no images, a class that the training split lacks, a file name that is not UTF-8.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        raise UserError(f"data folder {folder}: no such folder; expected {split}/<class>/<image> under {root}")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    names = class_names or found
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"data folder {folder}: class {unknown[0]!r} is not in the training split; remove or rename it")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = _images(folder / name, Path(root))
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"data folder {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in its class folders")
    labels_N = np.array(labels, dtype=np.int64)
    return LongTailSet(paths, labels_N, class_counts(labels_N, len(names)), str(root), names)


def left_out(root: str | Path, split: str) -> list[str]:
    """Files under root/split, relative to root, that ``read_folder`` passes over: no image suffix, or in no class."""
    folder = Path(root) / split
    stray = [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    files = [name for name in _files(folder, Path(root)) if not name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted({*files, *(f"{split}/{name}" for name in stray)})


def _files(folder: Path, root: Path) -> list[str]:
    """Files below the folder relative to root, in order, without hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = [name for name in sorted(files) if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, name), root) for name in wanted]
    return found


def _images(folder: Path, root: Path) -> list[str]:
    images = [name for name in _files(folder, root) if name.lower().endswith(IMAGE_SUFFIXES)]
    try:
        "".join(images).encode()
    except UnicodeEncodeError:
        raise UserError(f"data folder {str(folder)!r}: holds a file whose name is not UTF-8; rename it") from None
    return images
