"""Residual stream of the student: drop path, and a branch's sum fused with the norm that follows."""
# B batch, S of its samples, N tokens, D width, E inputs of a branch's last linear map

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdeitlt.kernels._pick import pick
from fastdeitlt.models.layers import Linear

DROP_PATH_LAWS = ("bernoulli", "count")


class Kept(NamedTuple):
    """Samples of a batch that run a residual branch (drop path)."""

    scale_B11: Tensor
    """Factor on the branch: 0 or 1 / keep."""
    samples_S: Tensor | None = None
    """Indices of the samples that are computed; None = all, and those dropped are multiplied by 0."""


DropPath = tuple[Kept | None, Kept | None]
"""Drop path of a block's attention and MLP; None = all samples run it, unscaled."""


def draw_kept(x_BND: Tensor, drop: float, law: str) -> Kept | None:
    """Draw drop path of one branch with probability ``drop``; None if nothing is dropped.

    Law "bernoulli" (timm's): each sample is kept independently with probability 1 - drop and scaled by 1 / (1 - drop).
    Law "count": S = B - round(drop B) samples, at least one, are drawn without replacement and scaled by B / S; the
    others are not computed. Each is kept with probability S / B, but not independently. Both laws preserve the branch's
    expectation. Source: DINOv2 (arXiv 2304.07193) section 5.
    """
    batch = x_BND.shape[0]
    if law == "bernoulli" and drop:
        return Kept(x_BND.new_empty(batch, 1, 1).bernoulli_(1 - drop) / (1 - drop))
    num_kept = max(batch - round(drop * batch), 1)
    if num_kept == batch:
        return None
    samples_S = torch.rand(batch, device=x_BND.device).argsort()[:num_kept].sort().values
    return Kept(x_BND.new_full((batch, 1, 1), batch / num_kept), samples_S)


def join_kept(parts: Sequence[Kept | None], batch: int) -> Kept | None:
    """Concatenate the drop path of batches of ``batch`` samples each."""
    drawn = [part for part in parts if part is not None]
    if not drawn:
        return None
    scale_B11 = torch.cat([part.scale_B11 for part in drawn])
    samples = [part.samples_S + i * batch for i, part in enumerate(drawn) if part.samples_S is not None]
    return Kept(scale_B11, torch.cat(samples) if samples else None)


def add_norm(
    x_BND: Tensor,
    inner_SNE: Tensor,
    linear: Linear,
    kept: Kept | None,
    norm: nn.LayerNorm,
    next_kept: Kept | None,
    impl: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Add a residual branch to the stream x, then normalise the samples of the next branch.

    Args:
        x_BND: the stream.
        inner_SNE: the branch up to its last linear map.
        linear: that map.
        kept: samples of this branch.
        norm: applied to the sum.
        next_kept: samples of the next branch.
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
    x_BND: Tensor, inner_SNE: Tensor, linear: Linear, kept: Kept | None, norm: nn.LayerNorm, next_kept: Kept | None
) -> tuple[Tensor, Tensor]:
    """Compute ``add_norm`` by kernels/add_layernorm.py in one pass over the stream, without gather or scatter.

    The kernel also adds the linear map's bias and sums its gradient, otherwise another pass.
    """
    from fastdeitlt.kernels.add_layernorm import add_layernorm

    return add_layernorm(
        x_BND.contiguous(), linear.product(inner_SNE), norm.weight, norm.bias,
        None if kept is None else kept.scale_B11.flatten().float(), norm.eps, branch_bias=linear.bias,
        branch_samples_K=None if kept is None else kept.samples_S,
        normed_samples_K=None if next_kept is None else next_kept.samples_S, impl="triton",
    )  # fmt: skip


def select(x_BND: Tensor, kept: Kept | None) -> Tensor:
    """Return the samples of a branch."""
    return x_BND if kept is None or kept.samples_S is None else x_BND.index_select(0, kept.samples_S)
