"""Stages 2 to 3' in a row: micro-batches of indices in, augmented and mixed batches on the device out."""

# B images in a micro-batch, C channels, H height, W width

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.data import augment, mixup
from fastdeitlt.data.augment import CropRequest
from fastdeitlt.data.longtail import LongTailSet
from fastdeitlt.data.sampler import MicroBatch

T = TypeVar("T")


class Source(Protocol):
    """Where decoded images come from: ``reader.Stream`` or ``resident.Resident``."""

    def crops(self, requests: Iterable[CropRequest]) -> Iterator[Tensor]:
        """uint8 crops [B, S, S, 3] on the device, one tensor a request, in order."""

    def close(self) -> None:
        """Stop threads and give memory back."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the step."""

    images_BCHW: Tensor
    """Normalised, mixed; float."""
    labels_B: Tensor
    partner_B: Tensor | None
    """Labels of the images mixed in; None when mixing is off."""
    lam: Tensor | None
    """Share of the own image, a 0-d tensor; None when mixing is off."""


def train_batches(
    micro_batches: Iterable[MicroBatch], source: Source, images: LongTailSet, cfg: Config, *, mixing: bool, size: int
) -> Generator[Batch, None, None]:
    """Augmented training batches, prepared two ahead in a thread.

    Everything random is drawn from (seed, epoch, image, copy) or (seed, epoch, micro-step, virtual rank), so a batch
    does not depend on threads, ranks or restarts.

    Args:
        micro_batches: which images.
        source: decoded images of the training set.
        images: the training set (labels).
        cfg: the run.
        mixing: Mixup and CutMix on.
        size: height and width in pixels.
    """
    labels_N = torch.from_numpy(images.labels)

    def prepare() -> Iterator[Batch]:
        waiting: deque[tuple[MicroBatch, augment.Draws]] = deque()

        def requests() -> Iterator[CropRequest]:
            for micro in micro_batches:
                key = {"seed": cfg.train.seed, "epoch": micro.epoch}
                draws = augment.draw(micro.sample_B, micro.copy_B, **key, cfg=cfg.augment, size=size)
                waiting.append((micro, draws))
                yield CropRequest(micro.sample_B, size, draws)

        for crops_BHWC in source.crops(requests()):
            micro, draws = waiting.popleft()
            images_BCHW = augment.apply(crops_BHWC, draws, cfg.augment)
            labels_B = labels_N[torch.from_numpy(micro.sample_B)].to(images_BCHW.device, non_blocking=True)
            if not mixing:
                yield Batch(images_BCHW, labels_B, None, None)
                continue
            mix = mixup.draw(cfg.train.seed, micro.epoch, micro.index, micro.virtual_rank, cfg.mixup, size)
            lam = torch.tensor(mix.lam).to(images_BCHW.device, non_blocking=True)
            yield Batch(mixup.apply(images_BCHW, mix), labels_B, labels_B.flip(0), lam)

    return prefetch(prepare(), depth=2)


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, computed up to ``depth`` ahead by a thread that ends with the consumer.

    An exception of the producer is raised where its item would have been.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put(None, error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
