"""Stage 9, evaluation: run a model over every image of a set once and score its heads (metrics.py)."""

# B batch, C channels, H height, W width, K classes, N images in the set

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastdeitlt.data.augment import CropRequest, normalise
from fastdeitlt.data.batches import Source
from fastdeitlt.data.longtail import LongTailSet


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
