"""Training step of the student: forward, backward, accumulate, clip, update, average."""

# B images in a micro-batch, K classes

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.config import Config, TrainConfig
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine import Engine
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.core.optim import Ema
from fastdeitlt.data.sampler import MicroBatch
from fastdeitlt.models.residual import DropPath, join_samples
from fastdeitlt.models.vit import DistilledViT

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


class StepResult(NamedTuple):
    """Results of a step, on the device."""

    losses: list[JointLoss]
    """Losses of each micro-batch, detached."""
    norm: Tensor
    """Gradient norm before clipping, 0-d."""


class TrainStep:
    """Run optimizer steps without waiting for the device.

    Args:
        engine: of the student.
        ema: the moving average of its weights; None: there is none.
        cfg: seed of drop path, and the virtual ranks in a forward pass.
        student: of the engine; draws the drop path of several ranks.
        stage: wraps the named stages.
    """

    def __init__(
        self, engine: Engine, ema: Ema | None, cfg: TrainConfig, student: DistilledViT, stage: Stage = unobserved
    ) -> None:
        self.engine, self.ema, self.stage = engine, ema, stage
        self.cfg, self.student = cfg, student

    def __call__(self, batches: Iterator[Batch], micro_batches: int, phase: Phase, learning_rate: float) -> StepResult:
        """Run one step on the next ``micro_batches`` batches."""
        losses = []
        ranks = self.cfg.ranks_per_forward
        for _ in range(micro_batches // ranks):
            with self.stage("data"):
                drawn = [next(batches) for _ in range(ranks)]
            if ranks == 1 and drawn[0].place:
                seed_drop_path(self.cfg.seed, drawn[0].place)
            with self.stage("forward"):
                batch = drawn[0] if ranks == 1 else join(drawn, self.student, self.cfg.seed)
                loss = self.engine.forward(batch, phase.dist_weights_K, phase.cls_weights_K)
            with self.stage("backward"):
                self.engine.backward(loss.loss.sum())
            each = (part.detach().view(-1).unbind() for part in loss)
            losses += [JointLoss(*parts) for parts in zip(*each, strict=True)]
        with self.stage("optimizer"):
            norm = self.engine.step(learning_rate)
        if self.ema:
            with self.stage("average"):
                self.ema.update()
        return StepResult(losses, norm)


def join(batches: Sequence[Batch], student: DistilledViT, seed: int) -> Batch:
    """Concatenate the micro-batches of several virtual ranks.

    Each keeps the drop path that it would draw.
    """
    draws: list[list[DropPath]] = []
    for batch in batches:
        if batch.place:
            seed_drop_path(seed, batch.place)
        draws.append(student.draw_drop_path(len(batch.labels_B)))
    size, blocks = len(batches[0].labels_B), zip(*draws, strict=True)
    drop_paths = [tuple(join_samples(parts, size) for parts in zip(*block, strict=True)) for block in blocks]
    partners = [batch.partner_B for batch in batches if batch.partner_B is not None]
    lams = [batch.lam for batch in batches if batch.lam is not None]
    return Batch(
        torch.cat([batch.images_BCHW for batch in batches]),
        torch.cat([batch.labels_B for batch in batches]),
        torch.cat(partners) if partners else None,
        torch.stack(lams) if lams else None,
        ranks=len(batches),
        drop_paths=cast(list[DropPath], drop_paths),
    )


def seed_drop_path(seed: int, micro_batch: MicroBatch) -> None:
    """Seed drop path by the micro-batch's position.

    So no generator state is saved or shared by ranks.
    """
    key = (seed, micro_batch.epoch, micro_batch.index, micro_batch.virtual_rank)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
