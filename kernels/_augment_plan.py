"""Host side of ``augment``: parameter rows of the images, and the images that need extra passes."""

# B batch

from typing import NamedTuple

import fastdeitlt.kernels._augment_device as gpu
import numpy as np
import triton

from fastdeitlt.data.augment import randaugment as ops
from fastdeitlt.data.augment import warps
from fastdeitlt.data.augment.transform import Draws
from fastdeitlt.data.mixup import MixDraw

KINDS = {
    "auto_contrast": gpu.LOOKUP, "equalize": gpu.LOOKUP, "contrast": gpu.LOOKUP, "invert": gpu.INVERT,
    "posterize": gpu.POSTERIZE, "solarize": gpu.SOLARIZE, "solarize_add": gpu.SOLARIZE_ADD,
    "brightness": gpu.BRIGHTNESS, "color": gpu.COLOR, "sharpness": gpu.SHARPNESS, "rotate": gpu.WARP,
    "shear_x": gpu.WARP, "shear_y": gpu.WARP, "translate_x": gpu.WARP, "translate_y": gpu.WARP,
}  # fmt: skip
KIND = np.array([gpu.NONE.value, *(KINDS[name].value for name in ops.OPS)])
"""Kind of operation op at index op + 1; op -1 is none."""
STATISTIC = {"auto_contrast": gpu.AUTO_CONTRAST, "equalize": gpu.EQUALIZE, "contrast": gpu.CONTRAST}
STATISTICS = np.array([STATISTIC[name].value if name in STATISTIC else -1 for name in ops.OPS])
NEEDS_IMAGE = [kind.value for kind in (gpu.LOOKUP, gpu.COLOR, gpu.SHARPNESS, gpu.WARP)]


class LaunchPlan(NamedTuple):
    """Kernel arguments of one batch, computed on the host from the draws."""

    rows: np.ndarray
    """float64 [B + 1, COLUMNS]."""
    jobs: np.ndarray
    """int32: (image, statistic) of first, then of second operations; then the images with a separate first one."""
    num_first: int
    num_second: int
    num_separate: int
    taps: int
    intermediate: int
    """Most pixels of an image between the two resizing passes, rounded up to 16: one kernel variant for all batches."""


def make_plan(
    starts_B: np.ndarray, sizes_B2: np.ndarray, boxes_B4: np.ndarray, draws: Draws, mix: MixDraw, size: int
) -> LaunchPlan:
    """Build the rows and jobs of a batch; arguments as ``augment``'s."""
    boxes_B4 = boxes_B4.astype(np.int64)
    height_B, width_B = boxes_B4[:, 2], boxes_B4[:, 3]
    stride_B = 3 * sizes_B2[:, 1].astype(np.int64)
    columns_first_B = height_B - size > np.maximum(0, 2 * (width_B - size))
    rows = np.zeros((len(draws) + 1, gpu.COLUMNS.value))
    corner_B = starts_B + boxes_B4[:, 0] * stride_B + 3 * boxes_B4[:, 1]
    rows[:-1, :6] = np.stack([corner_B, stride_B, height_B, width_B, columns_first_B, draws.flip_B], axis=1)
    has_first_B = draws.op_B2[:, :1] >= 0
    op_B2, level_B2, sign_B2 = (
        np.where(has_first_B, values, np.stack([values[:, 1], np.full(len(draws), nothing)], axis=1))
        for values, nothing in ((draws.op_B2, -1), (draws.level_B2, 0.0), (draws.sign_B2, 1.0))
    )
    jobs: list[np.ndarray] = []
    counts: list[int] = []
    for column, op_B, level_B, sign_B in zip((6, 15), op_B2.T, level_B2.T, sign_B2.T, strict=True):
        rows[:-1, column : column + 8] = _operation(op_B, level_B, sign_B, size)
        listed = np.flatnonzero(KIND[op_B + 1] == gpu.LOOKUP.value)
        rows[listed, column + 8] = sum(counts) + np.arange(len(listed))
        jobs.append(np.stack([listed, STATISTICS[op_B[listed]]], axis=1).ravel())
        counts.append(len(listed))
    separate_B = (op_B2[:, 0] >= 0) & np.isin(KIND[op_B2[:, 1] + 1], NEEDS_IMAGE)
    rows[:-1, 24] = separate_B
    rows[:-1, 25:29], rows[:-1, 29] = draws.erase_B4, draws.noise_B
    rows[-1, :6] = mix.lam, 1.0 - mix.lam, *(mix.box or (0, 0, 0, 0))
    jobs.append(np.flatnonzero(separate_B))
    between_B = np.where(columns_first_B, width_B, height_B) * size
    taps = triton.next_power_of_2(int(4 * max(height_B.max() / size, width_B.max() / size, 1.0)) + 1)
    flat = np.concatenate(jobs).astype(np.int32)
    return LaunchPlan(
        rows, flat, counts[0], counts[1], int(separate_B.sum()), taps, -(-int(between_B.max()) // 16) * 16
    )


def _operation(op_B: np.ndarray, level_B: np.ndarray, sign_B: np.ndarray, size: int) -> np.ndarray:
    """Return kind, argument and matrix of one operation an image [B, 8]."""
    argument = {
        "posterize": ops.kept_bits(level_B), "solarize": ops.solarize_threshold(level_B),
        "solarize_add": ops.solarize_added(level_B),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), ops.blend_factor(level_B, sign_B)),
    }  # fmt: skip
    columns = np.zeros((len(op_B), 8))
    columns[:, 0] = KIND[op_B + 1]
    for name, value_B in argument.items():
        columns[:, 1] = np.where(op_B == ops.OPS.index(name), value_B, columns[:, 1])
    columns[:, 2:] = 1, 0, 0, 0, 1, 0
    shear_B, share_B = warps.shear_factor(level_B, sign_B), warps.translation_share(level_B, sign_B)
    moved = {"shear_x": (3, shear_B), "shear_y": (5, shear_B)}
    moved |= {"translate_x": (4, share_B * size), "translate_y": (7, share_B * size)}
    for name, (column, value_B) in moved.items():
        columns[:, column] = np.where(op_B == ops.OPS.index(name), value_B, columns[:, column])
    degrees_B = warps.rotation_degrees(level_B, sign_B)
    for b in np.flatnonzero(op_B == ops.OPS.index("rotate")):
        columns[b, 2:] = warps.rotation(degrees_B[b], size, size)
    return columns
