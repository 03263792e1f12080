"""Stage 1: open a data set. Its types are in sets.py, what follows from its class counts in counts.py; both from here.

N images in the set, K classes.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdeitlt.config import DataConfig
from fastdeitlt.data.counts import (
    CIFAR_CLASSES,
    cifar_lt_counts,
    class_map,
    class_order,
    drw_weights,
    has_official_split,
    shot_groups,
)
from fastdeitlt.data.folders import read_folder
from fastdeitlt.data.lists import read_list
from fastdeitlt.data.sets import SPLITS, LongTailSet, Sets, class_counts
from fastdeitlt.errors import UserError

__all__ = [
    "DEFAULT_LISTS",
    "LongTailSet",
    "Sets",
    "cifar_lt_counts",
    "class_counts",
    "class_map",
    "class_order",
    "drw_weights",
    "has_official_split",
    "hold_out",
    "open_sets",
    "read_folder",
    "read_list",
    "shot_groups",
]

HOLDOUT_SEED = 0
DEFAULT_LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "fashion_mnist_lt": {"train": ("train.txt",), "val": ("val.txt",), "test": ("test.txt",)},
    "imagenet_lt": {split: (f"ImageNet_LT_{split}.txt", f"Imagenet_LT_{split}.txt") for split in SPLITS},
    # published iNaturalist numbers are on its validation set, so that is the test set
    "inat18": {
        "train": ("iNaturalist18_train.txt", "train2018.json"),
        "test": ("iNaturalist18_val.txt", "val2018.json"),
    },
    "places_lt": {split: (f"Places_LT_{split}.txt",) for split in SPLITS},
}
"""Names of the published lists under data.root, in the order they are looked for."""
SOURCES = {
    "imagenet_lt": "images: ILSVRC 2012 of image-net.org, as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; lists: "
    "ImageNet_LT_{train,val,test}.txt of github.com/zhmiao/OpenLongTailRecognition-OLTR",
    "inat18": "train_val2018/, train2018.json and val2018.json of github.com/visipedia/inat_comp/tree/master/2018",
    "places_lt": "images: Places365 of places2.csail.mit.edu, 256 x 256, so that data_256/a/airfield/*.jpg is there; "
    "lists: Places_LT_{train,val,test}.txt of github.com/zhmiao/OpenLongTailRecognition-OLTR",
    "folder": "train/<class>/<image>, and val/ and test/ of the same form",
}
"""Where the published sets come from and how they lie under data.root, for a message that one is not there."""


def hold_out(images: LongTailSet, share: float, seed: int = HOLDOUT_SEED) -> tuple[LongTailSet, LongTailSet]:
    """Set ``share`` of each class aside: (what stays, what is held out), always the same for a seed.

    Rounded to whole images, so classes with fewer than 0.5 / share images give none; one image always stays. Both
    keep the order of the list.

    Raises:
        UserError: nothing would be held out.
    """
    generator = np.random.RandomState(seed)
    held_N = np.zeros(len(images), dtype=bool)
    for members in np.split(np.argsort(images.labels, kind="stable"), np.cumsum(images.counts)[:-1]):
        num_held = min(int(len(members) * share + 0.5), len(members) - 1)
        held_N[generator.permutation(members)[: max(num_held, 0)]] = True
    if not held_N.any():
        raise UserError(
            f"data.val_holdout: got {share}, but the largest class has {max(images.counts)} images, so none would be "
            "held out; use a larger share or 0"
        )
    return images.take(np.flatnonzero(~held_N)), images.take(np.flatnonzero(held_N))


def open_sets(cfg: DataConfig) -> Sets:
    """Open the splits that ``cfg`` names. Reads lists and class folders, not images (CIFAR: its archive).

    Names of the classes come from the list (csv, json), the folders, or the lines of root/classes.txt.

    Raises:
        UserError: a missing root, list or archive, or a faulty list; see ``read_list``.
    """
    if cfg.dataset in CIFAR_CLASSES:
        from fastdeitlt.data import cifar  # torchvision is slow to import

        sets = cifar.open_cifar(cfg)
    elif cfg.dataset == "folder":
        root = _root(cfg)
        train = read_folder(root, "train")
        others = {s: read_folder(root, s, train.class_names) for s in SPLITS[1:] if (Path(root) / s).is_dir()}
        sets = Sets(train, others.get("val"), others.get("test"))
    else:
        sets = _open_lists(cfg)
    if sets.val is None and cfg.val_holdout:
        train, val = hold_out(sets.train, cfg.val_holdout)
        sets = Sets(train, val, sets.test, held_out=True)
    return sets


def _root(cfg: DataConfig) -> str:
    if cfg.dataset == "fashion_mnist_lt" and not cfg.root:
        from fastdeitlt import embedded

        return str(embedded.unpack())
    root = os.path.expanduser(cfg.root)
    if not root:
        whose = "the" if cfg.dataset in ("list", "folder") else f"{cfg.dataset}'s"
        raise UserError(
            f"data.root: got nothing, expected the folder of {whose} images; set data.root=FOLDER{_source(cfg)}"
        )
    if not os.path.isdir(root):
        raise UserError(f"data.root: no such folder {root!r}{_source(cfg)}")
    return root


def _source(cfg: DataConfig) -> str:
    """The end of a message that something of a data set is not there."""
    return f" ({SOURCES[cfg.dataset]})" if cfg.dataset in SOURCES else ""


def _find_list(cfg: DataConfig, root: str, split: str) -> Path | None:
    """The list file of a split: the one that is named, else the data set's usual one if it is there."""
    if named := getattr(cfg, f"{split}_list"):
        places = [Path(named).expanduser(), Path(root) / named]
        for place in places:
            if place.is_file():
                return place
        raise UserError(f"data.{split}_list: no such file {named!r} (nor under {root}); give an existing list")
    usual = DEFAULT_LISTS.get(cfg.dataset, {}).get(split, ())
    return next((Path(root) / name for name in usual if (Path(root) / name).is_file()), None)


def _open_lists(cfg: DataConfig) -> Sets:
    root = _root(cfg)
    files = {split: _find_list(cfg, root, split) for split in SPLITS}
    if files["train"] is None:
        usual = " or ".join(DEFAULT_LISTS.get(cfg.dataset, {}).get("train", ()))
        looked = f"no {usual} under {root}; put it there or set" if usual else "got nothing; set"
        raise UserError(f"data.train_list: {looked} data.train_list=FILE{_source(cfg)}")
    train = read_list(files["train"], root)
    names = train.class_names or _class_names(Path(root) / "classes.txt")
    found = {"train": train} | {
        split: read_list(file, root, class_names=train.class_names)
        for split, file in files.items()
        if file is not None and split != "train"
    }
    classes = max(images.num_classes for images in found.values())
    names = names if names and len(names) == classes else None
    found = {
        split: replace(images, counts=class_counts(images.labels, classes), class_names=names)
        for split, images in found.items()
    }
    return Sets(found["train"], found.get("val"), found.get("test"))


def _class_names(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class names {file}: cannot be read ({error}); give one name a line in UTF-8") from None
