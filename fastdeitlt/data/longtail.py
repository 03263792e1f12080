"""Stage 1: the data sets, how many images each class has, and what follows from that (weights, head/mid/tail, order).

N images in the set, K classes, H height, W width, C channels.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.folders import read_folder
from fastdeitlt.data.lists import LongTailSet, class_counts, read_list
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
    "hold_out",
    "open_sets",
    "read_folder",
    "read_list",
    "shot_groups",
]

SPLITS = ("train", "val", "test")
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
OFFICIAL_BOUNDS = {10: (3, 7), 100: (36, 71), 1000: (390, 835), 8142: (842, 4543)}
"""Number of classes -> (first mid class, first tail class) in frequency order, as the official code has them for
CIFAR-10-LT, CIFAR-100-LT, ImageNet-LT and iNaturalist-2018, whatever the imbalance (DeiT-LT utils and main.py)."""


@dataclass(frozen=True)
class Sets:
    """The splits of a data set; all have the same K classes."""

    train: LongTailSet
    val: LongTailSet | None = None
    test: LongTailSet | None = None
    held_out: bool = False
    """Whether val was taken out of the training list (``data.val_holdout``)."""

    def __iter__(self) -> Iterator[tuple[str, LongTailSet]]:
        """(name, split) of the splits there are."""
        for name in SPLITS:
            if (images := getattr(self, name)) is not None:
                yield name, images

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(images):,}" for name, images in self)
        return f"{self.num_classes} classes, {sizes}"

    @property
    def num_classes(self) -> int:
        """K."""
        return self.train.num_classes


def cifar_lt_counts(n_total: int, classes: int, imb_factor: float, kind: str = "exp") -> list[int]:
    """Images of each class [K] of a long tail cut from a balanced set of ``n_total`` images.

    exp: ``int(n_max * imb_factor^(i / (K - 1)))``; step: the first half of the classes whole, the others cut to
    ``int(n_max * imb_factor)``; ``n_max = n_total / K``. Source: LDAM-DRW imbalance_cifar.py (Cao et al. 2019).

    Raises:
        UserError: fewer than one image a class, imb_factor outside (0, 1], an unknown kind.
    """
    if classes < 1 or n_total < classes:
        raise UserError(f"long tail: got {n_total} images of {classes} classes, expected at least one image a class")
    if not 0 < imb_factor <= 1:
        raise UserError(f"imbalance_factor: got {imb_factor}, expected smallest / largest class size in (0, 1]")
    largest = n_total / classes
    if kind == "exp":
        return [int(largest * imb_factor ** (i / max(classes - 1.0, 1.0))) for i in range(classes)]
    if kind == "step":
        return [int(largest if i < classes // 2 else largest * imb_factor) for i in range(classes)]
    raise UserError(f"imbalance_kind: got {kind!r}, expected 'exp' or 'step'")


def drw_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Weights of deferred re-weighting, float32 [K], summing to K: the inverse effective number of samples.

    ``w_k ~ (1 - beta) / (1 - beta^N_k)``. A class without images has weight 0 (it has no effective number) and the
    others share the whole sum. Source: Cui et al. 2019, eq. 2; DeiT-LT main.py.

    Raises:
        UserError: beta outside [0, 1), a negative count, no images at all.
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
    """Classes from the most to the least frequent, int64 [K]; ties keep their order (stable)."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def class_map(counts: Sequence[int]) -> Tensor:
    """Class -> its rank by frequency, int64 [K]; ties keep their order.

    The official ImageNet-LT and iNaturalist students number their classes so (but with an unstable sort, which is why
    a checkpoint must carry its own map). Source: DeiT-LT datasets.py.
    """
    return torch.from_numpy(np.argsort(class_order(counts), kind="stable"))


def shot_groups(counts: Sequence[int], split: str = "threshold", dataset: str | None = None) -> dict[str, Tensor]:
    """Classes of the head, the middle and the tail: {"head", "mid", "tail"} -> int64 class ids in rising order.

    threshold: more than 100 training images, 20 to 100, fewer than 20 (Liu et al. 2019); a class without images is in
    the tail. official: the index ranges of the DeiT-LT code after sorting classes by frequency (stable), known by the
    number of classes, see ``OFFICIAL_BOUNDS``; data sets it does not know are cut into thirds of the classes, see
    ``has_official_split``. Published rows mix both, so a tail accuracy means nothing without its split.

    Args:
        counts: training images of each class [K].
        dataset: name of the data set; None: whatever has that many classes.

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
    thirds = (classes // 3, classes - classes // 3)
    bounds = OFFICIAL_BOUNDS[classes] if has_official_split(classes, dataset) else thirds
    groups = zip(("head", "mid", "tail"), np.split(class_order(counts_K), bounds), strict=True)
    return {name: torch.from_numpy(np.sort(ids)) for name, ids in groups}


def has_official_split(classes: int, dataset: str | None = None) -> bool:
    """Whether the official code has index ranges for a data set; ``dataset`` as in ``shot_groups``."""
    known = (None, "cifar10_lt", "cifar100_lt", "imagenet_lt", "inat18")
    return dataset in known and classes in OFFICIAL_BOUNDS


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
    if cfg.dataset in ("cifar10_lt", "cifar100_lt"):
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
