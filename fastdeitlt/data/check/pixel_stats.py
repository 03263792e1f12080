"""Pixel statistics of a training set: mean, deviation, size, colour, orientation.

N images in the set, B batch, H height, W width, C channels.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.sets.types import LongTailSet

MOST_IMAGES = 4096
"""Most images decoded, evenly spaced in the list."""
BATCH = 128
SIDE = 64
"""Side in pixels of the measured central square; the shorter side is resized to it."""
GRAY_RANGE = 3
"""Largest channel difference, in 255ths, of a gray image: JPEG rounds chroma."""


@dataclass(frozen=True)
class PixelStats:
    """Statistics of decoded training images; channels are red, green, blue in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Standard deviation over all pixels of all images."""
    short_side: int
    """Median of the shorter sides in pixels."""
    gray: float
    """Share of the images without colour, 0..1."""
    num_images: int
    """Measured images."""
    num_unreadable: int = 0
    """Unreadable images, not included in ``num_images``."""


def pixel_stats(images: LongTailSet, cfg: DataConfig, most: int = MOST_IMAGES) -> PixelStats:
    """Measure the pixels of up to ``most`` images, evenly spaced in the list.

    Unreadable images are excluded.

    Args:
        images: the training set.
        cfg: ``exif`` and ``num_threads``.

    Raises:
        UserError: no image can be read.
    """
    sample_N = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(np.int64))
    chosen = images.take(sample_N)
    sums_C, squares_C = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    num_pixels, num_gray, num_read = 0, 0, 0
    sides: list[np.ndarray] = []
    for crops_BHWC, sides_B in _decoded(chosen, cfg):
        values_PC = crops_BHWC.reshape(-1, 3).double() / 255
        sums_C += values_PC.sum(0)
        squares_C += values_PC.square().sum(0)
        num_pixels += len(values_PC)
        num_gray += int(_is_gray(crops_BHWC).sum())
        num_read += len(crops_BHWC)
        sides.append(sides_B)
    mean_C = sums_C / num_pixels
    # a set of one colour has no deviation; avoid a division by 0
    std_C = (squares_C / num_pixels - mean_C.square()).clamp(min=1e-6).sqrt()
    red, green, blue = (round(float(value), 4) for value in mean_C)
    return PixelStats(
        mean=(red, green, blue),
        std=(round(float(std_C[0]), 4), round(float(std_C[1]), 4), round(float(std_C[2]), 4)),
        short_side=int(np.median(np.concatenate(sides))),
        gray=num_gray / num_read,
        num_images=num_read,
        num_unreadable=len(chosen) - num_read,
    )


def _decoded(images: LongTailSet, cfg: DataConfig) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield squares uint8 [B, S, S, 3] and shorter sides [B] of the readable images.

    Files are streamed, so that nothing is written to the cache of decoded sets.
    """
    parts = np.split(np.arange(len(images)), np.arange(BATCH, len(images), BATCH))
    if (decoded := images.images_NHWC) is not None:
        for part_B in parts:
            yield torch.from_numpy(decoded[part_B]), np.full(len(part_B), min(decoded.shape[1:3]))
        return
    # any readable image may stand in for another, since substitutes are not yielded
    one_class = replace(images, labels=np.zeros_like(images.labels))
    skipping = cfg.model_copy(update={"on_error": "skip"})
    with closing(Stream(one_class, skipping, torch.device("cpu"))) as stream:
        sides_N = stream.sizes().min(axis=1)
        requests = [CropRequest(part_B, SIDE) for part_B in parts]
        for request, crops_BHWC in stream.crops(requests):
            read_B = ~np.isin(request.sample_B, list(stream.unreadable))
            yield crops_BHWC[torch.from_numpy(read_B)], sides_N[request.sample_B][read_B]


def _is_gray(crops_BHWC: Tensor) -> Tensor:
    """Return whether each image is gray, bool [B]."""
    spread_BHW = crops_BHWC.amax(-1).short() - crops_BHWC.amin(-1).short()
    return spread_BHW.flatten(1).amax(1) <= GRAY_RANGE
