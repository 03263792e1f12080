"""AdamW + clip + EMA over a DeiT-B's weights: one pass beside torch's fused and foreach steps, and apex if installed.

    python -m benchmarks.bench_adamw_ema [--rounds 20]

Useful bytes: weights, two moments and the average in and out, gradients in: 36 a weight (the clip coefficient is an
input; no candidate computes the norm). Buffers are far larger than L2.
"""

import sys
from collections.abc import Iterable, Sequence

import torch
from fastdeitlt.kernels.adamw_ema import adamw_ema
from torch import Tensor, nn

from benchmarks import harness

WIDTH, DEPTH, DECAY = 768, 12, 0.99996
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8}


def parameters(device: torch.device, depth: int) -> list[nn.Parameter]:
    """Create parameters of a distilled ViT-B/16 of 1,000 classes, random gradients."""
    block = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,)]
    block += [(WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,)]
    shapes = block * depth + [(WIDTH, 3, 16, 16), (1, 198, WIDTH), (1000, WIDTH), (1000, WIDTH)]
    result = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in result:
        parameter.grad = torch.randn_like(parameter)
    return result


def torch_step(parameters: list[nn.Parameter], averages: list[Tensor], scale: Tensor, kind: str) -> harness.Call:
    """Return a step of three multi-tensor passes: gradient scale, AdamW, average."""
    options = {"capturable": scale.is_cuda, "foreach": kind == "foreach", "fused": kind == "fused"}
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, **options)  # type: ignore[arg-type]
    grads = [p.grad for p in parameters if p.grad is not None]

    def step() -> None:
        torch._foreach_mul_(grads, scale)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.data for p in parameters], 1 - DECAY)

    return step


def cases(device: torch.device, depths: Sequence[int] | None = None) -> Iterable[harness.Case]:
    """Yield one case per depth.

    DeiT-B on a GPU; two blocks on a CPU, where ours is the op's torch reference.
    """
    for depth in ((DEPTH if device.type == "cuda" else 2),) if depths is None else depths:
        yield _case(device, depth)


def _case(device: torch.device, depth: int) -> harness.Case:
    weights = parameters(device, depth)
    size = sum(p.numel() for p in weights)
    one = torch.ones((), device=device)
    averages = [p.detach().clone() for p in weights]
    names = ("weights", "grads", "exp_avg", "exp_avg_sq", "ema")
    flat = {name: torch.randn(size, device=device) for name in names}
    flat["exp_avg_sq"].square_()
    clock = {"lr": one * 1e-3, "step": one * 7, "num_decayed": size * 99 // 100, "weight_decay": 0.05, **SETTINGS}

    candidates = {kind: torch_step(weights, averages, one, kind) for kind in ("foreach", "fused")}
    candidates["fastdeitlt"] = lambda: adamw_ema(**flat, **clock, scale=one, ema_decay=DECAY)
    if harness.installed("amp_C"):
        from apex.optimizers import FusedAdam

        apex = FusedAdam(weights, lr=1e-3, weight_decay=0.05, adam_w_mode=True, capturable=True)
        candidates["apex, no EMA"] = apex.step
    return harness.Case(f"{size / 1e6:.1f} M weights float32", candidates, baseline="fused", useful_bytes=36 * size)


if __name__ == "__main__":
    sys.exit(harness.main("adamw_ema", cases, __doc__))
