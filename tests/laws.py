"""Two-sample tests of distributions, without SciPy."""

import numpy as np
import torch

REJECT = 1e-4
"""p-value below which two laws differ; seeds are fixed, so a test gives one answer."""


def ks_p(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test (asymptotic; conservative when there are ties)."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    grid = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)).max()
    root = np.sqrt(len(a) * len(b) / (len(a) + len(b)))
    k = np.arange(1, 101)
    return float(np.clip(2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * root * gap) ** 2)), 0, 1))


def counts_p(observed: np.ndarray, other: np.ndarray) -> float:
    """p-value of the chi-square test that two samples have the same category shares, from their category counts."""
    table = np.stack([np.ravel(observed), np.ravel(other)]).astype(float)
    table = table[:, table.sum(0) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return chi_square_p(((table - expected) ** 2 / expected).sum(), table.shape[1] - 1)


def chi_square_p(statistic: float, freedom: int) -> float:
    """Upper tail of the chi-square distribution."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()
