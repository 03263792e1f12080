"""Residual add and LayerNorm, forward and backward: Triton kernel beside eager torch, inductor and Liger.

    python -m benchmarks.bench_add_layernorm [--rounds 20]

The stream is float32, branch and norm are bfloat16, as in training. Useful bytes an element forward: x 4, branch 2, sum
4, norm 2. Backward: gradients of sum 4 and norm 2, sum 4, dx 4, gradient of the branch 2.
Liger has no add, so its row adds with torch first; it is skipped if not installed. "count" leaves a tenth of the
samples out of the branch and of the norm: in torch by index_add and index_select, in the kernel in place.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fastdeitlt.kernels import add_layernorm as module
from torch import Tensor

from benchmarks import harness
from fastdeitlt.core.measure.timer import passes

# batch, tokens, width: ViT-T, -S, -B and -L
SHAPES = ((512, 198, 192), (256, 198, 384), (256, 198, 768), (128, 198, 1024))
KEEP = 0.9


def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scale, add and normalise in eager torch, like a block."""
    residual = x + branch * scale_B.to(branch.dtype)[:, None, None]
    return residual, F.layer_norm(residual, residual.shape[-1:], weight, bias, 1e-6).to(branch.dtype)


def liger(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale_B: Tensor) -> tuple[Tensor, Tensor]:
    """Add in torch and normalise by Liger."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    residual = x + branch * scale_B.to(branch.dtype)[:, None, None]
    return residual, LigerLayerNormFunction.apply(residual, weight, bias, 1e-6).to(branch.dtype)


def triton(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale_B: Tensor) -> tuple[Tensor, Tensor]:
    """Run our kernel."""
    return module.add_layernorm(x, branch, weight, bias, scale_B, impl="triton")


def count_eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Add and normalise in eager torch, with drop path that skips samples."""
    residual = x.index_add(0, samples, (branch / KEEP).to(x.dtype))
    normed = F.layer_norm(residual.index_select(0, samples), x.shape[-1:], weight, bias, 1e-6)
    return residual, normed.to(branch.dtype)


def count_triton(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Run our kernel with drop path that skips samples."""
    scale_B = x.new_full((len(x),), 1 / KEEP, dtype=torch.float32)
    chosen = {"branch_samples_K": samples, "normed_samples_K": samples}
    return module.add_layernorm(x, branch, weight, bias, scale_B, impl="triton", **chosen)


def problem(shape: tuple[int, int, int], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Create x, branch, weight, bias; and drop-path scales."""
    kinds = (torch.float32, torch.bfloat16)
    x, branch = (torch.randn(shape, device=device, dtype=kind).requires_grad_() for kind in kinds)
    weight, bias = (torch.randn(shape[-1], device=device).requires_grad_() for _ in range(2))
    return [x, branch, weight, bias], (torch.rand(shape[0], device=device) < KEEP).float() / KEEP


def cases(device: torch.device, shapes: Sequence[tuple[int, int, int]] | None = None) -> Iterable[harness.Case]:
    """Yield each width forward and backward, with drop path."""
    implementations = {"torch": eager, "inductor": torch.compile(eager, dynamic=False), "triton": triton}
    if harness.installed("liger_kernel"):
        implementations["liger"] = liger
    for shape in shapes or SHAPES:
        tensors, scale_B = problem(shape, device)
        calls = {name: passes(partial(peer, *tensors, scale_B), tensors) for name, peer in implementations.items()}
        useful = {"forward": 12 * tensors[0].numel(), "backward": 16 * tensors[0].numel()}
        yield from harness.pass_cases("{{}} B={} N={} D={}".format(*shape), calls, useful)
        yield from count_cases(shape, device)


def count_cases(shape: tuple[int, int, int], device: torch.device) -> Iterable[harness.Case]:
    """Yield sum and norm with a tenth of the samples skipped, forward and backward."""
    (x, branch, weight, bias), _ = problem(shape, device)
    samples = torch.arange(shape[0], device=device)[torch.arange(shape[0], device=device) % 10 > 0]
    tensors = [x, branch[: len(samples)].detach().requires_grad_(), weight, bias]
    peers = {"torch": count_eager, "inductor": torch.compile(count_eager, dynamic=False), "triton": count_triton}
    calls = {name: passes(partial(peer, *tensors, samples), tensors) for name, peer in peers.items()}
    full, kept = 4 * x.numel(), 2 * tensors[1].numel()
    # stream in and out, branch in, norm out; stream, both gradients in, its gradient out, branch gradient out
    useful = {"forward": 2 * full + 2 * kept, "backward": 3 * full + 2 * kept}
    yield from harness.pass_cases("count {{}} B={} N={} D={}".format(*shape), calls, useful)


if __name__ == "__main__":
    sys.exit(harness.main("add_layernorm", cases, __doc__, gpu_only=True))
