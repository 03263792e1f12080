"""Class folders, <split>/<class>/<image> or <class>/<image>, to paths and labels."""

import os
from pathlib import Path

import numpy as np

from fastdeitlt.data.sets.class_names import is_utf8, normalised, numbered
from fastdeitlt.data.sets.types import LongTailSet, class_counts
from fastdeitlt.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Folder names of each split, case-insensitive."""


def split_of(name: str) -> str:
    """Return the split of a folder name, or ""."""
    return next((split for split, names in SPLIT_FOLDERS.items() if name.lower() in names), "")


def split_folders(root: str | Path) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split under ``root``, and the other folders.

    Raises:
        UserError: two folders for one split.
    """
    splits: dict[str, str] = {}
    others = []
    for name in sorted(_folders(root)):
        split = split_of(name)
        if split in splits:
            raise UserError(
                f"data folder {root}: got {splits[split]!r} and {name!r} for the {split} split, expected one. "
                "Rename or merge the other."
            )
        if split:
            splits[split] = name
        else:
            others.append(name)
    return splits, others


def read_folder(root: str | Path, folder: str) -> LongTailSet:
    """Read root/folder/<class>/<image>; classes are the sub-folders in sorted order.

    Hidden files and folders are ignored, linked folders are followed, other files are listed in ``left_out``. A class
    folder without images has count 0. Class names are in Unicode NFC.

    Args:
        folder: the split's folder; "." for class folders directly under ``root``, where a folder without images is not
            a class.

    Raises:
        UserError: no such folder, no images, two folders with the same class name, or a file name that is not UTF-8.
    """
    place = Path(root) / folder
    if not place.is_dir():
        raise UserError(f"data folder {place}: no such folder, expected {folder}/<class>/<image> in {root}")
    stray = [name for name in _visible(os.listdir(place)) if not (place / name).is_dir()]
    images: dict[str, list[str]] = {}
    others = [os.path.normpath(f"{folder}/{name}") for name in stray]
    for name in sorted(_folders(place), key=normalised):
        files = [os.path.normpath(f"{folder}/{name}/{file}") for file in walk(place / name)]
        images[name] = [file for file in files if is_image(file)]
        others += [file for file in files if not is_image(file)]
    if folder == os.curdir:
        others += [f"{name}/" for name, files in images.items() if not files]
        images = {name: files for name, files in images.items() if files}
    if not any(images.values()):
        is_split = folder != os.curdir
        got, fix = f"no images ({', '.join(IMAGE_SUFFIXES)})", ""
        if loose := min((file for file in others if is_image(file)), default=""):
            got = f"got {loose!r} outside a class folder"
            fix = f". Rename {folder!r} if it is a class, not a split" if is_split else ". Move it into a class folder"
        expected = f"{folder}/<class>/<image>" if is_split else "train/<class>/<image> or <class>/<image>"
        raise UserError(f"data folder {root}: {got}, expected {expected}{fix}")
    names = list(numbered(list(images), f"data folder {place}"))
    paths = [file for files in images.values() for file in files]
    if bad := next((path for path in paths if not is_utf8(path)), None):
        raise UserError(f"data folder {str(place)!r}: got the file name {bad!r}, expected UTF-8. Rename the file.")
    labels_N = np.repeat(np.arange(len(names)), [len(files) for files in images.values()])
    counts = class_counts(labels_N, len(names))
    return LongTailSet(paths, labels_N, counts, str(root), names, left_out=sorted(others))


def is_image(name: str) -> bool:
    """Return whether a file name has a supported image suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def walk(folder: str | Path) -> list[str]:
    """List the visible files below a folder, relative to it, sorted by folder.

    Hidden files and folders are skipped. Linked folders are followed after all others, each folder once, so cyclic
    links end.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"data folder {error.filename}: cannot be read ({error.strerror}). Make it readable.")

    files_below: list[str] = []
    seen = set()
    pending = [os.fspath(folder)]
    while pending:
        for parent, folders, files in os.walk(pending.pop(0), onerror=refuse):
            status = os.stat(parent)
            place = status.st_dev, status.st_ino
            folders[:] = [] if place in seen else sorted(_visible(folders))
            if place not in seen:
                seen.add(place)
                prefix = os.path.relpath(parent, folder)
                files_below += [os.path.normpath(os.path.join(prefix, name)) for name in sorted(_visible(files))]
                inside = (os.path.join(parent, name) for name in folders)
                pending += [path for path in inside if os.path.islink(path)]
    return files_below


def _folders(place: str | Path) -> list[str]:
    with os.scandir(place) as entries:
        return _visible([entry.name for entry in entries if entry.is_dir()])


def _visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]
