"""RandAugment's 15 operations (timm's "increasing" set) on batches of uint8 images, bit for bit as Pillow does.

Pillow is the reference: integer luma, float32 blends that truncate, double-precision bicubic warps that truncate.
Magnitudes to arguments: timm.data.auto_augment (LEVEL_TO_ARG); fill (124, 116, 104) is 255 * ImageNet mean.
One deviation: posterize to 0 bits (level 10) gives black as Pillow did before 12; today's raises ValueError.
"""

# B batch, H height, W width, C channels (3)

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CACHED_VALUES = 1 << 18
"""Values worked on at a time on the host, so that float temporaries stay in the cache."""
FILL = (124, 116, 104)
LUMA = (19595.0, 38470.0, 7471.0)
"""ITU-R 601 weights in 1/65536 (Pillow's L24); the weighted sum stays below 2^24, so float32 holds it exactly."""


def rand_augment(images_BHWC: Tensor, op_B2: np.ndarray, level_B2: np.ndarray, sign_B2: np.ndarray) -> None:
    """Apply each image's (up to two) operations in order, in place; images of one operation go together.

    Args:
        images_BHWC: uint8 on any device.
        op_B2: indices into ``FUNCTIONS``; -1 = none.
        level_B2, sign_B2: magnitude 0..10 and direction +1/-1.
    """
    step = chunk_size(images_BHWC)
    for op_B, level_B, sign_B in zip(op_B2.T, level_B2.T, sign_B2.T, strict=True):
        for op in np.unique(op_B[op_B >= 0]):
            members = np.flatnonzero(op_B == op)
            for part in np.split(members, range(step, len(members), step)):
                index = torch.from_numpy(part).to(images_BHWC.device)
                changed = FUNCTIONS[op](images_BHWC.index_select(0, index), level_B[part], sign_B[part])
                # image by image: index_copy_ is ten times slower on the host
                for b, image in zip(part.tolist(), changed, strict=True):
                    images_BHWC[b] = image


def chunk_size(images_BHWC: Tensor) -> int:
    """Images to work on at a time: all of them on a device, as many as stay in the cache on the host."""
    return len(images_BHWC) if images_BHWC.device.type != "cpu" else max(1, CACHED_VALUES // images_BHWC[0].numel())


def _each(values_B: np.ndarray, images_BHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """One value an image, broadcastable over it, on its device."""
    return torch.from_numpy(np.ascontiguousarray(values_B)).to(images_BHWC.device, dtype)[:, None, None, None]


def _bytes(values: Tensor) -> Tensor:
    """Clip to 0..255 and truncate; through int16, which is several times faster than straight to uint8."""
    return values.clamp_(0.0, 255.0).to(torch.int16).to(torch.uint8)


def _blend(degenerate: Tensor, images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Pillow's ``Image.blend`` by timm's enhancement factor max(.1, 1 +- .09 level): float32, clipped, truncated."""
    factor_B = np.maximum(0.1, 1.0 + sign_B * (level_B / 10.0 * 0.9))
    difference = images_BHWC.float().sub_(degenerate)
    return _bytes(difference.mul_(_each(factor_B, images_BHWC, torch.float32)).add_(degenerate))


def _luma(images_BHWC: Tensor) -> Tensor:
    """Pillow's conversion to "L" as float32 [B, H, W, 1]."""
    weights = torch.tensor(LUMA, device=images_BHWC.device)
    luma = torch.mv(images_BHWC.float().view(-1, 3), weights).add_(32768.0).mul_(2.0**-16).floor_()
    return luma.view(*images_BHWC.shape[:3], 1)


def _index(images_BHWC: Tensor) -> Tensor:
    """256 (3 b + c) + value as int32 [B, H, W * C]: where a value lies in a [B, C, 256] table."""
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
    # a scalar over a tensor would be the reciprocal times the scalar, one bit off
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
    """255 - value."""
    return ~images_BHWC


def posterize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Keep the top 4 - int(.4 level) bits; none at level 10 (black)."""
    bits_B = 4 - (level_B / 10.0 * 4).astype(np.int64)
    return images_BHWC & _each(256 - 2 ** (8 - bits_B), images_BHWC, torch.uint8)


def solarize(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Invert values from 256 - int(25.6 level) up."""
    threshold_B = 256 - np.minimum(256, (level_B / 10.0 * 256).astype(np.int64))
    below = images_BHWC.short().sub_(_each(threshold_B, images_BHWC, torch.int16)).bitwise_right_shift_(15)
    return below.to(torch.uint8).bitwise_xor_(images_BHWC).bitwise_not_()


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


def rotate(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Rotate by 3 level degrees about the centre, bicubic (a = -1, as Pillow's transform)."""
    _, height, width, _ = images_BHWC.shape
    matrices = [_rotation(degrees, width, height) for degrees in sign_B * (level_B / 10.0 * 30.0)]
    if images_BHWC.device.type != "cpu":
        return warp(images_BHWC, np.array(matrices))
    rotated_BHWC = torch.empty_like(images_BHWC)
    for rotated, image, matrix in zip(rotated_BHWC.numpy(), images_BHWC.numpy(), matrices, strict=True):
        source, bicubic = Image.fromarray(image), Image.Resampling.BICUBIC
        rotated[:] = source.transform((width, height), Image.Transform.AFFINE, matrix, bicubic, fillcolor=FILL)
    return rotated_BHWC


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Pillow's output-to-input matrix (a, b, c, d, e, f) of ``Image.rotate``."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y


def warp(images_BHWC: Tensor, matrix_B6: np.ndarray) -> Tensor:
    """Pillow's bicubic affine transform on any device: (x, y) out reads (ax + by + c, dx + ey + f) in, else FILL.

    Source: Pillow, src/libImaging/Geometry.c (``affine_transform``, ``bicubic_filter32RGB``).
    """
    batch, height, width, channels = images_BHWC.shape
    device = images_BHWC.device
    a, b, c, d, e, f = torch.from_numpy(matrix_B6).to(device).T[:, :, None, None]
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5)[:, None]
    x_BHW, y_BHW = a * x + b * y + c, d * x + e * y + f
    inside_BHW = (x_BHW >= 0) & (x_BHW < width) & (y_BHW >= 0) & (y_BHW < height)
    x_BHW, y_BHW = x_BHW - 0.5, y_BHW - 0.5
    left_BHW, top_BHW = x_BHW.floor(), y_BHW.floor()
    dx_BHW1, dy_BHW1 = (x_BHW - left_BHW)[..., None], (y_BHW - top_BHW)[..., None]
    columns = [(left_BHW.long() + i).clamp_(0, width - 1) for i in range(-1, 3)]
    rows = [(top_BHW.long() + i).clamp_(0, height - 1) for i in range(-1, 3)]
    image_B = torch.arange(batch, device=device)[:, None, None]
    lines = [_cubic([images_BHWC[image_B, row, column].double() for column in columns], dx_BHW1) for row in rows]
    fill = torch.tensor(FILL, dtype=torch.uint8, device=device)
    warped = _bytes(_cubic(lines, dy_BHW1))
    return torch.where(inside_BHW[..., None], warped, fill[:channels])


def _cubic(taps: list[Tensor], t: Tensor) -> Tensor:
    """Pillow's BICUBIC macro (Keys, a = -1) between taps[1] and taps[2], in its order of operations."""
    v1, v2, v3, v4 = taps
    return v2 + t * ((v3 - v1) + t * ((2.0 * (v1 - v2) + v3 - v4) + t * (-v1 + v2 - v3 + v4)))


def _slide(lines_BLnC: Tensor, shift_BL: np.ndarray) -> Tensor:
    """Resample each line along n, where position x reads x + its shift: the one-dimensional case of ``warp``.

    Lines are copied as windows of memory, so nothing is gathered pixel by pixel; the four taps are weighted in float64.
    """
    batch, num_lines, n, channels = lines_BLnC.shape
    device, count = lines_BLnC.device, batch * num_lines
    whole_BL = np.floor(shift_BL)
    slack = int(np.abs(whole_BL).max()) + 1
    stride = n + 4
    buffer = torch.zeros((count * stride + 2 * slack) * channels, dtype=torch.uint8, device=device)
    padded = buffer[slack * channels : -slack * channels].view(batch, num_lines, stride, channels)
    padded[:, :, 2:-2] = lines_BLnC
    padded[:, :, :2], padded[:, :, -2:] = lines_BLnC[:, :, :1], lines_BLnC[:, :, -1:]
    starts = slack + 1 + np.arange(0, count * stride, stride) + whole_BL.ravel().astype(np.int64)
    taps = _windows(buffer, starts * channels, (n + 3) * channels).double()
    t = (shift_BL - whole_BL).ravel()
    t2, t3 = t * t, t * t * t
    weights = torch.from_numpy(np.stack([2 * t2 - t3 - t, t3 - 2 * t2 + 1, t2 - t3 + t, t3 - t2])).to(device)
    w1, w2, w3, w4 = weights[:, :, None]
    v1, v2, v3, v4 = (taps[:, i * channels : (i + n) * channels] for i in range(4))
    # weights sum to 1 only up to rounding: without the 1e-9 a constant 100 could come out as 99
    mixed = _bytes(torch.mul(v2, w2).addcmul_(v1, w1).addcmul_(v3, w3).addcmul_(v4, w4).add_(1e-9))
    first_BL = np.ceil(-0.5 - shift_BL).clip(-n, n).astype(np.int64)
    inside = _windows(_pulse(n * channels, device), (n - first_BL.ravel()) * channels, n * channels)
    mixed.bitwise_and_(inside).bitwise_or_(inside.bitwise_not_().bitwise_and_(_fill(n * channels, device)))
    return mixed.view(batch, num_lines, n, channels)


@lru_cache(maxsize=8)
def _fill(length: int, device: torch.device) -> Tensor:
    return torch.tensor(FILL, dtype=torch.uint8, device=device).repeat(length // 3)


@lru_cache(maxsize=8)
def _pulse(length: int, device: torch.device) -> Tensor:
    """All bits set in the middle third of 3 * length values."""
    return torch.tensor([0, 255, 0], dtype=torch.uint8, device=device).repeat_interleave(length)


def _windows(values: Tensor, starts: np.ndarray, length: int) -> Tensor:
    """values[start : start + length] for each start: rows of an overlapping view, copied whole."""
    view = values.as_strided((len(values) - length + 1, length), (1, 1))
    return view.index_select(0, torch.from_numpy(starts).to(values.device))


def shear_x(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Row y reads at x + .03 level (y + .5)."""
    rows = np.arange(images_BHWC.shape[1]) + 0.5
    return _slide(images_BHWC, (sign_B * (level_B / 10.0 * 0.3))[:, None] * rows)


def shear_y(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Column x reads at y + .03 level (x + .5)."""
    return shear_x(images_BHWC.transpose(1, 2).contiguous(), level_B, sign_B).transpose(1, 2)


def translate_x(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Every row reads at x + .045 level W."""
    shift_B = sign_B * (level_B / 10.0 * 0.45) * images_BHWC.shape[2]
    return _slide(images_BHWC, np.repeat(shift_B[:, None], images_BHWC.shape[1], axis=1))


def translate_y(images_BHWC: Tensor, level_B: np.ndarray, sign_B: np.ndarray) -> Tensor:
    """Every column reads at y + .045 level H: one line whose pixels are whole rows."""
    shift_B = sign_B * (level_B / 10.0 * 0.45) * images_BHWC.shape[1]
    return _slide(images_BHWC.flatten(2)[:, None], shift_B[:, None]).view(images_BHWC.shape)


FUNCTIONS: tuple[Callable[[Tensor, np.ndarray, np.ndarray], Tensor], ...] = (
    auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
"""timm's order (``_RAND_INCREASING_TRANSFORMS``)."""
OPS = tuple(function.__name__ for function in FUNCTIONS)
