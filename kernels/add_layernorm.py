"""Residual add with drop path, then LayerNorm, reading and writing the residual stream once.

    r = x + scale_b (branch + c),  n = (r - mean(r)) / sqrt(var(r) + eps) weight + bias
    g = dn weight,  h = (r - mean) rstd,  dx = dr + rstd (g - mean(g) - h mean(g h)),  dbranch = scale_b dx
    dweight = sum_m dn h,  dbias = sum_m dn,  dc = sum_m dbranch

c is the bias of the branch's last linear map, added here so that its gradient needs no further pass. Statistics are
float32, of r as stored. Each program of the backward sums over its rows for weight and biases; a second reduction adds
these sums in a fixed order, without atomics. Source: Ba et al. 2016 (LayerNorm); Huang et al. 2016 (stochastic depth, a
sample's branch is dropped with scale 0 or kept with 1 / keep).
Moves 4 T bytes forward and 4 T backward (5 T where drop path makes dbranch differ from dx), T = 2 M D in bfloat16: 72
us each at M = 256 x 198, D = 768 and 4.3 TB/s.
Shapes: B samples, M rows (B times tokens), D width, P programs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from fastdeitlt.kernels._add_layernorm_device import add_layernorm_bwd_kernel, add_layernorm_fwd_kernel
from fastdeitlt.kernels._launch import FLOATS, AotConfig, LaunchConfig, check, interpreted, launch, num_sms, schema
from fastdeitlt.kernels._measured import setting
from fastdeitlt.kernels._operator import Operator
from fastdeitlt.kernels._pick import pick
from torch import Tensor

from fastdeitlt.errors import UserError

MAX_WIDTH = 4096


def key(forward: bool, width: int, stream: torch.dtype) -> tuple[str, int, int]:
    """Return a setting's key: pass, width's next power of two, stream's bytes."""
    return "forward" if forward else "backward", max(16, triton.next_power_of_2(width)), stream.itemsize


def launch_config(forward: bool, width: int, stream: torch.dtype, device: torch.device) -> LaunchConfig:
    """Return the measured setting; by default tiles of 2,048 elements or one row.

    The backward's default has at most four rows, and as many programs on a multiprocessor as run on an H100 at once.
    """
    measured_key = key(forward, width, stream)
    block = measured_key[1]
    blocks = {"ROWS": max(1, 2048 // block), "BLOCK_D": block}
    if not forward:
        blocks["ROWS"] = min(blocks["ROWS"], 4)  # more spill in triton 3.6 on sm_100
        blocks["PROGRAMS"] = 3 if block <= 2048 else 2
    default = LaunchConfig(blocks, num_warps=4 if block <= 2048 else 8, num_stages=1 if forward else 2)
    return setting("add_layernorm", measured_key, device, default)


def reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_B: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch_bias: Tensor | None = None,
    branch_samples_K: Tensor | None = None,
    normed_samples_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``add_layernorm`` in plain torch, in float32 (float64 for a float64 x)."""
    full = torch.promote_types(x.dtype, torch.float32)
    scaled = branch.to(full) if branch_bias is None else branch.to(full) + branch_bias.to(full)
    if branch_samples_K is not None:
        scaled = torch.zeros(x.shape, dtype=full, device=x.device).index_copy(0, branch_samples_K, scaled)
    if scale_B is not None:
        scaled = scaled * scale_B.to(full).view(-1, *[1] * (x.dim() - 1))
    residual = (x.to(full) + scaled).to(x.dtype)
    normed = F.layer_norm(residual.to(full), x.shape[-1:], weight.to(full), bias.to(full), eps).to(branch.dtype)
    return residual, normed if normed_samples_K is None else normed.index_select(0, normed_samples_K)


class _Forward(NamedTuple):
    """Arguments of the operator."""

    x: Tensor
    branch: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    branch_rows: Tensor | None
    normed_rows: Tensor | None
    num_normed: int
    eps: float
    branch_bias: Tensor | None

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Allocate residual, normalised rows, means and 1 / deviations."""
        x = self.x
        mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
        normed = x.new_empty((self.num_normed, *x.shape[1:]), dtype=self.branch.dtype)
        return torch.empty_like(x), normed, mean, rstd


class _Backward(NamedTuple):
    """Arguments of the backward operator."""

    grad_residual: Tensor | None
    grad_normed: Tensor
    residual: Tensor
    scale: Tensor | None
    branch_rows: Tensor | None
    normed_rows: Tensor | None
    num_branch: int
    weight: Tensor
    mean: Tensor
    rstd: Tensor
    branch_dtype: torch.dtype | None
    """None: the branch's gradient is that of x."""
    has_branch_bias: bool

    def outputs(self, programs: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate dx, dbranch and each program's partial sums.

        Of dweight, dbias and the gradient of the branch's bias.
        """
        residual, dbranch = self.residual, self.residual.new_empty(0)
        if self.branch_dtype is not None:
            dbranch = residual.new_empty((self.num_branch, *residual.shape[1:]), dtype=self.branch_dtype)
        shape = programs, 3 if self.has_branch_bias else 2, residual.shape[-1]
        return torch.empty_like(residual), dbranch, torch.empty(shape, dtype=torch.float32, device=residual.device)


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _Forward(*arguments)
    x, width = inputs.x, inputs.x.shape[-1]
    rows, config = x.numel() // width, launch_config(True, width, x.dtype, x.device)
    residual, normed, mean, rstd = inputs.outputs()
    launch(
        add_layernorm_fwd_kernel, (triton.cdiv(rows, config.blocks["ROWS"]),), x,
        x, inputs.branch, inputs.branch_bias, inputs.branch_rows, inputs.normed_rows, inputs.scale, inputs.weight,
        inputs.bias, residual, normed, mean, rstd, rows, inputs.eps,
        TOKENS=rows // x.shape[0], D=width, **config.options,
    )  # fmt: skip
    return residual, normed, mean, rstd


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Backward(*arguments)
    residual, rows, width = inputs.residual, inputs.mean.numel(), inputs.residual.shape[-1]
    config = launch_config(False, width, residual.dtype, residual.device)
    block = config.blocks["ROWS"]
    programs = min(num_sms(residual.device) * config.blocks["PROGRAMS"], triton.cdiv(rows, block))
    dx, dbranch, shares = inputs.outputs(programs)
    launch(
        add_layernorm_bwd_kernel, (programs,), residual,
        inputs.grad_residual, inputs.grad_normed, residual, inputs.branch_rows, inputs.normed_rows, inputs.scale,
        inputs.weight, inputs.mean, inputs.rstd, dx, None if inputs.branch_dtype is None else dbranch, shares, rows,
        TOKENS=rows // residual.shape[0], D=width, ROWS=block, BLOCK_D=config.blocks["BLOCK_D"],
        STAGES=config.num_stages, BRANCH_BIAS=inputs.has_branch_bias,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dx, dbranch, shares.sum(0)


_forward = Operator("add_layernorm", _launch_forward, f"({schema(_Forward)}) -> (Tensor, Tensor, Tensor, Tensor)")
_backward = Operator("add_layernorm_backward", _launch_backward, f"({schema(_Backward)}) -> (Tensor, Tensor, Tensor)")


@_forward.fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _Forward(*arguments).outputs()


@_backward.fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    dx, dbranch, sums = _Backward(*arguments).outputs()
    return dx, dbranch, sums[0]


def _samples(rows: Tensor | None, num: int) -> Tensor | None:
    """Return the samples whose row is not -1, in the order of their rows."""
    return None if rows is None else rows.argsort()[len(rows) - num :]


@_forward.on_cpu
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if interpreted():
        return _launch_forward(*arguments)
    x, branch, weight, bias, scale, branch_rows, normed_rows, num_normed, eps, branch_bias = arguments
    residual, normed = reference(
        x, branch, weight, bias, scale, eps, branch_bias=branch_bias,
        branch_samples_K=_samples(branch_rows, len(branch)), normed_samples_K=_samples(normed_rows, num_normed),
    )  # fmt: skip
    variance, mean = torch.var_mean(residual.float(), -1, correction=0)
    return residual, normed, mean, (variance + eps).rsqrt()


@_backward.on_cpu
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if interpreted():
        return _launch_backward(*arguments)
    inputs = _Backward(*arguments)
    scale, rstd, residual = inputs.scale, inputs.rstd[..., None], inputs.grad_residual
    h, dn = (inputs.residual.float() - inputs.mean[..., None]) * rstd, inputs.grad_normed.float()
    normed = _samples(inputs.normed_rows, len(inputs.grad_normed))
    branch_rows = _samples(inputs.branch_rows, inputs.num_branch)
    if normed is not None:
        dn = torch.zeros_like(h).index_copy(0, normed, dn)
    g = dn * inputs.weight.float()
    dx = (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)) * rstd
    dx = dx if residual is None else dx + residual.float()
    dbranch = dx if scale is None else dx * scale.view(-1, *[1] * (dx.dim() - 1))
    dbranch = dbranch if branch_rows is None else dbranch.index_select(0, branch_rows)
    summed = (dn * h, dn, dbranch) if inputs.has_branch_bias else (dn * h, dn)
    sums = torch.stack([rows.flatten(0, -2).sum(0) for rows in summed])
    gradients = inputs.outputs()
    gradients[0].copy_(dx)
    if inputs.branch_dtype:
        gradients[1].copy_(dbranch)
    return *gradients[:2], sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, scale, branch_rows, normed_rows, *_, branch_bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight, scale, branch_rows, normed_rows, *output[2:])
    ctx.num_branch = branch.shape[0]
    apart = scale is not None or branch_rows is not None or branch.dtype != x.dtype
    ctx.branch_dtype = branch.dtype if apart else None
    ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype
    ctx.normed_shape, ctx.normed_dtype = output[1].shape, output[1].dtype


def _autograd(
    ctx: Any, grad_residual: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    residual, weight, scale, branch_rows, normed_rows, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = residual.new_zeros(ctx.normed_shape, dtype=ctx.normed_dtype)
    upstream = None if grad_residual is None else grad_residual.contiguous()
    dx, dbranch, sums = _backward(
        upstream, grad_normed.contiguous(), residual, scale, branch_rows, normed_rows, ctx.num_branch, weight, mean,
        rstd, ctx.branch_dtype, ctx.branch_bias_dtype is not None,
    )  # fmt: skip
    dbranch = dx if ctx.branch_dtype is None else dbranch
    dweight, dbias = sums[:2].to(weight.dtype).unbind()
    dbranch_bias = None if ctx.branch_bias_dtype is None else sums[2].to(ctx.branch_bias_dtype)
    return dx, dbranch, dweight, dbias, *[None] * 5, dbranch_bias


_forward.autograd(_autograd, _setup_context)


def add_layernorm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_B: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch_bias: Tensor | None = None,
    branch_samples_K: Tensor | None = None,
    normed_samples_K: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the residual x + scale branch, and its LayerNorm.

    Args:
        x: [B, ..., D] residual stream, float32, float16 or bfloat16, contiguous; D up to 4,096 for the kernel.
        branch: as x, any of the three types, which is that of the normalised output.
        weight, bias: [D], one of the three types.
        scale_B: [B] float32 drop path, 0 or 1 / keep; a branch with 0 is not read. None = 1. Gets no gradient.
        eps: added to the variance.
        branch_bias: [D], one of the three types: added to each row of the branch before it is scaled. None = 0.
        branch_samples_K: [K] int64, different samples of x that ``branch`` [K, ..., D] contains; nothing is added to
            the others. None = all. Neither these nor the next are checked for repetition: that would stall the host.
        normed_samples_K: [K] int64, different samples whose normalised rows to return. None = all.
        impl: "triton", "torch" (``reference``), "auto" (see ``_pick.pick``). On a CPU
            "triton" is the float32 reference, or the kernel itself under TRITON_INTERPRET=1.

    Returns:
        (residual in x's type, normalised).

    Raises:
        UserError: a shape, type, device or layout does not fit.
    """
    op, shape = "add_layernorm", tuple(x.shape)
    if x.dim() < 2 or not x.numel():
        raise UserError(f"{op}: x: got shape {shape}, expected (samples, ..., width), not empty")
    check(op, "x", x, shape, FLOATS)
    check(op, "weight", weight, shape[-1:], FLOATS, x.device)
    check(op, "bias", bias, shape[-1:], (weight.dtype,), x.device)
    if scale_B is not None:
        check(op, "scale_B", scale_B, shape[:1], (torch.float32,), x.device)
    for name, samples in (("branch_samples_K", branch_samples_K), ("normed_samples_K", normed_samples_K)):
        if samples is not None:
            check(op, name, samples, (None,), (torch.int64,), x.device)
    num_branch = shape[0] if branch_samples_K is None else len(branch_samples_K)
    check(op, "branch", branch, (num_branch, *shape[1:]), FLOATS, x.device)
    if branch_bias is not None:
        check(op, "branch_bias", branch_bias, shape[-1:], FLOATS, x.device)
    if impl == "triton" and shape[-1] > MAX_WIDTH:
        raise UserError(
            f"{op}: got width {shape[-1]}, expected at most {MAX_WIDTH} for the Triton kernel. Use impl='torch'."
        )
    if pick(op, impl, (shape[-1],), x.device, shape[-1] <= MAX_WIDTH) == "torch":
        return reference(
            x, branch, weight, bias, scale_B, eps, branch_bias=branch_bias, branch_samples_K=branch_samples_K,
            normed_samples_K=normed_samples_K,
        )  # fmt: skip
    residual, normed, *_ = _forward(
        x, branch, weight, bias, scale_B, _places(branch_samples_K, shape[0]), _places(normed_samples_K, shape[0]),
        shape[0] if normed_samples_K is None else len(normed_samples_K), eps, branch_bias,
    )  # fmt: skip
    return residual, normed


def _places(samples_K: Tensor | None, num_samples: int) -> Tensor | None:
    """Return [B] int32, each sample's index in ``samples_K``, or -1."""
    if samples_K is None:
        return None
    places_K = torch.arange(len(samples_K), dtype=torch.int32, device=samples_K.device)
    places_B = torch.full((num_samples,), -1, dtype=torch.int32, device=samples_K.device)
    return places_B.scatter(0, samples_K, places_K)


def aot_configs() -> list[AotConfig]:
    """Return the shipped kernels.

    The published students' widths in bfloat16, the widest, variants at 768.
    """
    cases: list[tuple[int, dict[str, str], tuple[str, ...]]] = [
        (width, {}, ()) for width in (192, 384, 768, 1024, 4096)
    ]
    cases.append((768, dict.fromkeys(("p_x", "p_residual", "p_dresidual", "p_dx"), "*fp32"), ()))
    cases.append((768, {}, ("p_branch_bias", "p_scale", "p_dresidual", "p_dbranch")))
    cases = [(width, types, (*absent, "p_branch_rows", "p_normed_rows")) for width, types, absent in cases]
    cases.append((768, {}, ()))
    kernels = (add_layernorm_fwd_kernel, add_layernorm_bwd_kernel)
    return [_aot(kernel, *case) for kernel in kernels for case in cases]


def _aot(kernel: Any, width: int, types: dict[str, str], absent: tuple[str, ...]) -> AotConfig:
    forward = kernel is add_layernorm_fwd_kernel
    stream = torch.float32 if "p_x" in types else torch.bfloat16
    config = launch_config(forward, width, stream, torch.device("cpu"))
    constexprs = {"TOKENS": 198, "D": width, "ROWS": config.blocks["ROWS"], "BLOCK_D": config.blocks["BLOCK_D"]}
    constexprs |= {"STAGES": config.num_stages, "BRANCH_BIAS": "p_branch_bias" not in absent}
    names = ("p_x", "p_branch", "p_residual", "p_normed", "p_dresidual", "p_dnormed", "p_dx", "p_dbranch")
    integers = {"M": "i32", "p_branch_rows": "*i32", "p_normed_rows": "*i32"}
    types = dict.fromkeys(names, "*bf16") | types | integers
    blocks = " ".join(f"{name}={size}" for name, size in config.blocks.items())
    note = f"D={width} {blocks}" + (f" without {', '.join(absent)}" if absent else "")
    narrow = 2 * config.blocks["ROWS"] if forward else 0  # mean and rstd
    return AotConfig.of(kernel, config, constexprs | dict.fromkeys(absent), types, narrow_stores=narrow, note=note)
