"""Bias, shortcut and ReLU inside the teacher's convolutions; cuDNN's own search for the teacher alone."""

import logging

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import CUDA, fake_cuda
from small_model import lively
from torch import Tensor, nn

from fastdeitlt import config
from fastdeitlt.core.joint import JointForward, step_forward
from fastdeitlt.models import create_student, create_teacher
from fastdeitlt.models.epilogue import ConvRelu, conv_relu, fuse_epilogues
from fastdeitlt.models.fold import fold_batchnorm
from fastdeitlt.models.teacher import Teacher

CPU = torch.device("cpu")


def fused_calls(network: nn.Module) -> int:
    return sum(isinstance(module, ConvRelu) for module in network.modules())


@pytest.mark.parametrize(("arch", "calls"), [("resnet8", 7), ("resnet18", 17), ("resnet50", 49), ("regnety_002", 53)])
def test_the_function_is_the_same_with_fewer_passes(arch, calls):
    """ResNet: every convolution but those of the shortcuts. RegNetY: the stem, and four in each of 13 blocks."""
    network = fold_batchnorm(lively(create_teacher(arch, 5)))
    fused, images = fuse_epilogues(network), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fused(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert fused_calls(fused) == calls and fused_calls(network) == 0


class Odd(nn.Module):
    """What must stay as it is: an output read twice, a layer called twice, a sum scaled, padding by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.again, self.scaled, self.one = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.reflected = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(3, 3, 3, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        x = F.relu(y) + y
        x = F.relu(self.again(self.again(x)))
        x = F.relu(torch.add(self.scaled(x), x, alpha=2))
        x = F.relu(self.same(F.relu(self.reflected(x))))
        return F.relu(1 + self.one(x))


def test_what_does_not_fit_stays_as_it_is():
    torch.manual_seed(0)
    network, images = Odd().eval(), torch.randn(2, 3, 8, 8)
    fused = fuse_epilogues(network)
    with torch.no_grad():
        assert torch.equal(fused(images), network(images))
    assert fused_calls(fused) == 0


@pytest.mark.parametrize("shortcut", [False, True])
def test_a_convolution_without_bias_and_with_groups(shortcut):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=1, groups=2, bias=False)
    x, z = torch.randn(2, 4, 9, 9), torch.randn(2, 8, 5, 5) if shortcut else None
    with torch.no_grad():
        expected = F.relu(conv(x) if z is None else conv(x) + z)
        assert torch.equal(ConvRelu(conv)(x, z), expected)


def test_the_op_passes_opcheck():
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(8, 4, 3, 3), torch.randn(8)
    for z in (None, torch.randn(2, 8, 9, 9)):
        torch.library.opcheck(conv_relu.overload, (x, weight, bias, z, (1, 1), (1, 1), (1, 1), 1))


def test_a_network_that_cannot_be_traced_is_left_with_a_warning(caplog):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with caplog.at_level(logging.WARNING, "fastdeitlt"):
        assert isinstance(fuse_epilogues(Branching()), Branching)
    assert "cannot trace Branching, not fused" in caplog.text


def parts(network: nn.Module | None = None, **settings: object):
    """Configuration, student and teacher on the CPU."""
    values = {"student.name": "deit_tiny_distilled_patch16_32", "student.img_size": 32, "student.depth": 1}
    cfg = config.build({**values, **{name.replace("__", "."): value for name, value in settings.items()}})
    torch.manual_seed(0)
    student = create_student(num_classes=5, **cfg.student.architecture).train()
    network = network or fold_batchnorm(lively(create_teacher("resnet8", 5))).to(memory_format=torch.channels_last)
    return cfg, student, Teacher(network, 5)


def joint_of(network: nn.Module | None = None, **settings: object) -> JointForward:
    cfg, student, teacher = parts(network, **settings)
    return JointForward(student, teacher, [1] * 5, cfg, CPU)


def losses_of(joint: JointForward, device: torch.device = CPU) -> list[Tensor]:
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    weights = torch.ones(5, device=device)
    forward = step_forward(joint, False)
    return [*forward(images.to(device), labels.to(device), None, None, weights, None)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_setting_gives_equal_losses(precision):
    plain, fused = (
        losses_of(joint_of(train__precision=precision, teacher__fuse_epilogues=fuse)) for fuse in (False, True)
    )
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_setting_reaches_the_step_and_leaves_the_teacher_alone():
    joint = joint_of(teacher__fuse_epilogues=True)
    assert joint.teacher is not None and fused_calls(joint.teacher) == 7
    assert fused_calls(joint_of().teacher) == 0


def test_the_fused_teacher_stays_on_the_gpu_channels_last():
    cfg, student, teacher = parts(teacher__fuse_epilogues=True)
    with fake_cuda():
        joint = JointForward(student.to(CUDA), teacher.to(CUDA), [1] * 5, cfg, CUDA)
        maps = []
        for module in joint.teacher.modules():
            if isinstance(module, ConvRelu):
                module.register_forward_hook(lambda _, __, out: maps.append(out))
        assert all(loss.device == CUDA for loss in losses_of(joint, CUDA))
    assert len(maps) == 7 and {x.dtype for x in maps} == {torch.bfloat16}
    assert all(x.device == CUDA and x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("on", [False, True])
def test_cudnn_searches_for_the_teacher_alone(on):
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return x.flatten(1)[:, :5]

    assert not torch.backends.cudnn.benchmark
    joint = joint_of(nn.Sequential(Watching()), teacher__cudnn_benchmark=on)
    convolutions = [m for m in joint.student.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1, "the student's patches, which are a matrix product in training"
    losses_of(joint)[0].backward()
    assert seen == [on] and not torch.backends.cudnn.benchmark
