"""Objectives and optimizer step of teacher training, plain or with SAM."""

# B batch, C channels, H height, W width, K classes

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeitlt import distributed
from fastdeitlt.config import Config, TeacherTrainingConfig
from fastdeitlt.core.optim import load_optimizer, optimizer_tensors
from fastdeitlt.errors import UserError
from fastdeitlt.models.teacher import Paco, check_size, create_teacher
from fastdeitlt.precision import autocast_dtype
from fastdeitlt.teachers.losses import Loss, build_loss
from fastdeitlt.teachers.paco import PacoObjective
from fastdeitlt.teachers.sam import SAM, frozen_batch_stats
from fastdeitlt.teachers.schedule import check_steps
from fastdeitlt.teachers.views import StepBatch


class Objective(Protocol):
    """A network and its loss, called as begin, prepare, loss (per pass), finish."""

    @property
    def network(self) -> nn.Module:
        """The trained network."""

    def begin(self) -> None:
        """Run before the step."""

    def prepare(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return tensors shared by both passes over a part."""

    def share(self, labels_B: Tensor, whole_B: Tensor, weights_K: Tensor | None) -> Tensor | float:
        """Return the factor of a part's loss, so that all parts sum to the batch's loss."""

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, *shared: Tensor) -> Tensor:
        """Return the loss, 0-d float32."""

    def finish(self, whole_B: Tensor, shared: Sequence[tuple[Tensor, ...]]) -> None:
        """Run after the step, with all ranks' labels and this rank's shared tensors."""


class LogitObjective(nn.Module):
    """Objective with a loss of one view's logits.

    Args:
        network: maps images_BCHW to logits_BK.
        loss: function of (logits_BK, labels_B, weights_K).
        per_image: the loss is a mean over images, not over their weights.
    """

    def __init__(self, network: nn.Module, loss: Loss, per_image: bool = False) -> None:
        super().__init__()
        self.network, self.loss, self.per_image = network, loss, per_image

    def begin(self) -> None:
        """Do nothing."""

    def prepare(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return ()

    def share(self, labels_B: Tensor, whole_B: Tensor, weights_K: Tensor | None) -> Tensor | float:
        """Return the part's share of the batch's images, or of their weights."""
        if self.per_image or weights_K is None:
            return len(labels_B) / len(whole_B)
        return weights_K[labels_B].sum() / weights_K[whole_B].sum()

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, *shared: Tensor) -> Tensor:
        return self.loss(self.network(images_BCHW), labels_B, weights_K)

    def finish(self, whole_B: Tensor, shared: Sequence[tuple[Tensor, ...]]) -> None:
        """Do nothing."""


def build_objective(cfg: TeacherTrainingConfig, counts: Sequence[int], device: torch.device) -> Objective:
    """Build the recipe's loss and new network, channels last, in training mode.

    Raises:
        UserError: unknown architecture, an image size that it does not accept, or class weights for PaCo.
    """
    if cfg.loss == "paco" and cfg.drw_epoch >= 0:
        raise UserError(
            f"teacher_training.drw_epoch: got {cfg.drw_epoch} with loss=paco, which has no class weights, expected -1"
        )
    num_classes = len(counts)
    objective: Objective
    if cfg.loss == "paco":
        paco = Paco(cfg.arch, num_classes, cfg.paco_dim, cfg.paco_queue)
        objective = PacoObjective(paco, torch.tensor(list(counts), device=device), cfg)
    else:
        network = create_teacher(cfg.arch, num_classes, normed_head=cfg.normed_head)
        objective = LogitObjective(network, build_loss(cfg, counts, device), per_image=cfg.loss == "focal")
    if device.type != "meta":
        check_size(objective.network.eval(), cfg.img_size, "teacher_training.img_size")
    objective.network.to(device).to(memory_format=torch.channels_last).train()
    return objective


def build_optimizer(network: nn.Module, cfg: TeacherTrainingConfig) -> torch.optim.Optimizer:
    """Build SGD with momentum and L2 on all weights, within SAM if configured.

    Raises:
        UserError: a step of the learning rate or of rho after the last epoch.
    """
    check_steps(cfg)
    parameters = [p for p in network.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, foreach=True)
    return sgd if cfg.sam == "none" else SAM(parameters, sgd, cfg.sam_rho, adaptive=cfg.sam == "asam")


class Step:
    """One optimizer step, without a host sync.

    Gradients accumulate over micro-batches and are summed over ranks in one all-reduce per pass, so the step equals
    that of the whole batch, except that batch norm uses a part at a time. With ``sam_scope: rank`` each rank's first
    pass uses its own gradient. Running statistics are averaged over ranks. Momentum is not sharded (100 MB for a
    ResNet-50).

    Args:
        objective: network and loss.
        optimizer: SAM or any other.
        cfg: precision, compilation, clipping, SAM's scope, batch-norm statistics in its second pass.
        device: device of the network.

    Raises:
        UserError: train.precision=fp8.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, cfg: Config, device: torch.device
    ) -> None:
        if cfg.train.precision == "fp8":
            raise UserError(
                "train.precision=fp8: supports a student's training only, got a CNN teacher's. Use "
                "train.precision=bf16."
            )
        self.objective, self.optimizer = objective, optimizer
        # the last batch of an epoch may be smaller: one static graph per size instead of a dynamic one
        compiled = partial(torch.compile, dynamic=False, fullgraph=True, options=cfg.train.compiler_options)
        self._loss = compiled(objective) if cfg.train.compile else objective
        dtype = autocast_dtype(cfg.train.precision, device)
        self._autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        t = cfg.teacher_training
        self._clip_norm, self._freeze_second, self._own_climb = t.clip_norm, not t.sam_bn_twice, t.sam_scope == "rank"
        self._parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self._statistics = running_statistics(objective.network)

    def __call__(self, batch: StepBatch, weights_K: Tensor | None, seed: int) -> Tensor:
        """Run one step; ``seed`` makes dropout equal in both passes.

        Returns:
            This rank's share of the loss at the weights before the step, 0-d on the device; not finite if the loss of
            SAM's second pass or the clipped norm is not.
        """
        self.objective.begin()
        with self._autocast():
            shared = [self.objective.prepare(part.views) for part in batch.parts]
        is_sam = isinstance(self.optimizer, SAM)
        loss = self._pass(batch, weights_K, shared, seed, is_local=is_sam and self._own_climb)
        if isinstance(self.optimizer, SAM):
            self.optimizer.first_step()
            with frozen_batch_stats(self.objective.network, self._freeze_second):
                loss = loss + 0 * self._pass(batch, weights_K, shared, seed)  # NaN if this one is not finite
        if self._clip_norm:
            loss = loss + 0 * torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        if isinstance(self.optimizer, SAM):
            self.optimizer.second_step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.objective.finish(batch.labels_B, shared)
        distributed.average_together(self._statistics)
        return loss

    def _pass(
        self,
        batch: StepBatch,
        weights_K: Tensor | None,
        shared: Sequence[tuple[Tensor, ...]],
        seed: int,
        is_local: bool = False,
    ) -> Tensor:
        """Run forward and backward; sum gradients over ranks, unless ``is_local``."""
        torch.manual_seed(seed)
        total = torch.zeros((), device=batch.labels_B.device)
        for part, extra in zip(batch.parts, shared, strict=True):
            with self._autocast():
                loss = self._loss(part.views[0], part.labels_B, weights_K, *extra)
            if len(part.labels_B) < len(batch.labels_B):
                loss = loss * self.objective.share(part.labels_B, batch.labels_B, weights_K)
            loss.backward()
            total += loss.detach()
        if not is_local:
            distributed.sum_together([p.grad for p in self._parameters if p.grad is not None])
        return total

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return a checkpoint's tensors: weights (of PaCo with keys, queue), momentum."""
        network = self.objective.network
        return {"model": network.state_dict(), "optimizer": optimizer_tensors(network, self.optimizer)}

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Restore a checkpoint's tensors; ``read`` returns the state dict of a name."""
        self.objective.network.load_state_dict(read("model"))
        load_optimizer(self.objective.network, self.optimizer, read("optimizer"))


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Return the running means and variances of a network's batch norms."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
