"""Softmax attention on the packed output of the qkv projection, forward and backward, deterministic.

    out_m = sum_n P_mn v_n,  P = softmax_n(q_m k_n / sqrt D),  Delta_m = out_m dout_m,  dP_mn = dout_m v_n
    dV_n = sum_m P_mn dout_m,  dS = P (dP - Delta),  dQ_m = sum_n dS_mn k_n / sqrt D,  dK_n = sum_m dS_mn q_m / sqrt D

The kernels read the projection's (B, N, 3, H, D) and write the gradient in the same layout, without a permutation;
between the passes only the output and one float32 a row (its log-sum-exp) are kept. The same backward computes the
gradient of the projection's bias: sum_m dQ_m for the queries, sum_m dout_m for the values, because the rows of P sum to
1, and 0 for the keys, because a constant added to all keys of a head changes no row of P. Source: Dao et al. 2022
(FlashAttention), algorithms 2 and 4, without atomics, and without the running rescale where whole rows fit on chip.
Moves 4 T bytes forward and 8 T backward, T = 2 B N H D in bfloat16: 72 and 145 us at (256, 198, 12, 64) and 4.3 TB/s,
426 and 532 useful TFLOP/s.
Shapes: B batch, N tokens, M query rows, H heads, D head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from fastdeitlt.kernels._attention_launch import FEW_ROWS, aot_configs, launch_backward, launch_forward
from fastdeitlt.kernels._launch import FLOATS, check, interpreted
from fastdeitlt.kernels._operator import Operator
from fastdeitlt.kernels._pick import FLASH_MODULES, pick_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeitlt.errors import UserError

__all__ = ["WIDTHS", "aot_configs", "attention", "attention_first", "reference"]

WIDTHS = (32, 64, 96, 128)
LOG2E = math.log2(math.e)
FLASH = dict.fromkeys(("flash", *FLASH_MODULES), SDPBackend.FLASH_ATTENTION)
GPU_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS = {**FLASH, **GPU_BACKENDS, "math": SDPBackend.MATH}


def reference(q: Tensor, kv: Tensor | None = None) -> Tensor:
    """Compute attention of either layout in plain torch.

    It computes in float32 (float64 for float64); the result has the input's type.
    """
    full = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(full) for x in _split(q, kv))
    scores_BHMN = queries @ keys.mT * q.shape[-1] ** -0.5
    return (scores_BHMN.softmax(-1) @ values).transpose(1, 2).flatten(2).to(q.dtype)


def _split(q: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, H, M, D], keys and values [B, H, N, D] of either layout."""
    # unbind: its backward joins the gradients in one pass, those of slices add whole ones
    queries, keys, values = q.unbind(2) if kv is None else (q, *kv.unbind(2))
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def _run_forward(q: Tensor, kv: Tensor | None, qkv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, kv, qkv_bias)
    launch_forward(q, kv, out, lse)
    return out, lse


def _run_backward(
    q: Tensor, kv: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dkv, _ = _gradients(q, kv, out, grad_out, lse, False)
    return dq, dkv, launch_backward(q, kv, out, grad_out, lse, dq, dkv, sums)


_forward = Operator("attention", _run_forward)
_backward = Operator("attention_backward", _run_backward)


@_forward.fake
def _outputs(q: Tensor, kv: Tensor | None, qkv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, rows, *_, heads, width = q.shape
    out = torch.empty(batch, rows, heads * width, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)


@_backward.fake
def _gradients(
    q: Tensor, kv: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    return torch.empty_like(q), dkv, q.new_empty((2, *q.shape[-2:]) if sums else 0, dtype=torch.float32)


@_forward.on_cpu
def _(q: Tensor, kv: Tensor | None, qkv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if interpreted():
        return _run_forward(q, kv, qkv_bias)
    queries, keys, _ = (x.float() for x in _split(q, kv))
    return reference(q, kv), (queries @ keys.mT * q.shape[-1] ** -0.5).logsumexp(-1) * LOG2E


@_backward.on_cpu
def _(
    q: Tensor, kv: Tensor | None, out: Tensor, grad_out: Tensor, lse: Tensor, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if interpreted():
        return _run_backward(q, kv, out, grad_out, lse, sums)
    dq, dkv, summed = _gradients(q, kv, out, grad_out, lse, sums)
    given, into = ((q,), (dq,)) if kv is None else ((q, kv), (dq, dkv))
    for gradient, value in zip(into, torch.func.vjp(reference, *given)[1](grad_out), strict=True):
        gradient.copy_(value)
    if sums:
        of_queries = dq[:, :, 0] if kv is None else dq
        rows = torch.stack([of_queries, grad_out.view(of_queries.shape)])
        summed.copy_(rows.sum((1, 2), dtype=torch.float32))
    return dq, dkv, summed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, qkv_bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output)
    ctx.bias_dtype = None if qkv_bias is None else qkv_bias.dtype


def _autograd(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    q, kv, out, lse = ctx.saved_tensors
    dq, dkv, sums = _backward(q, kv, out, grad_out.contiguous(), lse, ctx.bias_dtype is not None)
    dbias = None
    if ctx.bias_dtype is not None:
        of_queries, of_values = sums.flatten(1).to(ctx.bias_dtype).unbind()
        dbias = torch.cat([of_queries, torch.zeros_like(of_queries), of_values])
    return dq, None if kv is None else dkv, dbias


_forward.autograd(_autograd, _setup_context)


def attention(qkv_BN3HD: Tensor, *, qkv_bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Compute softmax attention of every token to every token.

    Args:
        qkv_BN3HD: [B, N, 3, H, D] bfloat16, float16 or float32, contiguous; D is 32, 64, 96 or 128.
        qkv_bias: [3 H D] bias that the caller has added, detached, in ``qkv_BN3HD``: it changes no value here, and this
            backward computes its gradient, in the kernel without another pass. None = no gradient here.
        impl: one of ``_pick.IMPLS``, see ``pick_attention``; with "sdpa" torch selects the backend.
            On a CPU "triton" is the float32 reference, or the kernel itself under TRITON_INTERPRET=1.

    Returns:
        [B, N, H D], heads side by side, in the input's type.

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    check("attention", "qkv", qkv_BN3HD, (None, None, 3, None, None), FLOATS)
    return _attend(qkv_BN3HD, None, qkv_bias, impl)


def attention_first(q_BMHD: Tensor, kv_BN2HD: Tensor, *, qkv_bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Compute softmax attention of the first M tokens to all N.

    Args:
        q_BMHD: [B, M, H, D], at most 16 rows for the kernel; otherwise as ``attention``.
        kv_BN2HD: [B, N, 2, H, D].
        qkv_bias: [3 H D], of both tensors.

    Returns:
        [B, M, H D].

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    check("attention_first", "q", q_BMHD, (None, None, None, None), FLOATS)
    batch, rows, heads, width = q_BMHD.shape
    check("attention_first", "kv", kv_BN2HD, (batch, None, 2, heads, width), (q_BMHD.dtype,), q_BMHD.device)
    if not 1 <= rows <= kv_BN2HD.shape[1]:
        raise UserError(f"attention_first: got {rows} query rows, expected 1 to {kv_BN2HD.shape[1]}, the tokens")
    return _attend(q_BMHD, kv_BN2HD, qkv_bias, impl)


def _attend(q: Tensor, kv: Tensor | None, qkv_bias: Tensor | None, impl: str) -> Tensor:
    tokens, (heads, width) = q.shape[1] if kv is None else kv.shape[1], q.shape[-2:]
    if qkv_bias is not None:
        check("attention", "qkv_bias", qkv_bias, (3 * heads * width,), FLOATS, q.device)
    chosen = pick_attention(impl, tokens, width, q.dtype, q.device)
    if chosen == "triton":
        _check_kernel(q, None if kv is None else q.shape[1])
        return _forward(q, kv, qkv_bias)[0]
    if qkv_bias is not None:
        zeros_3HD = (qkv_bias - qkv_bias.detach()).to(q.dtype).view(3, heads, width)
        q, kv = (q + zeros_3HD, None) if kv is None else (q + zeros_3HD[0], kv + zeros_3HD[1:])
    if chosen in GPU_BACKENDS and q.device.type != "cuda":
        raise UserError(f"attention: impl {chosen!r}: got a tensor on {q.device}, expected CUDA. Use 'auto' or 'sdpa'.")
    queries, keys, values = _split(q, kv)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    with sdpa_kernel(BACKENDS[chosen]):
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def _check_kernel(q: Tensor, rows: int | None) -> None:
    if q.shape[-1] not in WIDTHS:
        raise UserError(
            f"attention: got head width {q.shape[-1]}, expected one of {WIDTHS} for the Triton kernel. Use impl='sdpa'."
        )
    if rows is not None and rows > FEW_ROWS:
        raise UserError(
            f"attention: got {rows} query rows, expected all or at most {FEW_ROWS} for the Triton kernel. Use 'sdpa'."
        )
    if q.device.type == "cuda" and q.dtype == torch.float32:
        raise UserError(
            "attention: got float32 on a GPU, expected bfloat16 or float16 for the Triton kernel. Use impl='sdpa'."
        )
