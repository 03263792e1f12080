"""Attention on the packed qkv, forward and backward: Triton kernel beside torch's backends, FlashAttention 3 and 4.

    python -m benchmarks.bench_attention [--rounds 20]

Useful FLOPs count the N x N products (two forward, five backward) without the tiles' padding.
Useful bytes: qkv read and the output written; qkv, output and its gradient read and the gradient written.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from fastdeitlt.kernels.attention import attention, attention_first
from torch import Tensor
from triton.runtime.errors import TritonError

from benchmarks import harness
from fastdeitlt.core.measure.timer import passes
from fastdeitlt.errors import UserError

# batch, tokens, heads, width: ViT-B at 224 and 384 pixels, ViT-T on CIFAR with patches of 4 and 2, ViT-B with patch 8
SHAPES = ((256, 198, 12, 64), (64, 578, 12, 64), (1024, 66, 3, 64), (512, 258, 3, 64), (32, 786, 12, 64))
IMPLS = ("triton", "cudnn", "flash", "efficient", "fa3", "fa4", "sdpa")


def inputs(shape: tuple[int, ...], device: torch.device, few: bool) -> list[Tensor]:
    """Create the packed qkv, or queries of two tokens, and keys and values."""
    batch, tokens, heads, width = shape
    sizes = [(2, heads), (tokens, 2, heads)] if few else [(tokens, 3, heads)]
    return [torch.randn(batch, *s, width, device=device, dtype=torch.bfloat16).requires_grad_() for s in sizes]


def runnable(implementation: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, dict[str, harness.Call]]:
    """Return the calls of the implementations that run on this machine."""
    calls_by_impl = {}
    for impl in IMPLS:
        try:
            calls = passes(partial(implementation, *tensors, impl=impl), tensors)
            calls["backward"]()
            calls_by_impl[impl] = calls
        except (RuntimeError, TritonError, UserError) as error:
            print(f"{impl}: not measured, {' '.join(str(error).split())[:120]}")
    return calls_by_impl


def with_bias(impl: str, tensors: list[Tensor]) -> harness.Call:
    """Return a backward with the gradient of the projection's bias.

    In our kernel, or by another pass in torch.
    """
    bias = torch.zeros(tensors[0].shape[2:].numel(), device=tensors[0].device).requires_grad_()
    kernel = impl == "triton"
    out = attention(*tensors, qkv_bias=bias if kernel else None, impl=impl)
    upstream = torch.randn_like(out)

    def backward() -> object:
        if kernel:
            return torch.autograd.grad(out, [*tensors, bias], upstream, retain_graph=True)
        (gradient,) = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
        return gradient, gradient.sum((0, 1), dtype=torch.float32)

    return backward


def cases(device: torch.device, shapes: Sequence[tuple[int, ...]] | None = None) -> Iterable[harness.Case]:
    """Yield the cases of each shape, both passes.

    The first also with two query rows, and a backward with the bias's gradient.
    """
    shapes = shapes or SHAPES
    for shape, few in [(shape, False) for shape in shapes] + [(shapes[0], True)]:
        batch, tokens, heads, width = shape
        calls = runnable(attention_first if few else attention, inputs(shape, device, few))
        rows, token_bytes = 2 if few else tokens, 2 * batch * heads * width
        moved = {"forward": 2 * (tokens + rows), "backward": 4 * (tokens + rows)}
        for direction, products in (("forward", 2), ("backward", 5)):
            yield harness.Case(
                f"{direction} B={batch} N={tokens} H={heads} D={width}" + " M=2" * few,
                {impl: call[direction] for impl, call in calls.items()},
                baseline="cudnn" if "cudnn" in calls else "sdpa",
                useful_bytes=moved[direction] * token_bytes,
                useful_flops=2 * products * batch * heads * rows * tokens * width,
            )
    tensors = inputs(shapes[0], device, few=False)
    calls = {impl: with_bias(impl, tensors) for impl in runnable(attention, tensors)}
    baseline = "cudnn" if "cudnn" in calls else "sdpa"
    name = "bias backward B={} N={} H={} D={}".format(*shapes[0])
    yield harness.Case(name, calls, baseline, useful_bytes=8 * tensors[0].numel() * tensors[0].element_size() // 3)


if __name__ == "__main__":
    sys.exit(harness.main("attention", cases, __doc__, gpu_only=True))
