"""Evaluation: logits of a model on every image of a set, scored by metrics.py."""

# B batch, C channels, H height, W width, K classes, N images in the set

import csv
import io
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastdeitlt import config, distributed
from fastdeitlt.config import Config
from fastdeitlt.data.augment.transform import normalise
from fastdeitlt.data.pixels.request import centre_crops
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sets.class_names import listed
from fastdeitlt.data.sets.fingerprint import warn_of_moved_images
from fastdeitlt.data.sets.opening import open_splits
from fastdeitlt.data.sets.splits import find_splits
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError, counted, csv_name
from fastdeitlt.evaluation import per_image, shift
from fastdeitlt.evaluation.metrics import LEFT_OUT, Result, heads_of, score_heads
from fastdeitlt.evaluation.posthoc import PostHoc, post_hoc
from fastdeitlt.models.saved import Saved, open_saved, run_of
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.store.files import expect_folder, write_atomically
from fastdeitlt.store.manifest import Preprocess

log = logging.getLogger("fastdeitlt")


class OneHead(nn.Module):
    """Adapter that gives a flat model, such as the teacher, a student's interface with two equal heads.

    Args:
        model: maps images_BCHW to logits_BK.
        logit_scale: factor on the logits for the softmax of the model's training loss.
    """

    def __init__(self, model: nn.Module, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.logit_scale = model, logit_scale
        self.train(model.training)

    def forward_heads(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's scaled logits_BK twice."""
        logits_BK = self.model(images_BCHW) * self.logit_scale
        return logits_BK, logits_BK


class WithCosine(nn.Module):
    """Student that also records the cosine of its CLS and DIST features for each image.

    The features are the heads' inputs, after the last norm. One minus their cosine is the paper's diversity of the
    experts. Source: DeiT-LT deit.py, ``nn.CosineSimilarity(dim=1, eps=1e-6)``.
    """

    def __init__(self, student: DistilledViT) -> None:
        super().__init__()
        self.student = student
        self.train(student.training)
        self._cosines: list[Tensor] = []

    def forward_heads(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's (cls_logits_BK, dist_logits_BK)."""
        x_B2D = self.student.forward_prefix(images_BCHW)
        self._cosines.append(cosine_similarity(x_B2D[:, 0].float(), x_B2D[:, 1].float(), dim=1, eps=1e-6))
        return self.student.head(x_B2D[:, 0]), self.student.head_dist(x_B2D[:, 1])

    def cosine_N(self, total: int, device: torch.device) -> Tensor:
        """Gather the cosines [N] of ``total`` images, in the order of gather_logits."""
        seen_B = torch.cat(self._cosines).cpu() if self._cosines else torch.zeros(0)
        return distributed.gather_interleaved(seen_B, total, device)


def collect_logits(
    model: nn.Module,
    source: Source,
    images: LongTailSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    sample_N: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the logits of both heads on each image exactly once, in order.

    The last batch may be smaller.

    Args:
        model: has ``forward_heads``, as a student or ``OneHead``; in eval mode during the call, then restored.
        source: pixels of ``images``.
        preprocess: size of the centre crop, size of the shorter side before it, normalisation.
        autocast_dtype: type of matrix multiplications, None for the weights' own.
        sample_N: indices of the images, None for all. Ranks use disjoint parts such as ``arange(rank, N, world_size)``.

    Returns:
        (cls_logits_NK, dist_logits_NK, labels_N), float32 and int64, on the CPU. The label of an image that could not
        be read (``data.on_error=skip``) is LEFT_OUT, which scores ignore.
    """
    if sample_N is None:
        sample_N = np.arange(len(images))
    requests = centre_crops(sample_N, batch_size, preprocess.img_size, preprocess.resize)
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    outputs: list[tuple[Tensor, Tensor]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for _, crops_BHWC in source.crops(requests):
                images_BCHW = normalise(crops_BHWC, preprocess.mean, preprocess.std)
                outputs.append(model.forward_heads(images_BCHW))  # type: ignore[operator]
    finally:
        model.train(was_training)
    labels_N = torch.as_tensor(images.labels[sample_N])
    labels_N[np.isin(sample_N, list(source.unreadable))] = LEFT_OUT
    if not outputs:  # a rank beyond the number of images
        return torch.zeros(0, images.num_classes), torch.zeros(0, images.num_classes), labels_N
    cls_logits_NK, dist_logits_NK = (torch.cat(head).float().cpu() for head in zip(*outputs, strict=True))
    return cls_logits_NK, dist_logits_NK, labels_N


def gather_logits(
    model: nn.Module,
    source: Source,
    images: LongTailSet,
    preprocess: Preprocess,
    cfg: Config,
    device: torch.device,
    most: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect the logits of the images on every rank, which computes a part of them.

    Args:
        cfg: ``evaluate.batch_size`` and ``train.precision``; for the others see ``collect_logits``.
        most: most images, evenly spaced in the list. 0 = all.
    """
    total = min(most or len(images), len(images))
    chosen_N = np.linspace(0, len(images) - 1, total).astype(np.int64)
    sample_N = chosen_N[distributed.rank() :: distributed.get_world()]
    mine = collect_logits(
        model,
        source,
        images,
        preprocess,
        batch_size=cfg.evaluate.batch_size,
        device=device,
        autocast_dtype=autocast_dtype(cfg.train.precision, device),
        sample_N=sample_N,
    )
    cls_logits_NK, dist_logits_NK, labels_N = (distributed.gather_interleaved(part, total, device) for part in mine)
    return cls_logits_NK, dist_logits_NK, labels_N


def evaluate(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str = "test",
    json_path: str | Path | None = None,
    csv_path: str | Path | None = None,
    predictions_path: str | Path | None = None,
) -> Result:
    """Score a saved model and print the tables of both splits.

    Optionally writes the scores.

    A student on test images is also scored with post-hoc corrections fitted on its validation images (posthoc.py), if
    it has any. Ranks started by torchrun divide the images; each returns the whole result, rank 0 prints.

    Args:
        path: a model folder, a run folder, or a released student checkpoint.
        overrides: settings such as ``data.root=/images``, which override those of the model's run, or without a run
            the quick start's, whose images are the embedded set.
        split: train, val or test; with train also required if the model's file has no class counts.
        json_path: file for all scores.
        csv_path: file with one row per class: training images, images, accuracy of each head with its 95 % interval.
        predictions_path: CSV file with one row per image: path, label, prediction and probability of each head.

    Raises:
        UserError: no such model, no such split, classes that the model does not have, or a file that cannot be
            written.
    """
    saved = open_saved(path)
    run = run_of(Path(path))
    cfg = config.load_evaluation(str(run / "config.yaml") if run else "quickstart", list(overrides))
    expect_folder(json_path, csv_path, predictions_path)
    if predictions_path and Path(predictions_path).suffix != ".csv":
        raise UserError(f"--predictions: got {predictions_path}, expected a .csv file")
    with distributed.group(cfg.train.device, cfg.train.timeout_s, cfg.train.main_timeout_s):
        evaluation = evaluate_saved(saved, cfg, split)
        if distributed.rank() == 0:
            _write(evaluation, json_path, csv_path)
            if predictions_path:
                _write_predictions(evaluation, saved, Path(predictions_path))
    return evaluation.result


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a set, with its logits and labels."""

    result: Result
    fitted: PostHoc | None
    """Post-hoc scores of a student on test images, if there are validation images."""
    images: LongTailSet
    heads: dict[str, Tensor]
    """logits_NK by head, in the data set's order of classes; the first head predicts."""
    labels_N: Tensor
    """LEFT_OUT for an image that could not be read."""


def evaluate_saved(saved: Saved, cfg: Config, split: str) -> Evaluation:
    """Score an opened model on a split of ``cfg.data``.

    Raises:
        UserError: no such split, or classes that the model does not have.
    """
    student, fitted = saved.kind == "student", None
    counts, dataset = saved.class_counts, saved.info.get("dataset", cfg.data.dataset)
    required = (split,) if counts else (split, "train")
    optional = ("val",) if student and split == "test" else ()
    is_trained_on = cfg.data.is_own and dataset == cfg.data.title  # published archives do not change
    shares = find_splits(cfg.data, required).shares if cfg.data.is_own and split != "train" else {}
    is_held_out = is_trained_on and split in shares
    if split in shares and not is_trained_on:
        log.warning(
            "data %s: no %s split, scored are %.0f %% of each class. All images: --split train data.val_holdout=0 "
            "data.test_holdout=0", cfg.data.title, split, 100 * shares[split],
        )  # fmt: skip
    splits = open_splits(cfg.data, required, (*optional, *(("train",) if is_held_out else ())), saved.classes)
    if is_held_out:
        distributed.on_main(lambda: warn_of_moved_images("model", saved.info.get("data_sha256"), splits["train"]))
    counts, images, val = counts or splits["train"].counts, splits[split], splits.get("val")
    _report_absent(images, f"data {cfg.data.title}, {split}")
    logits = _logits(saved, images, cfg)
    device = distributed.device_of(cfg.train.device)
    heads = heads_of(*logits[:2]) if student else {"TEACHER": logits[1]}
    if student and split == "test" and val:
        fitted = post_hoc(_logits(saved, val, cfg), logits, counts, dataset)
    return Evaluation(score_heads(heads, logits[2], counts, dataset, device), fitted, images, heads, logits[2])


def _report_absent(images: LongTailSet, where: str) -> None:
    """Log the model's classes without images, which means over classes ignore."""
    if absent := [label for label, count in enumerate(images.counts) if count == 0]:
        named = listed(images.class_name(label) for label in absent)
        log.warning("%s: no images for %d of %d classes (%s)", where, len(absent), images.num_classes, named)


def _logits(saved: Saved, images: LongTailSet, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Return cls_logits_NK, dist_logits_NK, labels_N in the data set's class order."""
    device = distributed.device_of(cfg.train.device)
    model = OneHead(saved.model, saved.model.logit_scale) if isinstance(saved.model, Teacher) else saved.model
    data = cfg.data.model_copy(update={"exif": saved.preprocess.exif})
    with closing(open_source(images, data, device, scored=True)) as source:
        logits = gather_logits(model.to(device), source, images, saved.preprocess, cfg, device)
    return saved.by_label(logits[0]), saved.by_label(logits[1]), logits[2]


def _write(evaluation: Evaluation, json_path: str | Path | None, csv_path: str | Path | None) -> None:
    console, result, fitted = Console(), evaluation.result, evaluation.fitted
    for name in result.num_classes:
        console.print(result.table(name))
    shifted = shift.accuracies(result)
    console.print(shift.table(shifted, fitted.prior_known if fitted else None))
    if fitted:
        console.print(fitted.table())
    if json_path:
        whole = result.to_json() | {"shifted": shifted, "posthoc": fitted.to_json() if fitted else None}
        write_atomically(Path(json_path), json.dumps(whole, indent=1))
    if csv_path:
        write_atomically(Path(csv_path), to_csv(result, evaluation.images.class_names))


def _write_predictions(evaluation: Evaluation, saved: Saved, path: Path) -> None:
    names = [evaluation.images.class_name(label) for label in range(evaluation.images.num_classes)]
    temperatures = saved.calibration.temperatures if saved.calibration else {}
    write_atomically(
        path, per_image.to_csv(evaluation.heads, evaluation.labels_N, evaluation.images, names, temperatures)
    )
    fitted = ", ".join(f"{head} {value:.2f}" for head, value in temperatures.items())
    how = f"temperatures fitted on validation images: {fitted}" if fitted else "uncalibrated probabilities"
    log.info("%s: %s; %s", path, counted(len(evaluation.labels_N), "image"), how)


def to_csv(result: Result, class_names: Sequence[str] | None = None) -> str:
    """Return CSV with one row per class.

    Columns: number, name, training images, images; each head's accuracy and Wilson interval.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    measures = [f"{head}{part}" for head in result.heads for part in ("", " low", " high")]
    writer.writerow(["class", "name", "training images", "images", *measures])
    accuracy = {head: result.class_accuracy(head) for head in result.heads}
    interval = {head: result.class_interval(head) for head in result.heads}
    for k, (count, support) in enumerate(zip(result.counts_K, result.support_K, strict=True)):
        numbers = [value for head in result.heads for value in (accuracy[head][k], *interval[head][k])]
        cells = ["" if np.isnan(value) else f"{value:.3f}" for value in numbers]
        writer.writerow([k, csv_name(class_names[k]) if class_names else "", count, support, *cells])
    return text.getvalue()
