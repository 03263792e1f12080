"""Joint loss with both gradients: ours beside eager torch, inductor and the official formulation.

    python -m benchmarks.bench_joint_loss [--rounds 20]

Forward and backward of a mixed, DRW-weighted batch in bfloat16 (float32 on a CPU). Useful bytes: three logits read, two
gradients written. Small batches stay in L2, as in training after the heads' products.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from fastdeitlt.core.loss import joint_loss

SHAPES = ((256, 10), (256, 100), (256, 1000), (1024, 1000), (256, 8142), (1024, 8142), (256, 21841))


def official(
    cls_logits: Tensor, dist_logits: Tensor, labels: Tensor, teacher_logits: Tensor, weights: Tensor, class_map: Tensor
) -> Tensor:
    """Compute DeiT-LT's loss: a dense mixed target, the class map on the host."""
    num_classes = cls_logits.size(1)
    own, other = (F.one_hot(y, num_classes) * 0.9 + 0.1 / num_classes for y in (labels, labels.flip(0)))
    target = 0.3 * own + 0.7 * other
    cls_loss = torch.sum(-target * F.log_softmax(cls_logits.float(), dim=-1), dim=-1).mean()
    decision = class_map.cpu()[teacher_logits.argmax(1).cpu()].to(labels.device)
    return 0.5 * cls_loss + 0.5 * F.cross_entropy(dist_logits.float(), decision, weight=weights)


def cases(device: torch.device, shapes: Sequence[tuple[int, int]] | None = None) -> Iterable[harness.Case]:
    """Yield one case per shape; on a CPU three small ones, without Triton."""
    gpu = device.type == "cuda"
    compiled = torch.compile(joint_loss, dynamic=False)
    for batch, num_classes in shapes or (SHAPES if gpu else SHAPES[:3]):
        kind = torch.bfloat16 if gpu else torch.float32
        heads = [torch.randn(batch, num_classes, device=device, dtype=kind).requires_grad_() for _ in range(2)]
        teacher = torch.randn(batch, num_classes, device=device, dtype=kind)
        labels = torch.randint(0, num_classes, (batch,), device=device)
        weights = torch.rand(num_classes, device=device) + 0.1
        class_map = torch.randperm(num_classes, device=device)
        mixed = {"partner": labels.flip(0), "lam": torch.tensor(0.3, device=device), "smoothing": 0.1}
        options = {**mixed, "weights": weights, "class_map": class_map}

        candidates = {
            "official": _both_passes(official, heads, labels, teacher, weights, class_map),
            "torch": _both_passes(joint_loss, heads, labels, teacher, impl="torch", **options),
            "inductor": _both_passes(compiled, heads, labels, teacher, impl="torch", **options),
        }
        if gpu:
            candidates["triton"] = _both_passes(joint_loss, heads, labels, teacher, impl="triton", **options)
        yield harness.Case(
            f"B={batch} K={num_classes} {str(kind).removeprefix('torch.')}",
            candidates,
            baseline="inductor",
            useful_bytes=5 * batch * num_classes * heads[0].element_size(),
            eager=frozenset({"official"}),
        )


def _both_passes(loss: Callable[..., Any], heads: list[Tensor], *arguments: Tensor, **options: Any) -> harness.Call:
    def call() -> tuple[Tensor, ...]:
        result = loss(*heads, *arguments, **options)
        return torch.autograd.grad(result if isinstance(result, Tensor) else result.loss, heads)

    return call


if __name__ == "__main__":
    sys.exit(harness.main("joint_loss", cases, __doc__))
