"""Folding batch norms."""

import logging

import pytest
import torch
from small_model import lively
from torch import Tensor, nn

from fastdeitlt.models import create_teacher
from fastdeitlt.models.fold import fold_batchnorm


class Branches(nn.Module):
    """A batch norm before any convolution, a convolution read twice, one called twice, and one plain pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = (nn.BatchNorm2d(3) for _ in range(3))
        self.shared, self.again, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pair = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = self.twice(x) + x
        x = self.last(self.again(self.again(x)))
        return self.pair(self.plain(x))


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "regnety_002", "efficientnet_b0"])
def test_folding_batch_norms_keeps_the_function(arch: str) -> None:
    network = lively(create_teacher(arch, 5))
    images = torch.randn(2, 3, 64, 64)
    folded = fold_batchnorm(network)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_only_batch_norms_that_alone_follow_a_convolution_are_folded() -> None:
    network, images = lively(Branches()), torch.randn(1, 3, 8, 8)
    folded = fold_batchnorm(network)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)
    left = {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {"first", "twice", "last"}


def test_a_network_that_cannot_be_traced_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    network, images = lively(Branching()), torch.randn(1, 3, 8, 8)
    with caplog.at_level(logging.INFO, "fastdeitlt"), torch.no_grad():
        assert torch.equal(fold_batchnorm(network)(images), network(images))
    assert "Branching: torch.fx cannot trace it, batch norms not folded" in caplog.text
