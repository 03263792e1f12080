"""What a data set is to everything after it: paths or pixels, labels, images of each class.

N images in the set, K classes, H height, W width, C channels.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

from fastdeitlt.data.sets.blobs import Blob, Blobs
from fastdeitlt.errors import UserError

SPLITS = ("train", "val", "test")
Level = Literal["error", "warning", "note"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """Something to know about a data set. An error stops ``data check`` with exit code 2."""

    level: Level
    split: str
    message: str
    examples: tuple[str, ...] = ()


def class_counts(labels: np.ndarray, num_classes: int) -> list[int]:
    """Images of each class [K] of labels int64 [N]."""
    return [int(n) for n in np.bincount(labels, minlength=num_classes)]


@dataclass(frozen=True, eq=False)
class LongTailSet:
    """Images of one split: where they are and what they show."""

    paths: list[str] = field(repr=False)
    """Image files relative to root (sets that come decoded: the image's name)."""
    labels: np.ndarray = field(repr=False)
    """Class of each image, int64 [N]."""
    counts: list[int] = field(repr=False)
    """Images of each class [K]; a class without images has 0."""
    root: str = ""
    """Folder the paths are relative to."""
    class_names: list[str] | None = field(default=None, repr=False)
    """Name of each class [K]."""
    images_NHWC: np.ndarray | None = field(default=None, repr=False)
    """Pixels, uint8 RGB, for sets that come decoded (CIFAR, Fashion-MNIST)."""
    left_out: list[str] = field(default_factory=list, repr=False)
    """Files beside the images that are not images by name, or in no class folder."""
    blobs: Blobs | None = field(default=None, repr=False)
    """Where images lie inside shards; ``paths`` are then their names."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    def place(self, sample: int) -> str | Blob:
        """Return the file of an image, or where it lies in one."""
        return self.blobs[sample] if self.blobs else self.name(sample)

    def name(self, sample: int) -> str:
        """Return what messages call an image: its path with the root."""
        return os.path.join(self.root, self.paths[sample])

    def take(self, chosen: np.ndarray) -> "LongTailSet":
        """The images with the indices ``chosen``, in that order; the same K classes."""
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
        """Return the first result of ``use`` that is not None: of the image, else of the others of its class.

        These follow it in the list, wrapping around.

        Raises:
            UserError: ``use`` gives None for all of them.
        """
        members = np.flatnonzero(self.labels == self.labels[sample])
        for candidate in np.roll(members, -int(np.searchsorted(members, sample))).tolist():
            if (result := use(candidate)) is not None:
                return result
        raise UserError(
            f"image {self.name(sample)}: cannot be read, nor can any that could stand in for it; repair or remove them"
        )


@dataclass(frozen=True)
class Sets:
    """The splits of a data set; all have the same K classes."""

    train: LongTailSet
    val: LongTailSet | None = None
    test: LongTailSet | None = None
    held_out: tuple[str, ...] = ()
    """Splits taken out of the training images (``data.val_holdout``, ``data.test_holdout``)."""
    remarks: tuple[Finding, ...] = ()
    """What to report about how the splits were found."""

    def __iter__(self) -> Iterator[tuple[str, LongTailSet]]:
        """(name, split) of the splits there are."""
        for name in SPLITS:
            if (images := getattr(self, name)) is not None:
                yield name, images

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(images):,}" for name, images in self)
        return f"{self.num_classes} class{'' if self.num_classes == 1 else 'es'}, {sizes}"

    @property
    def num_classes(self) -> int:
        """K."""
        return self.train.num_classes
