"""The MLP's bias and GELU, forward and backward with the bias gradient: Triton kernel beside torch and inductor.

    python -m benchmarks.bench_bias_gelu [--rounds 20]

Useful bytes: u read and h written; u and the gradient of h read and that of u written. The product before it is not
included. ``whole`` is the linear map, bias and GELU, forward and backward: the fair comparison, since in torch the bias
is free within the product.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fastdeitlt.kernels import bias_gelu as module
from torch import Tensor

from benchmarks import harness
from fastdeitlt.core.measure.timer import passes

# rows, width of the hidden layer: ViT-T, -S, -B and -L at 198 tokens
SHAPES = ((512 * 198, 768), (256 * 198, 1536), (256 * 198, 3072), (128 * 198, 4096))


def eager(u: Tensor, bias: Tensor) -> Tensor:
    """Add the bias and apply GELU in eager torch."""
    return F.gelu(u + bias.to(u.dtype))


def triton(u: Tensor, bias: Tensor) -> Tensor:
    """Run our kernel."""
    return module.bias_gelu(u, bias, impl="triton")


def linear_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run the hidden layer in eager torch, like a block."""
    return F.gelu(F.linear(x, weight, bias.to(x.dtype)))


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run the hidden layer with our kernel."""
    return module.bias_gelu(F.linear(x, weight), bias, impl="triton")


def problem(rows: int, width: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Create u and bias; x, weight and bias."""
    low = {"device": device, "dtype": torch.bfloat16}
    u, x, weight = (torch.randn(size, **low) for size in ((rows, width), (rows, width // 4), (width, width // 4)))
    bias = torch.randn(width, device=device)
    return [t.requires_grad_() for t in (u, bias)], [t.requires_grad_() for t in (x, weight * width**-0.5, bias)]


def cases(device: torch.device, shapes: Sequence[tuple[int, int]] | None = None) -> Iterable[harness.Case]:
    """Yield each width forward, backward, and with its linear map."""
    for rows, width in shapes or SHAPES:
        tensors, linear = problem(rows, width, device)
        peers = {"torch": eager, "inductor": torch.compile(eager, dynamic=False), "triton": triton}
        calls = {name: passes(partial(implementation, *tensors), tensors) for name, implementation in peers.items()}
        useful = {"forward": 4 * rows * width, "backward": 6 * rows * width}
        yield from harness.pass_cases(f"{{}} M={rows} F={width}", calls, useful)
        whole = whole_layer(linear)
        yield harness.Case(f"whole M={rows} F={width}", whole, "inductor", useful_flops=6 * rows * width * width // 4)


def whole_layer(linear: list[Tensor]) -> dict[str, harness.Call]:
    """Return the calls of the hidden layer, forward and backward."""
    compiled = torch.compile(linear_eager, dynamic=False)
    peers = {"torch": linear_eager, "inductor": compiled, "triton": linear_triton}
    return {name: passes(partial(implementation, *linear), linear)["whole"] for name, implementation in peers.items()}


if __name__ == "__main__":
    sys.exit(harness.main("bias_gelu", cases, __doc__, gpu_only=True))
