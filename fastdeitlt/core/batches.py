"""Augmented and mixed batches on the device from micro-batches of indices."""

# B images in a micro-batch, C channels, H height, W width

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeitlt.config import AugmentConfig, Config
from fastdeitlt.data import mixup
from fastdeitlt.data.augment import colour
from fastdeitlt.data.augment.colour import ViewDraws
from fastdeitlt.data.mixup import MixDraw
from fastdeitlt.data.pixels.prefetch import prefetch
from fastdeitlt.data.pixels.request import Regions
from fastdeitlt.data.pixels.side_stream import side_stream
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.data.view_request import ViewRequest
from fastdeitlt.errors import UserError
from fastdeitlt.kernels._pick import pick
from fastdeitlt.models.residual import DropPath
from fastdeitlt.precision import autocast_dtype


@dataclass(frozen=True, kw_only=True)
class _Request(ViewRequest):
    micro: MicroBatch


@dataclass(frozen=True)
class Batch:
    """One augmented micro-batch on the device."""

    images_BCHW: Tensor
    """Normalised, mixed; float32, or bfloat16 from the fused kernel when the step computes in it."""
    labels_B: Tensor
    partner_B: Tensor | None
    """Labels of the images mixed in; None when mixing is off."""
    lam: Tensor | None
    """Weight of the own image, a 0-d tensor; None when mixing is off."""
    place: MicroBatch | None = None
    """Position in the run; None for images that are not the run's."""
    ranks: int = 1
    """Number of concatenated micro-batches, each with its own loss; if more than one, ``lam`` is [ranks]."""
    drop_paths: list[DropPath] | None = None
    """Drop path of each block; None: drawn by the student."""


def train_batches(
    micro_batches: Iterable[MicroBatch], source: Source, images: LongTailSet, cfg: Config, *, mixing: bool, size: int
) -> Generator[Batch, None, None]:
    """Yield augmented training batches, prefetched two ahead in a thread.

    All random numbers are functions of (seed, epoch, image, copy) or (seed, epoch, micro-step, virtual rank), so a
    batch does not depend on threads, ranks or restarts.

    Args:
        micro_batches: indices of the images.
        source: decoded images of the training set.
        images: the training set (labels).
        cfg: the run.
        mixing: Mixup and CutMix on.
        size: height and width in pixels.
    """
    labels_N, view = torch.from_numpy(images.labels), colour.view_of(cfg.augment)
    dtype = autocast_dtype(cfg.train.precision, source.device) or torch.float32
    fused, side = use_kernel(cfg.augment, source.device), side_stream(source.device, "augment")

    def prepare() -> Iterator[Batch]:
        def requests() -> Iterator[_Request]:
            for micro in micro_batches:
                key = {"seed": cfg.train.seed, "epoch": micro.epoch}
                draws, mix = colour.draw(micro.sample_B, micro.copy_B, **key, view=view, size=size), MixDraw()
                if mixing:
                    mix = mixup.draw(cfg.train.seed, micro.epoch, micro.index, micro.virtual_rank, cfg.mixup, size)
                yield _Request(
                    micro.sample_B, size, draws.draws, micro=micro, view=view, view_draws=draws, mix=mix, side=side
                )

        for request, pixels in source.regions(requests()) if fused else source.crops(requests()):
            micro, mix = request.micro, request.mix
            images_BCHW = (
                _augment_fused(pixels, request.view_draws, mix, cfg, size, dtype)
                if isinstance(pixels, Regions)
                else pixels
            )
            labels_B = labels_N[torch.from_numpy(micro.sample_B)].to(images_BCHW.device, non_blocking=True)
            lam = torch.tensor(mix.lam).to(images_BCHW.device, non_blocking=True) if mixing else None
            yield Batch(images_BCHW, labels_B, labels_B.flip(0) if mixing else None, lam, micro)

    return prefetch(prepare(), depth=2)


def use_kernel(cfg: AugmentConfig, device: torch.device) -> bool:
    """Return whether ``augment.impl`` selects the fused kernel on this device.

    Raises:
        UserError: `triton`, for a recipe that the kernel does not support.
    """
    fits = cfg.recipe in ("deit", "none")
    if cfg.impl == "triton" and not fits:
        raise UserError(
            f"augment.impl=triton: got augment.recipe={cfg.recipe}, expected deit or none. Use augment.impl=auto."
        )
    return pick("augment", cfg.impl, (), device, fits, on_gpu="triton") == "triton"


def _augment_fused(
    regions: Regions, draws: ViewDraws, mix: MixDraw, cfg: Config, size: int, dtype: torch.dtype
) -> Tensor:
    from fastdeitlt.kernels import augment as kernel  # Triton is not needed on a CPU

    augment = kernel.augment_checked if cfg.augment.impl == "auto" else kernel.augment
    with torch.cuda.device_of(regions.pixels):  # a thread's current device is the first GPU, not the rank's
        return augment(
            regions.pixels, regions.starts_B, regions.sizes_B2, draws.draws, mix, cfg.augment, size,
            boxes_B4=regions.boxes_B4, dtype=dtype,
        )  # fmt: skip


def noise_batch(cfg: Config, num_classes: int, size: int, device: torch.device) -> Batch:
    """Return a micro-batch of noise with the type and layout of ``train_batches``."""
    images_BCHW = torch.randn(cfg.train.batch_size, 3, size, size, device=device)
    dtype = autocast_dtype(cfg.train.precision, device) if use_kernel(cfg.augment, device) else None
    images_BCHW = images_BCHW.to(dtype or torch.float32, memory_format=torch.channels_last)
    labels_B = torch.arange(cfg.train.batch_size, device=device) % num_classes
    mixed = (labels_B.flip(0), torch.tensor(0.7, device=device)) if cfg.mixup.on else (None, None)
    return Batch(images_BCHW, labels_B, *mixed)
