"""Selection of a pixel source: streaming from files, or decoded in memory."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.cache import cache_path, num_bytes, open_decoded, pack, stored_sizes
from fastdeitlt.data.pixels.files import shrunk
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.request import AnyRequest, Regions
from fastdeitlt.data.pixels.resident import Resident
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError, counted
from fastdeitlt.machine import available_memory

log = logging.getLogger("fastdeitlt")
Residency = Literal["auto", "stream", "host", "device"]
AUTO_SHARE = 0.5
"""Share of the free memory that ``residency: auto`` may use; the rest is for the model and activations."""
SAMPLE = 1024
"""Image headers from which the memory of a larger set is estimated: reading all of millions takes minutes."""


class Source(Protocol):
    """Interface of ``reader.Stream`` and ``resident.Resident``."""

    @property
    def device(self) -> torch.device:
        """Device of crops and regions."""

    @property
    def unreadable(self) -> set[int]:
        """Indices of replaced unreadable images; for a stream, only of those read so far."""

    def crops(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Tensor]]:
        """Yield each request with its finished crops, in order.

        The crops are uint8 [B, S, S, 3] on the device before ``request.finish``.
        """

    def regions(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Regions]]:
        """Yield each request (with draws) and the regions of its crops, in order."""

    def close(self) -> None:
        """End threads and release memory."""


def open_source(
    images: LongTailSet,
    cfg: DataConfig,
    device: torch.device,
    window: int = 1,
    *,
    tell: bool = False,
    scored: bool = False,
) -> Stream | Resident:
    """Open the source of ``data.residency``; auto tries device, host, streaming.

    Args:
        window: consecutive requests decoded together; see ``Stream``.
        tell: log the choice and the reason.
        scored: the set is for evaluation only, so it is never stored reduced. Replacements of unreadable images are not
            scored and may be of any class.

    Raises:
        UserError: the set does not fit in the chosen memory, or cannot stream (decoded, or ``stored_short_side``); see
            ``Stream``.
    """
    if scored:
        images = replace(images, labels=np.zeros_like(images.labels))
        cfg = cfg.model_copy(update={"stored_short_side": 0})
    if images.images_NHWC is not None:
        if cfg.residency == "stream":
            raise UserError(
                f"data.residency: got stream for {cfg.dataset}, which is decoded, expected auto, host or device"
            )
        decoded = pack(images.images_NHWC)
        chosen = choose(images, cfg, device, decoded.pixels.numel(), tell)
        return Resident(images, cfg.model_copy(update={"residency": chosen}), device, decoded)
    if cfg.residency == "stream" and cfg.stored_short_side:
        raise UserError(
            f"data.stored_short_side: got {cfg.stored_short_side} with data.residency=stream, which reads images at "
            "full size, expected 0. Set data.residency=host or device."
        )
    stream = Stream(images, cfg, device, window)
    if cfg.residency == "stream":
        return stream
    with ExitStack() as stack:
        stack.enter_context(closing(stream))
        resident = _resident(stream, images, cfg, device, tell)
        if resident is None:
            stack.pop_all()  # the stream stays open
            return stream
    return resident


def _resident(
    stream: Stream, images: LongTailSet, cfg: DataConfig, device: torch.device, tell: bool
) -> Resident | None:
    """Decode the set into memory; None if it is streamed."""
    if _is_far_too_large(stream, images, cfg, device, tell):
        return None
    path = cache_path(images, cfg)
    sizes_N2 = stored_sizes(path)
    if sizes_N2 is None:
        sizes_N2 = shrunk(stream.sizes(), cfg.stored_short_side)
    chosen = choose(images, cfg, device, int(num_bytes(sizes_N2).sum()), tell)
    if chosen == "stream":
        return None
    decoded = open_decoded(path, images, cfg, sizes_N2, stream.decoded(range(len(images)), cfg.stored_short_side))
    return Resident(images, cfg.model_copy(update={"residency": chosen}), device, decoded) if decoded else None


def _is_far_too_large(stream: Stream, images: LongTailSet, cfg: DataConfig, device: torch.device, tell: bool) -> bool:
    """Return whether auto streams even at half of an estimate from some headers."""
    if cfg.residency != "auto" or cfg.stored_short_side or len(images) <= 2 * SAMPLE:
        return False
    sample_N = np.linspace(0, len(images) - 1, SAMPLE).astype(np.int64)
    estimate = int(num_bytes(stream.sizes(sample_N.tolist())).mean() * len(images))
    if choose(images, cfg, device, estimate // 2) != "stream":
        return False
    choose(images, cfg, device, estimate, tell, about="about ")
    return True


def choose(
    images: LongTailSet, cfg: DataConfig, device: torch.device, needed: int, tell: bool = False, about: str = ""
) -> Residency:
    """Choose device, host or stream for images of ``needed`` decoded bytes.

    auto does not stream with ``stored_short_side``: streamed images have their full size, so the pixels of a batch
    would depend on the memory that is free at each rank's start.

    Args:
        tell: log the choice.
        about: word before the bytes in messages.

    Raises:
        UserError: the configured memory is too small.
    """
    free = {"host": available_memory()}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    room = ", ".join(f"{_size(amount)} free on {place}" for place, amount in free.items())
    stored = f"short side {cfg.stored_short_side}" if cfg.stored_short_side else "full size"
    what = f"{counted(len(images), 'image')} need {about}{_size(needed)} decoded at {stored}, {room}"
    is_decoded, is_auto = images.images_NHWC is not None, cfg.residency == "auto"
    chosen: Residency = cfg.residency if cfg.residency in free else "host"
    if is_auto:
        places: tuple[Residency, ...] = ("device", "host")
        fits = [place for place in places if needed <= AUTO_SHARE * free.get(place, 0)]
        chosen = fits[0] if fits else "host" if is_decoded or cfg.stored_short_side else "stream"
    if needed > free.get(chosen, needed) and not (is_decoded and is_auto):
        raise UserError(
            f"data.residency={cfg.residency}: {what}. Set a smaller data.stored_short_side, or data.residency=stream "
            "without it."
        )
    if tell:
        limit = f" (limit: {100 * AUTO_SHARE:.0f} %): {chosen}" if is_auto else ""
        log.info("data.residency=%s: %s%s", cfg.residency, what, limit)
    return chosen


def _size(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"
