"""Decisions under autocast are those of float32 logits."""

import pytest
import torch
from torch import nn

from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.classifier import Classifier, ConvClassifier, NormedLinear
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def nearly_equal_classes(model: nn.Module) -> nn.Module:
    """Give every classifier logits of 4 and 4.001, which are equal in bfloat16."""
    classifiers = [module for module in model.modules() if isinstance(module, Classifier | ConvClassifier)]
    assert classifiers
    for classifier in classifiers:
        nn.init.zeros_(classifier.weight)
        classifier.bias.data = torch.tensor([4.0, 4.001])
    return model.eval()


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "mobilenetv3_small_050", "dla46_c"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_teachers_decision_between_near_classes_is_not_a_tie(arch: str, fused: bool) -> None:
    network = nearly_equal_classes(create_teacher(arch, 2))
    teacher = Teacher(fold_batchnorm(network), 2).for_autocast(torch.bfloat16)
    teacher = teacher.with_fused_epilogues() if fused else teacher
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(IMAGES).argmax(1).tolist() == [1, 1]


def test_a_students_decision_is_not_a_tie() -> None:
    student = nearly_equal_classes(create_student("deit_tiny_distilled_patch8_32", num_classes=2, depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert [head.argmax(1).tolist() for head in student.forward_heads(IMAGES)] == [[1, 1], [1, 1]]


def test_cosines_are_float32_and_their_gradients_right() -> None:
    head, features = NormedLinear(8, 3), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = head(features.bfloat16().float())
    expected = head(features.bfloat16().float())
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, expected)
    gradients = [torch.autograd.grad(out.square().sum(), head.weight)[0] for out in (under_autocast, expected)]
    torch.testing.assert_close(*gradients)


def test_training_uses_autocasts_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Classifier(8, 3)(torch.randn(4, 8)).dtype == torch.bfloat16
