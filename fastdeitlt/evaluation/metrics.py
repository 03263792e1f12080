"""Scores of logits: accuracy by head, by class size and per class, and calibration.

Accuracies are in per cent. "all" is over images; head, mid and tail are means of class accuracies, as in the official
code (val-iisc/DeiT-LT engine.py, ``evaluate``) and OLTR's ``shot_acc``. A class or group without images is NaN, not 0.
"""

# N images in the set, K classes

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from rich.table import Table
from torch import Tensor

from fastdeitlt.data.sets.counts import has_official_split, shot_groups
from fastdeitlt.errors import NonFiniteError, UserError, counted, first_fault

SELECT_BY = {"balanced": "mean class accuracy", "micro": "accuracy over images"}
"""Value of ``evaluate.select_by`` -> its description."""
GROUPS = ("all", "head", "mid", "tail")
LEFT_OUT = -100
"""Label of an image that could not be read."""
NUM_BINS = 15
CPU = torch.device("cpu")
CHUNK = 2**18  # logits scored at a time: bounds the float64 scratch memory
NUM_CONFUSIONS = 10
WILSON_Z = 1.959963984540054  # two-sided 95 %

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has no NaN
Grouped = dict[str, dict[str, Number]]  # split -> group -> value


@dataclass(frozen=True)
class Confusion:
    """Number of images of class ``label`` predicted as class ``predicted``."""

    label: int
    predicted: int
    num_images: int


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: mean confidence (0..1) and accuracy (0..1) of its images."""

    confidence: float
    accuracy: float
    num_images: int


@dataclass(frozen=True)
class HeadResult:
    """Scores of one set of logits. ``top1``, ``top5``, ``balanced_accuracy``, ``macro_f1`` and ``ece`` are per cent."""

    top1: Grouped
    top5: Grouped
    ece: Grouped
    nll: Grouped
    brier: Grouped
    balanced_accuracy: Number
    macro_f1: Number
    correct_K: list[int]
    confusions: list[Confusion]
    reliability: list[Bin]


@dataclass(frozen=True)
class Result:
    """Scores of a model on a set. ``heads`` has AVG, CLS and DIST for a student, TEACHER for a flat model."""

    heads: dict[str, HeadResult]
    counts_K: list[int]
    """Training images of each class, which define head, mid and tail."""
    support_K: list[int]
    """Images of each class in the scored set."""
    num_classes: dict[str, dict[str, int]]
    """split -> group -> number of classes."""
    thirds: bool = False
    """Whether ``official`` is thirds of the classes by size, because the data set has no published split."""
    left_out: int = 0
    """Images that could not be read and are not scored (``data.on_error=skip``)."""

    @property
    def num_images(self) -> int:
        """Number of scored images."""
        return sum(self.support_K)

    def size(self, what: str) -> str:
        """Return the number scored, such as ``9 images (without 1 unreadable)``."""
        left_out = f" (without {self.left_out:,} unreadable)" if self.left_out else ""
        return f"{self.num_images:,} {what}{left_out}"

    @property
    def main(self) -> str:
        """Name of the predicting head: AVG of a student, TEACHER of a flat model."""
        return next(iter(self.heads))

    def split_name(self, split: str = "official") -> str:
        """Return the title of a split."""
        return "thirds by class size" if self.thirds and split == "official" else f"{split} split"

    def accuracy(self, head: str | None = None, group: str = "all", split: str = "threshold") -> float:
        """Return a head's top-1 accuracy in per cent; NaN for a group without images.

        Args:
            head: default: the predicting one.
            group: all, head, mid or tail.
            split: threshold or official.

        Raises:
            UserError: the result lacks this head, group or split.
        """
        try:
            return self.heads[head or self.main].top1[split][group]
        except KeyError as error:
            top1 = self.heads[self.main].top1
            known = (self.heads, top1, next(iter(top1.values())))
            expected = "; ".join(", ".join(names) for names in known)
            raise UserError(f"accuracy: got {error.args[0]!r}, expected names of {expected}") from None

    def selection_accuracy(self, select_by: str) -> float:
        """Return the main head's accuracy in per cent for ``evaluate.select_by``."""
        head = self.heads[self.main]
        return head.balanced_accuracy if select_by == "balanced" else head.top1["threshold"]["all"]

    def class_accuracy(self, head: str) -> np.ndarray:
        """Return the classes' accuracy in per cent, float64 [K]; NaN without images."""
        with np.errstate(invalid="ignore"):
            return 100 * np.array(self.heads[head].correct_K) / np.array(self.support_K)

    def class_interval(self, head: str) -> np.ndarray:
        """Return the classes' Wilson 95 % intervals in per cent, float64 [K, 2]."""
        return wilson_interval(np.array(self.heads[head].correct_K), np.array(self.support_K))

    def to_json(self) -> dict[str, Any]:
        """Return standard JSON; NaN becomes None."""
        return json.loads(_RESULT.dump_json(self))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Result":
        """Build a result from ``to_json``'s tree.

        Raises:
            UserError: the tree is not a Result's.
        """
        try:
            return _RESULT.validate_python(tree)
        except ValidationError as error:
            raise UserError(f"result: {first_fault(error)}. Rerun `fastdeitlt eval`.") from None

    def table(self, split: str = "threshold", teacher: "Result | None" = None) -> Table:
        """Return a terminal table: heads, teacher and chance by all, head, mid, tail."""
        table = Table(title=f"top-1 accuracy in %, {self.split_name(split)}, {self.size('images')}")
        table.add_column("")
        for group in GROUPS:
            num_classes = len(self.counts_K) if group == "all" else self.num_classes[split][group]
            table.add_column(f"{group} ({num_classes})", justify="right")
        rows = {name: head.top1[split] for name, head in self.heads.items()}
        others = self.beside(split, teacher)
        for name, row in (rows | others).items():
            table.add_row(name, *(cell(row.get(group)) for group in GROUPS), style="dim" if name in others else "")
        return table

    def beside(
        self, split: str, teacher: "Result | None" = None, published: dict[str, float] | None = None
    ) -> dict[str, dict[str, float]]:
        """Return group -> per cent of teacher, uniform guess and published result."""
        rows = {"teacher": teacher.heads[teacher.main].top1[split]} if teacher else {}
        rows["chance"] = dict.fromkeys(GROUPS, 100 / len(self.counts_K))
        return rows | ({"published": published} if published else {})


_RESULT = TypeAdapter(Result)


def cell(value: float | None, digits: int = 1) -> str:
    """Format a number for a table, '-' for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def wilson_interval(correct: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return a proportion's Wilson interval in per cent, [..., 2]; NaN for total 0.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        z, share = WILSON_Z, correct / total
        centre = (share + z * z / (2 * total)) / (1 + z * z / total)
        half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return 100 * np.stack([np.maximum(centre - half, 0), np.minimum(centre + half, 1)], axis=-1)


def score(
    cls_logits_NK: Tensor,
    dist_logits_NK: Tensor,
    labels_N: Tensor,
    counts: Sequence[int],
    dataset: str | None = None,
    device: torch.device = CPU,
) -> Result:
    """Score a student's AVG, CLS and DIST, as the official ``engine.evaluate``.

    The order of the images does not matter. ``counts`` are the training images of each class, ``dataset`` the name
    whose official split is reported too. The arithmetic runs on ``device``, in chunks.

    Raises:
        UserError: no images, shapes disagree, or labels outside 0..K-1.
        NonFiniteError: a logit is NaN or infinite.
    """
    _check({"CLS": cls_logits_NK, "DIST": dist_logits_NK}, labels_N, len(counts))
    return score_heads(heads_of(cls_logits_NK, dist_logits_NK), labels_N, counts, dataset, device)


def heads_of(cls_logits_NK: Tensor, dist_logits_NK: Tensor) -> dict[str, Tensor]:
    """Return a student's logits by head: AVG (the mean, which predicts), CLS, DIST."""
    average_NK = (cls_logits_NK.float() + dist_logits_NK.float()) / 2
    return {"AVG": average_NK, "CLS": cls_logits_NK, "DIST": dist_logits_NK}


def score_heads(
    logits: dict[str, Tensor],
    labels_N: Tensor,
    counts: Sequence[int],
    dataset: str | None = None,
    device: torch.device = CPU,
) -> Result:
    """Score any logits [N, K] by name as ``score``; the first is ``Result.main``."""
    _check(logits, labels_N, len(counts))
    *parts, read_N = readable(*logits.values(), labels_N)
    labels_N, left_out = read_N.long().cpu(), len(labels_N) - len(read_N)
    num_classes = len(counts)
    class_ids = {split: shot_groups(counts, split, dataset) for split in ("threshold", "official")}
    return Result(
        heads={name: _score_head(head, labels_N, class_ids, device) for name, head in zip(logits, parts, strict=True)},
        counts_K=[int(count) for count in counts],
        support_K=torch.bincount(labels_N, minlength=num_classes).tolist(),
        num_classes={split: {group: len(ids) for group, ids in groups.items()} for split, groups in class_ids.items()},
        thirds=not has_official_split(num_classes, dataset),
        left_out=left_out,
    )


def readable(*parts: Tensor) -> tuple[Tensor, ...]:
    """Drop the images that could not be read from logits and, last, labels."""
    read_N = parts[-1] != LEFT_OUT
    return parts if read_N.all() else tuple(part[read_N.to(part.device)] for part in parts)


def _check(logits: dict[str, Tensor], labels_N: Tensor, num_classes: int) -> None:
    expected = (len(labels_N), num_classes)
    for name, head in logits.items():
        if tuple(head.shape) != expected:
            raise UserError(f"{name} logits: got shape {tuple(head.shape)}, expected {expected} (images, classes)")
        bad = int((~head.isfinite().all(dim=1)).sum())
        if bad:
            raise NonFiniteError(
                f"{name} logits: non-finite for {bad} of {counted(len(head), 'image')}; the weights have diverged"
            )
    (read_N,) = readable(labels_N)
    if len(read_N) == 0:
        raise UserError("evaluation: no images, expected at least one")
    low, high = int(read_N.min()), int(read_N.max())
    if low < 0 or high >= num_classes:
        raise UserError(f"labels: got {low}..{high}, expected 0..{num_classes - 1}. Use the data set of the model.")


def _score_head(
    logits_NK: Tensor, labels_N: Tensor, class_ids: dict[str, dict[str, Tensor]], device: torch.device
) -> HeadResult:
    num_classes = logits_NK.shape[1]
    rows = max(1, CHUNK // num_classes)
    chunks = zip(logits_NK.split(rows), labels_N.split(rows), strict=True)
    parts = [_per_image(part_NK.to(device), part_N.to(device)) for part_NK, part_N in chunks]
    predicted_N, confidence_N, hit_N, hit5_N, nll_N, brier_N = (
        torch.cat(column).cpu() for column in zip(*parts, strict=True)
    )

    def per_class(values_N: Tensor) -> Tensor:
        return torch.bincount(labels_N, weights=values_N.double(), minlength=num_classes)

    support_K = per_class(torch.ones_like(hit_N))
    correct_K = per_class(hit_N)
    predicted_K = torch.bincount(predicted_N, minlength=num_classes).double()

    def grouped(values_N: Tensor, scale: float = 1.0) -> Grouped:
        mean_K = scale * per_class(values_N) / support_K
        overall = {"all": scale * float(values_N.double().mean())}
        return {
            split: overall | {group: float(mean_K[ids].nanmean()) for group, ids in groups.items()}
            for split, groups in class_ids.items()
        }

    def group_ece(ids: Tensor) -> float:
        inside_N = torch.isin(labels_N, ids)
        return calibration_error(reliability_bins(confidence_N[inside_N], hit_N[inside_N]))

    bins = reliability_bins(confidence_N, hit_N)
    f1_K = 2 * correct_K / (support_K + predicted_K)
    return HeadResult(
        top1=grouped(hit_N, 100),
        top5=grouped(hit5_N, 100),
        ece={
            split: {"all": calibration_error(bins)} | {group: group_ece(ids) for group, ids in groups.items()}
            for split, groups in class_ids.items()
        },
        nll=grouped(nll_N),
        brier=grouped(brier_N),
        balanced_accuracy=100 * float((correct_K / support_K).nanmean()),
        macro_f1=100 * float(f1_K[support_K > 0].mean()),
        correct_K=correct_K.long().tolist(),
        confusions=_confusions(labels_N, predicted_N, num_classes),
        reliability=bins,
    )


def _per_image(logits_NK: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
    """Return predicted, confidence, top-1 hit, top-5 hit, NLL and Brier score, [N]."""
    largest_N1, predicted_N1 = logits_NK.max(dim=1, keepdim=True)
    predicted_N, own_N1 = predicted_N1.squeeze(1), labels_N[:, None]
    shifted_NK = logits_NK.double() - largest_N1
    own_N = shifted_NK.gather(1, own_N1).squeeze(1)
    exp_NK = shifted_NK.exp_()
    sum_N = exp_NK.sum(dim=1)
    nll_N = sum_N.log() - own_N
    top5_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
    brier_N = exp_NK.square_().sum(dim=1) / sum_N.square() - 2 * (-nll_N).exp() + 1
    return predicted_N, 1 / sum_N, predicted_N == labels_N, (top5_N5 == own_N1).any(dim=1), nll_N, brier_N


def reliability_bins(confidence_N: Tensor, hit_N: Tensor) -> list[Bin]:
    """Bin images by confidence in 15 equal bins of 0..1, without empty ones.

    Source: Guo et al. 2017, section 2.
    """
    index_N = (confidence_N * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    num_images = torch.bincount(index_N, minlength=NUM_BINS)
    confidence = torch.bincount(index_N, weights=confidence_N.double(), minlength=NUM_BINS) / num_images
    accuracy = torch.bincount(index_N, weights=hit_N.double(), minlength=NUM_BINS) / num_images
    rows = zip(confidence.tolist(), accuracy.tolist(), num_images.tolist(), strict=True)
    return [Bin(*row) for row in rows if row[2]]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error in per cent; NaN without images."""
    total = sum(b.num_images for b in bins)
    return 100 * sum(b.num_images * abs(b.confidence - b.accuracy) for b in bins) / total if total else math.nan


def _confusions(labels_N: Tensor, predicted_N: Tensor, num_classes: int) -> list[Confusion]:
    wrong_N = labels_N != predicted_N
    pairs, num_images = (labels_N * num_classes + predicted_N)[wrong_N].unique(return_counts=True)
    order = num_images.argsort(descending=True, stable=True)[:NUM_CONFUSIONS]
    rows = zip(pairs[order].tolist(), num_images[order].tolist(), strict=True)
    return [Confusion(pair // num_classes, pair % num_classes, num) for pair, num in rows]
