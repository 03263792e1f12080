"""The training step: forward, backward, accumulate, clip, update, average; the only one outside the tests."""

# B images in a micro-batch, K classes

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import Engine
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.core.optim import Ema
from fastdeitlt.data.sampler import MicroBatch

Stage = Callable[[str], AbstractContextManager[object]]
"""Wraps the parts of a step by name: data, forward, backward, optimizer, average."""


def unobserved(name: str) -> AbstractContextManager[object]:
    """Wrap a stage in nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Phase:
    """What an epoch's place in the schedule decides: before or after re-weighting begins."""

    mixing: bool
    """Mixup and CutMix are on."""
    dist_weights_K: Tensor
    """Class weights of the DIST loss."""
    cls_weights_K: Tensor | None
    """Class weights of the CLS loss; None: all alike."""


def phase_of(cfg: Config, drw_weights_K: Tensor, epoch: int) -> Phase:
    """Return the phase of an epoch.

    Source: DeiT-LT, deferred re-weighting (arXiv 2404.02900, section 3.2).
    """
    reweight = 0 <= cfg.loss.drw_epoch <= epoch
    return Phase(
        mixing=cfg.mixup.on and not (reweight and cfg.mixup.off_in_drw),
        dist_weights_K=drw_weights_K if reweight else torch.ones_like(drw_weights_K),
        cls_weights_K=drw_weights_K if reweight and cfg.loss.reweight_cls else None,
    )


class Taken(NamedTuple):
    """What a step leaves on the device."""

    losses: list[JointLoss]
    """Of each micro-batch, detached."""
    norm: Tensor
    """Of the gradient before clipping, 0-d."""


class TrainStep:
    """Take optimizer steps; nothing in it waits for the device.

    Args:
        engine: of the student.
        ema: the moving average of its weights; None: there is none.
        seed: of drop path.
        stage: wraps the named stages.
    """

    def __init__(self, engine: Engine, ema: Ema | None, seed: int, stage: Stage = unobserved) -> None:
        self.engine, self.ema, self.seed, self.stage = engine, ema, seed, stage

    def __call__(self, batches: Iterator[Batch], micro_batches: int, phase: Phase, learning_rate: float) -> Taken:
        """Take one step on the next ``micro_batches`` batches."""
        losses = []
        for _ in range(micro_batches):
            with self.stage("data"):
                batch = next(batches)
            if batch.place:
                seed_drop_path(self.seed, batch.place)
            with self.stage("forward"):
                loss = self.engine.forward(batch, phase.dist_weights_K, phase.cls_weights_K)
            with self.stage("backward"):
                self.engine.backward(loss.loss)
            losses.append(JointLoss(*(part.detach() for part in loss)))
        with self.stage("optimizer"):
            norm = self.engine.step(learning_rate)
        if self.ema:
            with self.stage("average"):
                self.ema.update()
        return Taken(losses, norm)


def seed_drop_path(seed: int, micro_batch: MicroBatch) -> None:
    """Seed drop path from the micro-batch's place alone, so that no generator state is saved or shared by ranks."""
    key = (seed, micro_batch.epoch, micro_batch.index, micro_batch.virtual_rank)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
