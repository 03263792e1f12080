"""The MLP's bias and exact GELU in one pass; the backward computes du and the bias gradient in one pass.

    x = u + bias,  h = x P(x),  P(x) = (1 + erf(x / sqrt 2)) / 2
    du = dh (P(x) + x p(x)),  p(x) = exp(-x^2 / 2) / sqrt(2 pi),  dbias = sum_m du_m

A bandwidth-bound pass on an H200 has about 27 instructions an element forward and 41 backward; with erf of CUDA's
library it needs more. So the tail Q = 1 - P is the power of 2 of a polynomial of |x|, and

    h = max(x, 0) - |x| Q(|x|),  P + x p = T(-x) for x < 0 and 1 - T(x) for x > 0,  T(a) = Q(a) - a p(a)

u is the first linear map's product without its bias. Only u is kept; the arithmetic is float32. Each program of the
backward sums over its rows for the bias; a second reduction adds these sums in a fixed order, without atomics. Source:
Hendrycks & Gimpel 2016 (GELU); its derivative by the product rule.
Moves 4 F bytes forward and 6 F backward a row in bfloat16 (F = 4 D): 145 and 217 us at M = 256 x 198, F = 3072 and
4.3 TB/s. Inductor fuses the forward and du; its bias gradient costs a further read of du.
Shapes: M rows, F width, P programs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastdeitlt.kernels._launch import FLOATS, AotConfig, LaunchConfig, check, interpreted, launch, num_sms
from fastdeitlt.kernels._measured import setting
from fastdeitlt.kernels._operator import Operator
from fastdeitlt.kernels._pick import pick
from torch import Tensor

from fastdeitlt.errors import UserError

FORWARD = LaunchConfig({"ROWS": 4, "BLOCK": 512}, num_warps=4)
BACKWARD = LaunchConfig({"ROWS": 8, "BLOCK": 256, "PROGRAMS": 4}, num_warps=4, num_stages=2)
"""Defaults; PROGRAMS is the backward's programs on a multiprocessor over all columns."""
HALF_LOG2E, HALF_LOG2_2PI = tl.constexpr(0.5 / math.log(2)), tl.constexpr(0.5 * math.log2(2 * math.pi))
FAR = tl.constexpr(16.0)
POWERS = (
    -1.28922898e-6, 2.09580766e-5, -9.99477197e-5, -3.39450751e-4, 7.31561612e-3, -5.26574291e-2, -0.459161669,
    -1.15110946, -1.0,
)  # fmt: skip
"""Coefficients of log2 Q(a) by powers of a, the eighth first: minimax on [0, 5.5], where Q in float32 has an absolute
error of at most 8e-8 and a relative one of 7e-4. Beyond, Q is below Q(5.5) = 2e-8; from FAR on it is 0."""
LOG2_TAIL, DEGREE = tl.constexpr(POWERS), tl.constexpr(len(POWERS) - 1)


def reference(u: Tensor, bias: Tensor) -> Tensor:
    """Compute ``bias_gelu`` in plain torch, in float32 (float64 for a float64 u)."""
    full = torch.promote_types(u.dtype, torch.float32)
    return F.gelu(u.to(full) + bias.to(full)).to(u.dtype)


@triton.jit
def _load(p_x, o_m, o_f, M, WIDTH: tl.constexpr):
    """Return offsets and mask of a tile, and its values in float32."""
    o_block = o_m.to(tl.int64)[:, None] * WIDTH + o_f[None, :]
    m_block = (o_m < M)[:, None] & (o_f < WIDTH)[None, :]
    return o_block, m_block, tl.load(p_x + o_block, mask=m_block, other=0.0).to(tl.float32)


@triton.jit
def _tail(b_x):
    """Return |x|, at most FAR, and its Q, the upper tail of the normal distribution."""
    b_a = tl.minimum(tl.abs(b_x), FAR)
    b_log2 = tl.full(b_a.shape, LOG2_TAIL[0], tl.float32)
    for i in tl.static_range(1, DEGREE + 1):
        b_log2 = b_log2 * b_a + LOG2_TAIL[i]
    return b_a, tl.exp2(b_log2)


@triton.jit
def bias_gelu_fwd_kernel(
    p_u,  # [M, WIDTH]
    p_bias,  # [WIDTH]
    p_h,  # [M, WIDTH] out
    M, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a block of h in program (i, j).

    Rows i ROWS .. (i + 1) ROWS, columns j BLOCK .. (j + 1) BLOCK.
    """
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(p_bias + o_f, mask=o_f < WIDTH, other=0.0).to(tl.float32)
    o_block, m_block, b_u = _load(p_u, o_m, o_f, M, WIDTH)
    b_x = b_u + bias[None, :]
    b_a, b_q = _tail(b_x)
    b_h = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL) - b_a * b_q
    tl.store(p_h + o_block, b_h.to(p_h.dtype.element_ty), mask=m_block)


@triton.jit
def bias_gelu_bwd_kernel(
    p_dh,  # [M, WIDTH]
    p_u,  # [M, WIDTH]
    p_bias,  # [WIDTH]
    p_du,  # [M, WIDTH] out
    p_sums,  # [P, WIDTH] float32 out: this program's partial dbias
    M, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute du and partial dbias.

    Program (i, j): blocks i, i + P .. of ROWS rows, columns of block j.
    """
    i_p = tl.program_id(0)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(p_bias + o_f, mask=o_f < WIDTH, other=0.0).to(tl.float32)
    b_dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in tl.range(i_p * ROWS, M, tl.num_programs(0) * ROWS, num_stages=STAGES):
        o_m = row + tl.arange(0, ROWS)
        o_block, m_block, b_u = _load(p_u, o_m, o_f, M, WIDTH)
        b_dh = tl.load(p_dh + o_block, mask=m_block, other=0.0).to(tl.float32)
        b_x = b_u + bias[None, :]
        b_a, b_q = _tail(b_x)
        b_t = b_q - b_a * tl.exp2(b_x * b_x * -HALF_LOG2E - HALF_LOG2_2PI)
        b_du = b_dh * tl.where(b_x > 0, 1.0 - b_t, b_t)
        tl.store(p_du + o_block, b_du.to(p_du.dtype.element_ty), mask=m_block)
        b_dbias += b_du
    tl.store(p_sums + i_p.to(tl.int64) * WIDTH + o_f, tl.sum(b_dbias, 0), mask=o_f < WIDTH)


def _launch_forward(u: Tensor, bias: Tensor) -> Tensor:
    h, width = torch.empty_like(u), u.shape[-1]
    config = setting("bias_gelu", ("forward", width), u.device, FORWARD)
    rows = u.numel() // width
    grid = (triton.cdiv(rows, config.blocks["ROWS"]), triton.cdiv(width, config.blocks["BLOCK"]))
    launch(bias_gelu_fwd_kernel, grid, u, u, bias, h, rows, WIDTH=width, **config.options)
    return h


def _launch_backward(dh: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    du, width = torch.empty_like(u), u.shape[-1]
    config = setting("bias_gelu", ("backward", width), u.device, BACKWARD)
    rows, block, columns = u.numel() // width, config.blocks["ROWS"], triton.cdiv(width, config.blocks["BLOCK"])
    programs = triton.cdiv(num_sms(u.device) * config.blocks["PROGRAMS"], columns)
    programs = min(programs, triton.cdiv(rows, block))
    sums = torch.empty(programs, width, dtype=torch.float32, device=u.device)
    launch(
        bias_gelu_bwd_kernel, (programs, columns), u,
        dh, u, bias, du, sums, rows, WIDTH=width, ROWS=block, BLOCK=config.blocks["BLOCK"],
        STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return du, sums.sum(0).to(bias.dtype)


_forward = Operator("bias_gelu", _launch_forward)
_backward = Operator("bias_gelu_backward", _launch_backward)


@_forward.fake
def _(u: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(u)


@_backward.fake
def _(dh: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(bias)


@_forward.on_cpu
def _(u: Tensor, bias: Tensor) -> Tensor:
    return _launch_forward(u, bias) if interpreted() else reference(u, bias)


@_backward.on_cpu
def _(dh: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if interpreted():
        return _launch_backward(dh, u, bias)
    du = torch.ops.aten.gelu_backward(dh.float(), u.float() + bias.float())
    return du.to(u.dtype), du.flatten(0, -2).sum(0).to(bias.dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dh.contiguous(), *ctx.saved_tensors)


_forward.autograd(_autograd, _setup_context)


def bias_gelu(u: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """Compute the exact (erf) gelu(u + bias).

    Args:
        u: [..., F] float32, float16 or bfloat16, contiguous, not empty.
        bias: [F], one of the three types.
        impl: "triton", "torch" (``reference``), "auto" (see ``_pick.pick``). On a CPU
            "triton" is the float32 reference, or the kernel itself under TRITON_INTERPRET=1.

    Returns:
        Shape and type of u.

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    if u.dim() < 2 or not u.numel():
        raise UserError(f"bias_gelu: u: got shape {tuple(u.shape)}, expected (rows, ..., width), not empty")
    check("bias_gelu", "u", u, tuple(u.shape), FLOATS)
    check("bias_gelu", "bias", bias, tuple(u.shape[-1:]), FLOATS, u.device)
    chosen = pick("bias_gelu", impl, tuple(u.shape[-1:]), u.device)
    return reference(u, bias) if chosen == "torch" else _forward(u, bias)


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels.

    The students' widths in bfloat16, the base one also in float16 and float32.
    """
    cases = [("bf16", width) for width in (768, 1536, 3072, 4096)] + [("fp16", 3072), ("fp32", 3072)]
    return [_aot(kernel, *case) for kernel in (bias_gelu_fwd_kernel, bias_gelu_bwd_kernel) for case in cases]


def _aot(kernel: Any, kind: str, width: int) -> AotConfig:
    config = FORWARD if kernel is bias_gelu_fwd_kernel else BACKWARD
    constexprs = {"WIDTH": width, **config.blocks, "STAGES": config.num_stages}
    types = {"M": "i32", **dict.fromkeys(("p_u", "p_h", "p_dh", "p_du"), f"*{kind}")}
    return AotConfig.of(kernel, config, constexprs, types, narrow_stores=0)
