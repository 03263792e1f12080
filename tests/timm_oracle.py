"""timm's transforms fed with our draws, and draws made by timm's own code."""

import random
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from fastdeitlt.data.augment.warps import FILL

POLICY = auto_augment.rand_augment_transform(
    "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "translate_const": 100}
)


def operate(image: np.ndarray, op: int, level: float, sign: float) -> np.ndarray:
    """One of timm's RandAugment operations at a given level and direction."""
    operation = POLICY.ops[op]
    with mock.patch.object(auto_augment.random, "random", lambda: 0.0 if sign > 0 else 1.0):
        arguments = operation.level_fn(level, operation.hparams) if operation.level_fn else ()
    if operation.name == "PosterizeIncreasing" and arguments == (0,):
        return np.zeros_like(image)  # as Pillow before 12; today's raises ValueError
    return np.asarray(operation.aug_fn(Image.fromarray(image), *arguments, **operation.kwargs))


def draw_ops(num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What timm applies to ``num`` images: operation [num, 2] (-1 = not applied), level and sign of it."""
    op, level, sign = np.full((num, 2), -1), np.zeros((num, 2)), np.zeros((num, 2))
    random.seed(11)
    np.random.seed(12)
    for i in range(num):
        for j, chosen in enumerate(np.random.choice(len(POLICY.ops), POLICY.num_layers, replace=True)):
            seen: list[float] = []
            operation = auto_augment.AugmentOp(POLICY.ops[chosen].name, 0.5, 9, POLICY.ops[chosen].hparams)
            operation.level_fn = lambda magnitude, _, seen=seen: (
                seen.append(magnitude),
                auto_augment._randomly_negate(1.0),
            )
            operation.aug_fn = lambda image, _, value, **__: value
            value = operation(None)
            if seen:
                op[i, j], level[i, j], sign[i, j] = chosen, seen[0], value
    return op, level, sign


def draw_boxes(num: int, height: int, width: int) -> np.ndarray:
    """RandomResizedCrop boxes [num, 4]."""
    random.seed(13)
    image = Image.new("L", (width, height))
    crop = RandomResizedCropAndInterpolation.get_params
    return np.array([crop(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(num)])


def draw_erasures(num: int, size: int) -> np.ndarray:
    """Random erasing boxes [num, 4], zeros when nothing is erased."""
    random.seed(14)
    eraser, boxes = RandomErasing(0.25, mode="const", device="cpu"), np.zeros((num, 4), int)
    image = torch.ones(1, size, size)
    for i in range(num):
        image.fill_(1.0)
        eraser(image)
        rows, columns = torch.nonzero(image[0] == 0, as_tuple=True)
        if len(rows):
            top, left = int(rows[0]), int(columns[0])
            boxes[i] = top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
    return boxes
