"""Requests to a source of pixels, and regions of decoded images."""

# B images of a request, H height, W width

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor


class Boxes(Protocol):
    """Crops that depend only on the image sizes: ``augment.Draws``."""

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return crops (top, left, height, width), int32 [B, 4], given image sizes."""


@dataclass(frozen=True)
class CropRequest:
    """A request for a batch of uint8 crops [B, size, size, 3].

    With ``draws``: RandomResizedCrop by ``draws.boxes``. Without: shorter side resized to ``resize`` pixels (None:
    ``size``), then the central ``size`` x ``size`` window.

    A source yields each request with its finished pixels. A subclass can carry further data of the batch, and augment
    its crops in ``finish``.
    """

    sample_B: np.ndarray
    size: int
    draws: Boxes | None = None
    resize: int | None = None

    def finish(self, crops_BHWC: Tensor) -> Tensor:
        """Return the crops as the consumer needs them; runs in the thread that cut them."""
        return crops_BHWC

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return the needed part (top, left, height, width) of each image, int32 [B, 4]."""
        if self.draws is not None:
            return self.draws.boxes(sizes_B2)
        return np.concatenate([np.zeros_like(sizes_B2), sizes_B2], 1).astype(np.int32)


AnyRequest = TypeVar("AnyRequest", bound=CropRequest)


def centre_crops(sample_N: np.ndarray, batch_size: int, size: int, resize: int) -> list[CropRequest]:
    """Return requests for evaluation crops in order; the last batch may be smaller."""
    starts = range(0, len(sample_N), batch_size)
    return [CropRequest(sample_N[start : start + batch_size], size, resize=resize) for start in starts]


@dataclass(frozen=True)
class Regions:
    """The pixels of a batch of crops, input of the fused kernel."""

    pixels: Tensor
    """uint8 on the device: images or regions of them, [H, W, 3], concatenated."""
    starts_B: np.ndarray
    """int64 offset of each region in ``pixels``."""
    sizes_B2: np.ndarray
    """(height, width) of each region."""
    boxes_B4: np.ndarray
    """Crop (top, left, height, width) within each region."""
