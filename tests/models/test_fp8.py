"""Float8 products: of the rounded factors, in all linear maps of a student's blocks, refused without hardware."""

import pytest
import torch

from fastdeitlt import config
from fastdeitlt.core.joint import JointForward
from fastdeitlt.errors import UserError
from fastdeitlt.models import create_student, fp8
from fastdeitlt.models.layers import Linear
from fastdeitlt.teachers.step import Step

CPU = torch.device("cpu")
BF16 = 2**-8
"""Rounding of a bfloat16 result."""


def _rounded(x_MK):
    matrix_MK, scale_M1 = fp8.quantise(x_MK)
    return matrix_MK.double() * scale_M1.double()


def _close(got, expected, rtol=BF16):
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item() / 8)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_map_and_its_gradients_are_products_of_rounded_factors(compiled):
    torch.manual_seed(0)
    linear = Linear(64, 48)
    linear.fp8 = True
    linear.weight.data = linear.weight.data.bfloat16().float()  # compiled, rounding to bfloat16 is left out
    x = torch.randn(3, 7, 64).bfloat16().float().requires_grad_()
    upstream = torch.randn(3, 7, 48).bfloat16()
    out = (torch.compile(linear, fullgraph=True) if compiled else linear)(x)
    out.backward(upstream)
    x_MK, grad_MN = x.detach().bfloat16().flatten(0, 1), upstream.flatten(0, 1)
    weight_NK, bias_N = linear.weight.detach().bfloat16(), linear.bias.detach().double()
    product_MN = _rounded(x_MK) @ _rounded(weight_NK).T
    assert out.dtype == torch.bfloat16
    _close(out.flatten(0, 1), product_MN + bias_N, 2 * BF16)  # rounded twice
    _close(x.grad.flatten(0, 1), _rounded(grad_MN) @ _rounded(weight_NK.T).T)
    _close(linear.weight.grad, grad_MN.double().T @ x_MK.double())
    _close(linear.bias.grad, grad_MN.double().sum(0), 2 * BF16)
    exact_MN = x_MK.double() @ weight_NK.double().T
    assert 0 < (product_MN - exact_MN).norm() / exact_MN.norm() < 0.05
    assert linear.eval()(x.detach()).dtype == torch.float32  # outside of training as without fp8


def test_a_row_has_its_own_scale_and_what_is_not_finite_stays_so():
    torch.manual_seed(0)
    a_MK, b_NK = torch.randn(4, 32), torch.randn(16, 32)
    expected = fp8.scaled_product(a_MK, b_NK)
    a_MK[1], a_MK[2], a_MK[3, 5] = 1e30, 0, float("inf")
    got = fp8.scaled_product(a_MK, b_NK)
    assert torch.equal(got[0], expected[0]) and not got[2].any() and got[:3].isfinite().all()
    assert not got[3].isfinite().any()


def _loss_and_gradient(precision, impl="torch"):
    torch.manual_seed(0)
    kernels = dict.fromkeys(("add_layernorm", "bias_gelu"), impl)
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=2, drop_path=0.0, **kernels)
    cfg = config.build({"train.precision": precision, "train.compile": False})
    joint = JointForward(student.train(), None, [5] * 11, cfg, CPU)
    images_BCHW, labels_B = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = joint(images_BCHW, labels_B, None, None, torch.ones(11), None)
    losses.loss.backward()
    return losses.loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_every_product_of_the_blocks_is_a_float8_one_with_and_without_kernels(monkeypatch):
    """Two blocks of four maps; the last block's queries have a product of their own; twice as many products."""
    monkeypatch.setattr("fastdeitlt.core.joint.check_fp8", lambda device: None)
    # a GPU with float8 products has bfloat16; this CPU may not
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    shapes = []
    real = fp8.scaled_product
    monkeypatch.setattr(fp8, "scaled_product", lambda a, b, **fast: shapes.append(len(a)) or real(a, b, **fast))
    exact, exact_gradient = _loss_and_gradient("fp32")
    assert not shapes
    for impl in ("torch", "triton"):
        loss, gradient = _loss_and_gradient("fp8", impl)
        assert len(shapes) == 2 * (4 + 5)
        shapes.clear()
        assert loss == pytest.approx(exact, rel=1e-2) and loss != exact
        assert torch.cosine_similarity(gradient, exact_gradient, 0) > 0.99


@pytest.mark.parametrize(("capability", "got"), [(None, "got cpu"), ((8, 0), "got compute capability 8.0")])
def test_a_device_without_float8_products_is_refused(capability, got, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    student = create_student("deit_tiny_distilled_patch16_32", 11, depth=1)
    device = CPU if capability is None else torch.device("cuda", 0)
    with pytest.raises(UserError, match=f"train.precision=fp8: {got}.*Use train.precision=bf16"):
        JointForward(student, None, [5] * 11, config.build({"train.precision": "fp8"}), device)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_a_gpu_with_float8_products_is_accepted(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fp8.check_fp8(torch.device("cuda", 0))


def test_a_teacher_s_training_is_refused():
    with pytest.raises(UserError, match=r"train\.precision=fp8: supports a student's training only"):
        Step(None, None, config.build({"train.precision": "fp8"}), CPU)
