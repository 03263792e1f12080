"""Token features of a student by block: rank, CLS-DIST cosine, patch cosine."""

# B images, N tokens, D width, L blocks, P patches

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeitlt.models.vit import NUM_PREFIX, DistilledViT
from fastdeitlt.teachers.flatness import feature_rank

CENTRINGS = ("sample", "feature")


class Tokens:
    """CLS, DIST and patch similarity after each block; filled by ``watch_tokens``."""

    def __init__(self, num_blocks: int) -> None:
        self.prefix: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        """Block -> [B, 2, D] of each batch, on the CPU."""
        self.patch_similarity: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        """Block -> [B] of each batch: mean cosine of two different patches of an image."""

    def add(self, block: int, x_BND: Tensor) -> None:
        """Record the residual stream after a block."""
        self.prefix[block].append(x_BND[:, :NUM_PREFIX].float().cpu())
        self.patch_similarity[block].append(patch_similarity(x_BND[:, NUM_PREFIX:].float()).cpu())

    def ranks(self) -> dict[str, dict[str, list[int]]]:
        """Return token -> centring -> rank by block; see ``feature_rank``."""
        whole = [torch.cat(parts) for parts in self.prefix]
        return {
            name: {centring: [feature_rank(x_B2D[:, token], centring) for x_B2D in whole] for centring in CENTRINGS}
            for token, name in enumerate(("CLS", "DIST"))
        }

    def cosines(self) -> list[float]:
        """Return the mean cosine of CLS and DIST after each block, before any norm."""
        whole = [torch.cat(parts) for parts in self.prefix]
        return [float(F.cosine_similarity(x_B2D[:, 0], x_B2D[:, 1], dim=1).mean()) for x_B2D in whole]

    def patch_similarities(self) -> list[float]:
        """Return the mean cosine of an image's patches by block; near 1: equal patches."""
        return [float(torch.cat(parts).mean()) for parts in self.patch_similarity]


def patch_similarity(x_BPD: Tensor) -> Tensor:
    """Return the mean cosine of two patches of each image, [B]; NaN for one patch."""
    patches = x_BPD.shape[1]
    total_B = F.normalize(x_BPD, dim=-1).sum(1).square().sum(-1)  # all pairs, including each patch with itself
    return (total_B - patches) / (patches * (patches - 1)) if patches > 1 else torch.full_like(total_B, torch.nan)


@contextmanager
def watch_tokens(student: DistilledViT) -> Iterator[Tokens]:
    """Yield ``Tokens`` to which every eval forward pass of the student adds."""
    tokens = Tokens(len(student.blocks))

    def catch(index: int) -> object:
        def hook(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            tokens.add(index, output[0])

        return hook

    hooks = [block.register_forward_hook(catch(index)) for index, block in enumerate(student.blocks)]  # type: ignore
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()
