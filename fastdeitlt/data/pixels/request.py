"""Requests to a source of pixels, and what it delivers for them."""

# B images of a request, H height, W width

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor


class Boxes(Protocol):
    """Crops that are known but for the size of the images: ``augment.Draws``."""

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return the crops (top, left, height, width), int32 [B, 4], of images of these (height, width)."""


@dataclass(frozen=True)
class CropRequest:
    """A batch of uint8 crops [B, size, size, 3].

    With ``draws``: RandomResizedCrop by ``draws.boxes``. Without: shorter side resized to ``resize`` pixels (None:
    ``size``), then the central ``size`` x ``size`` window.

    A source yields each request with its pixels, so a subclass carries whatever else belongs to the batch.
    """

    sample_B: np.ndarray
    size: int
    draws: Boxes | None = None
    resize: int | None = None

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return the part needed of images of these (height, width): int32 (top, left, height, width) [B, 4]."""
        if self.draws is not None:
            return self.draws.boxes(sizes_B2)
        return np.concatenate([np.zeros_like(sizes_B2), sizes_B2], 1).astype(np.int32)


AnyRequest = TypeVar("AnyRequest", bound=CropRequest)


def centre_crops(sample_N: np.ndarray, batch_size: int, size: int, resize: int) -> list[CropRequest]:
    """Return requests for the evaluation crops of these images in order; the last batch may be smaller."""
    starts = range(0, len(sample_N), batch_size)
    return [CropRequest(sample_N[start : start + batch_size], size, resize=resize) for start in starts]


@dataclass(frozen=True)
class Regions:
    """The pixels a batch of crops is made of, for the fused kernel."""

    pixels: Tensor
    """uint8 on the device: images, or regions of them, [H, W, 3] one after the other."""
    starts_B: np.ndarray
    """int64: where the pixels of each one begin."""
    sizes_B2: np.ndarray
    """Their (height, width)."""
    boxes_B4: np.ndarray
    """The crop of each one (top, left, height, width), inside these pixels."""
