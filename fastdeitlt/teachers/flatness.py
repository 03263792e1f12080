"""Sharpness of the loss at a network's weights, and the rank of its features."""

# B batch, C channels, H height, W width, N images, D width of the features

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.run.progress import tracked
from fastdeitlt.teachers.sam import SAM

RADII = (0.01, 0.05, 0.1, 0.5)
"""Distances from the weights at which the loss is measured."""
CHUNK_PIXELS = 4 * 224 * 224
"""Pixels per graph: second derivatives need 4 kB (ResNet-8) to 8 kB (ResNet-50) per pixel."""
HESSIAN_IMAGES = 128
"""Images, evenly spaced, for the Hessian's eigenvalue; a product costs several gradients."""
HESSIAN_PASSES = 20
TOLERANCE = 1e-3
"""Relative change of the eigenvalue at which the power iteration ends, as in PyHessian."""


def sharpness(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """Measure the sharpness of a batch's cross-entropy around the weights.

    The network is set to eval mode, so images are independent and the batch is computed in chunks of ``CHUNK_PIXELS``
    to bound memory. Its weights are restored.

    Returns:
        ``loss``, ``gap`` {radius: rise of the loss at w + radius g / |g|}, ``top_eigenvalue`` of the Hessian of up to
        ``HESSIAN_IMAGES`` of the images, by power iteration.

    Source: Foret et al. 2021 (arXiv 2010.01412), section 3 and figure 3; Yao et al. 2020 (PyHessian, arXiv 1912.07145).
    """
    network.eval()
    parameters = list(network.parameters())
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def share_of_loss(images_BCHW: Tensor, labels_B: Tensor, num_images: int) -> Tensor:
        return F.cross_entropy(scale * network(images_BCHW).float(), labels_B, reduction="sum") / num_images

    def terms_of(images_BCHW: Tensor, labels_B: Tensor) -> list[Callable[[], Tensor]]:
        size = max(CHUNK_PIXELS // images_BCHW[0, 0].numel(), 1)
        chunks = zip(images_BCHW.split(size), labels_B.split(size), strict=True)
        return [partial(share_of_loss, *chunk, len(images_BCHW)) for chunk in chunks]

    terms = terms_of(images_BCHW, labels_B)

    @torch.no_grad()
    def loss() -> float:
        return sum(term().item() for term in terms)

    here = loss()
    gap = {}
    sam = SAM(parameters, torch.optim.SGD, lr=0.0)
    for term in tracked(terms, "sharpness: gradient", len(terms)):
        term().backward()
    for radius in tracked(RADII, "sharpness: loss around the weights", len(RADII)):
        sam.set_rho(radius)
        sam.first_step(zero_grad=False)
        gap[f"{radius:g}"] = loss() - here
        sam.restore()
    network.zero_grad()
    every = -(-len(images_BCHW) // HESSIAN_IMAGES)
    eigenvalue = top_eigenvalue(terms_of(images_BCHW[::every], labels_B[::every]), parameters)
    for parameter, was in zip(parameters, trained, strict=True):
        parameter.requires_grad_(was)
    return {"loss": here, "gap": gap, "top_eigenvalue": eigenvalue}


def top_eigenvalue(
    terms: Sequence[Callable[[], Tensor]],
    parameters: list[nn.Parameter],
    iterations: int = HESSIAN_PASSES,
    tolerance: float = TOLERANCE,
) -> float:
    """Return the Hessian's eigenvalue of largest magnitude, by power iteration.

    The loss is the sum of ``terms``, with one graph in memory at a time. The iteration ends at a relative change below
    ``tolerance``.
    """
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
    value = 0.0
    for _ in tracked(range(iterations), "sharpness: Hessian", iterations):
        norm = torch.linalg.vector_norm(torch.stack([v.norm() for v in vector])).clamp(min=1e-30)
        vector = [v / norm for v in vector]
        product = [torch.zeros_like(v) for v in vector]
        for term in terms:
            torch._foreach_add_(product, _hessian_product(term, parameters, vector))
        before, value = value, sum((v * h).sum().item() for v, h in zip(vector, product, strict=True))
        vector = product
        if abs(value - before) < tolerance * abs(value):
            break
    return value


def _hessian_product(
    loss: Callable[[], Tensor], parameters: list[nn.Parameter], vector: list[Tensor]
) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(loss(), parameters, create_graph=True)
    return torch.autograd.grad(grads, parameters, vector)


def feature_rank(features_ND: Tensor, centring: str = "sample", share: float = 0.99) -> int:
    """Return the number of singular values with ``share`` of the features' energy.

    ``sample`` subtracts each row's mean over features, as tml-epfl/sam-low-rank-features; ``feature`` subtracts each
    column's mean over samples, as PCA.
    """
    features_ND = features_ND.double()
    centred_ND = features_ND - features_ND.mean(1 if centring == "sample" else 0, keepdim=True)
    energy = torch.linalg.svdvals(centred_ND).square().cumsum(0)
    return int((energy <= share * energy[-1]).sum()) + 1
