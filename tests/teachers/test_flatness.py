"""What a teacher's sharpness costs."""

import pytest
import torch
from torch import nn

from fastdeitlt.models import create_teacher
from fastdeitlt.teachers import flatness
from fastdeitlt.teachers.flatness import sharpness, top_eigenvalue


def test_sharpness_of_500_images_costs_few_passes():
    """One gradient, a loss at the weights and at each radius, and second derivatives of 125 images alone."""
    torch.manual_seed(0)
    network, images, labels = create_teacher("resnet8", 3), torch.randn(500, 3, 8, 8), torch.arange(500) % 3
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sharpness(network, images, labels)
    whole = 1 + 1 + len(flatness.RADII)
    assert seen[:whole] == [500] * whole
    assert set(seen[whole:]) == {125} and len(seen[whole:]) <= flatness.HESSIAN_PASSES


def test_the_power_iteration_ends_when_its_value_stands():
    weight, calls = nn.Parameter(torch.ones(2)), []

    def share():
        calls.append(1)
        return 0.5 * (torch.tensor([1.0, 10.0]) * weight**2).sum()

    assert top_eigenvalue([share], [weight], 50) == pytest.approx(10.0, rel=1e-3)
    assert len(calls) < 10
