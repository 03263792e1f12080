"""The student's residual stream: drop path, and the sum of a branch with the norm that reads it as one operation."""
# B batch, S of its samples, N tokens, D width, E inputs of a branch's last linear map

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.kernels._pick import pick

DROP_PATH_LAWS = ("bernoulli", "count")


class Kept(NamedTuple):
    """Which samples of a batch run a residual branch (drop path)."""

    scale_B11: Tensor
    """Factor on the branch: 0 or 1 / keep."""
    samples_S: Tensor | None = None
    """The samples that run at all; None = all do, and those dropped are multiplied by 0."""


def draw_kept(x_BND: Tensor, drop: float, law: str) -> Kept | None:
    """Drop path of one branch at the probability ``drop``; None where it drops nothing.

    Law "bernoulli" (timm's): each sample is kept on its own with probability 1 - drop and scaled by 1 / (1 - drop).
    Law "count": S = B - round(drop B) samples, at least one, are drawn without replacement and scaled by B / S; the
    others are never computed. Each sample is kept with probability S / B, and in both laws the branch's expectation is
    the branch, but here the draws of a batch depend on each other. Source: DINOv2 (arXiv 2304.07193) section 5.
    """
    batch = x_BND.shape[0]
    if law == "bernoulli" and drop:
        return Kept(x_BND.new_empty(batch, 1, 1).bernoulli_(1 - drop) / (1 - drop))
    num_kept = max(batch - round(drop * batch), 1)
    if num_kept == batch:
        return None
    samples_S = torch.rand(batch, device=x_BND.device).argsort()[:num_kept].sort().values
    return Kept(x_BND.new_full((batch, 1, 1), batch / num_kept), samples_S)


def add_norm(
    x_BND: Tensor,
    inner_SNE: Tensor,
    linear: nn.Linear,
    kept: Kept | None,
    norm: nn.LayerNorm,
    next_kept: Kept | None,
    impl: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Add a residual branch to the stream x, then norm the samples that the next branch runs.

    Args:
        x_BND: the stream.
        inner_SNE: the branch up to its last linear map.
        linear: that map.
        kept: samples that have the branch.
        norm: applied to the sum.
        next_kept: samples that the next branch runs.
        impl: see ``kernels._pick``.

    Returns:
        (sum, its norm).
    """
    if pick("add_layernorm", impl, (x_BND.shape[-1],), x_BND.device) == "triton":
        return _add_norm_kernel(x_BND, inner_SNE, linear, kept, norm, next_kept)
    branch_SND = linear(inner_SNE)
    if kept is None:
        x_BND = x_BND + branch_SND
    elif kept.samples_S is None:
        x_BND = x_BND + branch_SND * kept.scale_B11
    else:
        scaled_SND = branch_SND * kept.scale_B11[: len(branch_SND)]
        x_BND = x_BND.index_add(0, kept.samples_S, scaled_SND.to(x_BND.dtype))
    return x_BND, norm(select(x_BND, next_kept))


def _add_norm_kernel(
    x_BND: Tensor, inner_SNE: Tensor, linear: nn.Linear, kept: Kept | None, norm: nn.LayerNorm, next_kept: Kept | None
) -> tuple[Tensor, Tensor]:
    """``add_norm`` through kernels/add_layernorm.py: one pass over the stream, nothing gathered or scattered.

    The kernel adds the linear map's bias and sums its gradient, which would be another pass over the branch's.
    """
    from fastdeitlt.kernels.add_layernorm import add_layernorm

    return add_layernorm(
        x_BND.contiguous(), F.linear(inner_SNE, linear.weight), norm.weight, norm.bias,
        None if kept is None else kept.scale_B11.flatten().float(), norm.eps, branch_bias=linear.bias,
        branch_samples_K=None if kept is None else kept.samples_S,
        normed_samples_K=None if next_kept is None else next_kept.samples_S, impl="triton",
    )  # fmt: skip


def select(x_BND: Tensor, kept: Kept | None) -> Tensor:
    """The samples that a branch runs."""
    return x_BND if kept is None or kept.samples_S is None else x_BND.index_select(0, kept.samples_S)
