"""In-memory source: a decoded set with the interface of ``reader.Stream``."""

# B images of a request, N images in the set, H height, W width, S output side

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.cache import DecodedSet, num_bytes
from fastdeitlt.data.pixels.request import AnyRequest, CropRequest, Regions
from fastdeitlt.data.pixels.resize import cut
from fastdeitlt.data.pixels.side_stream import aside, side_stream
from fastdeitlt.data.pixels.workers import Workers, num_threads
from fastdeitlt.data.sets.types import LongTailSet


class Resident:
    """Source of crops from a decoded set in host or device memory.

    At full size (``data.stored_short_side=0``) batches equal those of ``Stream`` exactly; on a GPU they can differ
    where its JPEG decoder does, because this set is always decoded on the host. ``unreadable`` has the indices of
    unreadable images, replaced as in ``Stream``.

    Args:
        images: the set.
        cfg: ``residency`` (device, else the pixels stay on the host) and ``num_threads``.
        device: device of the crops.
        decoded: pixels of the set.

    Raises:
        UserError: an unreadable image has no readable replacement of its class.
    """

    def __init__(self, images: LongTailSet, cfg: DataConfig, device: torch.device, decoded: DecodedSet) -> None:
        pixels = decoded.pixels.to(device) if cfg.residency == "device" else decoded.pixels
        self._decoded, self.device = replace(decoded, pixels=pixels), device
        self._side = side_stream(device, "source")
        self._workers = Workers(num_threads(cfg.num_threads), device)
        self.unreadable = set(decoded.unreadable.tolist())
        self._slot_N = np.arange(len(images))
        """Image whose pixels represent each image: itself, or its replacement."""
        for sample in self.unreadable:
            self._slot_N[sample] = images.stand_in(sample, lambda i: None if i in self.unreadable else i)

    def crops(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Tensor]]:
        """Yield each request with its finished crops, see ``Source.crops``."""
        yield from self._workers.map(lambda request: (request, request.finish(self._crops(request))), requests)

    def regions(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Regions]]:
        """Yield each request (with draws) and its regions (on the device: the whole set)."""
        yield from self._workers.map(lambda request: (request, self._regions(request)), requests)

    def close(self) -> None:
        """End all threads and release memory. May be called twice."""
        self._workers.close()
        self._decoded = replace(self._decoded, pixels=torch.empty(0, dtype=torch.uint8))

    def _crops(self, request: CropRequest) -> Tensor:
        slot_B = self._slot_N[request.sample_B]
        pixels_B = [self._decoded.image(slot) for slot in slot_B.tolist()]
        with aside(self._side) as outputs:
            crops_BHWC = cut(request, pixels_B, request.boxes(self._decoded.sizes_N2[slot_B]))
            if crops_BHWC.device.type != self.device.type:
                crops_BHWC = crops_BHWC.pin_memory().to(self.device, non_blocking=True)
            outputs.append(crops_BHWC)
        return crops_BHWC

    def _regions(self, request: CropRequest) -> Regions:
        slot_B, decoded = self._slot_N[request.sample_B], self._decoded
        sizes_B2 = decoded.sizes_N2[slot_B]
        boxes_B4 = request.boxes(sizes_B2)
        if decoded.pixels.device.type == self.device.type:
            return Regions(decoded.pixels, decoded.starts[slot_B], sizes_B2, boxes_B4)
        staged = stage([decoded.image(slot) for slot in slot_B.tolist()], boxes_B4, self.device)
        with aside(self._side) as outputs:
            outputs.append(staged.pixels.to(self.device, non_blocking=True))
        return replace(staged, pixels=outputs[0])


def stage(images: list[Tensor], boxes_B4: np.ndarray, device: torch.device) -> Regions:
    """Copy the boxes of host images into one buffer, pinned for a GPU."""
    sizes_B2 = boxes_B4[:, 2:]
    ends_B = num_bytes(sizes_B2).cumsum()
    starts_B = ends_B - num_bytes(sizes_B2)
    staged = torch.empty(int(ends_B[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for image, box, start, end in zip(images, boxes_B4.tolist(), starts_B.tolist(), ends_B.tolist(), strict=True):
        top, left, height, width = box
        staged[start:end].view(height, width, 3).copy_(image[top : top + height, left : left + width])
    return Regions(staged, starts_B, sizes_B2, np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1))
