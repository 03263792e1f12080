"""Strong augmentation: parameters drawn on the host, applied on any device.

``draw`` is a pure function of (seed, epoch, sample, copy), so batches do not depend on workers, ranks or restarts.
``apply`` is timm's chain on uint8 crops: flip, RandAugment, normalise, random erasing (timm ``create_transform`` with
rand-m9-mstd0.5-inc1; RandAugment arXiv 1909.13719, random erasing arXiv 1708.04896).
"""

# B batch, C channels, H height, W width, S output side, A attempts

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import buffers, counter
from fastdeitlt.data.augment.randaugment import OPS, chunk_size, put, rand_augment, take

ATTEMPTS = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_RATIO = (0.3, 1 / 0.3)
CROP, FLIP, OP, LEVEL, ERASE, NOISE, SHIFT = range(7)
"""Streams of the generator; a new kind of draw needs a new number, which leaves the others unchanged."""


@dataclass(frozen=True)
class Draws:
    """Drawn parameters of B images.

    ``flip_B`` bool. ``op_B2`` int8 indices into ``OPS``, -1 = not applied. ``level_B2`` magnitude 0..10, ``sign_B2``
    +1 or -1. ``erase_B4`` int32 (top, left, height, width) at the output size, height 0 = none; ``noise_B`` uint32 key
    of its noise. ``shift_B2`` int32 (down, right) offset of a pad_crop. ``area_BA`` and ``ratio_BA`` are the
    RandomResizedCrop attempts, ``place_B2`` its position in 0..1; no attempts = the whole image.
    """

    flip_B: np.ndarray
    op_B2: np.ndarray
    level_B2: np.ndarray
    sign_B2: np.ndarray
    erase_B4: np.ndarray
    noise_B: np.ndarray
    shift_B2: np.ndarray
    area_BA: np.ndarray
    ratio_BA: np.ndarray
    place_B2: np.ndarray
    ratio_range: tuple[float, float]

    def __len__(self) -> int:
        return len(self.flip_B)

    def boxes(self, sizes_B2: np.ndarray) -> np.ndarray:
        """Return RandomResizedCrop boxes (top, left, height, width), int32 [B, 4].

        For (height, width): the first attempt that fits, else the largest central box within the ratio range. Recipes
        without random crops have the central square, as in evaluation: the proportions of an image are kept.
        Source: timm ``RandomResizedCropAndInterpolation.get_params``.
        """
        sizes_B2 = np.broadcast_to(np.asarray(sizes_B2, np.int64), (len(self), 2))
        if not self.area_BA.shape[1]:
            side_B2 = np.repeat(sizes_B2.min(axis=1, keepdims=True), 2, axis=1)
            return np.concatenate([(sizes_B2 - side_B2) // 2, side_B2], axis=1).astype(np.int32)
        area_BA = self.area_BA * sizes_B2.prod(axis=1, keepdims=True)
        height_BA, width_BA = _sides(area_BA, 1.0 / self.ratio_BA)
        fits_BA = (height_BA <= sizes_B2[:, :1]) & (width_BA <= sizes_B2[:, 1:])
        box_B2 = _first(fits_BA, height_BA, width_BA)
        place_B2 = np.floor(self.place_B2 * (sizes_B2 - box_B2 + 1)).astype(np.int64)
        low, high = self.ratio_range
        central_B2 = np.minimum(
            sizes_B2, np.rint(np.stack([sizes_B2[:, 1] / low, sizes_B2[:, 0] * high], 1)).astype(int)
        )
        fits_B1 = fits_BA.any(axis=1, keepdims=True)
        box_B2 = np.where(fits_B1, box_B2, central_B2)
        place_B2 = np.where(fits_B1, place_B2, (sizes_B2 - central_B2) // 2)
        return np.concatenate([place_B2, box_B2], axis=1).astype(np.int32)


def _sides(area: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return box sides in pixels, at least 1, from area and ratio height / width."""
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    return np.maximum(height, 1).astype(np.int64), np.maximum(width, 1).astype(np.int64)


def _first(fits_BA: np.ndarray, height_BA: np.ndarray, width_BA: np.ndarray) -> np.ndarray:
    """Return height and width of each sample's first attempt that fits, [B, 2]."""
    rows_B, first_B = np.arange(len(fits_BA)), fits_BA.argmax(axis=1)
    return np.stack([height_BA[rows_B, first_B], width_BA[rows_B, first_B]], axis=1)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def draw(sample_B: np.ndarray, copy_B: np.ndarray, *, seed: int, epoch: int, cfg: AugmentConfig, size: int) -> Draws:
    """Draw the augmentation of samples' copies, for images of ``size`` x ``size``.

    Args:
        sample_B, copy_B: index in the set, and number of the copy in this epoch.
        seed, epoch: the rest of the key.
        cfg: distributions; ``recipe`` disables whole stages.

    Returns:
        Draws of B images; equal keys give equal draws in any batch.
    """
    key_B = counter.keys(seed, epoch, sample_B, copy_B)
    deit = cfg.recipe == "deit"
    attempts = ATTEMPTS if cfg.recipe in ("deit", "crop_jitter") else 0
    pad = cfg.pad if cfg.recipe in ("pad_crop", "autoaugment_cutout") else 0
    crop_Bn, op_B6 = counter.uniform(key_B, CROP, 2 * ATTEMPTS + 2), counter.uniform(key_B, OP, 6)
    applied_B2 = (op_B6[:, 2:4] < cfg.rand_prob) & (np.arange(2) < cfg.rand_ops) & deit
    log_ratio = math.log(cfg.crop_ratio[0]), math.log(cfg.crop_ratio[1])
    return Draws(
        flip_B=(counter.uniform(key_B, FLIP, 1)[:, 0] < cfg.flip_prob) & (cfg.recipe != "none"),
        op_B2=np.where(applied_B2, (op_B6[:, :2] * len(OPS)).astype(np.int8), np.int8(-1)),
        level_B2=(cfg.rand_magnitude + cfg.rand_std * counter.normal(key_B, LEVEL, 2)).clip(0.0, 10.0),
        sign_B2=np.where(op_B6[:, 4:] < 0.5, 1.0, -1.0),
        erase_B4=_draw_erase(key_B, cfg.erase_prob * deit, size),
        noise_B=(counter.words(key_B, NOISE, 1)[:, 0] >> np.uint64(32)).astype(np.uint32),
        shift_B2=(counter.uniform(key_B, SHIFT, 2) * (2 * pad + 1)).astype(np.int32) - pad,
        area_BA=_between(crop_Bn[:, :attempts], *cfg.crop_scale),
        ratio_BA=np.exp(_between(crop_Bn[:, ATTEMPTS : ATTEMPTS + attempts], *log_ratio)),
        place_B2=crop_Bn[:, -2:],
        ratio_range=cfg.crop_ratio,
    )


def _draw_erase(key_B: np.ndarray, prob: float, size: int) -> np.ndarray:
    """Draw erasing boxes as timm does: the first of ten attempts that fits."""
    u_Bn = counter.uniform(key_B, ERASE, 2 * ATTEMPTS + 3)
    area_BA = _between(u_Bn[:, :ATTEMPTS], *ERASE_AREA) * size**2
    ratio_BA = np.exp(_between(u_Bn[:, ATTEMPTS : 2 * ATTEMPTS], math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
    height_BA, width_BA = _sides(area_BA, ratio_BA)
    fits_BA = (height_BA < size) & (width_BA < size)
    box_B2 = _first(fits_BA, height_BA, width_BA)
    place_B2 = np.floor(u_Bn[:, -2:] * (size - box_B2 + 1)).astype(np.int64)
    applied_B1 = fits_BA.any(axis=1, keepdims=True) & (u_Bn[:, 2 * ATTEMPTS, None] < prob)
    return np.where(applied_B1, np.concatenate([place_B2, box_B2], axis=1), 0).astype(np.int32)


def apply(crops_BHWC: Tensor, draws: Draws, cfg: AugmentConfig) -> Tensor:
    """Augment uint8 crops as drawn: flip, shift, RandAugment, normalise, erase.

    Args:
        crops_BHWC: uint8 on any device; not modified.
        draws: drawn for this image size.
        cfg: mean and std.

    Returns:
        images_BCHW, float32, channels last in memory.
    """
    pixels_BHWC = crops_BHWC.clone()
    flipped = np.flatnonzero(draws.flip_B)
    put(pixels_BHWC, flipped, take(crops_BHWC, flipped).flip(2))
    if draws.shift_B2.any():
        pixels_BHWC = _shift(pixels_BHWC, draws.shift_B2)
    rand_augment(pixels_BHWC, draws.op_B2, draws.level_B2, draws.sign_B2)
    images_BCHW = normalise(pixels_BHWC, cfg.mean, cfg.std)
    _erase(images_BCHW.permute(0, 2, 3, 1), draws.erase_B4, draws.noise_B)
    return images_BCHW


def _shift(images_BHWC: Tensor, shift_B2: np.ndarray) -> Tensor:
    """Shift each image (down, right) by whole pixels, filling with black."""
    shifted_BHWC = torch.zeros_like(images_BHWC)
    height, width = images_BHWC.shape[1:3]
    for b, (down, right) in enumerate(shift_B2.tolist()):
        rows, columns = (slice(max(s, 0), n + min(s, 0)) for s, n in ((down, height), (right, width)))
        from_rows, from_columns = (slice(max(-s, 0), n - max(s, 0)) for s, n in ((down, height), (right, width)))
        shifted_BHWC[b, rows, columns] = images_BHWC[b, from_rows, from_columns]
    return shifted_BHWC


def normalise(crops_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (crop / 255 - mean) / std as images_BCHW, float32, channels last."""
    images_BHWC = buffers.empty(crops_BHWC.shape, torch.float32, crops_BHWC.device)
    # a whole row of constants: broadcasting three values would prevent vectorisation
    scale, offset = (value_C.repeat(crops_BHWC.shape[2]) for value_C in affine(mean, std, crops_BHWC.device))
    step = chunk_size(crops_BHWC)
    for crops, images in zip(crops_BHWC.split(step), images_BHWC.split(step), strict=True):
        torch.add(crops.flatten(2).float().mul_(scale), offset, out=images.flatten(2))
    return images_BHWC.permute(0, 3, 1, 2)


def _erase(images_BHWC: Tensor, erase_B4: np.ndarray, noise_B: np.ndarray) -> None:
    """Fill the boxes (top, left, height, width) with noise of their keys, in place."""
    erased = np.flatnonzero(erase_B4[:, 2])
    step = chunk_size(images_BHWC)
    for part in np.split(erased, range(step, len(erased), step)):
        boxes = erase_B4[part]
        values = noise(noise_B[part], boxes, images_BHWC)
        for b, (top, left, height, width), box in zip(part.tolist(), boxes.tolist(), values, strict=True):
            images_BHWC[b, top : top + height, left : left + width] = box.view(height, width, 3)


@lru_cache(maxsize=8)
def affine(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and offset, float32 [C], of (value / 255 - mean) / std."""
    mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1.0 / (255.0 * std_C)).float().to(device), (-mean_C / std_C).float().to(device)


@lru_cache(maxsize=4)
def normal_table(device: torch.device) -> Tensor:
    """Return 65,536 equally likely quantiles of N(0, 1), float32, as a lookup table."""
    return torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float().to(device)


def noise(key_B: np.ndarray, box_B4: np.ndarray, images_BHWC: Tensor) -> Sequence[Tensor]:
    """Return erasing noise N(0, 1), float32 [height * width * 3] for each box.

    For boxes (top, left, height, width). A hash of (pixel and channel, key), identical on every device and in the fused
    kernel (the finaliser "lowbias32" of C. Wellons' hash prospector).
    """
    device, line = images_BHWC.device, 3 * images_BHWC.shape[2]  # values of an image's line
    top_B, left_B, height_B, row_B = box_B4.astype(np.int64).T * [[1], [3], [1], [3]]
    box_R = np.repeat(np.arange(len(box_B4)), height_B)  # R rows of all boxes, their values one after another
    length_R, line_R = row_B[box_R], np.arange(len(box_R)) + (top_B - height_B.cumsum() + height_B)[box_R]
    first_R = line_R * line + left_B[box_R] - length_R.cumsum() + length_R
    start, key = (np.repeat(value_R, length_R) for value_R in (first_R.astype(np.int32), key_B.view(np.int32)[box_R]))
    place = torch.from_numpy(start).to(device).add_(torch.arange(len(start), dtype=torch.int32, device=device))
    bits = place.mul_(_signed(0x9E3779B1)).bitwise_xor_(torch.from_numpy(key).to(device))
    bits = (bits ^ ((bits >> 16) & 0xFFFF)).mul_(_signed(0x7FEB352D))
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)).mul_(_signed(0x846CA68B))
    values = normal_table(device).index_select(0, (bits >> 16) & 0xFFFF)
    return values.split((height_B * row_B).tolist())


def _signed(word: int) -> int:
    """Return the int32 with a word's bits; int32 products wrap like uint32 ones."""
    return word - (1 << 32) if word >= 1 << 31 else word
