"""Hard decisions of a teacher on clean training images."""

# B batch, K classes, N images, C channels, H height, W width, P pairs of a decision and a label

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.data.augment.transform import normalise
from fastdeitlt.data.pixels.request import centre_crops
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.store.manifest import Preprocess

IMAGES = 4096
"""Target size of a balanced sample."""
MOST = 64
"""Most images per class in a sample."""
CLEAN_BATCH = 256
"""Images in a batch of ``clean_batches``."""
CYCLE_IMAGES = 4
"""Smallest gain of exchanging classes, in images beyond one for each class, which chance matches too."""
CYCLE_SHARE = 0.3
"""Smallest gain as a share of the classes' images."""


def class_sample(labels_N: np.ndarray, at_least: int = 2) -> np.ndarray:
    """Sample equally many images of each class, evenly spaced; all of a small one."""
    _, counts = np.unique(labels_N, return_counts=True)
    members = np.split(labels_N.argsort(kind="stable"), counts.cumsum()[:-1])
    each = max(at_least, min(MOST, IMAGES // len(members)))
    chosen = [ids[np.linspace(0, len(ids) - 1, min(each, len(ids))).astype(np.int64)] for ids in members]
    return np.sort(np.concatenate(chosen))


def clean_batches(source: Source, sample_N: np.ndarray, preprocess: Preprocess) -> Iterator[Tensor]:
    """Yield images_BCHW of the sample in order, with evaluation preprocessing."""
    for _, crops_BHWC in source.crops(centre_crops(sample_N, CLEAN_BATCH, preprocess.img_size, preprocess.resize)):
        yield normalise(crops_BHWC, preprocess.mean, preprocess.std)


@dataclass(frozen=True)
class Decisions:
    """A teacher's decision and the label of each image of a sample."""

    decided_N: np.ndarray
    labels_N: np.ndarray
    num_classes: int

    def class_accuracy(self) -> np.ndarray:
        """Return the accuracy of each class in %, float64 [K]; NaN for an empty class."""
        right_K = np.bincount(self.labels_N[self.decided_N == self.labels_N], minlength=self.num_classes)
        with np.errstate(invalid="ignore"):
            return 100 * right_K / self._images()

    def balanced(self) -> float:
        """Return the mean class accuracy in %."""
        return float(np.nanmean(self.class_accuracy()))

    def weighted(self, counts: Iterable[int]) -> float:
        """Return the accuracy in % over a set with ``counts`` images of each class."""
        accuracy_K = self.class_accuracy()
        weights_K = np.where(np.isnan(accuracy_K), 0, np.asarray(list(counts), float))
        return float(np.average(np.nan_to_num(accuracy_K), weights=weights_K))

    def commonest(self) -> tuple[int, float]:
        """Return the most frequent decision and its share in %, with equal class weights."""
        weights_N = 1 / self._images()[self.labels_N]
        weights_K = np.bincount(self.decided_N, weights=weights_N, minlength=self.num_classes)
        return int(weights_K.argmax()), 100 * float(weights_K.max() / weights_N.sum())

    def matched(self, group_K: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Match decisions and labels one to one, by their co-occurrence.

        Greedy by descending share of the label's images, so a clear pair is never given up for two doubtful ones. At
        equal shares, or without images, a decision keeps its own label if it is free.

        Args:
            group_K: group of each label; matches are within a group only. None: one group.

        Returns:
            label_K: the label of each decision. clear_K: whether no other pair of the two has as large a share.
        """
        group_K = np.zeros(self.num_classes, int) if group_K is None else group_K
        pairs_P, votes_P = np.unique(self.decided_N * self.num_classes + self.labels_N, return_counts=True)
        inside_P = group_K[pairs_P // self.num_classes] == group_K[pairs_P % self.num_classes]
        decision_P, label_P = np.divmod(pairs_P[inside_P], self.num_classes)
        share_P = votes_P[inside_P] / self._images()[label_P]
        label_K, taken_K = np.full(self.num_classes, -1), np.zeros(self.num_classes, bool)
        for i in np.lexsort((label_P, decision_P, decision_P != label_P, -share_P)):
            if label_K[decision_P[i]] < 0 and not taken_K[label_P[i]]:
                label_K[decision_P[i]], taken_K[label_P[i]] = label_P[i], True
        clear_P = self._only_largest(decision_P, share_P) & self._only_largest(label_P, share_P)
        clear_K = np.zeros(self.num_classes, bool)
        clear_K[decision_P[clear_P]] = True
        own_K = (label_K < 0) & ~taken_K
        label_K[own_K], taken_K[own_K] = np.flatnonzero(own_K), True
        left, free = np.flatnonzero(label_K < 0), np.flatnonzero(~taken_K)
        label_K[left[group_K[left].argsort(kind="stable")]] = free[group_K[free].argsort(kind="stable")]
        return label_K, clear_K

    def exchanged(self) -> np.ndarray:
        """Return label_K: matched labels of clearly exchanged classes, else the decision.

        A cycle of classes is exchanged if the matched labels are right on one more image for each class and
        ``CYCLE_IMAGES`` in all, and on average on ``CYCLE_SHARE`` more of a class's images, than the classes' own.
        """
        matched_K, _ = self.matched()
        images_K, label_K = self._images(), np.arange(self.num_classes)
        own_K = np.bincount(self.labels_N[self.decided_N == self.labels_N], minlength=self.num_classes)
        moved_N = self.labels_N[matched_K[self.decided_N] == self.labels_N]
        gain_K = np.bincount(moved_N, minlength=self.num_classes) - own_K
        share_K = gain_K / np.maximum(images_K, 1)
        seen_K = matched_K == label_K
        for start in np.flatnonzero(~seen_K):
            cycle = []
            while not seen_K[start]:
                seen_K[start] = True
                cycle.append(start)
                start = matched_K[start]
            if cycle and gain_K[cycle].sum() - len(cycle) >= CYCLE_IMAGES and share_K[cycle].mean() >= CYCLE_SHARE:
                label_K[cycle] = matched_K[cycle]
        return label_K

    def relabelled(self, label_K: np.ndarray) -> "Decisions":
        """Return the decisions mapped by ``label_K``."""
        return replace(self, decided_N=label_K[self.decided_N])

    def _only_largest(self, class_P: np.ndarray, share_P: np.ndarray) -> np.ndarray:
        """Return which pairs have the strictly largest share among their class's pairs."""
        largest_K = np.zeros(self.num_classes)
        np.maximum.at(largest_K, class_P, share_P)
        is_largest_P = share_P == largest_K[class_P]
        return is_largest_P & (np.bincount(class_P[is_largest_P], minlength=self.num_classes)[class_P] == 1)

    def _images(self) -> np.ndarray:
        return np.bincount(self.labels_N, minlength=self.num_classes)


def decide(teacher: Teacher, batches: Iterable[Tensor], labels_N: np.ndarray) -> Decisions:
    """Return a teacher's decisions as data-set labels, on student-normalised batches."""
    decided_N = torch.cat([teacher(images_BCHW).argmax(1) for images_BCHW in batches])
    if teacher.class_map is not None:
        decided_N = teacher.class_map[decided_N]
    return Decisions(decided_N.cpu().numpy(), labels_N, teacher.num_classes)
