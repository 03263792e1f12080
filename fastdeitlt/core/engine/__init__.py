"""Engines for backward, accumulation and step: plain torch on one rank (plain.py), DeepSpeed (sharded.py)."""

# K classes

import logging
from typing import Protocol

import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.core.joint import JointForward
from fastdeitlt.core.loss import JointLoss
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import UserError, counted

log = logging.getLogger("fastdeitlt")


class Engine(Protocol):
    """Backward, accumulation and step of one rank."""

    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch, dist_weights_K: Tensor, cls_weights_K: Tensor | None) -> JointLoss:
        """Compute the losses of a micro-batch, or of each of ``batch.ranks``.

        Their graph is kept for ``backward``.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of loss / micro_batches_per_step."""

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, clear the gradients; return the gradient norm.

        The norm is before clipping, on the device.
        """

    def weights(self) -> dict[str, Tensor]:
        """Return the student's state dict."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state, see ``optim.optimizer_tensors``."""

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Restore weights and optimizer state."""


def _check_global_mean(joint: JointForward, cfg: Config, plan: Plan) -> None:
    if cfg.loss.normalise == "rank":
        return
    if plan.virtual_ranks > plan.world:
        raise UserError(
            f"loss.normalise=global: got train.virtual_ranks={plan.virtual_ranks}, expected one virtual rank per real "
            f"rank. Use train.virtual_ranks={plan.world}, or loss.normalise=rank."
        )
    if joint.teacher is None or cfg.loss.reweight_cls:
        what = "no teacher" if joint.teacher is None else "loss.reweight_cls=true"
        raise UserError(
            f"loss.normalise=global: got {what}, expected a teacher and loss.reweight_cls=false, because only the "
            "distillation loss has a global mean. Use loss.normalise=rank."
        )


def build_engine(joint: JointForward, cfg: Config, plan: Plan) -> Engine:
    """Build the engine ``train.engine`` and log the choice.

    `auto` is plain on one rank and DeepSpeed on more.

    Raises:
        UserError: `plain` on more than one rank, offload without sharding, weights that are not float32, or a global
            mean that this configuration does not support.
    """
    _check_global_mean(joint, cfg, plan)
    if plan.ranks_per_process % cfg.train.ranks_per_forward:
        raise UserError(
            f"train.ranks_per_forward: got {cfg.train.ranks_per_forward}, expected a divisor of "
            f"{plan.ranks_per_process}, the virtual ranks of each process. Use 1."
        )
    dtypes = {p.dtype for p in joint.student.parameters()} - {torch.float32}
    if dtypes:
        raise UserError(
            f"student: got {dtypes.pop()} weights, expected float32. Keep float32 weights and use train.precision=bf16."
        )
    t, kind = cfg.train, cfg.train.engine
    if kind == "auto":
        kind = "deepspeed" if plan.world > 1 else "plain"
        log.info("engine: %s for %s", kind, counted(plan.world, "rank"))
    if kind == "plain" and plan.world > 1:
        raise UserError(f"train.engine=plain: supports one rank, got {plan.world}. Use train.engine=auto.")
    if t.offload and (kind == "plain" or t.zero_stage == 0):
        raise UserError(
            f"train.offload: got true with the {kind} engine and train.zero_stage={t.zero_stage}, expected DeepSpeed "
            "with stage 1 or 2. Use train.engine=deepspeed train.zero_stage=1, or train.offload=false."
        )
    device = next(joint.student.parameters()).device
    if t.cuda_graphs and (kind == "deepspeed" or device.type != "cuda"):
        where = "the DeepSpeed engine" if kind == "deepspeed" else f"a student on {device.type}"
        raise UserError(
            f"train.cuda_graphs: got true with {where}, expected the plain engine on a GPU. Use "
            "train.cuda_graphs=false."
        )
    if kind == "plain":
        return PlainEngine(joint, cfg, plan.micro_batches_per_step)
    from fastdeitlt.core.engine.sharded import DeepSpeedEngine  # DeepSpeed is slow to import

    return DeepSpeedEngine(joint, cfg, plan)
