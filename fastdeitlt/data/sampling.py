"""Class-balancing samplers of the long-tail literature, drawn without state.

Source: Kang et al. 2020, arXiv 1910.09217, equations 1 to 3.
"""

# N images in the set, K classes

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastdeitlt.config import DataConfig
from fastdeitlt.data.augment import counter

Kind = Literal["class_balanced", "sqrt", "progressive"]
START, MEMBER, PLACE = 220, 221, 222
"""Streams of the generator."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """Draw N images per epoch by class shares; a pure function of (seed, epoch).

    Args:
        kind: class_balanced (equal shares), sqrt (square root of the class size), progressive (proportional to size in
            the first epoch, then linearly towards equal shares).
        labels_N: class of each image.
        epochs: length of the run.
        seed: seed of the run.
    """

    kind: Kind
    labels_N: np.ndarray
    epochs: int
    seed: int

    def shares(self, epoch: int) -> np.ndarray:
        """Return each class's share of an epoch, float64 [K]; 0 for an empty class."""
        counts_K = np.bincount(self.labels_N).astype(np.float64)
        by_size_K, alike_K = counts_K / counts_K.sum(), (counts_K > 0) / (counts_K > 0).sum()
        match self.kind:
            case "class_balanced":
                return alike_K
            case "sqrt":
                return np.sqrt(counts_K) / np.sqrt(counts_K).sum()
            case "progressive":
                done = epoch / self.epochs
                return (1 - done) * by_size_K + done * alike_K

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's images in order and their occurrence so far, two int64 [N].

        A class appears its share of N times, rounded randomly without bias. The images of a class appear equally
        often, or differ by one.
        """
        num_images = len(self.labels_N)
        start = counter.uniform(counter.keys(self.seed, epoch), START, 1)[0, 0]
        ends_K = np.floor(num_images * self.shares(epoch).cumsum() + start).astype(np.int64)
        ends_K[-1] = num_images  # the last class has images; the sum of the shares is 1 but for rounding
        shown_K = np.diff(ends_K, prepend=0)
        key_N = counter.keys(self.seed, epoch, np.arange(num_images))
        by_class_N = np.lexsort((counter.words(key_N, MEMBER, 1)[:, 0], self.labels_N))
        counts_K = np.bincount(self.labels_N)
        first_K = counts_K.cumsum() - counts_K
        label_N = np.repeat(np.arange(len(counts_K)), shown_K)
        number_N = np.arange(num_images) - np.repeat(ends_K - shown_K, shown_K)
        occurrence_N, member_N = np.divmod(number_N, counts_K[label_N])
        order_N = counter.words(key_N, PLACE, 1)[:, 0].argsort(kind="stable")
        return by_class_N[first_K[label_N] + member_N][order_N], occurrence_N[order_N]


def sampling_of(cfg: DataConfig, labels_N: np.ndarray | None, epochs: int, seed: int) -> Sampling | None:
    """Return the sampler of ``data.sampling``; None for instance, or without labels."""
    if cfg.sampling == "instance" or labels_N is None:
        return None
    return Sampling(cfg.sampling, labels_N, epochs, seed)
