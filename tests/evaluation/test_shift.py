"""Shifted test priors: the expected accuracy of the drawn test sets of the literature."""

import numpy as np
import pytest
import torch

from fastdeitlt.evaluation import shift
from fastdeitlt.evaluation.metrics import score

COUNTS = [1000, 400, 150, 60, 20, 5]


def result(num_images=600):
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_images) % 6
    cls_NK, dist_NK = (torch.randn(num_images, 6, generator=generator) for _ in range(2))
    onehot_NK = torch.nn.functional.one_hot(labels_N, 6)
    return score(cls_NK + 3 * onehot_NK * torch.linspace(1, 0, 6), dist_NK + 2 * onehot_NK, labels_N, COUNTS)


def test_a_prior_falls_from_the_largest_class_to_the_smallest_by_its_ratio():
    prior_K = shift.shifted_prior(COUNTS, 50)
    assert prior_K.sum() == pytest.approx(1) and prior_K[0] / prior_K[-1] == pytest.approx(50)
    assert np.allclose(prior_K[1:] / prior_K[:-1], 50 ** (-1 / 5))
    assert np.allclose(shift.shifted_prior(COUNTS, 1 / 50), prior_K[::-1])
    assert np.allclose(shift.shifted_prior(COUNTS[::-1], 50), prior_K[::-1])  # by training size, not by number


def test_uniform_is_balanced_accuracy_and_a_shift_is_the_mean_of_many_draws():
    scores = result()
    found = shift.accuracies(scores)
    assert found["AVG"]["uniform"] == pytest.approx(scores.heads["AVG"].balanced_accuracy)
    assert found["CLS"]["forward 50"] > found["CLS"]["uniform"] > found["CLS"]["backward 50"]
    prior_K, accuracy_K = shift.shifted_prior(COUNTS, 50), scores.class_accuracy("CLS") / 100
    rng = np.random.default_rng(0)
    classes_N = rng.choice(6, 200_000, p=prior_K)
    drawn = 100 * (rng.random(200_000) < accuracy_K[classes_N]).mean()
    assert found["CLS"]["forward 50"] == pytest.approx(drawn, abs=0.5)


def test_classes_without_test_images_are_left_out():
    prior_K = np.array([0.5, 0.3, 0.2])
    assert shift.accuracy_under(prior_K, np.array([4, 0, 1]), np.array([4, 0, 2])) == pytest.approx(100 * 0.6 / 0.7)
    assert np.isnan(shift.accuracy_under(prior_K, np.zeros(3), np.zeros(3)))
