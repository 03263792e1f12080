"""Residual stream of the student: drop path, and a branch's sum fused with the norm that follows."""
# B batch, S of its samples, N tokens, D width, E inputs of a branch's last linear map

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdeitlt.kernels._pick import pick
from fastdeitlt.models.layers import Linear

DROP_PATH_LAWS = ("bernoulli", "count")


class BranchSamples(NamedTuple):
    """Samples of a batch that run a residual branch (drop path)."""

    scale_B11: Tensor
    """Factor on the branch: 0 or 1 / keep."""
    samples_S: Tensor | None = None
    """Indices of the samples that are computed; None = all, and those dropped are multiplied by 0."""


DropPath = tuple[BranchSamples | None, BranchSamples | None]
"""Drop path of a block's attention and MLP; None = all samples run it, unscaled."""


def draw_samples(x_BND: Tensor, drop: float, law: str) -> BranchSamples | None:
    """Draw drop path of one branch with probability ``drop``.

    None if nothing is dropped.

    Law "bernoulli" (timm's): each sample is kept independently with probability 1 - drop and scaled by 1 / (1 - drop).
    Law "count": S = B - round(drop B) samples, at least one, are drawn without replacement and scaled by B / S; the
    others are not computed. Each is kept with probability S / B, but not independently. Both laws preserve the branch's
    expectation. Source: DINOv2 (arXiv 2304.07193) section 5.
    """
    batch = x_BND.shape[0]
    if law == "bernoulli" and drop:
        return BranchSamples(x_BND.new_empty(batch, 1, 1).bernoulli_(1 - drop) / (1 - drop))
    num_samples = max(batch - round(drop * batch), 1)
    if num_samples == batch:
        return None
    samples_S = torch.rand(batch, device=x_BND.device).argsort()[:num_samples].sort().values
    return BranchSamples(x_BND.new_full((batch, 1, 1), batch / num_samples), samples_S)


def join_samples(parts: Sequence[BranchSamples | None], batch: int) -> BranchSamples | None:
    """Concatenate the drop path of batches of ``batch`` samples each."""
    drawn = [part for part in parts if part is not None]
    if not drawn:
        return None
    scale_B11 = torch.cat([part.scale_B11 for part in drawn])
    indices = [part.samples_S + i * batch for i, part in enumerate(drawn) if part.samples_S is not None]
    return BranchSamples(scale_B11, torch.cat(indices) if indices else None)


def add_norm(
    x_BND: Tensor,
    inner_SNE: Tensor,
    linear: Linear,
    samples: BranchSamples | None,
    norm: nn.LayerNorm,
    next_samples: BranchSamples | None,
    impl: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Add a residual branch to the stream x, then normalise it.

    Only the samples of the next branch are normalised.

    Args:
        x_BND: the stream.
        inner_SNE: the branch up to its last linear map.
        linear: that map.
        samples: samples of this branch.
        norm: applied to the sum.
        next_samples: samples of the next branch.
        impl: see ``kernels._pick``.

    Returns:
        (sum, its norm).
    """
    if pick("add_layernorm", impl, (x_BND.shape[-1],), x_BND.device) == "triton":
        from fastdeitlt.kernels.add_layernorm import add_layernorm  # Triton is slow to import

        # one pass without gather or scatter, which also adds the linear map's bias and sums its gradient
        return add_layernorm(
            x_BND.contiguous(), linear.product(inner_SNE), norm.weight, norm.bias,
            None if samples is None else samples.scale_B11.flatten().float(), norm.eps, branch_bias=linear.bias,
            branch_samples_K=None if samples is None else samples.samples_S,
            normed_samples_K=None if next_samples is None else next_samples.samples_S, impl="triton",
        )  # fmt: skip
    branch_SND = linear(inner_SNE)
    if samples is None:
        x_BND = x_BND + branch_SND
    elif samples.samples_S is None:
        x_BND = x_BND + branch_SND * samples.scale_B11
    else:
        scaled_SND = branch_SND * samples.scale_B11[: len(branch_SND)]
        x_BND = x_BND.index_add(0, samples.samples_S, scaled_SND.to(x_BND.dtype))
    return x_BND, norm(select(x_BND, next_samples))


def select(x_BND: Tensor, samples: BranchSamples | None) -> Tensor:
    """Return the samples of a branch."""
    return x_BND if samples is None or samples.samples_S is None else x_BND.index_select(0, samples.samples_S)
