"""RandAugment's 15 operations ("increasing" set of timm) on batches of uint8 images, bit for bit as Pillow computes them.

Pillow is the reference: integer luma, float32 blends that truncate, double-precision bicubic warps that truncate.
Magnitudes to arguments: timm.data.auto_augment (LEVEL_TO_ARG); fill (124, 116, 104) is 255 * ImageNet mean.
One deviation: posterize to 0 bits (level 10) gives black as Pillow did before 12; today's raises ValueError.
"""

# B batch, H height, W width, C channels (3)

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OPS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""timm's order (``_RAND_INCREASING_TRANSFORMS``)."""
FILL = (124, 116, 104)
LUMA = (19595.0, 38470.0, 7471.0)
"""ITU-R 601 weights in 1/65536 (Pillow's L24); the weighted sum stays below 2^24, so float32 holds it exactly."""


def rand_augment(images_BHWC: Tensor, op_B2: np.ndarray, level_B2: np.ndarray, sign_B2: np.ndarray) -> Tensor:
    """Apply each image's (up to two) operations in order.

    Args:
        images_BHWC: uint8 on any device; not changed.
        op_B2: indices into ``OPS``; -1 = none.
        level_B2, sign_B2: magnitude 0..10 and direction +1/-1.

    Returns:
        uint8 images (the input itself when no operation is drawn).
    """
    if (op_B2 < 0).all():
        return images_BHWC
    images_BHWC = images_BHWC.clone()
    for op_B, level_B, sign_B in zip(op_B2.T, level_B2.T, sign_B2.T, strict=True):
        for op in np.unique(op_B[op_B >= 0]):
            where = np.flatnonzero(op_B == op)
            index = torch.from_numpy(where).to(images_BHWC.device)
            images_BHWC[index] = FUNCTIONS[OPS[op]](images_BHWC[index], level_B[where], sign_B[where])
    return images_BHWC


def _each(values_B: np.ndarray, images_BHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """One value an image, broadcastable over it, on its device."""
    return torch.from_numpy(np.ascontiguousarray(values_B)).to(images_BHWC.device, dtype)[:, None, None, None]


def _blend(degenerate: Tensor, images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Pillow's ``Image.blend`` by timm's enhancement factor max(.1, 1 +- .09 level): float32, clipped, truncated."""
    factor_B = np.maximum(0.1, 1.0 + sign_B * (level_B / 10.0 * 0.9))
    blended = images_BHWC.float().sub_(degenerate).mul_(_each(factor_B, images_BHWC, torch.float32)).add_(degenerate)
    return blended.clamp_(0.0, 255.0).to(torch.uint8)


def _luma(images_BHWC: Tensor) -> Tensor:
    """Pillow's conversion to "L" as float32 [B, H, W, 1]."""
    weights = torch.tensor(LUMA, device=images_BHWC.device)
    return torch.mv(images_BHWC.float().view(-1, 3), weights).add_(32768.0).mul_(2.0**-16).floor_().view(*images_BHWC.shape[:3], 1)


def _lookup(images_BHWC: Tensor, table_BCV: Tensor) -> Tensor:
    """Map value v of channel c of image b to table_BCV[b, c, v]."""
    offset = torch.arange(0, table_BCV.numel(), 256, dtype=torch.int32, device=images_BHWC.device)
    index = images_BHWC + offset.view(-1, 1, 1, table_BCV.shape[1])
    return table_BCV.reshape(-1).take(index.long())


def auto_contrast(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Stretch each channel to 0..255."""
    pixels = images_BHWC.flatten(1, 2)
    low_BC, high_BC = (bound.double() for bound in torch.aminmax(pixels, dim=1))
    scale_BC = 255.0 / (high_BC - low_BC).clamp_min(1.0)
    values = torch.arange(256, dtype=torch.float64, device=images_BHWC.device)
    table_BCV = (values * scale_BC[..., None] + (-low_BC * scale_BC)[..., None]).clamp_(0.0, 255.0)
    table_BCV = torch.where((high_BC > low_BC)[..., None], table_BCV, values)
    return _lookup(images_BHWC, table_BCV.to(torch.uint8))


def equalize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Flatten each channel's histogram (``ImageOps.equalize``)."""
    batch, device = len(images_BHWC), images_BHWC.device
    offset = torch.arange(0, batch * 768, 256, dtype=torch.int32, device=device).view(batch, 1, 1, 3)
    counts_BCV = torch.bincount((images_BHWC + offset).flatten(), minlength=batch * 768).view(batch, 3, 256)
    values = torch.arange(256, device=device)
    last_BC1 = torch.where(counts_BCV > 0, values, -1).amax(2, keepdim=True)
    step_BC1 = (counts_BCV.sum(2, keepdim=True) - counts_BCV.gather(2, last_BC1)) // 255
    below_BCV = counts_BCV.cumsum(2) - counts_BCV
    table_BCV = ((below_BCV + step_BC1 // 2) // step_BC1.clamp_min(1)).clamp_max_(255)
    return _lookup(images_BHWC, torch.where(step_BC1 > 0, table_BCV, values).to(torch.uint8))


def invert(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """255 - value."""
    return ~images_BHWC


def posterize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Keep the top 4 - int(.4 level) bits; none at level 10 (black)."""
    bits_B = 4 - (level_B / 10.0 * 4).astype(np.int64)
    return images_BHWC & _each(256 - 2 ** (8 - bits_B), images_BHWC, torch.uint8)


def solarize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Invert values from 256 - int(25.6 level) up."""
    threshold_B = 256 - np.minimum(256, (level_B / 10.0 * 256).astype(np.int64))
    inverted = images_BHWC.short() >= _each(threshold_B, images_BHWC, torch.int16)
    return images_BHWC ^ inverted.view(torch.uint8).neg()


def solarize_add(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Add int(11 level) to values below 128."""
    added_B = np.minimum(128, (level_B / 10.0 * 110).astype(np.int64))
    dark = (images_BHWC >> 7) ^ 1
    return dark.mul_(_each(added_B, images_BHWC, torch.uint8)).add_(images_BHWC)


def color(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with the image's luma."""
    return _blend(_luma(images_BHWC), images_BHWC, level_B, sign_B)


def contrast(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with the rounded mean of the luma."""
    mean_B111 = _luma(images_BHWC).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean_B111 + 0.5).floor().float(), images_BHWC, level_B, sign_B)


def brightness(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with black."""
    return _blend(torch.zeros((), device=images_BHWC.device), images_BHWC, level_B, sign_B)


def sharpness(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13; the border row and column stay."""
    values = images_BHWC.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).add_(values[:, 1:-1, 1:-1], alpha=4)
    smooth = images_BHWC.float()
    smooth[:, 1:-1, 1:-1] = total.float().mul_(1 / 13).add_(0.5).floor_()
    return _blend(smooth, images_BHWC, level_B, sign_B)


def _warp(images_BHWC: Tensor, matrices: list[tuple[float, ...]]) -> Tensor:
    """Pillow's affine transform, output to input coordinates."""
    warped = [
        np.asarray(Image.fromarray(image).transform((image.shape[1], image.shape[0]), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL))
        for image, matrix in zip(images_BHWC.numpy(), matrices, strict=True)
    ]
    return torch.from_numpy(np.stack(warped))


def rotate(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Rotate by 3 level degrees about the centre."""
    return _warp(images_BHWC, [rotation(sign * level / 10 * 30.0, images_BHWC.shape[2], images_BHWC.shape[1]) for level, sign in zip(level_B, sign_B, strict=True)])


def rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Pillow's matrix of ``Image.rotate``."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y


def shear_x(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    return _warp(images_BHWC, [(1, f, 0, 0, 1, 0) for f in sign_B * (level_B / 10 * 0.3)])


def shear_y(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    return _warp(images_BHWC, [(1, 0, 0, f, 1, 0) for f in sign_B * (level_B / 10 * 0.3)])


def translate_x(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    return _warp(images_BHWC, [(1, 0, f * images_BHWC.shape[2], 0, 1, 0) for f in sign_B * (level_B / 10 * 0.45)])


def translate_y(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    return _warp(images_BHWC, [(1, 0, 0, 0, 1, f * images_BHWC.shape[1]) for f in sign_B * (level_B / 10 * 0.45)])


FUNCTIONS: dict[str, Callable[[Tensor, np.ndarray, np.ndarray], Tensor]] = {name: globals()[name] for name in OPS}
