"""Engine for one rank: backward, accumulation and step in plain torch."""

# K classes

import torch
from torch import Tensor

from fastdeitlt.config import Config
from fastdeitlt.core import optim
from fastdeitlt.core.batches import Batch
from fastdeitlt.core.engine.finite_guard import FiniteGuard
from fastdeitlt.core.flat_adamw import FlatAdamW
from fastdeitlt.core.joint import JointForward, LocalSums, step_forward
from fastdeitlt.core.loss import JointLoss


class PlainEngine:
    """Engine of one rank, without sharding.

    With ``train.cuda_graphs`` the gradients have fixed memory: each micro-batch adds to them, and a step zeroes them.
    """

    def __init__(self, joint: JointForward, cfg: Config, micro_batches_per_step: int) -> None:
        self.joint = joint
        self._forward = step_forward(joint, cfg.train.compile)
        self.optimizer = optim.build_optimizer(joint.student, cfg)
        self.parameters = [p for p in joint.student.parameters() if p.requires_grad]
        self.clip_norm = cfg.optim.clip_norm
        self.micro_batches_per_step = micro_batches_per_step
        self.replays = cfg.train.cuda_graphs
        if self.replays:  # a graph's own gradient would be overwritten by the next replay
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.guard = FiniteGuard(self.optimizer, cfg.train.nonfinite_skips, self.parameters[0].device)

    def forward(self, batch: Batch, dist_weights_K: Tensor, cls_weights_K: Tensor | None) -> JointLoss:
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        losses = self._forward(
            batch.images_BCHW, batch.labels_B, batch.partner_B, batch.lam, dist_weights_K, cls_weights_K,
            batch.ranks, batch.drop_paths,
        )  # fmt: skip
        if self.replays:  # the next replay writes to the same memory
            losses = type(losses)(*(part.clone() for part in losses))
        return losses.joined(self.joint.cfg.loss.alpha) if isinstance(losses, LocalSums) else losses

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches_per_step).backward()

    def step(self, learning_rate: float) -> Tensor:
        optim.set_learning_rate(self.optimizer, learning_rate)
        norm = self._clip()
        self.guard.watch(norm)
        self.optimizer.step()
        # apex's and DeepSpeed's optimizers define their zero_grad
        self.joint.student.zero_grad(set_to_none=not self.replays)
        return norm

    def _clip(self) -> Tensor:
        """Clip the gradients and return their norm.

        FlatAdamW scales gradients in its step, other optimizers need another pass.
        """
        if isinstance(self.optimizer, FlatAdamW):
            norm = self.optimizer.gather()
            if self.clip_norm:
                self.optimizer.grad_scale = optim.clip_coefficient(norm, self.clip_norm)
            return norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return self.joint.student.state_dict()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optim.optimizer_tensors(self.joint.student, self.optimizer)

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        self.joint.student.load_state_dict(weights)
        optim.load_optimizer(self.joint.student, self.optimizer, optimizer)
