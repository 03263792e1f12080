"""RandAugment's 15 operations (timm's "increasing" set), bit-exact to Pillow.

Pillow is the reference: integer luma, float32 blends that truncate, double-precision bicubic warps that truncate.
Magnitudes to arguments: timm.data.auto_augment (LEVEL_TO_ARG).
One deviation: posterize to 0 bits (level 10) gives black, as Pillow before 12; later versions raise ValueError.
"""

# B batch, H height, W width, C channels (3)

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.data.augment.warps import rotate, shear_x, shear_y, to_bytes, translate_x, translate_y

CACHED_VALUES = 1 << 20
"""Values per chunk on the host: float temporaries of 4 MiB stay in the shared cache, and few short operations wait for
the interpreter's lock."""
LUMA = (19595.0, 38470.0, 7471.0)
"""ITU-R 601 weights in 1/65536 (Pillow's L24); the weighted sum stays below 2^24, so float32 holds it exactly."""


def rand_augment(images_BHWC: Tensor, op_B2: np.ndarray, level_B2: np.ndarray, sign_B2: np.ndarray) -> None:
    """Apply each image's operations in order, in place, batched by operation.

    Args:
        images_BHWC: uint8 on any device.
        op_B2: indices into ``FUNCTIONS``; -1 = none. Two operations, or ColorJitter's three.
        level_B2, sign_B2: magnitude 0..10 and direction +1/-1.
    """
    step = chunk_size(images_BHWC)
    for op_B, level_B, sign_B in zip(op_B2.T, level_B2.T, sign_B2.T, strict=True):
        for op in np.unique(op_B[op_B >= 0]):
            members = np.flatnonzero(op_B == op)
            for part in np.split(members, range(step, len(members), step)):
                put(images_BHWC, part, FUNCTIONS[op](take(images_BHWC, part), level_B[part], sign_B[part]))


def take(images_BHWC: Tensor, index: np.ndarray) -> Tensor:
    """Return a copy of the images at ``index``."""
    return images_BHWC.index_select(0, torch.from_numpy(index).to(images_BHWC.device))


def put(images_BHWC: Tensor, index: np.ndarray, values_BHWC: Tensor) -> None:
    """Overwrite the images at ``index``."""
    if images_BHWC.device.type == "cpu":  # torch's index_copy_ is ten times slower there
        images_BHWC.numpy()[index] = values_BHWC.contiguous().numpy()
    else:
        images_BHWC.index_copy_(0, torch.from_numpy(index).to(images_BHWC.device), values_BHWC)


def chunk_size(images_BHWC: Tensor) -> int:
    """Return the images per chunk: on the host what fits the CPU cache, else all."""
    return len(images_BHWC) if images_BHWC.device.type != "cpu" else max(1, CACHED_VALUES // images_BHWC[0].numel())


def blend_factor(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return the blend factor of color, contrast, etc.: max(.1, 1 +- .09 level)."""
    return np.maximum(0.1, 1.0 + sign * (level / 10.0 * 0.9))


def kept_bits(level: np.ndarray) -> np.ndarray:
    """Return posterize's mask of the top 4 - int(.4 level) bits."""
    return 256 - 2 ** (4 + (level / 10.0 * 4).astype(np.int64))


def solarize_threshold(level: np.ndarray) -> np.ndarray:
    """Return the value from which solarize inverts: 256 - int(25.6 level)."""
    return 256 - np.minimum(256, (level / 10.0 * 256).astype(np.int64))


def solarize_added(level: np.ndarray) -> np.ndarray:
    """Return solarize_add's summand: int(11 level)."""
    return np.minimum(128, (level / 10.0 * 110).astype(np.int64))


def _each(values_B: np.ndarray, images_BHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return per-image values, broadcastable over the images, on their device."""
    return torch.from_numpy(np.ascontiguousarray(values_B)).to(images_BHWC.device, dtype)[:, None, None, None]


def _blend(degenerate: Tensor, images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend by timm's factor as Pillow does: in float32, clipped, truncated."""
    factor_B = blend_factor(level_B, sign_B)
    difference = images_BHWC.float().sub_(degenerate)
    return to_bytes(difference.mul_(_each(factor_B, images_BHWC, torch.float32)).add_(degenerate))


def _luma(images_BHWC: Tensor) -> Tensor:
    """Convert to luma as Pillow's mode "L", float32 [B, H, W, 1]."""
    weights = torch.tensor(LUMA, device=images_BHWC.device)
    luma = torch.mv(images_BHWC.float().view(-1, 3), weights).add_(32768.0).mul_(2.0**-16).floor_()
    return luma.view(*images_BHWC.shape[:3], 1)


def _index(images_BHWC: Tensor) -> Tensor:
    """Return each value's index in a flat [B, C, 256] table, int32 [B, H, W * C]."""
    batch, height, width, channels = images_BHWC.shape
    rows = torch.arange(batch * channels, dtype=torch.int32, device=images_BHWC.device).mul_(256)
    return images_BHWC.view(batch, height, -1) + rows.view(batch, 1, channels).repeat(1, 1, width)


def _lookup(index: Tensor, table_BCV: Tensor, shape: torch.Size) -> Tensor:
    return table_BCV.to(torch.uint8).flatten().index_select(0, index.view(-1)).view(shape)


def auto_contrast(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Stretch each channel to 0..255."""
    batch, height, width, channels = images_BHWC.shape
    rows = images_BHWC.view(batch, height, -1)
    low_BC = rows.amin(1).view(batch, width, channels).amin(1).double()
    high_BC = rows.amax(1).view(batch, width, channels).amax(1).double()
    spread_BC = (high_BC - low_BC).clamp_min(1.0)
    # scalar / tensor would multiply by the reciprocal, one bit off
    scale_BC = torch.full_like(spread_BC, 255.0) / spread_BC
    values = torch.arange(256, dtype=torch.float64, device=images_BHWC.device)
    table_BCV = (values * scale_BC[..., None] + (-low_BC * scale_BC)[..., None]).clamp_(0.0, 255.0)
    table_BCV = torch.where((high_BC > low_BC)[..., None], table_BCV, values)
    return _lookup(_index(images_BHWC), table_BCV, images_BHWC.shape)


def equalize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Flatten each channel's histogram (``ImageOps.equalize``)."""
    batch, _, _, channels = images_BHWC.shape
    index = _index(images_BHWC)
    counts = torch.bincount(index.view(-1), minlength=batch * channels * 256)
    counts_BCV = counts.view(batch, channels, 256)
    values = torch.arange(256, device=images_BHWC.device)
    last_BC1 = torch.where(counts_BCV > 0, values, -1).amax(2, keepdim=True)
    step_BC1 = (counts_BCV.sum(2, keepdim=True) - counts_BCV.gather(2, last_BC1)) // 255
    below_BCV = counts_BCV.cumsum(2) - counts_BCV
    table_BCV = ((below_BCV + step_BC1 // 2) // step_BC1.clamp_min(1)).clamp_max_(255)
    return _lookup(index, torch.where(step_BC1 > 0, table_BCV, values), images_BHWC.shape)


def invert(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Invert each value: 255 - value."""
    return ~images_BHWC


def posterize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Keep the top bits; none at level 10 (black)."""
    return images_BHWC & _each(kept_bits(level_B), images_BHWC, torch.uint8)


def solarize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Invert values from the threshold up."""
    threshold = _each(solarize_threshold(level_B), images_BHWC, torch.int16)
    below = images_BHWC.short().sub_(threshold).bitwise_right_shift_(15)
    return below.to(torch.uint8).bitwise_xor_(images_BHWC).bitwise_not_()


def solarize_add(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Add ``solarize_added`` to values below 128."""
    dark = (images_BHWC >> 7) ^ 1
    return dark.mul_(_each(solarize_added(level_B), images_BHWC, torch.uint8)).add_(images_BHWC)


def color(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with the image's luma."""
    return _blend(_luma(images_BHWC).expand_as(images_BHWC).contiguous(), images_BHWC, level_B, sign_B)


def contrast(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with the rounded mean of the luma."""
    mean_B111 = _luma(images_BHWC).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean_B111 + 0.5).floor().float(), images_BHWC, level_B, sign_B)


def brightness(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with black."""
    return _blend(torch.zeros((), device=images_BHWC.device), images_BHWC, level_B, sign_B)


def sharpness(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Blend with a smoothed image ([1 1 1; 1 5 1; 1 1 1] / 13, border unchanged)."""
    values = images_BHWC.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).add_(values[:, 1:-1, 1:-1], alpha=4)
    smooth = images_BHWC.float()
    smooth[:, 1:-1, 1:-1] = total.float().mul_(1 / 13).add_(0.5).floor_()
    return _blend(smooth, images_BHWC, level_B, sign_B)


FUNCTIONS: tuple[Callable[[Tensor, np.ndarray, np.ndarray], Tensor], ...] = (
    auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
"""timm's order (``_RAND_INCREASING_TRANSFORMS``)."""
OPS = tuple(function.__name__ for function in FUNCTIONS)
