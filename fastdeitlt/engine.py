"""Stages 6 and 7b: what is differentiated, and backward, accumulation and step around it."""

# B images in a micro-batch, C channels, H height, W width, K classes

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdeitlt import distributed, optim
from fastdeitlt.config import Config
from fastdeitlt.data.batches import Batch
from fastdeitlt.data.sampler import Plan
from fastdeitlt.errors import UserError
from fastdeitlt.flat_adamw import FlatAdamW
from fastdeitlt.loss import JointLoss, decision_weight, joint_loss
from fastdeitlt.models.teacher import Teacher
from fastdeitlt.models.vit import DistilledViT
from fastdeitlt.precision import autocast_dtype

log = logging.getLogger("fastdeitlt")


class LocalSums(NamedTuple):
    """A rank's part of a loss whose DIST term is a weighted mean over all ranks; 0-d float32 tensors."""

    weight_sum: Tensor
    cls_loss: Tensor
    dist_sum: Tensor

    def joined(self, alpha: float) -> JointLoss:
        """The losses; their mean over ranks divides by the weights of all ranks. One sum over ranks, no host sync."""
        mean_weight = distributed.sum_over_ranks(self.weight_sum.detach().clone()) / distributed.get_world()
        dist_loss = self.dist_sum / mean_weight
        return JointLoss((1 - alpha) * self.cls_loss + alpha * dist_loss, self.cls_loss, dist_loss)


class JointForward(nn.Module):
    """Student, teacher and joint loss as one module, so that one compiled graph holds all three.

    The teacher is not registered: it is never trained, sharded or saved with the student.

    Args:
        student: maps images_BCHW to (cls_logits_BK, dist_logits_BK).
        teacher: maps the same images to teacher_logits_BK and has ``class_map``; None trains both heads on the labels.
        class_counts: training images of each class.
        cfg: the run.
        device: where the step runs.
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
        object.__setattr__(self, "teacher", teacher)
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
    ) -> JointLoss | LocalSums:
        """(loss, cls_loss, dist_loss), 0-d float32 tensors on the device; sums where the mean is one over all ranks."""
        c = self.cfg.loss
        smoothing = self.cfg.mixup.smoothing if partner_B is not None else 0.0
        labels: dict[str, Any] = {
            "partner": partner_B,
            "lam": lam,
            "smoothing": smoothing,
            "base": c.base,
            "counts": self.counts,
        }
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            cls_logits_BK, dist_logits_BK = self.student(images_BCHW)
            teacher_logits_BK = None if self.teacher is None else self.teacher(images_BCHW)
        if self.teacher is None or teacher_logits_BK is None:
            return self._label_losses(cls_logits_BK, dist_logits_BK, labels_B, dist_weights_K, cls_weights_K, labels)
        if c.distillation == "soft":
            teacher_logits_BK = teacher_logits_BK.float() * self.teacher.logit_scale
        losses = joint_loss(
            cls_logits_BK,
            dist_logits_BK,
            labels_B,
            teacher_logits_BK,
            weights=dist_weights_K,
            cls_weights=cls_weights_K,
            class_map=self.teacher.class_map,
            distillation=c.distillation,
            tau=c.tau,
            alpha=c.alpha,
            normaliser=self.one if self.is_global else None,
            impl=c.impl,
            **labels,
        )
        if not self.is_global:
            return losses
        weight_sum = decision_weight(teacher_logits_BK, dist_weights_K, self.teacher.class_map)
        return LocalSums(weight_sum, losses.cls_loss, losses.dist_loss)

    def _label_losses(
        self,
        cls_logits_BK: Tensor,
        dist_logits_BK: Tensor,
        labels_B: Tensor,
        dist_weights_K: Tensor,
        cls_weights_K: Tensor | None,
        labels: dict[str, Any],
    ) -> JointLoss:
        """Both heads learn the labels, the DIST head with re-weighting (official losses.py, distillation 'none')."""
        alpha, impl = self.cfg.loss.alpha, self.cfg.loss.impl
        heads = ((cls_logits_BK, cls_weights_K), (dist_logits_BK, dist_weights_K))
        cls_loss, dist_loss = (
            joint_loss(x, x.detach(), labels_B, x.detach(), cls_weights=w, alpha=0.0, impl=impl, **labels).cls_loss
            for x, w in heads
        )
        return JointLoss((1 - alpha) * cls_loss + alpha * dist_loss, cls_loss, dist_loss)


def compiled(joint: JointForward) -> Callable[..., JointLoss | LocalSums]:
    """One graph of student, teacher and loss.

    The compiler's layout optimization is off: because the teacher's convolutions are in the graph it would lay out all
    4-d tensors channels-last, among them those of attention, and copy them in every block. The teacher is channels-last
    already.
    """
    return torch.compile(joint, fullgraph=True, options={"layout_optimization": False})


class Engine(Protocol):
    """Backward, accumulation and step of one rank."""

    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch, dist_weights_K: Tensor, cls_weights_K: Tensor | None) -> JointLoss:
        """The losses of a micro-batch; their graph is kept until ``backward``."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss / micro_batches_per_step."""

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, clear the gradients; the gradient norm before clipping, on the device."""

    def weights(self) -> dict[str, Tensor]:
        """The student's state dict."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, flat."""

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Put weights and optimizer state back."""


class FiniteGuard:
    """Leaves out the update of a step whose gradient norm is not finite; decided on the device, without a host sync.

    More than ``skips`` such steps in a row are a failure, after which no update is made any more. The host learns of
    it from the norms, at its next report. Weights stay as they were bit for bit; moments too with torch's AdamW and
    FlatAdamW, and with the others they take a gradient of 0.

    Args:
        optimizer: torch's fused AdamW and FlatAdamW leave the whole step out; another with a tensor as learning rate
            takes one of rate and gradient 0. One with a number (apex, DeepSpeed's FusedAdam: their kernels are handed a
            flag to do nothing, and their source has the line that reads it commented out) takes one of gradient 0,
            after which its weights are put back from a copy; that costs the weights' memory once more.
        skips: train.nonfinite_skips.
        device: of the gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, skips: int, device: torch.device) -> None:
        self.optimizer, self.skips = optimizer, skips
        self.in_a_row, self.failed = torch.zeros((), device=device), torch.zeros((), device=device)
        self.skip = torch.zeros((), device=device)
        self.is_torch = isinstance(optimizer, torch.optim.AdamW)
        self.kept: list[Tensor] = []
        if not self.is_torch and not isinstance(optimizer.param_groups[0]["lr"], Tensor):
            self.kept = [torch.empty_like(p, requires_grad=False) for p in self._weights()]
            optimizer.register_step_post_hook(self._put_back)

    def _weights(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def watch(self, norm: Tensor) -> None:
        """Called before each optimizer step with the norm that decides."""
        bad = 1 - norm.isfinite().float()
        self.in_a_row.add_(bad).mul_(bad)
        self.failed.copy_(torch.maximum(self.failed, (self.in_a_row > self.skips).float()))
        self.skip = torch.maximum(bad, self.failed)
        if self.is_torch:
            self.optimizer.found_inf = self.skip  # type: ignore[attr-defined]
            return
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.grad_scale = torch.where(self.skip > 0, 0.0, self.optimizer.grad_scale)
            return
        grads = [p.grad for p in self._weights() if p.grad is not None]
        torch._foreach_copy_(grads, [torch.where(self.skip > 0, 0.0, g) for g in grads])
        if self.kept:
            torch._foreach_copy_(self.kept, [p.detach() for p in self._weights()])
        else:
            rates = {id(g["lr"]): g["lr"] for g in self.optimizer.param_groups}
            torch._foreach_mul_(list(rates.values()), 1 - self.skip)

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        """After the optimizer's step: the weights from before it, where it was to be left out."""
        weights = self._weights()
        pairs = zip(self.kept, weights, strict=True)
        torch._foreach_copy_(weights, [torch.where(self.skip > 0, kept, p) for kept, p in pairs])


class PlainEngine:
    """One rank, no sharding."""

    def __init__(self, joint: JointForward, cfg: Config, micro_batches_per_step: int) -> None:
        self.joint = joint
        self._forward = compiled(joint) if cfg.train.compile else joint
        self.optimizer = optim.build_optimizer(joint.student, cfg)
        self.parameters = [p for p in joint.student.parameters() if p.requires_grad]
        self.clip_norm = cfg.optim.clip_norm
        self.micro_batches_per_step = micro_batches_per_step
        self.guard = FiniteGuard(self.optimizer, cfg.train.nonfinite_skips, self.parameters[0].device)

    def forward(self, batch: Batch, dist_weights_K: Tensor, cls_weights_K: Tensor | None) -> JointLoss:
        losses = self._forward(
            batch.images_BCHW, batch.labels_B, batch.partner_B, batch.lam, dist_weights_K, cls_weights_K
        )
        return losses.joined(self.joint.cfg.loss.alpha) if isinstance(losses, LocalSums) else losses

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches_per_step).backward()

    def step(self, learning_rate: float) -> Tensor:
        optim.set_learning_rate(self.optimizer, learning_rate)
        norm = self._clip()
        self.guard.watch(norm)
        self.optimizer.step()
        self.joint.student.zero_grad()  # apex's and DeepSpeed's optimizers have a zero_grad of their own
        return norm

    def _clip(self) -> Tensor:
        """The gradient norm; FlatAdamW scales the gradients where it reads them, for others it is a pass of its own."""
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


def _check_global_mean(joint: JointForward, cfg: Config, plan: Plan) -> None:
    if cfg.loss.normalise == "rank":
        return
    if plan.virtual_ranks > plan.world:
        raise UserError(
            f"loss.normalise=global: got train.virtual_ranks={plan.virtual_ranks} on {plan.world} ranks; a rank that "
            "plays several in turn does not know the weights of the later ones when it needs them; use as many "
            f"virtual ranks as real ones (train.virtual_ranks={plan.world}), or loss.normalise=rank"
        )
    if joint.teacher is None or cfg.loss.reweight_cls:
        what = "both heads learn the labels" if joint.teacher is None else "loss.reweight_cls weights the CLS loss too"
        raise UserError(
            f"loss.normalise=global: is the mean of the distillation loss alone, and {what}; use loss.normalise=rank"
        )


def build_engine(joint: JointForward, cfg: Config, plan: Plan) -> Engine:
    """The engine that ``train.engine`` names; `auto` is plain at one rank and DeepSpeed at more, and says so.

    Raises:
        UserError: `plain` at more than one rank, offload where nothing is sharded, weights that are not float32, or a
            global mean that this set-up cannot form.
    """
    _check_global_mean(joint, cfg, plan)
    dtypes = {p.dtype for p in joint.student.parameters()} - {torch.float32}
    if dtypes:
        raise UserError(
            f"engine: the student has weights of {dtypes.pop()}, expected float32; use train.precision=bf16, which "
            "autocasts: with bfloat16 weights DeepSpeed's stage 0 takes a hidden optimizer step before training"
        )
    t, kind = cfg.train, cfg.train.engine
    if kind == "auto":
        kind = "deepspeed" if plan.world > 1 else "plain"
        log.info("engine: %s, because there %s", kind, "is one rank" if plan.world == 1 else f"are {plan.world} ranks")
    if kind == "plain" and plan.world > 1:
        raise UserError(
            f"train.engine=plain: does not share gradients, and there are {plan.world} ranks; use train.engine=auto"
        )
    if t.offload and (kind == "plain" or t.zero_stage == 0):
        raise UserError(
            f"train.offload: is DeepSpeed's, of stages 1 to 3; got the {kind} engine and train.zero_stage="
            f"{t.zero_stage}; use train.engine=deepspeed train.zero_stage=1, or train.offload=false"
        )
    if kind == "plain":
        return PlainEngine(joint, cfg, plan.micro_batches_per_step)
    from fastdeitlt.sharded import DeepSpeedEngine

    return DeepSpeedEngine(joint, cfg, plan)
