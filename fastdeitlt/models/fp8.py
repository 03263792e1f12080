"""Matrix products in float8 (``train.precision=fp8``), with one scale for each row of both factors.

The output and the input's gradient are float8 products, accumulated in float32; the weight's gradient is a bfloat16
product, because its sum over all tokens is the most sensitive to rounding. Source: the recipe "rowwise_with_gw_hp" of
torchao.
"""
# M rows (all tokens of a batch), K inputs, N outputs

from typing import Any

import torch
from torch import Tensor

from fastdeitlt.errors import UserError

LARGEST = torch.finfo(torch.float8_e4m3fn).max
CAPABILITY = (8, 9)
"""First compute capability with float8 tensor cores."""


def check_fp8(device: torch.device) -> None:
    """Raise a UserError for a device without float8 products."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < CAPABILITY:
        got = device.type if capability is None else "compute capability {}.{}".format(*capability)
        raise UserError(
            f"train.precision=fp8: got {got}, expected a GPU with compute capability 8.9 or newer, which has float8 "
            "products. Use train.precision=bf16."
        )


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Compute x @ weight.T in float8; returns bfloat16 and has gradients.

    Args:
        x: [..., K], any float type; K and N are multiples of 16.
        weight_NK: any float type.
    """
    product_MN: Tensor = _Linear.apply(x.to(torch.bfloat16).flatten(0, -2), weight_NK.to(torch.bfloat16))
    return product_MN.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return scaled_product(x_MK, weight_NK, fast=True)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, weight_NK = ctx.saved_tensors
        return scaled_product(grad_MN, weight_NK.t()), grad_MN.t() @ x_MK


def scaled_product(a_MK: Tensor, b_NK: Tensor, fast: bool = False) -> Tensor:
    """Round both factors to float8 and return a @ b.T in bfloat16.

    Args:
        fast: whether the tensor cores of Hopper accumulate in fewer bits.
    """
    a_MK, scale_M1 = quantise(a_MK)
    b_NK, scale_N1 = quantise(b_NK)
    return torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=scale_M1, scale_b=scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def quantise(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row-major float8 matrix and scales [M, 1]; x = matrix * scale."""
    x_MK = x_MK.float()
    scale_M1 = x_MK.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x_MK / scale_M1).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale_M1
