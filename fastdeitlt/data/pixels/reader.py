"""Stage 2: read and decode image files as they are needed.

What comes out is a pure function of the files and the request, so a run resumed in mid-epoch just asks from there on.
"""

# N images in the set, B images of a request, U distinct images of a group of requests, H height, W width, S output side

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from itertools import chain, islice
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
from fastdeitlt.data.pixels.workers import Workers, num_threads
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError
from fastdeitlt.store.checkpoint import READ_TRIES, RETRY_S

log = logging.getLogger("fastdeitlt")
T = TypeVar("T")
Made = TypeVar("Made", Tensor, Regions)
Wanted = tuple[CropRequest, np.ndarray, np.ndarray]
"""A request, its boxes inside the decoded regions, and the region of each of its images."""
Make = Callable[[list[Tensor], list[Wanted]], list[Made]]

DECODE_GROUP = 32
"""Whole images decoded at a time when the set is decoded once."""


class Stream:
    """Crops of image files that are read and decoded anew for each request.

    An image that cannot be read raises, or with ``data.on_error=skip`` is replaced by the next readable one of its
    class in the list (the same one each time), logged once and kept in ``unreadable`` (indices).

    Args:
        images: the set.
        cfg: ``num_threads``, ``on_error``, ``exif`` and ``jpeg_engine_share``.
        device: where decoding ends and crops are made.
        share: consecutive requests that are decoded together. An image that appears in them more than once (the copies
            of repeated augmentation, which go to different virtual ranks) is then read and decoded once.
    """

    def __init__(self, images: LongTailSet, cfg: DataConfig, device: torch.device, share: int = 1) -> None:
        self.unreadable: set[int] = set()
        self._images, self.device, self._share = images, device, share
        self._skip, self._exif = cfg.on_error == "skip", cfg.exif
        self._refusing = threading.Lock()
        self._workers = Workers(num_threads(cfg.num_threads))
        self._side = side_stream(device, "source")
        self._decoder = Decoder(self._workers.count, device, cfg.jpeg_engine_share)
        self._host_decoder = Decoder(self._workers.count, torch.device("cpu"))

    @property
    def pool(self) -> Executor:
        """Threads for work on parts of a batch on the host."""
        return self._workers.pool

    def crops(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Tensor]]:
        """Yield each request with its uint8 crops [B, S, S, 3] on the device, in order.

        Raises:
            UserError: an image cannot be read, or with skip none of a class can; names the file and the reason.
        """
        yield from self._deliver(requests, self._cut)

    def regions(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Regions]]:
        """Yield each request (with draws) and the regions to crop from: of each image the part that its crops share.

        Raises:
            UserError: as ``crops``.
        """
        yield from self._deliver(requests, self._gather)

    def decoded(self, sample_N: Iterable[int], short_side: int = 0) -> Iterator[Tensor | None]:
        """Whole images [H, W, 3] on the host, in order; None for one that cannot be read, with skip.

        Args:
            short_side: a longer shorter side is resized to this; 0 = full size.

        Raises:
            UserError: as ``crops``.
        """
        samples = iter(sample_N)
        groups = iter(lambda: list(islice(samples, DECODE_GROUP)), [])
        for decoded in self._workers.ahead(partial(self._start_whole, short_side), groups):
            yield from decoded

    def sizes(self) -> np.ndarray:
        """Height and width of every image by its header: int32 [N, 2], zeros for what skip leaves out.

        Raises:
            UserError: as ``crops``.
        """
        parts = self._workers.split(self._read_sizes, list(range(len(self._images))))
        return np.array(_results(parts), np.int32).reshape(-1, 2)

    def close(self) -> None:
        """End all threads and give memory back. May be called twice."""
        self._workers.close()
        self._decoder.close()
        self._host_decoder.close()

    def _deliver(self, requests: Iterable[AnyRequest], make: Make[Made]) -> Iterator[tuple[AnyRequest, Made]]:
        requests = iter(requests)
        groups = iter(lambda: list(islice(requests, self._share)), [])
        for group in self._workers.ahead(partial(self._start_group, make), groups):
            yield from group

    def _start_group(self, make: Make[Made], group: list[AnyRequest]) -> Callable[[], list[tuple[AnyRequest, Made]]]:
        sample_U, index_B = np.unique(np.concatenate([r.sample_B for r in group]), return_inverse=True)
        index = np.split(index_B, np.cumsum([len(r.sample_B) for r in group])[:-1])
        reads = self._workers.split(self._read, sample_U.tolist())
        return lambda: list(zip(group, self._group(make, group, index, _results(reads)), strict=True))

    def _group(
        self, make: Make[Made], group: Sequence[CropRequest], index: list[np.ndarray], files_U: list[Encoded]
    ) -> list[Made]:
        """What ``make`` makes of each request; ``index`` has the position in ``files_U`` of each of its images."""
        size_U2 = np.array([(file.height, file.width) for file in files_U])
        boxes = [request.boxes(size_U2[index_B]) for request, index_B in zip(group, index, strict=True)]
        first_U2, last_U2 = size_U2.copy(), np.zeros_like(size_U2)
        for box_B4, index_B in zip(boxes, index, strict=True):
            np.minimum.at(first_U2, index_B, box_B4[:, :2])
            np.maximum.at(last_U2, index_B, box_B4[:, :2] + box_B4[:, 2:])
        regions_U4 = np.concatenate([first_U2, last_U2 - first_U2], 1).astype(np.int32)
        for box_B4, index_B in zip(boxes, index, strict=True):
            box_B4[:, :2] -= first_U2[index_B]
        with aside(self._side) as made:  # DALI uses the pixels' memory again once they are dropped
            try:
                pixels_U = self._decoder(files_U, regions_U4)
            except RuntimeError as error:
                return self._group(make, group, index, self._replace(self._decoder, files_U, regions_U4, error))
            wanted = make(pixels_U, list(zip(group, boxes, index, strict=True)))
            made.extend(one.pixels if isinstance(one, Regions) else one for one in wanted)
        return wanted

    def _cut(self, pixels_U: list[Tensor], wanted: list[Wanted]) -> list[Tensor]:
        return [cut(one, [pixels_U[u] for u in index_B], box_B4, self.pool) for one, box_B4, index_B in wanted]

    def _gather(self, pixels_U: list[Tensor], wanted: list[Wanted]) -> list[Regions]:
        sizes_U2 = np.array([pixels.shape[:2] for pixels in pixels_U])
        ends_U = 3 * sizes_U2.prod(axis=1).cumsum()
        starts_U = ends_U - 3 * sizes_U2.prod(axis=1)
        together = torch.cat([pixels.flatten() for pixels in pixels_U])
        return [Regions(together, starts_U[index_B], sizes_U2[index_B], box_B4) for _, box_B4, index_B in wanted]

    def _start_whole(self, short_side: int, samples: list[int]) -> Callable[[], list[Tensor | None]]:
        reads = self._workers.split(self._read_own, samples)
        return lambda: self._whole(short_side, samples, _results(reads))

    def _whole(self, short_side: int, samples: list[int], files: list[Encoded | None]) -> list[Tensor | None]:
        outcomes = self._host_decoder.whole(read := [file for file in files if file])
        images: dict[int, Tensor] = {}
        for file, outcome in zip(read, outcomes, strict=True):
            if isinstance(outcome, str):
                self._refuse(file.sample, outcome)
            else:
                images[file.sample] = outcome
        if short_side and images:
            sizes_B2 = np.array([image.shape[:2] for image in images.values()], np.int32)
            shapes = [(height, width) for height, width in shrunk(sizes_B2, short_side).tolist()]
            images = dict(zip(images, resize(list(images.values()), shapes, self._workers.pool), strict=True))
        return [images.get(sample) for sample in samples]

    def _read(self, samples: list[int]) -> list[Encoded]:
        return [self._read_one(sample) for sample in samples]

    def _read_one(self, sample: int) -> Encoded:
        """The image, or the one that stands in for it."""
        file = None if sample in self.unreadable else self._try(sample)
        return file or self._images.stand_in(sample, lambda i: None if i in self.unreadable else self._try(i))

    def _read_own(self, samples: list[int]) -> list[Encoded | None]:
        return [self._try(sample) for sample in samples]

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
                if not left:  # whatever data.on_error is: no image is at fault
                    raise UserError(
                        f"image {self._images.name(sample)}: cannot be read ({error}), tried {READ_TRIES} times; run "
                        "the same command again once the file system answers"
                    ) from error.__cause__
                time.sleep(RETRY_S)
        return None

    def _refuse(self, sample: int, reason: str, cause: BaseException | None = None) -> None:
        """Raise, or note once that the image is left out."""
        name = self._images.name(sample)
        if not self._skip:
            what = f"image {name}: {reason}; repair it, take it off the list, or set data.on_error=skip"
            raise UserError(what) from cause
        with self._refusing:
            if sample not in self.unreadable:
                self.unreadable.add(sample)
                log.warning("image %s: %s; skipped (%d so far)", name, reason, len(self.unreadable))

    def _replace(
        self, decoder: Decoder, files: list[Encoded], regions_B4: np.ndarray, error: RuntimeError
    ) -> list[Encoded]:
        """The files with those that do not decode replaced; raises DALI's error if each decodes alone."""
        replaced = list(files)
        for i, reason in decoder.faults(files, regions_B4, error).items():
            self._refuse(files[i].sample, reason)
            replaced[i] = self._read_one(files[i].sample)
        return replaced


def _results(parts: list[Future[list[T]]]) -> list[T]:
    return list(chain.from_iterable(part.result() for part in parts))
