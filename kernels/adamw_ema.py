"""AdamW, gradient scale and moving average in one pass over flat buffers.

    g' = scale g;  m += (1 - beta1) (g' - m);  v = beta2 v + (1 - beta2) g'^2;  w *= 1 - lr decay
    w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps);  ema += (1 - ema_decay) (w - ema)

The first ``num_decayed`` elements have weight decay, the rest none. ``lr``, ``step`` (t) and ``scale`` are read on the
device, so a schedule or a clip neither syncs nor recompiles. A ``scale`` of 0 skips the step, also where a gradient is
not finite: only the average is updated. Source: Loshchilov & Hutter 2019, algorithm 2; torch.optim.AdamW; timm
ModelEmaV3 for the average.
Moves 36 bytes a weight in float32 (w, m, v, ema in and out, g in): 0.73 ms for 87.3 M weights at 4.3 TB/s.
Shapes: P weights.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastdeitlt.kernels._launch import AotConfig, LaunchConfig, check, interpreted, launch, schema
from fastdeitlt.kernels._measured import setting
from torch import Tensor

from fastdeitlt.errors import UserError

DEFAULT = LaunchConfig({"BLOCK": 1024}, num_warps=8)
KEY = ("step",)
"""Key of its measurements; the shape does not matter."""


@torch.no_grad()
def reference(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    num_decayed: int,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
) -> None:
    """Compute ``adamw_ema`` in plain torch, in place, in float32 or float64."""
    if scale is None or scale != 0:
        beta1, beta2 = betas
        grad = grads if scale is None else grads * scale
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weights[:num_decayed].mul_(1 - lr * weight_decay)
        correction1, correction2 = (-torch.expm1(step.double() * math.log(beta)) for beta in betas)
        denominator = (exp_avg_sq.sqrt() / correction2.sqrt().to(weights.dtype)).add_(eps)
        weights.sub_((lr / correction1).to(weights.dtype) * exp_avg / denominator)
    if ema is not None:
        ema.lerp_(weights, 1 - ema_decay)


@triton.jit
def _one_minus_power(log_beta, step):
    """Compute 1 - beta^t.

    For beta^t near 1 by a series exact to float32, without cancellation.
    """
    x = log_beta * step
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def _adamw_ema_kernel(
    p_weights,  # [P] float32, in and out
    p_grads,  # [P] float32
    p_exp_avg,  # [P] float32, in and out
    p_exp_avg_sq,  # [P] float32, in and out
    p_ema,  # [P] float32, in and out, or None
    p_lr,  # [] learning rate
    p_step,  # [] number of this step, from 1
    p_scale,  # [] factor on the gradients, or None
    P, num_decayed, weight_decay, log_beta1, log_beta2, one_minus_beta1, one_minus_beta2, eps, one_minus_ema_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update weights i BLOCK .. (i + 1) BLOCK in program i."""
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < P
    lr = tl.load(p_lr)
    step = tl.load(p_step)
    correction1 = _one_minus_power(log_beta1, step)
    correction2 = _one_minus_power(log_beta2, step)

    b_grad = tl.load(p_grads + o_p, mask=m_p, other=0.0)
    b_exp_avg_before = tl.load(p_exp_avg + o_p, mask=m_p, other=0.0)
    b_exp_avg_sq_before = tl.load(p_exp_avg_sq + o_p, mask=m_p, other=0.0)
    b_weights_before = tl.load(p_weights + o_p, mask=m_p, other=0.0)
    if p_scale is not None:
        scale = tl.load(p_scale)
        b_grad *= scale
    b_exp_avg = b_exp_avg_before + one_minus_beta1 * (b_grad - b_exp_avg_before)
    b_exp_avg_sq = b_exp_avg_sq_before + one_minus_beta2 * (b_grad * b_grad - b_exp_avg_sq_before)
    b_weights = b_weights_before * (1 - lr * tl.where(o_p < num_decayed, weight_decay, 0.0))
    b_weights -= lr / correction1 * b_exp_avg / (tl.sqrt(b_exp_avg_sq) / tl.sqrt(correction2) + eps)
    if p_scale is not None:  # old values are stored again: a mask that depends on a value would split the stores
        b_exp_avg = tl.where(scale != 0.0, b_exp_avg, b_exp_avg_before)
        b_exp_avg_sq = tl.where(scale != 0.0, b_exp_avg_sq, b_exp_avg_sq_before)
        b_weights = tl.where(scale != 0.0, b_weights, b_weights_before)

    tl.store(p_exp_avg + o_p, b_exp_avg, mask=m_p)
    tl.store(p_exp_avg_sq + o_p, b_exp_avg_sq, mask=m_p)
    tl.store(p_weights + o_p, b_weights, mask=m_p)
    if p_ema is not None:
        b_ema = tl.load(p_ema + o_p, mask=m_p, other=0.0)
        tl.store(p_ema + o_p, b_ema + one_minus_ema_decay * (b_weights - b_ema), mask=m_p)


class _Inputs(NamedTuple):
    """Arguments of the operator."""

    weights: Tensor
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None
    lr: Tensor
    step: Tensor
    scale: Tensor | None
    num_decayed: int
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    ema_decay: float


def _launch(*arguments: Any) -> None:
    inputs = _Inputs(*arguments)
    config, size = setting("adamw_ema", KEY, inputs.weights.device, DEFAULT), inputs.weights.numel()
    launch(
        _adamw_ema_kernel, (triton.cdiv(size, config.blocks["BLOCK"]),), inputs.weights,
        *inputs[:8], size, inputs.num_decayed, inputs.weight_decay, math.log(inputs.beta1), math.log(inputs.beta2),
        1 - inputs.beta1, 1 - inputs.beta2, inputs.eps, 1 - inputs.ema_decay, **config.options,
    )  # fmt: skip


MUTATED = ("weights", "exp_avg", "exp_avg_sq", "ema")
_op = torch.library.custom_op(
    "fastdeitlt::adamw_ema", _launch, mutates_args=MUTATED, device_types="cuda",
    schema=f"({schema(_Inputs, MUTATED)}) -> ()",
)  # fmt: skip


@_op.register_kernel("cpu")
def _(*arguments: Any) -> None:
    if interpreted():
        return _launch(*arguments)
    options = _Inputs(*arguments)._asdict()
    betas = options.pop("beta1"), options.pop("beta2")
    return reference(betas=betas, **options)


@_op.register_fake
def _(*_arguments: Any) -> None:
    return None


def adamw_ema(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    num_decayed: int,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
) -> None:
    """Apply one AdamW step and update the moving average, in place, in one launch.

    Args:
        weights, exp_avg, exp_avg_sq: [P] float32 on one device, contiguous, updated.
        grads: [P] float32.
        lr, step: 0-d float32 on the device; ``step`` is the number of this step, from 1.
        num_decayed: number of leading weights with weight decay.
        scale: 0-d float32 factor on the gradients (clip coefficient, 1 / loss scale). 0 skips the step, also where a
            gradient is not finite. None = 1.
        ema: [P] float32 average to update. None = none.

    Raises:
        UserError: a shape, type, device, layout or range does not fit.
    """
    shape, device = tuple(weights.shape), weights.device
    if weights.dim() != 1 or not weights.numel() or not 0 <= num_decayed <= weights.numel():
        raise UserError(
            f"adamw_ema: got weights of shape {shape} and num_decayed={num_decayed}, expected a flat buffer, not "
            "empty, and 0 <= num_decayed <= its length"
        )
    if not (all(0 < beta < 1 for beta in betas) and 0 <= ema_decay < 1 and eps > 0):
        raise UserError(
            f"adamw_ema: got betas {betas}, ema_decay {ema_decay}, eps {eps}, expected decays < 1, betas and eps > 0"
        )
    tensors = {
        "weights": weights, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "lr": lr,
        "step": step, "scale": scale,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            size = () if name in ("lr", "step", "scale") else shape
            check("adamw_ema", name, tensor, size, (torch.float32,), device)
    _op(*tensors.values(), num_decayed, weight_decay, *betas, eps, ema_decay)


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels: all options, and none; sizes are multiples of 64."""
    integers = {"P": "i32", "num_decayed": "i32"}
    options: dict[str, Any] = {"divisible_by_16": tuple(integers), "narrow_stores": 0}
    blocks = DEFAULT.blocks
    return [
        AotConfig.of(_adamw_ema_kernel, DEFAULT, {**blocks, **dict.fromkeys(absent)}, integers, note=note, **options)
        for note, absent in (("all", ()), ("plain", ("p_ema", "p_scale")))
    ]
