"""The bias + GELU kernels against float64: output, both gradients, odd widths, extreme values."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from fastdeitlt.kernels import bias_gelu as module
from fastdeitlt.kernels.bias_gelu import bias_gelu
from hypothesis import strategies as st

from fastdeitlt.errors import UserError

GPU = torch.cuda.is_available()
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {FULL: 2e-6, HALF: 2e-3, BRAIN: 1e-2}
"""Type -> largest error, as a share of the largest value."""


def example(shape, device, kinds=(FULL, FULL), seed=0, scale=1.0):
    """u and bias."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(size, generator=generator) * scale for size in (shape, shape[-1:]))
    return [t.to(device, kind).requires_grad_() for t, kind in zip(tensors, kinds, strict=True)]


def close(got, expected, kind, name):
    assert got.dtype == kind and got.shape == expected.shape, name
    assert torch.isfinite(got).all(), name
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCES[kind], name


def check_against_float64(u, bias):
    h = bias_gelu(u, bias, impl="triton")
    upstream = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h)
    got = torch.autograd.grad(h, (u, bias), upstream)
    exact = [t.detach().double().requires_grad_() for t in (u, bias)]
    expected = F.gelu(exact[0] + exact[1])
    close(h.detach(), expected.detach(), u.dtype, "output")
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    for name, tensor, gradient, value in zip(("u", "bias"), (u, bias), got, gradients, strict=True):
        close(gradient, value, tensor.dtype, f"gradient of {name}")


@pytest.mark.parametrize("shape", [(2, 3, 768), (1, 3072), (5, 1, 513), (3, 1), (9, 40)], ids=str)
def test_output_and_gradients_match_float64_at_any_shape(shape, device):
    check_against_float64(*example(shape, device))


@pytest.mark.parametrize("kinds", [(BRAIN, FULL), (HALF, FULL), (BRAIN, BRAIN), (FULL, HALF)], ids=str)
def test_types_are_kept(kinds, device):
    check_against_float64(*example((3, 5, 96), device, kinds))


@hypothesis.settings(max_examples=15)
@hypothesis.given(rows=st.integers(1, 40), width=st.integers(1, 600), seed=st.integers(0, 99))
def test_any_shape_matches_float64(rows, width, seed):
    check_against_float64(*example((rows, width), torch.device("cuda" if GPU else "cpu"), seed=seed))


def test_more_rows_than_programs_hold_are_all_summed(device, monkeypatch):
    monkeypatch.setattr(module, "num_sms", lambda device: 1)
    check_against_float64(*example((301, 20), device))


def test_values_of_ten_thousand_stay_exact(device):
    check_against_float64(*example((4, 64), device, scale=1e4))
    u = torch.tensor([[-1e4, -40.0, 0.0, 40.0, 1e4]], device=device).requires_grad_()
    h = bias_gelu(u, torch.zeros(5, device=device), impl="triton")
    assert h.tolist() == [[0.0, 0.0, 0.0, 40.0, 1e4]]
    assert torch.autograd.grad(h.sum(), u)[0].tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


def test_the_polynomial_of_the_tail_is_as_exact_as_float32(device):
    u = torch.linspace(-20, 20, 4001, device=device)[None].requires_grad_()
    h = bias_gelu(u, torch.zeros(4001, device=device), impl="triton")
    exact = u.detach().double().requires_grad_()
    expected = F.gelu(exact)
    power_of_2 = 2.5e-7 if GPU else 0.0  # a GPU's is approximate by as much
    torch.testing.assert_close(h.double(), expected, rtol=1e-7, atol=1e-7 + power_of_2 / 5)
    slopes = [torch.autograd.grad(y.sum(), x)[0].double() for y, x in ((h, u), (expected, exact))]
    torch.testing.assert_close(*slopes, rtol=0, atol=2e-7 + power_of_2)


def test_what_is_not_finite_is_not_hidden(device):
    u = torch.tensor([[float("inf"), -float("inf"), float("nan")]], device=device).requires_grad_()
    h = bias_gelu(u, torch.zeros(3, device=device), impl="triton")
    (slope,) = torch.autograd.grad(h.sum(), u)
    expected = [float("inf"), 0.0, float("nan")], [1.0, 0.0, float("nan")]
    for got, values in zip((h.detach(), slope), expected, strict=True):
        torch.testing.assert_close(got[0].cpu(), torch.tensor(values), rtol=0, atol=0, equal_nan=True)


def test_two_runs_are_equal_bit_for_bit(device):
    tensors = example((33, 70), device, (BRAIN, FULL))
    runs = [torch.autograd.grad(bias_gelu(*tensors, impl="triton").float().square().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_cpu_reference_of_the_op_matches_float64(monkeypatch):
    monkeypatch.setattr(module, "interpreted", lambda: False)
    check_against_float64(*example((3, 5, 40), torch.device("cpu")))


def test_ops_pass_opcheck(device):
    u, bias = example((3, 16), device)
    torch.library.opcheck(torch.ops.fastdeitlt.bias_gelu.default, (u, bias))
    detached = (torch.ones_like(u), u.detach(), bias.detach())
    torch.library.opcheck(torch.ops.fastdeitlt.bias_gelu_backward.default, detached)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4)}, r"u: got shape \(4,\), expected \(rows, \.\.\., width\), not empty"),
        ({"u": torch.zeros(0, 8)}, "not empty"),
        ({"u": torch.zeros(2, 8).double()}, "u: got dtype float64"),
        ({"u": torch.zeros(8, 2).T}, "u: got strides .* expected contiguous"),
        ({"bias": torch.zeros(9)}, r"bias: got shape \(9,\), expected \(8,\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: got device meta, expected cpu"),
        ({"impl": "fast"}, "got impl 'fast', expected one of auto, torch, triton"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(UserError, match=message):
        bias_gelu(**{"u": torch.zeros(2, 8), "bias": torch.zeros(8), "impl": "triton"} | change)
