"""The splits of a data set: their locations and common class numbering.

N images in the set, K classes.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from fastdeitlt.config import DataConfig
from fastdeitlt.data.sets.class_names import listed, match_names
from fastdeitlt.data.sets.counts import CUT_SETS
from fastdeitlt.data.sets.folders import SPLIT_FOLDERS, read_folder, split_folders
from fastdeitlt.data.sets.lists import read_list
from fastdeitlt.data.sets.shards import names_split, read_shards, split_shards
from fastdeitlt.data.sets.types import SPLITS, Finding, LongTailSet, class_counts
from fastdeitlt.errors import UserError, counted

log = logging.getLogger("fastdeitlt")
DEFAULT_LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "fashion_mnist_lt": {"train": ("train.txt",), "val": ("val.txt",), "test": ("test.txt",)},
    "imagenet_lt": {split: (f"ImageNet_LT_{split}.txt", f"Imagenet_LT_{split}.txt") for split in SPLITS},
    # published iNaturalist results are on its validation set, which is the test set here
    "inat18": {
        "train": ("iNaturalist18_train.txt", "train2018.json"),
        "test": ("iNaturalist18_val.txt", "val2018.json"),
    },
    "places_lt": {split: (f"Places_LT_{split}.txt",) for split in SPLITS},
}
"""File names of the published lists under data.root, in search order."""
LAYOUTS = {
    "fashion_mnist_lt": "the embedded set needs no data.root; your own class folders need data.dataset=folder",
    "imagenet_lt": "images: ILSVRC 2012 of image-net.org, as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; lists: "
    "ImageNet_LT_{train,val,test}.txt of github.com/zhmiao/OpenLongTailRecognition-OLTR",
    "inat18": "train_val2018/, train2018.json and val2018.json of github.com/visipedia/inat_comp/tree/master/2018",
    "places_lt": "images: Places365 of places2.csail.mit.edu, 256 x 256, as data_256/a/airfield/*.jpg; "
    "lists: Places_LT_{train,val,test}.txt of github.com/zhmiao/OpenLongTailRecognition-OLTR",
    "folder": "train/<class>/<image>, and val/ and test/ of the same form; or <class>/<image>",
    "shards": "train-*.tar, .zip or .parquet, and val-* and test-* of the same form; or shards of any names",
}
"""Origin of the published sets and their layout under data.root, for missing-data errors."""
FLAT_HOLDOUTS = {"val": 0.1, "test": 0.2}
"""Default hold-out shares of a root without split folders."""


@dataclass(frozen=True)
class Classes:
    """The target numbering of a split's classes: the training split's, or a model's."""

    whose: str
    """Owner of the classes for messages, such as "model runs/a". Empty: the split itself."""
    num_classes: int
    names: list[str] | None = None


@dataclass(frozen=True)
class Places:
    """Locations of a data set's splits, before anything is read."""

    readers: Mapping[str, Callable[[], LongTailSet]]
    """Reader of each split."""
    what: dict[str, str]
    """Description of each split's location, for messages."""
    shares: dict[str, float] = field(default_factory=dict)
    """Share of the training images to hold out for each split that has no images."""
    names_file: Path | None = None
    """File with one class name per line, for lists without names."""
    remarks: tuple[Finding, ...] = ()


def find_splits(cfg: DataConfig, required: Sequence[str] = SPLITS) -> Places:
    """Locate the existing splits without reading a list.

    Args:
        required: splits whose list must exist if ``cfg`` names one.

    Raises:
        UserError: no root, or a named list is missing.
    """
    if cfg.dataset in CUT_SETS:
        from fastdeitlt.data.sets import cut  # torchvision is slow to import

        sets = dict(cut.open_cut(cfg))
        readers = {split: partial(sets.__getitem__, split) for split in sets}
        places = Places(readers, dict.fromkeys(sets, f"data {cfg.dataset}"))
    elif cfg.dataset == "folder":
        places = _find_folders(cfg)
    elif cfg.dataset == "shards":
        places = _find_shards(cfg)
    else:
        root = _root(cfg)
        lists = {split: _find_list(cfg, root, split, split in required) for split in SPLITS}
        files = {split: file for split, file in lists.items() if file}
        what = {split: f"list {file}" for split, file in files.items()}
        readers = {split: partial(read_list, file, root) for split, file in files.items()}
        places = Places(readers, what, names_file=Path(root) / "classes.txt")
    holdouts = {"val": cfg.val_holdout, "test": cfg.test_holdout}
    shares = {split: places.shares.get(split, 0.0) if share is None else share for split, share in holdouts.items()}
    from_train = "train" in places.readers
    shares = {s: share for s, share in shares.items() if share and s not in places.readers and from_train}
    return replace(places, shares=shares)


def no_training_split(cfg: DataConfig) -> UserError:
    """Return the error for a data set without training split."""
    root = _root(cfg)
    if cfg.dataset in ("folder", "shards"):
        others = split_folders(root)[0] if cfg.dataset == "folder" else {}
        found = "".join(
            f" ({name!r} is the {split} split; rename it if it is a class)" for split, name in others.items()
        )
        return UserError(f"data.root {root}: no training split{found}, expected {LAYOUTS[cfg.dataset]}")
    usual = " or ".join(DEFAULT_LISTS.get(cfg.dataset, {}).get("train", ()))
    problem = f"no {usual} in {root}. Copy it there or set" if usual else "empty. Set"
    return UserError(f"data.train_list: {problem} data.train_list=FILE{_hint(cfg)}.")


def number_alike(splits: dict[str, LongTailSet], places: Places) -> dict[str, LongTailSet]:
    """Renumber all splits by the training split's classes, if present.

    Lists without names get those of ``names_file``. Without any names, K is the largest label of all splits + 1.

    Raises:
        UserError: classes differ, or the file has the wrong number of names.
    """
    train = splits.get("train")
    unnamed = {split: images for split, images in splits.items() if images.class_names is None}
    if unnamed and not (train and train.class_names):
        largest = max(images.num_classes for images in unnamed.values())
        names = _class_names(places.names_file, largest, exact="train" in unnamed)
        classes = Classes("", len(names) if names else largest, names)
        splits = splits | {split: renumber(images, classes, "") for split, images in unnamed.items()}
    if train := splits.get("train"):
        classes = Classes("the training split", train.num_classes, train.class_names)
        splits = {split: renumber(images, classes, places.what[split]) for split, images in splits.items()}
    return splits


def renumber(images: LongTailSet, classes: Classes, what: str, exact: bool = False) -> LongTailSet:
    """Renumber a split by ``classes``: by name if both have names, else by position.

    Args:
        what: location of the split, for messages.
        exact: refuse a set without names that has fewer classes.

    Raises:
        UserError: a class with images is not in ``classes``, or a set without names has another number of classes.
    """
    labels_N, names = images.labels, images.class_names
    if names and classes.names:
        used = [label for label, count in enumerate(images.counts) if count]
        if names != classes.names:
            number_K = np.full(len(names), -1)
            shown = [names[label] for label in used]
            number_K[used] = match_names(shown, classes.names, what, classes.whose, subset=True)
            labels_N = number_K[labels_N]
    elif images.num_classes > classes.num_classes or ((names or exact) and images.num_classes < classes.num_classes):
        raise UserError(
            f"{what}: got {counted(images.num_classes, 'class')}, expected the {classes.num_classes} of "
            f"{classes.whose}. Use data with the same classes."
        )
    elif classes.whose and bool(names) != bool(classes.names):
        log.warning("%s: classes matched to %s by position, because only one of the two has names", what, classes.whose)
    counts = class_counts(labels_N, classes.num_classes)
    return replace(images, labels=labels_N, counts=counts, class_names=classes.names or names)


def _root(cfg: DataConfig) -> str:
    if cfg.dataset == "fashion_mnist_lt" and not cfg.root:
        from fastdeitlt.data.sets import embedded

        return str(embedded.unpack())
    root = os.path.expanduser(cfg.root)
    if not root:
        whose = "the" if cfg.dataset in ("list", "folder", "shards") else f"{cfg.dataset}'s"
        raise UserError(f"data.root: empty, expected the folder of {whose} images. Set data.root=FOLDER{_hint(cfg)}.")
    if not os.path.isdir(root):
        raise UserError(f"data.root: no such folder {root!r}{_hint(cfg)}")
    return root


def _hint(cfg: DataConfig) -> str:
    """Return the hint appended to missing-data errors."""
    return f" ({LAYOUTS[cfg.dataset]})" if cfg.dataset in LAYOUTS else ""


def _find_folders(cfg: DataConfig) -> Places:
    root = _root(cfg)
    folders, others = split_folders(root)
    shares, remarks = {}, []
    if not folders:
        folders, shares = {"train": os.curdir}, FLAT_HOLDOUTS
        message = f"no split folders in {root}: class folders are split by class, reproducibly"
        remarks.append(Finding("note", "train", message))
    elif others:
        usual = "; ".join(", ".join(names) for names in SPLIT_FOLDERS.values())
        message = f"folders ignored because they are not named as a split ({usual}): {listed(others)}"
        remarks.append(Finding("warning", "train", message))
    readers = {split: partial(read_folder, root, folder) for split, folder in folders.items()}
    what = {split: f"data folder {Path(root) / folder}" for split, folder in folders.items()}
    return Places(readers, what, shares, remarks=tuple(remarks))


def _find_shards(cfg: DataConfig) -> Places:
    root = _root(cfg)
    shards = split_shards(root)
    is_whole = list(shards) == ["train"] and not names_split(shards["train"][0])
    shares: dict[str, float] = FLAT_HOLDOUTS if is_whole else {}
    remark = Finding(
        "note", "train", f"no shard in {root} is named as a split: images are split by class, reproducibly"
    )
    readers = {split: partial(read_shards, root, names) for split, names in shards.items()}
    what = {split: f"shards {Path(root) / names[0]}, ..." for split, names in shards.items()}
    return Places(readers, what, shares, Path(root) / "classes.txt", (remark,) if is_whole else ())


def _find_list(cfg: DataConfig, root: str, split: str, required: bool) -> Path | None:
    """Return a split's list file: the configured one, else the default if it exists."""
    if named := getattr(cfg, f"{split}_list"):
        places = [place for place in (Path(root) / named, Path(os.path.expanduser(named))) if place.is_file()]
        file = next(iter(places), None)
        if len(places) == 2 and not places[0].samefile(places[1]):
            raise UserError(
                f"data.{split}_list: got {named!r}, which is a file both in {root} and in the current folder, expected "
                "one file. Use an absolute path."
            )
        if required and file is None:
            raise UserError(f"data.{split}_list: no such file {named!r}, also not in {root}. Set an existing list.")
        return file
    usual = DEFAULT_LISTS.get(cfg.dataset, {}).get(split, ())
    return next((Path(root) / name for name in usual if (Path(root) / name).is_file()), None)


def _class_names(file: Path | None, num_classes: int, exact: bool) -> list[str] | None:
    """Read a file of class names, one per line; None if it does not exist."""
    if file is None or not file.is_file():
        return None
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class names {file}: cannot be read ({error}), expected one name per line in UTF-8") from None
    if len(names) < num_classes or (exact and len(names) > num_classes):
        raise UserError(
            f"class names {file}: got {counted(len(names), 'name')}, expected one for each of the {num_classes} "
            "classes of the lists. Write one name per line, in the order of the labels."
        )
    return names
