"""Stage 2': the set decoded once and held in memory, with the interface of ``reader.Stream``."""

# B images of a request, N images in the set, H height, W width, S output side

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.augment import CropRequest, Regions
from fastdeitlt.data.cache import DecodedSet, num_bytes, open_decoded, pack, stored_sizes
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.reader import Stream, stand_in
from fastdeitlt.data.resize import centre_crop, crop_resize
from fastdeitlt.data.side_stream import aside, side_stream
from fastdeitlt.data.workers import Workers, num_threads
from fastdeitlt.errors import UserError

log = logging.getLogger("fastdeitlt")
Residency = Literal["auto", "stream", "host", "device"]

SMALL = 48
"""Side in pixels of crops that one thread makes, because handing them out to more would cost more than it saves."""
AUTO_SHARE = 0.5
"""Part of the free memory that ``residency: auto`` takes; the rest is for the model and its activations."""


class Resident:
    """Crops of a set that is held decoded, in host memory or on the device.

    At full size (``data.stored_short_side=0``) batches equal those of ``Stream``, pixel for pixel; on a GPU up to what
    its JPEG decoder differs, because the held set is always decoded on the host. ``unreadable`` has the indices of
    images that could not be read, for which others stand in as in ``Stream``.

    Args:
        images: the set.
        cfg: ``residency`` (device, or else the host holds the pixels), ``stored_short_side``, ``num_threads``.
        device: where crops go.
        decoded: the pixels, if they are there already; None: from the cache, or decode.

    Raises:
        UserError: an image cannot be read (see ``Stream``).
    """

    def __init__(
        self, images: LongTailSet, cfg: DataConfig, device: torch.device, decoded: DecodedSet | None = None
    ) -> None:
        if decoded is None and images.images_NHWC is not None:
            decoded = pack(images.images_NHWC)
        if decoded is None:
            with closing(Stream(images, cfg, device)) as stream:
                decoded = open_decoded(images, cfg, stream)
        pixels = decoded.pixels.to(device) if cfg.residency == "device" else decoded.pixels
        self._decoded, self.device = replace(decoded, pixels=pixels), device
        self._side = side_stream(device, "source")
        self._workers = Workers(num_threads(cfg.num_threads))
        self.unreadable = set(decoded.unreadable.tolist())
        self._slot_N = np.arange(len(images))
        """The image whose pixels each one has: itself, or a stand-in."""
        for sample in self.unreadable:
            self._slot_N[sample] = stand_in(images, sample, lambda i: None if i in self.unreadable else i)

    @property
    def pool(self) -> Executor:
        """Threads for work on parts of a batch on the host."""
        return self._workers.pool

    def crops(self, requests: Iterable[CropRequest]) -> Iterator[Tensor]:
        """uint8 crops [B, S, S, 3] on the device, one tensor a request, in order; see ``CropRequest``."""
        yield from self._workers.ahead(lambda request: partial(self._crops, request), requests)

    def regions(self, requests: Iterable[CropRequest]) -> Iterator[Regions]:
        """What the crops of requests with draws are made of, in order: the held set itself if it is on the device."""
        yield from self._workers.ahead(lambda request: partial(self._regions, request), requests)

    def close(self) -> None:
        """End all threads and give memory back. May be called twice."""
        self._workers.close()
        self._decoded = replace(self._decoded, pixels=torch.empty(0, dtype=torch.uint8))

    def _crops(self, request: CropRequest) -> Tensor:
        slot_B = self._slot_N[request.sample_B]
        pixels_B = [self._decoded.image(slot) for slot in slot_B.tolist()]
        pool = self._workers.pool if request.size > SMALL else None
        with aside(self._side) as made:
            if request.draws is None:
                crops_BHWC = centre_crop(pixels_B, request.resize or request.size, request.size, pool)
            else:
                boxes_B4 = request.draws.boxes(self._decoded.sizes_N2[slot_B])
                crops_BHWC = crop_resize(pixels_B, boxes_B4, request.size, pool)
            if crops_BHWC.device.type != self.device.type:
                crops_BHWC = crops_BHWC.pin_memory().to(self.device, non_blocking=True)
            made.append(crops_BHWC)
        return crops_BHWC

    def _regions(self, request: CropRequest) -> Regions:
        if request.draws is None:
            raise ValueError("regions are for requests with draws")
        slot_B, decoded = self._slot_N[request.sample_B], self._decoded
        sizes_B2 = decoded.sizes_N2[slot_B]
        boxes_B4 = request.draws.boxes(sizes_B2)
        if decoded.pixels.device.type == self.device.type:
            return Regions(decoded.pixels, decoded.starts[slot_B], sizes_B2, boxes_B4)
        staged = stage([decoded.image(slot) for slot in slot_B.tolist()], boxes_B4, self.device, self.pool)
        with aside(self._side) as made:
            made.append(staged.pixels.to(self.device, non_blocking=True))
        return replace(staged, pixels=made[0])


def stage(images: list[Tensor], boxes_B4: np.ndarray, device: torch.device, pool: Executor) -> Regions:
    """The boxes of host images, copied next to each other into memory from which ``device`` reads fast."""
    sizes_B2 = boxes_B4[:, 2:]
    ends_B = num_bytes(sizes_B2).cumsum()
    starts_B = ends_B - num_bytes(sizes_B2)
    staged = torch.empty(int(ends_B[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy(image: Tensor, box: list[int], start: int, end: int) -> None:
        top, left, height, width = box
        staged[start:end].view(height, width, 3).copy_(image[top : top + height, left : left + width])

    list(pool.map(copy, images, boxes_B4.tolist(), starts_B.tolist(), ends_B.tolist()))
    return Regions(staged, starts_B, sizes_B2, np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1))


def open_source(
    images: LongTailSet,
    cfg: DataConfig,
    device: torch.device,
    share: int = 1,
    *,
    tell: bool = False,
    scored: bool = False,
) -> Stream | Resident:
    """The source of a set's crops that ``data.residency`` asks for; auto takes the device, the host or streams.

    Args:
        share: requests in a row that may have copies of one image; see ``Stream``.
        tell: say in the log what was taken and why.
        scored: the set is only evaluated on. What stands in for an unreadable image is left out of the scores, so it
            need not be of its class.

    Raises:
        UserError: the set does not fit where it is to live; a set that comes decoded is to stream; see ``Stream``.
    """
    if scored:
        images = replace(images, labels=np.zeros_like(images.labels))
    if images.images_NHWC is not None:
        if cfg.residency == "stream":
            raise UserError(f"data.residency=stream: {cfg.dataset} comes decoded; use auto, host or device")
        decoded = pack(images.images_NHWC)
        chosen = _choose(images, cfg, device, decoded.pixels.numel(), tell)
        return Resident(images, cfg.model_copy(update={"residency": chosen}), device, decoded)
    with ExitStack() as stack:
        stream = stack.enter_context(closing(Stream(images, cfg, device, share)))
        sizes_N2 = None if cfg.residency == "stream" else stored_sizes(images, cfg, stream)
        chosen = "stream" if sizes_N2 is None else _choose(images, cfg, device, int(num_bytes(sizes_N2).sum()), tell)
        if chosen == "stream":
            stack.pop_all()  # it stays open
            return stream
        decoded = open_decoded(images, cfg, stream, sizes_N2)
    return Resident(images, cfg.model_copy(update={"residency": chosen}), device, decoded)


def _choose(images: LongTailSet, cfg: DataConfig, device: torch.device, needed: int, tell: bool) -> Residency:
    """device, host or stream.

    Raises:
        UserError: the place asked for is too small.
    """
    free = {"host": _free_host_bytes()}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    room = ", ".join(f"{place} has {_size(amount)} free" for place, amount in free.items())
    stored = f"short side {cfg.stored_short_side}" if cfg.stored_short_side else "full size"
    what = f"{len(images):,} images take {_size(needed)} decoded at {stored}; {room}"
    if cfg.residency == "auto":
        places: tuple[Residency, ...] = ("device", "host")
        fits = [place for place in places if needed <= AUTO_SHARE * free.get(place, 0)]
        chosen = fits[0] if fits else "stream" if images.images_NHWC is None else "host"
        if tell:
            log.info("data.residency=auto: %s (up to %.0f %% are used): %s", what, 100 * AUTO_SHARE, chosen)
        return chosen
    chosen = cfg.residency if cfg.residency in free else "host"
    if needed > free[chosen]:
        raise UserError(f"data.residency={cfg.residency}: {what}; use residency=stream or a smaller stored_short_side")
    if tell:
        log.info("data.residency=%s: %s", cfg.residency, what)
    return chosen


def _size(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def _free_host_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
