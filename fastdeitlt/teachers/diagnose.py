"""`analyze teacher`: accuracy, sharpness and feature rank of a teacher."""

# B batch, K classes, N images, D width of the features, C channels, H height, W width

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.batches import train_batches
from fastdeitlt.data.pixels.source import Source, open_source
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.data.sets.counts import shot_groups
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.models.teacher import Teacher, load_teacher, teacher_input
from fastdeitlt.run.progress import tracked
from fastdeitlt.store.manifest import preprocess_of
from fastdeitlt.teachers.decisions import CLEAN_BATCH, clean_batches
from fastdeitlt.teachers.flatness import feature_rank, sharpness
from fastdeitlt.teachers.opening import settle_order, teacher_of

SHARPNESS_IMAGES = 512


def diagnose_teacher(
    path: str | Path, cfg: Config, num_images: int = 2048, flatness: bool = True, run_dir: Path | None = None
) -> dict[str, Any]:
    """Diagnose a teacher on training images of the student's recipe ``cfg``.

    Args:
        path: model folder, run folder or released checkpoint.
        cfg: the student's run (data, augmentation, mixing, sizes, teacher section).
        num_images: training images used, evenly spaced in the list.
        flatness: also compute ``sharpness``, which costs far more than the rest.
        run_dir: folder of the student's run with the stored class order of ``teacher.map_classes``; None: no run.

    Returns:
        ``clean`` (the preprocessing that the teacher's folder states, else the run's), ``augmented`` and ``mixed`` (the
        student's recipe at the teacher's size) and ``mixed_resized`` (at the student's size, then resized, as in
        training), each with ``accuracy`` against the label with the larger share in %, ``either`` against any of the
        two in %, ``entropy`` of the softmax in nats, ``agreement`` by head, mid and tail in % (means of class
        accuracies, official split; None: no image of them).
        ``hard_targets``: images of each class by ``labels`` and by ``targets``, the argmax of mixed_resized.
        ``sharpness``: ``loss``, ``gap`` (rise of the loss a radius away along the gradient) by radius, and
        ``top_eigenvalue`` of the Hessian, of clean images with running batch-norm statistics.
        ``feature_rank``: of the pooled features, centred by ``sample`` and by ``feature``, and their ``width``.

    Raises:
        UserError: an invalid teacher or data set.
    """
    device = distributed.device_of(cfg.train.device)
    images = open_sets(cfg.data).train
    teacher_cfg = cfg.teacher.model_copy(update={"path": str(path)})
    with closing(open_source(images, cfg.data, device)) as source:
        teacher = teacher_of(cfg.model_copy(update={"teacher": teacher_cfg}), images, cfg.student.side, device)
        assert teacher is not None
        settle_order(teacher, images, source, cfg, cfg.student.side, run_dir)
        return _diagnose(teacher, path, cfg, images, source, num_images, flatness)


def _diagnose(
    teacher: Teacher,
    path: str | Path,
    cfg: Config,
    images: LongTailSet,
    source: Source,
    num_images: int,
    flatness: bool,
) -> dict[str, Any]:
    own = teacher.manifest.preprocess if teacher.manifest else None
    size, scale = teacher.img_size, teacher.logit_scale
    network = load_teacher(path, cfg.teacher.arch, images.num_classes).network.to(source.device)

    sample_N = np.linspace(0, len(images) - 1, min(num_images, len(images))).astype(np.int64)
    labels_N = torch.from_numpy(images.labels[sample_N])
    fed = teacher_input(cfg.teacher, None, cfg.augment.mean, cfg.augment.std, cfg.student.side)
    stated = own or preprocess_of(cfg, size).model_copy(update={"mean": fed.mean, "std": fed.std})
    prepared = stated.model_copy(update={"img_size": stated.img_size or size})
    groups = shot_groups(images.counts, "official", cfg.data.dataset)
    score = _Scorer(groups, scale, teacher.class_map)
    with torch.inference_mode():
        batches = tracked(clean_batches(source, sample_N, prepared), "clean images", -(-len(sample_N) // CLEAN_BATCH))
        clean = [(network(batch), _features(network, batch)) for batch in batches]
    logits_NK, features_ND = (torch.cat(column) for column in zip(*clean, strict=True))
    facts: dict[str, Any] = {
        "path": str(path),
        "images": len(sample_N),
        "class_names": images.class_names,
        "groups": {name: ids.tolist() for name, ids in groups.items()},
        "clean": score(logits_NK, labels_N, labels_N, torch.ones(len(labels_N)))[0],
    }
    order_N = sample_N[np.random.default_rng(0).permutation(len(sample_N))]
    for name, mixing, at in (
        ("augmented", False, size),
        ("mixed", True, size),
        ("mixed_resized", True, cfg.student.side),
    ):
        rows = _teach(teacher, source, images, cfg, order_N, mixing, at)
        rows = tracked(rows, f"{name.replace('_', ' and ')} images", -(-len(order_N) // cfg.train.batch_size))
        facts[name], targets_N = score(*(torch.cat(column) for column in zip(*rows, strict=True)))
    facts["feature_rank"] = {
        "sample": feature_rank(features_ND, "sample"),
        "feature": feature_rank(features_ND, "feature"),
        "width": features_ND.shape[1],
    }
    num_classes = images.num_classes
    facts["hard_targets"] = {
        "labels": labels_N.bincount(minlength=num_classes).tolist(),
        "targets": targets_N.bincount(minlength=num_classes).tolist(),
    }
    if flatness:
        every = max(len(sample_N) // SHARPNESS_IMAGES, 1)
        own_labels_N = labels_N if teacher.class_map is None else teacher.class_map.cpu().argsort()[labels_N]
        some_BCHW = torch.cat(list(clean_batches(source, sample_N[::every], prepared)))
        facts["sharpness"] = sharpness(network, some_BCHW, own_labels_N[::every].to(source.device), scale)
    return facts


class _Scorer:
    """Compute the results of one condition from a teacher's logits."""

    def __init__(self, groups: dict[str, Tensor], scale: float, class_map: Tensor | None) -> None:
        self.groups, self.scale = groups, scale
        self.class_map = None if class_map is None else class_map.cpu()

    def __call__(
        self, logits_NK: Tensor, labels_N: Tensor, partner_N: Tensor, lam_N: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        logits_NK = self.scale * logits_NK.float().cpu()
        targets_N = logits_NK.argmax(1)
        if self.class_map is not None:
            targets_N = self.class_map[targets_N]
        main_N = torch.where(lam_N >= 0.5, labels_N, partner_N)
        log_probs_NK = logits_NK.log_softmax(1)
        hit_N = (targets_N == main_N).float() * 100
        facts = {
            "accuracy": hit_N.mean().item(),
            "either": ((targets_N == labels_N) | (targets_N == partner_N)).float().mean().item() * 100,
            "entropy": -(log_probs_NK.exp() * log_probs_NK).sum(1).mean().item(),
            "agreement": {name: _mean_of_classes(hit_N, main_N, ids) for name, ids in self.groups.items()},
        }
        return facts, targets_N


def _mean_of_classes(hit_N: Tensor, labels_N: Tensor, ids: Tensor) -> float | None:
    """Return the mean over classes ``ids`` of mean ``hit_N``; None if all are empty."""
    means = [hit_N[labels_N == label].mean() for label in ids.tolist() if (labels_N == label).any()]
    return torch.stack(means).mean().item() if means else None


def _teach(
    teacher: Teacher, source: Source, images: LongTailSet, cfg: Config, order_N: np.ndarray, mixing: bool, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield logits_BK, labels_B, partner_B, lam_B of the student's training batches."""
    mixing = mixing and cfg.mixup.on
    parts = [order_N[i : i + cfg.train.batch_size] for i in range(0, len(order_N), cfg.train.batch_size)]
    if mixing and len(parts[-1]) % 2:  # mixing needs pairs
        parts[-1] = parts[-1][:-1]
    micro = [MicroBatch(0, i, 0, part, np.zeros(len(part), np.int64)) for i, part in enumerate(parts) if len(part)]
    for batch in train_batches(micro, source, images, cfg, mixing=mixing, size=size):
        labels_B = batch.labels_B.cpu()
        partner_B = labels_B if batch.partner_B is None else batch.partner_B.cpu()
        lam = 1.0 if batch.lam is None else float(batch.lam)
        logits_BK = teacher(batch.images_BCHW.float())  # the fused kernel returns bfloat16
        yield logits_BK, labels_B, partner_B, torch.full((len(labels_B),), lam)


def _features(network: Any, images_BCHW: Tensor) -> Tensor:
    return network.forward_head(network.forward_features(images_BCHW), pre_logits=True)
