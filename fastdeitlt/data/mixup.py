"""Mixup and CutMix of a batch with its reverse (timm's batch mode).

Image i is mixed with image B - 1 - i; one lambda per batch and virtual rank. The loss uses (partner labels, lambda,
smoothing); ``mixed_target`` is the dense reference.
Source: timm.data.mixup (mode "batch", correct_lam); mixup arXiv 1710.09412, CutMix arXiv 1905.04899.
"""

# B batch, C channels, H height, W width, K classes

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

from fastdeitlt.config import MixupConfig
from fastdeitlt.errors import UserError, counted


@dataclass(frozen=True)
class MixDraw:
    """Mixing of a batch: ``lam`` its own weight, ``box`` CutMix's (y0, y1, x0, x1)."""

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


def draw(seed: int, epoch: int, index: int, virtual_rank: int, cfg: MixupConfig, size: int) -> MixDraw:
    """Draw the mixing of micro-batch ``index``; ``size`` is the image side in pixels.

    Args:
        seed, epoch, index, virtual_rank: the key; the draw is a function of it alone.
        cfg: Beta parameters and probabilities.

    Returns:
        MixDraw with timm's distributions; CutMix's lambda is the share of pixels kept.
    """
    # Philox is counter-based: streams that differ in the counter's high words never overlap
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, index, virtual_rank]))
    if not cfg.on or rng.random() >= cfg.prob:
        return MixDraw()
    both = cfg.mixup_alpha > 0 and cfg.cutmix_alpha > 0
    use_cutmix = rng.random() < cfg.switch_prob if both else cfg.cutmix_alpha > 0
    alpha = cfg.cutmix_alpha if use_cutmix else cfg.mixup_alpha
    lam = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return MixDraw(lam)
    cut = int(size * np.sqrt(1.0 - lam))
    centre_2 = rng.integers(0, size, 2)
    y0, x0 = (centre_2 - cut // 2).clip(0).tolist()
    y1, x1 = (centre_2 + (cut + 1) // 2).clip(None, size).tolist()
    return MixDraw(1.0 - (y1 - y0) * (x1 - x0) / size**2, (y0, y1, x0, x1))


def apply(images_BCHW: Tensor, mix: MixDraw) -> Tensor:
    """Mix a batch in place and return it.

    Raises:
        UserError: an odd batch size (one image has no partner).
    """
    if mix.lam == 1.0:
        return images_BCHW
    if len(images_BCHW) % 2:
        raise UserError(f"mixup: got a batch of {counted(len(images_BCHW), 'image')}, expected an even number")
    y0, y1, x0, x1 = mix.box or (0, None, 0, None)
    window_BCHW = images_BCHW[:, :, y0:y1, x0:x1]
    half = len(window_BCHW) // 2
    step = half if images_BCHW.device.type != "cpu" else 1  # pair by pair fits the CPU cache
    for start in range(0, half, step):
        first, second = window_BCHW[start : start + step], window_BCHW[len(window_BCHW) - start - step :][:step]
        own, other = first.clone(), second.flip(0)
        if mix.box is None:
            first.mul_(mix.lam).add_(other * (1.0 - mix.lam))
            second.copy_(other.mul_(mix.lam).add_(own.mul_(1.0 - mix.lam)).flip(0))
        else:
            first.copy_(other)
            second.copy_(own.flip(0))
    return images_BCHW


def mixed_target(labels_B: Tensor, partner_B: Tensor, lam: float, classes: int, smoothing: float) -> Tensor:
    """Return the dense target [B, K] of a mixed batch.

    lam * smoothed(labels) + (1 - lam) * smoothed(partner labels), where a smoothed one-hot is smoothing / K everywhere,
    plus 1 - smoothing at the label (timm's ``mixup_target``, where the partner is ``labels_B.flip(0)``). Reference for
    tests; the loss does not build it.
    """
    own_BK, other_BK = (
        one_hot(i_B, classes) * (1.0 - smoothing) + smoothing / classes for i_B in (labels_B, partner_B)
    )
    return own_BK * lam + other_BK * (1.0 - lam)
