"""How flat a network is at its weights, and how many dimensions its features use."""

# B batch, C channels, H height, W width, N images, D width of the features

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt.teachers.sam import SAM

RADII = (0.01, 0.05, 0.1, 0.5)
"""Distances from the weights at which the loss is measured."""


def sharpness(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """How steeply the cross-entropy of a batch rises around the weights.

    Returns:
        ``loss``, ``gap`` {radius: rise of the loss at w + radius g / |g|}, ``top_eigenvalue`` of the Hessian by power
        iteration. The network is in eval mode and its weights are left as they were.

    Source: Foret et al. 2021 (arXiv 2010.01412), section 3 and figure 3; Yao et al. 2020 (PyHessian, arXiv 1912.07145).
    """
    network.eval()
    parameters = list(network.parameters())
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss() -> Tensor:
        return F.cross_entropy(scale * network(images_BCHW).float(), labels_B)

    here = loss().item()
    gap = {}
    sam = SAM(parameters, torch.optim.SGD, lr=0.0)
    for radius in RADII:
        sam.set_rho(radius)
        loss().backward()
        sam.first_step()
        with torch.no_grad():
            gap[f"{radius:g}"] = loss().item() - here
        sam.restore()
    eigenvalue = top_eigenvalue(loss, parameters)
    for parameter, was in zip(parameters, trained, strict=True):
        parameter.requires_grad_(was)
    return {"loss": here, "gap": gap, "top_eigenvalue": eigenvalue}


def top_eigenvalue(loss: Callable[[], Tensor], parameters: list[nn.Parameter], iterations: int = 20) -> float:
    """The Hessian's eigenvalue of largest magnitude, by power iteration on Hessian-vector products."""
    grads = torch.autograd.grad(loss(), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
    value = torch.zeros(())
    for _ in range(iterations):
        norm = torch.linalg.vector_norm(torch.stack([v.norm() for v in vector])).clamp(min=1e-30)
        vector = [v / norm for v in vector]
        product = torch.autograd.grad(grads, parameters, vector, retain_graph=True)
        value = torch.stack([(v * h).sum() for v, h in zip(vector, product, strict=True)]).sum()
        vector = list(product)
    return value.item()


def feature_rank(features_ND: Tensor, centring: str = "sample", share: float = 0.99) -> int:
    """Number of singular values that hold ``share`` of the features' energy.

    ``sample`` subtracts each row's mean over features, as tml-epfl/sam-low-rank-features does; ``feature`` each
    column's mean over samples, as PCA.
    """
    features_ND = features_ND.double()
    centred_ND = features_ND - features_ND.mean(1 if centring == "sample" else 0, keepdim=True)
    energy = torch.linalg.svdvals(centred_ND).square().cumsum(0)
    return int((energy <= share * energy[-1]).sum()) + 1
