"""Joint loss in plain torch: reference of the Triton kernel, and its fallback.

Shapes: B batch, K classes, J the teacher's classes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class JointLoss(NamedTuple):
    """Three 0-d float32 tensors: ``loss = (1 - alpha) * cls_loss + alpha * dist_loss`` and its two unscaled terms."""

    loss: Tensor
    cls_loss: Tensor
    dist_loss: Tensor


class Target(NamedTuple):
    """Target of the CLS head for one batch."""

    labels: Tensor
    """[B] int64."""
    partner: Tensor | None = None
    """[B] int64 labels of the images mixed in."""
    lam: Tensor | None = None
    """Weight of ``labels``, 0-d; ``partner`` has 1 - lam."""
    smoothing: float = 0.0


class LossSpec(NamedTuple):
    """Options of both heads' losses; see ``fastdeitlt.core.loss.joint_loss``."""

    weights: Tensor | None = None
    cls_weights: Tensor | None = None
    log_prior: Tensor | None = None
    """[K] float32, added to the CLS logits."""
    class_map: Tensor | None = None
    normaliser: Tensor | None = None
    tau: float = 1.0
    alpha: float = 0.5
    soft: bool = False
    bce: bool = False


def gathered(labels: Tensor, options: dict[str, Any]) -> tuple[Target, LossSpec]:
    """Sort keyword arguments into a ``Target`` and a ``LossSpec``."""
    target = {name: options[name] for name in Target._fields if name in options}
    return Target(labels, **target), LossSpec(**{k: v for k, v in options.items() if k not in target})


def reference_losses(
    cls_logits: Tensor, dist_logits: Tensor, teacher_logits: Tensor, target: Target, spec: LossSpec
) -> JointLoss:
    """Compute the joint loss in float32, without a dense target.

    In float64 for float64. Nothing is checked.
    """
    cls_loss, dist_logits_BK = label_loss(cls_logits, target, spec), _full(dist_logits)
    if spec.soft:
        dist_loss = _soft_distillation(dist_logits_BK, _full(teacher_logits), spec)
    else:
        decision_B = _decision(_full(teacher_logits), spec.class_map)
        dist_B = -dist_logits_BK.log_softmax(1).gather(1, decision_B[:, None])[:, 0]
        weight_B = torch.ones_like(dist_B) if spec.weights is None else spec.weights[decision_B]
        dist_loss = (weight_B * dist_B).sum() / divisor(weight_B.sum() if spec.normaliser is None else spec.normaliser)
    return JointLoss((1 - spec.alpha) * cls_loss + spec.alpha * dist_loss, cls_loss, dist_loss)


def label_loss(logits: Tensor, target: Target, spec: LossSpec) -> Tensor:
    """Compute the CLS head's loss, 0-d float32.

    From ``cls_weights``, ``log_prior`` and ``bce``.
    """
    (labels, partner, lam, smoothing), cls_weights, logits_BK = target, spec.cls_weights, _full(logits)
    if spec.log_prior is not None:
        logits_BK = logits_BK + spec.log_prior

    def weighted(values_BK: Tensor) -> Tensor:
        return values_BK if cls_weights is None else values_BK * cls_weights

    def mixed(values_BK: Tensor) -> Tensor:
        """Return [B] values at the label; mixed: at both labels, weighted by ``lam``."""
        own_B = values_BK.gather(1, labels[:, None])[:, 0]
        if partner is None or lam is None:
            return own_B
        return lam * own_B + (1 - lam) * values_BK.gather(1, partner[:, None])[:, 0]

    def target_sum(values_BK: Tensor) -> Tensor:
        """Return [B] sums over classes of the smoothed, weighted target times the values."""
        values_BK = weighted(values_BK)
        return mixed(values_BK) * (1 - smoothing) + (values_BK.mean(1) * smoothing if smoothing else 0.0)

    if spec.bce:
        return (weighted(F.softplus(logits_BK)).sum(1) - target_sum(logits_BK)).mean() / logits.size(1)
    norm = len(labels) if cls_weights is None else divisor(mixed(cls_weights.expand_as(logits)).sum())
    return -target_sum(logits_BK.log_softmax(1)).sum() / norm


def divisor(weight_sum: Tensor) -> Tensor:
    """Return the divisor of a weighted mean.

    Infinity for weights that are all 0, so that the mean is 0, not NaN.
    """
    return torch.where(weight_sum == 0, torch.inf, weight_sum)


def decision_weight(teacher_logits: Tensor, weights: Tensor | None, class_map: Tensor | None = None) -> Tensor:
    """Sum the DRW weights of the teacher's decisions over the batch.

    It is the divisor of the DIST loss, 0-d float32.

    Its mean over ranks, passed as ``normaliser``, makes the weighted mean one over the global batch.
    """
    decision_B = _decision(teacher_logits, class_map)
    ones_B = torch.ones_like(decision_B, dtype=torch.float32)
    return (ones_B if weights is None else weights[decision_B]).sum()


def _soft_distillation(dist_logits_BK: Tensor, teacher_logits_BK: Tensor, spec: LossSpec) -> Tensor:
    """Compute tau^2 KL(teacher || DIST) / (B K), the classes in the teacher's order."""
    weights, class_map, tau = spec.weights, spec.class_map, spec.tau
    if class_map is not None:
        dist_logits_BK = dist_logits_BK[:, class_map]
    log_p_BK = (teacher_logits_BK / tau).log_softmax(1)
    if weights is not None:
        log_weights_K = (weights if class_map is None else weights[class_map]).log()
        log_p_BK = (log_p_BK + log_weights_K).log_softmax(1)
    p_BK = log_p_BK.exp()
    cross_BK = p_BK * (log_p_BK - (dist_logits_BK / tau).log_softmax(1))
    return torch.where(p_BK > 0, cross_BK, 0.0).sum() * (tau * tau / dist_logits_BK.numel())


def _decision(teacher_logits_BJ: Tensor, class_map: Tensor | None) -> Tensor:
    decision_B = teacher_logits_BJ.argmax(1)
    return decision_B if class_map is None else class_map[decision_B]


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
