"""Student, teacher and joint loss as one module, so that one graph has all three."""

# B images in a micro-batch, C channels, H height, W width, K classes

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import Config
from fastdeitlt.core.loss import (
    JointLoss,
    LossSpec,
    Target,
    decision_weight,
    divisor,
    joint_loss,
    label_loss,
    log_prior_of,
)
from fastdeitlt.models.fp8 import check_fp8
from fastdeitlt.models.layers import Linear
from fastdeitlt.models.residual import DropPath
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.precision import autocast_dtype


class LocalSums(NamedTuple):
    """One rank's terms of a loss whose DIST term is a weighted mean over all ranks; 0-d float32 tensors."""

    weight_sum: Tensor
    cls_loss: Tensor
    dist_sum: Tensor

    def joined(self, alpha: float) -> JointLoss:
        """Return losses whose mean over ranks divides by all ranks' weights.

        One all-reduce, no host sync.
        """
        mean_weight = distributed.sum_over_ranks(self.weight_sum.detach().clone()) / distributed.get_world()
        dist_loss = self.dist_sum / divisor(mean_weight)
        return JointLoss((1 - alpha) * self.cls_loss + alpha * dist_loss, self.cls_loss, dist_loss)


class JointForward(nn.Module):
    """Student, teacher and joint loss as one module, for one compiled graph of all three.

    The teacher is not registered: it is never trained, sharded or saved with the student.

    Args:
        student: maps images_BCHW to (cls_logits_BK, dist_logits_BK).
        teacher: maps the same images to teacher_logits_BK and has ``class_map``; None trains both heads on the labels.
        class_counts: training images of each class.
        cfg: the run.
        device: device of the step.
    """

    teacher: Teacher | None

    def __init__(
        self, student: DistilledViT, teacher: Teacher | None, class_counts: list[int], cfg: Config, device: torch.device
    ) -> None:
        super().__init__()
        self.student = student
        self.cfg = cfg
        self.device_type, self.dtype = device.type, autocast_dtype(cfg.train.precision, device)
        if teacher is not None and self.dtype is not None:
            teacher = teacher.for_autocast(self.dtype)
        if teacher is not None and cfg.teacher.fuse_epilogues:
            teacher = teacher.with_fused_epilogues()
        object.__setattr__(self, "teacher", teacher)
        if cfg.train.precision == "fp8":
            check_fp8(device)
            for module in student.modules():
                if isinstance(module, Linear):
                    module.fp8 = True
        # soft distillation divides by the number of images, which is the same on all ranks
        self.is_global = cfg.loss.normalise == "global" and cfg.loss.distillation == "hard"
        self.one = torch.ones((), device=device)
        self.counts = torch.tensor(class_counts, device=device) if cfg.loss.base not in ("ce", "bce") else None

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        partner_B: Tensor | None,
        lam: Tensor | None,
        dist_weights_K: Tensor,
        cls_weights_K: Tensor | None,
        ranks: int = 1,
        drop_paths: list[DropPath] | None = None,
    ) -> JointLoss | LocalSums:
        """Compute the losses, 0-d float32 tensors on the device.

        Returns ``LocalSums`` for a mean over all ranks.

        With several ``ranks`` the batch is their concatenated micro-batches: each loss and ``lam`` is then [ranks], and
        ``drop_paths`` is the drop path.
        """
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            heads = self.student(images_BCHW) if drop_paths is None else self.student(images_BCHW, drop_paths)
            teacher_logits_BK = None if self.teacher is None else self.teacher(images_BCHW)
        tensors: list[Any] = [*heads, teacher_logits_BK, labels_B, partner_B]
        if ranks == 1:
            return self._losses(tensors, lam, dist_weights_K, cls_weights_K)
        chunks = [[None] * ranks if x is None else x.chunk(ranks) for x in tensors]
        lams = [None] * ranks if lam is None else lam.unbind()
        parts = zip(zip(*chunks, strict=True), lams, strict=True)
        each = [self._losses(chunk, of_rank, dist_weights_K, cls_weights_K) for chunk, of_rank in parts]
        return JointLoss(*(torch.stack(losses) for losses in zip(*each, strict=True)))

    def _losses(
        self, tensors: Sequence[Any], lam: Tensor | None, dist_weights_K: Tensor, cls_weights_K: Tensor | None
    ) -> JointLoss | LocalSums:
        """Compute the losses of one micro-batch.

        ``tensors`` are CLS logits, DIST logits, teacher's logits, labels, partners.
        """
        cls_logits_BK, dist_logits_BK, teacher_logits_BK, labels_B, partner_B = tensors
        c = self.cfg.loss
        smoothing = self.cfg.mixup.smoothing if partner_B is not None else 0.0
        if self.teacher is None or teacher_logits_BK is None:
            target = Target(labels_B, partner_B, lam, smoothing)
            return self._label_losses((cls_logits_BK, dist_logits_BK), (cls_weights_K, dist_weights_K), target)
        if c.distillation == "soft":
            teacher_logits_BK = teacher_logits_BK.float() * self.teacher.logit_scale
        losses = joint_loss(
            cls_logits_BK,
            dist_logits_BK,
            labels_B,
            teacher_logits_BK,
            partner=partner_B,
            lam=lam,
            smoothing=smoothing,
            base=c.base,
            counts=self.counts,
            weights=dist_weights_K,
            cls_weights=cls_weights_K,
            class_map=self.teacher.class_map,
            distillation=c.distillation,
            tau=c.tau,
            alpha=c.alpha,
            normaliser=self.one if self.is_global else None,
            impl=c.impl,
        )
        if not self.is_global:
            return losses
        weight_sum = decision_weight(teacher_logits_BK, dist_weights_K, self.teacher.class_map)
        return LocalSums(weight_sum, losses.cls_loss, losses.dist_loss)

    def _label_losses(
        self, heads: tuple[Tensor, Tensor], weights: tuple[Tensor | None, Tensor], target: Target
    ) -> JointLoss:
        """Compute both heads' losses on the labels, DIST re-weighted.

        Source: official losses.py, distillation 'none'.
        """
        alpha, bce = self.cfg.loss.alpha, self.cfg.loss.base == "bce"
        prior = None if self.counts is None else log_prior_of(self.counts)
        cls_loss, dist_loss = (
            label_loss(logits_BK, target, LossSpec(cls_weights=weights_K, log_prior=prior, bce=bce))
            for logits_BK, weights_K in zip(heads, weights, strict=True)
        )
        return JointLoss((1 - alpha) * cls_loss + alpha * dist_loss, cls_loss, dist_loss)


def step_forward(joint: JointForward, is_compiled: bool) -> Callable[..., JointLoss | LocalSums]:
    """Return the forward pass of a step, compiled or not.

    It runs under ``teacher.cudnn_benchmark``.
    """
    forward = compiled(joint) if is_compiled else joint
    return _benchmarked(forward) if joint.cfg.teacher.cudnn_benchmark else forward


def _benchmarked(forward: Callable[..., JointLoss | LocalSums]) -> Callable[..., JointLoss | LocalSums]:
    """Enable cuDNN's benchmark mode for the convolutions of a forward pass.

    In training only the frozen teacher has any: the student's patches are a matrix product.
    """

    def run(*inputs: Any) -> JointLoss | LocalSums:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return forward(*inputs)
        finally:
            torch.backends.cudnn.benchmark = before

    return run


def compiled(joint: JointForward) -> Callable[..., JointLoss | LocalSums]:
    """Compile student, teacher and loss as one graph.

    The compiler's layout optimization is off: with the teacher's convolutions in the graph it would make all 4-d
    tensors channels-last, attention's too, and copy them in every block. The teacher is channels-last already.
    """
    options = {"layout_optimization": False} | joint.cfg.train.compiler_options
    if joint.cfg.train.cuda_graphs:
        options |= {"triton.cudagraphs": True}  # copies each batch into static buffers, and records both passes
    return torch.compile(joint, fullgraph=True, options=options)
