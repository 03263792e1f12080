"""Streaming source: read and decode image files for each request.

The result is a pure function of the files and the request, so a run can resume in mid-epoch.
"""

# N images in the set, B images of a request, U distinct images of a group of requests, H height, W width, S output side

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import DataConfig
from fastdeitlt.data.pixels.decoder import Decoder
from fastdeitlt.data.pixels.files import Encoded, UnreadableError, read_encoded, shrunk
from fastdeitlt.data.pixels.request import AnyRequest, CropRequest, Regions
from fastdeitlt.data.pixels.resize import cut, resize
from fastdeitlt.data.pixels.side_stream import aside, side_stream
from fastdeitlt.data.pixels.workers import Workers, grouped, num_threads
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.store.checkpoint import READ_TRIES, RETRY_S

log = logging.getLogger("fastdeitlt")
Output = TypeVar("Output", Tensor, Regions)
CropJob = tuple[CropRequest, np.ndarray, np.ndarray]
"""A request, its boxes within the decoded regions, and the region index of each of its images."""
Make = Callable[[list[Tensor], list[CropJob]], list[Output]]

SIZES_GROUP = 256
"""Image headers read by one task."""
DECODE_GROUP = 32
"""Whole images decoded together when a set is decoded once."""


class Stream:
    """Source of crops that reads and decodes the image files of each request.

    An unreadable image raises, or with ``data.on_error=skip`` is replaced by the next readable one of its class in the
    list (always the same one), logged once, and its index is added to ``unreadable``.

    Args:
        images: the set.
        cfg: ``num_threads``, ``on_error``, ``exif`` and ``jpeg_engine_share``.
        device: device of the decoded regions and crops.
        window: consecutive requests decoded together. An image that occurs in several of them (copies of repeated
            augmentation, for different virtual ranks) is read and decoded once.
    """

    def __init__(self, images: LongTailSet, cfg: DataConfig, device: torch.device, window: int = 1) -> None:
        self.unreadable: set[int] = set()
        self._images, self.device, self._window = images, device, window
        self._skip, self._exif = cfg.on_error == "skip", cfg.exif
        self._refusing = threading.Lock()
        threads = num_threads(cfg.num_threads)
        self._workers = Workers(threads, device)
        self._side = side_stream(device, "source")
        self._decoder = Decoder(threads, device, cfg.jpeg_engine_share)
        self._host_decoder = Decoder(threads, torch.device("cpu"))

    def crops(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Tensor]]:
        """Yield each request with its finished crops, see ``Source.crops``.

        Raises:
            UserError: an image cannot be read, or with skip none of its class; the message has the file and reason.
        """

        def work(group: list[AnyRequest]) -> list[tuple[AnyRequest, Tensor]]:
            return [(request, request.finish(crops)) for request, crops in self._pixels(self._cut, group)]

        for finished in self._workers.map(work, grouped(requests, self._window)):
            yield from finished

    def regions(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Regions]]:
        """Yield each request (with draws) and the regions that enclose its crops.

        Raises:
            UserError: as ``crops``.
        """
        for gathered in self._workers.map(partial(self._pixels, self._gather), grouped(requests, self._window)):
            yield from gathered

    def decoded(self, sample_N: Iterable[int], short_side: int = 0) -> Iterator[Tensor | None]:
        """Yield whole images [H, W, 3] on the host, in order; None for a skipped one.

        Args:
            short_side: limit of the shorter side, by resizing; 0 = full size.

        Raises:
            UserError: as ``crops``.
        """
        for decoded in self._workers.map(partial(self._whole, short_side), grouped(sample_N, DECODE_GROUP)):
            yield from decoded

    def sizes(self, sample_N: Iterable[int] | None = None) -> np.ndarray:
        """Read (height, width) of images' headers, int32 [N, 2]; 0 if skipped.

        Args:
            sample_N: the images; None: all.

        Raises:
            UserError: as ``crops``.
        """
        chosen = range(len(self._images)) if sample_N is None else sample_N
        sizes = self._workers.map(self._read_sizes, grouped(chosen, SIZES_GROUP))
        return np.array(list(chain.from_iterable(sizes)), np.int32).reshape(-1, 2)

    def close(self) -> None:
        """End all threads and release memory. May be called twice."""
        self._workers.close()
        self._decoder.close()
        self._host_decoder.close()

    def _pixels(self, make: Make[Output], group: list[AnyRequest]) -> list[tuple[AnyRequest, Output]]:
        sample_U, index_B = np.unique(np.concatenate([r.sample_B for r in group]), return_inverse=True)
        index = np.split(index_B, np.cumsum([len(r.sample_B) for r in group])[:-1])
        files_U = [self._read_one(sample) for sample in sample_U.tolist()]
        return list(zip(group, self._group(make, group, index, files_U), strict=True))

    def _group(
        self, make: Make[Output], group: Sequence[CropRequest], index: list[np.ndarray], files_U: list[Encoded]
    ) -> list[Output]:
        """Apply ``make`` to each request; ``index`` maps its images to ``files_U``."""
        size_U2 = np.array([(file.height, file.width) for file in files_U])
        boxes = [request.boxes(size_U2[index_B]) for request, index_B in zip(group, index, strict=True)]
        first_U2, last_U2 = size_U2.copy(), np.zeros_like(size_U2)
        for box_B4, index_B in zip(boxes, index, strict=True):
            np.minimum.at(first_U2, index_B, box_B4[:, :2])
            np.maximum.at(last_U2, index_B, box_B4[:, :2] + box_B4[:, 2:])
        regions_U4 = np.concatenate([first_U2, last_U2 - first_U2], 1).astype(np.int32)
        for box_B4, index_B in zip(boxes, index, strict=True):
            box_B4[:, :2] -= first_U2[index_B]
        with aside(self._side) as outputs:  # DALI reuses the pixels' memory once they are freed
            try:
                pixels_U = self._decoder(files_U, regions_U4)
            except RuntimeError as error:
                return self._group(make, group, index, self._replace(self._decoder, files_U, regions_U4, error))
            results = make(pixels_U, list(zip(group, boxes, index, strict=True)))
            outputs.extend(one.pixels if isinstance(one, Regions) else one for one in results)
        return results

    def _cut(self, pixels_U: list[Tensor], jobs: list[CropJob]) -> list[Tensor]:
        return [cut(one, [pixels_U[u] for u in index_B], box_B4) for one, box_B4, index_B in jobs]

    def _gather(self, pixels_U: list[Tensor], jobs: list[CropJob]) -> list[Regions]:
        sizes_U2 = np.array([pixels.shape[:2] for pixels in pixels_U])
        ends_U = 3 * sizes_U2.prod(axis=1).cumsum()
        starts_U = ends_U - 3 * sizes_U2.prod(axis=1)
        together = torch.cat([pixels.flatten() for pixels in pixels_U])
        return [Regions(together, starts_U[index_B], sizes_U2[index_B], box_B4) for _, box_B4, index_B in jobs]

    def _whole(self, short_side: int, samples: list[int]) -> list[Tensor | None]:
        outcomes = self._host_decoder.whole(read := [file for sample in samples if (file := self._try(sample))])
        images: dict[int, Tensor] = {}
        for file, outcome in zip(read, outcomes, strict=True):
            if isinstance(outcome, str):
                self._refuse(file.sample, outcome)
            else:
                images[file.sample] = outcome
        if short_side and images:
            sizes_B2 = np.array([image.shape[:2] for image in images.values()], np.int32)
            shapes = [(height, width) for height, width in shrunk(sizes_B2, short_side).tolist()]
            images = dict(zip(images, resize(list(images.values()), shapes), strict=True))
        return [images.get(sample) for sample in samples]

    def _read_one(self, sample: int) -> Encoded:
        """Read an image, or its replacement."""
        file = None if sample in self.unreadable else self._try(sample)
        return file or self._images.stand_in(sample, lambda i: None if i in self.unreadable else self._try(i))

    def _read_sizes(self, samples: list[int]) -> list[tuple[int, int]]:
        files = [self._try(sample, header_only=True) for sample in samples]
        return [(file.height, file.width) if file else (0, 0) for file in files]

    def _try(self, sample: int, header_only: bool = False) -> Encoded | None:
        for left in reversed(range(READ_TRIES)):
            try:
                return read_encoded(self._images.place(sample), sample, exif=self._exif, header_only=header_only)
            except UnreadableError as error:
                if not error.is_of_system:
                    self._refuse(sample, str(error), error.__cause__)
                    break
                if not left:  # with any data.on_error: no image is at fault
                    raise UserError(
                        f"image {self._images.name(sample)}: cannot be read after {READ_TRIES} tries ({error}). "
                        "Start again when the file system works."
                    ) from error.__cause__
                time.sleep(RETRY_S)
        return None

    def _refuse(self, sample: int, reason: str, cause: BaseException | None = None) -> None:
        """Raise a UserError for an image, or with skip log it once."""
        name = self._images.name(sample)
        if not self._skip:
            what = f"image {name}: {reason}. Repair or remove it, or set data.on_error=skip."
            raise UserError(what) from cause
        with self._refusing:
            if sample not in self.unreadable:
                self.unreadable.add(sample)
                log.warning("image %s: %s; skipped (%d so far)", name, reason, len(self.unreadable))

    def _replace(
        self, decoder: Decoder, files: list[Encoded], regions_B4: np.ndarray, error: RuntimeError
    ) -> list[Encoded]:
        """Replace the files that do not decode; raise DALI's error if each decodes alone."""
        replaced = list(files)
        for i, reason in decoder.faults(files, regions_B4, error).items():
            self._refuse(files[i].sample, reason)
            replaced[i] = self._read_one(files[i].sample)
        return replaced
