"""What a teacher minimises and one optimizer step of it: plain, or SAM's two passes over the same images."""

# B batch, C channels, H height, W width, K classes

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdeitlt.config import Config, TeacherTrainingConfig
from fastdeitlt.models.teacher import Paco, create_teacher
from fastdeitlt.teachers.losses import Loss, build_loss
from fastdeitlt.teachers.paco import PacoObjective
from fastdeitlt.teachers.sam import SAM, frozen_batch_stats

log = logging.getLogger("fastdeitlt")


class Objective(Protocol):
    """A network and its loss. A step calls ``prepare`` once, itself once a pass, then ``finish`` once."""

    @property
    def network(self) -> nn.Module:
        """What is trained."""

    def prepare(self, views: Sequence[Tensor], labels_B: Tensor) -> tuple[Tensor, ...]:
        """Whatever both passes share."""

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, *shared: Tensor) -> Tensor:
        """The loss, 0-d float32."""

    def finish(self, labels_B: Tensor, *shared: Tensor) -> None:
        """Whatever follows the step."""


class LogitObjective(nn.Module):
    """A loss of the logits of one view.

    Args:
        network: maps images_BCHW to logits_BK.
        loss: of (logits_BK, labels_B, weights_K).
    """

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def prepare(self, views: Sequence[Tensor], labels_B: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, *shared: Tensor) -> Tensor:
        return self.loss(self.network(images_BCHW), labels_B, weights_K)

    def finish(self, labels_B: Tensor, *shared: Tensor) -> None:
        """Nothing follows."""


def build_objective(cfg: TeacherTrainingConfig, counts: Sequence[int], device: torch.device) -> Objective:
    """The recipe's network with fresh weights, channels last, in training mode, and its loss.

    Raises:
        UserError: unknown architecture.
    """
    num_classes = len(counts)
    objective: Objective
    if cfg.loss == "paco":
        paco = Paco(cfg.arch, num_classes, cfg.paco_dim, cfg.paco_queue)
        objective = PacoObjective(paco, torch.tensor(list(counts), device=device), cfg)
    else:
        network = create_teacher(cfg.arch, num_classes, normed_head=cfg.normed_head)
        objective = LogitObjective(network, build_loss(cfg, counts, device))
    objective.network.to(device).to(memory_format=torch.channels_last).train()
    return objective


def build_optimizer(network: nn.Module, cfg: TeacherTrainingConfig) -> torch.optim.Optimizer:
    """SGD with momentum and L2 on all weights (as the references), inside SAM when the recipe has it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, foreach=True)
    return sgd if cfg.sam == "none" else SAM(parameters, sgd, cfg.sam_rho, adaptive=cfg.sam == "asam")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``train.precision`` means on a device: bfloat16, or None for float32.

    A CPU without bfloat16 instructions emulates them (on AVX2 nine times slower than float32), so it keeps float32.
    """
    emulated = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if precision == "bf16" and not emulated else None


class Step:
    """One optimizer step, without waiting for the device.

    Args:
        objective: network and loss.
        optimizer: SAM or any other.
        cfg: the run: precision, compilation, clipping, batch-norm statistics in SAM's second pass.
        device: where it runs.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, cfg: Config, device: torch.device
    ) -> None:
        self.objective, self.optimizer = objective, optimizer
        # the last batch of an epoch may be smaller: one graph for each size rather than one for any
        self._loss = torch.compile(objective, dynamic=False, fullgraph=True) if cfg.train.compile else objective
        dtype = autocast_dtype(cfg.train.precision, device)
        if dtype is None and cfg.train.precision == "bf16":
            log.info("train.precision=bf16: this CPU has no bfloat16 instructions, float32 is used")
        self._autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        self._clip_norm = cfg.teacher_training.clip_norm
        self._freeze_second = not cfg.teacher_training.sam_bn_twice
        self._parameters = [p for p in objective.network.parameters() if p.requires_grad]

    def __call__(self, views: Sequence[Tensor], labels_B: Tensor, weights_K: Tensor | None, seed: int) -> Tensor:
        """Step once; dropout is seeded by ``seed`` and the same in both passes.

        Returns:
            The loss at the weights before the step, 0-d on the device.
        """
        with self._autocast():
            shared = self.objective.prepare(views, labels_B)
        loss = self._backward(views[0], labels_B, weights_K, shared, seed)
        if isinstance(self.optimizer, SAM):
            self.optimizer.first_step()
            with frozen_batch_stats(self.objective.network, self._freeze_second):
                self._backward(views[0], labels_B, weights_K, shared, seed)
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        if isinstance(self.optimizer, SAM):
            self.optimizer.second_step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.objective.finish(labels_B, *shared)
        return loss

    def _backward(
        self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, shared: tuple[Tensor, ...], seed: int
    ) -> Tensor:
        torch.manual_seed(seed)
        with self._autocast():
            loss = self._loss(images_BCHW, labels_B, weights_K, *shared)
        loss.backward()
        return loss.detach()
