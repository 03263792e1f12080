"""Teacher losses: long-tailed cross-entropies and PaCo.

All compute in float32 under autocast, without a host sync if ``counts`` are on the device. The cross-entropies are
plain cross-entropy at equal counts and neutral parameters; there a class without training images has the count of the
rarest other class.
"""

# B batch, K classes, N features (2 B of the batch and Q of the queue), Q queue, D width

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeitlt.config import TeacherTrainingConfig
from fastdeitlt.models.classifier import linear_float32

Counts = Sequence[int] | np.ndarray | Tensor
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _counts(counts: Counts, device: torch.device) -> Tensor:
    counts_K = torch.as_tensor(counts, device=device).float()
    rarest = torch.where(counts_K > 0, counts_K, torch.inf).min()
    return counts_K.clamp(min=rarest)


def ldam_margins(counts: Counts, max_m: float = 0.5, device: torch.device | str = "cpu") -> Tensor:
    """Return margins [K] proportional to n^(-1/4), with maximum ``max_m``.

    Source: Cao et al. 2019 (arXiv 1906.07413), equation 13; kaidic/LDAM-DRW losses.py.
    """
    margins_K = _counts(counts, torch.device(device)).rsqrt().sqrt()
    return margins_K * (max_m / margins_K.max())


def ldam_loss(
    logits: Tensor, labels: Tensor, counts: Counts, max_m: float = 0.5, s: float = 30.0, weights: Tensor | None = None
) -> Tensor:
    """Compute the label-distribution-aware margin loss (LDAM).

    Args:
        logits: [B, K] cosines of a normed head.
        labels: [B] int64.
        counts: [K] training images of each class.
        max_m: margin of the rarest class.
        s: scale of the logits.
        weights: [K] class weights (DRW) or None; the sum is divided by the sum of the labels' weights.

    Source: Cao et al. 2019 (arXiv 1906.07413), equation 13; kaidic/LDAM-DRW losses.py.
    """
    margins_B = ldam_margins(counts, max_m, logits.device)[labels]
    adjusted_BK = logits.float().scatter_add(1, labels[:, None], -margins_B[:, None])
    return F.cross_entropy(s * adjusted_BK, labels, weights)


def cb_focal_loss(logits: Tensor, labels: Tensor, gamma: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Compute class-balanced focal loss, mean of w_y (1 - p_y)^gamma (-log p_y).

    p is the softmax, ``weights`` [K] are effective-number weights. kaidic/LDAM-DRW uses p = exp(w_y log p_y), which is
    equal at weight 1; this is the papers' definition.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 4; Cui et al. 2019 (arXiv 1901.05555), equation 13.
    """
    nll_B = F.cross_entropy(logits.float(), labels, reduction="none")
    focal_B = (-torch.expm1(-nll_B)).clamp(min=1e-12) ** gamma * nll_B
    return (focal_B if weights is None else focal_B * weights[labels]).mean()


def vs_loss(
    logits: Tensor,
    labels: Tensor,
    counts: Counts,
    tau: float = 1.0,
    gamma: float = 0.15,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of logits (n / n_max)^gamma + tau log(prior).

    Source: Kini et al. 2021 (arXiv 2103.01550), equation 4; val-iisc/Saddle-LongTail losses.py.
    """
    counts_K = _counts(counts, logits.device)
    adjusted_BK = logits.float() * (counts_K / counts_K.max()) ** gamma + tau * (counts_K / counts_K.sum()).log()
    return F.cross_entropy(adjusted_BK, labels, weights)


def logit_adjustment_loss(
    logits: Tensor, labels: Tensor, counts: Counts, tau: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Compute the logit-adjusted cross-entropy, of logits + tau log(prior).

    Source: Menon et al. 2021 (arXiv 2007.07314), equation 10.
    """
    return vs_loss(logits, labels, counts, tau, 0.0, weights)


def balanced_softmax_loss(logits: Tensor, labels: Tensor, counts: Counts, weights: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy of logits + log(count): logit adjustment at tau = 1.

    Source: Ren et al. 2020 (arXiv 2007.10740), equation 4.
    """
    return vs_loss(logits, labels, counts, 1.0, 0.0, weights)


def paco_loss(
    features: Tensor,
    labels: Tensor,
    sup_logits: Tensor,
    counts: Counts,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float,
    queue_size: int,
) -> Tensor:
    """Compute PaCo's loss of queries against centres (adjusted logits) and features.

    Args:
        features: [2 B + Q, D] unit queries, unit keys, queue, in that order.
        labels: [2 B + Q] int64, of the same rows.
        sup_logits: [B, K] logits of the queries.
        counts: [K] training images of each class.
        alpha: weight of a feature of the same class as a positive.
        beta: weight of the own class's centre as a positive.
        gamma: weight of the features in the denominator.
        temperature: temperature of the feature similarities; the logits have 1.
        queue_size: Q.

    Source: Cui et al. 2021 (arXiv 2107.12028), equation 4; dvlab-research/Parametric-Contrastive-Learning
    PaCo/LT/losses.py, whose constants 1e-9 and 1e-12 are kept.
    """
    num_queries = (features.shape[0] - queue_size) // 2
    features, sup_logits, labels_B = features.float(), sup_logits.float(), labels[:num_queries]
    prior_K = torch.as_tensor(counts, device=features.device).float()
    prior_K = prior_K / prior_K.sum()
    centres_BK = sup_logits + (prior_K + 1e-9).log()
    similar_BN = linear_float32(features[:num_queries], features) / temperature
    logits = torch.cat((centres_BK, similar_BN), dim=1)
    logits = logits - logits.detach().amax(1, keepdim=True)

    others_BN = 1.0 - torch.eye(num_queries, features.shape[0], device=features.device)
    positive_BN = (labels_B[:, None] == labels) * others_BN
    own_centre_BK = F.one_hot(labels_B, sup_logits.shape[1])
    positive = torch.cat((beta * own_centre_BK, alpha * positive_BN), dim=1)
    allowed = torch.cat((torch.ones_like(centres_BK), gamma * others_BN), dim=1)
    log_prob = logits - ((logits.exp() * allowed).sum(1, keepdim=True) + 1e-12).log()
    return -((positive * log_prob).sum(1) / positive.sum(1)).mean()


def build_loss(cfg: TeacherTrainingConfig, counts: Sequence[int], device: torch.device) -> Loss:
    """Return the recipe's ``loss(logits_BK, labels_B, weights_K)``."""
    counts_K = torch.tensor(list(counts), device=device)
    losses: dict[str, Loss] = {
        "ce": lambda logits, labels, weights: F.cross_entropy(logits.float(), labels, weights),
        "focal": lambda logits, labels, weights: cb_focal_loss(logits, labels, cfg.focal_gamma, weights),
        "ldam": lambda logits, labels, weights: ldam_loss(
            logits, labels, counts_K, cfg.ldam_max_margin, cfg.ldam_scale, weights
        ),
        "vs": lambda logits, labels, weights: vs_loss(logits, labels, counts_K, cfg.vs_tau, cfg.vs_gamma, weights),
        "balanced_softmax": lambda logits, labels, weights: balanced_softmax_loss(logits, labels, counts_K, weights),
        "logit_adjustment": lambda logits, labels, weights: logit_adjustment_loss(
            logits, labels, counts_K, cfg.adjustment_tau, weights
        ),
    }
    return losses[cfg.loss]
