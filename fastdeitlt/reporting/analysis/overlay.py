"""Overlays of attention maps on images."""

# H height, W width, C channels

import matplotlib
import numpy as np
from PIL import Image

TILE = 128
"""Side of a picture in pixels."""
GAP = 4
COLOURS = "inferno"
STRENGTH = 0.65
"""Opacity of the heat map at its maximum."""


def overlay(image_HWC: np.ndarray, map_PP: np.ndarray) -> np.ndarray:
    """Overlay a map, scaled to its own range, on a grey image: uint8 [TILE, TILE, 3].

    Args:
        image_HWC: uint8.
        map_PP: attention of each patch, any scale.
    """
    low, high = float(map_PP.min()), float(map_PP.max())
    heat = Image.fromarray(((map_PP - low) / max(high - low, 1e-12)).astype(np.float32))
    heat_HW = np.clip(np.asarray(heat.resize((TILE, TILE), Image.Resampling.BICUBIC)), 0, 1)
    grey_HW1 = np.asarray(_tile(image_HWC).convert("L"), dtype=np.float32)[..., None]
    colour_HWC = matplotlib.colormaps[COLOURS](heat_HW)[..., :3] * 255
    share_HW1 = STRENGTH * (0.35 + 0.65 * heat_HW[..., None])
    return ((1 - share_HW1) * grey_HW1 + share_HW1 * colour_HWC).round().astype(np.uint8)


def strip(image_HWC: np.ndarray, maps: list[np.ndarray]) -> Image.Image:
    """Return the image and each of its overlays, from left to right."""
    tiles = [np.asarray(_tile(image_HWC)), *(overlay(image_HWC, map_PP) for map_PP in maps)]
    gap = np.full((TILE, GAP, 3), 255, dtype=np.uint8)
    parts = [part for tile in tiles for part in (tile, gap)][:-1]
    return Image.fromarray(np.concatenate(parts, axis=1))


def _tile(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HWC).convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
