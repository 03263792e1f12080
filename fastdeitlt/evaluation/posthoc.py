"""Post-hoc corrections fitted on validation images: temperature, class prior, the weight of the two heads.

The logits of each method are a sum of one or two features of the heads' log-probabilities, with weights that minimise
the NLL of validation images, averaged over classes. This convex problem is solved by Newton's method, so a fit has no
settings and no seed. No method is fitted on test images.
"""

# N images, K classes, F features of a method

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from torch import Tensor

from fastdeitlt.errors import UserError, first_fault
from fastdeitlt.evaluation.metrics import GROUPS, Number, Result, cell, heads_of, readable, score_heads
from fastdeitlt.evaluation.shift import SHIFTS, accuracy_under, shifted_prior

CHUNK = 2048
HEADER = ["", *GROUPS, "ECE", "NLL", "fitted"]
MAX_STEPS = 50
MAX_TEMPERATURE = 100.0
"""Upper bound of a temperature alone: it may flatten the probabilities of a bad model, but not reverse their order."""
TOLERANCE = 1e-10

# (cls_logits_NK, dist_logits_NK, log_prior_K) -> F features [N, K]
Features = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


def _mean(cls_NK: Tensor, dist_NK: Tensor) -> Tensor:
    return ((cls_NK + dist_NK) / 2).log_softmax(1)


def _heads(cls_NK: Tensor, dist_NK: Tensor) -> list[Tensor]:
    return [cls_NK.log_softmax(1), dist_NK.log_softmax(1)]


METHODS: dict[str, tuple[Features, tuple[float, ...]]] = {
    "AVG, temperature": (lambda c, d, _: [_mean(c, d)], (1.0,)),
    "CLS, temperature": (lambda c, d, _: [c.log_softmax(1)], (1.0,)),
    "DIST, temperature": (lambda c, d, _: [d.log_softmax(1)], (1.0,)),
    "AVG, class prior": (lambda c, d, log_prior_K: [_mean(c, d), (-log_prior_K).expand_as(c)], (1.0, 0.0)),
    "fusion": (lambda c, d, _: _heads(c, d), (0.5, 0.5)),
}
"""Name -> its features, and the weights that leave the heads' logits unchanged (for a fusion, those of AVG).

Temperature: Guo et al. 2017, section 4.2. Class prior: Menon et al. 2021, eq. 9, ``logits - tau log prior``. Fusion:
the weight alpha of the DIST head."""


@dataclass(frozen=True)
class PostHoc:
    """Fitted methods and their scores on test images."""

    num_fitted: int
    """Number of validation images of the fit."""
    weights: dict[str, list[float]]
    """Method -> weights [F] of its features."""
    meaning: dict[str, str]
    """Method -> its weights as temperature, tau and alpha."""
    result: Result
    """Scores with methods as heads; "AVG" first, uncorrected."""
    prior_known: dict[str, Number]
    """Shifted prior -> accuracy in per cent of "AVG, class prior" adjusted to that prior; see shift.py."""

    def rows(self, split: str = "official") -> list[list[str]]:
        """Return a row per method: accuracies, ECE and NLL of all, fitted weights."""
        return [
            [
                name,
                *(cell(head.top1[split][group]) for group in GROUPS),
                cell(head.ece[split]["all"]),
                cell(head.nll[split]["all"], 3),
                self.meaning.get(name, "nothing"),
            ]
            for name, head in self.result.heads.items()
        ]

    def table(self, split: str = "official") -> Table:
        """Return ``rows`` as a table for a terminal."""
        name = self.result.split_name(split)
        table = Table(
            title=f"test images, fitted on {self.num_fitted:,} validation images, {name}",
            caption="\n".join(f"{method}: {meaning}" for method, meaning in self.meaning.items()),
            caption_justify="left",
        )
        for name in HEADER[:-1]:
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for row in self.rows(split):
            table.add_row(*row[:-1])
        return table

    def to_json(self) -> dict[str, Any]:
        """Return standard JSON."""
        return json.loads(_POST_HOC.dump_json(self))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "PostHoc":
        """Build the scores from ``to_json``'s tree.

        Raises:
            UserError: the tree is something else.
        """
        try:
            scores = _POST_HOC.validate_python(tree)
        except ValidationError as error:
            raise UserError(f"post-hoc scores: {first_fault(error)}. Rerun `fastdeitlt eval`.") from None
        return replace(scores, result=Result.from_json(tree["result"]))


_POST_HOC = TypeAdapter(PostHoc)


def log_prior(counts: Sequence[int]) -> Tensor:
    """Return log class frequencies, float64 [K]; an empty class counts as one image."""
    counts_K = torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    return (counts_K / counts_K.sum()).log()


def apply(method: str, weights: Sequence[float], cls_NK: Tensor, dist_NK: Tensor, log_prior_K: Tensor) -> Tensor:
    """Compute the logits [N, K] of a method, float32, from the heads' logits."""
    features, _ = METHODS[method]
    parts = [
        sum(w * feature for w, feature in zip(weights, features(c.double(), d.double(), log_prior_K), strict=True))
        for c, d in zip(cls_NK.split(CHUNK), dist_NK.split(CHUNK), strict=True)
    ]
    return torch.cat([torch.as_tensor(part).float() for part in parts])


def fit(method: str, cls_NK: Tensor, dist_NK: Tensor, labels_N: Tensor, log_prior_K: Tensor) -> list[float]:
    """Fit weights [F] that minimise the class-balanced NLL of the labels.

    It is averaged over the images of a class, then over classes. A Gaussian prior of deviation 1 around "no change",
    weighted like one image, keeps the weights finite if every image is classified correctly.
    """
    features, start = METHODS[method]
    support_K = labels_N.bincount(minlength=cls_NK.shape[1]).double()
    share_N = (1 / support_K / (support_K > 0).sum())[labels_N]
    start_F = torch.tensor(start, dtype=torch.float64)
    ridge = 1 / len(labels_N)
    chunks = list(zip(*(x.split(CHUNK) for x in (cls_NK, dist_NK, labels_N, share_N)), strict=True))

    def loss(weights_F: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return loss, gradient [F] and Hessian [F, F]."""
        offset_F = weights_F - start_F
        total = ridge * float(offset_F.square().sum()) / 2
        gradient_F, hessian_FF = ridge * offset_F, ridge * torch.eye(len(start), dtype=torch.float64)
        for c_BK, d_BK, labels_B, share_B in chunks:
            x_BFK = torch.stack(features(c_BK.double(), d_BK.double(), log_prior_K), dim=1)
            log_probs_BK = torch.einsum("f,bfk->bk", weights_F, x_BFK).log_softmax(1)
            label_B1 = labels_B[:, None]
            total -= float(share_B @ log_probs_BK.gather(1, label_B1)[:, 0])
            probs_BK = log_probs_BK.exp()
            mean_BF = torch.einsum("bk,bfk->bf", probs_BK, x_BFK)
            own_BF = x_BFK.gather(2, label_B1[:, None].expand(-1, len(start), 1))[..., 0]
            gradient_F = gradient_F + share_B @ (mean_BF - own_BF)
            centred_BFK = x_BFK - mean_BF[..., None]
            weighted_BFK = centred_BFK * (share_B[:, None] * probs_BK)[:, None]
            hessian_FF = hessian_FF + torch.einsum("bfk,bgk->fg", weighted_BFK, centred_BFK)
        return total, gradient_F, hessian_FF

    weights_F = start_F
    value, gradient_F, hessian_FF = loss(weights_F)
    for _ in range(MAX_STEPS):
        step_F = torch.linalg.solve(hessian_FF, gradient_F)
        decrease = float(gradient_F @ step_F)
        if decrease < TOLERANCE:
            break
        length = 1.0
        while (trial := loss(weights_F - length * step_F))[0] > value - length * decrease / 4 and length > 1e-6:
            length /= 2
        weights_F = weights_F - length * step_F
        value, gradient_F, hessian_FF = trial
    return weights_F.tolist() if len(start) > 1 else [max(float(weights_F), 1 / MAX_TEMPERATURE)]


def describe(method: str, weights: Sequence[float]) -> str:
    """Format weights as T (temperature), tau (prior) and alpha (weight of DIST)."""
    total = weights[0] if len(weights) == 1 or method == "AVG, class prior" else weights[0] + weights[1]
    if not total > 0:
        return "no fit: the heads rank the classes worse than chance"
    temperature = f"T = {1 / total:.2f}"
    if len(weights) == 1:
        return temperature
    if method == "AVG, class prior":
        return f"{temperature}, tau = {weights[1] / total:.2f}"
    return f"{temperature}, alpha = {weights[1] / total:.2f}"


def temperatures(val: tuple[Tensor, Tensor, Tensor], counts: Sequence[int]) -> dict[str, float]:
    """Fit temperatures of AVG, CLS and DIST, which divide the logits.

    ``val`` is (cls_logits_NK, dist_logits_NK, labels_N).
    """
    cls_NK, dist_NK, labels_N = readable(*val)
    log_prior_K = log_prior(counts)
    heads = ("AVG", "CLS", "DIST")
    return {head: 1 / fit(f"{head}, temperature", cls_NK, dist_NK, labels_N, log_prior_K)[0] for head in heads}


def post_hoc(
    val: tuple[Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
    counts: Sequence[int],
    dataset: str | None = None,
) -> PostHoc:
    """Fit every method on ``val`` and score it on ``test``.

    Each is (cls_logits_NK, dist_logits_NK, labels_N).

    Raises:
        UserError, NonFiniteError: see ``score``.
    """
    log_prior_K = log_prior(counts)
    cls_NK, dist_NK, labels_N = readable(*val)
    weights = {method: fit(method, cls_NK, dist_NK, labels_N, log_prior_K) for method in METHODS}
    num_fitted = len(labels_N)
    cls_NK, dist_NK, labels_N = readable(*test)
    results: dict[str, Result] = {}
    prior_known: dict[str, float] = {}
    for name, logits_NK in _corrected(cls_NK, dist_NK, weights, log_prior_K):  # one matrix [N, K] at a time
        results[name] = score_heads({name: logits_NK}, labels_N, counts, dataset)
        if name == "AVG, class prior":
            prior_known = _with_prior_known(logits_NK, labels_N, counts)
    return PostHoc(
        num_fitted=num_fitted,
        weights=weights,
        meaning={method: describe(method, w) for method, w in weights.items()},
        result=replace(results["AVG"], heads={name: result.heads[name] for name, result in results.items()}),
        prior_known=prior_known,
    )


def _corrected(
    cls_NK: Tensor, dist_NK: Tensor, weights: dict[str, list[float]], log_prior_K: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield AVG and each method with its logits_NK."""
    yield "AVG", heads_of(cls_NK, dist_NK)["AVG"]
    yield "AVG, class prior, tau = 1", heads_of(cls_NK, dist_NK)["AVG"] - log_prior_K.float()
    for method, w in weights.items():
        yield method, apply(method, w, cls_NK, dist_NK, log_prior_K)


def _with_prior_known(logits_NK: Tensor, labels_N: Tensor, counts: Sequence[int]) -> dict[str, float]:
    """Return the accuracy in per cent under each prior of ``SHIFTS``.

    ``logits_NK`` are without a prior, and are adjusted to each.
    """
    support_K = labels_N.bincount(minlength=len(counts)).numpy()
    accuracies = {}
    for name, rho in SHIFTS.items():
        prior_K = torch.from_numpy(shifted_prior(counts, rho))
        predicted_N = (logits_NK + prior_K.log().float()).argmax(1)
        correct_K = labels_N[predicted_N == labels_N].bincount(minlength=len(counts))
        accuracies[name] = accuracy_under(prior_K.numpy(), correct_K.numpy(), support_K)
    return accuracies
