"""Signs that DeiT-LT is failing, checked at each evaluation once re-weighting has started.

A DIST head that is no better than CLS on the tail, too large a loss of accuracy on the head classes, and overfitted
tail classes. Each is described in words with its figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdeitlt.data.sets.counts import class_order, shot_groups
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.evaluation.metrics import Result

SPLIT = "official"
HEAD_DROP = 10.0
"""Largest acceptable loss on head classes against the baseline, in points."""
TAIL_FALL = 5.0
"""Largest acceptable loss on held-out tail images, in points; or two standard errors, if those are more."""
NUM_TAIL_IMAGES = 1024
"""Maximum number of training images of tail classes to score at each evaluation."""


@dataclass(frozen=True)
class Reading:
    """One evaluation of some weights."""

    epoch: int
    """Epoch, from 0."""
    scores: Result
    """Scores on the images that select the weights."""
    tail_seen: Result
    """Scores on training images of tail classes, not augmented."""


@dataclass(frozen=True)
class Sign:
    """Result of one check."""

    name: str
    """"tail expert", "head" or "overfitting"."""
    seen: bool
    """Whether the run has the problem."""
    text: str
    """Description with figures."""


def tail_images(images: LongTailSet, dataset: str) -> LongTailSet:
    """Return training images of the tail classes (official split), evenly spaced."""
    tail_N = np.flatnonzero(np.isin(images.labels, shot_groups(images.counts, SPLIT, dataset)["tail"].numpy()))
    return images.take(tail_N[np.linspace(0, len(tail_N) - 1, min(NUM_TAIL_IMAGES, len(tail_N))).astype(np.int64)])


def check(readings: Sequence[Reading], drw_epoch: int, baseline_head: float = 0.0) -> list[Sign]:
    """Return the signs at the last reading.

    Args:
        readings: readings of the same weights, in order; the last is of an epoch with re-weighting.
        drw_epoch: first re-weighted epoch.
        baseline_head: accuracy in per cent on head classes to compare with; 0 = AVG's best before re-weighting.

    Returns:
        The signs that can be judged: none about the head classes without a reading before re-weighting or a baseline,
        none about a group without images, none about DIST's lead where both heads are right on the whole tail.
    """
    now, after = readings[-1], [reading for reading in readings if reading.epoch >= drw_epoch]
    before = [reading for reading in readings if reading.epoch < drw_epoch]
    found = [_tail_expert(now), _head(now, before, baseline_head), _overfitting([*before[-1:], *after])]
    return [sign for sign in found if sign]


def _tail_expert(now: Reading) -> Sign | None:
    cls, dist = (now.scores.accuracy(head, "tail", SPLIT) for head in ("CLS", "DIST"))
    if np.isnan(cls) or dist == cls == 100:
        return None
    if dist > cls:
        return Sign("tail expert", False, f"DIST leads CLS on the tail: {dist:.1f} to {cls:.1f} %")
    return Sign(
        "tail expert",
        True,
        f"DIST does not lead CLS on the tail: {dist:.1f} to {cls:.1f} %. Check the teacher's accuracy on the tail "
        "(analyze teacher) and the strength of the augmentation",
    )


def _head(now: Reading, before: Sequence[Reading], baseline_head: float) -> Sign | None:
    value = now.scores.accuracy("AVG", "head", SPLIT)
    own = [reading.scores.accuracy("AVG", "head", SPLIT) for reading in before]
    if np.isnan(value) or not (own or baseline_head):
        return None
    baseline = baseline_head or max(own)
    what = "evaluate.baseline_head" if baseline_head else "best before re-weighting"
    figures = f"{value:.1f} %, {what}: {baseline:.1f} %"
    if baseline - value <= HEAD_DROP:
        return Sign("head", False, f"AVG keeps the head accuracy: {figures}")
    return Sign(
        "head",
        True,
        f"AVG lost {baseline - value:.1f} points on the head classes: {figures}. Re-weighting is too strong: use a "
        "later loss.drw_epoch, a smaller loss.drw_beta or a smaller loss.alpha",
    )


def _overfitting(readings: Sequence[Reading]) -> Sign | None:
    """Check whether tail accuracy falls on held-out, but not on training images.

    The first reading is the last before re-weighting, if any.
    """
    now = readings[-1]
    held_out, on_training = _on_tail(now)
    if np.isnan(held_out) or np.isnan(on_training):
        return None
    best = max(readings, key=lambda reading: _on_tail(reading)[0])
    best_held_out, best_on_training = _on_tail(best)
    figures = f"{held_out:.1f} % on held-out images, {on_training:.1f} % on training images"
    if best.epoch != now.epoch:
        figures += f" (epoch {best.epoch + 1}: {best_held_out:.1f} and {best_on_training:.1f} %)"
    tail_classes = class_order(now.scores.counts_K)[-now.scores.num_classes[SPLIT]["tail"] :]
    num_images = int(np.array(now.scores.support_K)[tail_classes].sum())
    margin = max(TAIL_FALL, 2 * (best_held_out * (100 - best_held_out) / num_images) ** 0.5)
    if best_held_out - held_out <= margin or on_training < best_on_training:
        return Sign("overfitting", False, f"tail classes are not overfitted: {figures}")
    return Sign(
        "overfitting",
        True,
        f"tail classes are overfitted: {figures}. Use stronger augmentation, a later loss.drw_epoch or a smaller "
        "loss.drw_beta; the best epoch is in checkpoints/best",
    )


def _on_tail(reading: Reading) -> tuple[float, float]:
    """Return AVG's tail accuracy in per cent: held-out, training images."""
    return reading.scores.accuracy("AVG", "tail", SPLIT), reading.tail_seen.accuracy("AVG", "tail", SPLIT)
