"""Attention of a student: weights, mean distance and rollout.

Training and evaluation do not store attention weights; hooks recompute them here from queries and keys.
"""

# B images, H heads, N tokens (CLS, DIST, then P patches row by row), L blocks, E width of a head

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastdeitlt.models.vit import NUM_PREFIX, DistilledViT


@contextmanager
def attention_weights(student: DistilledViT) -> Iterator[list[Tensor]]:
    """Yield a list that each eval pass fills with weights_BHNN, float32, by block.

    Rows are queries; a row sums to 1.
    """
    caught: list[Tensor] = []

    def start(*_: object) -> None:
        caught.clear()

    def catch(heads: int) -> object:
        def hook(_module: object, _inputs: object, qkv_BNC: Tensor) -> None:
            q_BHNE, k_BHNE, _ = qkv_BNC.float().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scores_BHNN = q_BHNE @ k_BHNE.transpose(-1, -2) / q_BHNE.shape[-1] ** 0.5
            caught.append(scores_BHNN.softmax(-1))

        return hook

    hooks = [student.patch_embed.register_forward_pre_hook(start)]
    for block in student.blocks:
        attention = block.get_submodule("attn")
        hooks.append(attention.get_submodule("qkv").register_forward_hook(catch(attention.heads)))  # type: ignore
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def patch_distances(side: int, patch: int) -> Tensor:
    """Return distances in pixels between patch centres, float32 [P, P], P = side^2."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    return patch * torch.cdist(place.float(), place.float(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(weights_BHNN: Tensor, patch: int) -> Tensor:
    """Return each image's and head's mean attention distance in pixels, [B, H].

    For each patch, the attention-weighted distance to every patch (CLS and DIST columns dropped, the rest normalised to
    sum 1), averaged over patches. Uniform attention has 116.5 px on 14 x 14 patches of 16 px. Source: Dosovitskiy et
    al. 2021 (arXiv 2010.11929), appendix D.7, which does not specify the treatment of prefix tokens.
    """
    to_patches_BHPP = weights_BHNN[:, :, NUM_PREFIX:, NUM_PREFIX:]
    side = round(to_patches_BHPP.shape[-1] ** 0.5)
    distance_PP = patch_distances(side, patch).to(weights_BHNN.device)
    share_BHPP = to_patches_BHPP / to_patches_BHPP.sum(-1, keepdim=True)
    return (share_BHPP * distance_PP).sum(-1).mean(-1)


def rollout(weights_LBHNN: list[Tensor]) -> Tensor:
    """Return attention rollouts from CLS and DIST to the patches, [B, 2, P], sum 1.

    The product over blocks of half the mean over heads plus half the identity, for the residual connection.
    Source: Abnar and Zuidema 2020 (arXiv 2005.00928), section 3.
    """
    flow_BMN: Tensor | None = None
    for weights_BHNN in reversed(weights_LBHNN):
        identity_NN = torch.eye(weights_BHNN.shape[-1], device=weights_BHNN.device)
        step_BNN = (weights_BHNN.mean(1) + identity_NN) / 2
        flow_BMN = step_BNN[:, :NUM_PREFIX] if flow_BMN is None else flow_BMN @ step_BNN
    assert flow_BMN is not None
    return _scaled(flow_BMN[..., NUM_PREFIX:])


def last_maps(weights_LBHNN: list[Tensor]) -> Tensor:
    """Return the last block's attention of CLS and DIST to patches, [B, 2, P], sum 1."""
    return _scaled(weights_LBHNN[-1].mean(1)[:, :NUM_PREFIX, NUM_PREFIX:])


def spread(maps_BMP: Tensor) -> Tensor:
    """Return each map's normalised entropy, [B, M]: 1 if uniform, 0 on one patch."""
    entropy_BM = -(maps_BMP * maps_BMP.clamp_min(1e-12).log()).sum(-1)
    return entropy_BM / torch.log(torch.tensor(float(maps_BMP.shape[-1])))


def _scaled(maps_BMP: Tensor) -> Tensor:
    return maps_BMP / maps_BMP.sum(-1, keepdim=True)
