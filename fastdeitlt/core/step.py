"""Training step of the student: forward, backward, accumulate, clip, update, average."""

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
"""Context of a part of a step by its name: data, forward, backward, optimizer, average."""


def unobserved(name: str) -> AbstractContextManager[object]:
    """Return a context that does nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Phase:
    """Settings of an epoch that change when re-weighting begins."""

    mixing: bool
    """Mixup and CutMix are on."""
    dist_weights_K: Tensor
    """Class weights of the DIST loss."""
    cls_weights_K: Tensor | None
    """Class weights of the CLS loss; None: all equal."""


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
    """Results of a step, on the device."""

    losses: list[JointLoss]
    """Losses of each micro-batch, detached."""
    norm: Tensor
    """Gradient norm before clipping, 0-d."""


class TrainStep:
    """Run optimizer steps without waiting for the device.

    Args:
        engine: engine of the student.
        ema: moving average of its weights, or None.
        seed: seed of drop path.
        stage: context of each named stage.
    """

    def __init__(self, engine: Engine, ema: Ema | None, seed: int, stage: Stage = unobserved) -> None:
        self.engine, self.ema, self.seed, self.stage = engine, ema, seed, stage

    def __call__(self, batches: Iterator[Batch], micro_batches: int, phase: Phase, learning_rate: float) -> Taken:
        """Run one step on the next ``micro_batches`` batches."""
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
    """Seed drop path by the micro-batch's position, so that no generator state is saved or shared by ranks."""
    key = (seed, micro_batch.epoch, micro_batch.index, micro_batch.virtual_rank)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
