"""What a source of pixels is asked for, and what it gives."""

# B images of a request, H height, W width

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


class Boxes(Protocol):
    """Crops that are known but for the size of the images: ``augment.Draws``."""

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return the crops (top, left, height, width), int32 [B, 4], of images of these (height, width)."""


@dataclass(frozen=True)
class CropRequest:
    """A batch a source is to deliver as uint8 crops [B, size, size, 3].

    With ``draws``: RandomResizedCrop by ``draws.boxes``. Without: shorter side resized to ``resize`` pixels (None:
    ``size``), then the central ``size`` x ``size`` window.
    """

    sample_B: np.ndarray
    size: int
    draws: Boxes | None = None
    resize: int | None = None


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
