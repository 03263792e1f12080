"""Colour augmentation of the CNN recipes: jitter, gray, blur, AutoAugment, Cutout.

Jitter and policy are operations of ``augment.apply``; hue, gray and blur (SimCLR) and Cutout follow on the normalised
images. Differences from the references: hue follows the other jitters instead of a random order, and the policy's warps
are bicubic and filled like RandAugment's.
"""

# B batch, C channels (3), H height, W width, S output side, n operations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeitlt.config import AugmentConfig
from fastdeitlt.data.augment import counter
from fastdeitlt.data.augment import transform as augment
from fastdeitlt.data.augment.randaugment import OPS
from fastdeitlt.data.augment.transform import Draws

POLICY, JITTER, AFTER, CUTOUT = range(200, 204)
"""Streams of the generator, distinct from those of transform.py."""
STRENGTH = 0.4
"""ColorJitter's range of brightness, contrast and saturation around 1."""
BLUR_SIGMA = (0.1, 2.0)
LUMA = (0.299, 0.587, 0.114)
JITTERS = np.array([OPS.index(name) for name in ("brightness", "contrast", "color")], np.int8)
# (probability, operation, magnitude 0..9) twice
CIFAR10_POLICY = (
    (0.1, "invert", 7, 0.2, "contrast", 6),
    (0.7, "rotate", 2, 0.3, "translate_x", 9),
    (0.8, "sharpness", 1, 0.9, "sharpness", 3),
    (0.5, "shear_y", 8, 0.7, "translate_y", 9),
    (0.5, "auto_contrast", 8, 0.9, "equalize", 2),
    (0.2, "shear_y", 7, 0.3, "posterize", 7),
    (0.4, "color", 3, 0.6, "brightness", 7),
    (0.3, "sharpness", 9, 0.7, "brightness", 9),
    (0.6, "equalize", 5, 0.5, "equalize", 1),
    (0.6, "contrast", 7, 0.6, "sharpness", 5),
    (0.7, "color", 7, 0.5, "translate_x", 8),
    (0.3, "equalize", 7, 0.4, "auto_contrast", 8),
    (0.4, "translate_y", 3, 0.2, "sharpness", 6),
    (0.9, "brightness", 6, 0.2, "color", 8),
    (0.5, "solarize", 2, 0.0, "invert", 3),
    (0.2, "equalize", 0, 0.6, "auto_contrast", 0),
    (0.2, "equalize", 8, 0.6, "equalize", 4),
    (0.9, "color", 9, 0.6, "equalize", 6),
    (0.8, "auto_contrast", 4, 0.2, "solarize", 8),
    (0.1, "brightness", 3, 0.7, "color", 0),
    (0.4, "solarize", 5, 0.9, "auto_contrast", 3),
    (0.9, "translate_y", 9, 0.7, "translate_y", 9),
    (0.9, "auto_contrast", 2, 0.8, "solarize", 3),
    (0.8, "equalize", 8, 0.1, "invert", 3),
    (0.7, "translate_y", 9, 0.9, "auto_contrast", 1),
)
POSTERIZE_BITS = 5
"""Bits kept by the policy's posterize; RandAugment's increasing variant keeps at most 4."""


@dataclass(frozen=True)
class View:
    """Recipe of one view of an image: geometry by ``augment``, then colour.

    ``jitter_prob`` of ColorJitter(.4, .4, .4) with ``hue`` shifts in turns, ``gray_prob``, ``blur_prob``; ``policy``:
    AutoAugment for CIFAR-10; ``cutout``: side of the black square as a share of the image's.
    """

    augment: AugmentConfig
    jitter_prob: float = 0.0
    hue: float = 0.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    policy: bool = False
    cutout: float = 0.0


def view_of(cfg: AugmentConfig) -> View:
    """Return the view of ``augment.recipe``."""
    match cfg.recipe:
        case "autoaugment_cutout":
            return View(cfg, policy=True, cutout=0.5)
        case "crop_jitter":
            return View(cfg, jitter_prob=1.0)
        case _:
            return View(cfg)


@dataclass(frozen=True)
class ViewDraws:
    """Drawn parameters of B images, for ``augment.apply`` (``draws``) and ``apply``."""

    draws: Draws
    hue_B: np.ndarray
    gray_B: np.ndarray
    sigma_B: np.ndarray
    posterize_B: np.ndarray
    cutout_B4: np.ndarray


def draw(sample_B: np.ndarray, copy_B: np.ndarray, *, seed: int, epoch: int, view: View, size: int) -> ViewDraws:
    """Draw a view of samples' copies, a pure function of (seed, epoch, sample, copy)."""
    key_B = counter.keys(seed, epoch, sample_B, copy_B)
    draws = augment.draw(sample_B, copy_B, seed=seed, epoch=epoch, cfg=view.augment, size=size)
    posterize_B = np.zeros(len(key_B), bool)
    u_B6 = counter.uniform(key_B, AFTER, 6)
    jittered_B = u_B6[:, 0] < view.jitter_prob
    if view.policy:
        draws, posterize_B = _draw_policy(draws, key_B)
    elif view.jitter_prob:
        draws = _draw_jitter(draws, key_B, jittered_B)
    low, high = BLUR_SIGMA
    return ViewDraws(
        draws,
        hue_B=np.where(jittered_B, view.hue * (2 * u_B6[:, 1] - 1), 0.0),
        gray_B=u_B6[:, 2] < view.gray_prob,
        sigma_B=np.where(u_B6[:, 3] < view.blur_prob, low + (high - low) * u_B6[:, 4], 0.0),
        posterize_B=posterize_B,
        cutout_B4=_draw_cutout(key_B, view.cutout, size),
    )


def _draw_jitter(draws: Draws, key_B: np.ndarray, jittered_B: np.ndarray) -> Draws:
    """Draw ColorJitter's factors U(.6, 1.4) in random order (torchvision)."""
    u_B6 = counter.uniform(key_B, JITTER, 6)
    change_B3 = STRENGTH * (2 * u_B6[:, :3] - 1)
    op_B3 = np.where(jittered_B[:, None], JITTERS[u_B6[:, 3:].argsort(axis=1)], -1).astype(np.int8)
    # RandAugment's factor is 1 +- .09 level
    return replace(draws, op_B2=op_B3, level_B2=np.abs(change_B3) / 0.09, sign_B2=np.sign(change_B3))


def _draw_policy(draws: Draws, key_B: np.ndarray) -> tuple[Draws, np.ndarray]:
    u_B5 = counter.uniform(key_B, POLICY, 5)
    chosen = [CIFAR10_POLICY[i] for i in (u_B5[:, 0] * len(CIFAR10_POLICY)).astype(int)]
    chance_B2 = np.array([(p[0], p[3]) for p in chosen])
    op_B2 = np.array([(OPS.index(p[1]), OPS.index(p[4])) for p in chosen], np.int8)
    level_B2 = np.array([(p[2], p[5]) for p in chosen]) * 10 / 9
    translates_B2 = np.isin(op_B2, [OPS.index("translate_x"), OPS.index("translate_y")])
    level_B2 = np.where(translates_B2, level_B2 * (150 / 331) / 0.45, level_B2)
    sign_B2 = np.where((u_B5[:, 3:] < 0.5) | (op_B2 == OPS.index("rotate")), 1.0, -1.0)
    op_B2 = np.where(u_B5[:, 1:3] < chance_B2, op_B2, -1).astype(np.int8)
    posterize_B2 = op_B2 == OPS.index("posterize")
    op_B2 = np.where(posterize_B2, -1, op_B2).astype(np.int8)
    return replace(draws, op_B2=op_B2, level_B2=level_B2, sign_B2=sign_B2), posterize_B2.any(axis=1)


def _draw_cutout(key_B: np.ndarray, share: float, size: int) -> np.ndarray:
    """Draw Cutout's (top, left, bottom, right), clipped; empty without Cutout.

    Source: DeVries and Taylor 2017 (arXiv 1708.04552); PaCo/LT/autoaug.py.
    """
    half = int(share * size) // 2
    centre_B2 = (counter.uniform(key_B, CUTOUT, 2) * size).astype(np.int64)
    return np.concatenate([centre_B2 - half, centre_B2 + half], axis=1).clip(0, size)


def apply(crops_BHWC: Tensor, draws: ViewDraws, view: View) -> Tensor:
    """Apply a view to uint8 crops; return images_BCHW, normalised float32."""
    images_BCHW = augment.apply(crops_BHWC, draws.draws, view.augment)
    device = images_BCHW.device
    if view.policy or view.hue or view.gray_prob or view.blur_prob:
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (view.augment.mean, view.augment.std))
        rgb_BCHW = images_BCHW * std + mean
        rgb_BCHW = _where(draws.posterize_B, rgb_BCHW, _posterize)
        rgb_BCHW = _where(draws.hue_B, rgb_BCHW, shift_hue)
        rgb_BCHW = _where(draws.gray_B, rgb_BCHW, _gray)
        rgb_BCHW = _where(draws.sigma_B, rgb_BCHW, blur)
        images_BCHW = (rgb_BCHW - mean) / std
    if view.cutout:
        pixel = torch.arange(images_BCHW.shape[-1], device=device)
        top, left, bottom, right = torch.from_numpy(draws.cutout_B4).to(device).T[:, :, None]
        inside_BHW = ((pixel >= top) & (pixel < bottom))[:, :, None] & ((pixel >= left) & (pixel < right))[:, None, :]
        black = -torch.tensor(view.augment.mean, device=device) / torch.tensor(view.augment.std, device=device)
        images_BCHW = torch.where(inside_BHW[:, None], black.view(1, 3, 1, 1), images_BCHW)
    return images_BCHW.contiguous(memory_format=torch.channels_last)


def _where(amount_B: np.ndarray, rgb_BCHW: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply ``change`` to the images whose amount is not 0."""
    chosen = np.flatnonzero(amount_B)
    if not len(chosen):
        return rgb_BCHW
    index = torch.from_numpy(chosen).to(rgb_BCHW.device)
    amount = torch.from_numpy(amount_B[chosen]).to(rgb_BCHW.device, torch.float32).view(-1, 1, 1, 1)
    return rgb_BCHW.index_copy(0, index, change(rgb_BCHW[index], amount))


def _posterize(rgb_BCHW: Tensor, amount: Tensor) -> Tensor:
    step = 2 ** (8 - POSTERIZE_BITS)
    return (rgb_BCHW * 255).round().div(step, rounding_mode="floor") * step / 255


def _gray(rgb_BCHW: Tensor, amount: Tensor) -> Tensor:
    luma = torch.tensor(LUMA, device=rgb_BCHW.device).view(1, 3, 1, 1)
    return (rgb_BCHW * luma).sum(1, keepdim=True).expand_as(rgb_BCHW)


def shift_hue(rgb_BCHW: Tensor, turns_B111: Tensor) -> Tensor:
    """Shift the hue of RGB images in 0..1, keeping HSV saturation and value."""
    value = rgb_BCHW.amax(1, keepdim=True)
    chroma = value - rgb_BCHW.amin(1, keepdim=True)
    red, green, blue = rgb_BCHW.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offset = torch.tensor([5.0, 3.0, 1.0], device=rgb_BCHW.device).view(1, 3, 1, 1)
    place = (offset + sector + 6 * turns_B111) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def blur(rgb_BCHW: Tensor, sigma_B111: Tensor) -> Tensor:
    """Blur each image by its own sigma in pixels; borders are reflected."""
    batch, channels = rgb_BCHW.shape[:2]
    reach = min(int(3 * BLUR_SIGMA[1]), min(rgb_BCHW.shape[2:]) - 1)
    offset = torch.arange(-reach, reach + 1, device=rgb_BCHW.device)
    kernel_Bn = torch.exp(-0.5 * (offset / sigma_B111.view(-1, 1)) ** 2)
    kernel_Bn = (kernel_Bn / kernel_Bn.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    padded = F.pad(rgb_BCHW, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    rows = F.conv2d(padded, kernel_Bn[:, None, None, :], groups=batch * channels)
    both = F.conv2d(rows, kernel_Bn[:, None, :, None], groups=batch * channels)
    return both.view_as(rgb_BCHW)
