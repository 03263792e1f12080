"""Types of a data set: findings, the images of a split, and the splits.

N images in the set, K classes, H height, W width, C channels.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

from fastdeitlt.data.sets.blobs import Blob, Blobs
from fastdeitlt.errors import UserError, counted

SPLITS = ("train", "val", "test")
Level = Literal["error", "warning", "note"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """An observation about a data set; an error sets exit code 2 of ``data check``."""

    level: Level
    split: str
    message: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.message} ({', '.join(self.examples)})" if self.examples else self.message


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """Count the images of each class [K] from labels int64 [N]."""
    return [int(n) for n in np.bincount(labels, minlength=num_classes)]


@dataclass(frozen=True, eq=False)
class LongTailSet:
    """The images of one split and their labels."""

    paths: list[str] = field(repr=False)
    """Image files relative to root; image names for decoded sets and shards."""
    labels: np.ndarray = field(repr=False)
    """Class of each image, int64 [N]."""
    counts: list[int] = field(repr=False)
    """Images of each class [K]; a class without images has 0."""
    root: str = ""
    """Folder of the relative paths."""
    class_names: list[str] | None = field(default=None, repr=False)
    """Name of each class [K]."""
    images_NHWC: np.ndarray | None = field(default=None, repr=False)
    """Pixels, uint8 RGB, for sets that come decoded (CIFAR, Fashion-MNIST)."""
    left_out: list[str] = field(default_factory=list, repr=False)
    """Ignored files: not named as images, or in no class folder."""
    blobs: Blobs | None = field(default=None, repr=False)
    """Locations of the images inside shards."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    def place(self, sample: int) -> str | Blob:
        """Return the file of an image, or its location in a shard."""
        return self.blobs[sample] if self.blobs else self.name(sample)

    def name(self, sample: int) -> str:
        """Return the name of an image in messages: its path with the root."""
        return os.path.join(self.root, self.paths[sample])

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number without names."""
        return self.class_names[label] if self.class_names else f"class {label}"

    def take(self, chosen: np.ndarray) -> "LongTailSet":
        """Return the images ``chosen``, in that order, with the same K classes."""
        labels = self.labels[chosen]
        return replace(
            self,
            paths=[self.paths[i] for i in chosen.tolist()],
            labels=labels,
            counts=class_counts(labels, self.num_classes),
            images_NHWC=None if self.images_NHWC is None else self.images_NHWC[chosen],
            blobs=self.blobs.take(chosen) if self.blobs else None,
        )

    def stand_in(self, sample: int, use: Callable[[int], T | None]) -> T:
        """Return the first non-None result of ``use`` for the image or its class.

        The others are tried in list order from the image on, wrapping around.

        Raises:
            UserError: ``use`` returns None for all of them.
        """
        members = np.flatnonzero(self.labels == self.labels[sample])
        for candidate in np.roll(members, -int(np.searchsorted(members, sample))).tolist():
            if (result := use(candidate)) is not None:
                return result
        raise UserError(
            f"image {self.name(sample)}: unreadable, as are all images of its class. Repair or remove them."
        )


@dataclass(frozen=True)
class Sets:
    """The splits of a data set; all have the same K classes."""

    train: LongTailSet
    val: LongTailSet | None = None
    test: LongTailSet | None = None
    held_out: tuple[str, ...] = ()
    """Splits held out of the training images (``data.val_holdout``, ``data.test_holdout``)."""
    remarks: tuple[Finding, ...] = ()
    """Findings about the locations of the splits."""

    def __iter__(self) -> Iterator[tuple[str, LongTailSet]]:
        """Yield (name, images) of each existing split."""
        for name in SPLITS:
            if (images := getattr(self, name)) is not None:
                yield name, images

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(images):,}" for name, images in self)
        return f"{counted(self.num_classes, 'class')}, {sizes}"

    @property
    def num_classes(self) -> int:
        """K."""
        return self.train.num_classes
