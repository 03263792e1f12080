"""Recommendation of a run's best model: teacher or one of the student's heads, by balanced validation accuracy.

K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdeitlt.errors import counted
from fastdeitlt.evaluation.metrics import HeadResult, Result, wilson_interval

METHOD = "Wilson intervals of the classes, combined for their mean (MOVER, 95 %)"


@dataclass(frozen=True)
class Scored:
    """Balanced validation accuracy of one model or head, in per cent."""

    name: str
    """TEACHER, AVG, CLS or DIST."""
    accuracy: float
    low: float
    """Lower end of the 95 % interval."""
    high: float


@dataclass(frozen=True)
class Recommendation:
    """Scores of all models and heads, best first."""

    scored: tuple[Scored, ...]
    num_images: int
    """Number of validation images."""

    @property
    def best(self) -> Scored:
        """Recommended model or head."""
        return self.scored[0]

    @property
    def alike(self) -> tuple[str, ...]:
        """Others whose difference from the best has an interval with zero (MOVER)."""
        below = self.best.accuracy - self.best.low
        return tuple(
            other.name
            for other in self.scored[1:]
            if self.best.accuracy - other.accuracy <= math.hypot(below, other.high - other.accuracy)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        return {**asdict(self), "by": "balanced validation accuracy", "interval": METHOD}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Recommendation":
        """Build a recommendation from ``to_json``'s tree."""
        return cls(tuple(Scored(**scored) for scored in tree["scored"]), tree["num_images"])

    def sentence(self) -> str:
        """Return the recommendation as a sentence."""
        best, others = self.best, self.scored[1:]
        text = (
            f"use {best.name}: balanced accuracy {best.accuracy:.1f} % ({best.low:.1f} to {best.high:.1f}) on "
            f"{counted(self.num_images, 'validation image')}"
        )
        if others:
            text += "; " + ", ".join(f"{other.name} {other.accuracy:.1f}" for other in others)
        if self.alike:
            text += f". Not distinguishable on these images: {', '.join(self.alike)}"
        return text


def recommend(student: Result | None, teacher: Result | None) -> Recommendation | None:
    """Rank the teacher and the student's heads by validation scores.

    The scores are on the same images; None without any. Ties are in the order AVG, CLS, DIST, teacher.
    """
    heads: dict[str, tuple[HeadResult, Result]] = {}
    for result in (student, teacher):
        if result is not None:
            heads |= {name: (head, result) for name, head in result.heads.items()}
    if not heads:
        return None
    scored = [
        Scored(name, head.balanced_accuracy, *balanced_interval(head.correct_K, result.support_K))
        for name, (head, result) in heads.items()
    ]
    num_images = max(result.num_images for _, result in heads.values())
    return Recommendation(tuple(sorted(scored, key=lambda s: -s.accuracy)), num_images)


def balanced_interval(correct_K: list[int], support_K: list[int]) -> tuple[float, float]:
    """Return the 95 % interval of the mean class accuracy in per cent.

    Classes without images are ignored.

    The distance of each end from the mean is the root of the summed squares of the classes' Wilson distances, over the
    number of classes. Unlike a bootstrap, it has a spread even if all or none of a class's few images are right.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures" (MOVER).
    """
    support = np.array(support_K)
    correct, total = np.array(correct_K)[support > 0], support[support > 0]
    share_K = 100 * correct / total
    low_K, high_K = wilson_interval(correct, total).T
    mean, number = share_K.mean(), len(total)
    below = np.sqrt(np.square(share_K - low_K).sum()) / number
    above = np.sqrt(np.square(high_K - share_K).sum()) / number
    return float(max(mean - below, 0.0)), float(min(mean + above, 100.0))
