"""Joint loss of DeiT-LT: the CLS head on the (mixed) labels, the DIST head on the teacher's decisions.

    loss     = (1 - alpha) cls_loss + alpha dist_loss
    cls_loss = mean_b CE(cls_logits_b, lam y_b + (1 - lam) y'_b, smoothed)
    dist_loss= sum_b w[t_b] CE(dist_logits_b, t_b) / sum_b w[t_b],   t_b = class_map[argmax teacher_logits_b]

Source: DeiT-LT (arXiv 2404.02900) section 3; val-iisc/DeiT-LT losses.py, DistillationLoss.
Shapes: B batch, K classes, J the teacher's classes.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastdeitlt.errors import UserError, counted
from fastdeitlt.kernels._joint_loss_reference import (
    JointLoss,
    LossSpec,
    Target,
    decision_weight,
    divisor,
    label_loss,
    reference_losses,
)
from fastdeitlt.kernels._pick import pick

__all__ = ["JointLoss", "LossSpec", "Target", "decision_weight", "divisor", "joint_loss", "label_loss", "log_prior_of"]

Distillation = Literal["hard", "soft"]
Base = Literal["ce", "bce", "balanced_softmax", "logit_adjustment"]
Impl = Literal["auto", "torch", "triton"]

EMPTY_CLASS_PRIOR = 1e-9
"""Prior of a class without training images, so that its log is finite; as in PaCo (losses.py)."""


def joint_loss(
    cls_logits: Tensor,
    dist_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    partner: Tensor | None = None,
    lam: float | Tensor | None = None,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
    class_map: Tensor | None = None,
    distillation: Distillation = "hard",
    tau: float = 1.0,
    alpha: float = 0.5,
    base: Base = "ce",
    counts: Tensor | None = None,
    cls_weights: Tensor | None = None,
    normaliser: Tensor | None = None,
    impl: Impl = "auto",
) -> JointLoss:
    """Compute the joint loss of both heads in float32.

    Deterministic, without a host sync.

    Args:
        cls_logits, dist_logits: [B, K], float32, float16 or bfloat16.
        labels: [B] int64 class of each image, 0..K-1. Out of range is not checked (it would sync the host).
        teacher_logits: [B, J] the teacher's; J = K without ``class_map``. It gets no gradient.
        partner: [B] int64 class of the image each one is mixed with (Mixup, CutMix). None = not mixed.
        lam: weight of ``labels`` in the target, 0..1; a float, or a 0-d tensor on the logits' device (then a changing
            value never recompiles). Required with ``partner``, and only then.
        smoothing: label smoothing of the CLS target: ``1 - smoothing + smoothing / K`` on, ``smoothing / K`` off.
        weights: [K] float32 DRW weights of the DIST loss, by the teacher's decision. None = all 1.
        class_map: [J] int64, teacher class -> student class. None = the same order.
        distillation: "hard" = the teacher's argmax; "soft" = its distribution at temperature ``tau``.
        tau: temperature of soft distillation, > 0.
        alpha: weight of the DIST term, 0..1.
        base: loss of the CLS head. "bce" is the mean over images and classes; "balanced_softmax" and
            "logit_adjustment" (at strength 1: the same function) add the log prior of ``counts`` to the logits.
        counts: [K] training images per class, for the last two bases.
        cls_weights: [K] float32 weights of the CLS loss by class. None = all 1.
        normaliser: 0-d float32 that replaces ``sum_b w[t_b]`` (the mean of ``decision_weight`` over ranks makes the
            weighted mean global). None = this batch's sum.
        impl: "torch", "triton", or "auto", see ``kernels._pick``.

    Returns:
        loss, cls_loss, dist_loss, all differentiable. With ``weights`` the DIST loss is the weighted mean over the
        batch, and 0 where all its weights are 0 (the same with ``cls_weights`` for the CLS loss); soft
        distillation is ``tau^2 KL(teacher || DIST) / (B K)``, and its weights tilt the teacher's distribution,
        ``p_c w_c / sum p w``.

    Raises:
        UserError: shapes, types, devices or ranges do not fit.

    Source: val-iisc/DeiT-LT losses.py (its soft loss with weights multiplies log-probabilities by the weights, which
        gives no distribution; ours re-weights the probabilities); balanced softmax: Ren et al. 2020, eq. 4; logit
        adjustment: Menon et al. 2021, eq. 10.
    """
    _check_options(smoothing, distillation, tau, alpha, base, counts)
    _check_logits(cls_logits, dist_logits, teacher_logits, class_map, distillation)
    (batch, num_classes), device = cls_logits.shape, cls_logits.device
    _check_mixing(partner, lam, device)
    for name, tensor, shape, dtype in (
        ("labels", labels, (batch,), torch.int64),
        ("partner", partner, (batch,), torch.int64),
        ("class_map", class_map, (teacher_logits.size(1),), torch.int64),
        ("weights", weights, (num_classes,), torch.float32),
        ("cls_weights", cls_weights, (num_classes,), torch.float32),
        ("counts", counts, (num_classes,), None),
        ("normaliser", normaliser, (), torch.float32),
    ):
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise UserError(f"joint_loss: {name}: got {_describe(tensor)}, expected {dtype} {shape} on {device}")
    lam = torch.full((), lam, device=device) if isinstance(lam, float | int) else lam
    target = Target(labels, partner, lam, smoothing)
    spec = LossSpec(
        weights, cls_weights, None if counts is None else log_prior_of(counts), class_map, normaliser, tau, alpha,
        soft=distillation == "soft", bce=base == "bce",
    )  # fmt: skip
    run = reference_losses
    if pick("joint_loss", impl, (num_classes,), device, cls_logits.dtype != torch.float64) == "triton":
        from fastdeitlt.kernels import joint_loss as kernel  # Triton is slow to import

        run = kernel.losses
    return run(cls_logits, dist_logits, teacher_logits.detach(), target, spec)


def log_prior_of(counts: Tensor) -> Tensor:
    """Return the log prior [K] of classes with these numbers of training images."""
    return (counts.float() / counts.sum()).clamp_min(EMPTY_CLASS_PRIOR).log()


def _check_options(
    smoothing: float, distillation: str, tau: float, alpha: float, base: str, counts: Tensor | None
) -> None:
    for name, got, choices in (
        ("distillation", distillation, get_args(Distillation)),
        ("base", base, get_args(Base)),
    ):
        if got not in choices:
            raise UserError(f"joint_loss: {name}: got {got!r}, expected one of {', '.join(choices)}")
    if not 0 <= smoothing < 1:
        raise UserError(f"joint_loss: smoothing: got {smoothing}, expected 0 <= smoothing < 1")
    if not 0 <= alpha <= 1:
        raise UserError(f"joint_loss: alpha: got {alpha}, expected 0 <= alpha <= 1")
    if not tau > 0:
        raise UserError(f"joint_loss: tau: got {tau}, expected a temperature > 0")
    if (counts is not None) != (base in ("balanced_softmax", "logit_adjustment")):
        state = "None" if counts is None else "a tensor"
        raise UserError(
            f"joint_loss: counts: got {state} with base={base}, expected the training images per class for "
            "balanced_softmax and logit_adjustment, else None"
        )


def _check_logits(
    cls_logits: Tensor, dist_logits: Tensor, teacher_logits: Tensor, class_map: Tensor | None, distillation: str
) -> None:
    for name, logits in (("cls_logits", cls_logits), ("dist_logits", dist_logits), ("teacher_logits", teacher_logits)):
        if logits.dim() != 2 or not logits.numel() or not logits.is_floating_point():
            raise UserError(
                f"joint_loss: {name}: got {_describe(logits)}, expected floating (batch, classes), not empty"
            )
        if logits.device != cls_logits.device or logits.size(0) != cls_logits.size(0):
            raise UserError(
                f"joint_loss: {name}: got {_describe(logits)}, expected {counted(cls_logits.size(0), 'row')} on "
                f"{cls_logits.device}, as cls_logits"
            )
    if cls_logits.shape != dist_logits.shape or cls_logits.dtype != dist_logits.dtype:
        raise UserError(
            f"joint_loss: dist_logits: got {_describe(dist_logits)}, expected {_describe(cls_logits)}, as cls_logits"
        )
    if teacher_logits.size(1) != cls_logits.size(1) and (class_map is None or distillation == "soft"):
        raise UserError(
            f"joint_loss: teacher_logits: got {counted(teacher_logits.size(1), 'class')}, expected "
            f"{cls_logits.size(1)}. Use hard distillation with a class_map (teacher class -> student class)."
        )


def _check_mixing(partner: Tensor | None, lam: float | Tensor | None, device: torch.device) -> None:
    if (partner is None) != (lam is None):
        name, other = ("lam", "partner") if partner is None else ("partner", "lam")
        raise UserError(f"joint_loss: {name}: got a value with {other}=None, expected both or neither")
    if isinstance(lam, Tensor) and (lam.dim() or not lam.is_floating_point() or lam.device != device):
        raise UserError(
            f"joint_loss: lam: got {_describe(lam)}, expected a floating 0-d tensor on {device} (a copy would stall)"
        )
    if isinstance(lam, float | int) and not 0 <= lam <= 1:
        raise UserError(f"joint_loss: lam: got {lam}, expected 0 <= lam <= 1")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
