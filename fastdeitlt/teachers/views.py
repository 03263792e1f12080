"""Batches of teacher training: one augmented view of each image, or two for PaCo."""

# B batch, C channels, H height, W width, N images in the set

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.data.augment import colour
from fastdeitlt.data.augment.colour import View
from fastdeitlt.data.pixels.prefetch import prefetch
from fastdeitlt.data.pixels.side_stream import side_stream
from fastdeitlt.data.pixels.source import Source
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.data.teacher_plan import TeacherPlan
from fastdeitlt.data.view_request import ViewRequest


@dataclass(frozen=True)
class Part:
    """A rank's micro-batch of a step."""

    views: list[Tensor]
    """images_BCHW of each view, normalised, on the source's device."""
    labels_B: Tensor


@dataclass(frozen=True)
class StepBatch:
    """The images of an optimizer step: this rank's parts, all ranks' labels in order."""

    parts: list[Part]
    labels_B: Tensor


def view_recipes(cfg: Config) -> list[View]:
    """Return the recipe of each view: the network's or queries', and PaCo's keys'."""
    first = colour.view_of(cfg.augment)
    if cfg.teacher_training.loss != "paco":
        return [first]
    cropped = cfg.augment.model_copy(update={"recipe": "crop_jitter"})
    match cfg.teacher_training.paco_view:
        case "same":
            return [first, first]
        case "simclr":
            cropped = cropped.model_copy(update={"crop_scale": (0.2, 1.0)})
            return [first, View(cropped, jitter_prob=0.8, hue=0.1, gray_prob=0.2, blur_prob=0.5)]
        case "simclr_weak":
            return [first, View(cropped, jitter_prob=1.0, gray_prob=0.2, blur_prob=0.5)]


def teacher_batches(
    cfg: Config, source: Source, images: LongTailSet, plan: TeacherPlan, epoch: int, start: int = 0
) -> Generator[StepBatch, None, None]:
    """Yield an epoch's batches from number ``start`` on, prefetched in a thread.

    All random draws are functions of (seed, epoch, image).
    """
    size = cfg.teacher_training.img_size
    recipes = view_recipes(cfg)
    labels_N, side = torch.from_numpy(images.labels), side_stream(source.device, "augment")

    def labels_of(sample_B: np.ndarray) -> Tensor:
        return labels_N[torch.from_numpy(sample_B)].to(source.device, non_blocking=True)

    def prepare() -> Iterator[Part]:
        def requests() -> Iterator[ViewRequest]:
            for batch in plan.batches(epoch, start):
                for sample_B, before_B in zip(*map(plan.parts, batch), strict=True):
                    for number, view in enumerate(recipes):
                        copy_B = before_B * len(recipes) + number
                        draws = colour.draw(sample_B, copy_B, seed=cfg.train.seed, epoch=epoch, view=view, size=size)
                        yield ViewRequest(sample_B, size, draws.draws, view=view, view_draws=draws, side=side)

        ready: list[Tensor] = []
        for request, images_BCHW in source.crops(requests()):
            ready.append(images_BCHW)
            if len(ready) == len(recipes):
                yield Part(ready, labels_of(request.sample_B))
                ready = []

    with closing(prefetch(prepare(), depth=2 * plan.accumulate)) as parts:
        for batch_B, _ in plan.batches(epoch, start):
            yield StepBatch([next(parts) for _ in range(plan.accumulate)], labels_of(batch_B))
