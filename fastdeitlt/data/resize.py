"""Antialiased bicubic resizing of uint8 images, bit for bit as Pillow's ``Image.resize``.

Pillow convolves rows, then columns, with a Keys kernel (a = -0.5) stretched by the scale when shrinking; coefficients are
integers in 1/2^22 and each pass rounds to uint8 (Pillow, src/libImaging/Resample.c). Large images on the host go to
Pillow itself; everything else is two batched products with exact integers in float64.
"""

# B batch, H height, W width, C channels, S output side, n input side

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUPPORT = 2.0
PRECISION = 1 << 22
BATCHED_PIXELS = 64 * 64
"""Host images up to this size are resized as a batch; Pillow's cost a call would dominate."""
CHUNK_VALUES = 1 << 26
"""Most float64 values of one batched product."""


def crop_resize(
    images: Tensor | Sequence[Tensor], boxes_B4: np.ndarray, size: int, pool: Executor | None = None
) -> Tensor:
    """Crop each image to its box and resize the crop to ``size`` x ``size``.

    Args:
        images: uint8 [B, H, W, C], or B images [H, W, C] of any sizes, on one device.
        boxes_B4: integer (top, left, height, width), inside the image.
        size: output side in pixels.
        pool: threads for large images on the host; None = the calling thread.

    Returns:
        crops_BHWC, uint8, on the images' device.
    """
    crops = [image[t : t + h, l : l + w] for image, (t, l, h, w) in zip(images, boxes_B4.tolist(), strict=True)]
    if crops[0].device.type == "cpu" and max(image.shape[0] * image.shape[1] for image in images) > BATCHED_PIXELS:
        resized = pool.map(_pillow, crops, [size] * len(crops)) if pool else (_pillow(crop, size) for crop in crops)
        return torch.stack(list(resized))
    return torch.cat([_batched(part, size, size) for part in _chunks(crops, size)])


def _pillow(crop_HWC: Tensor, size: int) -> Tensor:
    resized = Image.fromarray(crop_HWC.contiguous().numpy()).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def _chunks(crops: list[Tensor], size: int):
    height, width = (max(crop.shape[d] for crop in crops) for d in (0, 1))
    step = max(1, CHUNK_VALUES // (max(height, size) * max(width, size) * 3))
    return [crops[i : i + step] for i in range(0, len(crops), step)]


def _batched(crops: list[Tensor], out_height: int, out_width: int) -> Tensor:
    sizes_B2 = np.array([crop.shape[:2] for crop in crops])
    height, width = sizes_B2.max(axis=0).tolist()
    channels, device = crops[0].shape[2], crops[0].device
    padded_BHWC = torch.zeros(len(crops), height, width, channels, dtype=torch.float64, device=device)
    for padded, crop in zip(padded_BHWC, crops, strict=True):
        padded[: crop.shape[0], : crop.shape[1]] = crop
    rows_BWHC = padded_BHWC.transpose(1, 2).reshape(len(crops), width, height * channels)
    rows_BSHC = _convolve(coefficients(sizes_B2[:, 1], out_width).to(device), rows_BWHC)
    columns_BHSC = rows_BSHC.view(len(crops), out_width, height, channels).transpose(1, 2)
    columns_BHSC = columns_BHSC.reshape(len(crops), height, out_width * channels)
    resized = _convolve(coefficients(sizes_B2[:, 0], out_height).to(device), columns_BHSC)
    return resized.view(len(crops), out_height, out_width, channels).to(torch.uint8)


def _convolve(weights_BSn: Tensor, values_Bnm: Tensor) -> Tensor:
    """One pass: exact integer sums, rounded half up to whole values in 0..255 (still float64)."""
    sums = torch.bmm(weights_BSn, values_Bnm)
    return sums.add_(PRECISION // 2).mul_(1.0 / PRECISION).floor_().clamp_(0.0, 255.0)


def coefficients(sides_B: np.ndarray, size: int) -> Tensor:
    """Pillow's integer coefficients (in 1/2^22) from ``sides_B`` input pixels to ``size``: float64 [B, S, max(sides)]."""
    sides_B11 = sides_B.astype(np.float64)[:, None, None]
    scale_B11 = sides_B11 / size
    stretch_B11 = np.maximum(scale_B11, 1.0)
    centre_BS1 = (np.arange(size)[None, :, None] + 0.5) * scale_B11
    first_BS1 = np.maximum(np.trunc(centre_BS1 - SUPPORT * stretch_B11 + 0.5), 0.0)
    last_BS1 = np.minimum(np.trunc(centre_BS1 + SUPPORT * stretch_B11 + 0.5), sides_B11)
    pixel_n = np.arange(int(sides_B.max()))
    x_BSn = np.abs((pixel_n - centre_BS1 + 0.5) * (1.0 / stretch_B11))
    near, far = (1.5 * x_BSn - 2.5) * x_BSn * x_BSn + 1.0, (((x_BSn - 5.0) * x_BSn + 8.0) * x_BSn - 4.0) * -0.5
    weights_BSn = np.where(x_BSn < 1.0, near, np.where(x_BSn < 2.0, far, 0.0))
    weights_BSn *= (pixel_n >= first_BS1) & (pixel_n < last_BS1)
    weights_BSn /= weights_BSn.sum(axis=2, keepdims=True)
    return torch.from_numpy(np.trunc(weights_BSn * PRECISION + np.copysign(0.5, weights_BSn)))
