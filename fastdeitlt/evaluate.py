"""Stage 9, evaluation: run a model over every image of a set once; metrics.py scores what comes out."""

# B batch, C channels, H height, W width, K classes, N images in the set

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from fastdeitlt import config, distributed
from fastdeitlt.data.augment import CropRequest, normalise
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet, open_sets
from fastdeitlt.data.resident import open_source
from fastdeitlt.errors import UserError
from fastdeitlt.metrics import Result, score, score_single
from fastdeitlt.saved import open_saved, run_of


class OneHead(nn.Module):
    """A flat model, such as the teacher, as a student whose heads agree; ``score_single`` scores either."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward_heads(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits_BK, twice."""
        logits_BK = self.model(images_BCHW)
        return logits_BK, logits_BK


def collect_logits(
    model: nn.Module,
    source: Source,
    images: LongTailSet,
    *,
    size: int,
    resize: int,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    sample_N: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a model's two heads on each image exactly once, in order; the last batch is simply smaller.

    Args:
        model: has ``forward_heads``, as a student or ``OneHead``; in eval mode for the call, then in the mode it had.
        source: gives the images of ``images``.
        size, resize: centre crop of ``size`` pixels after the shorter side is resized to ``resize``.
        mean, std: normalisation of the three channels, images in 0..1.
        autocast_dtype: type of matrix multiplications, None for the weights' own.
        sample_N: which images, None for all. Ranks take disjoint parts such as ``arange(rank, N, world_size)``.

    Returns:
        (cls_logits_NK, dist_logits_NK, labels_N), float32 and int64, on the CPU.
    """
    if sample_N is None:
        sample_N = np.arange(len(images))
    starts = range(0, len(sample_N), batch_size)
    requests = [CropRequest(sample_N[start : start + batch_size], size=size, resize=resize) for start in starts]
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    outputs: list[tuple[Tensor, Tensor]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for crops_BHWC in source.crops(requests):
                images_BCHW = normalise(crops_BHWC, mean, std, torch.float32)
                outputs.append(model.forward_heads(images_BCHW))  # type: ignore[operator]
    finally:
        model.train(was_training)
    labels_N = torch.as_tensor(images.labels[sample_N])
    if not outputs:  # a rank beyond the number of images
        return torch.zeros(0, images.num_classes), torch.zeros(0, images.num_classes), labels_N
    cls_logits_NK, dist_logits_NK = (torch.cat(head).float().cpu() for head in zip(*outputs, strict=True))
    return cls_logits_NK, dist_logits_NK, labels_N


def evaluate(
    path: str | Path, overrides: Sequence[str] = (), *, split: str = "test", json_path: str | Path | None = None
) -> Result:
    """Score a saved model, print the tables of both splits, and write the scores as JSON if asked.

    Args:
        path: a model folder, a run folder, or a released student checkpoint.
        overrides: settings such as ``data.root=/images``, over those of the run that the model is from. Without a run
            they are over the quick start's, whose images are the embedded set.
        split: train, val or test.
        json_path: file for the scores.

    Raises:
        UserError: no such model, no such split, or a data set with another number of classes.
    """
    saved = open_saved(path)
    run = run_of(Path(path))
    cfg = config.load(str(run / "config.yaml") if run else "quickstart", list(overrides))
    device = distributed.device_of(cfg.train.device)
    sets = open_sets(cfg.data)
    images = dict(sets).get(split)
    if images is None:
        raise UserError(f"split {split!r}: {cfg.data.dataset} has none, only {', '.join(dict(sets))}")
    if images.num_classes != saved.num_classes:
        raise UserError(
            f"model {path}: has {saved.num_classes} classes, {cfg.data.dataset} has {images.num_classes}; "
            "give the data set that it was trained on (data.dataset=...)"
        )
    source = open_source(images, cfg.data, device)
    try:
        cls_logits_NK, dist_logits_NK, labels_N = collect_logits(
            (saved.model if saved.kind == "student" else OneHead(saved.model)).to(device),
            source,
            images,
            size=saved.img_size,
            resize=saved.resize,
            batch_size=cfg.evaluate.batch_size,
            mean=saved.mean,
            std=saved.std,
            device=device,
            autocast_dtype=torch.bfloat16 if cfg.train.precision == "bf16" else None,
        )
    finally:
        source.close()
    counts, dataset = sets.train.counts, cfg.data.dataset
    if saved.kind == "student":
        result = score(saved.by_label(cls_logits_NK), saved.by_label(dist_logits_NK), labels_N, counts, dataset)
    else:
        result = score_single(saved.by_label(cls_logits_NK), labels_N, counts, dataset)
    for name in result.num_classes:
        Console().print(result.table(name))
    if json_path:
        Path(json_path).write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    return result
