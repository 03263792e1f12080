"""PaCo: contrastive learning with class centres, momentum encoder and key queue."""

# B batch, C channels, H height, W width, K classes, F features, D width of the projection, Q queue

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeitlt import distributed
from fastdeitlt.config import TeacherTrainingConfig
from fastdeitlt.models.teacher import Paco
from fastdeitlt.teachers.losses import paco_loss


class PacoObjective(nn.Module):
    """Queries of one view against keys of the other, the queue and class centres.

    A query is compared with the queries and keys of its part of the batch and with the queue, which stores the keys
    of all parts and ranks. The reference's shuffle of keys between GPUs is not implemented. With SAM both passes use
    the same keys and queue; the momentum encoder and the queue are updated once per step.

    Args:
        paco: encoders, heads and queue.
        counts_K: training images of each class, on the device.
        cfg: alpha, beta, gamma, temperature, momentum.

    Source: Cui et al. 2021 (arXiv 2107.12028), section 3; PaCo/LT/moco/builder.py.
    """

    def __init__(self, paco: Paco, counts_K: Tensor, cfg: TeacherTrainingConfig) -> None:
        super().__init__()
        self.network, self.cfg, self.counts_K = paco, cfg, counts_K
        queries = (*paco.encoder_q.parameters(), *paco.linear.parameters())
        keys = (*paco.encoder_k.parameters(), *paco.linear_k.parameters())
        self._pairs = list(zip(keys, queries, strict=True))

    @torch.no_grad()
    def begin(self) -> None:
        """Update the key encoder towards the query encoder."""
        keys, queries = zip(*self._pairs, strict=True)
        torch._foreach_lerp_([k.data for k in keys], [q.data for q in queries], 1 - self.cfg.paco_momentum)

    @torch.no_grad()
    def prepare(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the unit keys_BD of the second view."""
        return (self._project(self.network.encoder_k, views[1])[0],)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, weights_K: Tensor | None, *shared: Tensor) -> Tensor:
        """Return the loss; ``weights_K`` is ignored: the centres' prior re-balances."""
        c, paco, (keys_BD,) = self.cfg, self.network, shared
        queries_BD, features_BF = self._project(paco.encoder_q, images_BCHW)
        features = torch.cat((queries_BD, keys_BD, paco.queue))
        labels = torch.cat((labels_B, labels_B, paco.queue_l))
        logits_BK = paco.linear(features_BF)
        return paco_loss(
            features,
            labels,
            logits_BK,
            self.counts_K,
            c.paco_alpha,
            c.paco_beta,
            c.paco_gamma,
            c.paco_temperature,
            len(paco.queue),
        )

    def share(self, labels_B: Tensor, whole_B: Tensor, weights_K: Tensor | None) -> float:
        """Return a part's share of the batch, by images."""
        return len(labels_B) / len(whole_B)

    @torch.no_grad()
    def finish(self, whole_B: Tensor, shared: Sequence[tuple[Tensor, ...]]) -> None:
        """Replace the oldest keys in the queue with the keys of all ranks."""
        paco, size = self.network, len(whole_B)
        keys_BD = distributed.gather_split(torch.cat([keys_BD for (keys_BD,) in shared]), size)
        place_B = (paco.queue_ptr + torch.arange(size, device=keys_BD.device)) % len(paco.queue)
        paco.queue.index_copy_(0, place_B, keys_BD)
        paco.queue_l.index_copy_(0, place_B, whole_B)
        paco.queue_ptr.add_(size).remainder_(len(paco.queue))

    @staticmethod
    def _project(encoder: Any, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return (unit projection [B, D] in float32, pooled features [B, F])."""
        maps = encoder.forward_features(images_BCHW)
        features_BF = encoder.forward_head(maps, pre_logits=True)
        return F.normalize(encoder.fc(features_BF).float(), dim=1), features_BF
