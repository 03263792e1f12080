"""Accuracy under shifted class priors: test sets with a long tail, forward or backward.

A shifted test set is usually sampled from the balanced one (LADE, Hong et al. 2021; SADE, Zhang et al. 2022). Here its
expected accuracy is computed, the mean of class accuracies under its prior, without sampling noise and from every test
image.
"""

# K classes

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from fastdeitlt.data.sets.counts import class_order
from fastdeitlt.evaluation.metrics import Result, cell

SHIFTS: dict[str, float] = {
    **{f"forward {rho}": float(rho) for rho in (50, 25, 10, 5, 2)},
    "uniform": 1.0,
    **{f"backward {rho}": 1 / rho for rho in (2, 5, 10, 25, 50)},
}
"""Name -> test frequency of the class largest in training over that of the smallest. Below 1: reversed tail."""


def shifted_prior(counts: Sequence[int], rho: float) -> np.ndarray:
    """Return the prior [K] that falls exponentially with rank by training size.

    The first class is ``rho`` times as frequent as the last.
    """
    rank_K = np.argsort(class_order(counts), kind="stable")
    share_K = rho ** -(rank_K / max(len(counts) - 1, 1))
    return share_K / share_K.sum()


def accuracy_under(prior_K: np.ndarray, correct_K: np.ndarray, support_K: np.ndarray) -> float:
    """Return the accuracy in per cent under a class prior; NaN without test images."""
    present_K = support_K > 0
    if not present_K.any():
        return float("nan")
    weights_K = prior_K[present_K] / prior_K[present_K].sum()
    return 100 * float(weights_K @ (correct_K[present_K] / support_K[present_K]))


def accuracies(result: Result) -> dict[str, dict[str, float]]:
    """Return head -> name of the shift -> accuracy in per cent."""
    support_K = np.array(result.support_K)
    priors = {name: shifted_prior(result.counts_K, rho) for name, rho in SHIFTS.items()}
    return {
        name: {shift: accuracy_under(prior_K, np.array(head.correct_K), support_K) for shift, prior_K in priors.items()}
        for name, head in result.heads.items()
    }


def table(shifted: Mapping[str, Mapping[str, float]], prior_known: Mapping[str, float] | None = None) -> Table:
    """Return a terminal table of shifts by head; ``prior_known``: see ``PostHoc``."""
    columns = dict(shifted) | ({"AVG, known prior": prior_known} if prior_known else {})
    table = Table(title="accuracy in % on shifted test class frequencies (ratio of first to last class)")
    table.add_column("test classes")
    for name in columns:
        table.add_column(name, justify="right")
    for name in SHIFTS:
        table.add_row(name, *(cell(column[name]) for column in columns.values()))
    return table
